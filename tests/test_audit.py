"""The audit time: decided commands go when it is over, undecided ones stay, and nothing is decided a second time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import pytest

from cauce import Bus, Command, Domain, Event, Record, Refused, Rejected, Service, Unreachable, connect, running
from cauce.accept import SLOTS, slot_of
from cauce.audit import Audit
from cauce.backends import open_backend
from cauce.backends.nats import log as nats_log
from cauce.backends.postgres import forgetting as postgres_forgetting
from cauce.backends.sqlite import log as sqlite_log
from cauce.clock import SystemClock, uuid7
from cauce.codec import Entry, Meta, derive_id, sealed, time_of
from cauce.log import Log
from cauce.schema import encode
from cauce.service import AUDIT
from cauce.store import Store, Waiting
from cauce.testing import VirtualClock

HOUR = 3_600
DAY = 24 * HOUR
MONTH = 31 * DAY
BESIDE = next(str(n) for n in range(100) if slot_of(str(n)) == slot_of("b"))

things = Domain("things", key="name")


class Thing(Record, domain=things):
    name: str
    n: int


class Grown(Event, domain=things):
    name: str
    n: int


class Grow(Command, domain=things):
    name: str


class Shrink(Command, domain=things):
    name: str


class Break(Command, domain=things):
    name: str


def owner(**options: Any) -> Service:
    service = Service("things", owns=things, **options)

    @service.decide
    def grow(thing: Thing | None, command: Grow) -> Grown:
        return Grown(command.name, thing.n + 1 if thing else 1)

    @service.decide
    def shrink(thing: Thing | None, command: Shrink) -> Grown:
        raise Rejected("things only grow")

    @service.decide
    def break_(thing: Thing | None, command: Break) -> Grown:
        raise ZeroDivisionError(command.name)

    @service.evolve
    def grown(thing: Thing | None, event: Grown) -> Thing:
        return Thing(event.name, event.n)

    return service


class Later(SystemClock):
    """The real clock, set so many seconds ahead."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._ahead, self._last = round(seconds * 1_000_000), 0

    def now(self) -> int:
        return super().now() + self._ahead

    def id(self) -> str:
        self._last = max(self.now() * 4096 // 1000, self._last + 1)
        return uuid7(self._last, round(self.random() * 2**61))


async def entries(log: Log) -> list[Entry]:
    found, looked, head = list[Entry](), 0, await log.head()
    while looked < head:
        page = await log.read(after=looked)
        found, looked = found + page.entries, page.looked
    return found


async def stands(bus: Bus, key: str) -> bool:
    return await bus.record(Thing, key) is not None


async def until(condition: Callable[[], Awaitable[bool]], bus: Bus) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await bus.clock.sleep(0.01)


async def live(url: str, *, broken: bool = False) -> tuple[list[Entry], list[Entry]]:
    """A month ago: what was sent, wished in vain, and is not decided yet. Gives facts and commands.

    Parameters:
        broken: one cannot be decided, and waits with those behind it.
    """
    async with running(owner(), bus=url) as bus:
        for key in "abcdefgh":
            await bus.send(Grow(key), id=f"grow {key}")
            await bus.send(Shrink(key))
            with pytest.raises(Rejected):
                await bus.call(Shrink(key))
        await bus.settled(20)
        if broken:
            await bus.send(Break("b"))
            await bus.send(Grow("b"))
            await bus.send(Grow(BESIDE))
            await until(lambda: stands(bus, BESIDE), bus)
    async with connect(url) as bus:
        await bus.send(Grow("undecided"))
        return await entries(bus.facts), await entries(bus.commands)


async def test_decided_commands_go_when_their_time_is_over_and_the_others_stay(each_bus: str) -> None:
    facts, commands = await live(each_bus, broken=True)
    first = next(entry.position for entry in commands if entry.type == "Break")
    kept = [e for e in commands if e == commands[-1] or (e.key in ("b", BESIDE) and e.position >= first)]
    assert len(kept) == 4
    left = list[Entry]()
    async with running(owner(), bus=each_bus, clock=Later(MONTH)) as bus:

        async def gone() -> bool:
            nonlocal left
            left = [each for each in await entries(bus.commands) if each.position <= commands[-1].position]
            return len(left) <= len(kept)

        await until(gone, bus)
        assert left == kept, "as and where they were"
        await until(lambda: stands(bus, "undecided"), bus)
        assert (await entries(bus.facts))[: len(facts)] == facts
        assert await bus.record(Thing, "a") == Thing("a", 1)


async def test_nothing_goes_before_its_time_or_where_commands_are_kept_for_ever(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, commands = await live(each_bus)
    slots = {slot_of(key) for key in "abcdefgh"}
    for options, seconds, wanted in (({}, AUDIT - DAY, slots), ({"audit": None}, 100 * MONTH, set[int]())):
        asked = dict[int, int]()
        async with running(owner(**options), bus=each_bus, clock=Later(seconds)) as bus:
            forget = bus.commands.forget

            async def counted(
                domain: str, slot: int, *more: int, forget: Any = forget, asked: dict[int, int] = asked
            ) -> int:
                asked[slot] = await forget(domain, slot, *more)
                return asked[slot]

            monkeypatch.setattr(bus.commands, "forget", counted)
            await until(lambda: stands(bus, "undecided"), bus)
            async with asyncio.timeout(20):
                while not asked.keys() >= wanted:
                    await bus.clock.sleep(0.01)
            assert (await entries(bus.commands))[: len(commands)] == commands
        assert set(asked.values()) <= {0}
        assert wanted or not asked


async def test_what_is_sent_again_after_its_time_is_not_decided_again(each_bus: str) -> None:
    await live(each_bus)
    clock = Later(MONTH)
    async with running(owner(), bus=each_bus, clock=clock) as bus:

        async def gone() -> bool:
            return not any(entry.id == "grow a" for entry in await entries(bus.commands))

        await until(gone, bus)
        await bus.send(Grow("a"), id="grow a")
        fact = next(entry for entry in await entries(bus.facts) if entry.key == "undecided")
        # From an outbox that comes back after long it is the same message; from a handler it may be said now.
        again = Entry(0, "things/undecided", 0, "Grow", fact.meta.causation, b"", None, encode(Grow("undecided")), 0)
        for time in (time_of(again.id), clock.now()):
            entry = sealed(again.stream, again.type, again.id, Meta(time), again.body or b"")
            await bus.commands.append(entry.stream, [entry])
        await bus.settled(20)
        assert [await bus.record(Thing, key) for key in ("a", "undecided")] == [Thing("a", 1), Thing("undecided", 1)]
        await bus.send(Grow("a"), id="another")
        await bus.settled(20)
        assert await bus.record(Thing, "a") == Thing("a", 2)


# ------------------------------------------------------------------------------------------------------ when it looks


class Places:
    """What an audit asks of a store."""

    def __init__(self, place: int, waits: Iterable[int] = ()) -> None:
        self.place, self.waits = place, list(waits)

    async def places(self, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
        return {("things", slot): self.place for slot in range(SLOTS)}

    async def waiting(self, consumer: str) -> list[Waiting]:
        return [Waiting(position, f"things/{position}", slot_of(str(position))) for position in self.waits]


def audit(
    log: Log, places: Places, clock: VirtualClock, slots: Iterable[int] = range(SLOTS), seconds: float = AUDIT
) -> Audit:
    return Audit(log, cast(Store, places), clock, seconds, {"things": "decide things"}, lambda _: list(slots))


def test_it_looks_at_the_start_and_once_an_hour(
    bus_url: str, clock: VirtualClock, virtual: Callable[[Callable[[], Awaitable[None]]], None]
) -> None:
    async def main() -> None:
        bus = await open_backend(bus_url, clock)
        for _ in range(40):
            await bus.commands.append("things/1", [sealed("things/1", "Do", clock.id(), Meta(clock.now()), b"{}")])
            await clock.sleep(HOUR)
        task = asyncio.create_task(audit(bus.commands, Places(38), clock, [slot_of("1")], 20 * HOUR).run())
        for hours in range(12):
            await clock.sleep(1)
            assert [entry.position for entry in await entries(bus.commands)] == list(range(21 + hours, 41))
            await clock.sleep(HOUR - 1)
        await clock.sleep(40 * HOUR)
        assert [entry.position for entry in await entries(bus.commands)] == [39, 40], "what is not decided stays"
        task.cancel()
        await bus.close()

    virtual(main)


async def test_what_is_set_aside_and_slots_of_others_are_left_alone(bus_url: str, clock: VirtualClock) -> None:
    bus = await open_backend(bus_url, clock)
    for n in range(1, 41):
        await bus.commands.append(f"things/{n}", [sealed(f"things/{n}", "Do", clock.id(), Meta(clock.now()), b"{}")])
    clock.advance(2 * MONTH)
    mine, waits = {0, 1, 2, 3, slot_of("20")}, 20
    task = asyncio.create_task(audit(bus.commands, Places(35, [30, waits, 39]), clock, mine).run())
    wanted = [
        n
        for n in range(1, 41)
        if slot_of(str(n)) not in mine or n > 35 or (slot_of(str(n)) == slot_of("20") and n >= waits)
        or (slot_of(str(n)) == slot_of("30") and n >= 30)
    ]  # fmt: skip
    async with asyncio.timeout(10):
        while [entry.position for entry in await entries(bus.commands)] != wanted:
            await clock.sleep(0.01)
    task.cancel()
    await bus.close()


class Troubled:
    """A log that is away at first."""

    def __init__(self, clock: VirtualClock, *errors: Exception) -> None:
        self.id, self._clock, self._errors = "log", clock, list(errors)
        self.asked: list[float] = []

    async def head(self) -> int:
        return 100

    async def forget(self, domain: str, slot: int, upto: int, before: int) -> int:
        self.asked.append(self._clock.monotonic())
        if self._errors:
            raise self._errors.pop(0)
        return 1


def test_it_tries_again_soon_where_the_log_is_away_and_in_an_hour_where_it_says_no(
    clock: VirtualClock, virtual: Callable[[Callable[[], Awaitable[None]]], None]
) -> None:
    async def main() -> None:
        log = Troubled(clock, Unreachable("away"), Unreachable("away"), Refused("no"))
        task = asyncio.create_task(audit(cast(Log, log), Places(50), clock, [3]).run())
        await clock.sleep(2 * 3600 + 200)
        assert log.asked == [0, 30, 60, 3660, 7260]
        task.cancel()

    virtual(main)


@pytest.mark.parametrize("seconds", [0, -1, 3599, float("nan"), float("inf"), 1e12])
def test_an_audit_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(Refused, match="audit="):
        Service("things", audit=seconds)


def test_an_id_tells_when_it_was_made() -> None:
    clock = SystemClock()
    id = clock.id()
    assert abs(time_of(id) - clock.now()) < 1_000_000
    assert time_of(derive_id(id, "a")) == time_of(derive_id(derive_id(id, "b"), "c")) == time_of(id)
    others = ("", "grow a", "x" * 36, id[:-1], id.replace("-", "_"), derive_id("grow a", "b"), "+" + id[1:])
    assert {time_of(each) for each in others} == {0}


async def test_a_long_log_is_looked_through_page_by_page(each_bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((sqlite_log, "_SOME"), (postgres_forgetting, "_SOME"), (nats_log, "_WINDOW")):
        monkeypatch.setattr(module, name, 7)
    bus = await open_backend(each_bus, SystemClock())
    streams = [f"things/{n % 20}" for n in range(100)]
    told = [bus.commands.append(each, [sealed(each, "Do", str(n), Meta(n), b"{}")]) for n, each in enumerate(streams)]
    await asyncio.gather(*told)
    mine = sum(slot_of(each.partition("/")[2]) == slot_of("1") for each in streams[:60])
    assert [await bus.commands.forget("things", slot_of("1"), 99, 60) for _ in range(2)] == [mine, 0]
    assert mine > 2
    await bus.close()
