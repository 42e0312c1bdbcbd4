"""A bus in a PostgreSQL database: three logs, a wire, and the stores of services, shared by many machines."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cauce.backends import nothing_at
from cauce.backends.health import Health
from cauce.backends.postgres.health import health_of
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.log import PostgresLog
from cauce.backends.postgres.migrations import ensure
from cauce.backends.postgres.stores import PostgresStores
from cauce.backends.postgres.table import LOGS, Draft
from cauce.backends.postgres.wire import PostgresWire
from cauce.backends.postgres.writer import Writer
from cauce.clock import Clock, SystemClock
from cauce.errors import Damaged

__all__ = ["PostgresBus", "open", "stores_at"]

_PATIENCE = 5.0


class PostgresBus:
    """The bus in one schema. Made by `open`."""

    def __init__(self, link: Link, writer: Writer, id: str, clock: Clock) -> None:
        self.id, self.link, self._pid = id, link, os.getpid()
        self._writer = writer
        self._logs = tuple(PostgresLog(f"{id}:{name}", number, link, writer) for number, name in enumerate(LOGS))
        self.facts, self.commands, self.records = self._logs
        self.wire = PostgresWire(link, clock)
        self.stores = PostgresStores(link, clock)

    def told(self, draft: Draft) -> None:
        """A turn was written: wake who waits for it here, hint at it elsewhere."""
        for log, name, count in zip(self._logs, LOGS, draft.counts, strict=True):
            if count:
                log.wake(draft)
                self.link.hint(name)

    async def health(self) -> Health:
        """What the server, the role and the tables are, against what the promises need."""
        return await health_of(self.link)

    async def close(self) -> None:
        """Write what waits, then let go. In a process forked since, nothing is touched."""
        if os.getpid() != self._pid:
            return
        await self.wire.close()
        await self._writer.close()
        await self.link.close()


async def open(url: str, *, clock: Clock | None = None, patience: float = _PATIENCE, make: bool = True) -> PostgresBus:
    """Open, and make if need be, the bus in a database.

    Parameters:
        url: `postgresql://user:password@host/database?schema=cauce`, whatever else asyncpg understands, too.
        make: whether the bus is made where there is none.
        patience: seconds a write waits for its turn, or for a server that is away, before it is refused.

    Raises `Unreachable`, `NotPermitted`, and `Refused` for a database that is not fit, or whose schema has another
    format than this code: its message says what to do.
    """
    clock = clock or SystemClock()
    link = Link(url, clock, patience)
    await link.open()
    buses: list[PostgresBus] = []
    writer = Writer(link, lambda draft: buses[0].told(draft))
    try:
        if not make:
            await _there(link)
        id = await ensure(link)
        if make:
            # Who only looks may look at what is damaged.
            await _check_ends(link)
        await writer.start()
    except BaseException:
        await writer.close()
        await link.close()
        raise
    buses.append(PostgresBus(link, writer, id, clock))
    return buses[0]


async def _check_ends(link: Link) -> None:
    """Raises `Damaged` where a log lacks its last entry, which nobody ever removes on purpose."""
    for name in LOGS:
        ((head, last),) = await link.fetch(
            f"select (select {name} from turns order by change desc limit 1), coalesce((select max(position) from {name}), 0)"
        )
        if head != last:
            raise Damaged(
                f"{name} of {link.url} end at position {last}, but the last turn says {head}: entries are lost; run cauce verify, restore "
                "from a backup"
            )


async def _there(link: Link) -> None:
    """Raises `Refused` where there is no bus."""
    ((found,),) = await link.fetch("select to_regnamespace(quote_ident($1)) is not null", link.schema)
    if not found:
        raise nothing_at(link.url)


@asynccontextmanager
async def stores_at(url: str, *, clock: Clock) -> AsyncIterator[PostgresStores]:
    """The stores of services in a database, whatever bus they are on."""
    link = Link(url, clock, _PATIENCE)
    await link.open()
    try:
        yield PostgresStores(link, clock)
    finally:
        await link.close()
