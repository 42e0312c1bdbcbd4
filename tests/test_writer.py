"""The writer on SQLite: where a write is done, what shares a transaction, and the zeros ahead in the WAL."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from cauce.backends import sqlite
from cauce.backends.sqlite.runway import Runway
from cauce.backends.sqlite.table import Table
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Busy, Conflict

Program = Callable[..., subprocess.Popen[str]]

CALM = 20

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("begin immediate")
print("held", flush=True)
sys.stdin.read()
"""


def fact(stream: str = "things/1") -> Entry:
    return sealed(stream, "Counted", SystemClock().id(), Meta(1), b"{}")


class Flushes(SystemClock):
    """A clock by which every flush takes so many seconds; 0: the real one again."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self._now = seconds, 0.0

    def monotonic(self) -> float:
        if not self.seconds:
            return super().monotonic()
        self._now += self.seconds
        return self._now


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which thread wrote each transaction of the facts."""
    found: list[str] = []
    flush = Table.flush

    def seen(self: Table) -> None:
        if self.name == "facts":
            found.append("loop" if threading.current_thread() is threading.main_thread() else "thread")
        flush(self)

    monkeypatch.setattr(Table, "flush", seen)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.db"


# -------------------------------------------------------------------------------------------------- lone writes


async def test_a_write_that_is_alone_is_made_on_the_loop_where_flushes_are_short(path: Path, where: list[str]) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for n in range(CALM + 10):
        assert (await bus.facts.append("things/1", [fact()])).version == n + 1
    assert where[:10] == ["thread"] * 10
    assert where[CALM:] == ["loop"] * 10
    with pytest.raises(Conflict):
        await bus.facts.append("things/1", [fact()], expect=1)
    assert (await bus.facts.append("things/1", [fact()])).version == CALM + 11, "a refusal leaves nothing behind"
    assert [entry.version for entry in (await bus.facts.read()).entries] == list(range(1, CALM + 12))
    await bus.close()


async def test_what_is_said_in_one_round_of_the_loop_is_one_transaction_of_the_thread(
    path: Path, where: list[str]
) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(CALM):
        await bus.facts.append("things/1", [fact()])
    where.clear()
    await asyncio.gather(*(bus.facts.append(f"things/{n}", [fact(f"things/{n}")]) for n in range(50)))
    assert where == ["thread"]
    await bus.close()


async def test_a_disk_with_long_flushes_never_stops_the_loop(path: Path, where: list[str]) -> None:
    bus = await sqlite.open(path, clock=Flushes(0.002), patience=60)
    for _ in range(CALM + 10):
        await bus.facts.append("things/1", [fact()])
    assert set(where) == {"thread"}
    await bus.close()


async def test_the_loop_goes_on_while_a_lone_write_waits_for_another_program(program: Program, path: Path) -> None:
    clock = Flushes(1e-6)
    bus = await sqlite.open(path, clock=clock, patience=0.4)
    for _ in range(CALM):
        await bus.facts.append("things/1", [fact()])
    clock.seconds = 0
    other = program(HOLDER, str(path))
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    waiting, rounds = bus.facts.append("things/1", [fact()]), 0
    while not waiting.done():
        await asyncio.sleep(0.01)
        rounds += 1
    assert rounds > 10
    with pytest.raises(Busy, match=rf"process {other.pid} "):
        await waiting
    other.kill()
    other.wait()
    assert (await bus.facts.append("things/1", [fact()])).version == CALM + 1
    await bus.close()


async def test_a_lone_write_and_a_close_in_the_same_round_are_both_done(path: Path) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(CALM):
        await bus.facts.append("things/1", [fact()])
    last = bus.facts.append("things/1", [fact()])
    await bus.close()
    assert (await last).version == CALM + 1


# ------------------------------------------------------------------------------------------- zeros ahead in the WAL


def connection(path: Path) -> apsw.Connection:
    found = apsw.Connection(str(path))
    found.pragma("journal_mode", "wal")
    return found


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def test_zeros_ahead_are_no_frames_and_take_none_away(path: Path) -> None:
    """Two connections write in turn, and zeros are added after each commit of one of them."""
    one, two = connection(path), connection(path)
    pages = [0]
    one.set_wal_hook(lambda _connection, _name, count: pages.__setitem__(0, count) or 0)
    one.execute("create table numbers (n integer, rest blob)")
    runway = Runway(wal_of(path), 4096)
    for n in range(400):
        (one, two)[n % 2].execute("insert into numbers values (?, zeroblob(3000))", (n,))
        if n % 2 == 0:
            runway.keep(pages[0])
            assert wal_of(path).stat().st_size > pages[0] * 4120 + 32
    runway.close()
    copy = path.with_name("copy.db")
    copy.write_bytes(path.read_bytes())
    wal_of(copy).write_bytes(wal_of(path).read_bytes())
    third = connection(copy)
    assert third.execute("select count(*), max(n) from numbers").fetchall() == [(400, 399)]
    assert third.pragma("integrity_check") == "ok"


def test_zeros_are_never_the_head_of_a_log_that_was_cut_off(path: Path) -> None:
    first = connection(path)
    first.execute("create table numbers (n integer)")
    runway = Runway(wal_of(path), 4096)
    first.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    runway.keep(1)
    assert wal_of(path).stat().st_size == 0
    first.execute("insert into numbers values (1)")
    runway.keep(1)
    assert wal_of(path).stat().st_size > 500_000
    runway.close()


def test_a_full_disk_only_makes_commits_slower(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = connection(path)
    first.execute("create table numbers (n integer)")
    tried = []

    def full(_file: int, data: Any) -> int:
        tried.append(len(data))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    runway = Runway(wal_of(path), 4096)
    runway.keep(1)
    runway.keep(2)
    assert len(tried) == 1, "not tried again until as much has been written"
    runway.close()
