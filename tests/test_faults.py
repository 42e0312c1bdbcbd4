"""Crashes at the worst moment, full disks, stopped owners and restored backups, with the services of the chaos test."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
from click.testing import CliRunner

from cauce import Bus, CauceError, Damaged, NoAnswer, StorageFull, connect, running, runtime
from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.log import SQLiteLog
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.log import Filter
from cauce.records import written
from cauce.runtime import _Running
from cauce.store import Store, Unit
from tests.chaos import EFFECTS, Add, Rows, Tally, copying, owner, reacting
from tests.history import Copy, Effect, Fact, History, Said, Told, findings

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
    store = await Store.open(tmp_path / "s", "s", SystemClock(), [EFFECTS])
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
    assert store.places("react", "log", 100) == {}, "a crash now would skip the message"
    connection.pragma("max_page_count", 1_000_000)
    await store.commit(unit)
    assert store.places("react", "log", 100) == {("tallies", 1): 7}
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
    assert store.places("react", "log", 100) == {("tallies", 1): 6}
    await store.close()


async def test_a_number_of_the_outbox_is_never_used_again(tmp_path: Path) -> None:
    store, unit = await opened(tmp_path)
    numbers = []
    for _ in range(3):
        unit.said = [("react", 1, b"first"), ("react", 1, b"second")]
        await store.commit(unit)
        rows = store.outbox(0, 10)
        numbers += [number for number, _, _, _ in rows]
        await store.relayed([number for number, _, _, _ in rows])
    assert numbers == sorted(set(numbers)), "a relay under way would take a later one for an earlier one"
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
    monkeypatch.setattr(runtime, "_AT_ONCE", 1)
    async with running(reacting("one"), bus=bus_url) as bus:
        await until(lambda: stored(bus_url, "select count(*) from cauce_outbox") == [(0,)])
        assert await said(bus) == [1, 2, 3]


async def test_a_slot_that_is_gained_while_the_outbox_is_relayed_is_relayed_from_its_first(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await left_in_the_outbox(bus_url, monkeypatch)
    held, relay, outbox = _Running._slots.fget, _Running._relay_all, Store.outbox
    pages = list[int]()

    def gained(self: _Running) -> list[int]:
        assert held is not None
        return [] if len(pages) < 2 else held(self)

    def page(self: Store, after: int, limit: int) -> Any:
        pages.append(after)
        return outbox(self, after, limit)

    async def relayed(self: _Running) -> bool:
        first = not pages
        return await relay(self) and not first

    monkeypatch.setattr(runtime, "_AT_ONCE", 1)
    monkeypatch.setattr(_Running, "_slots", property(gained))
    monkeypatch.setattr(_Running, "_relay_all", relayed)
    monkeypatch.setattr(Store, "outbox", page)
    async with running(reacting("one"), bus=bus_url) as bus:
        await until(lambda: stored(bus_url, "select count(*) from cauce_outbox") == [(0,)])
        assert await said(bus) == [1, 2, 3]
