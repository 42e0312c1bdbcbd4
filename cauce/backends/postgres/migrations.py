"""Bringing the schema of a bus up to date, step by step under a lock, or telling a DBA how to."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from cauce.backends.postgres.link import SCHEMA, Link, Session, translate
from cauce.backends.postgres.schema import STEPS, Step
from cauce.clock import Clock
from cauce.errors import CauceError, NotPermitted, Refused

__all__ = ["ensure", "format_of", "lock_number", "migrate", "sql"]

_BEGIN = """
select pg_advisory_xact_lock({migrating});
-- To make a schema needs a right that "if not exists" asks for even where it exists.
do $make$ begin if to_regnamespace('{schema}') is null then create schema {schema}; end if; end $make$;
create table if not exists {schema}.bus (id text collate "C" not null);
create table if not exists {schema}.steps (
    number integer primary key, name text not null, done timestamptz not null default clock_timestamp()
);
"""

_GRANTS = """
-- What an ordinary role needs, that is to use the bus, but not to change its schema:
--   grant usage on schema {schema} to the_role;
--   grant select, insert, update, delete on all tables in schema {schema} to the_role;
--   grant usage on all sequences in schema {schema} to the_role;
--   grant execute on all functions in schema {schema} to the_role;
"""


def lock_number(schema: str, purpose: str = "write") -> int:
    """The number of an advisory lock, which are told apart by numbers alone in one database."""
    return int.from_bytes(blake2b(f"cauce {purpose} {schema}".encode(), digest_size=8).digest(), "big", signed=True)


def _filled(text: str, schema: str) -> str:
    for name, value in (
        ("{schema}", f'"{schema}"'),
        ("{lock}", str(lock_number(schema))),
        ("{migrating}", str(lock_number(schema, "migrate"))),
    ):
        text = text.replace(name, value)
    return text


def sql(schema: str = SCHEMA) -> str:
    """All steps as one script for psql, run by a role that may create schemas. It does only what is not done yet."""
    parts = [f"-- Cauce, format {STEPS[-1].number}: psql --set ON_ERROR_STOP=1 --file this.sql database", "begin;"]
    parts += [_BEGIN, "insert into {schema}.bus select gen_random_uuid() where not exists (select from {schema}.bus);"]
    for step in STEPS:
        parts.append(
            f"do $step$\nbegin\nif exists (select from {{schema}}.steps where number = {step.number}) then return; end if;"
            f"\n{step.sql}\ninsert into {{schema}}.steps (number, name) values ({step.number}, '{step.name}');\nend\n$step$;"
        )
    parts += ["commit;", _GRANTS]
    return _filled("\n".join(parts), schema)


async def migrate(url: str, clock: Clock) -> list[str]:
    """Make or upgrade the schema in one transaction. Gives the names of the steps that were done, none if none was due.

    Raises `NotPermitted` if the role may not, `Refused` if the schema is newer than this code.
    """
    link = Link(url, clock)
    await link.open()
    try:
        return await _migrate(link)
    finally:
        await link.close()


async def _migrate(link: Link) -> list[str]:
    session = await link.dedicated("migrate")
    try:
        async with session.transaction():
            return await _steps(session, link)
    except Exception as error:
        raise translate(error, link.url) from error
    finally:
        await session.close()


async def _steps(session: Session, link: Link) -> list[str]:
    await session.execute(f"set local lock_timeout = 0; {_filled(_BEGIN, link.schema)}")
    await session.execute(
        _filled("insert into {schema}.bus select $1 where not exists (select from {schema}.bus)", link.schema),
        link.clock.id(),
    )
    before = await session.fetchval(_filled("select coalesce(max(number), 0) from {schema}.steps", link.schema))
    _not_newer(link, before)
    due: list[Step] = [step for step in STEPS if step.number > before]
    for step in due:
        await session.execute(_filled(step.sql, link.schema))
        await session.execute(
            _filled("insert into {schema}.steps (number, name) values ($1, $2)", link.schema), step.number, step.name
        )
    return [step.name for step in due]


async def ensure(link: Link) -> str:
    """The id of the bus, whose schema is made if there is none.

    Raises `Refused` where it is not of this code's format, or there is none and the role may not make it.
    """
    row = await _state(link)
    if row is None:
        try:
            await _migrate(link)
        except NotPermitted as error:
            raise Refused(
                f"{link.url} has no schema {link.schema} yet, and may not make it ({error}); {_CURE}"
            ) from error
        row = await _state(link)
    if row is None:
        raise Refused(f"{link.url} has no bus in its schema {link.schema}: {_CURE}")
    _not_newer(link, row[1])
    if row[1] < STEPS[-1].number:
        raise Refused(
            f"the schema {link.schema} of {link.url} has format {row[1]}, this code needs {STEPS[-1].number}: {_CURE}"
        )
    id: str = row[0]
    return id


async def format_of(link: Link) -> int | None:
    """The format of the schema of a bus, None where there is none. Raises `Refused` if it is newer than this code."""
    row = await _state(link)
    if row is None:
        return None
    format: int = row[1]
    _not_newer(link, format)
    return format


_CURE = "run cauce migrate as a role that may, or give a DBA what cauce migrate --sql prints"


async def _state(link: Link) -> Any:
    """Id and format, None where nothing is there."""
    try:
        (there,) = await link.fetch(
            "select exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = $1 and c.relname = 'steps') as it",
            link.schema,
        )
        if not there["it"]:
            return None
        rows = await link.fetch(
            _filled("select id, coalesce((select max(number) from {schema}.steps), 0) from {schema}.bus", link.schema)
        )
    except NotPermitted as error:
        raise NotPermitted(f"{error}:{_filled(_GRANTS, link.schema).replace('--', '')}") from error
    except CauceError:
        raise
    return rows[0] if rows else None


def _not_newer(link: Link, format: int) -> None:
    if format > STEPS[-1].number:
        raise Refused(
            f"the schema {link.schema} of {link.url} has format {format}, this code knows {STEPS[-1].number}: deploy newer code"
        )
