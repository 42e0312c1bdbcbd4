"""Crashes at the worst moment, full disks, stopped owners and restored backups, with the services of the chaos test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
from click.testing import CliRunner

from cauce import Bus, Busy, CauceError, Damaged, Held, StorageFull, connect, running
from cauce.accept import SLOTS
from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.log import SQLiteLog
from cauce.backends.sqlite.store import SQLiteStore as Store
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.lease import Leases, identity
from cauce.log import Filter
from cauce.outbox import Outbox
from cauce.records import written
from cauce.runtime import _Running
from cauce.shares import Shares
from cauce.store import Unit
from tests.chaos import EFFECTS, Add, Rows, Tally, copying, owner, reacting
from tests.history import Copy, Effect, Fact, History, Said, Told, findings

HOLDERS = "select owner from cauce_claims where owner != '' and name like 'slot/%'"

Program = Callable[..., subprocess.Popen[str]]


def place(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def stored(url: str, sql: str = "select number, key, version, instance from effects", service: str = "reacting") -> Any:
    connection = apsw.Connection(str(folder_of(place(url)) / service / "store.db"), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5000)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.02)


async def history(bus: Bus, url: str, told: list[Told]) -> History:
    """What is stored now, and what clients were told."""
    mine = Filter(domains=frozenset({"tallies"}))
    facts = (await bus.facts.read(mine, limit=10_000)).entries
    commands = (await bus.commands.read(mine, limit=10_000)).entries
    return History(
        told,
        [Fact(each.position, each.key, each.version, each.type, each.id, each.meta.causation) for each in facts],
        [Effect(*row) for row in stored(url)],
        [Said(each.id, each.key, each.meta.causation) for each in commands if not each.meta.verdict],
    )


async def add(bus: Bus, *keys: str) -> list[Told]:
    receipts = await asyncio.gather(*(bus.call(Add(key)) for key in keys))
    return [Told(each.id, each.key, "accepted", each.version, each.position) for each in receipts]


# ------------------------------------------------------------------------------------------ the store and its outbox


async def opened(tmp_path: Path) -> tuple[Store, Unit]:
    """A store whose slot 1 is held, and an empty unit under its fence."""
    store = await Store.open(tmp_path / "s", "s", SystemClock(), [EFFECTS["sqlite"]])
    await store.tick("me", (), join=True)
    (share,) = await store.take("me", ["slot/1"])
    return store, Unit(share)


async def test_a_place_is_not_written_when_the_transaction_of_its_unit_failed(tmp_path: Path) -> None:
    store, unit = await opened(tmp_path)
    unit.statements.append(("insert into effects (key) values ('a')", ()))
    unit.place = "react", "tallies", 1, "log", 7
    large = Unit(unit.share)
    large.statements.append(("insert into effects (key) values (?)", ("x" * 1_000_000,)))
    connection = store._journal.connection
    pages = connection.pragma("page_count")
    connection.pragma("max_page_count", pages + 20)
    failed = await asyncio.gather(store.commit(unit), store.commit(large), return_exceptions=True)
    assert [type(each) for each in failed] == [StorageFull, StorageFull]
    await store.tick("me", ())
    assert await store.places("react", "log", 100) == {}, "a crash now would skip the message"
    connection.pragma("max_page_count", 1_000_000)
    await store.commit(unit)
    assert await store.places("react", "log", 100) == {("tallies", 1): 7}
    await store.close()


async def test_a_place_that_was_noted_before_a_transaction_failed_is_written_with_the_next(tmp_path: Path) -> None:
    store, unit = await opened(tmp_path)
    unit.statements.append(("insert into effects (key) values (?)", ("x" * 1_000_000,)))
    unit.place = "react", "tallies", 1, "log", 7
    connection = store._journal.connection
    connection.pragma("max_page_count", connection.pragma("page_count") + 20)
    store.move(unit.share, "react", "tallies", 1, "log", 6)
    with pytest.raises(StorageFull):
        await store.commit(unit)
    await store.flush()
    assert await store.places("react", "log", 100) == {("tallies", 1): 6}
    await store.close()


async def said(bus: Bus) -> list[int]:
    """Of which versions the commands are, in the order of their log."""
    facts = {each.id: each.version for each in (await bus.facts.read()).entries}
    return [facts[each.meta.causation] for each in (await bus.commands.read()).entries]


async def left_in_the_outbox(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three commands of one thing that could not be sent."""
    append = SQLiteLog.append

    def unsent(self: SQLiteLog, stream: str, entries: Any, **how: Any) -> Any:
        if entries[0].type == "Confirm":
            raise StorageFull("for a test")
        return append(self, stream, entries, **how)

    with monkeypatch.context() as patched:
        patched.setattr(SQLiteLog, "append", unsent)
        async with running(owner(), bus=url) as bus, running(reacting("one"), bus=url, drain=0.2):
            await add(bus, "a")
            await add(bus, "a")
            await add(bus, "a")
            await until(lambda: len(stored(url)) == 3)
    assert stored(url, "select count(*) from cauce_outbox") == [(3,)]


async def test_what_waits_behind_a_command_that_failed_waits_on_every_page_of_the_outbox(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await left_in_the_outbox(bus_url, monkeypatch)
    append, failing = SQLiteLog.append, [True]

    def fails_once(self: SQLiteLog, stream: str, entries: Any, **how: Any) -> Any:
        if entries[0].type == "Confirm" and failing:
            failing.clear()
            raise StorageFull("for a test")
        return append(self, stream, entries, **how)

    monkeypatch.setattr(SQLiteLog, "append", fails_once)
    monkeypatch.setattr("cauce.outbox._AT_ONCE", 1)
    async with running(reacting("one"), bus=bus_url) as bus:
        await until(lambda: stored(bus_url, "select count(*) from cauce_outbox") == [(0,)])
        assert await said(bus) == [1, 2, 3]


async def test_a_slot_that_is_gained_while_the_outbox_is_relayed_is_relayed_from_its_first(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await left_in_the_outbox(bus_url, monkeypatch)
    held: Any = _Running._slots
    relay, outbox = Outbox._relay_all, Store.outbox
    pages = list[int]()

    def gained(self: _Running) -> Any:
        return [] if len(pages) < 2 else held.fget(self)

    def page(self: Store, after: int, limit: int) -> Any:
        pages.append(after)
        return outbox(self, after, limit)

    async def relayed(self: Outbox) -> None:
        first = not pages
        await relay(self)
        if first:
            self._said.set()

    monkeypatch.setattr("cauce.outbox._AT_ONCE", 1)
    monkeypatch.setattr(_Running, "_slots", property(gained))
    monkeypatch.setattr(Outbox, "_relay_all", relayed)
    monkeypatch.setattr(Store, "outbox", page)
    async with running(reacting("one"), bus=bus_url) as bus:
        await until(lambda: stored(bus_url, "select count(*) from cauce_outbox") == [(0,)])
        assert await said(bus) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------- a full disk


FULL = """
import asyncio, logging, resource, sys
from cauce import Context, Service, running
from tests.chaos import EFFECTS, Added, Confirm

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
service = Service("reacting", schema=[EFFECTS["sqlite"], "alter table effects add column ballast blob"])

@service.on
async def react(event: Added, ctx: Context) -> Confirm:
    sql = "insert into effects (key, version, instance, ballast) values (?, ?, ?, zeroblob(100000))"
    ctx.store.execute(sql, (event.name, ctx.version, "one"))
    return Confirm(event.name, ctx.version)

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        limit(int(sys.argv[2]))
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            limit(resource.RLIM_INFINITY)

asyncio.run(main())
"""


def started(program: Program, text: str, *arguments: str) -> subprocess.Popen[str]:
    process = program(text, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("then", ["there is room", "it is killed"])
async def test_a_store_on_a_full_disk_waits_and_nothing_is_lost_or_done_twice(
    then: str, bus_url: str, program: Program
) -> None:
    async with running(owner(), bus=bus_url) as bus:
        process = started(program, FULL, bus_url, "2000000")
        assert process.stdout is not None
        told = await add(bus, *(f"thing{n % 7}" for n in range(60)))
        while "its store takes nothing now" not in await asyncio.to_thread(process.stdout.readline):
            pass
        assert len(stored(bus_url)) < 60
        if then == "it is killed":
            process.kill()
            process.wait()
            process = started(program, FULL, bus_url, "-1")
        else:
            assert process.stdin is not None
            process.stdin.write("room\n")
            process.stdin.flush()
        looked = 0
        for _ in range(60):
            page = await bus.facts.read(Filter(types=frozenset({"Confirmed"})), after=looked, limit=1, wait=60)
            looked = page.entries[0].position
        assert findings(await history(bus, bus_url, told)) == []
        process.kill()
        process.wait()


# --------------------------------------------------------------------------------------------- an older backup


def cli(*arguments: str) -> None:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


async def test_after_an_older_backup_was_restored_each_service_stops_loudly_and_names_the_cure(
    bus_url: str, tmp_path: Path
) -> None:
    backup = tmp_path / "backup.db"
    async with running(owner(), reacting("one"), copying(), bus=bus_url) as bus:
        await add(bus, "a", "b")
        await bus.settled()
        await bus.settled()
    cli("backup", str(backup), "--bus", bus_url)
    async with running(owner(), reacting("one"), copying(), bus=bus_url) as bus:
        await add(bus, "a", "c")
        await bus.settled()
        await bus.settled()
    cli("restore", str(backup), "--force", "--bus", bus_url)
    folder = folder_of(place(bus_url))
    for service, cure in (
        (owner(), r"decide tallies of tallies has read .*\(restored\?\): cauce reset tallies"),
        (reacting("one"), r"react of reacting has read .*\(restored\?\): cauce reset reacting"),
        (copying(), r"was built from log .*cauce reset copying"),
    ):
        with pytest.raises(Damaged, match=cure):
            async with running(service, bus=bus_url):
                pass
    for path in (folder / "tallies", folder / "reacting", folder / "copying" / "views"):
        for file in [*path.glob("store.db*"), *path.glob("*/*")]:
            file.unlink()
    async with running(owner(), reacting("two"), copying(), bus=bus_url) as bus:
        told = await add(bus, "a", "c")
        await bus.settled()
        await bus.settled()
        found = await history(bus, bus_url, told)
        rows = await bus.ask(Rows())
        found.copies = {where: {row[0]: Copy(row[1], row[2], row[1] + row[2]) for row in rows[where]} for where in rows}
        assert findings(found) == []
        assert sorted((effect.key, effect.instance) for effect in found.effects) == [
            ("a", "two"), ("a", "two"), ("b", "two"), ("c", "two"),
        ]  # fmt: skip


# -------------------------------------------------------------------------------------------------- taking over


async def test_what_is_being_given_away_at_the_end_is_let_go_of_too(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "s", "s", SystemClock())
    never = asyncio.Event()

    async def gain(shares: object) -> None: ...

    async def lose(shares: object) -> None:
        await never.wait()

    shares = Shares(store, "me", SystemClock(), gain, lose)
    await shares.start()
    shares.go()
    await store.tick("you", (), join=True)
    giving = asyncio.ensure_future(shares._step())
    async with asyncio.timeout(30):
        while len(shares.held) > 9:  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)
    giving.cancel()
    await asyncio.gather(giving, return_exceptions=True)
    await shares.stop()
    assert store._read("select name from cauce_claims where owner != ''", ()) == []
    await store.close()


async def test_who_cannot_take_a_name_keeps_what_he_holds(bus_url: str) -> None:
    async with connect(bus_url) as bus:
        leases = Leases(bus.facts, identity("tallies", bus.clock), bus.clock)
        await leases.take("tallies/1")
        await bus.facts.claim("tallies/2", identity("tallies", bus.clock))
        with pytest.raises(Held):
            await leases.take("tallies/2")
        await leases.release()
        assert list(leases.claims) == ["tallies/1"]
        await bus.facts.beat(leases.claims["tallies/1"])


async def test_an_owner_takes_its_own_name_again_when_it_could_not_let_go(bus_url: str) -> None:
    async with connect(bus_url) as bus:
        leases = Leases(bus.facts, identity("tallies", bus.clock), bus.clock)
        await leases.take("tallies/1")
        before = leases.claims.pop("tallies/1")
        await leases.take("tallies/1")
        assert leases.claims["tallies/1"].fence > before.fence


async def test_a_take_over_that_the_disk_interrupts_is_tried_again_until_it_succeeds(
    bus_url: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = started(program, "from tests.chaos import main; main()", "tallies", bus_url, "other")
    async with running(owner(), bus=bus_url) as bus:
        await until(lambda: len(set(stored(bus_url, HOLDERS, "tallies"))) == 2)
        failures = [StorageFull("for a test"), StorageFull("for a test")]

        async def full(*where: Any) -> int:
            if failures:
                raise failures.pop()
            return await written(*where)

        monkeypatch.setattr("cauce.commander.written", full)
        other.kill()
        other.wait()
        async with asyncio.timeout(60):
            while not await serves_all(bus):  # noqa: ASYNC110 - what is waited for tells nobody
                await asyncio.sleep(0.02)
        assert failures == []
        await add(bus, *(f"thing{n}" for n in range(64)))


async def test_a_store_that_somebody_holds_is_not_opened_and_he_is_named(
    bus_url: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.backends.sqlite.store._PATIENCE", 0.2)
    async with running(owner(), bus=bus_url):
        pass
    path = folder_of(place(bus_url)) / "tallies" / "store.db"
    holding = """
import apsw, sys
connection = apsw.Connection(sys.argv[1])
connection.execute("begin immediate")
print("ready", flush=True)
sys.stdin.read()
"""
    process = started(program, holding, str(path))
    with pytest.raises(
        Busy, match=rf"store.db is being written by process {process.pid} \(python.*\): wait, or stop it"
    ):
        async with running(owner(), bus=bus_url):
            pass


# ------------------------------------------------------------------------------------ between facts, record and mark


DYING = """
import os, sys
from cauce.records import Records
from tests import chaos

async def flush(self):
    os._exit(9)

def mark(self, slot, position):
    os._exit(9)

if sys.argv.pop() == "before the record":
    Records.flush = flush
else:
    Records._mark = mark
chaos.main()
"""


@pytest.mark.parametrize("when", ["before the record", "before the mark"])
async def test_an_owner_that_dies_after_the_facts_leaves_the_record_to_the_next(
    when: str, bus_url: str, program: Program
) -> None:
    process = started(program, DYING, "tallies", bus_url, "owner", when)
    async with connect(bus_url) as bus:
        with contextlib.suppress(CauceError):
            await bus.call(Add("a"), id="wish")
        assert process.wait(30) == 9
        assert len((await bus.facts.read(Filter("tallies/a"))).entries) == 1
        before = await bus.record(Tally, "a")
        assert before == (None if when == "before the record" else Tally("a", 1, 0))
    async with running(owner(), bus=bus_url) as bus:
        assert await bus.record(Tally, "a") == Tally("a", 1, 0), "written before anybody is answered"
        assert (await bus.call(Add("a"), id="wish")).version == 1, "what was accepted stays accepted"
        receipt = await bus.call(Add("a"))
        await bus.settled()
        (record,) = (await bus.records.read(Filter("tallies/a"))).entries
        assert (record.version, receipt.version) == (2, 2)
        marks = [await written(bus.records, "tallies", slot) for slot in range(16)]
        assert max(marks) == receipt.position


# -------------------------------------------------------------------------------------------------- a stopped owner


STALE = """
import contextlib, os, signal, time
from cauce import shares
from cauce.backends.sqlite.log import SQLiteLog
from cauce.backends.sqlite.writer import Writer
from tests import chaos

shares.TTL, shares.BEAT = 1.5, 0.3

append, appends, start, writers = SQLiteLog.append, [], Writer.start, []

async def starts(self):
    writers.append(self)
    await start(self)

def stops(self, stream, entries, **how):
    if stream != "tallies/late":
        return append(self, stream, entries, **how)
    if not appends:
        # What was decided is on its way to the log, and comes there when another has taken over. No thread is in turn:
        # who is stopped there lets nobody write.
        with contextlib.ExitStack() as still:
            for writer in writers:
                still.enter_context(writer._lock)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.05)
    appends.append(future := append(self, stream, entries, **how))
    future.add_done_callback(lambda done: print("append", type(done.exception()).__name__, flush=True))
    return future

SQLiteLog.append, Writer.start = stops, starts
chaos.main()
"""


async def test_an_owner_that_was_stopped_past_its_lease_is_fenced_with_all_that_it_decided_ahead(
    bus_url: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.shares.TTL", 1.5)
    monkeypatch.setattr("cauce.shares.BEAT", 0.3)
    stale = started(program, STALE, "tallies", bus_url, "stale")
    assert stale.stdout is not None
    async with connect(bus_url) as client:
        told = await add(client, "early", "early")
        calls = [asyncio.ensure_future(client.call(Add("late"), id=f"late{n}", timeout=60)) for n in range(5)]
        await until(lambda: state_of(stale) == "T")
        async with running(owner(), bus=bus_url) as bus:
            async with asyncio.timeout(60):
                while not await serves_all(bus):  # noqa: ASYNC110 - what is waited for tells nobody
                    await asyncio.sleep(0.02)
            told += await add(bus, "late")
            told += await add(bus, "late", "early")
            stale.send_signal(signal.SIGCONT)
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(each, CauceError) for each in results), results
            # It joins again, and is not asked for what it has lost.
            await until(lambda: len(set(stored(bus_url, HOLDERS, "tallies"))) == 2)
            told += await add(bus, "late")
            facts = (await bus.facts.read(Filter("tallies/late"))).entries
            assert [fact.version for fact in facts] == [1, 2, 3]
            assert {fact.meta.causation for fact in facts} == {each.id for each in told if each.key == "late"}
            await bus.settled()
            assert await bus.record(Tally, "late") == Tally("late", 3, 0)


async def serves_all(bus: Bus) -> bool:
    """Whether this process has taken all slots: who asks before may still ask the one that is stopped."""
    mine = [each for each in await bus.wire.instances() if each.pid == os.getpid()]
    return bool(mine) and len(mine[0].addresses) == 1 + SLOTS


def state_of(process: subprocess.Popen[str]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
