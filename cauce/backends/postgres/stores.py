"""Where the services of a bus keep what is their own, on PostgreSQL: a schema for each, in the database of the bus."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cauce.backends.postgres.home import filled, home_of
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.shelf import PostgresShelf
from cauce.backends.postgres.store import PostgresStore
from cauce.clock import Clock
from cauce.errors import Refused
from cauce.store import Letter, no_letter

__all__ = ["PostgresStores"]

_HOMES = """select quote_ident(n.nspname) as home from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relname = 'cauce_store' and c.relkind = 'r'
    and has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')"""
_DEAD = """select consumer, position, stream, attempts, error, trace, raw, due, (
    select count(*) from {home}.cauce_waiting b
        where b.consumer = a.consumer and b.stream = a.stream and b.position > a.position) as behind
    from {home}.cauce_waiting a where dead order by position"""
# Both, because a call whose reply was lost is made again.
_EDIT = """update {home}.cauce_waiting set raw = $3 where consumer = $1 and position = $2 and dead and raw in ($4, $3)
    returning position"""


class PostgresStores:
    """See `cauce.store.Stores` for what each method promises. Nothing is made before a store is opened."""

    dialect = "postgresql"

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link, self._clock = link, clock

    async def open(self, service: str, migrations: Sequence[str] | None = (), *, keeps: bool = True) -> PostgresStore:
        if migrations is None:
            await self._services(service)
        return await PostgresStore.open(self._link, service, migrations)

    def shelf(self, service: str) -> PostgresShelf:
        return PostgresShelf(self._link, home_of(self._link.schema, service))

    async def letters(self, service: str = "") -> list[Letter]:
        return [letter for name in await self._services(service) for letter in await self._dead(name)]

    async def _dead(self, service: str) -> list[Letter]:
        rows = await self._link.fetch(filled(_DEAD, home_of(self._link.schema, service)))
        return [
            Letter(service, consumer, position, stream, tries, error, trace, msgspec.Raw(raw or b"null"), behind, died)
            for consumer, position, stream, tries, error, trace, raw, died, behind in rows
        ]

    async def retry(self, service: str, consumer: str, position: int) -> None:
        await self._decide(service, consumer, position, again=True)

    async def edit(self, service: str, consumer: str, position: int, before: bytes, after: bytes) -> None:
        (name,) = await self._services(service)
        sql = filled(_EDIT, home_of(self._link.schema, name))
        if not await self._link.fetch(sql, consumer, position, after, before):
            raise no_letter(service, consumer, position)

    async def discard(self, service: str, consumer: str, position: int) -> None:
        await self._decide(service, consumer, position, again=False)

    async def _decide(self, service: str, consumer: str, position: int, *, again: bool) -> None:
        (name,) = await self._services(service)
        sql = filled("select {home}.cauce_decide($1, $2, $3, $4)", home_of(self._link.schema, name))
        ((found,),) = await self._link.fetch(sql, consumer, position, again, self._clock.id())
        if not found:
            raise no_letter(service, consumer, position)

    async def _services(self, service: str) -> list[str]:
        """Those of this bus that have a store; the one that is named, or all."""
        found = list[str]()
        for (home,) in await self._link.fetch(_HOMES):
            for name, bus in await self._link.fetch(f"select service, bus from {home}.cauce_store"):
                if bus == self._link.schema:
                    found.append(name)
        if not service:
            return sorted(found)
        if service not in found:
            names = ", ".join(sorted(found)) or "none"
            raise Refused(f"service {service!r} has no store here: there are {names}")
        return [service]
