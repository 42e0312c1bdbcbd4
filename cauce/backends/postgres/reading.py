"""The live build of a view or replica in PostgreSQL as it is read: see `cauce.shelf.Reading` for the promises."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import asyncpg

from cauce.backends.postgres.dialect import READS, check, numbered
from cauce.backends.postgres.faults import SLOWEST, blamed
from cauce.backends.postgres.home import quoted
from cauce.backends.postgres.link import Link
from cauce.errors import Refused, Unavailable, Unreachable
from cauce.sql import Row

__all__ = ["LiveReading", "Place", "is_there", "place_of"]

_READERS = 4
_REMEMBERED = (
    asyncpg.DatatypeMismatchError,
    asyncpg.InternalServerError,
    asyncpg.InvalidCachedStatementError,
    asyncpg.UndefinedFunctionError,
)
"""What the server says of a statement that a session remembers, and whose types are gone."""

_OPEN = "select build, number, log, position, fingerprint from {schema}.cauce_place order by position desc limit 1"
_POSITION = "select max(position) from cauce_place"


class Place(NamedTuple):
    """What a build says of itself, in the order of its columns."""

    build: str
    number: int
    log: str
    position: int
    fingerprint: str


class LiveReading:
    """Sessions that see the live build, and nothing else that is named without a schema."""

    def __init__(self, link: Link, schema: str, what: str) -> None:
        self._link, self._schema, self._what = link, schema, what
        self._pool: Any = None
        self._least = 0
        self._opening = asyncio.Lock()

    async def fetch(self, sql: str, params: Row = ()) -> list[Row]:
        try:
            check(sql, self._link.schema, READS)
            return await self.rows(sql, params)
        except Refused as error:
            raise Refused(f"{self._what}: {error}") from None

    async def rows(self, sql: str, params: Row = ()) -> list[Row]:
        text, pool = numbered(sql), await self._opened()
        return [
            tuple(row) for row in await self._link.again(lambda session: self._read(session, text, params, sql), pool)
        ]

    async def position(self) -> int:
        place = await place_of(self._link, self._schema)
        if place is None:
            raise Unavailable(f"{self._what} is not built yet: run its service, or wait")
        return place.position

    def reached(self, position: int) -> None:
        # A build is let be live only when it has all that the one before had.
        self._least = max(self._least, position)

    async def _opened(self) -> Any:
        async with self._opening:
            if self._pool is None:
                self._pool = await self._link.another(
                    "view",
                    _READERS,
                    self._first,
                    search_path=f"{quoted(self._schema)}, pg_temp",
                    default_transaction_read_only="on",
                    statement_timeout=f"{SLOWEST}s",
                )
        return self._pool

    async def _first(self, session: Any) -> None:
        """A server that crashed, and so ended all sessions, may have lost the end of what somebody was told of."""
        with suppress(asyncpg.UndefinedTableError):
            position = await session.fetchval(_POSITION)
            if position is not None and position < self._least:
                raise Unreachable(f"{self._what}: the server has lost the end of it, which is read again: wait")

    async def _read(self, session: Any, text: str, params: Sequence[Any], sql: str) -> list[Any]:
        try:
            try:
                return list(await session.fetch(text, *params))
            except _REMEMBERED:
                # Another build is live by now, with other tables and types of the same names.
                await session.reload_schema_state()
                return list(await session.fetch(text, *params))
        except Exception as error:
            if isinstance(error, asyncpg.UndefinedTableError) and not await is_there(session, self._schema):
                raise Unavailable(f"{self._what} is not built yet: run its service, or wait") from None
            if (words := blamed(error)) is None:
                raise
            raise Refused(f"{words}: mend the query {sql!r}") from None

    async def close(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            with suppress(Exception):
                async with asyncio.timeout(self._link.patience):
                    await pool.close()
            pool.terminate()


async def is_there(session: Any, schema: str) -> bool:
    """Whether a schema is a build."""
    return bool(await session.fetchval("select to_regclass($1) is not null", f"{quoted(schema)}.cauce_place"))


async def place_of(link: Link, schema: str) -> Place | None:
    """What a schema says of itself; None where there is none."""

    async def look(session: Any) -> Any:
        try:
            return await session.fetchrow(_OPEN.replace("{schema}", quoted(schema)))
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            return None

    row = await link.again(look)
    return None if row is None else Place(*row)
