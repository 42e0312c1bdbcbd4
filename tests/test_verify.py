"""`verify` never calls a log whole that is not, and copies that are made and put back are whole."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from cauce.accept import SLOTS, slot_of
from cauce.backends import sqlite
from cauce.backends.sqlite.peek import peek
from cauce.backends.sqlite.upkeep import Report, backup, restore, verify
from cauce.clock import SystemClock
from cauce.codec import Meta, sealed
from cauce.errors import Busy, CauceError, Damaged, Refused
from cauce.log import EVERYTHING, Filter

Program = Callable[..., subprocess.Popen[str]]

STREAMS = [f"users/{n}" for n in range(23)]

# Writes two rounds into a log; the first is moved to the database by closing, the second stays in the WAL.
WRITER = """
import asyncio, os, signal, sys
from cauce.backends import sqlite
from cauce.clock import SystemClock
from cauce.codec import Meta, sealed

async def main(path, end):
    clock = SystemClock()
    for turn in (0, 1):
        bus = await sqlite.open(path)
        for part in range(3):
            told = []
            for n in range(70):
                stream, version = f"users/{n % 23}", n + 100 * part + 1000 * turn + 1
                body = b'{"n":%d,"text":"%s"}' % (version, b"x" * (9000 if n % 50 == 7 else n))
                fact = b'{"fact":%d,"text":"%s"}' % (version, b"y" * (9000 if n % 50 == 7 else n))
                wish = b'{"type":"Wish","body":{}}' if n % 2 else None
                entry = sealed(stream, f"T{n % 3}", clock.id(), Meta(clock.now(), by="me"), fact, wish)
                told.append(bus.facts.append(stream, [entry]))
                if n % 4 == 0:
                    told.append(bus.commands.append(stream, [sealed(stream, "Do", clock.id(), Meta(clock.now()), body)]))
                if n % 3 == 0:
                    record = sealed(stream, "User", clock.id(), Meta(clock.now()), b"" if n % 9 == 0 else body)
                    told.append(bus.records.put(stream, version, record))
            await asyncio.gather(*told)
        if turn == 0:
            await bus.close()
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("written", flush=True)
    while end == "go on":
        n += 1
        stream = f"users/{n % 23}"
        await bus.facts.append(stream, [sealed(stream, "T1", clock.id(), Meta(clock.now()), b'"%d"' % n)])
    if end == "wait":
        sys.stdin.read()
    await bus.close()

asyncio.run(main(*sys.argv[1:]))
"""


LOOKER = """
import asyncio, os, sys
from pathlib import Path
from cauce.backends.sqlite.peek import peek
from cauce.backends.sqlite.upkeep import verify

path = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
with peek(path) as logs:
    print(verify(path).ok, asyncio.run(logs.facts.head()))
"""


def ended(program: Program, path: Path, end: str) -> None:
    program(WRITER, str(path), end).wait()


def files(path: Path) -> tuple[bytes, bytes]:
    """Database and WAL of a log that nobody has open here."""
    wal = path.with_name(path.name + "-wal")
    return path.read_bytes(), wal.read_bytes() if wal.exists() else b""


def written_of(wal: bytes) -> int:
    """How much of it is not only kept ready, as zeros behind the last frame."""
    return len(wal.rstrip(b"\0"))


def put(path: Path, database: bytes, wal: bytes, witness: bytes | None) -> Path:
    """A copy of a log, in a place that may hold an earlier one."""
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    path.write_bytes(database)
    path.with_name(path.name + "-wal").write_bytes(wal)
    folder = path.with_name(path.name + ".d")
    shutil.rmtree(folder, ignore_errors=True)
    if witness is not None:
        folder.mkdir()
        (folder / "witness").write_bytes(witness)
    return path


def witness_of(path: Path) -> Path:
    return path.with_name(path.name + ".d") / "witness"


async def readable(path: Path) -> list[tuple[object, ...]]:
    """All that a reader gets, in its order: whole logs, and each stream."""
    found: list[tuple[object, ...]] = []
    with peek(path) as logs:
        for log in (logs.facts, logs.commands, logs.records):
            for filter in (EVERYTHING, *map(Filter, STREAMS)):
                page = await log.read(filter, limit=5000)
                found += [(e.stream, e.version, e.type, e.id, e.raw, e.wish, e.body, e.digest) for e in page.entries]
    return found


def grown(path: Path, beyond: int) -> None:
    """Wait until those who write have written more facts than that."""
    deadline = time.monotonic() + 30
    with peek(path) as logs:
        while asyncio.run(logs.facts.head()) <= beyond:
            assert time.monotonic() < deadline, "nobody writes"
            time.sleep(0.005)


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


# ------------------------------------------------------------------------------------------------------ flipped bits


@pytest.mark.parametrize(("flips", "with_witness"), [(700, True), (300, False)])
async def test_a_thousand_flipped_bits_never_pass_for_an_untouched_log(
    flips: int, with_witness: bool, program: Program, tmp_path: Path
) -> None:
    """Half of them anywhere, half where SQLite keeps its own books. Each is a copy with one bit turned."""
    ended(program, tmp_path / "bus.db", "kill")
    database, wal = files(tmp_path / "bus.db")
    witness = witness_of(tmp_path / "bus.db").read_bytes() if with_witness else None
    copy = put(tmp_path / "copy.db", database, wal, witness)
    assert verify(copy).ok
    before = await readable(copy)
    written = written_of(wal)
    assert written > 100_000
    # What is only kept ready behind it, as zeros, is not worth to be copied a thousand times.
    wal = wal[:written]

    chance = random.Random(2)
    unseen, found = [], 0
    for _ in range(flips):
        bit = flip_somewhere(chance, len(database), written)
        parts = bytearray(database + wal)
        parts[bit // 8] ^= 1 << bit % 8
        flipped = bytes(parts[: len(database)]), bytes(parts[len(database) :])
        put(copy, *flipped, witness)
        report = verify(copy)
        assert files(copy) == flipped, f"bit {bit}: verify changed the files"
        found += not report.ok
        if report.ok and await same(copy) != before:
            unseen.append(bit)
    assert unseen == []
    assert found > flips / 3


def flip_somewhere(chance: random.Random, database: int, wal: int) -> int:
    page, frame = 4096, 4096 + 24
    places = (
        chance.randrange(database + wal),
        chance.randrange(database + wal),
        chance.randrange(database // page) * page + chance.randrange(64),
        database + 32 + chance.randrange((wal - 32) // frame) * frame + chance.randrange(24),
        chance.choice([chance.randrange(100), database + chance.randrange(32)]),
    )
    return chance.choice(places) * 8 + chance.randrange(8)


async def same(copy: Path) -> list[tuple[object, ...]] | CauceError:
    try:
        return await readable(copy)
    except CauceError as error:
        return error


@pytest.mark.parametrize(("position", "version"), [(1, 1), (9, 9), (70, 70), (71, 101), (420, 1270)])
def test_a_flip_in_a_body_names_its_position(position: int, version: int, program: Program, tmp_path: Path) -> None:
    ended(program, tmp_path / "bus.db", "close")
    flip_fact(tmp_path / "bus.db", version)
    (finding,) = verify(tmp_path / "bus.db").findings
    assert (finding.kind, finding.log, finding.position) == ("entry", "facts", position)
    assert f"position {position} " in finding.message


def test_a_flip_in_a_body_on_pages_of_its_own_names_its_position(program: Program, tmp_path: Path) -> None:
    ended(program, tmp_path / "bus.db", "close")
    database = bytearray((tmp_path / "bus.db").read_bytes())
    database[database.index(b"y" * 4000) + 2000] ^= 1
    (tmp_path / "bus.db").write_bytes(database)
    (finding,) = verify(tmp_path / "bus.db").findings
    assert (finding.kind, finding.log) == ("entry", "facts")
    assert finding.position % 70 in (8, 58)


def flip_fact(path: Path, version: int) -> None:
    """Turn a bit in the body of one fact, and in what SQLite may have left of it in unused places."""
    database = path.read_bytes()
    body = b'{"fact":%d,"text"' % version
    assert body in database
    path.write_bytes(database.replace(body, body.replace(b"t", b"u", 1)))


def test_a_lost_end_is_noticed_by_the_witness(program: Program, tmp_path: Path) -> None:
    """What SQLite's own check calls ok: the WAL as it was some commits ago."""
    ended(program, tmp_path / "bus.db", "kill")
    database, wal = files(tmp_path / "bus.db")
    copy = put(
        tmp_path / "copy.db", database, wal[: written_of(wal) // 2], witness_of(tmp_path / "bus.db").read_bytes()
    )
    with apsw.Connection(str(copy)) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    connection.close()
    report = verify(copy)
    assert kinds(report) == {"witness"}
    assert "is lost" in report.findings[0].message


# -------------------------------------------------------------------------------------------------- other damage


@pytest.mark.parametrize(
    ("statement", "kind", "log", "position"),
    [
        ("update facts set version = version + 1 where position = 5", "order", "facts", 5),
        ("delete from facts where position = 9", "order", "facts", 9),
        ("update facts set stream = 9999984 where position = 5", "names", "facts", 5),
        ("update facts set type = 99 where position = 5", "names", "facts", 5),
        ("update facts set body = '' where position = 5", "entry", "facts", 5),
        ("update facts set wish = x'' where position = 1", "entry", "facts", 1),
        ("update facts set id = cast(x'fffe' as text) where position = 5", "entry", "facts", 5),
        ("update facts set id = cast(id as blob) where position = 5", "entry", "facts", 5),
        ("update facts set meta = cast(meta as text) where position = 5", "entry", "facts", 5),
        ("update commands set digest = digest + 1 where position = 3", "entry", "commands", 3),
        ("update streams set name = 'users/other' where name = 'users/1'", "names", "", 0),
        ("update streams set name = cast(x'757365ff' as text) where name = 'users/1'", "names", "", 0),
        ("update types set domain = 'others' where name = 'T1'", "names", "facts", 2),
        ("update bus set id = 'no id'", "names", "", 0),
        ("insert into bus values ('01890a5d-ac96-774b-bcce-b302099a8057')", "names", "", 0),
        ("update bus set id = '01890a5d-ac96-774b-bcce-b302099a8057'", "witness", "", 0),
        ("insert into claims values ('nowhere', 'a', 'b', 1, 0)", "claims", "", 0),
        ("drop index facts_id", "schema", "", 0),
        ("create table extra (a)", "schema", "", 0),
        ("pragma application_id = 1", "file", "", 0),
        ("pragma user_version = 99", "file", "", 0),
        ("update facts set previous = previous - 1 where position = 419", "order", "facts", 419),
        ("insert into facts_chapters values (0, 0, 100)", "names", "facts", 0),
        ("insert into facts_chapters values (0, 0, 10000)", "names", "facts", 0),
        ("insert into commands_chapters values (17, 0, 1)", "names", "commands", 0),
    ],
)
def test_what_is_not_as_it_was_written_is_found(
    statement: str, kind: str, log: str, position: int, program: Program, tmp_path: Path
) -> None:
    ended(program, tmp_path / "bus.db", "close")
    connection = apsw.Connection(str(tmp_path / "bus.db"))
    connection.execute(statement)
    connection.close()
    report = verify(tmp_path / "bus.db")
    assert not report.ok
    assert (kind, log, position) in [(finding.kind, finding.log, finding.position) for finding in report.findings]


async def test_a_log_that_forgot_commands_is_whole_and_so_are_its_copies(program: Program, tmp_path: Path) -> None:
    path, copy, new = tmp_path / "bus.db", tmp_path / "copy.db", tmp_path / "new.db"
    ended(program, path, "close")
    bus = await sqlite.open(path)
    whole = (await bus.commands.read()).entries
    for slot in range(0, SLOTS, 2):
        await bus.commands.forget("users", slot, 70, SystemClock().now())
    left = (await bus.commands.read()).entries
    assert left == [each for each in whole if each.position > 70 or slot_of(each.key) % 2]
    assert len(left) < len(whole)
    assert verify(path).findings == [], "while it is open"
    await bus.close()
    report = verify(path)
    assert report.ok
    assert (report.entries["commands"], report.heads["commands"]) == (len(left), len(whole))
    backup(path, copy)
    restore(copy, new, SystemClock().id())
    for each in (path, copy, new):
        assert verify(each).ok
        bus = await sqlite.open(each)
        assert [entry.checked() for entry in (await bus.commands.read()).entries] == left
        done = await bus.commands.append("users/1", [sealed("users/1", "Do", "new", Meta(1), b"{}")])
        assert done.position == len(whole) + 1
        await bus.close()
        assert verify(each).ok


def test_a_damaged_witness_is_a_finding_and_an_older_one_is_none(program: Program, tmp_path: Path) -> None:
    ended(program, tmp_path / "bus.db", "close")
    witness = witness_of(tmp_path / "bus.db")
    whole = witness.read_bytes()
    for number in (0, 20, 63):
        witness.write_bytes(whole[:number] + bytes([whole[number] ^ 16]) + whole[number + 1 :])
        assert kinds(verify(tmp_path / "bus.db")) == {"witness"}
    witness.write_bytes(b"")
    assert verify(tmp_path / "bus.db").ok


@pytest.mark.parametrize("content", [b"", b"not a database at all", bytes(8192), b"SQLite format 3\0" + bytes(5000)])
def test_what_never_was_a_log_is_refused_and_is_damaged_where_a_log_was(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    path.write_bytes(content)
    with pytest.raises(Refused, match="no Cauce log"):
        verify(path)
    path.with_name("bus.db.d").mkdir()
    assert not verify(path).ok
    assert path.read_bytes() == content


def test_broken_pages_and_cut_files_yield_a_report(program: Program, tmp_path: Path) -> None:
    ended(program, tmp_path / "bus.db", "kill")
    database, wal = files(tmp_path / "bus.db")
    witness = witness_of(tmp_path / "bus.db").read_bytes()
    chance = random.Random(3)
    for _ in range(60):
        parts = [bytearray(database), bytearray(wal)]
        part = chance.choice(parts)
        at = chance.randrange(len(part) // 4096) * 4096
        match chance.randrange(4):
            case 0:
                part[at : at + 4096] = bytes(4096)
            case 1:
                other = chance.randrange(len(part) // 4096) * 4096
                part[at : at + 4096] = part[other : other + 4096]
            case 2:
                del part[chance.randrange(len(part)) :]
            case 3:
                part[at : at + 400] = chance.randbytes(400)
        verify(put(tmp_path / "copy.db", bytes(parts[0]), bytes(parts[1]), witness))


def test_verify_of_no_file_is_refused_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no log"):
        verify(tmp_path / "bus.db")
    assert list(tmp_path.iterdir()) == []


def test_verify_reads_a_log_in_a_folder_where_nothing_may_be_written(program: Program, tmp_path: Path) -> None:
    """Root may write everywhere, so it becomes somebody else first, in a folder that this one can reach."""
    ended(program, tmp_path / "bus.db", "close")
    with tempfile.TemporaryDirectory() as closed:
        shutil.copy(tmp_path / "bus.db", closed)
        (Path(closed) / "bus.db").chmod(0o444)
        Path(closed).chmod(0o555)
        said, _ = program(LOOKER, f"{closed}/bus.db").communicate()
        assert said == "True 420\n"
        assert os.listdir(closed) == ["bus.db"]
        Path(closed).chmod(0o700)


# ----------------------------------------------------------------------------------------------------- beside writers


def test_a_log_that_is_being_written_is_whole_and_so_is_its_backup(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    writers = [program(WRITER, str(path), "go on") for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
    for number in range(4):
        report = verify(path)
        grown(path, report.entries["facts"])
        copied = backup(path, tmp_path / f"copy{number}.db")
        assert (report.findings, copied.findings) == ([], [])
        assert copied.entries["facts"] > report.entries["facts"]
        grown(path, copied.entries["facts"])
    for writer in writers:
        writer.kill()
        writer.wait()
    assert verify(path).findings == []


async def test_verify_and_backup_of_a_log_that_this_process_has_open_leave_it_working(tmp_path: Path) -> None:
    clock = SystemClock()
    bus = await sqlite.open(tmp_path / "bus.db")
    try:
        for n in range(3):
            await bus.facts.append("users/1", [sealed("users/1", "T", clock.id(), Meta(clock.now()), b"%d" % n)])
            assert verify(tmp_path / "bus.db").entries["facts"] == n + 1
            assert backup(tmp_path / "bus.db", tmp_path / f"copy{n}.db").entries["facts"] == n + 1
    finally:
        await bus.close()
    assert verify(tmp_path / "bus.db").ok


# -------------------------------------------------------------------------------------------- backup and restore


async def test_a_restored_log_has_the_same_entries_a_new_id_and_a_witness(program: Program, tmp_path: Path) -> None:
    path, copy, restored = tmp_path / "bus.db", tmp_path / "copy.db", tmp_path / "deep" / "er" / "bus.db"
    ended(program, path, "kill")
    before = await readable(path)
    assert backup(path, copy).ok
    id = SystemClock().id()
    assert restore(copy, restored, id).ok
    assert await readable(restored) == before
    report = verify(restored)
    assert (report.ok, report.id) == (True, id)
    assert len(witness_of(restored).read_bytes()) == 64
    bus = await sqlite.open(restored)
    try:
        assert bus.id == id
        assert (await bus.facts.append("users/1", [sealed("users/1", "T", id, Meta(1), b"1")])).position == 421
    finally:
        await bus.close()
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith("copy")) == ["copy.db"]


def test_a_backup_never_overwrites_and_leaves_nothing_when_it_fails(program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    ended(program, path, "close")
    copy.write_text("precious")
    with pytest.raises(Refused, match="never overwrites"):
        backup(path, copy)
    with pytest.raises(Refused, match="no folder"):
        backup(path, tmp_path / "nowhere" / "copy.db")
    with pytest.raises(Refused, match="no log"):
        backup(tmp_path / "nothing.db", tmp_path / "copy2.db")
    assert copy.read_text() == "precious"
    flip_fact(path, 5)
    with pytest.raises(Damaged, match="not whole"):
        backup(path, tmp_path / "copy2.db")
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("copy2")]


async def test_restore_keeps_what_it_replaces_and_asks_before(program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    ended(program, path, "kill")
    backup(path, copy)
    old = files(path)
    with pytest.raises(Refused, match="--force"):
        restore(copy, path, SystemClock().id())
    assert files(path)[0] == old[0]
    restore(copy, path, SystemClock().id(), force=True)
    assert files(tmp_path / "bus.db.before-1") == old
    assert verify(path).ok
    assert verify(tmp_path / "bus.db.before-1").ok
    restore(copy, path, SystemClock().id(), force=True)
    assert verify(tmp_path / "bus.db.before-2").ok


async def test_restore_over_a_log_without_entries_needs_no_force(program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    ended(program, path, "close")
    backup(path, copy)
    await (await sqlite.open(tmp_path / "new.db")).close()
    assert restore(copy, tmp_path / "new.db", SystemClock().id()).entries["facts"] == 420
    assert verify(tmp_path / "new.db").ok


def test_restore_ignores_the_wal_and_the_witness_of_a_log_that_was_removed(program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    ended(program, path, "kill")
    backup(path, copy)
    path.unlink()
    restore(copy, path, SystemClock().id())
    assert verify(path).findings == []


@pytest.mark.parametrize("force", [True, False])
def test_a_log_in_use_is_never_replaced(force: bool, program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    user = program(WRITER, str(path), "wait")
    assert user.stdout is not None
    assert user.stdout.readline() == "written\n"
    backup(path, copy)
    with pytest.raises(Busy, match=str(user.pid) if Path("/proc/locks").exists() else "in use|open"):
        restore(copy, path, SystemClock().id(), force=force)
    user.communicate()
    assert user.returncode == 0
    assert verify(path).ok


async def test_a_log_that_this_process_has_open_is_never_replaced(program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    ended(program, path, "close")
    backup(path, copy)
    bus = await sqlite.open(path)
    try:
        with pytest.raises(Busy, match="this process"):
            restore(copy, path, SystemClock().id(), force=True)
        await bus.facts.append("users/1", [sealed("users/1", "T", bus.id, Meta(1), b"1")])
    finally:
        await bus.close()


def test_a_damaged_backup_changes_nothing(program: Program, tmp_path: Path) -> None:
    path, copy = tmp_path / "bus.db", tmp_path / "copy.db"
    ended(program, path, "close")
    backup(path, copy)
    flip_fact(copy, 5)
    before = files(path)[0]
    with pytest.raises(Damaged, match="not whole"):
        restore(copy, path, SystemClock().id(), force=True)
    assert files(path)[0] == before
    with pytest.raises(Refused, match="no log"):
        restore(tmp_path / "nothing.db", path, SystemClock().id(), force=True)
    with pytest.raises(Refused, match="over itself"):
        restore(path, path, SystemClock().id(), force=True)


async def test_claims_are_released_by_a_restore_and_their_fences_rise(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    old = await bus.facts.claim("users/1", "somebody")
    await bus.close()
    backup(tmp_path / "bus.db", tmp_path / "copy.db")
    restore(tmp_path / "copy.db", tmp_path / "new.db", SystemClock().id())
    bus = await sqlite.open(tmp_path / "new.db")
    new = await bus.facts.claim("users/1", "another")
    await bus.close()
    assert new.fence > old.fence


def test_writers_go_on_while_a_backup_is_made(program: Program, tmp_path: Path) -> None:
    """A copy that is held up in the middle holds up nobody."""
    path = tmp_path / "bus.db"
    writer = program(WRITER, str(path), "go on")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    heads: list[int] = []

    def told(done: int, total: int) -> None:
        time.sleep(0.3)
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        heads.extend(row[0] for row in connection.execute("select max(position) from facts"))
        connection.close()

    report = backup(path, tmp_path / "copy.db", told=told)
    assert heads[-1] > report.entries["facts"]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert verify(path).findings == []
