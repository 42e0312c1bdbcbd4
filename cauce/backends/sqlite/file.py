"""Opening a database file: what it must be, how it is set up, and who else in this process must keep off it."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import apsw

from cauce.errors import Busy, CauceError, Damaged, Refused, StorageFull

__all__ = [
    "APPLICATION_ID",
    "SCHEMA",
    "Inode",
    "connect",
    "create",
    "extended",
    "folder_of",
    "forget",
    "guard",
    "translate",
]

APPLICATION_ID = 0x43617563
FORMAT = 2

_ENTRIES = """create table {0} (
    position integer primary key, stream integer not null, version integer not null, previous integer not null,
    type integer not null, id text not null, meta blob not null, wish blob, body blob not null, digest integer not null)"""

_CHAPTERS = """create table {0}_chapters (
    stream integer, chapter integer, position integer not null, primary key (stream, chapter)) without rowid"""

SCHEMA = (
    "create table bus (id text not null)",
    "create table streams (id integer primary key, name text not null)",
    "create unique index streams_name on streams (name)",
    "create table types (id integer primary key, domain text not null, name text not null)",
    "create table claims (log text, name text, owner text not null, fence integer not null, beat integer not null, primary key (log, name)) without rowid",
    *(_ENTRIES.format(log) for log in ("facts", "commands", "records")),
    _CHAPTERS.format("facts"),
    _CHAPTERS.format("commands"),
    "create unique index records_stream on records (stream)",
    "create index facts_id on facts (id)",
    "create index commands_id on commands (id)",
)
"""The whole schema, statement by statement. `stream % 16` is the slot; rowid is the position, so a scan is in order.

How a stream is found in a log that keeps all is told in `chain`.
"""

_PRAGMAS = (
    "pragma journal_mode = wal",
    "pragma synchronous = full",
    "pragma wal_autocheckpoint = 0",
    "pragma cache_size = -65536",
    "pragma temp_store = memory",
    "pragma trusted_schema = off",
)

_NO_ROOM = {apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_SHMSIZE, apsw.SQLITE_IOERR_TRUNCATE}
"""What a quota, a limit on the size of files, or a memory file system says in the place of "disk full"."""

Inode = tuple[int, int]
"""Device and inode: what a file is, whatever name it is called by."""

_guarded: dict[Inode, int] = {}
_inherited: set[Inode] = set()
_lock = threading.Lock()
_hooked = False


def folder_of(path: Path) -> Path:
    """The folder beside the database: locks, witness, sockets, stores."""
    return path.with_name(path.name + ".d")


def connect(path: Path, *, flags: int = apsw.SQLITE_OPEN_READWRITE, busy: float = 0.0) -> apsw.Connection:
    """A connection set up as every other. Waits `busy` seconds for programs that lock without asking for a turn."""
    try:
        connection = apsw.Connection(str(path), flags=flags)
        connection.set_busy_timeout(round(busy * 1000))
        if not flags & apsw.SQLITE_OPEN_READONLY:
            for pragma in _PRAGMAS:
                connection.execute(pragma)
    except apsw.Error as error:
        raise translate(error, path) from error
    return connection


def create(path: Path, id: str) -> Inode:
    """Make the file, private to its user, if it is not there; refuse what is there and is no Cauce log.

    Guards it, too: whoever gets the answer has to `forget` it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            # Never opens a file that is there: closing it again would drop the locks that SQLite holds in this process.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not path.is_file():
            raise Refused(f"{path} is no file: name another one")
        if not os.access(path, os.R_OK | os.W_OK):
            raise Refused(f"{path} may not be written: change its mode or owner, or open another file")
        inode = guard(path)
    except OSError as error:
        raise Refused(
            f"{path} cannot be made or written: {error.strerror}: change its mode or owner, or name another file"
        ) from None
    try:
        _create(path, id)
        folder_of(path).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        forget(inode)
        raise Refused(f"{folder_of(path)}, which a log needs beside it, cannot be made: {error.strerror}") from None
    except BaseException:
        forget(inode)
        raise
    return inode


def _create(path: Path, id: str) -> None:
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        connection.set_busy_timeout(5000)
        try:
            _make(connection, id)
            if connection.pragma("application_id") != APPLICATION_ID:
                raise Refused(f"{path} is an SQLite database, but no Cauce log: name another file")
            version = connection.pragma("user_version")
            if version != FORMAT:
                raise Refused(f"{path} has format {version}, this Cauce knows {FORMAT}: use the version that wrote it")
        finally:
            connection.close()
    except apsw.Error as error:
        raise translate(error, path) from error


def _make(connection: apsw.Connection, id: str) -> None:
    """Make the tables, unless they are there. One maker may have been killed between the two steps, and is followed."""
    for patience in reversed(range(500)):
        try:
            if _is_new(connection):
                connection.pragma("journal_mode", "wal")
                connection.execute("begin immediate")
                if _is_new(connection):
                    connection.pragma("application_id", APPLICATION_ID)
                    connection.pragma("user_version", FORMAT)
                    for statement in SCHEMA:
                        connection.execute(statement)
                    connection.execute("insert into bus values (?)", (id,))
                connection.execute("commit")
            return
        except apsw.BusyError:
            # Of two that change the journal's mode at once SQLite refuses one without waiting.
            if not patience or connection.in_transaction:
                raise
            threading.Event().wait(0.01)


def _is_new(connection: apsw.Connection) -> bool:
    (tables,) = connection.execute("select count(*) from sqlite_schema").fetchone() or (0,)
    return not tables and connection.pragma("application_id") == 0 and connection.pragma("user_version") == 0


def translate(error: apsw.Error, path: Path | str) -> CauceError:
    """SQLite's errors as ours, by what the caller can do about them."""
    if isinstance(error, apsw.FullError) or (isinstance(error, apsw.IOError) and extended(error) in _NO_ROOM):
        return StorageFull(f"{path}: the disk took no more ({error}); nothing was written: make room, then try again")
    if isinstance(error, (apsw.BusyError, apsw.LockedError)):
        return Busy(f"{path} is locked by a program that is not Cauce ({error}): close it, then try again")
    if isinstance(error, apsw.NotADBError):
        return Refused(f"{path} is no Cauce log, nor any SQLite database: name another file")
    if isinstance(error, (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError)):
        return Refused(f"{path} may not be written or opened ({error}): change its mode or owner, or name another file")
    if isinstance(error, apsw.ConnectionClosedError):
        return Refused(f"{path} is closed: open it again")
    return Damaged(f"{path}: {error}; run cauce verify, and restore from a backup if it finds damage")


def extended(error: apsw.Error) -> int:
    """SQLite's finer code of an error."""
    return int(getattr(error, "extendedresult", 0))


def guard(path: Path) -> Inode:
    """Keep stdlib `sqlite3` off this file in this process: closing its descriptor would drop SQLite's POSIX locks."""
    global _hooked
    inode = _inode(path)
    with _lock:
        if not _hooked:
            sys.addaudithook(_refuse_stdlib)
            os.register_at_fork(after_in_child=_inherit)
            _hooked = True
        if inode in _inherited:
            raise Refused(
                f"{path} was open when this process was forked, and SQLite would go on with locks it no longer has: "
                "close it before the fork, or start the process anew (spawn instead of fork)"
            )
        if inode not in _guarded and _already_open(inode):
            raise Refused(f"{path} is already open in this process through another library: close it there first")
        _guarded[inode] = _guarded.get(inode, 0) + 1
    return inode


def forget(inode: Inode) -> None:
    """The opposite of `guard`, once for each."""
    with _lock:
        left = _guarded.get(inode, 0) - 1
        if left > 0:
            _guarded[inode] = left
        else:
            _guarded.pop(inode, None)


def _inherit() -> None:
    """A forked child has SQLite's memory of the locks, but not the locks: what it opens reads without any (tried)."""
    global _lock
    _lock = threading.Lock()
    _inherited.update(_guarded)
    _guarded.clear()


def _inode(path: Path | str) -> Inode:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _already_open(inode: Inode) -> bool:
    try:
        links = os.listdir("/proc/self/fd")
    except OSError:
        return False
    for link in links:
        try:
            if _inode(f"/proc/self/fd/{link}") == inode:
                return True
        except OSError:
            continue
    return False


def _refuse_stdlib(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "sqlite3.connect" or not _guarded:
        return
    name = arguments[0]
    if not isinstance(name, (str, bytes, os.PathLike)):
        return
    name = os.fsdecode(name)
    # Whether it is meant as a URI is not told here, so it is looked at as both.
    for path in (name, unquote(urlsplit(name).path)) if name.startswith("file:") else (name,):
        try:
            inode = _inode(path)
        except (OSError, ValueError):
            continue
        if inode in _guarded:
            raise Refused(
                f"{path} is open as a Cauce log in this process: read it with bus.facts.read, or in another process"
            )
