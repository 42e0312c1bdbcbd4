"""Keeping a log in health: is it whole, a copy while it is written, and a copy put back in its place."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import apsw
import msgspec

from cauce.backends.sqlite.file import APPLICATION_ID, folder_of, translate
from cauce.backends.sqlite.part import flush, move, no_room, unfinished
from cauce.backends.sqlite.peek import looking, own_name, there, wal_of
from cauce.backends.sqlite.place import made, open_here, undisturbed, unused
from cauce.backends.sqlite.verify import Seen, check, witnessed
from cauce.backends.sqlite.verify import verify as read_all
from cauce.backends.sqlite.witness import Witness
from cauce.errors import CauceError, Damaged, Refused
from cauce.verify import LOGS, Finding, Report

__all__ = ["Finding", "Report", "backup", "restore", "verify"]

_STEP = 1000
_MARKS = (b"CREATE TABLE facts", b"facts_chapters")
_SCHEMA_BYTES = 65536
"""At the beginning of a file SQLite keeps the schema of a new database."""

Told = Callable[[int, int], None]
"""Told how many pages of how many are copied."""


def verify(path: Path) -> Report:
    """Read all of a log and say what is not as it was written. Never changes it, and does not stop those who write.

    It needs 300 bytes of memory a stream. While it runs, SQLite's WAL only
    grows. Raises `Refused` where there is no file that may be read, and for one that never was a Cauce log; damage of
    any kind is a finding.
    """
    path = own_name(path)
    there(path)
    _may_see(path)
    is_ours = _is_marked(path)
    if not is_ours and not folder_of(path).is_dir():
        raise Refused(f"{path} is no Cauce log: name another file")
    report = read_all(path)
    if is_ours or report.ok:
        return report
    # Something else lies where a log was: what it is not in detail says nothing more.
    return msgspec.structs.replace(report, findings=report.findings[:1], more=0)


def backup(path: Path, target: Path, *, told: Told | None = None) -> Report:
    """Copy a log while it is written to one file, as it was when the copying began, and verify the copy.

    Nobody who writes waits for it; the WAL only grows meanwhile. The copy appears under its name when it is verified.
    Raises `Refused` where there is no log or the target exists, `Damaged` if the copy is not whole, `StorageFull`.
    """
    path = own_name(path)
    _is_free(target)
    # What was seen before the copy begins must be in it.
    seen = _seen(path)
    with unfinished(target) as part:
        _copy(path, part, told)
        report = _whole(part, path, seen)
        move(part, target)
    return report


def restore(copy: Path, path: Path, id: str, *, force: bool = False, told: Told | None = None) -> Report:
    """Put a backup in the place of a log, under a new id, so that no place in the old log is mistaken for one in it.

    What was there is not deleted but kept beside it, as `<file>.before-1` and so on. Claims are released.

    Parameters:
        id: the new id, a UUID.
        force: also replace a log that holds entries, or a file that cannot be read.

    Raises `Busy` if the log is in use, with `force` or without; `Refused` if there is one with entries; `Damaged` if
    the backup is not whole; `StorageFull`. After each of them nothing has changed.
    """
    copy, path = own_name(copy), own_name(path)
    if copy == path:
        raise Refused(f"{copy} cannot be restored over itself: name another place with --bus")
    _may_go(path, force)
    with made(path.parent), unfinished(path) as part:
        _copy(copy, part, told)
        report = _whole(part, copy, _seen(copy))
        _rename_log(part, id)
        with made(folder_of(path)), unused(path), undisturbed():
            _put_aside(path)
            move(part, path)
            _witness(path, id, report)
    return report


# ---------------------------------------------------------------------------------------------------- what is there


def _is_marked(path: Path) -> bool:
    """Whether a part of the file says that it is a log, also where damage to a page keeps SQLite from reading it."""
    # What is open in this process must not be opened here: closing it again would drop the locks that SQLite holds.
    return open_here(path) or any(mark in _beginning(file) for file in (path, wal_of(path)) for mark in _MARKS)


def _beginning(file: Path) -> bytes:
    try:
        with file.open("rb") as raw:
            return raw.read(_SCHEMA_BYTES)
    except OSError:
        return b""


def _may_see(path: Path) -> None:
    """Raises `Refused` unless it may be known what the witness saw."""
    file = folder_of(path) / "witness"
    try:
        may = not file.exists() or os.access(file, os.R_OK | os.W_OK)
    except OSError:
        may = False
    if not may:
        raise Refused(f"{file} may not be opened: change the mode or owner of its folder, or run this as the owner")


def _seen(path: Path) -> Seen | None:
    _may_see(path)
    return witnessed(path)


# --------------------------------------------------------------------------------------------------------- the copy


def _copy(path: Path, part: Path, told: Told | None) -> None:
    with looking(path) as open:
        source = open()
        try:
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise no_room(error, part) from None
        if source.pragma("application_id") != APPLICATION_ID:
            raise Refused(f"{path} is no Cauce log: name another file")
        try:
            target = apsw.Connection(str(part), flags=apsw.SQLITE_OPEN_READWRITE)
            try:
                # It is flushed once, at the end, and thrown away if anything fails before.
                target.execute("pragma journal_mode = off; pragma synchronous = off")
                # While it reads, the source is seen as it was: otherwise each commit of others would start it anew.
                source.execute("begin")
                source.execute("select id from bus").fetchall()
                with target.backup("main", source, "main") as copying:
                    while not copying.done:
                        copying.step(_STEP)
                        if told is not None:
                            told(copying.page_count - copying.remaining, copying.page_count)
                # One file, which can be looked at and copied without leaving others beside it.
                target.execute("pragma journal_mode = delete")
            finally:
                target.close()
        except apsw.Error as error:
            raise translate(error, part if isinstance(error, (apsw.FullError, apsw.IOError)) else path) from error
    flush(part)


def _whole(part: Path, origin: Path, seen: Seen | None) -> Report:
    report = check(part, seen)
    if not report.ok:
        raise Damaged(
            f"{origin} is not whole, so its copy was thrown away: {report.findings[0].message}; run cauce verify"
        )
    return report


def _is_free(target: Path) -> None:
    """Raises `Refused` unless a file may be made there. A link counts as what it leads to, and is no free name."""
    own_name(target)
    try:
        if target.exists() or target.is_symlink():
            raise Refused(f"{target} exists: name another file, a backup never overwrites")
        if not target.parent.is_dir():
            raise Refused(f"there is no folder {target.parent}: make it first")
    except OSError as error:
        raise no_room(error, target) from None


# -------------------------------------------------------------------------------------------------------- the place


def _may_go(path: Path, force: bool) -> None:
    try:
        _may_see(path)
        is_there = path.exists()
    except OSError as error:
        raise no_room(error, path) from None
    if not is_there:
        return
    with unused(path):
        pass
    if not force and path.stat().st_size and _holds_entries(path):
        raise Refused(
            f"{path} exists and holds entries: pass --force to put it aside, or name another place with --bus"
        )


def _holds_entries(path: Path) -> bool:
    try:
        with looking(path) as open:
            connection = open()
            return any(connection.execute(f"select 1 from {log} limit 1").fetchall() for log in LOGS)
    except (apsw.Error, CauceError):
        # Damaged, or something else altogether: in either case somebody's data.
        return True


def _put_aside(path: Path) -> None:
    """Keep what is there under another name. The WAL goes first: SQLite would read it as a part of the new file."""
    number = 1
    while (aside := path.with_name(f"{path.name}.before-{number}")).exists() or wal_of(aside).exists():
        number += 1
    # Only an index, which SQLite makes anew.
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    for old, new in (
        (wal_of(path), wal_of(aside)),
        (path, aside),
        (folder_of(path) / "witness", folder_of(aside) / "witness"),
    ):
        if old.exists():
            new.parent.mkdir(mode=0o700, exist_ok=True)
            old.rename(new)


def _rename_log(part: Path, id: str) -> None:
    try:
        with apsw.Connection(str(part), flags=apsw.SQLITE_OPEN_READWRITE) as connection:
            connection.execute("update bus set id = ?", (id,))
            # Whoever held a name held it in another log; the fence rises, as with every change of holder.
            connection.execute("update claims set owner = '', fence = fence + 1, beat = 0")
        connection.close()
    except apsw.Error as error:
        raise translate(error, part) from error
    flush(part)


def _witness(path: Path, id: str, report: Report) -> None:
    witness = Witness(folder_of(path) / "witness")
    try:
        facts, commands, records = (report.heads[log] for log in LOGS)
        witness.write(uuid.UUID(id).bytes, (facts, commands, records))
    finally:
        witness.close()
