"""Legal but hostile keys: on every backend each thing stays its own through calls, reactions and dead letters."""

from __future__ import annotations

import asyncio

import pytest

from cauce import Bus, Command, Domain, Event, Record, Refused, Retry, Service, running
from cauce.accept import slot_of
from cauce.backends import open_backend
from cauce.clock import SystemClock
from cauce.conformance import HOSTILE, ILLEGAL
from cauce.log import Filter

things = Domain("hostile", key="name")


class Thing(Record, domain=things):
    name: str
    n: int


class Grown(Event, domain=things):
    name: str
    n: int


class Grow(Command, domain=things):
    name: str


class Shrunk(Event, domain=things):
    name: str


class Shrink(Command, domain=things):
    name: str


owner = Service("hostile", owns=things)


@owner.decide
def grow(thing: Thing | None, command: Grow) -> Grown:
    return Grown(command.name, thing.n + 1 if thing else 1)


@owner.decide
def shrink(thing: Thing | None, command: Shrink) -> Shrunk:
    return Shrunk(command.name)


@owner.evolve
def grown(thing: Thing | None, event: Grown) -> Thing:
    return Thing(event.name, event.n)


@owner.evolve
def shrunk(thing: Thing, event: Shrunk) -> Thing:
    return thing


@pytest.mark.timeout(120)
async def test_no_key_is_taken_for_another_by_calls_reactions_and_dead_letters(each_bus: str) -> None:
    seen, well = dict[str, list[int]](), set[str]()
    watcher = Service("watcher")

    @watcher.on(retry=Retry(attempts=1))
    async def watch(event: Grown) -> None:
        if event.n == 1 and event.name not in well:
            raise ValueError(event.name)
        seen.setdefault(event.name, []).append(event.n)

    async with running(owner, watcher, bus=each_bus) as bus:
        receipts = await asyncio.gather(*(bus.call(Grow(key), id=f"call of {n}") for n, key in enumerate(HOSTILE)))
        assert [(each.key, each.version) for each in receipts] == [(key, 1) for key in HOSTILE]
        again = await asyncio.gather(*(bus.call(Grow(key), id=f"call of {n}") for n, key in enumerate(HOSTILE)))
        assert again == receipts
        await asyncio.gather(*(bus.send(Grow(key)) for key in HOSTILE))
        # What was sent is decided first, and then what came of it is met by the watcher.
        await bus.settled(60)
        await bus.settled(60)
        for key in HOSTILE:
            assert await bus.record(Thing, key) == await bus.state(Thing, key) == Thing(key, 2)
        for key in ILLEGAL:
            with pytest.raises(Refused):
                await bus.call(Grow(key))
            with pytest.raises(Refused):
                await bus.send(Grow(key))
        assert seen == {}
        await decide_about_the_dead(each_bus, well)
        async with asyncio.timeout(30):
            while sum(map(len, seen.values())) < len(HOSTILE) + len(well):
                await bus.clock.sleep(0.05)
        assert seen == {key: [1, 2] if key in well else [2] for key in HOSTILE}
        await stands(bus)


async def decide_about_the_dead(address: str, well: set[str]) -> None:
    """Of the things that failed every second is retried, and the others are given up."""
    bus = await open_backend(address, SystemClock())
    try:
        stores = bus.stores
        letters = {letter.stream: letter for letter in await stores.letters("watcher")}
        assert {(letter.stream, letter.error.partition(": ")[2]) for letter in letters.values()} == {
            (f"hostile/{key}", key) for key in HOSTILE
        }
        assert {letter.behind for letter in letters.values()} == {1}
        well.update(HOSTILE[::2])
        for key in HOSTILE:
            decide = stores.retry if key in well else stores.discard
            await decide("watcher", "watch", letters[f"hostile/{key}"].position)
    finally:
        await bus.close()


async def stands(bus: Bus) -> None:
    """What lies in the logs, by stream and by slot."""
    for key in HOSTILE:
        page = await bus.facts.read(Filter(f"hostile/{key}"))
        assert [(entry.key, entry.version) for entry in page.entries] == [(key, 1), (key, 2)]
    for slot in range(16):
        page = await bus.records.read(Filter(domains=frozenset({"hostile"}), slots=frozenset({slot})))
        assert {entry.key for entry in page.entries} == {key for key in HOSTILE if slot_of(key) == slot}
