"""Builds of a view or replica as files in a folder: see `cauce.shelf` for what each method promises."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw

from cauce.backends.sqlite.file import connect, translate
from cauce.errors import CauceError, Damaged, Refused, Unavailable
from cauce.shelf import Build, Part, Unusable, Wrong
from cauce.sql import Row, Run
from cauce.threads import in_thread

__all__ = ["FileLock", "FolderOfBuilds", "SQLiteShelf"]

_log = logging.getLogger("cauce")
_WRITE = apsw.SQLITE_OPEN_READWRITE
_CHECKPOINT = 16_000
_NAME = re.compile(r"([1-9][0-9]{0,17})\.db\Z")

_PLACE = "create table cauce_place (log text not null, position integer not null, fingerprint text not null)"

_FORBIDDEN = {
    apsw.SQLITE_TRANSACTION, apsw.SQLITE_SAVEPOINT, apsw.SQLITE_ATTACH, apsw.SQLITE_DETACH, apsw.SQLITE_PRAGMA,
}  # fmt: skip

Stamp = tuple[int, int] | None


class SQLiteShelf:
    """A folder for each view and replica of a service. Nothing is made before one is built."""

    dialect = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lead = FileLock(folder / "leader.lock")

    def builds(self, name: str, what: str) -> FolderOfBuilds:
        return FolderOfBuilds(self._folder / name, what)

    async def names(self) -> list[str]:
        return [path.name for path in sorted(self._folder.glob("*/")) if await self.builds(path.name, "").numbers()]

    def check(self, what: str, tables: str) -> None:
        connection = apsw.Connection(":memory:")
        try:
            connection.execute(_PLACE)
            with connection:
                connection.execute(tables)
        except apsw.Error as error:
            raise Refused(f"{what}: its schema is refused by SQLite: {error}") from None
        finally:
            connection.close()


class FileLock:
    """A lock that the kernel takes from a dead process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number: int | None = None

    @property
    def held(self) -> bool:
        return self._number is not None

    async def take(self) -> bool:
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

    async def lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def release(self) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None


class FolderOfBuilds:
    """Numbered files, and a note that says which of them is live."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.place = folder, str(folder)
        self._note = folder / "live"
        self.reading = _Reading(what, self)
        self.building = FileLock(folder / "build.lock")

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.db"

    async def numbers(self) -> list[int]:
        with suppress(FileNotFoundError):
            return sorted(int(found[1]) for name in os.listdir(self.folder) if (found := _NAME.match(name)))
        return []

    async def live(self) -> int:
        return self.noted()

    def noted(self) -> int:
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
        """One look at the file system."""
        try:
            found = os.stat(self._note)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    async def open(self, number: int) -> FileBuild:
        return await in_thread(FileBuild.open, self.path(number), number)

    async def create(self, number: int, tables: str, log: str, fingerprint: str) -> FileBuild:
        return await in_thread(FileBuild.create, self.path(number), number, tables, log, fingerprint)

    async def switch(self, build: Build) -> None:
        try:
            await in_thread(self._switch, build.number)
        except OSError as error:
            raise Unavailable(f"{self.folder} cannot be written: {error}") from None

    def _switch(self, number: int) -> None:
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

    async def hold(self) -> FileBuild | None:
        with suppress(Unusable):
            build = await self.open(self.noted())
            try:
                await in_thread(build.hold)
            except BaseException:
                await build.close()
                raise
            return build
        return None

    async def remove(self, numbers: Iterable[int]) -> None:
        """Who has one of them open reads on in it."""
        for number in numbers:
            for end in ("", "-wal", "-shm"):
                with suppress(OSError):
                    os.unlink(f"{self.path(number)}{end}")

    async def clear(self) -> None:
        # Whoever reads looks at the note first.
        self._note.unlink(missing_ok=True)
        await self.remove(await self.numbers())


class _Guard:
    """While others' statements run, none of them may end the transaction, or reach other files or settings."""

    closed = False

    def __call__(self, what: int, *details: str | None) -> int:
        return apsw.SQLITE_DENY if self.closed and what in _FORBIDDEN else apsw.SQLITE_OK


class FileBuild:
    """The connection that writes one file, and how far that file is."""

    def __init__(
        self, path: Path, number: int, connection: apsw.Connection, log: str, position: int, fingerprint: str
    ) -> None:
        self.place, self.number = str(path), number
        self.log, self.position, self.fingerprint = log, position, fingerprint
        self._path, self._connection = path, connection
        self._guard = connection.authorizer = _Guard()

    @classmethod
    def create(cls, path: Path, number: int, tables: str, log: str, fingerprint: str) -> FileBuild:
        """Make it, with its tables, at the beginning of the log."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = connect(path, flags=_WRITE | apsw.SQLITE_OPEN_CREATE, busy=5.0)
        try:
            path.chmod(0o600)
            _set_up(connection)
            with connection:
                connection.execute(_PLACE)
                connection.execute(tables)
                connection.execute("insert into cauce_place values (?, 0, ?)", (log, fingerprint))
        except apsw.Error as error:
            connection.close()
            raise translate(error, path) from error
        return cls(path, number, connection, log, 0, fingerprint)

    @classmethod
    def open(cls, path: Path, number: int) -> FileBuild:
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
        return cls(path, number, connection, log, position, fingerprint)

    async def write(self, parts: Iterable[Part]) -> int:
        return await in_thread(self._write, parts)

    def _write(self, parts: Iterable[Part]) -> int:
        position, done = self.position, [0]
        try:
            self._execute("begin immediate")
            try:
                self._guard.closed = True
                try:
                    for upto, runs in parts:
                        for run in runs:
                            self._run(run, done)
                        position = upto
                finally:
                    self._guard.closed = False
                self._execute("update cauce_place set position = ?", (position,))
                # No statement of others reads like these, which apsw's cache hands out without asking the guard.
                self._execute("commit /* with its place */")
            except BaseException:
                if self._connection.in_transaction:
                    self._execute("rollback /* and its place */")
                raise
        except apsw.Error as error:
            raise _told(error, self._path) from error
        self.position = position
        return position

    def _run(self, run: Run, done: list[int]) -> None:
        sql, many = run
        try:
            # What follows a statement with rows is run when these are taken.
            for _ in self._execute(sql, many[0]) if len(many) == 1 else self._connection.executemany(sql, many):
                pass
        except apsw.AuthError as error:
            words = "may not begin or end a transaction, attach a file or set a pragma"
            raise Wrong(done[0], f"{words}, in {sql!r}") from error
        except (apsw.FullError, apsw.BusyError, apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError):
            raise
        except Exception as error:
            raise Wrong(done[0], f"{error}, in {sql!r}") from error
        done[0] += 1

    def hold(self) -> None:
        """Nobody else writes it from now on, until it is closed."""
        try:
            self._execute("begin immediate")
        except apsw.Error as error:
            raise translate(error, self._path) from error

    def _execute(self, sql: str, params: Any = None) -> Any:
        return self._connection.execute(sql, params)

    async def close(self) -> None:
        with suppress(apsw.Error):
            # It may be broken, and is not needed any more.
            self._connection.close()


def _told(error: apsw.Error, path: Path) -> Exception:
    if isinstance(error, (apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError)):
        return Unusable(str(error))
    told = translate(error, path)
    if isinstance(error, apsw.IOError) and not isinstance(told, Unavailable):
        return Unusable(str(error))
    return told


def _set_up(connection: apsw.Connection) -> None:
    # It holds its own place: what a power loss takes from its end is read again.
    connection.execute("pragma synchronous = normal")
    connection.execute(f"pragma wal_autocheckpoint = {_CHECKPOINT}")


class _Reading:
    """Reads the live file, through as many connections as there are readers at a time."""

    def __init__(self, what: str, files: FolderOfBuilds) -> None:
        self._what, self._files = what, files
        self._idle: list[apsw.Connection] = []
        self._stamp: Stamp = None
        self._least = 0
        self._lock = threading.Lock()
        self._closed = False

    async def fetch(self, sql: str, params: Row = ()) -> list[Row]:
        return await in_thread(self._rows, sql, params)

    async def rows(self, sql: str, params: Row = ()) -> list[Row]:
        # One row by its key takes less time than to tell a thread of it.
        return self._rows(sql, params)

    async def position(self) -> int:
        ((position,),) = await in_thread(self._rows, "select position from cauce_place")
        return int(position)

    def _rows(self, sql: str, params: Row = ()) -> list[Row]:
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
        self._least = max(self._least, position)

    async def close(self) -> None:
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
            before, number = number, self._files.noted()
            if not number or number == before:
                break
            with suppress(Refused):
                return connect(self._files.path(number), flags=apsw.SQLITE_OPEN_READONLY, busy=5.0)
        if number:
            raise Unavailable(
                f"{self._what}: {self._files.path(number)} cannot be opened: it is built anew at the next start"
            )
        raise Unavailable(f"{self._what} is not built yet: run its service, or wait")
