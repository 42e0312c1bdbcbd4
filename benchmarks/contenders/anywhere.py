"""Cauce on a bus at any address: events appended, commands decided by the owner, and events handled by a service.

`deliver` has many publishers, each awaiting its append, and a service with one reaction beside them on the same loop;
its clock stops when another handle of the service's store reads places there that are as far as the last of each slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from benchmarks._load import NAME, ChangeEmail, EmailChanged, Load, RegisterUser, email, service
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from cauce import Service, running
from cauce.accept import slot_of
from cauce.backends import open_backend
from cauce.clock import SystemClock
from cauce.codec import Meta, seal
from cauce.log import Appended

__all__ = ["append", "call", "deliver", "each", "register"]

_AHEAD = 2**62


def append(url: str, load: Load, callers: int, seconds: float) -> Sample:
    """`bus.facts.append` by so many callers of one event loop."""
    return asyncio.run(_append(url, load, callers, seconds))


async def _append(url: str, load: Load, callers: int, seconds: float) -> Sample:
    clock, turns = SystemClock(), load.turns(callers)
    bus = await open_backend(url, clock)
    facts = bus.facts

    def work() -> Awaitable[Appended]:
        number, key = next(turns)
        entry = seal(EmailChanged(str(key), NAME, email(number)), clock.id(), Meta(clock.now()))
        return facts.append(entry.stream, [entry])

    try:
        await drive(work, callers, seconds * WARM)
        return await drive(work, callers, seconds)
    finally:
        await bus.close()


def call(url: str, load: Load, callers: int, seconds: float) -> Sample:
    """`bus.call` by so many callers: within the clock, too, is the writing of the records behind.

    Each thing is called once beforehand, so that the owner knows how it stands.
    """
    return asyncio.run(_call(url, load, callers, seconds))


async def _call(url: str, load: Load, callers: int, seconds: float) -> Sample:
    turns = load.turns(callers)
    async with running(service, bus=url) as bus:

        def work() -> Awaitable[object]:
            number, key = next(turns)
            return bus.call(ChangeEmail(str(key), NAME, email(number)))

        await each(load, lambda key: bus.call(ChangeEmail(str(key), NAME, email(key))))
        await drive(work, callers, seconds * WARM)
        await bus.settled()
        return await drive(work, callers, seconds, bus.settled)


def register(url: str, load: Load) -> None:
    """All things, once, by calls."""
    asyncio.run(_register(url, load))


async def _register(url: str, load: Load) -> None:
    async with running(service, bus=url) as bus:
        await each(load, lambda key: bus.call(RegisterUser(str(key), NAME, email(key))))


async def each(load: Load, work: Callable[[int], Awaitable[object]]) -> None:
    """Do something for all things."""
    for start in range(0, load.things, 1000):
        await asyncio.gather(*map(work, range(start, min(start + 1000, load.things))))


def deliver(url: str, load: Load, callers: int, seconds: float) -> Sample:
    """So many publishers, and the reaction beside them."""
    return asyncio.run(_deliver(url, load, callers, seconds))


async def _deliver(url: str, load: Load, callers: int, seconds: float) -> Sample:
    clock, turns, handled = SystemClock(), load.turns(callers), 0
    mirror, last = Service("mirror"), dict[tuple[str, int], int]()

    @mirror.on
    async def handle(event: EmailChanged) -> None:
        nonlocal handled
        handled += 1

    async with running(mirror, bus=url) as bus:
        facts = bus.facts
        beside = await open_backend(url, clock)
        store = await beside.stores.open("mirror", keeps=False)

        async def publish() -> None:
            number, key = next(turns)
            entry = seal(EmailChanged(str(key), NAME, email(number)), clock.id(), Meta(clock.now()))
            appended = await facts.append(entry.stream, [entry])
            spot = "users", slot_of(str(key))
            last[spot] = max(last.get(spot, 0), appended.position)

        async def committed() -> None:
            await bus.settled()
            while True:
                places = await store.places("handle", beside.facts.id, _AHEAD)
                if all(places.get(spot, 0) >= position for spot, position in last.items()):
                    return
                await asyncio.sleep(0.002)

        try:
            await drive(publish, callers, seconds * WARM, committed)
            handled = 0
            sample = await drive(publish, callers, seconds, committed)
            assert handled == sample.count
            return sample
        finally:
            await store.close()
            await beside.close()
