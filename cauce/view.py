"""A view: a read model that functions of a service build out of events, by statements that they queue."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

from cauce.codec import Entry, schema_of
from cauce.derived import Failed
from cauce.errors import CauceError, Damaged, Refused, Unavailable
from cauce.messages import Message, declared
from cauce.schema import Schema
from cauce.sql import Fetch, Row, Run, Statement, Store, runs

__all__ = ["View"]

_Function = Callable[[Any, Store], Any]


async def _no_fetch(sql: str, params: Row) -> list[Row]:
    raise Refused("a plain view function cannot fetch: write it with async def")


class View:
    """The functions of one view; see `cauce.derived.Shape` for what each method promises.

    Plain functions run in a thread while it is written. If one of them is async, all run on the loop, in order.
    """

    def __init__(
        self, service: str, name: str, schema: str, functions: Sequence[tuple[_Function, Sequence[type[Message]]]]
    ) -> None:
        self.what, self.name, self.schema = f"view {name} of {service}", name, schema
        self._known = Schema({cls: None for _, classes in functions for cls in classes})
        self._functions: dict[tuple[str, str], list[_Function]] = {}
        self.wants: dict[str, frozenset[str]] = {}
        for function, classes in functions:
            for cls in classes:
                kind = declared(cls)
                domain = kind.domain.name
                for type in kind.names:
                    self._functions.setdefault((domain, type), []).append(function)
                self.wants[domain] = self.wants.get(domain, frozenset()) | kind.names
        self._async = any(inspect.iscoroutinefunction(function) for function, _ in functions)
        # What it never wanted before was passed by: a view that wants more events than it did begins anew, too.
        told = [schema, *sorted(f"{domain}/{type}" for domain, type in self._functions)]
        self.fingerprint = blake2b("\0".join(told).encode(), digest_size=16).hexdigest()

    async def ready(self, entries: Sequence[Entry], fetch: Fetch) -> Sequence[Any]:
        if not self._async:
            return entries
        return [(entry, await self._awaited(entry, fetch)) for entry in entries]

    def runs(self, ready: Sequence[Any]) -> Iterable[Run]:
        if self._async:
            return runs([statement for _, many in ready for _, statement in many])
        store = Store(_no_fetch)
        functions, decode = self._functions, self._known.decode
        only = next(iter(self.wants)) if len(self.wants) == 1 else None
        for entry in ready:
            domain, type = only or entry.domain, entry.type
            event = decode(domain, type, schema_of(entry.checked()), entry.body or b"")
            for function in functions[domain, type]:
                function(event, store)
        return runs(store.queued)

    def blamed(self, ready: Any) -> Sequence[tuple[str, Statement]]:
        entry, many = ready if self._async else (ready, self._queued(ready))
        return [(_whose(function, entry), statement) for function, statement in many]

    def _queued(self, entry: Entry) -> list[tuple[_Function, Statement]]:
        event, found = self._event(entry), []
        for function in self._functions[entry.domain, entry.type]:
            store = Store(_no_fetch)
            try:
                function(event, store)
            except Exception as error:
                raise Failed(f"{_whose(function, entry)}: {error!r}") from error
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
                raise Failed(f"{_whose(function, entry)}: {error!r}") from error
            found += [(function, statement) for statement in store.queued]
        return found

    def _event(self, entry: Entry) -> Message:
        try:
            return self._known.decode(entry.domain, entry.type, schema_of(entry.checked()), entry.body or b"")
        except Damaged:
            raise
        except CauceError as error:
            raise Failed(f"position {entry.position} ({entry.stream}): {error}") from error


def _whose(function: _Function, entry: Entry) -> str:
    name = getattr(function, "__name__", function)
    return f"{name} failed at position {entry.position} ({entry.stream}, {entry.type})"
