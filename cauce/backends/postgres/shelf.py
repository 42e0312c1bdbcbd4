"""Views and replicas in schemas of a PostgreSQL database: where they lie, who feeds them, who builds one.

The live build of a view has the name of the view, others have its name and their number: to let another one be live is
to rename two schemas. So whoever reads names the view, and need not ask which build is live.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from hashlib import blake2b

from cauce.backends.postgres.builds import SchemaBuilds
from cauce.backends.postgres.dialect import check, statements
from cauce.backends.postgres.home import Home
from cauce.backends.postgres.link import Link, Session
from cauce.backends.postgres.migrations import lock_number
from cauce.errors import Refused, Unreachable

__all__ = ["PostgresShelf", "SessionLock"]

_LONGEST = 51
"""Bytes of a name that leave room for a number behind it."""

_LOOK = 2.0
_NAMES = """select n.nspname from pg_namespace n join pg_class c on c.relnamespace = n.oid and c.relname = 'cauce_place'
    where starts_with(n.nspname, $1)"""
_NUMBERED = re.compile(r":[1-9][0-9]{0,9}\Z")


class PostgresShelf:
    """See `cauce.shelf.Shelf` for what each method promises. Nothing is made before something is built."""

    dialect = "postgresql"

    def __init__(self, link: Link, home: Home) -> None:
        self._link, self._home = link, home
        self.lead = SessionLock(link, lock_number(home.schema, "lead"))

    def builds(self, name: str, what: str) -> SchemaBuilds:
        schema = f"{self._home.schema}:{name}"
        if len(schema.encode()) > _LONGEST:
            digest = blake2b(schema.encode(), digest_size=8).hexdigest()
            schema = schema.encode()[: _LONGEST - 17].decode(errors="ignore") + ":" + digest
        building = SessionLock(self._link, lock_number(schema, "build"))
        return SchemaBuilds(self._link, schema, what, building)

    async def names(self) -> list[str]:
        rows = await self._link.fetch(_NAMES, f"{self._home.schema}:")
        found = [name.removeprefix(f"{self._home.schema}:") for (name,) in rows]
        return sorted({_NUMBERED.sub("", each) for each in found})

    def check(self, what: str, tables: str) -> None:
        for statement in statements(tables):
            try:
                check(statement, self._link.schema)
            except Refused as error:
                raise Refused(f"{what}: its schema is refused: {error}") from None


class SessionLock:
    """An advisory lock of a session: gone with it, whoever ends it. Who holds it looks whether it is still there."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number
        self._session: Session | None = None
        self._gone = asyncio.Event()
        self.held = False

    async def take(self) -> bool:
        if self._session is not None and self._session.is_closed():
            self._drop()
        if not self.held:
            try:
                session = self._session or await self._connect()
                async with asyncio.timeout(self._link.patience):
                    self.held = bool(await session.fetchval("select pg_try_advisory_lock($1)", self._number))
            except Exception as error:
                self._drop()
                raise Unreachable(f"{self._link.url}: {error!r}: start the server or mend the address") from error
        return self.held

    async def lost(self) -> None:
        while self._session is not None and self.held:
            try:
                async with asyncio.timeout(self._link.patience):
                    await self._session.execute("select 1")
            except Exception:
                self._drop()
                return
            # A server that crashed takes the end of what was committed with it: nobody may rely on that any more.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await self._gone.wait()

    async def _connect(self) -> Session:
        gone = self._gone = asyncio.Event()
        session = self._session = await self._link.dedicated("lead")
        session.add_termination_listener(lambda _: gone.set())
        return session

    def _drop(self) -> None:
        self.held = False
        if self._session is not None:
            self._session.terminate()
        self._session = None

    async def release(self) -> None:
        if self._session is not None and self.held:
            with suppress(Exception):
                async with asyncio.timeout(self._link.patience):
                    await self._session.execute(f"select pg_advisory_unlock({self._number})")
        self._drop()
