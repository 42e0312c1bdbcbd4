"""A derived file: where it lies, which of several is live, the place that it holds, and how it is read."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import apsw

from cauce.backends.sqlite.file import connect, translate
from cauce.errors import CauceError, Damaged, Refused, Unavailable
from cauce.sql import Row

__all__ = ["DerivedFile", "Files", "Lock", "Reading", "Unusable", "in_thread"]

_log = logging.getLogger("cauce")
_WRITE = apsw.SQLITE_OPEN_READWRITE
_CHECKPOINT = 16_000
_NAME = re.compile(r"([1-9][0-9]{0,17})\.db\Z")

_PLACE = "create table cauce_place (log text not null, position integer not null, fingerprint text not null)"

_FORBIDDEN = {
    apsw.SQLITE_TRANSACTION, apsw.SQLITE_SAVEPOINT, apsw.SQLITE_ATTACH, apsw.SQLITE_DETACH, apsw.SQLITE_PRAGMA,
}  # fmt: skip

T = TypeVar("T")
Stamp = tuple[int, int] | None


class Unusable(Exception):
    """A derived file that is missing, truncated or cannot be read: it is built anew."""


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run it in a thread. Who gives up waiting waits until the thread is done: a connection serves one at a time."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise


class Lock:
    """Who alone may do something, in any process of this machine; the kernel lets go of what a dead one held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number: int | None = None

    @property
    def held(self) -> bool:
        return self._number is not None

    def take(self) -> bool:
        """Whether it is ours now. Raises `Refused` where its folder cannot be written."""
        if self._number is None:
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise Refused(
                    f"{self._path} cannot be made: {error.strerror}: make room, or change the mode or owner of its folder"
                ) from None
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(number)
                return False
            self._number = number
        return True

    def release(self) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None


class Files:
    """The folder of one view or replica: numbered files, and a note that says which of them is live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._note = folder / "live"

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.db"

    def numbers(self) -> list[int]:
        """Which files there are, the oldest first."""
        with suppress(FileNotFoundError):
            return sorted(int(found[1]) for name in os.listdir(self.folder) if (found := _NAME.match(name)))
        return []

    def live(self) -> int:
        """The number of the file that is read; 0 if there is none."""
        try:
            text = self._note.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return 0
        except (OSError, UnicodeDecodeError):
            text = "?"
        if not _NAME.match(f"{text}.db"):
            _log.warning("%s is not the number of a file: it is written anew", self._note)
            return 0
        return int(text)

    def stamp(self) -> Stamp:
        """Something that is another after each switch; one look at the file system."""
        try:
            found = os.stat(self._note)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def switch(self, number: int) -> None:
        """Let this file be the live one. After a crash at any moment it is the old one or this."""
        new = self.folder / "live.new"
        with open(new, "w", encoding="ascii") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._note)
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, numbers: Sequence[int]) -> None:
        """Who has one of them open reads on in it."""
        for number in numbers:
            for end in ("", "-wal", "-shm"):
                with suppress(OSError):
                    os.unlink(f"{self.path(number)}{end}")


class _Guard:
    """While others' statements run, none of them may end the transaction, or reach other files or settings."""

    closed = False

    def __call__(self, what: int, *details: str | None) -> int:
        return apsw.SQLITE_DENY if self.closed and what in _FORBIDDEN else apsw.SQLITE_OK


class DerivedFile:
    """The connection that writes one derived file, and how far that file is."""

    def __init__(self, path: Path, connection: apsw.Connection, log: str, position: int, fingerprint: str) -> None:
        self.path, self.connection = path, connection
        self.log, self.position, self.fingerprint = log, position, fingerprint
        self._guard = connection.authorizer = _Guard()

    @classmethod
    def create(cls, path: Path, schema: str, log: str, fingerprint: str) -> DerivedFile:
        """Make it, with its tables, at the beginning of the log."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = connect(path, flags=_WRITE | apsw.SQLITE_OPEN_CREATE, busy=5.0)
        try:
            path.chmod(0o600)
            _set_up(connection)
            with connection:
                connection.execute(_PLACE)
                connection.execute(schema)
                connection.execute("insert into cauce_place values (?, 0, ?)", (log, fingerprint))
        except apsw.Error as error:
            connection.close()
            raise translate(error, path) from error
        return cls(path, connection, log, 0, fingerprint)

    @classmethod
    def open(cls, path: Path) -> DerivedFile:
        """Open what is there. Raises `Unusable` for what is not there or cannot be read."""
        if not path.is_file():
            raise Unusable(f"{path} is missing")
        try:
            connection = connect(path, flags=_WRITE, busy=5.0)
        except (Damaged, Refused) as error:
            raise Unusable(str(error)) from None
        try:
            _set_up(connection)
            row: Any = connection.execute("select log, position, fingerprint from cauce_place").fetchone()
            log, position, fingerprint = row or (None, None, None)
        except apsw.Error as error:
            connection.close()
            told = translate(error, path)
            if isinstance(told, Unavailable):
                raise told from error
            raise Unusable(f"{path}: {error}") from None
        if not (isinstance(log, str) and isinstance(position, int) and isinstance(fingerprint, str)):
            connection.close()
            raise Unusable(f"{path} holds no place")
        return cls(path, connection, log, position, fingerprint)

    def write(self, position: int, change: Callable[[], int | None]) -> int:
        """In one transaction, what `change` does and the place: the one that it returns, else `position`."""
        execute = self.connection.execute
        execute("begin immediate")
        try:
            self._guard.closed = True
            try:
                position = change() or position
            finally:
                self._guard.closed = False
            execute("update cauce_place set position = ?", (position,))
            # No statement of others reads like this one, which SQLite's cache hands out without asking the guard.
            execute("commit /* with its place */")
        except BaseException:
            if self.connection.in_transaction:
                execute("rollback")
            raise
        self.position = position
        return position

    def close(self) -> None:
        self.connection.close()


def _set_up(connection: apsw.Connection) -> None:
    # It holds its own place: what a power loss takes from its end is read again.
    connection.execute("pragma synchronous = normal")
    connection.execute(f"pragma wal_autocheckpoint = {_CHECKPOINT}")


class Reading:
    """Reads the live file, through as many connections as there are readers at a time."""

    def __init__(self, what: str, files: Files) -> None:
        self._what, self._files = what, files
        self._idle: list[apsw.Connection] = []
        self._stamp: Stamp = None
        self._least = 0
        self._lock = threading.Lock()
        self._closed = False

    async def fetch(self, sql: str, params: Row = ()) -> list[Row]:
        """The rows of a query, as last committed. Raises `Refused` for what is no query."""
        return await in_thread(self.rows, sql, params)

    def rows(self, sql: str, params: Row = ()) -> list[Row]:
        """The same, in this thread."""
        connection, stamp = self._take()
        try:
            return connection.execute(sql, params).fetchall()
        except apsw.Error as error:
            raise self._told(error, sql) from error
        except (TypeError, OverflowError) as error:
            raise Refused(f"{self._what}: {error}: pass text, numbers, bytes or None for each ?, in {sql!r}") from None
        finally:
            self._give(connection, stamp)

    def reached(self, position: int) -> None:
        """Somebody was told that what is read holds all up to a position: no file is read that holds less."""
        self._least = max(self._least, position)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _told(self, error: apsw.Error, sql: str) -> CauceError:
        if isinstance(
            error, (apsw.SQLError, apsw.BindingsError, apsw.ReadOnlyError, apsw.MismatchError, apsw.RangeError)
        ):
            return Refused(f"{self._what}: {error}: mend the query {sql!r}")
        return translate(error, self._what)

    def _take(self) -> tuple[apsw.Connection, Stamp]:
        stamp = self._files.stamp()
        with self._lock:
            old: list[apsw.Connection] = []
            if stamp != self._stamp and (not self._idle or self._is_ahead()):
                old, self._idle, self._stamp = self._idle, [], stamp
            stamp = self._stamp
            found = self._idle.pop() if self._idle else None
        for connection in old:
            connection.close()
        return found or self._open(), stamp

    def _give(self, connection: apsw.Connection, stamp: Stamp) -> None:
        with self._lock:
            keep = not self._closed and stamp == self._stamp
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def _is_ahead(self) -> bool:
        """Whether the file that has become live holds what was promised of the one before: it may lag a moment."""
        connection = self._open()
        try:
            row: Any = connection.execute("select position from cauce_place").fetchone()
            return row is not None and int(row[0]) >= self._least
        finally:
            connection.close()

    def _open(self) -> apsw.Connection:
        number = 0
        for _ in range(3):
            # Between the look at the note and the opening the file may have given way to a newer one.
            before, number = number, self._files.live()
            if not number or number == before:
                break
            with suppress(Refused):
                return connect(self._files.path(number), flags=apsw.SQLITE_OPEN_READONLY, busy=5.0)
        if number:
            raise Unavailable(
                f"{self._what}: {self._files.path(number)} cannot be opened: it is built anew at the next start"
            )
        raise Unavailable(f"{self._what} is not built yet: run its service, or wait")
