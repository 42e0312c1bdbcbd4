"""A bus in a PostgreSQL database: three logs, a wire, and the stores of services, shared by many machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cauce.backends.postgres.link import Link
from cauce.backends.postgres.log import PostgresLog
from cauce.backends.postgres.migrations import ensure
from cauce.backends.postgres.table import LOGS, Draft
from cauce.backends.postgres.writer import Writer
from cauce.clock import Clock, SystemClock
from cauce.errors import Refused

__all__ = ["PostgresBus", "open"]


class PostgresBus:
    """The bus in one schema. Made by `open`."""

    def __init__(self, link: Link, writer: Writer, id: str) -> None:
        self.id, self.link = id, link
        self._writer = writer
        self._logs = tuple(PostgresLog(f"{id}:{name}", number, link, writer) for number, name in enumerate(LOGS))
        self.facts, self.commands, self.records = self._logs
        self.wire: Any = None

    def told(self, draft: Draft) -> None:
        """A turn was written: wake who waits for it here, hint at it elsewhere."""
        for log, name, count in zip(self._logs, LOGS, draft.counts, strict=True):
            if count:
                log.wake(draft)
                self.link.hint(name)

    def store(self, service: str) -> Path:
        """The folder where a service keeps its own data."""
        raise Refused(f"a bus at {self.link.url} keeps no folder for {service}: name one for its store")

    async def close(self) -> None:
        """Write what waits, then let go. In a process forked since, nothing is touched."""
        await self._writer.close()
        await self.link.close()


async def open(url: str, *, clock: Clock | None = None, patience: float = 5.0) -> PostgresBus:
    """Open, and make if need be, the bus in a database.

    Parameters:
        url: `postgresql://user:password@host/database?schema=cauce`, whatever else asyncpg understands, too.
        patience: seconds a write waits for its turn, or for a server that is away, before it is refused.

    Raises `Unreachable`, `NotPermitted`, and `Refused` for a database that is not fit, or whose schema has another
    format than this code: its message says what to do.
    """
    link = Link(url, clock or SystemClock(), patience)
    await link.open()
    buses: list[PostgresBus] = []
    writer = Writer(link, lambda draft: buses[0].told(draft))
    try:
        id = await ensure(link)
        await writer.start()
    except BaseException:
        await writer.close()
        await link.close()
        raise
    buses.append(PostgresBus(link, writer, id))
    return buses[0]
