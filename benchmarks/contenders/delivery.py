"""Cauce from append to handler: a service with one reaction, in the process that appends or in another one.

`deliver` has many publishers, each awaiting its append; its clock stops when the reaction has run for the last of them
and its places, which are written behind, are committed in the service's store. `four_processes` is the same with the
service in four processes of its own, which share its slots out among themselves. The latencies are of one publisher,
who appends when the one before was handled: from the call of `append` to the first line of the reaction.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import apsw

from benchmarks._load import NAME, EmailChanged, Load, email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from benchmarks.contenders.child import child, ready, until_told
from cauce import Service, running
from cauce.backends import sqlite
from cauce.backends.sqlite.file import folder_of
from cauce.clock import SystemClock
from cauce.codec import Meta, seal
from cauce.log import Appended, Log

__all__ = ["PROCESSES", "deliver", "four_processes", "same_process", "two_processes"]

_SERVICE = "mirror"
_MANY = 5_000
PROCESSES = 4
_TIME = struct.Struct("d")


def _mirror(told: Callable[[], object]) -> Service:
    service = Service(_SERVICE)

    @service.on
    async def handle(event: EmailChanged) -> None:
        told()

    return service


def _publisher(facts: Log, load: Load, seed: int) -> Callable[[], Awaitable[Appended]]:
    clock, turns = SystemClock(), load.turns(seed)

    def publish() -> Awaitable[Appended]:
        number, key = next(turns)
        entry = seal(EmailChanged(str(key), NAME, email(number)), clock.id(), Meta(clock.now()))
        return facts.append(entry.stream, [entry])

    return publish


def deliver(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    """So many publishers, and the reaction beside them on the same loop."""
    return asyncio.run(_deliver(path, load, callers, seconds))


async def _deliver(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    handled = 0

    def told() -> None:
        nonlocal handled
        handled += 1

    async with running(_mirror(told), bus=f"sqlite:///{path}") as bus:
        publish = _publisher(bus.facts, load, callers)

        async def committed() -> None:
            await bus.settled()
            await _committed(path)

        await drive(publish, callers, seconds * WARM, committed)
        handled = 0
        sample = await drive(publish, callers, seconds, committed)
        assert handled == sample.count
        return sample


def four_processes(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    """So many publishers in this process, and four that react."""
    return asyncio.run(_four_processes(path, load, callers, seconds))


async def _four_processes(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    bus = await sqlite.open(path)
    try:
        with ExitStack() as stack:
            told = [
                stack.enter_context(child("benchmarks.contenders.delivery", str(path), "counts"))
                for _ in range(PROCESSES)
            ]
            publish = _publisher(bus.facts, load, callers)
            await drive(publish, callers, seconds * WARM, partial(_committed, path))
            sample = await drive(publish, callers, seconds, partial(_committed, path))
            # Who lags, or was given nothing to do, is none of four.
            assert len({each for each in _holders(path) if each}) == len(told)
            return sample
    finally:
        await bus.close()


async def _committed(path: Path) -> None:
    """Wait until all that stands in the log is handled: another connection looks at what was committed."""
    wanted = _last(path)
    while not wanted.items() <= _places(path).items():  # noqa: ASYNC110 - another process commits them
        await asyncio.sleep(0.002)


def _last(path: Path) -> dict[int, int]:
    """The last position of each slot, as far as the end of the log tells."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    rows: list[Any] = connection.execute(
        "select stream % 16, position from facts where type in (select id from types where name = 'EmailChanged') "
        "order by position desc limit ?",
        (_MANY,),
    ).fetchall()
    connection.close()
    last: dict[int, int] = {}
    for slot, position in rows:
        last.setdefault(slot, position)
    return last


def _places(path: Path) -> dict[int, int]:
    return dict(_stored(path, "select slot, position from cauce_places"))


def _holders(path: Path) -> list[str]:
    """Who holds each slot."""
    return [owner for (owner,) in _stored(path, "select owner from cauce_claims where name like 'slot/%'")]


def _stored(path: Path, query: str) -> list[Any]:
    store = folder_of(path.resolve()) / _SERVICE / "store.db"
    connection = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5000)
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def same_process(path: Path, load: Load, seconds: float) -> Sample:
    """How long from append to reaction on one loop."""
    return asyncio.run(_same_process(path, load, seconds))


async def _same_process(path: Path, load: Load, seconds: float) -> Sample:
    loop = asyncio.get_running_loop()
    entered = loop.create_future()

    def told() -> None:
        entered.set_result(perf_counter())

    async with running(_mirror(told), bus=f"sqlite:///{path}") as bus:
        publish = _publisher(bus.facts, load, 1)

        async def once() -> float:
            nonlocal entered
            entered = loop.create_future()
            began = perf_counter()
            await publish()
            end: float = await entered
            return end - began

        return await _one_by_one(once, seconds)


def two_processes(path: Path, load: Load, seconds: float) -> Sample:
    """How long from append in this process to the reaction in another one, on the clock that both share."""
    return asyncio.run(_two_processes(path, load, seconds))


async def _two_processes(path: Path, load: Load, seconds: float) -> Sample:
    loop = asyncio.get_running_loop()
    entered = loop.create_future()
    bus = await sqlite.open(path)
    try:
        with child("benchmarks.contenders.delivery", str(path)) as told:
            loop.add_reader(told, lambda: entered.set_result(_TIME.unpack(told.read(_TIME.size))[0]))
            publish = _publisher(bus.facts, load, 1)

            async def once() -> float:
                nonlocal entered
                entered = loop.create_future()
                began = monotonic()
                await publish()
                end: float = await entered
                return end - began

            sample = await _one_by_one(once, seconds)
            loop.remove_reader(told)
            return sample
    finally:
        await bus.close()


async def _one_by_one(once: Callable[[], Awaitable[float]], seconds: float) -> Sample:
    end = perf_counter() + seconds * WARM
    while perf_counter() < end:
        await once()
    latencies: list[float] = []
    began = perf_counter()
    end = began + seconds
    while perf_counter() < end:
        latencies.append(await once())
    return Sample(len(latencies), perf_counter() - began, latencies)


async def _react(path: str, counts: bool) -> None:
    """The other process: it says when its reaction began, or only reacts."""

    def told() -> None:
        if not counts:
            os.write(1, _TIME.pack(monotonic()))

    async with running(_mirror(told), bus=f"sqlite:///{path}"):
        ready()
        await until_told()


if __name__ == "__main__":
    asyncio.run(_react(sys.argv[1], len(sys.argv) > 2))
