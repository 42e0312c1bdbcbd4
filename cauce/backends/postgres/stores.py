"""Where the services of a bus keep what is their own, on PostgreSQL: a schema for each, in the database of the bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cauce.backends.postgres.home import Home, filled, home_of
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.shelf import PostgresShelf
from cauce.backends.postgres.store import PostgresStore
from cauce.clock import Clock
from cauce.errors import Refused
from cauce.store import Letter, Outline, Place, Timer, no_letter, no_timer, pending_of

__all__ = ["PostgresStores"]

_HOMES = """select quote_ident(n.nspname) as home from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relname = 'cauce_store' and c.relkind = 'r'
    and has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')"""
_DEAD = """select consumer, position, stream, attempts, error, trace, raw, due, (
    select count(*) from {home}.cauce_waiting b
        where b.consumer = a.consumer and b.stream = a.stream and b.position > a.position) as behind
    from {home}.cauce_waiting a where dead order by position"""
# One statement sees one moment: what is set aside moves its place with it.
_OUTLINE = """select
    coalesce((select array_agg((consumer, domain, slot, log, position) order by consumer, domain, slot)
        from {home}.cauce_places), '{}') as places,
    coalesce((select array_agg((consumer, position, stream, dead) order by consumer, position)
        from {home}.cauce_waiting where attempts >= 0), '{}') as waiting,
    (select count(*) from {home}.cauce_outbox), (select count(*) from {home}.cauce_timers),
    (select count(*) from {home}.cauce_timers where due <= $1)"""
_DUE = "select count(*), count(*) filter (where due <= $1) from {home}.cauce_later"

_INTERVALS = "select name, 'lead', name, due, ''::bytea from {home}.cauce_timers order by due, name"
_TIMERS = "select id, share, handler, due, said from {home}.cauce_later order by due, number limit $1"
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

    async def services(self) -> list[str]:
        return await self._services("")

    async def outline(self, service: str, now: int) -> Outline:
        (name,) = await self._services(service)
        home = home_of(self._link.schema, name)
        ((places, waiting, said, timers, due),) = await self._link.fetch(filled(_OUTLINE, home), now)
        if await self._has_timers(home):
            ((later, late),) = await self._link.fetch(filled(_DUE, home), now)
            timers, due = timers + later, due + late
        return Outline([Place(*row) for row in places], pending_of(tuple(row) for row in waiting), said, timers, due)

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

    async def timers(self, service: str = "", limit: int = 1_000) -> list[tuple[str, Timer]]:
        found = []
        for name in await self._services(service):
            home = home_of(self._link.schema, name)
            rows = await self._link.fetch(filled(_INTERVALS, home))
            if await self._has_timers(home):
                rows += await self._link.fetch(filled(_TIMERS, home), limit)
            found += [(name, Timer(*row)) for row in rows]
        return found

    async def cancel(self, service: str, id: str) -> None:
        (name,) = await self._services(service)
        home, rows = home_of(self._link.schema, name), list[Any]()
        if await self._has_timers(home):
            rows = await self._link.fetch(filled("delete from {home}.cauce_later where id = $1 returning id", home), id)
        if not rows:
            raise no_timer(service, id)

    async def _has_timers(self, home: Home) -> bool:
        """A store that no newer code has opened yet has none."""
        ((found,),) = await self._link.fetch("select to_regclass($1) is not null", f"{home.quoted}.cauce_later")
        return bool(found)

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
