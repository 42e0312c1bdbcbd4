"""Views: built from events by statements that they queue, read as committed, rebuilt beside themselves."""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw
import pytest
from click.testing import CliRunner

from cauce import (
    Bus,
    Command,
    Context,
    Damaged,
    Domain,
    Event,
    Notice,
    Query,
    Receipt,
    Record,
    Refused,
    Service,
    Store,
    Unavailable,
    running,
)
from cauce.backends.sqlite.builds import FileLock, SQLiteShelf
from cauce.backends.sqlite.file import folder_of
from cauce.cli import main
from cauce.copies import Copies
from cauce.copying import views_of
from cauce.derived import Derived
from cauce.service import bind
from cauce.view import View
from shop import crm, users
from shop.crm import WhoHas
from shop.users import ChangeEmail, RegisterUser

ROOT = Path(__file__).parent.parent

things = Domain("things", key="name")
asked = Domain("asked")


class Thing(Record, domain=things):
    name: str
    n: int


class Grown(Event, domain=things):
    name: str
    n: int


class Shrunk(Event, domain=things):
    name: str
    n: int


class Grow(Command, domain=things):
    name: str
    n: int = 1


class Shrink(Command, domain=things):
    name: str


class Rows(Query[list[tuple[str, int]]], domain=asked):
    view: str = "sums"


owner = Service("things", owns=things)


@owner.decide
def grow(thing: Thing | None, command: Grow) -> Grown:
    return Grown(command.name, command.n)


@owner.decide
def shrink(thing: Thing | None, command: Shrink) -> Shrunk:
    return Shrunk(command.name, 1)


@owner.evolve
def grown(thing: Thing | None, event: Grown) -> Thing:
    return Thing(event.name, event.n)


SUMS = "create table sums (name text primary key, n integer not null)"
ADD = "insert into sums values (?, ?) on conflict (name) do update set n = sums.n + excluded.n"


def add(event: Grown, db: Store) -> None:
    db.execute(ADD, (event.name, event.n))


def sums(function: Callable[..., Any] = add, schema: Any = SUMS, name: str = "sums") -> Service:
    """A service with one view, that may be asked for its rows."""
    service = Service("viewer", owns=asked)
    service.view(name, schema=schema)(function)

    @service.answer
    async def rows(query: Rows, ctx: Context) -> list[tuple[str, int]]:
        found = await ctx.view(query.view).fetch("select * from sums order by name")
        return [(name, n) for name, n in found]

    return service


def folder(url: str, name: str = "sums", service: str = "viewer") -> Path:
    return folder_of(Path(url.removeprefix("sqlite:///"))) / service / "views" / name


def live(url: str) -> int:
    return int((folder(url) / "live").read_text())


def place(url: str, number: int = 0) -> int:
    connection = apsw.Connection(str(folder(url) / f"{number or live(url)}.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        ((position,),) = connection.execute("select position from cauce_place").fetchall()
    finally:
        connection.close()
    assert isinstance(position, int)
    return position


async def filled(url: str, many: int = 5, *services: Service) -> None:
    async with running(owner, *services, bus=url) as bus:
        await asyncio.gather(*(bus.call(Grow(f"t{n}", n)) for n in range(many)))
        await bus.settled()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------ what is refused


def two_parameters_of_events(event: Grown, other: Grown) -> None: ...
def no_store(event: Grown) -> None: ...
def store_first(db: Store, event: Grown) -> None: ...
def a_command(command: Grow, db: Store) -> None: ...
def a_record(thing: Thing, db: Store) -> None: ...
def a_notice(notice: Notice[Grown], db: Store) -> None: ...
def with_context(event: Grown, db: Store, ctx: Context) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (two_parameters_of_events, "two_parameters_of_events: a view function takes .event, db., .*Store"),
        (no_store, "no_store: a view function takes .event, db."),
        (store_first, "store_first: a view function takes .event, db."),
        (with_context, "with_context: a view function takes .event, db."),
        (a_command, "a_command: parameter command is Grow: annotate it with an event"),
        (a_record, "a_record: parameter thing is Thing: annotate it with an event"),
        (a_notice, "a_notice: parameter notice is Notice: annotate it with an event"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_function_that_cannot_build_a_view_is_refused_before_anything_is_made(
    bus_url: str, function: Callable[..., Any], words: str
) -> None:
    with pytest.raises(Refused, match=words):
        async with running(sums(function), bus=bus_url):
            pass
    assert not Path(bus_url.removeprefix("sqlite:///")).exists()


def test_a_second_schema_of_a_view_is_refused_where_it_is_written() -> None:
    service = Service("viewer")
    service.view("sums", schema=SUMS)(add)
    service.view("sums", schema=SUMS)
    service.view("sums")
    with pytest.raises(Refused, match="viewer: view 'sums' has two schemas"):
        service.view("sums", schema="create table other (x)")
    with pytest.raises(Refused, match="domain name 'No Name'"):
        service.view("No Name", schema=SUMS)


def test_a_view_without_a_schema_is_refused() -> None:
    service = Service("viewer")
    service.view("sums")(add)
    with pytest.raises(Refused, match="viewer: view 'sums' has no schema"):
        bind(service)


def test_a_view_that_nothing_builds_is_refused() -> None:
    service = Service("viewer")
    service.view("sums", schema=SUMS)
    with pytest.raises(Refused, match="viewer: view 'sums' has no function"):
        bind(service)


async def test_a_schema_that_sqlite_does_not_take_is_refused_before_anything_is_made(bus_url: str) -> None:
    with pytest.raises(Refused, match='view sums of viewer: its schema is refused by SQLite: near "tabel"'):
        async with running(sums(schema="create tabel x (y)"), bus=bus_url):
            pass
    assert not folder(bus_url).exists()


async def test_reading_a_view_that_is_not_there_names_those_that_are(bus_url: str) -> None:
    async with running(owner, sums(), bus=bus_url) as bus:
        with pytest.raises(Refused, match="service 'viewer' has no view 'other', only sums"):
            await bus.ask(Rows("other"))


# --------------------------------------------------------------------------------------------------------- building


async def test_the_crm_of_the_shop_sees_what_the_web_has_changed(each_bus: str) -> None:
    async with running(users.service, crm.service, bus=each_bus) as bus:
        await bus.call(RegisterUser("7", "Eve", "eve@example.org"))
        receipt = await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
        assert await bus.ask(WhoHas("example.org"), after=receipt) == ["42", "7"]
        receipt = await bus.call(ChangeEmail("42", "ana@corp.example"), by="crm:joe")
        assert await bus.ask(WhoHas("corp.example"), after=receipt) == ["42"]
        assert await bus.ask(WhoHas("example.org")) == ["7"]
    async with running(crm.service, bus=each_bus) as bus:
        assert await bus.ask(WhoHas("corp.example")) == ["42"]


async def test_one_sees_ones_own_write_many_times_in_a_row(backend: str, each_bus: str) -> None:
    async with running(users.service, crm.service, bus=each_bus) as bus:
        await bus.call(RegisterUser("42", "Ana", "ana@start.example"))
        for n in range(200 if backend == "sqlite" else 40):
            receipt = await bus.call(ChangeEmail("42", f"ana@corp{n}.example"))
            assert await bus.ask(WhoHas(f"corp{n}.example"), after=receipt) == ["42"], n


async def test_a_receipt_of_what_the_view_does_not_want_is_passed_soon(each_bus: str) -> None:
    async with running(owner, sums(), bus=each_bus) as bus:
        for n in range(20):
            await bus.call(Grow("a", 1))
            receipt = await bus.call(Shrink("a"))
            assert await bus.ask(Rows(), after=receipt, timeout=4) == [("a", n + 1)]


async def test_several_functions_build_one_view_from_several_events_in_the_order_of_the_log(each_bus: str) -> None:
    service = sums()

    @service.view("sums")
    def take(event: Shrunk, db: Store) -> None:
        db.execute("update sums set n = n * 2 where name = ?", (event.name,))
        db.execute("update sums set n = n - 1 where name = ?", (event.name,))

    async with running(owner, service, bus=each_bus) as bus:
        n, receipt = 0, None
        for step in range(20):
            await bus.call(Grow("a", step))
            receipt = await bus.call(Shrink("a"))
            n = (n + step) * 2 - 1
        assert await bus.ask(Rows(), after=receipt) == [("a", n)]


async def test_a_view_of_two_domains_that_is_rebuilt_gets_of_each_only_what_it_wants(
    bus_url: str, tmp_path: Path
) -> None:
    pets = Domain("pets", key="name")

    class Pet(Record, domain=pets):
        name: str

    class PetGrown(Event, domain=pets, name="Grown"):
        name: str

    class Fed(Event, domain=pets):
        name: str

    class Feed(Command, domain=pets):
        name: str

    service = Service("pets", owns=pets)

    @service.decide
    def feed(pet: Pet | None, command: Feed) -> list[Event]:
        return [PetGrown(command.name), Fed(command.name)]

    @service.evolve
    def changed(pet: Pet | None, event: PetGrown | Fed) -> Pet:
        return Pet(event.name)

    seen = list[str]()

    def both(event: Grown | Fed, db: Store) -> None:
        seen.append(event.name)

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(Grow("a"))
        await bus.call(Feed("b"))
        view = View("viewer", "sums", SUMS, [(both, [Grown, Fed])])
        derived = Derived(view, "viewer", bus.facts, SQLiteShelf(tmp_path), bus.clock)
        await derived.rebuild(lambda looked, head, entries: None)
        await derived.close()
        assert seen == ["a", "b"]


async def test_a_view_is_the_same_however_often_it_is_built(bus_url: str) -> None:
    async with running(owner, sums(), bus=bus_url) as bus:
        await asyncio.gather(*(bus.call(Grow(f"t{n % 50}", n)) for n in range(1000)))
        await bus.settled()
        once = await bus.ask(Rows())
    assert sum(n for _, n in once) == sum(range(1000))
    for name in os.listdir(folder(bus_url)):
        (folder(bus_url) / name).unlink()
    async with running(owner, sums(), bus=bus_url) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == once


async def test_an_async_view_function_fetches_what_was_committed_before(bus_url: str) -> None:
    seen = list[int]()

    async def add(event: Grown, db: Store) -> None:
        rows = await db.fetch("select coalesce(max(n), 0) from sums")
        seen.append(rows[0][0])
        db.execute("insert or replace into sums values (?, ?)", (event.name, event.n))

    async with running(owner, sums(add), bus=bus_url) as bus:
        for n in range(1, 6):
            receipt = await bus.call(Grow("a", n))
            await bus.ask(Rows(), after=receipt)
        assert await bus.ask(Rows()) == [("a", 5)]
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("many", [1, 5])
@pytest.mark.parametrize("one_by_one", [False, True])
async def test_what_follows_a_statement_with_rows_is_run_too(bus_url: str, *, one_by_one: bool, many: int) -> None:
    def bad(event: Grown, db: Store) -> None:
        if event.name == "bad":
            raise ValueError("bad")
        sql = "insert into sums values (?, 0) returning n; update sums set n = n + 1 where name = ?"
        db.execute(sql, (event.name, event.name))

    await filled(bus_url, many)
    if one_by_one:
        async with running(owner, bus=bus_url) as bus:
            await bus.call(Grow("bad"))
    async with running(owner, sums(bad), bus=bus_url) as bus:
        with suppress(Unavailable):
            await bus.settled()
    rows = apsw.Connection(str(folder(bus_url) / "1.db")).execute("select n from sums").fetchall()
    assert rows == [(1,)] * many


async def test_a_plain_view_function_that_fetches_is_told_to_be_async(bus_url: str) -> None:
    def fetches(event: Grown, db: Store) -> None:
        coroutine = db.fetch("select 1")
        coroutine.send(None)

    async with running(owner, sums(fetches), bus=bus_url) as bus:
        receipt = await bus.call(Grow("a"))
        with pytest.raises(Unavailable, match="write it with async def"):
            await bus.ask(Rows(), after=receipt)


async def test_settled_waits_for_views(each_bus: str) -> None:
    gate = threading.Event()

    def slow(event: Grown, db: Store) -> None:
        gate.wait(20)
        add(event, db)

    async with running(owner, sums(slow), bus=each_bus) as bus:
        await bus.call(Grow("a", 3))
        with pytest.raises(TimeoutError):
            await bus.settled(0.2)
        gate.set()
        await bus.settled()
        assert await bus.ask(Rows()) == [("a", 3)]


async def test_a_batch_that_is_written_while_the_service_stops_is_written_once(each_bus: str) -> None:
    gate, entered = threading.Event(), threading.Event()

    def slow(event: Grown, db: Store) -> None:
        entered.set()
        gate.wait(20)
        add(event, db)

    async with running(owner, sums(slow), bus=each_bus) as bus:
        await bus.call(Grow("a", 3))
        assert await asyncio.to_thread(entered.wait, 20)
        await bus.call(Grow("a", 4))
        asyncio.get_running_loop().call_later(0.3, gate.set)
    async with running(owner, sums(), bus=each_bus) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == [("a", 7)]


async def test_a_view_that_hangs_is_left_behind_and_catches_up_alone(
    bus_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cauce.derived._BATCH", 10)
    monkeypatch.setattr("cauce.copies._ROOM", 0.05)
    gate, entered = asyncio.Event(), asyncio.Event()

    async def hangs(event: Grown, db: Store) -> None:
        entered.set()
        await gate.wait()
        db.execute("insert into sums values (?, ?)", (f"{event.name} {event.n}", event.n))

    service, seen = sums(hangs), list[str]()

    @service.view("other", schema="create table other (name text)")
    def other(event: Grown, db: Store) -> None:
        seen.append(event.name)

    # What was there before, and what comes while it hangs.
    await filled(bus_url, 50)
    async with running(owner, service, bus=bus_url) as bus:
        await until(lambda: len(seen) == 50)
        assert entered.is_set()
        await asyncio.gather(*(bus.call(Grow("a", n)) for n in range(50)))
        await until(lambda: len(seen) == 100)
        gate.set()
        await bus.settled()
        copies: Any = bus.copies["viewer"]
        rows = await copies.view("sums").fetch("select n from sums where name like 'a%' order by rowid")
        assert rows == [(n,) for n in range(50)]
        # It goes with the others again.
        receipt = await bus.call(Grow("b", 7))
        found = await bus.ask(Rows(), after=receipt)
        assert ("b 7", 7) in found
        assert len(found) == 101
    assert any("the others go on without it" in record.getMessage() for record in caplog.records)


async def test_a_view_that_hangs_does_not_keep_its_service_from_stopping(
    bus_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cauce.derived._LAST", 0.1)
    entered = asyncio.Event()

    async def hangs(event: Grown, db: Store) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(20):
        async with running(owner, sums(hangs), bus=bus_url) as bus:
            await bus.call(Grow("a", 3))
            await entered.wait()
    words = "view sums of viewer: what it read last is read again: it is not done within 0.1 s"
    assert [record.getMessage() for record in caplog.records if "read again" in record.getMessage()] == [words]
    async with running(owner, sums(), bus=bus_url) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == [("a", 3)]


async def test_a_handler_waits_until_a_view_has_passed_a_receipt(each_bus: str) -> None:
    service, seen = sums(), list[Any]()

    @service.on
    async def look(event: Shrunk, ctx: Context) -> None:
        receipt = await ctx.call(Grow("b", 7))
        assert isinstance(receipt, Receipt)
        await ctx.view("sums").wait(receipt)
        seen.append(await ctx.view("sums").fetch("select n from sums where name = ?", ["b"]))
        seen.append(await ctx.ask(Rows(), after=receipt))

    async with running(owner, service, bus=each_bus) as bus:
        await bus.call(Shrink("a"))
        await bus.settled()
    assert seen == [[(7,)], [("b", 7)]]


async def test_what_is_read_cannot_be_written_and_what_is_wrong_names_the_view(bus_url: str) -> None:
    service, said = sums(), dict[str, str]()

    @service.on
    async def look(event: Grown, ctx: Context) -> None:
        for sql, params in (
            ("delete from sums", ()),
            ("selec 1", ()),
            ("select ?", ()),
            ("select ?", (object(),)),
        ):
            try:
                await ctx.view("sums").fetch(sql, params)
            except Refused as error:
                said[f"{sql} {len(params)}"] = str(error)

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
    assert len(said) == 4
    assert all("view sums of viewer" in words for words in said.values()), said


async def test_the_place_is_written_when_the_service_stops_even_if_nothing_was_wanted(bus_url: str) -> None:
    await filled(bus_url, 3, sums())
    async with running(owner, sums(), bus=bus_url) as bus:
        for _ in range(5):
            await bus.call(Shrink("a"))
        await bus.settled()
        head = await bus.facts.head()
    assert place(bus_url) == head


# ------------------------------------------------------------------------------------------------------------ faults


async def test_a_statement_that_fails_stops_its_view_alone_and_says_which_and_where(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(event: Grown, db: Store) -> None:
        add(event, db)
        if event.name == "bad":
            db.execute("insert into nowhere values (?)", (event.n,))

    service, seen = sums(bad), list[str]()

    @service.view("other", schema="create table other (name text)")
    def other(event: Grown, db: Store) -> None:
        db.execute("insert into other values (?)", (event.name,))

    @service.on
    async def on(event: Grown, ctx: Context) -> None:
        await ctx.bus.clock.sleep(0)
        seen.append(event.name)

    class Others(Query[int], domain=asked):
        pass

    @service.answer
    async def others(query: Others, ctx: Context) -> int:
        ((count,),) = await ctx.view("other").fetch("select count(*) from other")
        return int(count)

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(Grow("a", 1))
        receipt = await bus.call(Grow("bad"))
        await bus.call(Grow("c"))
        words = rf"view sums of viewer.* bad failed at position {receipt.position} \(things/bad, Grown\): .*no such table: nowhere"
        with pytest.raises(Unavailable, match=words):
            await bus.ask(Rows(), after=receipt)
        with pytest.raises(Unavailable, match=words):
            await bus.ask(Rows())
        await until(lambda: seen == ["a", "bad", "c"])
        async with asyncio.timeout(10):
            while await bus.ask(Others()) < 3:  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.01)
        assert not bus.failed.done()
    assert any(
        record.levelno == logging.CRITICAL and re.search(words, record.getMessage()) for record in caplog.records
    )
    # What stands before it is committed; mended, it goes on from there.
    assert place(bus_url) == receipt.position - 1
    async with running(owner, sums(), bus=bus_url) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == [("a", 1), ("bad", 1), ("c", 1)]


async def test_a_function_that_raises_stops_its_view_and_what_stood_before_stays(bus_url: str) -> None:
    def bad(event: Grown, db: Store) -> None:
        add(event, db)
        if event.name == "t700":
            raise KeyError("seven hundred")

    await filled(bus_url, 1000)
    async with running(owner, sums(bad), bus=bus_url) as bus:
        with pytest.raises(Unavailable, match=r"bad failed at position \d+ \(things/t700, Grown\): KeyError"):
            await bus.settled()
        entry = (await bus.facts.read(after=place(bus_url), limit=1)).entries[0]
        assert entry.key == "t700"


@pytest.mark.parametrize("sql", ["commit", "begin", "savepoint x", "attach ':memory:' as x", "pragma user_version = 3"])
async def test_a_statement_that_would_break_the_transaction_is_refused_and_leaves_nothing(
    bus_url: str, sql: str
) -> None:
    def bad(event: Grown, db: Store) -> None:
        add(event, db)
        db.execute(sql)

    async with running(owner, sums(bad), bus=bus_url) as bus:
        receipt = await bus.call(Grow("a"))
        with pytest.raises(Unavailable, match="may not begin or end a transaction"):
            await bus.ask(Rows(), after=receipt)
    assert apsw.Connection(str(folder(bus_url) / "1.db")).execute("select * from sums").fetchall() == []


async def test_a_full_disk_is_waited_for_and_nothing_is_lost(bus_url: str) -> None:
    def large(event: Grown, db: Store) -> None:
        db.execute(ADD, (event.name * 1000, event.n))

    async with running(owner, sums(large), bus=bus_url) as bus:
        connection = private(bus)._build._connection
        connection.execute("pragma max_page_count = 20")
        await asyncio.gather(*(bus.call(Grow(f"t{n}", n)) for n in range(100)))
        with pytest.raises(TimeoutError):
            await bus.settled(0.4)
        connection.execute("pragma max_page_count = 1000000")
        await bus.settled()
        assert sum(n for _, n in await bus.ask(Rows())) == sum(range(100))


def private(bus: Bus) -> Any:
    """The inside of the one view."""
    copies: Any = bus.copies["viewer"]
    return copies._views["sums"]


def remove(path: Path, url: str) -> None:
    path.unlink()


def truncate(path: Path, url: str) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, url: str) -> None:
    os.truncate(path, 0)


def garbage(path: Path, url: str) -> None:
    path.write_bytes(b"garbage " * 1000)


def no_note(path: Path, url: str) -> None:
    (path.parent / "live").unlink()


def broken_note(path: Path, url: str) -> None:
    (path.parent / "live").write_text("../1")


@pytest.mark.parametrize(
    "harm", [remove, truncate, empty, garbage, no_note, broken_note], ids=lambda each: each.__name__
)
async def test_a_file_that_is_missing_or_unreadable_is_built_anew_with_a_warning(
    bus_url: str, caplog: pytest.LogCaptureFixture, harm: Callable[[Path, str], None]
) -> None:
    await filled(bus_url, 200, sums())
    harm(folder(bus_url) / "1.db", bus_url)
    async with running(owner, sums(), bus=bus_url) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == sorted((f"t{n}", n) for n in range(200))
    assert "built anew" in caplog.text
    assert live(bus_url) == 2


async def test_a_file_that_breaks_while_it_is_used_is_built_anew(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(owner, sums(), bus=bus_url) as bus:
        await asyncio.gather(*(bus.call(Grow(f"t{n}", n)) for n in range(500)))
        await bus.settled()
        private(bus)._build._connection.execute("pragma wal_checkpoint(truncate)")
        path = folder(bus_url) / "1.db"
        os.truncate(path, 4096 * 2)
        private(bus)._build._connection.execute("pragma shrink_memory")
        receipt = await bus.call(Grow("t1", 1000))
        await bus.ask(Rows(), after=receipt)
        rows = await bus.ask(Rows())
    assert dict(rows) == {f"t{n}": n for n in range(500)} | {"t1": 1001}


async def test_a_file_from_another_log_stops_the_service_loudly_until_it_is_rebuilt(
    bus_url: str, tmp_path: Path
) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    await filled(bus_url, 3, sums())
    await filled(other, 3, sums())
    (folder(other) / "1.db").replace(folder(bus_url) / "1.db")
    with pytest.raises(Damaged, match=r"1\.db was built from log .*cauce reset viewer") as raised:
        async with running(owner, sums(), bus=bus_url):
            pass
    assert str(folder(bus_url) / "1.db") in str(raised.value)
    result = rebuild(bus_url, tmp_path)
    assert result["entries"] == 3
    async with running(owner, sums(), bus=bus_url) as bus:
        assert await bus.ask(Rows()) == [("t0", 0), ("t1", 1), ("t2", 2)]


async def test_a_file_ahead_of_its_log_stops_the_service_loudly(bus_url: str) -> None:
    await filled(bus_url, 3, sums())
    connection = apsw.Connection(str(folder(bus_url) / "1.db"))
    connection.execute("update cauce_place set position = 1000")
    connection.close()
    with pytest.raises(
        Damaged, match=r"1\.db was built up to position 1000, the log ends at 8: entries are lost.*cauce reset viewer"
    ):
        async with running(owner, sums(), bus=bus_url):
            pass


# -------------------------------------------------------------------------------------------------- a changed schema


async def test_a_changed_schema_builds_a_new_file_while_the_old_one_stays_live(bus_url: str) -> None:
    gate = threading.Event()
    changed = SUMS.replace("not null", "not null default 0")

    def slow(event: Grown, db: Store) -> None:
        gate.wait(20)
        db.execute(ADD, (event.name, event.n * 10))

    await filled(bus_url, 3, sums())
    async with running(owner, sums(slow, changed), bus=bus_url) as bus:
        assert await bus.ask(Rows()) == [("t0", 0), ("t1", 1), ("t2", 2)]
        receipt = await bus.call(Grow("t1", 5))
        assert live(bus_url) == 1
        gate.set()
        assert await bus.ask(Rows(), after=receipt) == [("t0", 0), ("t1", 60), ("t2", 20)]
        assert live(bus_url) == 2
        assert not (folder(bus_url) / "1.db").exists()


async def test_a_view_that_wants_more_events_than_before_is_built_anew(bus_url: str) -> None:
    async with running(owner, sums(), bus=bus_url) as bus:
        await bus.call(Grow("a", 5))
        await bus.call(Shrink("a"))
        await bus.settled()
    service = sums()

    @service.view("sums")
    def take(event: Shrunk, db: Store) -> None:
        db.execute("update sums set n = n - ? where name = ?", (event.n, event.name))

    async with running(owner, service, bus=bus_url) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == [("a", 4)]


# ----------------------------------------------------------------------------------------------------------- rebuild

MODULE = """
import os, time
from cauce import Domain, Service, Store
from test_views import ADD, SUMS, Grown, asked

service = Service("viewer")
others = Service("others")

@service.view("sums", schema=SUMS)
def add(event: Grown, db: Store) -> None:
    if os.environ.get("SLOW"):
        time.sleep(0.002)
    db.execute(ADD, (event.name, event.n))

@service.on
def never(event: Grown) -> None:
    raise SystemExit("a rebuild runs no reaction")
"""


def started(url: str, tmp_path: Path, *, slow: bool = False, name: str = "sums") -> subprocess.Popen[str]:
    (tmp_path / "viewmodule.py").write_text(MODULE)
    path = os.pathsep.join((str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, "-c", "from cauce.cli import main; main()", "rebuild", "viewmodule", name, "--json"],
        env=os.environ | {"PYTHONPATH": path, "CAUCE_BUS": url} | ({"SLOW": "1"} if slow else {}),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip


def rebuild(url: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    process = started(url, tmp_path, **more)
    out, _ = process.communicate(timeout=60)
    found: dict[str, Any] = json.loads(out)
    return found | {"code": process.returncode}


async def test_a_rebuild_that_is_killed_goes_on_where_it_was(bus_url: str, tmp_path: Path) -> None:
    many = 2000
    await filled(bus_url, many, sums())
    for round in range(2):
        process = started(bus_url, tmp_path, slow=True)
        before = 0 if round == 0 else place(bus_url, 2)
        try:
            deadline = time.monotonic() + 30
            while not ((folder(bus_url) / "2.db").exists() and reached(bus_url, 2) > before):
                assert process.poll() is None
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert live(bus_url) == 1
    done = place(bus_url, 2)
    assert 0 < done < many
    result = rebuild(bus_url, tmp_path)
    assert result["code"] == 0
    assert result["entries"] == many + 5 - done
    assert live(bus_url) == 2
    async with running(owner, sums(), bus=bus_url) as bus:
        assert await bus.ask(Rows()) == sorted((f"t{n}", n) for n in range(many))


def reached(url: str, number: int) -> int:
    """How far a build is; 0 while it is being made."""
    try:
        return place(url, number)
    except apsw.Error:
        return 0


async def test_the_running_service_goes_on_with_what_was_rebuilt_beside_it(bus_url: str, tmp_path: Path) -> None:
    async with running(owner, sums(), bus=bus_url) as bus:
        for n in range(300):
            await bus.call(Grow(f"t{n % 10}", n))
        process = started(bus_url, tmp_path)
        written = 300
        while process.poll() is None:
            receipt = await bus.call(Grow(f"t{written % 10}", written))
            written += 1
            assert sum(n for _, n in await bus.ask(Rows(), after=receipt)) == sum(range(written))
        assert process.wait() == 0
        process.communicate()
        assert live(bus_url) == 2
        for _ in range(20):
            receipt = await bus.call(Grow("t0", written))
            written += 1
            assert sum(n for _, n in await bus.ask(Rows(), after=receipt)) == sum(range(written))
            assert place(bus_url) >= receipt.position
        assert sorted(path.name for path in folder(bus_url).glob("*.db")) == ["2.db"]


async def test_a_switch_is_noticed_where_nothing_happens_any_more(bus_url: str, tmp_path: Path) -> None:
    async with running(owner, sums(), bus=bus_url) as bus:
        await bus.call(Grow("a", 1))
        await bus.settled()
        assert (await asyncio.to_thread(rebuild, bus_url, tmp_path))["code"] == 0
        await until(lambda: private(bus)._build.number == 2)
        assert await bus.ask(Rows()) == [("a", 1)]


async def test_one_build_at_a_time(bus_url: str, tmp_path: Path) -> None:
    await filled(bus_url, 3, sums())
    lock = FileLock(folder(bus_url) / "build.lock")
    assert await lock.take()
    result = await asyncio.to_thread(rebuild, bus_url, tmp_path)
    await lock.release()
    assert (result["code"], result["error"]) == (4, "Busy")
    assert "view sums of viewer is being built" in result["message"]


async def test_a_rebuild_of_what_is_not_there_names_what_is(bus_url: str, tmp_path: Path) -> None:
    await filled(bus_url, 1)
    result = rebuild(bus_url, tmp_path, name="nothing")
    assert (result["code"], result["message"]) == (1, "there is no view or replica 'nothing' here, only: viewer sums")


async def test_the_views_of_the_shop_are_rebuilt_by_the_name_of_module_and_service(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(users.service, crm.service, bus=bus_url) as bus:
        await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
        await bus.settled()
    monkeypatch.setenv("CAUCE_BUS", bus_url)
    for name in ("shop.crm:service", "shop.crm", "shop"):
        result = await asyncio.to_thread(CliRunner().invoke, main, ["rebuild", name, "directory"])
        assert (result.exit_code, result.output[:39]) == (
            0,
            "view directory of crm: built from 1 eve",
        ), name


# ------------------------------------------------------------------------------------------------- leader and others


async def test_one_process_feeds_and_the_others_read_and_take_over(bus_url: str) -> None:
    service = sums()
    shelf_at = folder(bus_url).parent

    async with running(owner, bus=bus_url) as bus:
        parts = bind(service)

        def copies() -> Copies:
            each = SQLiteShelf(shelf_at)
            return Copies("viewer", each, views_of(service, parts, each), [], bus.facts, bus.records, bus.clock)

        def fail(error: BaseException) -> None:
            raise error

        one, two = copies(), copies()
        await one.start(fail)
        await two.start(fail)
        tasks = [asyncio.create_task(each.run()) for each in (one, two)]
        try:
            for n in range(20):
                receipt = await bus.call(Grow("a", 1) if n % 2 else Shrink("a"))
                for each in (one, two):
                    await each.view("sums").wait(receipt)
                    rows = await each.view("sums").fetch("select n from sums")
                    assert rows == ([(n // 2 + n % 2,)] if n else [])
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            await one.close()
            receipt = await bus.call(Grow("b", 5))
            await two.view("sums").wait(receipt)
            assert await two.view("sums").fetch("select n from sums where name = 'b'") == [(5,)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await two.close()
