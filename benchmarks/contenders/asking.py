"""Cauce asked from one process and answering in another: a typed question, a text for an answer."""

from __future__ import annotations

import asyncio
import sys

from benchmarks._load import email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from benchmarks.contenders.child import child, ready, until_told
from cauce import Domain, Query, Service, connect, running

__all__ = ["ask"]

directory = Domain("directory")


class WhoIs(Query[str], domain=directory):
    """The question of the load."""

    user_id: str


service = Service("directory", owns=directory)


@service.answer
async def who_is(question: WhoIs) -> str:
    return email(int(question.user_id))


def ask(url: str, seconds: float) -> Sample:
    """Ask another process, again and again."""
    return asyncio.run(_ask(url, seconds))


async def _ask(url: str, seconds: float) -> Sample:
    with child("benchmarks.contenders.asking", url):
        async with connect(url) as bus:

            async def work() -> None:
                assert await bus.ask(WhoIs("42")) == "user42@example.org"

            await drive(work, 1, seconds * WARM)
            return await drive(work, 1, seconds)


async def _answer(url: str) -> None:
    """The other process."""
    async with running(service, bus=url):
        ready()
        await until_told()


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1]))
