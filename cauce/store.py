"""A service's own database: where it stands in each log, and the messages that must wait.

Everything here is queued and written behind, many changes a commit; a crash before that means that a message is handled
again, never that one is skipped.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import apsw
import msgspec

from cauce.backends.sqlite.file import connect, translate
from cauce.clock import Clock
from cauce.errors import Damaged, Unavailable

__all__ = ["Store", "Waiting"]

_log = logging.getLogger("cauce")
_PAUSE = 1.0

_SCHEMA = """
create table if not exists places (
    consumer text, domain text, slot integer, log text not null, position integer not null,
    primary key (consumer, domain, slot)) without rowid;
create table if not exists waiting (
    consumer text, position integer, stream text not null, attempts integer not null, due integer not null, error text not null,
    primary key (consumer, position)) without rowid;
"""


class Waiting(msgspec.Struct):
    """A message set aside: where it stands, how often it failed, when it is due (microseconds since 1970), and why."""

    position: int
    stream: str
    attempts: int
    due: int
    error: str


class Store:
    """One SQLite file of one service."""

    def __init__(self, path: Path, clock: Clock) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        self._connection = connect(path, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE, busy=5.0)
        self._connection.execute("pragma wal_autocheckpoint = 1000")
        self._connection.execute(_SCHEMA)
        path.chmod(0o600)
        # Writes happen in a thread; reading meanwhile takes a connection of its own.
        self._reader = connect(path, flags=apsw.SQLITE_OPEN_READONLY, busy=5.0)
        self._changes: list[tuple[str, tuple[Any, ...]]] = []
        self._bell = asyncio.Event()
        self._lock = asyncio.Lock()

    def places(self, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
        """Where a consumer stands in a log, by domain and slot. Raises `Damaged` if that was another, or longer."""
        rows: list[Any] = self._reader.execute(
            "select domain, slot, log, position from places where consumer = ?", (consumer,)
        ).fetchall()
        for domain, slot, seen, position in rows:
            if seen != log:
                raise Damaged(
                    f"{consumer} has read log {seen}, this one is {log} (restored?): remove {self._path} to let it begin anew"
                )
            if position > head:
                raise Damaged(
                    f"{consumer} has read {domain} slot {slot} up to {position}, the log ends at {head}: entries are lost; restore a newer backup"
                )
        return {(domain, slot): position for domain, slot, _, position in rows}

    def waiting(self, consumer: str) -> list[Waiting]:
        """The messages that wait, in order."""
        rows: list[Any] = self._reader.execute(
            "select position, stream, attempts, due, error from waiting where consumer = ? order by position",
            (consumer,),
        ).fetchall()
        return [Waiting(*row) for row in rows]

    def move(self, consumer: str, domain: str, slot: int, log: str, position: int) -> None:
        self._queue("insert or replace into places values (?, ?, ?, ?, ?)", (consumer, domain, slot, log, position))

    def park(self, consumer: str, waiting: Waiting) -> None:
        self._queue(
            "insert or replace into waiting values (?, ?, ?, ?, ?, ?)", (consumer, *msgspec.structs.astuple(waiting))
        )

    def unpark(self, consumer: str, position: int) -> None:
        self._queue("delete from waiting where consumer = ? and position = ?", (consumer, position))

    def _queue(self, statement: str, arguments: tuple[Any, ...]) -> None:
        self._changes.append((statement, arguments))
        self._bell.set()

    async def run(self) -> None:
        """Write what is queued, for ever."""
        while True:
            await self._bell.wait()
            try:
                await self.flush()
            except Unavailable as error:
                _log.warning("places wait: %s", error)
                await self._clock.sleep(_PAUSE)
                self._bell.set()

    async def flush(self) -> None:
        """Write what is queued now, in one transaction."""
        async with self._lock:
            self._bell.clear()
            changes, self._changes = self._changes, []
            if changes:
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, changes))
                try:
                    # To stop waiting does not stop the thread, and nobody else may use its connection meanwhile.
                    await asyncio.shield(writing)
                except asyncio.CancelledError:
                    await asyncio.wait({writing})
                    if writing.exception() is not None:
                        self._changes[:0] = changes
                    raise
                except apsw.Error as error:
                    self._changes[:0] = changes
                    raise translate(error, self._path) from error

    def _write(self, changes: list[tuple[str, tuple[Any, ...]]]) -> None:
        with self._connection:
            for statement, arguments in changes:
                self._connection.execute(statement, arguments)

    def close(self) -> None:
        self._reader.close()
        self._connection.close()
