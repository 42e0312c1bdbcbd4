"""A long way behind: memory stays as it is, how far is known exactly, and nobody else waits."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cauce import connect
from cauce.accept import slot_of
from cauce.backends.sqlite.store import SQLiteStore
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.consumer import Consumer, Tail
from cauce.log import EVERYTHING, Filter, Log, Page
from cauce.store import Unit
from tests.kept import store_of
from tests.test_instances import schema_of, seen, until

TESTS = Path(__file__).parent
Program = Callable[..., subprocess.Popen[str]]

HEAVY = 740_000
MIB = 1024 * 1024


class Heavy:
    """A log of so many entries that share one body."""

    id = "heavy"

    def __init__(self, many: int, weight: int = HEAVY) -> None:
        body = b"x" * weight
        meta = Meta(1)
        self.entries = [sealed(f"things/thing{n % 64}", "Grown", f"id{n}", meta, body) for n in range(many)]
        self.given = 0

    async def head(self) -> int:
        return len(self.entries)

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        await asyncio.sleep(wait)
        found = list[Entry]()
        for position, entry in enumerate(self.entries[after:], after + 1):
            if not filter.slots or slot_of(entry.key) in filter.slots:
                found.append(Entry(position, entry.stream, 1, entry.type, entry.id, entry.raw, None, entry.body, 0))
                if len(found) == limit:
                    break
        self.given += len(found)
        return Page(found, found[-1].position if len(found) == limit else len(self.entries))


@pytest.mark.parametrize("concurrency", [0, 100])
async def test_what_waits_for_a_slow_handler_is_bounded_by_its_weight(concurrency: int, tmp_path: Path) -> None:
    log, clock, go_on = Heavy(1000), SystemClock(), asyncio.Event()
    store = await SQLiteStore.open(tmp_path / "s", "s", clock)
    handled, heaviest = Counter[str](), 0

    async def handle(entry: Entry, unit: Unit) -> None:
        nonlocal heaviest
        heaviest = max(heaviest, consumer._load.bytes)
        await (asyncio.sleep(0) if go_on.is_set() else go_on.wait())
        handled[entry.id] += 1

    consumer = Consumer(
        "grow", {"things": frozenset()}, handle, cast("Log", log), store, clock, concurrency=concurrency
    )
    tail = Tail(cast("Log", log), clock)
    await tail.start()
    await consumer.hold(tail, dict.fromkeys(range(16)))
    waits, before = log, -1
    while waits.given != before:
        before = waits.given
        await asyncio.sleep(0.2)
    assert consumer._load.bytes <= 48 * MIB, f"{consumer._load.bytes / MIB:.0f} MiB wait"
    go_on.set()
    await until(lambda: handled.total() == 1000)
    await consumer.settled()
    assert handled == dict.fromkeys((entry.id for entry in log.entries), 1)
    assert heaviest <= 48 * MIB, f"{heaviest / MIB:.0f} MiB waited"
    assert consumer._load.bytes == 0
    consumer.stop()
    await store.close()


BEHIND = """
import asyncio, json, os, sys
sys.path.insert(0, {tests!r})
from counters import Added, Context, SEEN, Service, running
service = Service("behind", schema=SEEN)

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

@service.on
async def slow(event: Added, ctx: Context) -> None:
    await asyncio.sleep(0.005)
    ctx.store.execute("insert into seen values (?, ?, 'slow')", (event.name, event.n))

@service.on(start="now")
async def quick(event: Added) -> None:
    print(json.dumps({{"quick": event.name}}), flush=True)

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        await asyncio.sleep(1)
        before = memory()
        print(json.dumps({{"before": before}}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        print(json.dumps({{"after": memory(), "grown": memory() - before}}), flush=True)

asyncio.run(main())
"""

MANY = {"sqlite": 200_000, "postgresql": 20_000, "nats": 20_000}
"""What waits in memory is bounded by the same lines on all; to write so much takes long on a server."""


@pytest.mark.parametrize("backend", ["sqlite", "postgresql", "nats"])
async def test_a_backlog_of_200_000_costs_no_memory_is_counted_exactly_and_keeps_no_other_waiting(
    each_bus: str, backend: str, program: Program
) -> None:
    names = [f"thing{n}" for n in range(64)]
    async with connect(each_bus) as bus:
        clock = bus.clock

        def fact(name: str, n: int) -> Entry:
            body = json.dumps({"name": name, "n": n}).encode()
            return sealed(f"counters/{name}", "Added", clock.id(), Meta(clock.now()), body)

        each = -(-MANY[backend] // len(names) // 625) * 625
        for n in range(0, each, 625):
            facts = [(name, [fact(name, n + m) for m in range(625)]) for name in names]
            await asyncio.gather(*(bus.facts.append(f"counters/{name}", some) for name, some in facts))
        process = program(BEHIND.format(tests=str(TESTS)), each_bus)
        assert process.stdout is not None
        assert process.stdin is not None
        assert "before" in await said(process)
        for name in ("late", "later", "latest"):
            began = clock.monotonic()
            await bus.facts.append(f"counters/{name}", [fact(name, 1)])
            assert await said(process) == {"quick": name}
            assert clock.monotonic() - began < 5, "who is where the log ends does not wait for who is behind"
        await asyncio.sleep(5)
        process.stdin.write("\n")
        process.stdin.flush()
        told = await said(process)
        assert told["grown"] < 48 * MIB, told
        await asyncio.to_thread(process.wait, 60)
        async with store_of(each_bus, "behind", [schema_of(each_bus)]) as store:
            places = await store.places("slow", bus.facts.id, await bus.facts.head())
        handled = len(await seen(each_bus, "behind"))
        assert handled > 1000
        behind, looked = 0, 0
        head = await bus.facts.head()
        while looked < head:
            page = await bus.facts.read(Filter(domains=frozenset({"counters"})), after=looked, bodies=False)
            behind += sum(entry.position > places["counters", slot_of(entry.key)] for entry in page.entries)
            looked = page.looked
        assert behind == each * len(names) + 3 - handled


async def said(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return json.loads(await asyncio.to_thread(process.stdout.readline))
