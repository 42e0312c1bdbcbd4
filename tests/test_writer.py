"""The writer on SQLite: where a write is done, what shares a transaction, and the zeros ahead in the WAL."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import apsw
import pytest

from cauce.backends import sqlite
from cauce.backends.sqlite import chain, table
from cauce.backends.sqlite.runway import Runway
from cauce.backends.sqlite.table import Table
from cauce.backends.sqlite.upkeep import verify
from cauce.backends.sqlite.wake import Wake
from cauce.backends.sqlite.writer import Writer
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Busy, Conflict, Damaged, Refused
from cauce.log import Appended, Filter

Program = Callable[..., subprocess.Popen[str]]

CALM = 20

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("begin immediate")
print("held", flush=True)
sys.stdin.read()
"""


SPOILER = """
import os, sys, apsw
connection = apsw.Connection(sys.argv[1])
connection.execute("insert into types (domain, name) values ('other', 'Other')")
connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
with open(sys.argv[1], "r+b") as file:
    file.write(bytes(100))
os._exit(0)
"""

SIGNALLED = """
import asyncio, json, os, signal, sys
from cauce.backends import sqlite
from cauce.backends.sqlite.table import Table
from cauce.backends.sqlite.writer import Writer
from cauce.backends.sqlite.witness import Witness
from cauce.clock import SystemClock
from cauce.codec import Meta, sealed

path, name, where = sys.argv[1:]
number = signal.Signals[name]
PLACES = {"before": (Table, "flush"), "commit": (Writer, "_wal_grew"), "after": (Witness, "write")}
armed = []

class Still(SystemClock):
    def monotonic(self):
        return 0.0

def arm(kind, name):
    plain = getattr(kind, name)
    def signalled(self, *arguments):
        if armed:
            armed.clear()
            os.kill(os.getpid(), number)
        return plain(self, *arguments)
    setattr(kind, name, signalled)

async def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    bus = await sqlite.open(path, clock=Still())
    def append():
        return bus.facts.append("things/1", [sealed("things/1", "Counted", SystemClock().id(), Meta(1), b"{}")])
    for _ in range(20):
        await append()
    armed.append(True)
    last = append()
    try:
        await asyncio.shield(last)
    finally:
        await asyncio.wait([last], timeout=20)
        told = last.result().version if last.done() and last.exception() is None else repr(last)
        next = (await append()).version
        await bus.close()
        print(json.dumps([not armed, told, next]), flush=True)

arm(*PLACES[where])
asyncio.run(main())
"""


def fact(stream: str = "things/1", body: bytes = b"{}") -> Entry:
    return sealed(stream, "Counted", SystemClock().id(), Meta(1), body)


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


async def alone(bus: sqlite.SQLiteBus, where: list[str]) -> None:
    """Write until it is done on the loop: the thread may be busy for a moment longer than its callers know."""
    for _ in range(100):
        await bus.facts.append("things/0", [fact("things/0")])
        if where[-1] == "loop":
            where.clear()
            return
    raise AssertionError("the loop never writes")


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


async def test_what_is_large_is_never_written_on_the_loop(path: Path, where: list[str]) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(CALM):
        await bus.facts.append("things/1", [fact()])
    for entries, expected in (
        ([fact() for _ in range(100)], "loop"),
        ([fact() for _ in range(400)], "thread"),
        ([fact(body=b'"%s"' % (b"x" * 10_000))], "loop"),
        ([fact(body=b'"%s"' % (b"x" * 70_000))], "thread"),
    ):
        await alone(bus, where)
        await bus.facts.append("things/1", entries)
        assert where == [expected], len(entries)
    await bus.close()


async def test_the_loop_leaves_it_to_the_thread_to_catch_up_with_much_that_others_wrote(
    path: Path, where: list[str]
) -> None:
    one, two = [await sqlite.open(path, clock=Flushes(1e-6)) for _ in range(2)]
    for _ in range(CALM):
        await one.facts.append("things/1", [fact()])
        await two.facts.append("things/2", [fact("things/2")])
    await alone(one, where)
    await two.facts.append("things/2", [fact("things/2")])
    where.clear()
    await one.facts.append("things/1", [fact()])
    assert where == ["loop"], "a little is read on the loop"
    await two.facts.append("things/2", [fact("things/2") for _ in range(900)])
    where.clear()
    assert (await one.facts.append("things/1", [fact()])).version == CALM + 2
    assert where == ["thread"]
    await alone(one, where)
    await one.close()
    await two.close()


async def test_the_loop_leaves_it_to_the_thread_to_read_all_anew_after_a_rollback(
    path: Path, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(CALM):
        await bus.facts.append("things/1", [fact()])
    plain, failing = Table.append, [True]

    def full(self: Table, *arguments: Any) -> Any:
        if failing:
            failing.clear()
            assert threading.current_thread() is threading.main_thread()
            raise apsw.FullError("injected")
        return plain(self, *arguments)

    await alone(bus, where)
    monkeypatch.setattr(Table, "append", full)
    assert (await bus.facts.append("things/1", [fact()])).version == CALM + 1
    assert where == ["thread"], "what failed on the loop is tried once more in the thread"
    await alone(bus, where)
    await bus.close()


async def test_chapters_are_written_in_the_thread_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TAIL", table._FEW + 30)
    wrote: list[bool] = []
    plain = chain.write_chapters

    def seen(*arguments: Any) -> None:
        wrote.append(threading.current_thread() is threading.main_thread())
        plain(*arguments)

    monkeypatch.setattr(table, "write_chapters", seen)
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(100):
        await bus.facts.append("things/1", [fact() for _ in range(20)])
    assert wrote
    assert not any(wrote)
    await bus.close()


# ------------------------------------------------------------------------------------- what befalls a lone write


@pytest.mark.parametrize("calm", [CALM, 1], ids=["on the loop", "in the thread"])
async def test_a_file_spoilt_by_another_program_leaves_nobody_waiting(program: Program, path: Path, calm: int) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6), patience=0.4)
    for _ in range(calm):
        await bus.facts.append("things/1", [fact()])
    assert program(SPOILER, str(path)).wait(30) == 0
    for _ in range(2):
        with pytest.raises(Refused, match="no Cauce log"):
            await asyncio.wait_for(bus.facts.append("things/1", [fact()]), 20)
    await bus.close()


@pytest.mark.parametrize("step", ["begin", "is_due"])
async def test_what_fails_before_the_first_write_of_a_transaction_is_told(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(CALM):
        await bus.facts.append("things/1", [fact()])

    def broken(self: Table, **_: Any) -> Any:
        raise apsw.CorruptError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "begin", broken)
        patch.setattr(Table, step, broken)
        with pytest.raises(Damaged):
            await asyncio.wait_for(bus.facts.append("things/1", [fact()]), 20)
    assert (await bus.facts.append("things/1", [fact()])).version == CALM + 1
    await bus.close()


@pytest.mark.parametrize("calm", [CALM, 1], ids=["on the loop", "in the thread"])
async def test_what_goes_wrong_in_waking_others_is_no_matter_of_the_writer(
    path: Path, calm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(calm):
        await bus.facts.append("things/1", [fact()])
    (path.with_name(path.name + ".d") / "wake" / "folder").mkdir()
    assert (await asyncio.wait_for(bus.facts.append("things/1", [fact()]), 20)).version == calm + 1

    def broken(self: Wake) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Wake, "_list", broken)
    monkeypatch.setattr(Wake, "tell", broken)
    for n in (2, 3):
        assert (await asyncio.wait_for(bus.facts.append("things/1", [fact()]), 20)).version == calm + n
    await bus.close()


@pytest.mark.parametrize("calm", [CALM, 1], ids=["on the loop", "in the thread"])
async def test_what_is_committed_is_told_as_committed_whatever_comes_after(
    path: Path, calm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["exception"]))
    bus = await sqlite.open(path, clock=Flushes(1e-6))
    for _ in range(calm):
        await bus.facts.append("things/1", [fact()])

    writer = bus.facts._writer
    while calm == CALM and not writer._idle:  # noqa: ASYNC110 - while the thread still tidies up, it writes
        await asyncio.sleep(0.001)

    def broken(self: Table) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Table, "committed", broken)
        assert (await asyncio.wait_for(bus.facts.append("things/1", [fact()]), 20)).version == calm + 1
    if calm == CALM:
        assert [type(each) for each in said] == [ZeroDivisionError]
        assert (await asyncio.wait_for(bus.facts.append("things/1", [fact()]), 20)).version == calm + 2
    await bus.close()
    assert verify(path).entries["facts"] == calm + (2 if calm == CALM else 1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("place", ["before", "commit", "after"])
def test_a_lone_write_into_which_a_signal_comes_is_made_once_and_told_so(
    program: Program, path: Path, place: str, name: str
) -> None:
    process = program(SIGNALLED, str(path), name, place)
    said, _ = process.communicate(timeout=60)
    assert said == "[true, 21, 22]\n"
    assert process.returncode == (3 if name == "SIGTERM" else -signal.SIGINT)
    assert verify(path).ok
    assert verify(path).entries["facts"] == 22


class Signals:
    """Sends this process a signal when so many steps have been made inside `Writer._go`.

    A signal handler runs where a function of Python begins and where one of C has returned, and nowhere else.
    """

    def __init__(self, step: int) -> None:
        self._step, self.made, self._inside = step, 0, False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        outermost = frame.f_code is Writer._go.__code__
        if outermost and event == "call":
            self._inside = True
        if self._inside and event in {"call", "c_return"}:
            self.made += 1
            if self.made == self._step:
                signal.raise_signal(signal.SIGUSR1)
        if outermost and event == "return":
            self._inside = False


@pytest.fixture
def exits() -> Iterator[None]:
    """SIGUSR1 means to exit."""
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("exits")
def test_wherever_a_signal_handler_raises_in_a_lone_write_it_is_made_once_and_told_so(
    path: Path, where: list[str]
) -> None:
    written, waiting = list[str](), list[asyncio.Future[Appended]]()

    async def begin(bus: sqlite.SQLiteBus) -> None:
        written.append((entry := fact()).id)
        waiting[:] = [bus.facts.append("things/1", [entry])]
        await asyncio.sleep(0)

    async def end() -> None:
        assert (await asyncio.wait_for(waiting[0], 20)).version == len(written), step
        await asyncio.wait_for(other.facts.append("things/2", [fact("things/2")]), 20)
        for _ in range(2):
            await begin(bus)
            assert (await asyncio.wait_for(waiting[0], 20)).version == len(written), step
        await alone(bus, where)

    with asyncio.Runner() as runner:
        bus, other = [runner.run(sqlite.open(path, clock=Flushes(1e-6), patience=0.4)) for _ in range(2)]
        for _ in range(CALM):
            runner.run(begin(bus))
        step, whole = 1, False
        runner.run(end())
        while not whole:
            signals = Signals(step)
            sys.setprofile(signals)
            try:
                runner.run(begin(bus))
                whole = where == ["loop"]
            except SystemExit:
                step += 1
            finally:
                sys.setprofile(None)
            runner.run(end())
        assert step > 80
        assert bus._writer._bytes == 0
        entries = runner.run(bus.facts.read(Filter("things/1"), limit=5000)).entries
        assert [entry.id for entry in entries] == written
        runner.run(bus.close())
        runner.run(other.close())
    assert verify(path).ok


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


def test_zeros_leave_the_last_room_of_a_disk_to_the_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = connection(path)
    first.execute("create table numbers (n integer)")
    size = wal_of(path).stat().st_size
    plain = os.fstatvfs

    def small(file: int) -> os.statvfs_result:
        found = list(plain(file))
        found[4] = 200 * 1024 * 1024 // found[1]
        return os.statvfs_result(found)

    runway = Runway(wal_of(path), 4096)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", small)
        runway.keep(1)
        assert wal_of(path).stat().st_size == size
        assert not runway.is_short(1), "a lone write goes on without"
    runway.keep(1000)
    assert wal_of(path).stat().st_size > size + 500_000
    runway.close()
