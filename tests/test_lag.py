"""How far each reader is behind is seen from outside, exactly, while services run and while they do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cauce import Command, Context, Copy, Domain, Event, Record, Retry, Service, Store, connect, running
from cauce.backends import look
from cauce.clock import SystemClock
from cauce.codec import Meta, seal
from cauce.lag import Progress, Seen, Survey
from cauce.store import SAID, Outline, Unit, Waiting
from tests.kept import move_places, store_of, stores_of

meters = Domain("meters", key="name")


class Meter(Record, domain=meters):
    name: str
    total: int = 0


class Read(Event, domain=meters):
    name: str
    value: int


class Sealed(Event, domain=meters):
    name: str


class Note(Command, domain=meters):
    name: str
    value: int


class Kept(Copy, of=Meter):
    name: str
    total: int


def owner() -> Service:
    service = Service("meters", owns=meters)

    @service.decide
    def note(meter: Meter | None, command: Note) -> Read:
        return Read(command.name, command.value)

    @service.evolve
    def read(meter: Meter | None, event: Read) -> Meter:
        return Meter(event.name, (meter.total if meter else 0) + event.value)

    @service.evolve
    def sealed(meter: Meter, event: Sealed) -> Meter:
        return meter

    return service


def bills(work: Callable[[Read], Awaitable[None]] | None = None, attempts: int = 12) -> Service:
    service = Service("bills")

    @service.on(retry=Retry(attempts=attempts))
    async def bill(event: Read) -> None:
        if work is not None:
            await work(event)

    @service.on
    async def close(event: Sealed) -> None: ...

    return service


def copies() -> Service:
    service = Service("copies")

    @service.view("sums", schema="create table sums (name text primary key, value bigint)")
    def sum_up(event: Read, db: Store) -> None:
        db.execute(
            "insert into sums values (?, ?) on conflict (name) do update set value = excluded.value",
            (event.name, event.value),
        )

    service.replica(Kept)
    return service


async def say(url: str, *events: Event) -> None:
    """Facts, as an import writes them."""
    clock = SystemClock()
    async with connect(url) as bus:
        entries = [seal(event, clock.id(), Meta(clock.now())) for event in events]
        await asyncio.gather(*(bus.facts.append(entry.stream, [entry]) for entry in entries))


@asynccontextmanager
async def survey_of(url: str, **options: Any) -> AsyncIterator[Survey]:
    clock = SystemClock()
    async with look(url, clock) as bus:
        survey = Survey(bus, bus.stores, clock, **options)
        yield survey
        await survey.close()


async def seen(url: str, **options: Any) -> Seen:
    async with survey_of(url, **options) as survey:
        return await survey.look()


async def until(url: str, holds: Callable[[Seen], bool]) -> Seen:
    """Places are written a moment behind what was handled."""
    async with asyncio.timeout(60):
        while not holds(found := await seen(url)):  # noqa: ASYNC110 - another process would look again, too
            await asyncio.sleep(0.02)
    return found


def of(found: Seen, service: str, name: str) -> Progress:
    (one,) = (each for each in found.readers if (each.service, each.name) == (service, name))
    return one


async def test_a_lag_is_what_a_reader_wants_and_has_not_passed_whether_its_service_runs_or_not(each_bus: str) -> None:
    async with running(bills(), bus=each_bus) as bus:
        await say(each_bus, *(Read(f"m{n % 7}", n) for n in range(20)), Sealed("m1"))
        await bus.settled()
        found = await until(each_bus, lambda seen: of(seen, "bills", "bill").lag == of(seen, "bills", "close").lag == 0)
        assert of(found, "bills", "bill").seconds == 0
    await say(each_bus, *(Read(f"m{n % 7}", n) for n in range(37)), *(Sealed(f"m{n}") for n in range(5)))
    found = await seen(each_bus)
    assert (of(found, "bills", "bill").lag, of(found, "bills", "close").lag) == (37, 5)
    assert not of(found, "bills", "bill").at_least
    async with running(bills(), bus=each_bus) as bus:
        await bus.settled()
    found = await seen(each_bus)
    assert (of(found, "bills", "bill").lag, of(found, "bills", "close").lag) == (0, 0)


async def test_a_second_look_counts_on_and_says_how_fast_a_reader_went(each_bus: str) -> None:
    async with running(bills(), bus=each_bus):
        pass
    async with survey_of(each_bus) as survey:
        await say(each_bus, *(Read(f"m{n}", n) for n in range(10)))
        first = of(await survey.look(), "bills", "bill")
        assert (first.lag, first.rate) == (10, None)
        await say(each_bus, *(Read(f"m{n}", n) for n in range(5)))
        second = of(await survey.look(), "bills", "bill")
        assert (second.lag, second.rate) == (15, 0)
        async with running(bills(), bus=each_bus) as bus:
            await bus.settled()
        third = of(await survey.look(), "bills", "bill")
        assert third.lag == 0
        assert third.rate is not None
        assert third.rate > 0
        assert third.lag == of(await survey.look(), "bills", "bill").lag


async def test_who_reads_what_was_never_run_is_behind_by_all_of_it(each_bus: str) -> None:
    await say(each_bus, *(Read(f"m{n}", n) for n in range(9)))
    late = Service("late")

    @late.on(start="now")
    async def from_now(event: Read) -> None: ...

    async with running(late, bus=each_bus):
        pass
    await say(each_bus, Read("m3", 1), Read("m4", 1))
    assert of(await seen(each_bus), "late", "from_now").lag == 2


async def test_what_is_tried_again_what_is_dead_and_what_waits_behind_it_are_told_apart(each_bus: str) -> None:
    async def work(event: Read) -> None:
        if event.name in ("bad", "worse"):
            raise ValueError(event.name)

    await say(each_bus, Read("bad", 1), Read("good", 1), Read("bad", 2), Read("bad", 3))
    async with running(bills(work, attempts=1), bus=each_bus) as bus:
        await bus.settled()
    found = of(await seen(each_bus), "bills", "bill")
    assert (found.lag, found.retrying, found.dead, found.behind) == (0, 0, 1, 2)
    assert found.seconds == 0, "a dead letter waits for a person, and is no lag"
    await say(each_bus, Read("worse", 1))
    async with running(bills(work, attempts=99), bus=each_bus):
        await until(each_bus, lambda seen: of(seen, "bills", "bill").retrying > 0)
    found = of(await seen(each_bus), "bills", "bill")
    assert (found.lag, found.retrying, found.dead, found.behind) == (0, 1, 1, 2)
    assert found.seconds is not None
    assert found.seconds > 0


async def test_views_and_replicas_have_a_lag_too(each_bus: str) -> None:
    async with running(owner(), copies(), bus=each_bus) as bus:
        await bus.call(Note("a", 1))
        await bus.settled()
        found = await until(each_bus, lambda seen: all(each.lag == 0 for each in seen.readers))
        assert [(each.kind, each.name, each.lag) for each in found.readers if each.service == "copies"] == [
            ("replica", "Kept", 0), ("view", "sums", 0),
        ]  # fmt: skip
    async with running(owner(), bus=each_bus) as bus:
        for n in range(4):
            await bus.call(Note("a", n))
        for n in range(3):
            await bus.call(Note(f"b{n}", n))
        await bus.settled()
    found = await seen(each_bus)
    assert of(found, "copies", "sums").lag == 7
    assert of(found, "copies", "Kept").lag == 4, "of each thing only the last record is to be copied"


async def test_a_record_that_is_written_again_is_still_one_to_be_copied(each_bus: str) -> None:
    async with running(owner(), copies(), bus=each_bus) as bus:
        await bus.settled()
    async with survey_of(each_bus) as survey:
        for n in (1, 2, 3):
            async with running(owner(), bus=each_bus) as bus:
                await bus.call(Note("a", n))
                await bus.call(Note("b", n))
                await bus.settled()
            assert of(await survey.look(), "copies", "Kept").lag == 2


async def test_commands_that_wait_for_their_owner_are_his_lag(each_bus: str) -> None:
    async with running(owner(), bus=each_bus):
        pass
    async with connect(each_bus) as bus:
        for n in range(6):
            await bus.send(Note(f"m{n % 2}", n))
    found = of(await seen(each_bus), "meters", "decide meters")
    assert (found.kind, found.lag) == ("decide", 6)
    async with running(owner(), bus=each_bus) as bus:
        await bus.settled()
    assert of(await seen(each_bus), "meters", "decide meters").lag == 0


async def test_who_gets_its_first_place_during_a_look_is_no_handler_that_is_gone(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(owner(), bus=bus_url):
        await until(bus_url, lambda found: bool(found.readers))
    async with survey_of(bus_url) as survey:
        outline, looks = survey._stores.outline, 0

        async def late(service: str, now: int) -> Outline:
            nonlocal looks
            looks += 1
            found = await outline(service, now)
            return replace(found, places=[]) if looks == 1 else found

        monkeypatch.setattr(survey._stores, "outline", late)
        (reader,) = (await survey.look()).readers
        assert looks == 2
    assert (reader.kind, reader.lag, reader.note) == ("decide", 0, "")


async def test_what_is_not_counted_is_said_to_be_at_least(bus_url: str) -> None:
    async with running(bills(), bus=bus_url):
        pass
    await say(bus_url, *(Read(f"m{n}", n) for n in range(6_000)))
    found = of(await seen(bus_url, most=1_000), "bills", "bill")
    assert found.lag is not None
    assert 1_000 <= found.lag < 6_000
    assert found.at_least


async def test_a_reader_that_is_put_back_is_counted_anew(each_bus: str) -> None:
    await say(each_bus, *(Read(f"m{n}", n) for n in range(8)))
    async with running(bills(), bus=each_bus) as bus:
        await bus.settled()
    async with survey_of(each_bus) as survey:
        assert of(await survey.look(), "bills", "bill").lag == 0
        await move_places(each_bus, "bills", "bill", to=0)
        assert of(await survey.look(), "bills", "bill").lag == 8
        assert of(await survey.look(), "bills", "bill").lag == 8


async def test_who_stands_in_another_log_has_no_lag_but_a_word_of_what_to_do(each_bus: str) -> None:
    await say(each_bus, Read("m", 1))
    async with running(bills(), bus=each_bus) as bus:
        await bus.settled()
    await move_places(each_bus, "bills", "bill", to=1, log="elsewhere:facts")
    found = of(await seen(each_bus), "bills", "bill")
    assert found.lag is None
    assert "cauce reset bills" in found.note
    assert of(await seen(each_bus), "bills", "close").lag == 0


async def test_a_handler_that_is_gone_is_said_to_be(each_bus: str) -> None:
    async with running(bills(), bus=each_bus):
        pass
    only = Service("bills")

    @only.on
    async def bill(event: Read) -> None: ...

    async with running(only, bus=each_bus):
        pass
    found = of(await seen(each_bus), "bills", "close")
    assert (found.kind, found.lag) == ("gone", None)


async def test_what_is_said_and_not_in_its_log_and_the_timers_are_counted(each_bus: str) -> None:
    service = Service("ticks")

    @service.every(3600)
    async def tick() -> None: ...

    @service.on
    async def later(event: Read, ctx: Context) -> None:
        ctx.after(event.value, Note(event.name, 1))

    await say(each_bus, Read("a", 3600), Read("b", 60))
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        await until(each_bus, lambda seen: seen.services[0].timers == 3)
    (kept,) = (await seen(each_bus)).services
    assert (kept.service, kept.outbox, kept.timers, kept.due) == ("ticks", 0, 3, 0)
    async with stores_of(each_bus) as stores:
        outline = await stores.outline("ticks", SystemClock().now() + 1_800_000_000)
    assert (outline.timers, outline.due) == (3, 1)


async def test_what_the_outbox_has_set_aside_is_told_as_its_own(each_bus: str) -> None:
    async with running(bills(), bus=each_bus):
        pass
    async with store_of(each_bus, "bills") as store:
        for position, dead in ((1, True), (2, False)):
            unit = Unit(None)
            unit.parked = SAID, Waiting(position, "meters/a", 0, dead=dead, error="refused")
            await store.commit(unit)
    found = of(await seen(each_bus), "bills", SAID)
    assert (found.kind, found.lag, found.dead, found.behind, found.note) == ("outbox", None, 1, 1, "")


async def test_to_look_changes_no_file_of_a_store_and_stops_nobody(bus_url: str) -> None:
    folder = Path(bus_url.removeprefix("sqlite:///") + ".d") / "bills"
    async with running(bills(), bus=bus_url) as bus:
        await say(bus_url, *(Read(f"m{n}", n) for n in range(50)))
        await bus.settled()
        await asyncio.sleep(0.1)
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".db", ".db-wal")}
        async with survey_of(bus_url) as survey:
            for _ in range(3):
                await survey.look()
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".db", ".db-wal")}
        assert {name: len(data) for name, data in after.items()} == {name: len(data) for name, data in before.items()}
        await say(bus_url, Read("m1", 1))
        await bus.settled()


async def test_a_backlog_of_200_000_is_counted_to_the_last(bus_url: str) -> None:
    async with running(bills(), bus=bus_url):
        pass
    clock = SystemClock()
    async with connect(bus_url) as bus:
        for start in range(0, 200_000, 500):
            key = f"m{start // 500 % 64}"
            entries = [seal(Read(key, n), clock.id(), Meta(clock.now())) for n in range(500)]
            await bus.facts.append(entries[0].stream, entries)
            if start % 20_000 == 0:
                await bus.facts.append(entries[0].stream, [seal(Sealed(key), clock.id(), Meta(clock.now()))])
    found = await seen(bus_url)
    assert (of(found, "bills", "bill").lag, of(found, "bills", "close").lag) == (200_000, 10)
