"""What SQLite keeps while processes are killed, stopped and forked, disks fill up, and others touch the file."""

# ruff: noqa: ASYNC221, ASYNC222 - while a test looks at a file or runs a program, nobody else needs its loop

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import apsw
import pytest

from cauce.backends import sqlite
from cauce.backends.sqlite.writer import Writer
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Busy, Damaged, Overloaded, Refused
from cauce.log import Appended, Filter, Log

WORKER = str(Path(__file__).with_name("worker.py"))
SOON = 30.0


def fact(stream: str = "things/1", n: int = 1, body: bytes = b"{}") -> Entry:
    return sealed(stream, "Counted", f"id-{n}", Meta(1), body)


class Other:
    """Another process, and what it reports."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid, self.pipe, self._rest = pid, pipe, b""

    def lines(self) -> list[dict[str, Any]] | None:
        """What it said since, as soon as it says something; None when it has gone."""
        data = os.read(self.pipe, 65536)
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in whole]

    def line(self, seconds: float = SOON) -> dict[str, Any]:
        """The next thing it says."""
        until = time.monotonic() + seconds
        while not (ready := self._rest.partition(b"\n"))[1]:
            assert select.select([self.pipe], [], [], max(0, until - time.monotonic()))[0], (
                "the other process says nothing"
            )
            data = os.read(self.pipe, 65536)
            assert data, "the other process has gone"
            self._rest += data
        self._rest = ready[2]
        answer: dict[str, Any] = json.loads(ready[0])
        return answer

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def gone(self) -> None:
        """Wait until its pipe closes, as all its files do when it dies."""
        while self.lines() is not None:
            pass


class Others:
    """A server that forks other processes within milliseconds."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = subprocess.Popen([sys.executable, WORKER], stdin=theirs.fileno())
        theirs.close()
        self._begun: list[Other] = []

    def begin(self, role: str, *arguments: Any) -> Other:
        ours, theirs = os.pipe()
        socket.send_fds(self._socket, [json.dumps([role, arguments]).encode()], [theirs])
        os.close(theirs)
        self._begun.append(Other(int(self._socket.recv(64)), ours))
        return self._begun[-1]

    def end(self) -> None:
        for other in self._begun:
            other.kill()
            os.close(other.pipe)
        self._begun.clear()

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Others]:
    others = Others()
    yield others
    others.close()


@pytest.fixture
def others(server: Others) -> Iterator[Others]:
    yield server
    server.end()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.db"


@contextmanager
def shut(gate: Path) -> Iterator[None]:
    """While this lasts nobody passes the gate."""
    with gate.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def everything(log: Log, filter: Filter | None = None, after: int = 0) -> list[Entry]:
    head, found = await log.head(), list[Entry]()
    while after < head:
        page = await log.read(filter or Filter(), after=after, limit=5000)
        found, after = found + page.entries, page.looked
    return [entry.checked() for entry in found]


# --------------------------------------------------------------------------------------------------------- kill -9


class Ledger:
    """What was acknowledged, compared with what the log holds."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, Any]] = {}
        self.records: dict[str, int] = {}
        self.looked = 0
        self.versions: dict[str, int] = {}
        self.parts: dict[str, list[tuple[str, int, int]]] = {}

    def note(self, line: dict[str, Any]) -> None:
        if "record" in line:
            self.records[line["record"]] = line["version"]
        else:
            self.told[line["tag"]] = line

    async def compare(self, bus: sqlite.SQLiteBus) -> None:
        entries = await everything(bus.facts, after=self.looked)
        for entry in entries:
            version = self.versions.get(entry.stream, 0) + 1
            assert entry.version == version, f"{entry.stream} goes from version {version - 1} to {entry.version}"
            self.versions[entry.stream] = version
            tag, part, many = json.loads(entry.body or b"")
            self.parts.setdefault(tag, []).append((entry.stream, version, many))
            assert len(self.parts[tag]) == part + 1, f"part {part} of {tag} stands twice, or before its time"
        torn = [tag for tag, parts in self.parts.items() if len(parts) != parts[0][2]]
        assert torn == [], "appends of which a part is missing"
        for tag, line in self.told.items():
            assert tag in self.parts, f"{line} was acknowledged and is lost"
            own = [part[:2] for part in self.parts[tag] if part[0] == line["stream"]]
            assert own[-1] == (line["stream"], line["version"])
        stand = {entry.stream: entry.version for entry in await everything(bus.records)}
        assert all(stand[stream] >= version for stream, version in self.records.items())
        self.looked = await bus.facts.head()


async def test_what_was_acknowledged_stands_once_after_a_hundred_rounds_of_kill_9(others: Others, path: Path) -> None:
    random, ledger = Random(2017), Ledger()
    for round in range(100):
        writers = [others.begin("write", str(path), f"{round}.{n}", random.getrandbits(32)) for n in range(3)]
        # Two in ten die at any moment, perhaps while they open; the others some time after their first word.
        dies = {w: time.monotonic() + random.random() * 0.03 if random.random() < 0.2 else None for w in writers}
        living = set(writers)
        while living:
            moments = [moment for w in living if (moment := dies[w]) is not None]
            wait = max(0.0, min(moments) - time.monotonic()) if moments else SOON
            ready, _, _ = select.select([w.pipe for w in living], [], [], wait)
            for writer in [w for w in living if w.pipe in ready]:
                lines = writer.lines()
                if lines is None:
                    living.remove(writer)
                    continue
                if dies[writer] is None:
                    dies[writer] = time.monotonic() + random.random() * 0.04
                for line in lines:
                    ledger.note(line)
            for writer in living:
                moment = dies[writer]
                if moment is not None and moment <= time.monotonic():
                    writer.kill()
                    dies[writer] = None
        others.end()
        bus = await sqlite.open(path)
        await ledger.compare(bus)
        tag = f"{round}.survivor"
        done = await bus.facts.append("things/0", [fact("things/0", body=json.dumps([tag, 0, 1]).encode())])
        ledger.note({"tag": tag, "stream": "things/0", "version": done.version})
        assert check(path) == "ok"
        await bus.close()
    assert len(ledger.told) > 500, "the writers hardly wrote"


def check(path: Path) -> str:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return str(connection.pragma("integrity_check"))
    finally:
        connection.close()


async def test_eight_processes_that_make_a_log_at_once_make_one(others: Others, tmp_path: Path) -> None:
    for round in range(5):
        path, gate = tmp_path / f"bus{round}.db", tmp_path / f"gate{round}"
        with shut(gate):
            makers = [others.begin("make", str(path), str(gate)) for _ in range(8)]
            assert [maker.line() for maker in makers] == [{"ready": True}] * 8
        said = [maker.line() for maker in makers]
        assert len({line["id"] for line in said}) == 1
        assert sorted(line["version"] for line in said) == list(range(1, 9))


async def test_a_log_whose_maker_was_killed_half_way_is_made_again(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.close()
    bus = await sqlite.open(path)
    assert (await bus.facts.append("things/1", [fact()])).version == 1
    await bus.close()


# ---------------------------------------------------------------------------------------------- stopped, in the way


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stopped(other: Other) -> None:
    """Wait until it has stopped itself."""
    assert other.line() == {"pid": other.pid}
    until = time.monotonic() + SOON
    while state(other.pid) != "T":
        assert time.monotonic() < until


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL], ids=["goes on", "is killed"])
@pytest.mark.parametrize("where", ["transaction", "turn", "next"])
async def test_a_stopped_writer_makes_others_busy_until_it(
    where: str, then: signal.Signals, others: Others, path: Path
) -> None:
    bus = await sqlite.open(path, patience=0.4)
    await bus.facts.append("things/1", [fact()])
    other = others.begin("stop", str(path), where)
    stopped(other)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(Busy, match=rf"process {other.pid} .*stopped"):
            await bus.facts.append("things/1", [fact()])
        assert time.monotonic() - began < 5
    assert [entry.stream for entry in await everything(bus.facts)] == ["things/1", "things/stopped"], "reads go on"
    os.kill(other.pid, then)
    if then is signal.SIGCONT:
        assert other.line() == {"version": 2}
    other.gone()
    assert (await bus.facts.append("things/1", [fact()])).version == 2, "what was refused as Busy was not written later"
    await bus.close()


async def test_a_log_can_be_closed_and_opened_again_while_another_is_stopped_in_its_turn(
    others: Others, path: Path
) -> None:
    """The thread of the closed one still waits for its turn: it must not touch what is another file by then."""
    bus = await sqlite.open(path, patience=0.4)
    await bus.facts.append("things/1", [fact()])
    other = others.begin("stop", str(path), "transaction")
    stopped(other)
    with pytest.raises(Busy):
        await bus.facts.append("things/1", [fact()])
    thread = bus._writer._thread
    await bus.close()
    innocent = [os.memfd_create(str(n)) for n in range(20)]
    again = await sqlite.open(path, patience=0.4)
    with pytest.raises(Busy):
        await again.facts.append("things/1", [fact()])
    os.kill(other.pid, signal.SIGCONT)
    other.gone()
    await asyncio.to_thread(thread.join, SOON)
    assert not thread.is_alive()
    assert (await again.facts.append("things/1", [fact()])).version == 2
    with pytest.raises(Refused, match="closed"):
        await bus.facts.append("things/1", [fact()])
    with pytest.raises(Refused, match="closed"):
        await bus.facts.read()
    assert [os.fstat(file).st_size for file in innocent] == [0] * 20
    for file in innocent:
        os.close(file)
    await again.close()


async def test_a_program_that_is_not_cauce_is_named_when_it_holds_the_lock(others: Others, path: Path) -> None:
    bus = await sqlite.open(path, patience=0.4)
    await bus.facts.append("things/1", [fact()])
    other = others.begin("foreign", str(path))
    other.line()
    with pytest.raises(Busy, match=rf"process {other.pid} "):
        await bus.facts.append("things/1", [fact()])
    other.kill()
    other.gone()
    assert (await bus.facts.append("things/1", [fact()])).version == 2
    await bus.close()


async def test_too_much_that_waits_is_overloaded_and_the_rest_is_written(path: Path) -> None:
    bus = await sqlite.open(path, patience=60)
    await bus.facts.append("things/1", [fact()])

    async def flood(stream: str, body: bytes) -> int:
        waiting: list[asyncio.Future[Appended]] = []
        with shut(path.with_name("bus.db.d") / "turn.main"), suppress(Overloaded):
            while len(waiting) < 100_000:
                waiting.append(bus.facts.append(stream, [fact(stream, len(waiting), body)]))
        assert {done.version for done in await asyncio.gather(*waiting)} == set(range(1, len(waiting) + 1))
        assert (await bus.facts.append(stream, [fact(stream)])).version == len(waiting) + 1
        return len(waiting)

    assert await flood("things/many", b"{}") < 50_000
    assert 50 < await flood("things/large", b'"%s"' % (b"x" * 700_000)) < 200
    await bus.close()


async def test_a_dead_writer_thread_leaves_nobody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = await sqlite.open(path)
    await bus.facts.append("things/1", [fact()])

    def die(self: Writer, function: object, verdicts: object, *rest: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(Writer, "_tell", die)
    waiting = [bus.facts.append("things/1", [fact(n=n)]) for n in range(3)]
    async with asyncio.timeout(SOON):
        for each in waiting:
            with pytest.raises(Damaged, match="ZeroDivisionError"):
                await each
        with pytest.raises(Damaged):
            await bus.facts.append("things/1", [fact()])
        await bus.close()
    bus = await sqlite.open(path)
    assert (await bus.facts.append("things/2", [fact("things/2")])).version == 1
    await bus.close()


# ------------------------------------------------------------------------------------------------------------ fork


async def test_a_forked_child_is_refused_and_its_parent_goes_on(path: Path) -> None:
    bus = await sqlite.open(path)
    await bus.facts.append("things/1", [fact()])
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on it warns of threads: this child is about to be refused because of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        # No event loop here: it is the parent's. A coroutine that is refused is refused in its first step.
        said = []
        for call in (
            lambda: bus.facts.append("things/1", [fact()]),
            lambda: bus.facts.read().send(None),
            lambda: bus.facts.head().send(None),
            lambda: bus.facts.claim("slot", "a").send(None),
            lambda: sqlite.open(path).send(None),
        ):
            try:
                call()
                said.append("nothing")
            except BaseException as error:
                said.append(f"{type(error).__name__} {'spawn instead of fork' in str(error)}")
        os.write(theirs, json.dumps(said).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        assert json.loads(pipe.read()) == ["Refused True"] * 5
    os.waitpid(child, 0)
    assert (await bus.facts.append("things/1", [fact()])).version == 2
    await bus.close()


async def test_a_forked_child_does_not_keep_its_dead_parents_turn(others: Others, path: Path) -> None:
    other = others.begin("stop", str(path), "transaction", True)
    child = other.line()["child"]
    stopped(other)
    other.kill()
    try:
        bus = await sqlite.open(path, patience=5)
        assert (await bus.facts.append("things/stopped", [fact("things/stopped")])).version == 2
        await bus.close()
    finally:
        os.kill(child, signal.SIGKILL)


# ------------------------------------------------------------------------------------------- others in this process


async def test_stdlib_sqlite3_is_kept_off_the_file_in_this_process_by_whatever_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a folder").mkdir()
    bus = await sqlite.open(path)
    await bus.facts.append("things/1", [fact()])
    hard, soft, odd = tmp_path / "hard.db", tmp_path / "soft.db", tmp_path / "a folder" / "100%?#.db"
    soft.symlink_to(path)
    os.link(path, hard)
    os.link(path, odd)
    monkeypatch.chdir(tmp_path / "a folder")
    quoted = str(odd).replace("%", "%25").replace("?", "%3f").replace("#", "%23").replace(" ", "%20")
    for name in (path, str(path), os.fsencode(path), "../bus.db", "./../bus.db", str(hard), str(soft), str(odd)):
        with pytest.raises(Refused, match="open as a Cauce log"):
            sqlite3.connect(name)
    for uri in (
        f"file:{path}", f"file://{path}", f"file://localhost{path}", f"file:{path}?mode=ro", f"file:{path}?mode=ro#x",
        "file:../bus.db", f"file:{quoted}?cache=private",
    ):  # fmt: skip
        with pytest.raises(Refused, match="open as a Cauce log"):
            sqlite3.connect(uri, uri=True)
    sqlite3.connect(":memory:").close()
    sqlite3.connect(tmp_path / "another.db").close()
    query = f"import sqlite3; print(sqlite3.connect({str(path)!r}).execute('select count(*) from facts').fetchone())"
    assert subprocess.run([sys.executable, "-c", query], capture_output=True, text=True).stdout == "(1,)\n"
    assert (await bus.facts.append("things/1", [fact()])).version == 2
    await bus.close()
    connection = sqlite3.connect(path)
    assert connection.execute("select count(*) from facts").fetchone() == (2,)
    with pytest.raises(Refused, match="through another library"):
        await sqlite.open(path)
    connection.close()
    bus = await sqlite.open(path)
    await bus.close()


async def test_two_names_of_one_file_are_one_log(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(path)
    one, two = await sqlite.open(path), await sqlite.open(tmp_path / "link.db")
    assert one.facts.id == two.facts.id
    await asyncio.gather(*((one, two)[n % 2].facts.append("things/1", [fact(n=n)]) for n in range(50)))
    assert [entry.version for entry in await everything(two.facts)] == list(range(1, 51))
    await two.close()
    await one.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bus.db", "bus.db.d", "link.db"]


# -------------------------------------------------------------------------------------------------------- bad files


def text(path: Path) -> None:
    path.write_text("Dear diary, " * 500)


def short_text(path: Path) -> None:
    path.write_text("Dear diary")


def other_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("create table diary (day text)")
    connection.close()


def other_program(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("pragma application_id = 42")
    connection.execute("pragma user_version = 7")
    connection.close()


def newer_format(path: Path) -> None:
    other_database(path)
    connection = sqlite3.connect(path)
    connection.execute(f"pragma application_id = {sqlite.file.APPLICATION_ID}")
    connection.execute("pragma user_version = 99")
    connection.close()


@pytest.mark.parametrize("make", [text, short_text, other_database, other_program, newer_format, Path.mkdir])
async def test_what_is_no_log_of_ours_is_refused_and_left_alone(make: Any, path: Path) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(Refused, match=r"bus\.db"):
        await sqlite.open(path)
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert [each.name for each in path.parent.iterdir()] == ["bus.db"], "something was left beside it"
    if path.is_file():
        sqlite3.connect(path).close()


async def test_folders_that_are_missing_are_made_and_the_file_is_private(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "one" / "two" / "bus.db")
    await bus.facts.append("things/1", [fact()])
    await bus.close()
    folder = tmp_path / "one" / "two"
    modes = {each.name: each.stat().st_mode & 0o777 for each in folder.iterdir()}
    assert modes == {"bus.db": 0o600, "bus.db.d": 0o700}
    text(tmp_path / "file")
    with pytest.raises(Refused, match="cannot be made"):
        await sqlite.open(tmp_path / "file" / "bus.db")


@pytest.mark.parametrize("what", ["file", "folder", "unreadable", "nothing"])
async def test_what_may_not_be_written_is_refused(what: str, others: Others) -> None:
    with tempfile.TemporaryDirectory(prefix="cauce-") as name:
        folder, path = Path(name), Path(name) / "bus.db"
        if what != "nothing":
            bus = await sqlite.open(path)
            await bus.close()
            (folder / "bus.db.d").chmod(0o777)
            path.chmod({"file": 0o444, "unreadable": 0, "folder": 0o666}[what])
        folder.chmod(0o555)
        try:
            said = others.begin("nobody", str(path)).line()
            assert said["error"] == "Refused"
            assert str(path) in said["message"]
        finally:
            folder.chmod(0o755)


# -------------------------------------------------------------------------------------------------------- full disk


def small_disk(role: str, folder: Path) -> dict[str, Any] | None:
    """The role on a file system of 2 MB of its own, half full; None where one may not be mounted."""
    folder.mkdir(exist_ok=True)
    script = (
        f'mount -t tmpfs -o size=2m none "{folder}" && head -c {"1m" if role == "fill" else "8m"} /dev/zero '
        f'> "{folder}/ballast" 2>/dev/null; exec "{sys.executable}" "{WORKER}" {role} "{folder}/bus.db" "{folder}/ballast"'
    )
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        with suppress(OSError):
            if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode:
                continue
            done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
    return None


def limited(role: str, path: Path) -> dict[str, Any]:
    """The same with a limit on the size of files, which the system enforces everywhere."""
    done = subprocess.run([sys.executable, WORKER, role, str(path), ""], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def full(role: str, disk: str, path: Path) -> dict[str, Any]:
    """Nothing is skipped where no disk may be mounted."""
    return (small_disk(role, path.parent / "disk") if disk == "small disk" else None) or limited(role, path)


@pytest.mark.parametrize("disk", ["small disk", "limit on files"])
def test_a_full_disk_is_told_and_nothing_is_half_written(disk: str, path: Path) -> None:
    said = full("fill", disk, path)
    assert [(each["error"], "make room" in each["message"]) for each in said["refused"]] == [("StorageFull", True)] * 5
    assert said["acknowledged"] >= 3
    assert said["meanwhile"] == said["acknowledged"], "reads go on, and show what was acknowledged"
    assert said["after"] == {"version": said["acknowledged"] + 1}, "the next append works"
    assert said["versions"] == list(range(1, said["acknowledged"] + 2))
    assert said["check"] == "ok"


@pytest.mark.parametrize("disk", ["small disk", "limit on files"])
def test_a_log_that_finds_no_room_to_be_made_is_made_later(disk: str, path: Path) -> None:
    said = full("start_full", disk, path)
    assert said["said"]["error"] == "StorageFull"
    assert (said["after"], said["check"]) == ({"version": 1}, "ok")


@pytest.mark.parametrize("written", [1, 30], ids=["in the thread", "on the loop"])
async def test_a_disk_that_fails_to_flush_stops_the_writer_until_the_log_is_opened_again(
    written: int, others: Others, path: Path
) -> None:
    other = others.begin("unflushed", str(path), written)
    said = other.line()
    other.gone()
    assert said["before"] == {"version": written}
    assert [each["error"] for each in [*said["said"], said["after"]]] == ["Damaged"] * 3
    assert "flush" in said["said"][0]["message"]
    bus = await sqlite.open(path)
    stand = [entry.version for entry in await everything(bus.facts)]
    assert len(stand) - written in (0, 1), "whether the unflushed one stands is not known, but no more than that"
    assert (await bus.facts.append("things/1", [fact()])).version == len(stand) + 1
    assert check(path) == "ok"
    await bus.close()


# ------------------------------------------------------------------------------------------------------- many at once


async def test_another_process_is_woken_without_looking(others: Others, path: Path) -> None:
    bus = await sqlite.open(path)
    other = others.begin("tail", str(path), 20)
    assert other.line() == {"ready": True}
    took = []
    for n in range(20):
        done = await bus.facts.append("things/1", [fact(n=n)])
        acknowledged = time.monotonic()
        await bus.commands.append("things/1", [fact(n=n)])
        line = await asyncio.to_thread(other.line)
        assert line["position"] == done.position
        took.append(line["at"] - acknowledged)
    assert median(took) < 0.1
    await bus.close()


async def test_a_process_that_came_in_the_same_moment_is_woken_too(others: Others, path: Path) -> None:
    """A folder's time of change is coarse: who lists the sockets must not take two changes for one."""
    bus = await sqlite.open(path)
    for n in range(20):
        await bus.facts.append("things/1", [fact(n=n)])
        other = others.begin("tail", str(path), 1)
        assert other.line() == {"ready": True}
        await bus.facts.append("things/1", [fact(n=n)])
        await asyncio.to_thread(other.line)
        other.gone()
    await bus.close()


async def test_a_reader_in_the_same_process_is_woken_without_looking(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite.log, "_POLL", 600.0)
    one, two = await sqlite.open(path), await sqlite.open(path)
    for n in range(5):
        for writer in (one, two):
            waiting = [
                asyncio.create_task(bus.facts.read(filter, after=await one.facts.head(), wait=60))
                for bus in (one, two)
                for filter in (Filter(), Filter("things/1"), Filter(types=frozenset({"Counted"})))
            ]
            done = await writer.facts.append("things/1", [fact(n=n)])
            async with asyncio.timeout(SOON):
                assert {page.looked for page in await asyncio.gather(*waiting)} == {done.position}
    await two.close()
    await one.close()


async def test_a_reader_whom_nobody_wakes_looks_for_itself(others: Others, path: Path, tmp_path: Path) -> None:
    bus, gate = await sqlite.open(path), tmp_path / "gate"
    with shut(gate):
        other = others.begin("silent", str(path), str(gate))
        assert other.line() == {"ready": True}
        waiting = asyncio.create_task(bus.facts.read(wait=60))
    async with asyncio.timeout(SOON):
        assert [entry.stream for entry in (await waiting).entries] == ["things/1"]
    await bus.close()


async def test_four_processes_share_one_file_evenly(others: Others, path: Path, tmp_path: Path) -> None:
    appends, gate = 3000, tmp_path / "gate"
    with shut(gate):
        sharers = [others.begin("share", str(path), str(n), str(gate), appends) for n in range(4)]
        assert [await asyncio.to_thread(sharer.line) for sharer in sharers] == [{"ready": True}] * 4
    said = [await asyncio.to_thread(sharer.line, 100) for sharer in sharers]
    first = min(line["times"][-1] for line in said)
    shares = [sum(moment <= first for moment in line["times"]) / appends for line in said]
    assert min(shares) >= 0.6, f"shares while all were at it: {shares}"
    bus = await sqlite.open(path)
    for n in range(4):
        versions = [entry.version for entry in await everything(bus.facts, Filter(f"things/{n}"))]
        assert versions == list(range(1, appends + 2))
    await bus.close()
