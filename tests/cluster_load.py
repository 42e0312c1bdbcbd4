"""Many who append to a log at once, while servers are hurt: what each was told, and whether the log keeps to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cauce.accept import slot_of
from cauce.backends import nats as backend
from cauce.backends.nats import NatsBus
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import CauceError, OutcomeUnknown, Unavailable
from cauce.log import Appended

__all__ = ["CLOCK", "Load", "all_of", "fact", "opened", "under_load"]

CLOCK = SystemClock()


@asynccontextmanager
async def opened(url: str, *, patience: float = 5.0) -> AsyncIterator[NatsBus]:
    bus = await backend.open(url, patience=patience)
    try:
        yield bus
    finally:
        await bus.close()


def fact(stream: str, n: int = 1, **more: Any) -> Entry:
    return sealed(stream, "Counted", CLOCK.id(), Meta(1_700_000_000_000_000 + n), b'{"n":%d}' % n, **more)


async def all_of(bus: NatsBus) -> list[Entry]:
    found, looked = list[Entry](), 0
    while looked < await bus.facts.head():
        page = await bus.facts.read(after=looked)
        found, looked = found + page.entries, page.looked
    return [entry.checked() for entry in found]


class Load:
    """What appenders were told: `done` stands, `unknown` may stand, `refused` does not; each under its first id."""

    def __init__(self) -> None:
        self.done: dict[str, tuple[list[Entry], Appended]] = {}
        self.unknown: dict[str, list[Entry]] = {}
        self.refused: dict[str, CauceError] = {}
        self.stop = asyncio.Event()

    async def append(self, bus: NatsBus, entries: list[Entry], **more: Any) -> Appended | None:
        """Append, and note what was told; None if it does not stand, or nobody knows."""
        id = entries[0].id
        try:
            done = await bus.facts.append(entries[0].stream, entries, **more)
        except OutcomeUnknown:
            self.unknown[id] = entries
        except CauceError as error:
            self.refused[id] = error
        else:
            self.done[id] = entries, done
            self.unknown.pop(id, None)
            self.refused.pop(id, None)
            return done
        return None

    # ---------------------------------------------------------------------------------------------- the appenders

    async def plain(self, bus: NatsBus, name: str) -> None:
        """One or more entries at a time, to streams that are shared with others."""
        n = 0
        while not self.stop.is_set():
            n += 1
            stream = f"shared/{n % 7}"
            if await self.append(bus, [fact(stream, k) for k in range(1 + n % 3 * (name == "0"))]) is None:
                await CLOCK.sleep(0.02)

    async def expecting(self, bus: NatsBus, name: str) -> None:
        """The only one who writes a stream, and knows its version; what has no verdict is repeated until it has."""
        stream, version = f"own/{name}", 0
        while not self.stop.is_set():
            entries, done = [fact(stream, version)], None
            while done is None:
                tried = entries[0].id in self.unknown or entries[0].id in self.refused
                done = await self.append(bus, entries, expect=version, repeat=tried)
                if done is None:
                    await CLOCK.sleep(0.02)
            assert done.version == version + 1
            version = done.version

    async def fenced(self, bus: NatsBus, name: str) -> None:
        """The holder of a slot, who writes under its fence."""
        claim = None
        while claim is None:
            try:
                claim = await bus.facts.claim(f"held/{slot_of(name)}", f"holder {CLOCK.id()}")
            except Unavailable:
                await CLOCK.sleep(0.05)
        while not self.stop.is_set():
            if await self.append(bus, [fact(f"held/{name}")], fence=claim) is None:
                await CLOCK.sleep(0.02)

    # ---------------------------------------------------------------------------------------------- what must hold

    async def goes_on(self, more: int = 100, within: float = 30.0) -> None:
        """Wait until so many more are acknowledged."""
        before = len(self.done)
        async with asyncio.timeout(within):
            while len(self.done) < before + more:
                await CLOCK.sleep(0.01)

    async def check(self, *buses: NatsBus) -> None:
        """Every reader sees the same log, and in it what was acknowledged once, what was refused not at all."""
        log, *others = [await all_of(bus) for bus in buses]
        for other in others:
            assert other == log
        assert [entry.position for entry in log] == sorted({entry.position for entry in log})
        self._check_told(log)
        versions: dict[str, list[int]] = {}
        for entry in log:
            versions.setdefault(entry.stream, []).append(entry.version)
        for stream, found in versions.items():
            assert found == list(range(1, len(found) + 1)), stream

    def _check_told(self, log: list[Entry]) -> None:
        where: dict[str, list[Entry]] = {}
        for entry in log:
            where.setdefault(entry.id, []).append(entry)
        for entries, done in self.done.values():
            found = [each for entry in entries for each in where.get(entry.id, ())]
            assert [each.id for each in found] == [entry.id for entry in entries], done
            assert (found[-1].version, found[-1].position) == (done.version, done.position)
            assert found[-1].position - found[0].position == len(found) - 1
        for entries in self.unknown.values():
            assert {len(where.get(entry.id, ())) for entry in entries} in ({0}, {1}), entries[0].id
        for id, error in self.refused.items():
            assert id not in where, error

    async def repeat(self, bus: NatsBus) -> None:
        """Repeat what has no known outcome: then it stands."""
        async with asyncio.timeout(30.0):
            while self.unknown:
                for entries in list(self.unknown.values()):
                    if await self.append(bus, entries, repeat=True) is None:
                        await CLOCK.sleep(0.05)


@asynccontextmanager
async def under_load(urls: list[str], *, patience: float = 5.0) -> AsyncIterator[Load]:
    """Appenders of all kinds, on a handle for each address; at the end each has its last verdict."""
    load = Load()
    kinds: list[Callable[[NatsBus, str], Any]] = [load.plain, load.plain, load.expecting, load.fenced]
    buses = [await backend.open(url, patience=patience) for url in urls]
    tasks = [
        asyncio.create_task(kind(bus, f"{n}{k if kind != load.plain else ''}"))
        for n, bus in enumerate(buses)
        for k, kind in enumerate(kinds)
    ]
    try:
        yield load
        load.stop.set()
        async with asyncio.timeout(40.0):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for bus in buses:
            await bus.close()
