"""FastStream on a NATS server, as its documentation sets it up, at the best of its settings.

Left alone the server acknowledges what lies in the page cache and flushes every two minutes; with
`sync_interval: always` it flushes before it acknowledges, which is what all others here do.

`deliver`: publishers, each awaiting the acknowledgement of the stream, and one subscriber beside them on the same loop,
which gets messages one by one, as the typed event of the load, and acknowledges each after its handler, durably; the
clock stops when the server says that nothing is left to deliver or to acknowledge. `WAYS` are its push and pull
subscribers; each is tried, and the best one runs. Its log of each message is off. `four_processes`: the same with the
subscriber in four processes of its own, which the server deals messages out to. `ask`: request and reply without a
stream, by one caller, to a process of its own.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
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

__all__ = ["PROCESSES", "WAYS", "Place", "ask", "best", "deliver", "four_processes"]

Place = Callable[[], AbstractContextManager[str]]
"""Gives the address of a bus that nobody used before."""

_DURABLE = "mirror"
_PATIENCE = 10.0
PROCESSES = 4

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
    broker, handled = NatsBroker(address, logger=None), 0

    def told() -> None:
        nonlocal handled
        handled += 1

    _subscribe(broker, bus, way, told)
    async with _started(broker), _publishing(broker, address, bus, load, callers) as (publish, acknowledged):
        await drive(publish, callers, seconds * WARM, acknowledged)
        handled = 0
        sample = await drive(publish, callers, seconds, acknowledged)
        assert handled >= sample.count
        return sample


def four_processes(url: str, load: Load, callers: int, seconds: float, way: str) -> Sample:
    """So many publishers in this process, and the subscriber in four others."""
    return asyncio.run(_four_processes(url, load, callers, seconds, way))


async def _four_processes(url: str, load: Load, callers: int, seconds: float, way: str) -> Sample:
    address, _, bus = url.rpartition("/")
    with ExitStack() as stack:
        for _ in range(PROCESSES):
            stack.enter_context(child("benchmarks.contenders.jetstream", address, bus, way))
        broker = NatsBroker(address, logger=None)
        async with _started(broker), _publishing(broker, address, bus, load, callers) as (publish, acknowledged):
            await drive(publish, callers, seconds * WARM, acknowledged)
            return await drive(publish, callers, seconds, acknowledged)


def _subscribe(broker: NatsBroker, bus: str, way: dict[str, Any], told: Callable[[], object]) -> None:
    async def handle(event: EmailChanged) -> None:
        told()

    broker.subscriber(
        f"{bus}.users.*",
        stream=JStream(f"{bus}_facts", subjects=[f"{bus}.users.*"]),
        ack_policy=AckPolicy.NACK_ON_ERROR,
        **way,
    )(handle)


@asynccontextmanager
async def _publishing(
    broker: NatsBroker, address: str, bus: str, load: Load, callers: int
) -> AsyncIterator[tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]]:
    """What publishes one, and what waits until nothing is left to deliver or to acknowledge."""
    turns, stream = load.turns(callers), f"{bus}_facts"
    watching = await nats.connect(address)
    streams = watching.jetstream()

    async def publish() -> None:
        number, key = next(turns)
        await broker.publish(EmailChanged(str(key), NAME, email(number)), f"{bus}.users.{key}", stream=stream)

    async def acknowledged() -> None:
        while True:
            told = await streams.consumer_info(stream, _DURABLE)
            if not told.num_pending and not told.num_ack_pending:
                return
            await asyncio.sleep(0.002)

    try:
        yield publish, acknowledged
    finally:
        await watching.close()


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


async def _react(address: str, bus: str, way: str) -> None:
    """One of four processes."""
    broker = NatsBroker(address, logger=None)
    _subscribe(broker, bus, WAYS[way], lambda: None)
    async with _started(broker):
        ready()
        await until_told()


if __name__ == "__main__":
    asyncio.run(_react(*sys.argv[1:]) if len(sys.argv) > 2 else _answer(sys.argv[1]))
