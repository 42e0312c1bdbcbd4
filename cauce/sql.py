"""What a handler does with a database of its service: what it executes is queued, what it fetches was committed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

__all__ = ["Fetch", "Row", "Statement", "Store"]

Row = tuple[Any, ...]
Statement = tuple[str, Row]
Fetch = Callable[[str, Row], Awaitable[list[Row]]]


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
        """Queue a statement, with a value for each `?`. It is committed after the handler returned."""
        self.queued.append((sql, tuple(params)))

    async def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """The rows of a query, as they were last committed: what is queued is not in them."""
        return await self._fetch(sql, tuple(params))
