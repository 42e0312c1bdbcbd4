"""Opening a log only to look: nothing is written, no turn is taken, nobody is woken, and damage is no obstacle."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import quote

import apsw

from cauce.backends.sqlite.file import APPLICATION_ID, FORMAT, connect, folder_of, forget, guard, translate
from cauce.backends.sqlite.log import Reader, SQLiteLog
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.backends.sqlite.table import Names, Table
from cauce.backends.sqlite.wire import SocketWire, present
from cauce.backends.sqlite.writer import Writer
from cauce.clock import Clock, SystemClock
from cauce.errors import NoAnswer, Refused
from cauce.wire import Instance

__all__ = ["Peek", "looking", "own_name", "peek", "there", "wal_of"]

_READ_ONLY = apsw.SQLITE_OPEN_READONLY
_PRAGMAS = (
    "pragma query_only = on",
    "pragma trusted_schema = off",
    "pragma cell_size_check = on",
    "pragma cache_size = -65536",
    "pragma temp_store = memory",
)


def wal_of(path: Path) -> Path:
    """Where SQLite keeps what is committed and not yet in the database file."""
    return path.with_name(path.name + "-wal")


@contextmanager
def looking(path: Path) -> Iterator[Callable[[], apsw.Connection]]:
    """Gives a function that opens connections which can only read; they are closed at the end.

    Neither the database nor its WAL is changed. Beside a log that nobody has open an `-shm` file may be left, SQLite's
    index of the WAL. Raises `Refused` where there is no log, and what `translate` makes of SQLite's errors.
    """
    path = own_name(path)
    there(path)
    if not path.stat().st_size:
        # SQLite would delete the WAL beside an empty database.
        raise Refused(f"{path} is empty, no Cauce log: restore it from a backup, or name another file")
    with ExitStack() as opened:
        opened.callback(forget, guard(path))

        def open() -> apsw.Connection:
            connection = _open(path)
            opened.callback(connection.close)
            return connection

        yield open


def own_name(path: Path) -> Path:
    """The file by its own name, not a link's, because what lies beside it is named after that.

    Raises `Refused` for a name that is no text, which SQLite does not take, and for one that leads nowhere.
    """
    try:
        str(path).encode()
        return path.resolve()
    except UnicodeEncodeError:
        raise Refused(f"the name {str(path)!r} is not UTF-8: rename the file, or name another one") from None
    except (OSError, RuntimeError) as error:
        raise Refused(f"{path} leads nowhere: {error}: name another file") from None


def there(path: Path) -> None:
    """Raises `Refused` unless there is a file that may be read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(
            f"there is no log at {path}: name another with --bus, or let a service or an import make this one"
        ) from None
    except OSError as error:
        raise Refused(f"{path} cannot be reached: {error.strerror}: change the mode or owner of its folder") from None
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is no file: name another one")
    if not os.access(path, os.R_OK):
        raise Refused(f"{path} may not be read: change its mode or owner")


def _open(path: Path) -> apsw.Connection:
    try:
        try:
            return _set_up(connect(path, flags=_READ_ONLY, busy=5.0))
        except (apsw.CantOpenError, apsw.ReadOnlyError):
            if os.access(path.parent, os.W_OK) or any(
                beside.exists() and beside.stat().st_size for beside in _beside(path)
            ):
                raise
            # SQLite wants to make its -shm file, which it cannot here. Nor can a writer: so the file stands still.
            address = f"file:{quote(str(path))}?immutable=1"
            return _set_up(connect(Path(address), flags=_READ_ONLY | apsw.SQLITE_OPEN_URI))
    except apsw.Error as error:
        raise translate(error, path) from error


def _beside(path: Path) -> tuple[Path, Path]:
    return wal_of(path), path.with_name(path.name + "-journal")


def _set_up(connection: apsw.Connection) -> apsw.Connection:
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        for pragma in _PRAGMAS:
            connection.execute(pragma)
        connection.execute("select count(*) from sqlite_schema").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


class _Nobody:
    """Who writes when one only looks."""

    def submit(self, *arguments: Any, **options: Any) -> NoReturn:
        raise Refused("this log was opened only to look: open it with open_backend to write")


class Peek:
    """The logs `facts`, `commands` and `records` of a file, to be read and nothing else."""

    facts: SQLiteLog
    commands: SQLiteLog
    records: SQLiteLog

    def __init__(self, path: Path, connection: apsw.Connection, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self.stores = SQLiteStores(folder_of(path.resolve()), clock)
        reader = Reader(connection, path)
        with reader:
            if connection.pragma("application_id") != APPLICATION_ID or connection.pragma("user_version") != FORMAT:
                raise Refused(f"{path} is no Cauce log of format {FORMAT}: name another file")
            row: Any = connection.execute("select id from bus").fetchone()
        self.id: str = row[0] if row else ""
        names = Names(connection)
        tables = (Table(connection, names, log, last=log == "records") for log in ("facts", "commands", "records"))
        self.facts, self.commands, self.records = (
            SQLiteLog(f"{self.id}:{table.name}", table, cast(Writer, _Nobody()), reader) for table in tables
        )

    async def instances(self) -> list[Instance]:
        """Who runs on it now. Raises `Refused` if that may not be known."""
        return present(self._path, self._clock)

    async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
        """Ask who runs on it. Nothing is left behind, and nothing made where nobody has run."""
        if not (folder_of(self._path.resolve()) / "wire").is_dir():
            raise NoAnswer(f"nobody serves {address}: nothing runs on {self._path}")
        wire = SocketWire(self._path, self._clock)
        try:
            return await wire.ask(address, payload, deadline)
        finally:
            await wire.close()


@contextmanager
def peek(path: Path, clock: Clock | None = None) -> Iterator[Peek]:
    """The logs of a file as they are now and become while one looks.

    Raises `Refused` where there is no log, and `Damaged` where SQLite cannot make sense of the file.
    """
    with looking(path) as open:
        yield Peek(path, open(), clock or SystemClock())
