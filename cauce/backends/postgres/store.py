"""The store of a service in a schema of a PostgreSQL database: see `cauce.store.Store` for what each method promises.

So the instances of a service can live on several machines. Their clocks are never compared: each counts its own beats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg

from cauce.backends.postgres.dialect import READS, check, numbered
from cauce.backends.postgres.faults import SLOWEST
from cauce.backends.postgres.home import Home, filled, furnish, home_of
from cauce.backends.postgres.link import Link, translate
from cauce.backends.postgres.units import Units, bad_statement
from cauce.errors import CauceError, Refused
from cauce.store import BadStatement, Inventory, Place, Share, Standing, Unit, Waiting, check_places, write_places

__all__ = ["PostgresStore"]

_READERS = 4
_TICK = "select * from {home}.cauce_tick($1, $2, $3, $4, $5, $6)"
_TAKE = "select taken, raised, left_clean, holder from {home}.cauce_take($1, $2, $3)"
_RELEASE = """with r as (update {home}.cauce_claims c set owner = '' from unnest($1::text[], $2::bigint[]) s (name, fence)
    where c.name = s.name and c.fence = s.fence) delete from {home}.cauce_instances where owner = $3"""
_NEXT = """select min(n.due) from unnest($1::text[]) s (name)
    cross join lateral (select due from {home}.cauce_later l where l.share = s.name order by due limit 1) n"""
_WAITING = """select position, stream, slot, attempts, due, dead, error, trace, raw from {home}.cauce_waiting
    where consumer = $1 order by position"""


class PostgresStore:
    """One schema of one service. Made by `open`."""

    def __init__(self, link: Link, home: Home) -> None:
        self._link, self._home, self._clock = link, home, link.clock
        self.id, self.place, self.is_fresh = "", home.schema, True
        self._units = Units(link, home)
        self._moved = asyncio.Event()
        self._seen = 0
        self._first = True
        self._readers: asyncpg.Pool[asyncpg.Record]

    @classmethod
    async def open(cls, link: Link, service: str, migrations: Sequence[str] | None = ()) -> PostgresStore:
        """Open, and make if need be, the store of a service.

        Parameters:
            migrations: SQL of the service, each run once, in this order; later ones may be added. None: none is due.

        Raises `Refused` for a store of another service, for migrations that are not those it was made by, and where the
        role may not make it.
        """
        home = home_of(link.schema, service)
        store = cls(link, home)
        store.id, store.is_fresh = await furnish(link, home, migrations)
        store._readers = await link.another(
            "fetch",
            _READERS,
            search_path=f"{home.quoted}, pg_temp",
            default_transaction_read_only="on",
            statement_timeout=f"{SLOWEST}s",
        )
        try:
            await store._units.start()
        except BaseException:
            store._readers.terminate()
            raise
        return store

    # ------------------------------------------------------------------------------------------------- who holds what

    async def tick(self, owner: str, dead: Sequence[tuple[str, int]], *, join: bool = False) -> Standing:
        """A sign of life, and what stands. Those whose beat was seen unchanged for long enough are struck off."""
        (row,) = await self._read(
            _TICK, owner, join, [name for name, _ in dead], [beat for _, beat in dead], self._seen, self._units.writer
        )
        touched, self._first, self._seen = row["touched"] or self._first, False, row["latest"]
        instances = dict(zip(row["owners"], row["lived"], strict=True))
        return Standing(owner in instances, instances, dict(zip(row["names"], row["holders"], strict=True)), touched)

    async def take(self, owner: str, names: Sequence[str]) -> list[Share]:
        """Of these names those that are free, or whose holder was struck off; the fence of each rises."""
        rows = await self._read(_TAKE, owner, list(names), self._clock.id())
        return [Share(name, fence, clean, before) for name, fence, clean, before in rows]

    async def release(self, shares: Sequence[Share], *, owner: str = "") -> None:
        """Let go of these; with `owner` it leaves the list of instances, too."""
        await self._read(_RELEASE, [share.name for share in shares], [share.fence for share in shares], owner)

    # ------------------------------------------------------------------------------------------------------- places

    async def places(self, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
        """Where a consumer stands in a log, by domain and slot. Raises `Damaged` if that was another, or longer."""
        rows: Any = await self._read(
            "select domain, slot, log, position from {home}.cauce_places where consumer = $1", consumer
        )
        return check_places(rows, consumer, log, head, self._home.service)

    def move(self, share: Share | None, consumer: str, domain: str, slot: int, log: str, position: int) -> None:
        """Note a place. It is written with the next unit, or soon by `run`."""
        self._units.note((consumer, domain, slot), (share, log, position))
        self._moved.set()

    async def commit(self, unit: Unit) -> None:
        """Write a unit with its place. Raises `BadStatement`, `Fenced`, and what a full or unreachable server says."""
        for sql, _ in unit.statements:
            try:
                check(sql, self._link.schema)
                numbered(sql)
            except Refused as error:
                raise BadStatement(f"{sql!r} cannot be run on {self._home.service}'s store: {error}") from None
        await self._units.submit(unit)

    async def run(self) -> None:
        """Write places that no unit carries, for ever."""
        await write_places(self._moved, self.flush, self._clock)

    async def flush(self) -> None:
        """Write the places that wait."""
        if self._units.has_moves:
            await self._units.flush()

    # ------------------------------------------------------------------------------------------------------ waiting

    async def waiting(self, consumer: str) -> list[Waiting]:
        """The messages that wait, in order."""
        return [Waiting(*row) for row in await self._read(_WAITING, consumer)]

    async def outbox(self, after: int, limit: int) -> list[tuple[int, str, int, bytes]]:
        """What was said and is not known to be in its log yet: number, consumer, slot, message."""
        rows = await self._read(
            "select number, consumer, slot, said from {home}.cauce_outbox where number > $1 order by number limit $2",
            after,
            limit,
        )
        return [(number, consumer, slot, said) for number, consumer, slot, said in rows]

    async def relayed(self, numbers: Sequence[int]) -> None:
        """These stand in their log."""
        await self._read("delete from {home}.cauce_outbox where number = any($1::bigint[])", list(numbers))

    async def timer(self, name: str) -> int:
        """When something is due, in microseconds since 1970; 0 if that was never said."""
        rows = await self._read("select due from {home}.cauce_timers where name = $1", name)
        return int(rows[0][0]) if rows else 0

    async def due(self, id: str) -> int:
        """When the message of a timer is due, in microseconds since 1970; 0 if no such timer waits."""
        rows = await self._read("select due from {home}.cauce_later where id = $1", id)
        return int(rows[0][0]) if rows else 0

    async def fire(self, shares: Sequence[Share], now: int, limit: int) -> tuple[int, int]:
        """Let go what is due by now, and say when to look again."""
        fired, due = 0, await self._next(shares)
        if due and due <= now:
            held = list(zip(*((each.name, each.fence, each.slot or 0) for each in shares), strict=True))
            ((fired,),) = await self._read("select {home}.cauce_fire($1, $2, $3, $4, $5)", *held, now, limit)
            due = await self._next(shares)
        return fired, due

    async def _next(self, shares: Sequence[Share]) -> int:
        ((due,),) = await self._read(_NEXT, [each.name for each in shares])
        return due or 0

    # ---------------------------------------------------------------------------------------------------- the user's

    async def inventory(self) -> Inventory:
        """All that hangs on logs, whoever it is for."""
        places = await self._read(
            "select consumer, domain, slot, log, position from {home}.cauce_places order by 1, 2, 3"
        )
        consumers = await self._read("select distinct consumer from {home}.cauce_waiting order by 1")
        ((said, timers),) = await self._read(
            "select (select count(*) from {home}.cauce_outbox), "
            "(select count(*) from {home}.cauce_timers) + (select count(*) from {home}.cauce_later)"
        )
        waiting = [(consumer, each) for (consumer,) in consumers for each in await self.waiting(consumer)]
        return Inventory([Place(*row) for row in places], waiting, said, timers)

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of what was last committed. Raises `BadStatement` for SQL that cannot be run, or does more than read."""
        try:
            check(sql, self._link.schema, READS)
            text = numbered(sql)
            rows = await self._link.again(lambda session: self._fetched(session, sql, text, parameters), self._readers)
        except CauceError as error:
            if isinstance(error, BadStatement) or not isinstance(error, Refused):
                raise
            raise BadStatement(f"{sql!r} cannot be run on {self._home.service}'s store: {error}") from None
        return [tuple(row) for row in rows]

    async def _fetched(self, session: Any, sql: str, text: str, parameters: Sequence[Any]) -> list[Any]:
        try:
            rows: list[Any] = await session.fetch(text, *parameters)
            return rows
        except asyncpg.InvalidCachedStatementError:
            # The service's schema has grown since it was prepared.
            return list(await session.fetch(text, *parameters))
        except Exception as error:
            told = bad_statement(error, sql, self._home.service)
            if told is None:
                raise
            raise told from None

    async def _read(self, sql: str, *values: Any) -> list[Any]:
        try:
            return await self._link.fetch(filled(sql, self._home), *values)
        except asyncpg.PostgresError as error:
            raise translate(error, self._home.schema) from error

    async def close(self) -> None:
        """Write what waits, then let go."""
        if self._units.has_moves:
            self._units.flush().add_done_callback(lambda done: done.exception())
        await self._units.close()
        try:
            async with asyncio.timeout(self._link.patience):
                await self._readers.close()
        except Exception:
            self._readers.terminate()
