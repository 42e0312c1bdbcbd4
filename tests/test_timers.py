"""Messages for later, and functions that run by the clock: set with the unit, let go once, whatever happens between."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given as drawn
from hypothesis import strategies as st

from cauce import Bus, Context, Query, Refused, Retry, Service, connect, days, hours, minutes, running
from cauce.backends.sqlite.store import SQLiteStore
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.codec import Entry, micros
from cauce.errors import Busy
from cauce.log import Filter, entries_of
from cauce.schedule import Cron, Missed, Often, behind, schedule_of
from cauce.store import Timer
from cauce.testing import VirtualClock, VirtualLoop
from tests.counters import Add, Added, Counted, Double, counters, owner
from tests.kept import stores_of

Run = Callable[[Callable[[], Any]], Any]
Program = Callable[..., subprocess.Popen[str]]


class Set(SystemClock):
    """The real clock, set forward or back by so many seconds."""

    by = 0.0

    def now(self) -> int:
        return super().now() + round(self.by * 1_000_000)


def reminding(*, delay: float | timedelta = 900.0, name: str = "") -> Service:
    """For each that was added, a reminder is added later; unless it was doubled before."""
    service = Service("reminding")

    @service.on
    async def remind(event: Added, ctx: Context) -> None:
        if event.name.startswith("remind "):
            return
        ctx.after(delay, Add(f"remind {event.name}"), name=name and f"{name} {event.name}")

    return service


async def count(bus: Bus, name: str) -> int:
    await bus.settled()
    # What was sent in the first round is decided in the second.
    await bus.settled()
    record = await bus.record(Counted, name)
    return 0 if record is None else record.n


async def commands(bus: Bus, stream: str) -> list[Entry]:
    return (await bus.commands.read(Filter(stream))).entries


async def timers(url: str, service: str = "reminding") -> list[Timer]:
    async with stores_of(url) as stores:
        return [timer for _, timer in await stores.timers(service)]


# ---------------------------------------------------------------------------------------------------- on each backend


async def test_a_message_for_later_is_sent_once_when_its_time_has_come_because_of_what_set_it(each_bus: str) -> None:
    clock = Set()
    async with running(owner, reminding(), bus=each_bus, clock=clock) as bus:
        await bus.call(Add("a"), by="ana")
        assert await count(bus, "remind a") == 0
        (waiting,) = await timers(each_bus)
        assert (waiting.handler, abs(waiting.due - clock.now() - 900_000_000) < 60_000_000) == ("remind", True)
        clock.by = 840.0
        assert await count(bus, "remind a") == 0
        clock.by = 901.0
        assert await count(bus, "remind a") == 1
        (fact,) = (await bus.facts.read(Filter("counters/a"))).entries
        (sent,) = await commands(bus, "counters/remind a")
        assert (sent.meta.causation, sent.correlation, sent.meta.time) == (fact.id, fact.correlation, waiting.due)
        assert sent.id == waiting.id
        clock.by = 9_000.0
        assert await count(bus, "remind a") == 1
        assert await timers(each_bus) == []


async def test_a_timer_waits_through_restarts_and_comes_once(each_bus: str) -> None:
    clock = Set()
    async with running(owner, reminding(delay=hours(1)), bus=each_bus, clock=clock) as bus:
        for name in "abc":
            await bus.call(Add(name))
        await bus.settled()
    for by, sent in ((1800.0, 0), (3700.0, 1), (9000.0, 1)):
        clock.by = by
        async with running(owner, reminding(delay=hours(1)), bus=each_bus, clock=clock) as bus:
            assert [await count(bus, f"remind {name}") for name in "abc"] == [sent] * 3


async def test_nothing_is_set_or_cancelled_by_a_handler_that_failed(each_bus: str) -> None:
    service = Service("reminding")

    @service.on(retry=Retry(attempts=1))
    async def remind(event: Added, ctx: Context) -> None:
        if event.name == "b":
            ctx.after(days(1), Add("remind b"))
            assert await ctx.cancel("a")
            raise ValueError("no")
        ctx.after(days(1), Add("remind a"), name="a")

    async with running(owner, service, bus=each_bus) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        await bus.call(Add("b"))
        await bus.settled()
        assert [timer.id for timer in await timers(each_bus)] == ["a"]


async def test_an_own_event_is_recorded_later(each_bus: str) -> None:
    service = Service("counters", owns=counters)
    service.parts += owner.parts

    @service.on
    async def again(event: Added, ctx: Context) -> None:
        if "'" not in event.name:
            ctx.at(datetime.now(UTC) + timedelta(hours=1), Added(f"{event.name}'s", 7))

    clock = Set()
    async with running(service, bus=each_bus, clock=clock) as bus:
        for name in "abcdefgh":
            await bus.call(Add(name))
        await bus.settled()
        clock.by = hours(1) + 10
        assert [await count(bus, f"{name}'s") for name in "abcdefgh"] == [7] * 8
        for name in "abcdefgh":
            assert len((await bus.facts.read(Filter(f"counters/{name}'s"))).entries) == 1


async def test_a_timer_with_a_name_is_one_that_is_moved_and_cancelled(each_bus: str) -> None:
    service, told = reminding(name="paid"), list[bool]()

    @service.on(start="now")
    async def paid(event: Added, ctx: Context) -> None:
        if event.n == 3:
            told.append(await ctx.cancel(f"paid {event.name}"))
            told.append(await ctx.cancel("nobody"))

    clock = Set()
    async with running(owner, service, bus=each_bus, clock=clock) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        (first,) = await timers(each_bus)
        assert first.id == "paid a"
        clock.by = 600.0
        await bus.call(Add("a"))
        await bus.settled()
        (second,) = await timers(each_bus)
        assert second.due - first.due >= 600_000_000
        clock.by = 1000.0
        assert await count(bus, "remind a") == 0
        for _ in range(3):
            await bus.call(Add("b"))
            await bus.settled()
        assert [timer.id for timer in await timers(each_bus)] in (["paid a"], ["paid a", "paid b"])
        clock.by = 1600.0
        assert await count(bus, "remind a") == 1
        assert told == [True, False]


async def test_what_one_handler_sets_for_one_time_comes_in_the_order_in_which_it_was_set(each_bus: str) -> None:
    service = Service("reminding")
    at = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=1)

    @service.on
    async def remind(event: Added, ctx: Context) -> None:
        if event.name == "a":
            for message in (Add("x"), Double("x"), Add("x"), Double("x"), Double("x")):
                ctx.at(at, message)

    clock = Set()
    async with running(owner, service, bus=each_bus, clock=clock) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        clock.by = hours(1)
        await count(bus, "x")
        facts = (await bus.facts.read(Filter("counters/x"))).entries
        assert [entry.type for entry in facts] == ["Added", "Doubled", "Added", "Doubled", "Doubled"]
        assert await count(bus, "x") == 12


async def test_a_clock_that_is_set_forward_two_hours_and_back_fires_each_timer_once(each_bus: str) -> None:
    clock = Set()
    async with running(owner, reminding(delay=hours(1)), bus=each_bus, clock=clock) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        clock.by = hours(2)
        assert await count(bus, "remind a") == 1, "by the wall clock it is due, however early that is"
        await bus.call(Add("b"))
        await bus.settled()
        clock.by = 0.0
        await bus.call(Add("c"))
        assert [await count(bus, f"remind {name}") for name in "abc"] == [1, 0, 0]
        clock.by = hours(1) + 10
        assert [await count(bus, f"remind {name}") for name in "abc"] == [1, 0, 1]
        clock.by = hours(3) + 10
        assert [await count(bus, f"remind {name}") for name in "abc"] == [1, 1, 1]


async def test_an_interval_may_set_timers_and_whoever_has_the_lead_lets_them_go(each_bus: str) -> None:
    def made() -> Service:
        service = Service("clocked")

        @service.every(0.05)
        async def tick(ctx: Context) -> None:
            ctx.after(hours(1), Add("later"), name="later")

        return service

    clock = Set()
    async with running(owner, made(), bus=each_bus, clock=clock):
        async with asyncio.timeout(30):
            while len(await timers(each_bus, "clocked")) < 2:  # noqa: ASYNC110 - it is written by another task
                await asyncio.sleep(0.01)
    clock.by = hours(1) + 60
    silent = Service("clocked")
    async with running(owner, silent, bus=each_bus, clock=clock) as bus:
        assert await count(bus, "later") == 1
    assert [timer.id for timer in await timers(each_bus, "clocked")] == ["tick"]


async def cli(*arguments: str) -> Result:
    return await asyncio.to_thread(lambda: CliRunner().invoke(main, ["timers", *arguments], catch_exceptions=False))


async def test_timers_are_listed_and_cancelled_from_outside_while_their_service_runs(each_bus: str) -> None:
    service, clock = reminding(name="of *.> é/$"), Set()

    @service.every(3600)
    async def tick() -> None:
        pass

    at = ("--bus", each_bus)
    async with running(owner, bus=each_bus):
        pass
    assert (await cli("list", *at)).stdout == "No timers.\n"
    async with running(owner, service, bus=each_bus, clock=clock) as bus:
        await bus.call(Add("a"))
        clock.by = 60.0
        await bus.call(Add("b"))
        await bus.settled()
        (fact,) = (await bus.facts.read(Filter("counters/a"))).entries
        interval, a, b = [json.loads(line) for line in (await cli("list", *at, "--json")).stdout.splitlines()]
        assert (interval["id"], interval["interval"], interval["service"]) == ("tick", True, "reminding")
        assert {name: a[name] for name in ("service", "id", "handler", "interval", "stream", "type", "data")} == {
            "service": "reminding", "id": "of *.> é/$ a", "handler": "remind", "interval": False,
            "stream": "counters/remind a", "type": "Add", "data": {"name": "remind a"},
        }  # fmt: skip
        assert (a["causation"], a["correlation"]) == (fact.id, fact.correlation)
        assert a["due"] < b["due"]
        lines = (await cli("list", "reminding", "--limit", "1", *at)).stdout.splitlines()
        assert [line.split(": ")[0] for line in lines] == ["reminding tick", "reminding of *.> é/$ a"]
        assert f"Add of counters/remind a at {a['due'][:19]}+00:00, by remind because of {fact.id}" in lines[1]
        done = await cli("cancel", "reminding", a["id"], *at)
        assert (done.exit_code, done.stdout) == (0, "reminding of *.> é/$ a is cancelled\n")
        clock.by = 1000.0
        assert [await count(bus, f"remind {name}") for name in "ab"] == [0, 1]
        for id in (a["id"], b["id"], "tick"):
            gone = await cli("cancel", "reminding", id, *at, "--json")
            assert gone.exit_code == 1
            assert "it has fired, or was cancelled, or never was" in gone.output


# ------------------------------------------------------------------------------------------------- in virtual time


def test_a_timer_is_let_go_at_its_time_and_by_another_instance_when_its_own_is_gone(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        async with running(owner, bus=bus_url, clock=clock) as bus:
            async with running(reminding(delay=60), bus=bus_url, clock=clock) as first:
                began = clock.now()
                for name in "abcdefgh":
                    await bus.call(Add(name))
                await first.settled()
            assert len(await timers(bus_url)) == 8
            async with (
                running(reminding(delay=60), bus=bus_url, clock=clock),
                running(reminding(delay=60), bus=bus_url, clock=clock),
            ):
                await clock.sleep(65)
                await bus.settled()
                for name in "abcdefgh":
                    (fact,) = (await bus.facts.read(Filter(f"counters/remind {name}"))).entries
                    assert 60 <= (fact.meta.time - began) / 1_000_000 < 63

    virtual(main)


def test_a_clock_that_is_set_forward_is_noticed_within_seconds(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    async def main() -> None:
        async with running(owner, reminding(delay=hours(3)), bus=bus_url, clock=clock) as bus:
            await bus.call(Add("a"))
            await bus.settled()
            clock.shift(hours(4))
            await clock.sleep(6)
            assert await bus.record(Counted, "remind a") is not None
            clock.shift(-hours(4))
            await bus.call(Add("b"))
            await clock.sleep(60)
            assert await bus.record(Counted, "remind b") is None
            assert await count(bus, "remind a") == 1

    virtual(main)


# ----------------------------------------------------------------------------------------------------------- refused


class Ask(Query[int], domain=counters):
    name: str


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda ctx: ctx.after(-1, Add("x")), "after: Add in -1: pass 0 seconds or more"),
        (lambda ctx: ctx.after(float("nan"), Add("x")), "pass a number of seconds, or a timedelta"),
        (lambda ctx: ctx.after("5", Add("x")), "pass a number of seconds, or a timedelta"),
        (lambda ctx: ctx.after(5, Ask("x")), "Ask cannot be said later: pass a command, or an event of an own domain"),
        (lambda ctx: ctx.after(5, Counted("x", 1)), "Counted cannot be said later"),
        (lambda ctx: ctx.at(datetime(2026, 1, 1), Add("x")), "has no time zone: add one"),  # noqa: DTZ001
        (lambda ctx: ctx.at(1_700_000_000, Add("x")), "pass a datetime with a time zone"),
        (lambda ctx: ctx.after(5, Added("x", 1)), "which only the owner of 'counters' records"),
        (lambda ctx: ctx.after(5, Add("x"), name="a\nb"), "pass printable text"),
        (lambda ctx: ctx.due, "reminding.remind is due at no time: intervals are"),
    ],
)
async def test_what_cannot_be_said_later_is_refused_and_nothing_is_set(
    what: Callable[[Context], object], words: str, bus_url: str
) -> None:
    service = Service("reminding")

    @service.on(retry=Retry(attempts=1))
    async def remind(event: Added, ctx: Context) -> None:
        ctx.after(5, Add("y"))
        what(ctx)

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(Add("a"))
        await bus.settled()
    async with stores_of(bus_url) as stores:
        (letter,) = await stores.letters("reminding")
        assert words in letter.error
        assert await stores.timers("reminding") == []


async def test_who_decides_or_answers_sets_no_timers(bus_url: str) -> None:
    service = Service("counters", owns=counters)
    service.parts += owner.parts

    @service.answer
    async def ask(query: Ask, ctx: Context) -> int:
        ctx.after(5, Add("x"))
        return 1

    async with running(service, bus=bus_url) as bus:
        with pytest.raises(Refused, match="counters.ask may not set timers: reactions and intervals may"):
            await bus.ask(Ask("x"))


async def test_a_moment_that_is_past_is_due_at_once(bus_url: str) -> None:
    service = Service("reminding")

    @service.on
    async def remind(event: Added, ctx: Context) -> None:
        if event.name == "a":
            ctx.at(datetime(1905, 6, 30, tzinfo=UTC), Add("x"))
            assert await ctx.cancel(ctx.after(0, Add("y")))

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(Add("a"))
        assert (await count(bus, "x"), await count(bus, "y")) == (1, 0)


# ----------------------------------------------------------------------------------------------------------- killed

SETTING = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from counters import Add, Added, Service, Context, running, owner

service = Service("reminding")

@service.on
async def remind(event: Added, ctx: Context) -> None:
    if not event.name.startswith("remind "):
        ctx.after(int(event.name) % 7 / 10, Add("remind " + event.name))

@service.every(0.2)
async def tick(ctx: Context) -> Add:
    return Add("remind the " + ctx.due.isoformat())

async def main():
    async with running(owner, service, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await bus.failed

asyncio.run(main())
"""


async def test_of_processes_that_are_killed_at_any_moment_each_timer_comes_once(bus_url: str, program: Program) -> None:
    text = SETTING.format(tests=str(Path(__file__).parent))
    wished = 0
    for pause in (0.05, 0.3, 0.15, 0.5):
        process = program(text, bus_url)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        async with connect(bus_url) as bus:
            for _ in range(40):
                await bus.send(Add(str(wished)))
                wished += 1
            await asyncio.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    service = Service("reminding")

    @service.on
    async def remind(event: Added, ctx: Context) -> None:
        if not event.name.startswith("remind "):
            ctx.after(0, Add("remind " + event.name))

    mine = Filter(domains=frozenset({"counters"}))
    async with running(owner, service, bus=bus_url) as bus:
        async with asyncio.timeout(60):
            while True:
                await bus.settled()
                facts = [
                    entry
                    async for entry in entries_of(bus.facts, mine, bodies=False)
                    if entry.key.startswith("remind ")
                ]
                if sum(1 for entry in facts if entry.key.removeprefix("remind ").isdigit()) >= wished:
                    break
                await asyncio.sleep(0.05)
        streams = [entry.stream for entry in facts]
        assert len(set(streams)) == len(streams), "each came once, and each run of the interval, too"
        assert {entry.key for entry in facts if "the" not in entry.key} == {f"remind {n}" for n in range(wished)}
    assert [timer for timer in await timers(bus_url) if timer.said] == []


# -------------------------------------------------------------------------------------------------- by the clock

MADRID = "Europe/Madrid"


def nightly(ran: list[str], *, missed: Missed = "once", text: str = "30 2 * * *", zone: str = MADRID) -> Service:
    service = Service("clocked")

    @service.every(text, zone=zone, missed=missed)
    async def tidy(ctx: Context) -> None:
        ran.append(ctx.due.isoformat())

    return service


def clock_at(text: str) -> VirtualClock:
    return VirtualClock(micros(datetime.fromisoformat(text)))


@pytest.mark.parametrize(
    ("before", "runs"),
    [
        ("2026-03-29T01:59:50+01:00", ["2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00"]),
        ("2026-10-25T02:29:50+02:00", ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"]),
    ],
)
def test_a_cron_text_is_due_once_in_each_night_also_in_those_in_which_clocks_change(
    before: str, runs: list[str], bus_url: str
) -> None:
    clock, ran = clock_at(before), list[str]()

    async def main() -> None:
        async with running(nightly(ran), bus=bus_url, clock=clock):
            await clock.sleep(20)
            assert ran == runs[:1]
            clock.advance(hours(1))
            await clock.sleep(20)
            assert ran == runs[:1], "the hour that comes twice has it once"
        clock.advance((datetime.fromisoformat(runs[1]) - datetime.fromisoformat(runs[0])).total_seconds() - 3600)
        async with running(nightly(ran), bus=bus_url, clock=clock):
            await clock.sleep(40)
        assert ran == runs

    drive(clock, main)


@pytest.mark.parametrize(
    ("missed", "made_up"),
    [("once", ["01"]), ("all", ["01", "02", "03", "04"]), ("skip", [])],
)
def test_what_is_made_up_for_of_runs_that_were_missed_is_chosen(
    missed: Missed, made_up: list[str], bus_url: str
) -> None:
    clock, ran = clock_at("2026-06-01T00:30:00+00:00"), list[str]()

    async def main() -> None:
        async with running(nightly(ran, missed=missed, text="0 * * * *", zone=""), bus=bus_url, clock=clock):
            await clock.sleep(5)
        clock.advance(hours(4))
        async with running(nightly(ran, missed=missed, text="0 * * * *", zone=""), bus=bus_url, clock=clock):
            await clock.sleep(20)
            assert [due[11:13] for due in ran] == made_up
            clock.advance(minutes(29.9))
            await clock.sleep(20)
            assert [due[11:13] for due in ran] == [*made_up, "05"]

    drive(clock, main)


def test_a_run_that_begins_a_little_late_is_not_skipped(bus_url: str) -> None:
    clock, ran = clock_at("2026-06-01T00:59:30+00:00"), list[str]()

    async def main() -> None:
        for pause in (5, 30):
            async with running(nightly(ran, missed="skip", text="0 * * * *"), bus=bus_url, clock=clock):
                await clock.sleep(pause)
            clock.advance(45)
        assert len(ran) == 1

    drive(clock, main)


@pytest.mark.parametrize("every", [600, timedelta(minutes=10)])
def test_an_interval_goes_on_when_the_clock_is_set_back_and_no_run_of_a_cron_text_comes_twice(
    every: float | timedelta, bus_url: str
) -> None:
    clock, ran, ticks = clock_at("2026-06-01T02:59:50+00:00"), list[str](), list[float]()
    service = nightly(ran, text="0 * * * *", zone="UTC")

    @service.every(every)
    async def tick() -> None:
        ticks.append(clock.monotonic())

    async def main() -> None:
        async with running(service, bus=bus_url, clock=clock):
            await clock.sleep(20)
            clock.shift(-hours(2))
            await clock.sleep(20)
            clock.advance(600)
            await clock.sleep(20)
            assert len(ticks) == 1, "two hours are not waited for"
            clock.advance(hours(1))
            await clock.sleep(20)
            assert [due[11:16] for due in ran] == ["03:00"]
            clock.advance(hours(2))
            await clock.sleep(20)
            assert [due[11:16] for due in ran] == ["03:00", "04:00"]

    drive(clock, main)


def test_a_run_that_failed_is_made_again_for_the_same_time_and_one_that_hangs_holds_up_no_other(bus_url: str) -> None:
    clock, tried, others = clock_at("2026-06-01T02:59:50+00:00"), list[tuple[datetime, str]](), list[float]()
    service = Service("clocked")

    @service.every("0 * * * *")
    async def fails(ctx: Context) -> None:
        tried.append((ctx.due, ctx.idempotency_key))
        if len(tried) < 3:
            raise ValueError("not yet")

    @service.every(5)
    async def hangs() -> None:
        await asyncio.Event().wait()

    @service.every(5)
    async def goes_on() -> None:
        others.append(clock.monotonic())

    async def main() -> None:
        async with running(service, bus=bus_url, clock=clock, drain=1.0):
            await clock.sleep(60)
        assert len(set(tried)) == 1
        assert len(tried) == 3
        assert tried[0][0] == datetime(2026, 6, 1, 3, tzinfo=UTC)
        assert len(others) >= 10

    drive(clock, main)


def test_an_interval_begins_though_its_store_is_busy_for_a_while(bus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran, asked = clock_at("2026-06-01T00:59:50+00:00"), list[str](), SQLiteStore.timer
    busy = ["once", "twice"]

    async def timer(self: SQLiteStore, name: str) -> int:
        if busy:
            busy.pop()
            raise Busy("somebody else writes")
        return await asked(self, name)

    monkeypatch.setattr(SQLiteStore, "timer", timer)

    async def main() -> None:
        async with running(nightly(ran, text="0 * * * *"), bus=bus_url, clock=clock):
            await clock.sleep(20)
        assert (len(ran), busy) == (1, [])

    drive(clock, main)


def test_another_cron_text_begins_anew(bus_url: str) -> None:
    clock, ran = clock_at("2026-06-01T00:00:30+00:00"), list[str]()

    async def main() -> None:
        async with running(nightly(ran, zone="UTC"), bus=bus_url, clock=clock):
            await clock.sleep(5)
        async with running(nightly(ran, text="*/1 * * * *", zone="UTC"), bus=bus_url, clock=clock):
            await clock.sleep(40)
        assert [due[11:16] for due in ran] == ["00:01"]

    drive(clock, main)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Service("s").every(0), "s: every.0. 0: pass 0.001 seconds or more"),
        (lambda: Service("s").every(-timedelta(seconds=1)), "pass 0.001 seconds or more"),
        (lambda: Service("s").every("every day"), "cron text 'every day' cannot be read: Wrong number of fields"),
        (lambda: Service("s").every("60 * * * *"), "Bad minute"),
        (lambda: Service("s").every("0 0 31 2 *"), "Bad day-of-month"),
        (lambda: Service("s").every("0 0 29 2 MON#1"), ""),
        (lambda: Service("s").every("0 3 * * *", zone="Europe/Cauce"), "zone 'Europe/Cauce' is not known here"),
        (lambda: Service("s").every("0 3 * * *", zone="../../etc/passwd"), "is not known here"),
        (lambda: Service("s").every(60, zone=MADRID), "is for a cron text"),
        (lambda: Service("s").every(60, missed=typing.cast("Any", "twice")), "missed='twice': say once, all or skip"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_where_it_is_written(made: Callable[[], object], words: str) -> None:
    if not words:
        made()
        return
    with pytest.raises(Refused, match=words):
        made()


def test_without_cronsim_a_cron_text_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(Refused, match=r"the cron text '0 3 \* \* \*' needs cronsim: pip install 'cauce\[cron\]'"):
        Service("s").every("0 3 * * *")
    Service("s").every(60)


@drawn(
    st.sampled_from(["30 2 * * *", "*/7 * * * *", "0 0 1 * *", "15 1-4 * * SUN", "59 23 31 12 *"]),
    st.sampled_from([MADRID, "UTC", "Australia/Lord_Howe", "America/St_Johns"]),
    st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1)),  # noqa: DTZ001 - made aware below
    st.integers(0, 10**12),
    st.sampled_from(["once", "all", "skip"]),
)
def test_the_next_run_is_always_later_and_none_lies_between_unless_it_is_made_up_for(
    text: str, zone: str, when: datetime, late: int, missed: Missed
) -> None:
    cron = schedule_of(text, zone, "s")
    assert isinstance(cron, Cron)
    time = micros(when.replace(tzinfo=UTC))
    due = cron.following(time)
    assert due > time
    assert cron.following(due - 1) == due, "the time of a run is found again from right before it"
    now = due + late
    after = behind(due, now, cron, missed)
    assert after > due
    assert missed == "all" or (after > now and cron.following(max(due, now)) == after)
    assert micros(cron.shown(due)) == due
    often = Often(max(1, late))
    assert often.standing(due + 10 * often.step, due) == due + often.step


def drive(clock: VirtualClock, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        runner.run(test())


def test_the_page_on_reminders_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parent.parent / "docs" / "how-to" / "remind.md"
    names: dict[str, Any] = {"__name__": "how_to"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)  # noqa: S102 - it is ours, and what is tested
    names["main"]()
    assert capsys.readouterr().out.splitlines() == ["7 1", "8 0"]
