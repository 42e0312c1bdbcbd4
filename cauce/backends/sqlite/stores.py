"""Where the services of a bus keep what is their own, on SQLite: a folder with one for each service."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec

from cauce.backends.sqlite.builds import SQLiteShelf
from cauce.backends.sqlite.file import connect, translate
from cauce.backends.sqlite.store import SQLiteStore
from cauce.clock import Clock
from cauce.errors import Refused
from cauce.store import Letter, Outline, Place, Timer, no_letter, no_timer, pending_of
from cauce.threads import in_thread

__all__ = ["SQLiteStores"]

_DEAD = """select consumer, position, stream, attempts, error, trace, raw, due, (
    select count(*) from cauce_waiting b where b.consumer = a.consumer and b.stream = a.stream and b.position > a.position)
    from cauce_waiting a where dead order by position"""
_PLACES = "select consumer, domain, slot, log, position from cauce_places order by 1, 2, 3"
_SAID = "select count(*) from cauce_outbox"
_DUE = "select count(*), count(*) filter (where due <= ?) from"
_PENDING = "select consumer, position, stream, dead from cauce_waiting where attempts >= 0 order by 1, 2"
_RETRY = "update cauce_waiting set dead = 0, attempts = 0, due = 0 where consumer = ? and position = ? and dead"
_INTERVALS = "select name, 'lead', name, due, x'' from cauce_timers order by due, name"
_TIMERS = "select id, share, handler, due, said from cauce_later order by due, number limit ?"
_HAS_TIMERS = "select 1 from sqlite_master where name = 'cauce_later'"
_EDIT = "update cauce_waiting set raw = ?3 where consumer = ?1 and position = ?2 and dead and raw in (?4, ?3)"
_DISCARD = "delete from cauce_waiting where consumer = ? and position = ? and dead"


class SQLiteStores:
    """See `cauce.store.Stores` for what each method promises. Nothing is made before a store is opened."""

    dialect = "sqlite"

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.place = folder
        self._folder, self._clock = folder, clock

    async def open(self, service: str, migrations: Sequence[str] | None = (), *, keeps: bool = True) -> SQLiteStore:
        if migrations is None:
            self._paths(service)
        return await SQLiteStore.open(self._folder / service, service, self._clock, migrations)

    def shelf(self, service: str) -> SQLiteShelf:
        return SQLiteShelf(self._folder / service / "views")

    async def services(self) -> list[str]:
        return [path.parent.name for path in self._paths("")]

    async def outline(self, service: str, now: int) -> Outline:
        (path,) = self._paths(service)
        return await in_thread(_outline, path, now)

    async def letters(self, service: str = "") -> list[Letter]:
        found = []
        for path in self._paths(service):
            with _opened(path, apsw.SQLITE_OPEN_READONLY) as connection:
                rows: list[Any] = connection.execute(_DEAD).fetchall()
                found += [
                    Letter(
                        path.parent.name,
                        consumer,
                        position,
                        stream,
                        tries,
                        error,
                        trace,
                        msgspec.Raw(raw or b"null"),
                        behind,
                        died,
                    )
                    for consumer, position, stream, tries, error, trace, raw, died, behind in rows
                ]
        return found

    async def retry(self, service: str, consumer: str, position: int) -> None:
        self._decide(service, consumer, position, _RETRY)

    async def edit(self, service: str, consumer: str, position: int, before: bytes, after: bytes) -> None:
        self._decide(service, consumer, position, _EDIT, after, before)

    async def discard(self, service: str, consumer: str, position: int) -> None:
        self._decide(service, consumer, position, _DISCARD)

    def _decide(self, service: str, consumer: str, position: int, statement: str, *more: bytes) -> None:
        (path,) = self._paths(service)
        with _opened(path, apsw.SQLITE_OPEN_READWRITE) as connection:
            connection.execute("begin immediate")
            connection.execute(statement, (consumer, position, *more))
            changed = connection.changes()
            connection.execute("commit")
        if not changed:
            raise no_letter(service, consumer, position)

    async def timers(self, service: str = "", limit: int = 1_000) -> list[tuple[str, Timer]]:
        found = []
        for path in self._paths(service):
            with _opened(path, apsw.SQLITE_OPEN_READONLY) as connection:
                rows: list[Any] = connection.execute(_INTERVALS).fetchall()
                if connection.execute(_HAS_TIMERS).fetchone():
                    rows += connection.execute(_TIMERS, (limit,)).fetchall()
                found += [(path.parent.name, Timer(*row)) for row in rows]
        return found

    async def cancel(self, service: str, id: str) -> None:
        (path,) = self._paths(service)
        changed = 0
        with _opened(path, apsw.SQLITE_OPEN_READWRITE) as connection:
            if connection.execute(_HAS_TIMERS).fetchone():
                connection.execute("delete from cauce_later where id = ?", (id,))
                changed = connection.changes()
        if not changed:
            raise no_timer(service, id)

    def _paths(self, service: str) -> list[Path]:
        if self._folder.exists() and not os.access(self._folder, os.R_OK | os.X_OK):
            raise Refused(f"{self._folder} may not be read: change its mode or owner, or ask as the user whose it is")
        found = sorted(self._folder.glob("*/store.db"))
        if not service:
            return found
        mine = [path for path in found if path.parent.name == service]
        if not mine:
            names = ", ".join(path.parent.name for path in found) or "none"
            raise Refused(f"service {service!r} has no store here: there are {names}")
        return mine


def _outline(path: Path, now: int) -> Outline:
    with _opened(path, apsw.SQLITE_OPEN_READONLY) as connection:
        # All of one moment: what is set aside moves its place with it.
        connection.execute("begin")
        places: list[Any] = connection.execute(_PLACES).fetchall()
        rows: Any = connection.execute(_PENDING)
        pending = pending_of((consumer, position, stream, bool(dead)) for consumer, position, stream, dead in rows)
        said: int = connection.execute(_SAID).get
        tables = ("cauce_timers", *(("cauce_later",) if connection.execute(_HAS_TIMERS).fetchone() else ()))
        timers: list[Any] = [connection.execute(f"{_DUE} {table}", (now,)).fetchone() for table in tables]
        connection.execute("rollback")
    return Outline(
        [Place(*row) for row in places], pending, said, sum(all for all, _ in timers), sum(due for _, due in timers)
    )


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[apsw.Connection]:
    try:
        connection = connect(path, flags=flags, busy=5.0)
        try:
            yield connection
        finally:
            connection.close()
    except apsw.Error as error:
        raise translate(error, path) from error
