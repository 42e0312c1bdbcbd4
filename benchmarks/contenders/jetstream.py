"""FastStream on a NATS server, as its documentation sets it up, at the best of its settings.

Left alone the server acknowledges what lies in the page cache and flushes every two minutes; with
`sync_interval: always` it flushes before it acknowledges, which is what all others here do.

`deliver`: publishers, each awaiting the acknowledgement of the stream, and one subscriber beside them on the same loop,
which gets messages one by one, as the typed event of the load, and acknowledges each after its handler, durably; the
clock stops when the server says that nothing is left to deliver or to acknowledge. `WAYS` are its push and pull
subscribers; each is tried, and the best one runs. Its log of each message is off. `ask`: request and reply without a
stream, by one caller, to a process of its own.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import nats
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, PullSub
from nats.errors import NoRespondersError

from benchmarks._load import NAME, Load, email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from benchmarks.contenders.child import child, ready, until_told

__all__ = ["WAYS", "Place", "ask", "best", "deliver"]

Place = Callable[[], AbstractContextManager[str]]
"""Gives the address of a bus that nobody used before."""

_DURABLE = "mirror"
_PATIENCE = 10.0

WAYS: dict[str, dict[str, Any]] = {
    "push": {"queue": _DURABLE},
    "push, 64 workers": {"queue": _DURABLE, "max_workers": 64},
    "pull of 64": {"durable": _DURABLE, "pull_sub": PullSub(batch_size=64)},
    "pull of 500": {"durable": _DURABLE, "pull_sub": PullSub(batch_size=500)},
}


@dataclass(frozen=True)
class EmailChanged:
    """The event of the load."""

    user_id: str
    name: str
    email: str


@dataclass(frozen=True)
class WhoIs:
    """The question of the load."""

    user_id: str


@asynccontextmanager
async def _started(broker: NatsBroker) -> AsyncIterator[None]:
    await broker.start()
    try:
        yield
    finally:
        await broker.stop()


def best(place: Place, load: Load, callers: int, seconds: float) -> str:
    """The way that gets most done, each tried three times, so that no hiccup of the machine decides."""

    def tried(way: str) -> float:
        with place() as url:
            return deliver(url, load, callers, seconds, way).rate

    return max((tried(way), way) for _ in range(3) for way in WAYS)[1]


def deliver(url: str, load: Load, callers: int, seconds: float, way: str) -> Sample:
    """So many publishers, and the subscriber beside them on the same loop, in a stream of a bus's name."""
    return asyncio.run(_deliver(url, load, callers, seconds, WAYS[way]))


async def _deliver(url: str, load: Load, callers: int, seconds: float, way: dict[str, Any]) -> Sample:
    address, _, bus = url.rpartition("/")
    broker, turns, handled = NatsBroker(address, logger=None), load.turns(callers), 0
    stream = f"{bus}_facts"

    async def handle(event: EmailChanged) -> None:
        nonlocal handled
        handled += 1

    broker.subscriber(
        f"{bus}.users.*", stream=JStream(stream, subjects=[f"{bus}.users.*"]), ack_policy=AckPolicy.NACK_ON_ERROR, **way
    )(handle)

    async def publish() -> None:
        number, key = next(turns)
        await broker.publish(EmailChanged(str(key), NAME, email(number)), f"{bus}.users.{key}", stream=stream)

    async with _started(broker):
        watching = await nats.connect(address)
        streams = watching.jetstream()

        async def acknowledged() -> None:
            while True:
                told = await streams.consumer_info(stream, _DURABLE)
                if not told.num_pending and not told.num_ack_pending:
                    return
                await asyncio.sleep(0.002)

        await drive(publish, callers, seconds * WARM, acknowledged)
        handled = 0
        sample = await drive(publish, callers, seconds, acknowledged)
        assert handled >= sample.count
        await watching.close()
        return sample


def ask(address: str, seconds: float) -> Sample:
    """Ask another process, again and again."""
    with child("benchmarks.contenders.jetstream", address):
        return asyncio.run(_ask(address, seconds))


async def _ask(address: str, seconds: float) -> Sample:
    broker = NatsBroker(address, logger=None)

    async def work() -> None:
        answer = await broker.request(WhoIs("42"), "who_is", timeout=_PATIENCE)
        assert await answer.decode() == "user42@example.org"

    async with _started(broker):
        await _answered(work)
        await drive(work, 1, seconds * WARM)
        return await drive(work, 1, seconds)


async def _answered(work: Callable[[], Awaitable[None]]) -> None:
    """The server may not yet know who answers."""
    async with asyncio.timeout(_PATIENCE):
        while True:
            try:
                await work()
                return
            except NoRespondersError:
                await asyncio.sleep(0.01)


async def _answer(address: str) -> None:
    """The other process."""
    broker = NatsBroker(address, logger=None)

    @broker.subscriber("who_is")
    async def answer(question: WhoIs) -> str:
        return email(int(question.user_id))

    async with _started(broker):
        ready()
        await until_told()


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1]))
