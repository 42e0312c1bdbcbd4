"""What a handler does with a database of its service: what it executes is queued, what it fetches was committed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from cauce.errors import Refused

__all__ = ["DIALECTS", "Fetch", "Row", "Run", "Statement", "Store", "Tables", "runs", "spoken"]

Row = tuple[Any, ...]
Statement = tuple[str, Row]
Run = tuple[str, Sequence[Row]]
"""A statement, and the values that it is executed with, one after the other."""

Fetch = Callable[[str, Row], Awaitable[list[Row]]]
Tables = str | Mapping[str, str]
"""SQL that makes tables: one text for all dialects, or one for each by its name."""

DIALECTS = ("sqlite", "postgresql")


def spoken(tables: Tables, dialect: str, what: str) -> str:
    """The text in a dialect. Raises `Refused` where there is none."""
    if isinstance(tables, str):
        return tables
    if unknown := tables.keys() - set(DIALECTS):
        raise Refused(f"{what}: its schema is given for {', '.join(sorted(unknown))}: name {' or '.join(DIALECTS)}")
    if dialect not in tables:
        raise Refused(f"{what}: its schema is not given for {dialect}: add it to the others, under that name")
    return tables[dialect]


def runs(queued: Sequence[Statement]) -> Iterator[Run]:
    """Neighbours with the same text together, which a database executes for half the price."""
    first, many = 0, len(queued)
    while first < many:
        sql, last = queued[first][0], first + 1
        while last < many and queued[last][0] == sql:
            last += 1
        yield sql, [params for _, params in queued[first:last]]
        first = last


class Store:
    """A handle on one database.

    Parameters:
        fetch: reads what was last committed.
    """

    __slots__ = ("_fetch", "queued")

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self.queued: list[Statement] = []

    def execute(self, sql: str, params: Sequence[Any] = ()) -> None:
        """Queue a statement, with a value for each `?`. It is committed with all others after the handler returned."""
        self.queued.append((sql, tuple(params)))

    async def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """The rows of a query, as they were last committed: what is queued is not in them."""
        return await self._fetch(sql, tuple(params))
