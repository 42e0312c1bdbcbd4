"""A question over PostgreSQL that is nothing but `NOTIFY`: to another process and back, on connections that listen.

What no question over that server can be quicker than, unless it takes another way than a notification.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import asyncpg

from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from benchmarks.contenders.child import child, ready, until_told
from cauce.backends.postgres.link import split

__all__ = ["ask"]


def ask(url: str, seconds: float) -> Sample:
    """Notify another process and wait for its notification, again and again."""
    with child("benchmarks.contenders.notify", url):
        return asyncio.run(_ask(url, seconds))


async def _ask(url: str, seconds: float) -> Sample:
    listening, asking, schema = await _connected(url)
    answered = asyncio.get_running_loop().create_future()

    def told(*_: Any) -> None:
        answered.set_result(None)

    async def work() -> None:
        nonlocal answered
        answered = asyncio.get_running_loop().create_future()
        await asking.execute("select pg_notify($1, $2)", f"{schema}_ask", '{"user_id":"42"}')
        await answered

    await listening.add_listener(f"{schema}_answer", told)
    try:
        await drive(work, 1, seconds * WARM)
        return await drive(work, 1, seconds)
    finally:
        await listening.close()
        await asking.close()


async def _answer(url: str) -> None:
    """The other process."""
    listening, answering, schema = await _connected(url)
    asked = asyncio.Queue[None]()

    def told(*_: Any) -> None:
        asked.put_nowait(None)

    async def work() -> None:
        while True:
            await asked.get()
            await answering.execute("select pg_notify($1, $2)", f"{schema}_answer", "user42@example.org")

    working = asyncio.create_task(work())
    await listening.add_listener(f"{schema}_ask", told)
    ready()
    await until_told()
    working.cancel()
    await listening.close()
    await answering.close()


async def _connected(url: str) -> tuple[Any, Any, str]:
    dsn, schema = split(url)
    return await asyncpg.connect(dsn), await asyncpg.connect(dsn), schema


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1]))
