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
from cauce.store import Letter, no_letter

__all__ = ["SQLiteStores"]

_DEAD = """select consumer, position, stream, attempts, error, trace, raw, due, (
    select count(*) from cauce_waiting b where b.consumer = a.consumer and b.stream = a.stream and b.position > a.position)
    from cauce_waiting a where dead order by position"""
_RETRY = "update cauce_waiting set dead = 0, attempts = 0, due = 0 where consumer = ? and position = ? and dead"
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
