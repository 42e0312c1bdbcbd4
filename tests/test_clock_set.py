"""A wall clock that is set hours forward and back under running processes: leases, retries, time-outs, `expires`."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cauce import Bus, Context, Retry, Service, connect, running
from cauce.log import Filter, entries_of
from cauce.store import Store
from tests.counters import Add, Added, owner
from tests.kept import forget_places, store_of, waiting
from tests.shifted import Shifted, hours
from tests.test_instances import schema_of, seen, standing, until_seen, until_shared
from tests.test_owner import persist, stop
from tests.wired import wire_at
from tests.wires import Start, ask, starter

Program = Callable[..., subprocess.Popen[str]]

PROCESS = """
import asyncio, logging, sys
import cauce.lease, cauce.shares
from cauce import Retry, running
sys.path.insert(0, {tests!r})
from shifted import Shifted
from counters import Added, Context, SEEN, Service, owner
url, name, clock, log = sys.argv[1:]
logging.basicConfig(filename=log, level=logging.INFO)
# Were a lease to be reckoned by the wall clock it would be over at once.
for each in (cauce.shares, cauce.lease):
    each.TTL, each.BEAT = 2.0, 0.2

service = Service("counters", owns=owner.owns, schema=SEEN)
service.parts += owner.parts
failed = set()

@service.on(retry=Retry(first=0.1, attempts=3))
async def handle(event: Added, ctx: Context) -> None:
    if event.n % 5 == 0 and event.name not in failed:
        failed.add(event.name)
        raise ValueError("for once")
    failed.discard(event.name)
    ctx.store.execute("insert into seen values (?, ?, ?)", (event.name, event.n, name))

async def main():
    async with running(service, bus=url, clock=Shifted(clock)):
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""

THINGS = [f"thing{n}" for n in range(12)]
ROUNDS = 3


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cauce.shares", "cauce.lease"):
        monkeypatch.setattr(f"{module}.TTL", 2.0)
        monkeypatch.setattr(f"{module}.BEAT", 0.2)


async def held(store: Store) -> dict[str, str]:
    """Who holds what."""
    return dict((await store.tick("nobody", ())).holders)


async def calls(bus: Bus, ids: list[str]) -> None:
    """Some rounds of calls for all things, as long as a few beats take."""
    for _ in range(ROUNDS):
        fresh = [bus.clock.id() for _ in THINGS]
        ids.extend(fresh)
        await asyncio.gather(*(persist(bus, Add(thing), id) for thing, id in zip(THINGS, fresh, strict=True)))
        await bus.clock.sleep(0.1)


@pytest.mark.usefixtures("hasty")
async def test_a_clock_that_is_set_two_hours_forward_and_back_takes_no_lease_and_doubles_and_delays_nothing(
    each_bus: str, program: Program, tmp_path: Path
) -> None:
    clock = Shifted(tmp_path / "clock")
    processes = [
        program(PROCESS.format(tests=str(Path(__file__).parent)), each_bus, name, str(tmp_path / "clock"), str(tmp_path / name))
        for name in ("one", "two")
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    ids = list[str]()
    async with (
        store_of(each_bus, "counters", [schema_of(each_bus)]) as store,
        standing(each_bus, "counters", schema_of(each_bus)) as holders,
        connect(each_bus, clock=clock) as bus,
    ):
        await until_shared(holders, 8, 8)
        before = await held(store)
        for by in (2, -2, 0):
            clock.set(hours(by))
            await calls(bus, ids)
        await until_seen(each_bus, "counters", len(ids))
        assert await held(store) == before, "nobody lost anything"
        await stop(processes[0], each_bus)
        clock.set(hours(-2))
        await until_shared(holders, 16)
        for thing in THINGS:
            ids.append(await bus.send(Add(thing)))
        await until_seen(each_bus, "counters", len(ids))
        facts = [each async for each in entries_of(bus.facts, Filter(domains=frozenset({"counters"})))]
    assert Counter(fact.meta.causation for fact in facts) == Counter(ids), "each wish is one fact"
    stored = await seen(each_bus, "counters")
    for thing in THINGS:
        assert [n for name, n, _ in stored if name == thing] == list(range(1, len(ids) // len(THINGS) + 1))
    for name in ("one", "two"):
        log = (tmp_path / name).read_text()
        assert "joined again" not in log
        assert "stood still" not in log
        assert "ValueError: for once" in log


@pytest.mark.parametrize("by", [-2, 2])
async def test_what_waits_to_be_tried_again_is_tried_soon_after_a_restart_whatever_the_clock_says(
    by: int, each_bus: str, tmp_path: Path
) -> None:
    clock, tried = Shifted(tmp_path / "clock"), list[bool]()
    service, well = Service("reacting"), asyncio.Event()

    @service.on(retry=Retry(first=1.0, longest=1.0, attempts=5))
    async def handle(event: Added, ctx: Context) -> None:
        tried.append(well.is_set())
        if not well.is_set():
            raise ValueError("not yet")

    async with running(owner, service, bus=each_bus, clock=clock) as bus:
        await bus.call(Add("a"))
        await bus.call(Add("a"))
        async with asyncio.timeout(30):
            while not tried or len(await waiting(each_bus, "reacting", "handle")) < 2:  # noqa: ASYNC110 - it is in the store
                await asyncio.sleep(0.02)
    failed = len(tried)
    clock.set(hours(by))
    well.set()
    async with running(owner, service, bus=each_bus, clock=clock) as bus:
        await bus.settled(timeout=30)
    assert tried[failed:] == [True, True]
    assert await waiting(each_bus, "reacting", "handle") == []


async def test_what_expires_does_so_by_the_clock_of_who_decides_and_a_verdict_stands_when_it_is_set_back(
    each_bus: str, tmp_path: Path
) -> None:
    clock = Shifted(tmp_path / "clock")
    async with connect(each_bus) as client:
        soon = datetime.now(UTC) + timedelta(hours=1)
        await client.send(Add("late"), expires=soon)
        await client.send(Add("in time"), expires=soon + timedelta(hours=2))
    clock.set(hours(2))
    async with running(owner, bus=each_bus, clock=clock) as bus:
        await bus.settled()
        clock.set(hours(-2))
        await bus.send(Add("later"), expires=soon)
        await bus.settled()
    await forget_places(each_bus, "counters", "decide counters")
    for by in (0, 2, -2):
        clock.set(hours(by))
        async with running(owner, bus=each_bus, clock=clock) as bus:
            await bus.settled()
            facts = [each async for each in entries_of(bus.facts, Filter(domains=frozenset({"counters"})))]
            assert [fact.key for fact in facts] == ["in time", "later"]
            verdicts = [(each.key, each.meta.verdict) async for each in entries_of(bus.commands) if each.meta.verdict]
            assert verdicts == [("late", "expired")]


# ----------------------------------------------------------------------------------------------------- questions


async def test_who_is_well_and_who_stands_still_is_told_whatever_the_clock_says(
    each_bus: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Shifted(tmp_path / "clock")
    there = await starter(program, each_bus, str(tmp_path / "clock"))()
    async with wire_at(each_bus, clock) as wire:
        await there.does("runs users")
        for by in (2, -2, 0, 2):
            clock.set(hours(by))
            (found,) = await wire.instances()
            assert found.state == "running"
            assert abs(found.beat - clock.now()) < hours(0.1)
        await there.stops()
        clock.set(hours(-2))
        for module in ("cauce.wire", "cauce.backends.sqlite.registry"):
            monkeypatch.setattr(f"{module}.QUIET", 0.2)
        async with asyncio.timeout(20):
            while (await wire.instances())[0].state != "blocked":  # noqa: ASYNC110 - it is said of another process
                await asyncio.sleep(0.02)


async def test_a_question_that_is_over_is_not_begun_though_the_clock_was_set_back_meanwhile(
    each_bus: str, program: Program, tmp_path: Path
) -> None:
    clock = Shifted(tmp_path / "clock")
    start: Start = starter(program, each_bus, str(tmp_path / "clock"))
    there = await start("users", "users/1")
    async with wire_at(each_bus, clock) as wire:
        await there.does("announce users")
        assert await ask(wire, "users", b"first") == b"first"
        await there.stops()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await ask(wire, "users", b"hang", 0.3)
        clock.set(hours(-2))
        there.goes_on()
        assert await ask(wire, "users", b"next") == b"next"
        assert await there.does("leave users/1") == "done", "what was over when it went on has begun"


async def test_a_question_that_is_on_its_way_is_answered_though_the_clock_is_set_forward_meanwhile(
    each_bus: str, program: Program, tmp_path: Path
) -> None:
    clock = Shifted(tmp_path / "clock")
    start: Start = starter(program, each_bus, str(tmp_path / "clock"))
    there = await start("users")
    async with wire_at(each_bus, clock) as wire:
        assert await ask(wire, "users", b"first") == b"first"
        await there.stops()
        asked = asyncio.ensure_future(ask(wire, "users", b"second", 60.0))
        await asyncio.sleep(0.1)
        clock.set(hours(2))
        there.goes_on()
        assert await asked == b"second"
