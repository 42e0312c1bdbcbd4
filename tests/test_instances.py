"""One service in several processes: shared slots, killed and stopped instances, effects stored once, dead letters."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import apsw
import pytest

from cauce import Context, Refused, Retry, Service, connect, running
from cauce.accept import slot_of
from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.store import SQLiteStore
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.clock import SystemClock
from cauce.consumer import Consumer
from cauce.errors import Busy
from cauce.lease import BEAT
from cauce.log import Log
from cauce.shares import Shares
from cauce.store import Letter, Share, Store
from cauce.testing import VirtualClock
from tests.counters import SEEN, Add, Added, Counted, Double, owner
from tests.kept import rows, store_of, stores_of

Run = Callable[[Callable[[], Any]], Any]
Program = Callable[..., subprocess.Popen[str]]


def schema_of(url: str) -> str:
    return SEEN["postgresql" if url.startswith("postgresql") else "sqlite"]


def file_of(url: str, service: str) -> apsw.Connection:
    return apsw.Connection(str(folder(url) / service / "store.db"))


def stores(url: str) -> SQLiteStores:
    return SQLiteStores(folder(url), SystemClock())


def folder(url: str) -> Path:
    return folder_of(Path(url.removeprefix("sqlite:///")))


async def seen(url: str, service: str) -> list[tuple[Any, ...]]:
    """What a service stored, in order, each once however often it was tried."""
    return await rows(url, service, schema_of(url), "select name, n, by from seen order by rowid")


async def until_seen(url: str, service: str, least: int) -> None:
    async with asyncio.timeout(30.0):
        while len(await seen(url, service)) < least:  # noqa: ASYNC110 - others store it
            await asyncio.sleep(0.02)


def stored(url: str, service: str) -> AbstractAsyncContextManager[Store]:
    """The store of a service that has the table."""
    return store_of(url, service, [schema_of(url)])


async def letters_of(url: str, service: str = "") -> list[Letter]:
    async with stores_of(url) as stores:
        return await stores.letters(service)


async def head_of(log: Log) -> int:
    return await log.head()


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.01)


# -------------------------------------------------------------------------------------- what a handler stores


async def test_what_a_reaction_stores_says_and_its_place_are_one(each_bus: str) -> None:
    writer = Service("writer", schema=SEEN)

    @writer.on
    async def note(event: Added, ctx: Context) -> Double | None:
        ctx.store.execute("insert into seen values (?, ?, 'note')", (event.name, event.n))
        if event.n == 3:
            ctx.store.execute("insert into nowhere values (1)")
        return Double(event.name) if event.n == 1 else None

    async with running(owner, writer, bus=each_bus) as bus:
        for name in ("a", "b"):
            for _ in range(2):
                await bus.call(Add(name))
        await bus.settled()
        await bus.settled()
        assert sorted(await seen(each_bus, "writer")) == [
            ("a", 1, "note"),
            ("a", 2, "note"),
            ("b", 1, "note"),
            ("b", 2, "note"),
        ]
        assert (await bus.fetch(Counted, "a")).n in (2, 4, 3)
        assert len((await bus.commands.read()).entries) == 2
    async with stored(each_bus, "writer") as store:
        assert await store.outbox(0, 10) == []


async def test_a_statement_that_fails_takes_only_its_own_message_with_it(each_bus: str) -> None:
    writer = Service("writer", schema=SEEN)

    @writer.on(retry=Retry(attempts=1))
    async def note(event: Added, ctx: Context) -> None:
        ctx.store.execute("insert into seen values (?, ?, '')", (event.name, event.n))
        if event.name == "bad":
            ctx.store.execute("insert into nowhere values (1)")

    async with running(owner, writer, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Add(name)) for name in ("a", "b", "bad", "c", "d")))
        await bus.call(Add("bad"))
        await bus.settled()
        assert sorted(name for name, _, _ in await seen(each_bus, "writer")) == ["a", "b", "c", "d"]
        (letter,) = await letters_of(each_bus)
        assert (letter.service, letter.consumer, letter.stream, letter.behind) == ("writer", "note", "counters/bad", 1)
        assert "nowhere" in letter.error
        assert "BadStatement" in letter.error


@pytest.mark.parametrize(
    "sql",
    [
        "delete from cauce_places",
        "insert into cauce_claims values ('slot/1', 'me', 9)",
        "commit",
        "rollback",
        "savepoint x",
        "attach '/tmp/x' as y",
        "pragma journal_mode = off",
        "drop table cauce_waiting",
        "delete from sqlite_sequence",
        "update SQLITE_SEQUENCE set seq = 0",
        "insert into sqlite_sequence values ('cauce_outbox', 0)",
    ],
)
async def test_a_handler_may_not_touch_what_the_store_keeps_of_it(sql: str, bus_url: str) -> None:
    writer = Service("writer", schema=SEEN)

    @writer.on(retry=Retry(attempts=1))
    async def note(event: Added, ctx: Context) -> None:
        ctx.store.execute(sql)

    async with running(owner, writer, bus=bus_url) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        (letter,) = await stores(bus_url).letters()
        assert "cannot be run" in letter.error
        assert "not authorized" in letter.error or "prohibited" in letter.error


async def test_what_follows_a_statement_with_rows_is_run_too(bus_url: str) -> None:
    writer = Service("writer", schema=SEEN)

    @writer.on
    async def note(event: Added, ctx: Context) -> None:
        ctx.store.execute("insert into seen values ('a', 1, '') returning n; update seen set n = n + 1; select 1")
        ctx.store.execute("select * from seen; update seen set by = 'all'")

    async with running(owner, writer, bus=bus_url) as bus:
        for _ in range(2):
            await bus.call(Add("a"))
        await bus.settled()
        assert await seen(bus_url, "writer") == [("a", 3, "all"), ("a", 2, "all")]


@pytest.mark.parametrize(
    "sql",
    [
        "begin",
        "savepoint x",
        "attach ':memory:' as x",
        "pragma query_only = off",
        "select * from cauce_outbox",
        "create temp table x (a)",
        "insert into seen values ('a', 1, '')",
        "select 1; begin",
    ],
)
async def test_a_query_of_a_handler_reads_and_does_nothing_else(sql: str, tmp_path: Path) -> None:
    from cauce.clock import SystemClock
    from cauce.store import Unit

    index = "create virtual table words using fts5 (word)"
    store = await SQLiteStore.open(tmp_path / "s", "s", SystemClock(), [SEEN["sqlite"], index])
    with pytest.raises(Refused, match=r"cannot be run.*(not authorized|prohibited)"):
        await store.fetch(sql)
    # What is committed later is read: no snapshot is held.
    unit = Unit(None)
    unit.timer = "soon", 7
    unit.statements.append(("insert into seen values ('b', 2, '')", ()))
    await store.commit(unit)
    assert await store.timer("soon") == 7
    assert await store.fetch("select name, upper(name), n from seen") == [("b", "B", 2)]
    assert await store.fetch("select * from words where words match 'x'") == []
    assert await store.fetch("select value from json_each('[1]')") == [(1,)]
    count = "with recursive c (n) as (select 1 union all select n + 1 from c where n < 3) select * from c"
    assert await store.fetch(count) == [(1,), (2,), (3,)]
    await store.close()


async def test_what_was_stored_is_read_by_later_messages_of_the_thing(each_bus: str) -> None:
    writer = Service("writer", schema=SEEN)
    found = list[int]()

    @writer.on
    async def note(event: Added, ctx: Context) -> None:
        ((n,),) = await ctx.store.fetch("select count(*) from seen where name = ?", (event.name,))
        found.append(n)
        ctx.store.execute("insert into seen values (?, ?, '')", (event.name, event.n))

    async with running(owner, writer, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Add("a")) for _ in range(50)))
        await bus.settled()
    assert found == list(range(50))


async def test_the_schema_of_a_store_grows_by_parts_and_is_never_changed_behind_its_back(bus_url: str) -> None:
    async with running(Service("writer", schema=SEEN["sqlite"]), bus=bus_url):
        pass
    file_of(bus_url, "writer").execute("insert into seen values ('a', 1, '')")
    async with running(
        Service("writer", schema=[SEEN["sqlite"], "alter table seen add column at integer"]), bus=bus_url
    ):
        pass
    assert file_of(bus_url, "writer").execute("select * from seen").fetchall() == [("a", 1, "", None)]
    for wrong in (["create table other (a)"], [SEEN["sqlite"].replace("by", "who")]):
        with pytest.raises(Refused, match="made by other SQL"):
            async with running(Service("writer", schema=wrong), bus=bus_url):
                pass
    with pytest.raises(Refused, match="part 3 of the schema of service 'writer' cannot be run: near"):
        async with running(
            Service("writer", schema=[SEEN["sqlite"], "alter table seen add column at integer", "creat table x"]),
            bus=bus_url,
        ):
            pass
    assert file_of(bus_url, "writer").execute("select count(*) from cauce_claims where owner != ''").fetchall() == [
        (0,)
    ]


async def test_the_schema_of_a_store_may_number_its_rows_and_drop_what_it_numbered(bus_url: str) -> None:
    schema = ["create table old (n integer primary key autoincrement)"]
    schema += [
        "alter table old rename to older",
        "drop table older",
        SEEN["sqlite"].replace("n integer", "n integer primary key autoincrement"),
    ]
    writer = Service("writer", schema=schema)

    @writer.on
    async def note(event: Added, ctx: Context) -> None:
        ctx.store.execute("insert into seen (name, by) values ('a', '')")

    for _ in range(2):
        async with running(owner, writer, bus=bus_url) as bus:
            await bus.call(Add("a"))
            await bus.settled()
    assert file_of(bus_url, "writer").execute("select name, n, by from seen order by rowid").fetchall() == [
        ("a", 1, ""),
        ("a", 2, ""),
    ]


async def test_a_second_store_for_one_service_is_refused_and_a_removed_one_is_begun_anew(bus_url: str) -> None:
    async with running(owner, bus=bus_url) as bus:
        await bus.call(Add("a"))
    here = folder(bus_url) / "counters"
    here.rename(here.with_name("aside"))
    async with running(owner, bus=bus_url) as bus:
        await bus.call(Add("a"))
    shutil.rmtree(here)
    here.with_name("aside").rename(here)
    with pytest.raises(Refused, match="service 'counters' keeps its data in store .* this one is .*--store postgresql"):
        async with running(owner, bus=bus_url):
            pass
    shutil.rmtree(here)
    async with running(owner, bus=bus_url) as bus:
        assert (await bus.call(Add("a"))).version == 3


# ------------------------------------------------------------------------------------------------- dead letters


@pytest.mark.usefixtures("impatient")
async def test_what_failed_too_often_is_a_dead_letter_and_a_person_decides(each_bus: str) -> None:
    handled, broken = list[tuple[str, int]](), {"a", "b"}
    reacting = Service("reacting")

    @reacting.on(retry=Retry(attempts=3))
    async def handle(event: Added) -> None:
        if event.name in broken:
            raise ValueError(f"cannot do {event.name}")
        handled.append((event.name, event.n))

    async with running(owner, reacting, bus=each_bus) as bus:
        for name in ("a", "b", "c"):
            for _ in range(2):
                await bus.call(Add(name))
        await bus.settled()
        assert sorted(handled) == [("c", 1), ("c", 2)]
        found = await letters_of(each_bus, "reacting")
        assert [(each.stream, each.attempts, each.behind) for each in found] == [
            ("counters/a", 3, 1),
            ("counters/b", 3, 1),
        ]
        assert found[0].error == "ValueError: cannot do a"
        assert 'raise ValueError(f"cannot do {event.name}")' in found[0].trace
        message = json.loads(bytes(found[0].message))
        assert (message["type"], message["subject"], message["data"]) == ("Added", "a", {"name": "a", "n": 1})
        broken.clear()
        async with stores_of(each_bus) as stores:
            await stores.retry("reacting", "handle", found[0].position)
            await stores.discard("reacting", "handle", found[1].position)
            with pytest.raises(Refused, match="no dead letter"):
                await stores.retry("reacting", "handle", found[0].position)
        async with asyncio.timeout(60):
            while len(handled) < 5:
                await bus.clock.sleep(0.01)
        assert sorted(handled[2:]) == [("a", 1), ("a", 2), ("b", 2)]
        assert await letters_of(each_bus) == []


@pytest.mark.usefixtures("impatient")
async def test_a_dead_letter_waits_through_a_restart_with_those_behind_it(each_bus: str) -> None:
    tried = list[int]()
    reacting = Service("reacting")

    @reacting.on(retry=Retry(attempts=2))
    async def handle(event: Added) -> None:
        tried.append(event.n)
        raise ValueError

    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Add("a"))
        await bus.settled()
    assert tried == [1, 1]
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        await bus.clock.sleep(0.2)
    assert tried == [1, 1]
    (letter,) = await letters_of(each_bus)
    assert letter.behind == 1


KILLER = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from counters import Added, Retry, Service, Context, SEEN, running
service = Service("killed", schema=SEEN)

@service.on(retry=Retry(attempts=2))
async def handle(event: Added, ctx: Context) -> None:
    if event.name == "deadly":
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    ctx.store.execute("insert into seen values (?, ?, '')", (event.name, event.n))

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        await bus.settled()
        print("settled", flush=True)

asyncio.run(main())
"""


# On NATS a service with tables has the same store as on SQLite.
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_message_that_kills_the_process_is_parked_and_no_other(each_bus: str, program: Program) -> None:
    async def fill() -> None:
        async with running(owner, bus=each_bus) as bus:
            for n in range(40):
                await bus.call(Add("deadly" if n == 17 else f"innocent{n}"))

    asyncio.run(fill())
    script = KILLER.format(tests=str(Path(__file__).parent))
    for _ in range(12):
        process = program(script, each_bus)
        assert process.stdout is not None
        said = process.stdout.readline()
        process.wait()
        if said == "settled\n":
            break
    (letter,) = asyncio.run(letters_of(each_bus))
    assert (letter.stream, letter.attempts) == ("counters/deadly", 2)
    assert letter.error == "the process died, or stood still, while this was handled, 2 times"
    assert sorted(name for name, _, _ in asyncio.run(seen(each_bus, "killed"))) == sorted(
        f"innocent{n}" for n in range(40) if n != 17
    ), "each of the others once"


# -------------------------------------------------------------------------------------------------- the outbox


LOST = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from counters import Added, Double, Service, Context, SEEN, running
from cauce.backends.{log}
from cauce.backends.{store}
service = Service("saying", schema=SEEN)

@service.on
async def handle(event: Added, ctx: Context) -> Double:
    ctx.store.execute("insert into seen values (?, ?, '')", (event.name, event.n))
    return Double(event.name)

append = Log.append
def die(self, stream, entries, **how):
    if entries[0].type == "Double":
        os._exit(9)
    return append(self, stream, entries, **how)

async def main(when):
    if when == "before the relay":
        Log.append = die
    if when == "before it is known":
        async def never(self, numbers):
            os._exit(9)
        Store.relayed = never
    async with running(service, bus=sys.argv[1]) as bus:
        await bus.settled()
        print("settled", flush=True)

asyncio.run(main(sys.argv[2]))
"""


PARTS = {
    "sqlite": {"log": "sqlite.log import SQLiteLog as Log", "store": "sqlite.store import SQLiteStore as Store"},
    "postgresql": {
        "log": "postgres.log import PostgresLog as Log",
        "store": "postgres.store import PostgresStore as Store",
    },
    "nats": {"log": "nats.log import NatsLog as Log", "store": "sqlite.store import SQLiteStore as Store"},
}


@pytest.mark.parametrize("when", ["before the relay", "before it is known"])
def test_what_was_said_is_said_once_wherever_the_process_dies(
    when: str, backend: str, each_bus: str, program: Program
) -> None:
    async def fill() -> None:
        async with running(owner, bus=each_bus) as bus:
            await bus.call(Add("a"))

    asyncio.run(fill())
    script = LOST.format(tests=str(Path(__file__).parent), **PARTS[backend])
    first = program(script, each_bus, when)
    assert first.stdout is not None
    assert first.stdout.readline() == ""
    assert first.wait() == 9
    assert asyncio.run(seen(each_bus, "saying")) == [("a", 1, "")], "stored with what was to be said"
    again = program(script, each_bus, "well")
    assert again.stdout is not None
    assert again.stdout.readline() == "settled\n"
    again.wait()
    assert asyncio.run(seen(each_bus, "saying")) == [("a", 1, "")], "not handled again"

    async def look() -> None:
        async with connect(each_bus) as bus:
            assert [entry.type for entry in (await bus.commands.read()).entries] == ["Double"]

    asyncio.run(look())


# ------------------------------------------------------------------------------------------------- every so often


def test_an_interval_runs_once_for_all_instances_and_goes_on_after_a_restart(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    ran = list[float]()

    def clocked() -> Service:
        service = Service("clocked", schema=SEEN)

        @service.every(60)
        async def tick(ctx: Context) -> Add:
            ran.append(round(clock.monotonic()))
            ctx.store.execute("insert into seen values ('tick', 0, ?)", (ctx.idempotency_key,))
            return Add("ticks")

        return service

    async def main() -> None:
        async with (
            running(owner, clocked(), bus=bus_url, clock=clock) as bus,
            running(clocked(), bus=bus_url, clock=clock),
        ):
            await clock.sleep(200)
            await bus.settled()
            assert len(ran) == 3
        clock.advance(600)
        async with running(owner, clocked(), bus=bus_url, clock=clock) as bus:
            await clock.sleep(50)
            assert len(ran) == 4, "what was missed is made up for once"
            await bus.settled()
            await bus.settled()
            assert (await bus.fetch(Counted, "ticks")).n == 4
        assert len({by for _, _, by in await seen(bus_url, "clocked")}) == 4

    virtual(main)


# -------------------------------------------------------------------------------------------------- slots shared


@asynccontextmanager
async def standing(url: str, service: str, *schema: str) -> AsyncIterator[Callable[[], Awaitable[Counter[str]]]]:
    """Tells how many slots each instance of a service holds, as one that never joins sees it."""
    async with store_of(url, service, schema) as store:

        async def holders() -> Counter[str]:
            try:
                held = (await store.tick("nobody", ())).holders
            except Busy:
                # One that was stopped while it wrote lets nobody write.
                held = {}
            return Counter(owner for name, owner in held.items() if name.startswith("slot/"))

        yield holders


async def until_shared(
    holders: Callable[[], Awaitable[Counter[str]]], *wanted: int, but: Set[str] = frozenset()
) -> set[str]:
    """Who holds the slots, once each holds so many, and they are others than `but`."""
    async with asyncio.timeout(30.0):
        while sorted((found := await holders()).values()) != list(wanted) or found.keys() == but:  # noqa: ASYNC110 - these are other processes
            await asyncio.sleep(0.01)
    return set(found)


INSTANCE = """
import asyncio, logging, sys
sys.path.insert(0, {tests!r})
import test_instances
from counters import Added, Doubled, Service, Context, SEEN, running, owner
logging.basicConfig(level=logging.WARNING)
name = sys.argv[2]
service = Service("seeing", schema=SEEN)

@service.on
async def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, ?)", (event.name, event.n, name))

async def main():
    services = [owner, service] if "owner" in sys.argv[3:] else [service]
    async with running(*services, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait({{asyncio.ensure_future(stop), bus.failed}}, return_when=asyncio.FIRST_COMPLETED)
        if bus.failed.done():
            print("failed", type(bus.failed.exception()).__name__, flush=True)

asyncio.run(main())
"""


def instance(program: Program, url: str, name: str, *more: str) -> subprocess.Popen[str]:
    process = program(INSTANCE.format(tests=str(Path(__file__).parent)), url, name, *more)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    process.wait(30)


async def test_instances_share_slots_evenly_and_keep_the_order_of_each_thing_through_every_hand_over(
    each_bus: str, program: Program
) -> None:
    names = [f"thing{n}" for n in range(40)]
    async with running(owner, bus=each_bus) as bus:
        adding = True

        async def load() -> None:
            while adding:
                await asyncio.gather(*(bus.call(Add(name)) for name in names))
                await asyncio.sleep(0.01)

        loading = asyncio.ensure_future(load())
        first = instance(program, each_bus, "one")
        async with standing(each_bus, "seeing", schema_of(each_bus)) as holders:
            await until_shared(holders, 16)
            second = instance(program, each_bus, "two")
            await until_shared(holders, 8, 8)
            third = instance(program, each_bus, "three")
            await until_shared(holders, 5, 5, 6)
            second.kill()
            second.wait()
            await until_shared(holders, 8, 8)
            await asyncio.to_thread(close, first)
            await until_shared(holders, 16)
        adding = False
        await loading
        wanted = {name: (await bus.fetch(Counted, name)).n for name in names}
        await until_seen(each_bus, "seeing", sum(wanted.values()))
        await asyncio.to_thread(close, third)
    by_name = defaultdict(list)
    stored = await seen(each_bus, "seeing")
    for name, n, _ in stored:
        by_name[name].append(n)
    assert by_name == {name: list(range(1, n + 1)) for name, n in wanted.items()}, "each once, in order"
    assert {by for _, _, by in stored} == {"one", "two", "three"}


async def test_an_owner_in_two_processes_decides_each_thing_in_one_and_calls_find_it(
    each_bus: str, program: Program
) -> None:
    first = instance(program, each_bus, "one", "owner")
    second = instance(program, each_bus, "two", "owner")
    async with standing(each_bus, "counters") as holders:
        await until_shared(holders, 8, 8)
    async with connect(each_bus) as bus:
        names = [f"thing{n}" for n in range(50)]
        await asyncio.gather(*(bus.call(Add(name)) for name in names for _ in range(4)))
        first.kill()
        first.wait()
        began = time.monotonic()

        async def add(name: str) -> None:
            while True:
                try:
                    await bus.call(Add(name), timeout=10)
                    return
                except Exception:
                    assert time.monotonic() - began < 20
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(add(name) for name in names))
        for name in names:
            assert (await bus.fetch(Counted, name)).n == 5
    await asyncio.to_thread(close, second)


async def test_a_stopped_instance_loses_its_slots_writes_nothing_when_it_wakes_up_and_joins_again(
    each_bus: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.shares.TTL", 1.5)
    monkeypatch.setattr("cauce.shares.BEAT", 0.3)
    stale = instance(program, each_bus, "stale")
    async with running(owner, bus=each_bus) as bus:
        await bus.call(Add("a"))
        await until_seen(each_bus, "seeing", 1)
        await asyncio.sleep(0.2)
        async with standing(each_bus, "seeing", schema_of(each_bus)) as holders:
            before = await until_shared(holders, 16)
        os.kill(stale.pid, signal.SIGSTOP)
        other = Service("seeing", schema=SEEN)

        @other.on
        async def handle(event: Added, ctx: Context) -> None:
            ctx.store.execute("insert into seen values (?, ?, 'other')", (event.name, event.n))

        async with (
            standing(each_bus, "seeing", schema_of(each_bus)) as holders,
            running(other, bus=each_bus) as here,
        ):
            await until_shared(holders, 16, but=before)
            for _ in range(3):
                await bus.call(Add("a"))
            await here.settled()
            os.kill(stale.pid, signal.SIGCONT)
            await until_shared(holders, 8, 8)
            names = [f"thing{n}" for n in range(40)]
            await asyncio.gather(*(bus.call(Add(name)) for name in names))
            await here.settled()
            await until_seen(each_bus, "seeing", 44)
    await asyncio.to_thread(close, stale)
    stored = await seen(each_bus, "seeing")
    assert [(n, by) for name, n, by in stored if name == "a"] == [(1, "stale"), *((n, "other") for n in range(2, 5))]
    assert {by for name, _, by in stored if name != "a"} == {"stale", "other"}, "it works again"
    assert len(stored) == 44


async def test_a_place_noted_while_another_is_written_is_written_next(tmp_path: Path) -> None:
    from cauce.clock import SystemClock

    store = await SQLiteStore.open(tmp_path / "s", "s", SystemClock())
    # What the loop has in hand when the writer begins.
    noted = store._journal.moves
    store.move(None, "handle", "counters", 1, "log", 5)
    await store.flush()
    noted["handle", "counters", 2] = None, "log", 6
    await store.flush()
    assert await store.places("handle", "log", 100) == {("counters", 1): 5, ("counters", 2): 6}
    # A transaction that failed does not set back what was noted since.
    store.move(None, "handle", "counters", 1, "log", 7)
    store._journal._moving["handle", "counters", 1] = None, "log", 6
    store._journal._moving["handle", "counters", 2] = None, "log", 8
    store._journal.rolled_back()
    assert noted == {("handle", "counters", 1): (None, "log", 7), ("handle", "counters", 2): (None, "log", 8)}
    await store.close()


# --------------------------------------------------------------------------------------------- run --each


def test_run_each_starts_again_what_dies_and_stops_all_together(bus_url: str, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "examples")))}
    command = [sys.executable, "-c", "from cauce.cli import main; main()"]
    parent = subprocess.Popen(
        [*command, "run", "shop", "--each", "--bus", bus_url], env=environment, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path,
    )  # fmt: skip

    def running_services() -> dict[str, int]:
        done = subprocess.run(
            [*command, "services", "--bus", bus_url, "--json"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            return {}
        return {
            each["service"]: each["pid"] for each in json.loads(done.stdout)["services"] if each["state"] == "running"
        }

    def wait_for(condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        until = time.monotonic() + 30
        while not condition(found := running_services()):
            assert time.monotonic() < until, found
            time.sleep(0.05)
        return found

    try:
        first = wait_for(lambda found: {"users", "mails"} <= found.keys())
        assert len(set(first.values())) == len(first), "each in a process of its own"
        os.kill(first["users"], signal.SIGKILL)
        again = wait_for(lambda found: found.get("users", first["users"]) != first["users"] and "mails" in found)
        assert again["mails"] == first["mails"]
        parent.terminate()
        assert parent.wait(30) == 0
        assert running_services() == {}
    finally:
        parent.kill()
        parent.communicate()


def test_what_run_each_started_ends_when_the_supervisor_was_killed(bus_url: str, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "examples")))}
    command = [sys.executable, "-c", "from cauce.cli import main; main()"]
    parent = subprocess.Popen(
        [*command, "run", "shop.users", "--each", "--bus", bus_url], env=environment, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert parent.stderr is not None
    line = parent.stderr.readline()
    child = int(line.rpartition(" ")[2])
    while "running users" not in parent.stderr.readline():
        pass
    parent.kill()
    parent.wait()
    parent.stderr.close()
    until = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}/stat").exists()


def test_a_service_that_was_struck_off_joins_again_in_the_same_process(bus_url: str, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "examples")))}
    parent = subprocess.Popen(
        [sys.executable, "-c", "from cauce.cli import main; main()", "run", "shop.users", "--bus", bus_url],
        env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert parent.stderr is not None

    def wait_for(what: str) -> None:
        assert parent.stderr is not None
        for line in parent.stderr:
            if what in line:
                return
        raise AssertionError(f"it ended without {what!r}")

    try:
        wait_for("running users")
        store = apsw.Connection(str(folder_of(Path(bus_url.removeprefix("sqlite:///"))) / "users" / "store.db"))
        store.set_busy_timeout(5000)
        store.execute("delete from cauce_instances")
        store.close()
        wait_for("users: this instance stood still, or was cut off, and others may have taken over")
        wait_for("users: this instance has joined again")
        parent.terminate()
        parent.communicate(timeout=30)
        assert parent.returncode == 0
    finally:
        parent.kill()
        parent.communicate()


HANGING = """
import threading
from counters import Added, Service, owner
service = Service("hanging")

@service.on
def hang(event: Added) -> None:
    print("hangs", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("end", ["signal", "supervisor"])
def test_a_process_whose_plain_handler_hangs_ends_all_the_same(end: str, bus_url: str, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here), str(tmp_path)))}
    each = ["--each"] if end == "supervisor" else []
    process = subprocess.Popen(
        [sys.executable, "-c", "from cauce.cli import main; main()", "run", "hanging", "--bus", bus_url, "--drain", "0.5", *each],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    started, running = "", 0
    # Apart, each of the two says so of itself.
    while running < (2 if each else 1):
        started += (line := process.stderr.readline())
        running += "running " in line

    async def wish() -> None:
        async with connect(bus_url) as bus:
            await bus.call(Add("a"))

    asyncio.run(wish())
    lines = [process.stdout.readline()]
    if end == "signal":
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
    else:
        children = [int(line.rpartition(" ")[2]) for line in started.splitlines() if " runs in process " in line]
        process.kill()
        # The end of the file comes when all who write there are gone.
        _, errors = process.communicate(timeout=20)
        assert children
        until = time.monotonic() + 20
        while left := [child for child in children if Path(f"/proc/{child}/stat").exists()]:
            assert time.monotonic() < until, left
            time.sleep(0.05)
    assert lines == ["hangs\n"]
    assert "hanging.hang hangs in its thread" in errors


SPEAKING = """
import logging
from counters import Add, Added, Service, owner
log = logging.getLogger("speaking")
service = Service("speaking")

@service.on
async def hear(event: Added) -> Add | None:
    log.warning("heard %s %d", event.name, event.n)
    return Add(event.name) if event.n < 3 else None
"""


def test_the_log_of_every_service_says_with_which_message_it_began(bus_url: str, tmp_path: Path) -> None:
    (tmp_path / "speaking.py").write_text(SPEAKING)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here), str(tmp_path)))}
    process = subprocess.Popen(
        [sys.executable, "-c", "from cauce.cli import main; main()", "run", "speaking", "--bus", bus_url],
        env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stderr is not None
    while not process.stderr.readline().startswith("running "):
        pass

    async def wish() -> str:
        async with connect(bus_url) as bus:
            return (await bus.call(Add("a"))).id

    id = asyncio.run(wish())
    heard = [process.stderr.readline().split(maxsplit=3)[3] for _ in range(3)]
    process.terminate()
    process.communicate()
    assert heard == [f"[{id}] heard a {n}\n" for n in (1, 2, 3)]


# -------------------------------------------------------------------------- what is slow, and what fails meanwhile


def consumers_of(monkeypatch: pytest.MonkeyPatch) -> list[Consumer]:
    """All that are made from now on."""
    made: list[Consumer] = []
    init = Consumer.__init__

    def remember(self: Consumer, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(Consumer, "__init__", remember)
    return made


async def test_a_thing_that_hangs_while_a_service_catches_up_delays_only_its_slot(each_bus: str) -> None:
    names = [f"thing{n}" for n in range(60)]
    async with running(owner, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Add("hot")) for _ in range(700)))
        await asyncio.gather(*(bus.call(Add(name)) for name in names))
    others = {name for name in names if slot_of(name) != slot_of("hot")}
    service, handled = Service("hanging"), set[str]()

    @service.on
    async def handle(event: Added) -> None:
        if event.name == "hot":
            await asyncio.Event().wait()
        handled.add(event.name)

    async with running(owner, service, bus=each_bus, drain=0.2) as bus:
        await until(lambda: others <= handled)
        late = next(f"late{n}" for n in range(100) if slot_of(f"late{n}") != slot_of("hot"))
        await bus.call(Add(late))
        await until(lambda: late in handled)


async def test_lanes_that_catch_up_go_on_when_others_of_them_are_given_away(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"thing{n}" for n in range(64)]
    async with running(owner, bus=bus_url) as bus:
        for _ in range(40):
            await asyncio.gather(*(bus.call(Add(name)) for name in names))
    made, handled = consumers_of(monkeypatch), Counter[str]()
    service = Service("catching")

    @service.on
    async def handle(event: Added) -> None:
        await asyncio.sleep(0.0005)
        handled[event.name] += 1

    async with running(service, bus=bus_url):
        await until(lambda: handled.total() > 50)
        await made[0].drop(range(8), 5)
        kept = {name for name in names if slot_of(name) >= 8}
        await until(lambda: all(handled[name] == 40 for name in kept))


async def test_too_many_behind_a_dead_letter_stop_its_slot_only(
    each_bus: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cauce.consumer._MOST_WAITING", 20)
    service, handled = Service("stuck"), set[str]()

    @service.on(retry=Retry(attempts=1))
    async def handle(event: Added) -> None:
        if event.name == "dead":
            raise ValueError
        handled.add(event.name)

    names = [f"thing{n}" for n in range(40)]
    async with running(owner, service, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Add("dead")) for _ in range(60)))
        await asyncio.gather(*(bus.call(Add(name)) for name in names))
        await until(lambda: {name for name in names if slot_of(name) != slot_of("dead")} <= handled)
        await until(lambda: f"messages wait in slot {slot_of('dead')}, so it handles no more there" in caplog.text)
        letter = (await letters_of(each_bus))[0]
        assert letter.behind in range(18, 21)


async def test_a_handler_that_hangs_keeps_no_other_slot_from_an_instance_that_joins(
    bus_url: str, program: Program
) -> None:
    service, hangs = Service("seeing", schema=SEEN), asyncio.Event()

    @service.on
    async def handle(event: Added) -> None:
        hangs.set()
        await asyncio.Event().wait()

    async with running(owner, bus=bus_url) as bus, running(service, bus=bus_url, drain=1.0):
        hot = next(f"hot{n}" for n in range(99) if slot_of(f"hot{n}") == 15)
        await bus.call(Add(hot))
        await hangs.wait()
        other = instance(program, bus_url, "other")
        async with standing(bus_url, "seeing", schema_of(bus_url)) as holders:
            await until_shared(holders, 8, 8)
    close(other)


class Doing:
    """What a service does when it gains or loses, and how often that fails first."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.gained, self.lost = fails, list[Share](), list[Share]()

    async def gain(self, shares: Sequence[Share]) -> None:
        self._try()
        self.gained += shares

    async def lose(self, shares: Sequence[Share]) -> None:
        self._try()
        self.lost += shares

    def _try(self) -> None:
        if self.fails:
            self.fails -= 1
            raise Busy("not now")


async def turn(shares: Shares) -> None:
    with suppress(Busy):
        await shares._step()
    with suppress(Busy):
        await shares._finished()


async def test_who_is_not_ready_is_given_nothing_and_everything_is_held_meanwhile(tmp_path: Path) -> None:
    clock = SystemClock()
    store = await SQLiteStore.open(tmp_path / "s", "s", clock)
    first, second = Doing(), Doing()
    one = Shares(store, "one", clock, first.gain, first.lose)
    two = Shares(store, "two", clock, second.gain, second.lose)
    await one.start()
    one.go()
    await two.start()
    # It may take long to be ready, such as with a replica that is not complete.
    for _ in range(4):
        await turn(one)
        await turn(two)
    assert (len(one.held), len(two.held), first.lost) == (17, 0, [])
    two.go()
    for _ in range(4):
        await turn(two)
        await turn(one)
    assert (len(one.held), len(two.held)) == (9, 8)
    await store.close()


async def test_who_leaves_gives_all_to_those_who_look_out_for_it_and_comes_back(tmp_path: Path) -> None:
    clock = SystemClock()
    store = await SQLiteStore.open(tmp_path / "s", "s", clock)
    doing = {name: Doing() for name in ("one", "two", "three")}
    shares = {name: Shares(store, name, clock, each.gain, each.lose) for name, each in doing.items()}
    for each in shares.values():
        await each.start()
        each.go()
    for _ in range(4):
        for each in shares.values():
            await turn(each)
    assert sorted(len(each._slots) for each in shares.values()) == [5, 5, 6]
    leaves = asyncio.ensure_future(shares["one"].hand_over(30))
    async with asyncio.timeout(30):
        while not leaves.done() or len(shares["two"]._slots) + len(shares["three"]._slots) < 16:
            for name in ("two", "three"):
                await turn(shares[name])
            await asyncio.sleep(0)
    await leaves
    assert [len(each._slots) for each in shares.values()] == [0, 8, 8]
    assert all(share.clean for name in ("two", "three") for share in shares[name].held.values())
    await shares["one"].stop()
    again = Shares(store, "again", clock, doing["one"].gain, doing["one"].lose)
    await again.start()
    again.go()
    for _ in range(4):
        for each in (again, shares["two"], shares["three"]):
            await turn(each)
    assert sorted(len(each._slots) for each in (again, shares["two"], shares["three"])) == [5, 5, 6]
    await store.close()


def test_who_gives_something_waits_for_one_beat_of_the_others_and_not_for_two(
    virtual: Run, clock: VirtualClock, tmp_path: Path
) -> None:
    async def main() -> None:
        store = await SQLiteStore.open(tmp_path / "s", "s", clock)
        one, two = (Shares(store, name, clock, Doing().gain, Doing().lose) for name in ("one", "two"))
        await one.start()
        one.go()
        runs = [asyncio.ensure_future(one.run())]
        await clock.sleep(60)
        await two.start()
        two.go()
        began = clock.monotonic()
        runs.append(asyncio.ensure_future(two.run()))
        while len(two._slots) < 8:
            await clock.sleep(0.01)
        assert clock.monotonic() - began < BEAT + 1
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        await store.close()

    virtual(main)


async def test_a_place_that_goes_on_in_the_slot_of_another_is_no_damage(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, places = Service("reading"), SQLiteStore.places

    @reading.on
    async def handle(event: Added) -> None: ...

    async with running(owner, bus=bus_url) as bus:

        async def go_on(self: SQLiteStore, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
            at = (await bus.call(Add("a"))).position
            self.move(None, consumer, "counters", slot_of("a"), log, at)
            await self.flush()
            return await places(self, consumer, log, head)

        monkeypatch.setattr(SQLiteStore, "places", go_on)
        async with running(reading, bus=bus_url) as here:
            await here.settled()


async def test_what_could_not_be_given_at_once_is_given_later(tmp_path: Path) -> None:
    clock = SystemClock()
    store = await SQLiteStore.open(tmp_path / "s", "s", clock)
    first, second = Doing(), Doing()
    one = Shares(store, "one", clock, first.gain, first.lose)
    two = Shares(store, "two", clock, second.gain, second.lose)
    await one.start()
    assert len(first.gained) == 17
    one.go()
    await two.start()
    two.go()
    first.fails = 3
    for _ in range(4):
        await turn(one)
        await turn(two)
    assert sorted(share.name for share in first.lost) == sorted(share.name for share in second.gained)
    assert (len(one.held), len(two.held)) == (9, 8)
    await store.close()


async def test_what_could_not_be_gained_at_once_is_gained_later_with_whose_it_was(tmp_path: Path) -> None:
    clock = SystemClock()
    store = await SQLiteStore.open(tmp_path / "s", "s", clock)
    await store.tick("dead", (), join=True)
    await store.take("dead", ["slot/3"])
    standing = await store.tick("dead", ())
    doing = Doing(2)
    one = Shares(store, "one", clock, doing.gain, doing.lose)
    one.go()
    await store.tick("x", [("dead", standing.instances["dead"])])
    for _ in range(4):
        await turn(one)
    (share,) = [share for share in doing.gained if share.name == "slot/3"]
    assert (share.before, share.clean) == ("dead", False)
    assert len(one.held) == 17
    await store.close()


def test_an_instance_that_takes_over_for_long_shows_its_beat(virtual: Run, clock: VirtualClock, tmp_path: Path) -> None:
    async def main() -> None:
        store = await SQLiteStore.open(tmp_path / "s", "s", clock)

        async def gain(shares: Sequence[Share]) -> None:
            await clock.sleep(60)

        one = Shares(store, "one", clock, gain, Doing().lose)
        await one.start()
        assert (await store.tick("two", (), join=True)).instances["one"] > 20
        await store.close()

    virtual(main)
