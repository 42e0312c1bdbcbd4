"""Processes that are killed with work in hand: what they had stored stands once, and the rest is done by another."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cauce import connect, running
from tests.counters import Add, owner
from tests.test_instances import seen, until_seen

TESTS = Path(__file__).parent
Program = Callable[..., subprocess.Popen[str]]

KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from counters import Added, Context, Double, SEEN, Service, running

backend, url, when, keys = sys.argv[1:]
service = Service("killed", **({{}} if backend == "nats" else {{"schema": SEEN}}))

@service.on
async def handle(event: Added, ctx: Context) -> Double | None:
    with open(keys, "a") as file:
        print(ctx.idempotency_key, file=file)
    if backend == "nats":
        return Double(event.name)
    ctx.store.execute("insert into seen values (?, ?, '')", (event.name, event.n))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if backend == "sqlite":
    from cauce.backends.sqlite.store import SQLiteStore as Store, _Journal
    flush = _Journal.flush
    def flushed(self):
        flush(self)
        if self.places:
            die()
    if when == "before":
        _Journal.flush = flushed
elif backend == "postgresql":
    from cauce.backends.postgres.store import PostgresStore as Store
    from cauce.backends.postgres.units import Units
    commit = Units._commit
    async def committed(self, lost, *, checks):
        if lost.jobs:
            die()
        return await commit(self, lost, checks=checks)
    if when == "before":
        Units._commit = committed
else:
    from cauce.backends.nats.link import Link
    from cauce.backends.nats.store import NatsStore as Store
    publish = Link.publish
    def published(self, subject, *rest):
        publish(self, subject, *rest)
        if ".outbox." in subject:
            die()
    if when == "before":
        Link.publish = published
if when == "after":
    write = Store.commit
    async def written(self, unit):
        await write(self, unit)
        if unit.place is not None:
            die()
    Store.commit = written

async def main():
    async with running(service, bus=url) as bus:
        await bus.settled()
        print("settled", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_between_an_effect_and_its_place_leaves_both_or_none(
    when: str, backend: str, each_bus: str, program: Program, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"

    async def add() -> None:
        async with running(owner, bus=each_bus) as bus:
            await bus.call(Add("a"))

    async def effects() -> int:
        if backend != "nats":
            return len(await seen(each_bus, "killed"))
        async with connect(each_bus) as bus:
            return len((await bus.commands.read()).entries)

    asyncio.run(add())
    script = KILLED.format(tests=str(TESTS))
    first = program(script, backend, each_bus, when, str(keys))
    assert first.wait(60) == -9
    if backend != "nats":
        assert asyncio.run(effects()) == (when == "after")
    second = program(script, backend, each_bus, "never", str(keys))
    assert second.stdout is not None
    assert second.stdout.readline() == "settled\n"
    assert second.wait(60) == 0
    assert asyncio.run(effects()) == 1
    tried = keys.read_text().split()
    assert len(tried) == (2 if when == "before" else 1), "what stands is not handled again"
    assert len(set(tried)) == 1, "the outside world can see that it is the same"


MANY = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from counters import Added, Context, SEEN, Service, running
service = Service("many", schema=SEEN)
hangs, many = sys.argv[2] == "hangs", [0]

@service.on(concurrency=500)
async def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, ?)", (event.name, event.n, sys.argv[2]))
    if hangs:
        many[0] += 1
        if many[0] == 500:
            print("500", flush=True)
        await asyncio.Event().wait()

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        if hangs:
            await asyncio.Event().wait()
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


# On NATS a service with tables has the same store as on SQLite.
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
async def test_500_that_were_in_hand_when_their_worker_died_are_each_handled_once_by_another(
    each_bus: str, program: Program
) -> None:
    async with running(owner, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Add(f"thing{n}")) for n in range(500)))
    script = MANY.format(tests=str(TESTS))
    first = program(script, each_bus, "hangs")
    assert first.stdout is not None
    assert await asyncio.to_thread(first.stdout.readline) == "500\n"
    second = program(script, each_bus, "works")
    assert second.stdout is not None
    assert await asyncio.to_thread(second.stdout.readline) == "ready\n"
    first.kill()
    first.wait()
    await until_seen(each_bus, "many", 500)
    assert second.stdin is not None
    second.stdin.close()
    second.stdin = None
    await asyncio.to_thread(second.wait, 60)
    assert sorted(await seen(each_bus, "many")) == sorted((f"thing{n}", 1, "works") for n in range(500))
