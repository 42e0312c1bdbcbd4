"""Handlers that block the loop, take too long or end the process, and instances that come back: others go on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cauce import Context, Domain, Query, Refused, Retry, Service, Store, Unavailable, connect, running
from cauce.clock import SystemClock
from cauce.log import Filter, entries_of
from tests.counters import SEEN, Add, Added, Counted, owner
from tests.test_instances import letters_of, schema_of, seen, standing, until_seen, until_shared
from tests.test_owner import persist, stop

Program = Callable[..., subprocess.Popen[str]]

PROCESS = """
import asyncio, logging, os, sys, threading, time
import cauce.guards.watchdog, cauce.lease, cauce.shares
sys.path.insert(0, {tests!r})
from test_standing_still import FIRST, Service, Added, Context, SEEN, owner, running
url, name, log, kind = sys.argv[1:5]
logging.basicConfig(filename=log, level=logging.INFO)
# Who stands still is given up sooner than in life.
for each in (cauce.shares, cauce.lease):
    each.TTL, each.BEAT = 2.0, 0.3
cauce.guards.watchdog.TTL = 2.0

service = Service("seeing", schema=SEEN) if kind != "owner" else FIRST(name)

if kind != "owner":
    @service.on
    async def handle(event: Added, ctx: Context) -> None:
        if event.name == "poison":
            {poison}
        ctx.store.execute("insert into seen values (?, ?, ?)", (event.name, event.n, name))

async def main():
    async with running(service, bus=url) as bus:
        print("ready", flush=True)
        stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait({{asyncio.ensure_future(stop), bus.failed}}, return_when=asyncio.FIRST_COMPLETED)
        if bus.failed.done():
            print("failed", repr(bus.failed.exception()), flush=True)

asyncio.run(main())
"""


class Processes:
    """Instances of one service, each with a log of its own."""

    def __init__(self, program: Program, url: str, folder: Path, kind: str, poison: str) -> None:
        self._program, self._url, self._folder, self._kind = program, url, folder, kind
        self._script = PROCESS.format(tests=str(Path(__file__).parent), poison=poison)
        self.all: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str) -> subprocess.Popen[str]:
        process = self._program(self._script, self._url, name, str(self._folder / name), self._kind)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        self.all[name] = process
        return process

    def log(self, name: str) -> str:
        return (self._folder / name).read_text()

    async def says(self, name: str, words: str) -> None:
        """Wait until the log of an instance says this."""
        async with asyncio.timeout(60.0):
            while words not in self.log(name):  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.05)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in this process gives up as soon as the others do."""
    for module in ("cauce.shares", "cauce.lease"):
        monkeypatch.setattr(f"{module}.TTL", 2.0)
        monkeypatch.setattr(f"{module}.BEAT", 0.3)


def FIRST(name: str) -> Service:  # noqa: N802 - told apart in the other process
    """An owner that also reacts to its own facts."""
    service = Service("counters", owns=owner.owns, schema=SEEN)
    service.parts += owner.parts

    @service.on
    async def handle(event: Added, ctx: Context) -> None:
        ctx.store.execute("insert into seen values (?, ?, ?)", (event.name, event.n, name))

    return service


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - other processes make it true
            await asyncio.sleep(0.1)


INNOCENTS = [f"innocent{n}" for n in range(40)]


def in_order(stored: list[tuple[Any, ...]], names: list[str]) -> None:
    """Each of the things was handled once for each of its facts, in order."""
    by_name = defaultdict[str, list[int]](list)
    for name, n, _ in stored:
        by_name[name].append(n)
    wrong = [name for name in names if by_name[name] != list(range(1, len(by_name[name]) + 1))]
    assert wrong == [], [row for row in stored if row[0] in wrong]


# --------------------------------------------------------------------------------------- what blocks the loop


@pytest.mark.usefixtures("hasty")
async def test_a_handler_that_blocks_its_loop_is_parked_after_three_times_and_all_instances_come_back(
    each_bus: str, program: Program, tmp_path: Path
) -> None:
    processes = Processes(program, each_bus, tmp_path, "seeing", "time.sleep(7)")
    async with running(owner, bus=each_bus) as bus:
        for name in ("one", "two", "three"):
            await asyncio.to_thread(processes.start, name)
        async with standing(each_bus, "seeing", schema_of(each_bus)) as holders:
            await until_shared(holders, 5, 5, 6)
            for name in (*INNOCENTS[:20], "poison", *INNOCENTS[20:]):
                await bus.call(Add(name))
            await until_seen(each_bus, "seeing", 40)

            async def parked() -> bool:
                return bool(await letters_of(each_bus))

            await until(parked)
            await until_shared(holders, 5, 5, 6)
        for name in INNOCENTS:
            await bus.call(Add(name))
        await until_seen(each_bus, "seeing", 80)
    (letter,) = await letters_of(each_bus)
    assert letter.stream == "counters/poison"
    assert letter.error == "the process died, or stood still, while this was handled, 3 times"
    stored = await seen(each_bus, "seeing")
    in_order(stored, INNOCENTS)
    assert len(stored) == 80
    assert {by for _, _, by in stored[40:]} == {"one", "two", "three"}, "all work again"
    log = "".join(processes.log(name) for name in processes.all)
    assert "seeing.handle keeps the event loop for" in log
    assert "time.sleep(7)" in log or "in handle" in log
    assert "other instances take its slots over" in log
    assert re.search(r"the event loop goes on, after [6-9]\.", log)
    # One that came back may have been given the slot, and what blocks, once more.
    assert log.count("seeing: this instance has joined again") >= 3


# The store sees no difference between this and what sleeps, which is tried on each backend.
@pytest.mark.parametrize("backend", ["nats"])
@pytest.mark.usefixtures("hasty")
async def test_a_handler_that_never_gives_the_loop_back_is_shown_as_blocked_and_parked_when_three_were_replaced(
    each_bus: str, program: Program, tmp_path: Path
) -> None:
    processes = Processes(program, each_bus, tmp_path, "seeing", "while True: pass")
    async with running(owner, bus=each_bus) as bus:
        for name in ("1", "2"):
            await asyncio.to_thread(processes.start, name)
        for name in (*INNOCENTS[:20], "poison", *INNOCENTS[20:]):
            await bus.call(Add(name))
        hung = set[str]()

        async def next_hangs() -> bool:
            hung.update(name for name in processes.all if "keeps the event loop" in processes.log(name))
            return len(hung) > many

        for many in range(3):
            await until(next_hangs)
            (name,) = [each for each in hung if processes.all[each].poll() is None and each not in done_with(processes)]
            pid = processes.all[name].pid

            async def shown(pid: int = pid) -> bool:
                return "blocked" in [each.state for each in await bus.wire.instances() if each.pid == pid]

            await until(shown)
            # What looks after it does this when it does not answer.
            processes.all[name].kill()
            processes.all[name].wait()
            await asyncio.to_thread(processes.start, str(many + 3))

        async def parked() -> bool:
            return bool(await letters_of(each_bus))

        await until(parked)
        await until_seen(each_bus, "seeing", 40)
    (letter,) = await letters_of(each_bus)
    assert (letter.stream, letter.attempts) == ("counters/poison", 3)
    in_order(await seen(each_bus, "seeing"), INNOCENTS)
    for name in hung:
        assert "in handle" in processes.log(name)


def done_with(processes: Processes) -> set[str]:
    return {name for name, process in processes.all.items() if process.poll() is not None}


def test_a_message_that_ends_the_process_is_parked_after_three_of_them(
    bus_url: str, program: Program, tmp_path: Path
) -> None:
    async def fill() -> None:
        async with running(owner, bus=bus_url) as bus:
            for name in (*INNOCENTS[:20], "poison", *INNOCENTS[20:]):
                await bus.call(Add(name))

    asyncio.run(fill())
    processes = Processes(program, bus_url, tmp_path, "seeing", "os._exit(7)")
    died = 0

    async def parked() -> bool:
        return bool(await letters_of(bus_url)) or process.poll() is not None

    while not asyncio.run(letters_of(bus_url)):
        process = processes.start(str(died))
        asyncio.run(until(parked))
        if process.poll() is not None:
            assert process.returncode == 7
            died += 1
    assert died == 3
    asyncio.run(until_seen(bus_url, "seeing", 40))
    in_order(asyncio.run(seen(bus_url, "seeing")), INNOCENTS)


# ------------------------------------------------------------------------------------------- who comes back


@pytest.mark.usefixtures("hasty")
async def test_instances_that_are_stopped_and_go_on_again_and_again_under_load_lose_nothing_and_do_nothing_twice(
    each_bus: str, program: Program, tmp_path: Path
) -> None:
    processes = Processes(program, each_bus, tmp_path, "owner", "pass")
    for name in ("one", "two", "three"):
        await asyncio.to_thread(processes.start, name)
    things, ids = [f"thing{n}" for n in range(24)], list[str]()
    async with connect(each_bus) as bus:
        loading = True

        async def load() -> None:
            while loading:
                fresh = [bus.clock.id() for _ in things]
                ids.extend(fresh)
                await asyncio.gather(*(persist(bus, Add(thing), id) for thing, id in zip(things, fresh, strict=True)))
                await asyncio.sleep(0.02)

        async with standing(each_bus, "counters", schema_of(each_bus)) as holders:
            await until_shared(holders, 5, 5, 6)
            load_task = asyncio.ensure_future(load())
            for name in ("one", "two", "one"):
                await stop(processes.all[name], each_bus)
                await until_shared(holders, 8, 8)
                os.kill(processes.all[name].pid, signal.SIGCONT)
                await until_shared(holders, 5, 5, 6)
            last = len(await seen(each_bus, "counters"))
            await until_seen(each_bus, "counters", last + 5 * len(things))
        loading = False
        await load_task
        facts = [each async for each in entries_of(bus.facts, Filter(domains=frozenset({"counters"})))]
        assert Counter(fact.meta.causation for fact in facts) == Counter(ids), "each wish is one fact"
        await until_seen(each_bus, "counters", len(ids))
        stored = await seen(each_bus, "counters")
        in_order(stored, things)
        assert len(stored) == len(ids), "none twice"
        assert {by for _, _, by in stored[last:]} == {"one", "two", "three"}, "who came back works again"
        for thing in things:
            assert (await bus.fetch(Counted, thing)).n == len(ids) // len(things)
    for name in ("one", "two"):
        assert "counters: this instance has joined again" in processes.log(name)
        assert "this process stood still for" in processes.log(name)
    for process in processes.all.values():
        assert process.poll() is None


# ----------------------------------------------------------------------------------------------- patience


async def test_a_handler_that_outlives_its_patience_is_cancelled_and_counts_as_failed_while_others_go_on(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow, done, cancelled = Service("slow", patience=60.0), list[str](), list[str]()

    @slow.on(retry=Retry(attempts=2, first=0.01), patience=0.2)
    async def handle(event: Added) -> None:
        if event.name == "slow" and event.n == 1:
            try:
                await waits()
            except asyncio.CancelledError:
                cancelled.append(event.name)
                raise
        done.append(f"{event.name}{event.n}")

    async def waits() -> None:
        await asyncio.Event().wait()

    async with running(owner, slow, bus=each_bus) as bus:
        for name in ("slow", "quick", "slow", "quick"):
            await bus.call(Add(name))
        await bus.settled()
    assert cancelled == ["slow", "slow"]
    assert sorted(done) == ["quick1", "quick2"], "the later one of the thing waits"
    (letter,) = await letters_of(each_bus)
    assert (letter.stream, letter.attempts, letter.behind) == ("counters/slow", 2, 1)
    assert letter.error.startswith("Overran: slow.handle took longer than its patience of 0.2 s")
    told = [each for each in caplog.records if "takes longer than its patience of 0.2 s" in each.getMessage()]
    assert len(told) == 2, "once for each attempt"
    assert "in waits" in (told[0].stack_info or ""), "the chain of what it awaits"


async def test_a_plain_handler_that_outlives_its_patience_is_left_to_its_thread_and_nothing_of_its_thing_begins_there(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow, done, began, goes_on = Service("slow"), list[str](), list[str](), threading.Event()

    @slow.on(retry=Retry(first=0.01), patience=0.3)
    def handle(event: Added) -> None:
        began.append(f"{event.name}{event.n}")
        if event.name == "slow" and len(began) == 1:
            goes_on.wait(60)
        done.append(f"{event.name}{event.n}")

    async def states() -> list[str]:
        return [each.state for each in await bus.wire.instances() if each.service == "slow"]

    async with running(owner, slow, bus=each_bus) as bus:
        for name in ("slow", "quick", "slow"):
            await bus.call(Add(name))

        async def blocked() -> bool:
            return "blocked" in await states() and done == ["quick1"]

        await until(blocked)
        await asyncio.sleep(0.5)
        assert began == ["slow1", "quick1"], "it is not begun a second time beside itself"
        goes_on.set()
        await bus.settled()
        assert done == ["quick1", "slow1", "slow1", "slow2"]

        async def runs() -> bool:
            return await states() == ["running"]

        await until(runs)
    (told, *_) = [each for each in caplog.records if "slow.handle takes longer than its patience" in each.getMessage()]
    assert "goes_on.wait(60)" in (told.stack_info or "")


numbers = Domain("numbers")


class HowMany(Query[int], domain=numbers):
    pass


async def test_who_asks_one_that_outlives_its_patience_is_told_so_as_of_a_callee_in_trouble(each_bus: str) -> None:
    slow = Service("slow", owns=numbers, patience=0.2)

    @slow.answer
    async def how_many(query: HowMany) -> int:
        await asyncio.Event().wait()
        return 1

    async with running(slow, bus=each_bus) as bus:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"slow.how_many took longer than its patience of 0.2 s"):
            await bus.ask(HowMany(), timeout=30)
        assert time.monotonic() - began < 20


def test_a_patience_that_is_no_length_of_time_is_refused() -> None:
    with pytest.raises(Refused, match="impatient: patience=-1"):
        Service("impatient", patience=-1)
    service = Service("service")
    with pytest.raises(Refused, match=r"service.handle: patience=nan"):

        @service.on(patience=float("nan"))
        async def handle(event: Added) -> None: ...


# ----------------------------------------------------------------------------------------------- the watchdog


@pytest.mark.parametrize("kind", ["decide", "evolve", "on"])
async def test_a_function_that_keeps_the_event_loop_is_named_with_its_stack_while_it_does(
    kind: str, bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def blocks(wanted: str) -> None:
        # Until it is told of, however busy the machine is.
        end = time.monotonic() + 30
        while wanted == kind and "keeps the event loop" not in caplog.text and time.monotonic() < end:
            time.sleep(0.05)

    service = Service("blocking", owns=owner.owns)

    @service.decide
    def decide(counted: Counted | None, command: Add) -> Added:
        blocks("decide")
        return Added(command.name, (counted.n if counted else 0) + 1)

    @service.evolve
    def evolve(counted: Counted | None, event: Added) -> Counted:
        blocks("evolve")
        return Counted(event.name, event.n)

    @service.on
    async def on(event: Added) -> None:
        blocks("on")

    async with running(service, bus=bus_url) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        async with asyncio.timeout(20):
            while "the event loop goes on" not in caplog.text:  # noqa: ASYNC110 - a thread tells it
                await asyncio.sleep(0.02)
    told = [each for each in caplog.records if "keeps the event loop" in each.getMessage()]
    assert [each.getMessage().partition(" ")[0] for each in told] == [f"blocking.{kind}"] * len(told)
    assert f'blocks("{kind}")' in (told[0].stack_info or "")
    assert f"in blocking.{kind}" in caplog.text
    assert "the event loop goes on, after" in caplog.text


async def test_a_view_function_that_does_not_come_back_is_told_of_with_its_stack(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service("viewing", patience=0.4)

    @service.view("counts", schema="create table counts (name text primary key, n integer)")
    def entry(event: Added, db: Store) -> None:
        time.sleep(1.5)
        db.execute("insert or replace into counts values (?, ?)", (event.name, event.n))

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(Add("a"))
        await bus.settled()
    (told,) = [each for each in caplog.records if "viewing.entry has been at one entry" in each.getMessage()]
    assert "time.sleep(1.5)" in (told.stack_info or "")


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="there is no such clock here")
def test_the_clock_goes_on_while_the_machine_sleeps() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= SystemClock().monotonic() <= time.clock_gettime(time.CLOCK_BOOTTIME)
