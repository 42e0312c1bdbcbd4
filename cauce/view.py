"""A view: a read model that functions of a service build out of events, by statements that they queue."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import apsw

from cauce.codec import Entry
from cauce.derived import Failed, schema_of
from cauce.errors import CauceError, Damaged, Refused, Unavailable
from cauce.messages import Message, declared
from cauce.schema import Schema
from cauce.sql import Fetch, Row, Statement, Store

__all__ = ["View", "check_schema"]

_Function = Callable[[Any, Store], Any]


async def _no_fetch(sql: str, params: Row) -> list[Row]:
    raise Refused("a plain view function cannot fetch: write it with async def")


class View:
    """The functions of one view; see `cauce.derived.Shape` for what each method promises.

    Plain functions run in the thread that writes. If one of them is async, all run on the loop, in order.
    """

    def __init__(
        self, service: str, name: str, schema: str, functions: Sequence[tuple[_Function, Sequence[type[Message]]]]
    ) -> None:
        self.what, self.name, self.schema = f"view {name} of {service}", name, schema
        check_schema(self.what, schema)
        self._known = Schema({cls: None for _, classes in functions for cls in classes})
        self._functions: dict[tuple[str, str], list[_Function]] = {}
        self.wants: dict[str, frozenset[str]] = {}
        for function, classes in functions:
            for cls in classes:
                kind = declared(cls)
                domain, type = kind.domain.name, kind.name
                self._functions.setdefault((domain, type), []).append(function)
                self.wants[domain] = self.wants.get(domain, frozenset()) | {type}
        self._async = any(inspect.iscoroutinefunction(function) for function, _ in functions)
        # What it never wanted before was passed by: a view that wants more events than it did begins anew, too.
        told = [schema, *sorted(f"{domain}/{type}" for domain, type in self._functions)]
        self.fingerprint = blake2b("\0".join(told).encode(), digest_size=16).hexdigest()

    async def ready(self, entries: Sequence[Entry], fetch: Fetch) -> Sequence[Any]:
        if not self._async:
            return entries
        return [(entry, await self._awaited(entry, fetch)) for entry in entries]

    def apply(self, connection: apsw.Connection, ready: Sequence[Any]) -> None:
        if self._async:
            _execute(connection, [statement for _, many in ready for _, statement in many])
            return
        store = Store(_no_fetch)
        functions, decode = self._functions, self._known.decode
        only = next(iter(self.wants)) if len(self.wants) == 1 else None
        for entry in ready:
            domain, type = only or entry.domain, entry.type
            event = decode(domain, type, schema_of(entry.checked()), entry.body or b"")
            for function in functions[domain, type]:
                function(event, store)
        _execute(connection, store.queued)

    def apply_one(self, connection: apsw.Connection, ready: Any) -> None:
        entry, many = ready if self._async else (ready, self._queued(ready))
        for function, (sql, params) in many:
            try:
                _exhaust(connection.execute(sql, params))
            except apsw.AuthError as error:
                raise self._failed(
                    function, entry, f"may not begin or end a transaction, attach a file or set a pragma, in {sql!r}"
                ) from error
            except (apsw.FullError, apsw.BusyError, apsw.IOError, apsw.CorruptError, apsw.NotADBError):
                raise
            except Exception as error:
                raise self._failed(function, entry, f"{error}, in {sql!r}") from error

    def _queued(self, entry: Entry) -> list[tuple[_Function, Statement]]:
        event, found = self._event(entry), []
        for function in self._functions[entry.domain, entry.type]:
            store = Store(_no_fetch)
            try:
                function(event, store)
            except Exception as error:
                raise self._failed(function, entry, repr(error)) from error
            found += [(function, statement) for statement in store.queued]
        return found

    async def _awaited(self, entry: Entry, fetch: Fetch) -> list[tuple[_Function, Statement]]:
        event, found = self._event(entry), []
        for function in self._functions[entry.domain, entry.type]:
            store = Store(fetch)
            try:
                waits = function(event, store)
                if inspect.isawaitable(waits):
                    await waits
            except Unavailable:
                raise
            except Exception as error:
                raise self._failed(function, entry, repr(error)) from error
            found += [(function, statement) for statement in store.queued]
        return found

    def _event(self, entry: Entry) -> Message:
        try:
            return self._known.decode(entry.domain, entry.type, schema_of(entry.checked()), entry.body or b"")
        except Damaged:
            raise
        except CauceError as error:
            raise Failed(f"position {entry.position} ({entry.stream}): {error}") from error

    def _failed(self, function: _Function, entry: Entry, words: str) -> Failed:
        return Failed(
            f"{getattr(function, '__name__', function)} failed at position {entry.position} ({entry.stream}, {entry.type}): {words}"
        )


def _execute(connection: apsw.Connection, queued: Sequence[Statement]) -> None:
    """Neighbours with the same text go to SQLite at once, which halves their price."""
    first, many = 0, len(queued)
    while first < many:
        sql, last = queued[first][0], first + 1
        while last < many and queued[last][0] == sql:
            last += 1
        if last - first == 1:
            _exhaust(connection.execute(sql, queued[first][1]))
        else:
            _exhaust(connection.executemany(sql, [params for _, params in queued[first:last]]))
        first = last


def _exhaust(rows: Iterable[object]) -> None:
    """What follows a statement with rows is run when these are taken."""
    for _ in rows:
        pass


def check_schema(what: str, schema: str) -> None:
    """Raises `Refused` for statements that SQLite does not take."""
    connection = apsw.Connection(":memory:")
    try:
        connection.execute("create table cauce_place (log, position, fingerprint)")
        with connection:
            connection.execute(schema)
    except apsw.Error as error:
        raise Refused(f"{what}: its schema is refused by SQLite: {error}") from None
    finally:
        connection.close()
