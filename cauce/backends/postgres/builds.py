"""Builds of a view or replica as schemas: see `cauce.shelf` for what each method promises.

Whoever writes a build takes its place first, if it is where he believes it to be: so of two who believe themselves its
writer one is told `Moved`, and a commit whose reply was lost is not said twice. Who lets another build be live takes
the place of the old one away first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import asyncpg

from cauce.backends.postgres.dialect import check, numbered, statements
from cauce.backends.postgres.faults import GRACE, SLOWEST, blamed
from cauce.backends.postgres.home import quoted
from cauce.backends.postgres.link import Link, Session, is_lost, translate
from cauce.backends.postgres.reading import LiveReading, Place, is_there, place_of
from cauce.errors import CauceError, NotPermitted, Refused
from cauce.shelf import Build, Lock, Moved, Part, Unusable, Wrong
from cauce.sql import Run
from cauce.threads import in_thread

__all__ = ["SchemaBuilds"]

_log = logging.getLogger("cauce")
_PLACE = """create table cauce_place (
    build text not null, number bigint not null, log text not null, position bigint primary key, fingerprint text not null
)"""
_NUMBERS = "select substr(nspname, length($1) + 2)::bigint from pg_namespace where nspname ~ ('^' || $2 || ':[1-9][0-9]{0,9}$') order by 1"
# What lies elsewhere and would be dropped with it: views, and tables with keys to it, columns of its types, or its
# functions in defaults.
_OTHERS = """with own as (
        select 'pg_class'::regclass::oid as kind, oid from pg_class where relnamespace = to_regnamespace(quote_ident($1))
        union all select 'pg_type'::regclass, oid from pg_type where typnamespace = to_regnamespace(quote_ident($1))
        union all select 'pg_proc'::regclass, oid from pg_proc where pronamespace = to_regnamespace(quote_ident($1))
    ), resting as (
        select coalesce(r.ev_class, c.conrelid, a.adrelid, case when d.classid = 'pg_class'::regclass then d.objid end) as oid
        from own join pg_depend d on d.refclassid = own.kind and d.refobjid = own.oid and d.deptype in ('n', 'a')
        left join pg_rewrite r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid
        left join pg_constraint c on d.classid = 'pg_constraint'::regclass and c.oid = d.objid
        left join pg_attrdef a on d.classid = 'pg_attrdef'::regclass and a.oid = d.objid
    )
    select distinct c.oid::regclass::text from resting join pg_class c using (oid)
    where c.relnamespace <> to_regnamespace(quote_ident($1)) and c.relkind <> 'i' order by 1"""
# What a crash of the server takes from its end is read again: a commit need not be on the disk.
_TAKE = """select set_config('search_path', $3, true), set_config('synchronous_commit', 'off', true),
    set_config('statement_timeout', $4, true) from {schema}.cauce_place where build = $1 and position = $2 for update"""
_MOVE = "update {schema}.cauce_place set position = $1 where position = $2"


class SchemaBuilds:
    """A schema for each build."""

    def __init__(self, link: Link, schema: str, what: str, building: Lock) -> None:
        self._link, self._schema, self._what = link, schema, what
        self.building = building
        self.place = f"schema {quoted(schema)} of {link.url}"
        self.reading = LiveReading(link, schema, what)
        self._live: str | None = None
        self._held: _Hold | None = None

    def stamp(self) -> object:
        return self._live

    async def live(self) -> int:
        place = await place_of(self._link, self._schema)
        self._live = place.build if place else None
        return place.number if place else 0

    async def numbers(self) -> list[int]:
        found = await self._link.fetch(_NUMBERS, self._schema, _escaped(self._schema))
        live = await self.live()
        return sorted({*(number for (number,) in found), *([live] if live else [])})

    async def open(self, number: int) -> SchemaBuild:
        for name in (self._schema, f"{self._schema}:{number}"):
            place = await place_of(self._link, name)
            if place is not None and place.number == number:
                return SchemaBuild(self._link, self._schema, name, place)
        raise Unusable(f"build {number} of {self.place} is missing")

    async def create(self, number: int, tables: str, log: str, fingerprint: str) -> SchemaBuild:
        name = f"{self._schema}:{number}"
        place = Place(self._link.clock.id(), number, log, 0, fingerprint)
        session = await self._link.dedicated("build", search_path=f"{quoted(name)}, pg_temp", lock_timeout="0")
        try:
            async with session.transaction():
                await session.execute(f"create schema {quoted(name)}")
                await session.execute(_PLACE)
                await session.execute("insert into cauce_place values ($1, $2, $3, $4, $5)", *place)
                for statement in statements(tables):
                    check(statement, self._link.schema)
                    await session.execute(statement)
        except asyncpg.InsufficientPrivilegeError as error:
            raise NotPermitted(
                f"{self._what} cannot be made at {self._link.url}: {error}: grant create on the database to this role"
            ) from error
        except Exception as error:
            if (words := blamed(error)) is not None:
                raise Refused(f"{self._what}: its schema is refused by PostgreSQL: {words}") from None
            raise translate(error, self.place) from error
        finally:
            session.terminate()
        return SchemaBuild(self._link, self._schema, name, place)

    async def switch(self, build: Build) -> None:
        assert isinstance(build, SchemaBuild)
        hold = self._held or await _Hold.begin(self._link, self._schema)
        try:
            async with asyncio.timeout(SLOWEST):
                await hold.switch(self._schema, build)
        except Exception as error:
            raise translate(error, self.place) from error
        finally:
            if self._held is None:
                await hold.close()
        build.name, self._live = self._schema, build.id

    async def hold(self) -> _Hold | None:
        if not await self.live():
            return None
        hold = self._held = await _Hold.begin(self._link, self._schema)
        hold.closed = self._let_go
        return hold

    def _let_go(self) -> None:
        self._held = None

    async def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            name = f"{self._schema}:{number}"
            try:
                if others := await self._link.fetch(_OTHERS, name):
                    _log.warning(
                        "build %s of %s stays, and is not written any more, because others rest on it: %s: make them anew on %s, then drop schema %s",
                        number, self._what, ", ".join(each for (each,) in others), quoted(self._schema), quoted(name),
                    )  # fmt: skip
                    continue
                await self._link.again(lambda session, name=name: _drop(session, name))  # type: ignore[misc]
            except CauceError as error:
                _log.info("build %s of %s is removed another time: %s", number, self._what, error)

    async def clear(self) -> None:
        live = await self.live()
        if live:
            # Under a number it goes like the others.
            await self._link.again(lambda session: session.execute(self._renamed(live)))
            self._live = None
        await self.remove(await self.numbers())

    def _renamed(self, live: int) -> str:
        return f"alter schema {quoted(self._schema)} rename to {quoted(f'{self._schema}:{live}')}"


class SchemaBuild:
    """One schema, and how far it is."""

    def __init__(self, link: Link, live: str, name: str, place: Place) -> None:
        self._link, self._live, self.name = link, live, name
        self.id, self.number, self.log, self.position, self.fingerprint = place
        self.place = f"build {self.number} in schema {quoted(name)} of {link.url}"

    async def write(self, parts: Iterable[Part]) -> int:
        try:
            async with self._link.pool.acquire(timeout=self._link.patience) as session:
                position = await self._transaction(session, parts)
        except _Asked as asked:
            raise asked.error from None
        except _Missing as missing:
            place = await place_of(self._link, self._live)
            if place is not None and place.build == self.id:
                raise Moved(f"{self.place} is live by now") from None
            raise Unusable(f"{self.place}: {missing}") from missing
        except (Wrong, Moved):
            raise
        except Exception as error:
            raise translate(error, self.place) from error
        self.position = position
        return position

    async def _transaction(self, session: Any, parts: Iterable[Part]) -> int:
        whole, done = session.transaction(), [0]
        try:
            async with asyncio.timeout(self._link.patience):
                await whole.start()
            await self._take(session)
            position = await self._written(session, parts, done)
            await self._commit(whole, done)
        except BaseException:
            await self._rolled_back(session, whole)
            raise
        return position

    async def _take(self, session: Any) -> None:
        """Nobody else writes it until the end of the transaction. Raises `Moved` if somebody did before."""
        schema = quoted(self.name)
        values = self.id, self.position, f"{schema}, pg_temp", f"{SLOWEST}s"
        try:
            async with asyncio.timeout(self._link.patience + GRACE):
                found = await session.fetch(_TAKE.replace("{schema}", schema), *values)
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError) as error:
            raise _Missing(str(error)) from error
        if not found:
            raise Moved(f"{self.place} is not where it was left: it goes on from there")

    async def _written(self, session: Any, parts: Iterable[Part], done: list[int]) -> int:
        before, position, each = self.position, self.position, iter(parts)
        while part := await in_thread(_next, each):
            position, runs = part
            for run in runs:
                await self._run(session, run, done)
        async with asyncio.timeout(self._link.patience + GRACE):
            await session.fetch(_MOVE.replace("{schema}", quoted(self.name)), position, before)
        return position

    async def _run(self, session: Any, run: Run, done: list[int]) -> None:
        sql, many = run
        try:
            check(sql, self._link.schema)
            # What a session remembers of a text names types and tables of one build, and no other has them.
            text = f"/* {self.id} */ {numbered(sql)}"
            async with asyncio.timeout(SLOWEST + GRACE):
                if len(many) == 1:
                    await session.fetch(text, *many[0])
                else:
                    await session.executemany(text, many)
        except Exception as error:
            if isinstance(error, TimeoutError) and len(many) > 1:
                raise Wrong(done[0], f"all {len(many)} together take longer than {SLOWEST} s, in {sql!r}") from error
            if is_lost(error) or (words := blamed(error)) is None:
                raise
            raise Wrong(done[0], f"{words}, in {sql!r}") from error
        done[0] += 1

    async def _commit(self, whole: Any, done: list[int]) -> None:
        try:
            async with asyncio.timeout(SLOWEST + GRACE):
                await whole.commit()
        except asyncpg.PostgresError as error:
            # What a table checks only at the end is told now.
            if (words := blamed(error)) is None:
                raise
            raise Wrong(max(done[0] - 1, 0), words) from error

    async def _rolled_back(self, session: Any, whole: Any) -> None:
        try:
            async with asyncio.timeout(self._link.patience):
                await whole.rollback()
        except Exception:
            # Nobody is there, or nobody answers.
            session.terminate()

    async def close(self) -> None:
        """It holds nothing."""


class _Missing(Exception):
    """There is no schema of this name, or it is none of ours."""


class _Asked(Exception):
    """What asking for the parts raised: it is theirs, whatever its kind."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _next(parts: Iterator[Part]) -> Part | None:
    try:
        return next(parts, None)
    except Exception as error:
        raise _Asked(error) from error


class _Hold:
    """A transaction that has the place of the live build, until it is closed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.closed: Callable[[], None] = _nothing

    @classmethod
    async def begin(cls, link: Link, schema: str) -> _Hold:
        session = await link.dedicated("build", idle_in_transaction_session_timeout="0")
        hold = cls(session)
        try:
            await hold.start(schema)
        except BaseException as error:
            session.terminate()
            if isinstance(error, Exception):
                raise translate(error, link.url) from error
            raise
        return hold

    async def start(self, schema: str) -> None:
        await self._session.execute("begin")
        if await is_there(self._session, schema):
            await self._session.execute(f"select from {quoted(schema)}.cauce_place for update")

    async def switch(self, schema: str, build: SchemaBuild) -> None:
        execute = self._session.execute
        if await is_there(self._session, schema):
            ((id, number),) = await self._session.fetch(f"select build, number from {quoted(schema)}.cauce_place")
            if id == build.id:
                return
            # Whoever waits for this row to write the old build sees that it is not his any more.
            await execute(f"update {quoted(schema)}.cauce_place set build = ''")
            await execute(f"alter schema {quoted(schema)} rename to {quoted(f'{schema}:{number}')}")
        await execute(f"alter schema {quoted(f'{schema}:{build.number}')} rename to {quoted(schema)}")
        await execute("commit")
        await execute("begin")

    async def close(self) -> None:
        self.closed()
        self._session.terminate()


def _nothing() -> None:
    """Nobody waits for it to be closed."""


def _escaped(text: str) -> str:
    return "".join(each if each.isalnum() or each in "_:" else f"\\{each}" for each in text)


async def _drop(session: Any, schema: str) -> None:
    """Whoever feeds waits for it, and a reader that is slow is not worth that."""
    async with session.transaction():
        await session.execute(f"set local lock_timeout = '1s'; drop schema if exists {quoted(schema)} cascade")
