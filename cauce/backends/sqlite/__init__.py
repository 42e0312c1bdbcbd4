"""The embedded default: three logs in one SQLite file, written by any number of processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import apsw

from cauce.backends.health import Health
from cauce.backends.sqlite.file import connect, create, folder_of, forget, guard
from cauce.backends.sqlite.health import health_of
from cauce.backends.sqlite.log import Reader, SQLiteLog
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.backends.sqlite.table import Names, Table
from cauce.backends.sqlite.turnstile import Turnstile
from cauce.backends.sqlite.wake import Wake
from cauce.backends.sqlite.wire import SocketWire
from cauce.backends.sqlite.witness import Witness
from cauce.backends.sqlite.writer import Writer
from cauce.clock import Clock, SystemClock
from cauce.errors import Damaged

__all__ = ["SQLiteBus", "open"]


class _Journal:
    """The three tables of one file, as the writer sees them."""

    def __init__(
        self, id: str, witness: Witness, wake: Wake, told: Callable[[list[list[tuple[object, ...]]]], None]
    ) -> None:
        self._id = uuid.UUID(id).bytes
        self._witness, self._wake, self._told = witness, wake, told
        self._seen = -1

    def open(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.names = Names(connection)
        self.tables = tuple(
            Table(connection, self.names, name, last=name == "records") for name in ("facts", "commands", "records")
        )

    def begin(self) -> None:
        (version,) = self._connection.execute("pragma data_version").fetchone() or (0,)
        others = version != self._seen
        if others:
            self.names.doubt()
            self._seen = version
        for table in self.tables:
            table.begin(others=others)

    def flush(self) -> None:
        for table in self.tables:
            table.flush()

    def is_due(self) -> bool:
        (version,) = self._connection.execute("pragma data_version").fetchone() or (0,)
        return any(table.is_due(others=version != self._seen) for table in self.tables)

    def committed(self) -> Callable[[], None]:
        facts, commands, records = self.tables
        rows = [table.committed() for table in self.tables]
        if any(rows):
            # What is committed stays so: a full disk here leaves the witness older than it could be, which is no harm.
            with suppress(OSError):
                self._witness.write(self._id, (facts.position, commands.position, records.position))
            with suppress(OSError):
                # They look for themselves, only later.
                self._wake.tell()
        return lambda: self._told(rows)

    def rolled_back(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.names.forget()
        for table in self.tables:
            table.forget()


class SQLiteBus:
    """The logs `facts`, `commands` and `records`, and the `wire`, of one file."""

    facts: SQLiteLog
    commands: SQLiteLog
    records: SQLiteLog
    wire: SocketWire

    def __init__(self, path: Path, clock: Clock, patience: float) -> None:
        # By its own name, not a link's: else its locks, its witness and SQLite's WAL would lie in two places.
        self.path, self._clock, self._patience, self._pid = path.resolve(), clock, patience, os.getpid()

    async def _open(self) -> None:
        path, clock, folder = self.path, self._clock, folder_of(self.path)
        with ExitStack() as undo, ExitStack() as threads:
            undo.callback(forget, create(path, clock.id()))
            # SQLite's locks hang on the file while any connection of ours is open; the thread's may be the last.
            threads.callback(forget, guard(path))
            reader = Reader(connect(path, busy=self._patience), path)
            undo.callback(reader.connection.close)
            self.id: str
            (self.id,) = reader.connection.execute("select id from bus").fetchone() or ("",)
            witness = Witness(folder / "witness")
            threads.callback(witness.close)
            self._compare(witness, reader)
            wake = Wake(folder / "wake", f"{os.getpid()}-{clock.id()[-12:]}", clock)
            threads.callback(wake.close)
            turnstile = Turnstile(folder)
            threads.callback(turnstile.close)
            journal = _Journal(self.id, witness, wake, self._told)
            self._writer = Writer(path, turnstile, journal, clock, self._patience, threads.pop_all().close)
            undo.callback(self._writer.stop)
            await self._writer.start()
            self._connection = reader.connection
            self.facts, self.commands, self.records = (
                SQLiteLog(f"{self.id}:{table.name}", table, self._writer, reader) for table in journal.tables
            )
            undo.callback(wake.deafen)
            wake.listen(lambda: self._told(None))
            self.wire = SocketWire(path, clock)
            self._undo = undo.pop_all()

    def _compare(self, witness: Witness, reader: Reader) -> None:
        seen = witness.read()
        if seen is None:
            return
        heads = [
            (reader.connection.execute(f"select coalesce(max(position), 0) from {log}").fetchone() or (0,))[0]
            for log in ("facts", "commands", "records")
        ]
        if seen[0] != uuid.UUID(self.id).bytes:
            raise Damaged(f"{self.path} is not the log its witness saw: it was replaced; restore with cauce restore")
        if any(head < before for head, before in zip(heads, seen[1], strict=True)):
            raise Damaged(
                f"{self.path} ends at {heads}, but its witness saw {list(seen[1])}: entries are lost; keep the files, run cauce verify, restore from a backup"
            )

    def _told(self, rows: list[list[tuple[object, ...]]] | None) -> None:
        for number, log in enumerate((self.facts, self.commands, self.records)):
            log.wake(None if rows is None else rows[number])

    @property
    def stores(self) -> SQLiteStores:
        """Where services keep what is their own: a folder beside the file."""
        return SQLiteStores(folder_of(self.path), self._clock)

    async def health(self) -> Health:
        """What the file, its place and SQLite are, against what the promises need."""
        return health_of(self.path, self._connection)

    async def close(self) -> None:
        """Write what waits, then let go of the file. In a process forked since, nothing is touched."""
        if os.getpid() == self._pid:
            await self.wire.close()
            await self._writer.close()
            self._undo.close()


async def open(path: str | Path, *, clock: Clock | None = None, patience: float = 5.0) -> SQLiteBus:
    """Open, and make if need be, the bus in a file.

    Parameters:
        patience: seconds a write waits for its turn before it is refused with `Busy`.

    Raises `Refused` for a file that is no Cauce log or may not be written, `Damaged` if entries were lost.
    """
    bus = SQLiteBus(Path(path), clock or SystemClock(), patience)
    await bus._open()
    return bus
