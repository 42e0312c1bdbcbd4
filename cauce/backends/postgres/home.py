"""The schema of one service in a database: its name, the tables that we keep in it, and how it is made and grows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import asyncpg
import msgspec

from cauce.backends.postgres.dialect import check, statements
from cauce.backends.postgres.link import Link, Session, translate
from cauce.backends.postgres.migrations import lock_number
from cauce.errors import NotPermitted, Refused

__all__ = ["FORMAT", "Home", "filled", "furnish", "home_of", "quoted"]

FORMAT = 1
_LONGEST = 63
"""Bytes of a name; PostgreSQL cuts off what is beyond without an error."""

_TABLES = """
create table {home}.cauce_store (
    id text not null, service text not null, bus text not null, format integer not null, migrations text not null
);
create table {home}.cauce_instances (owner text collate "C" primary key, beat bigint not null);
-- token: of the call by which it was taken, so that a call whose reply was lost may be said again.
create table {home}.cauce_claims (
    name text collate "C" primary key, owner text not null, fence bigint not null,
    before text not null, token text not null
);
create table {home}.cauce_places (
    consumer text collate "C", domain text collate "C", slot integer, log text not null, position bigint not null,
    primary key (consumer, domain, slot)
);
create table {home}.cauce_waiting (
    consumer text collate "C", position bigint, stream text collate "C" not null, slot integer not null,
    attempts integer not null, due bigint not null, dead boolean not null, error text not null, trace text not null,
    raw bytea not null, primary key (consumer, position)
);
create table {home}.cauce_outbox (
    number bigint generated always as identity primary key, consumer text not null, slot integer not null,
    said bytea not null
);
create table {home}.cauce_timers (name text collate "C" primary key, due bigint not null);
-- One row for each transaction with units: whether it was committed is seen here when its reply was lost. Rows are added
-- and never updated: of a row that is updated all the time, each version must be looked through as long as any
-- transaction of the database, however idle, may still see the oldest. loud: others want to know of it.
create table {home}.cauce_turns (
    change bigint generated always as identity primary key, writer text collate "C" not null, number bigint not null,
    loud boolean not null, at timestamptz not null default clock_timestamp(), unique (writer, number)
);

create function {home}.cauce_tick(
    who text, joins boolean, dead text[], beats bigint[], seen bigint, by text,
    out owners text[], out lived bigint[], out names text[], out holders text[], out latest bigint, out touched boolean
) language plpgsql as $$
begin
    if joins then
        insert into {home}.cauce_instances values (who, 0) on conflict do nothing;
    end if;
    -- In one order everywhere, or two who strike each other off would wait for each other.
    perform from {home}.cauce_instances i where i.owner = who or i.owner = any(dead) order by i.owner for update;
    update {home}.cauce_instances set beat = beat + 1 where owner = who;
    delete from {home}.cauce_instances i using unnest(dead, beats) d (owner, beat)
        where i.owner = d.owner and i.beat = d.beat;
    select coalesce(array_agg(owner), '{}'), coalesce(array_agg(beat), '{}') into owners, lived
        from {home}.cauce_instances;
    select coalesce(array_agg(c.name), '{}'), coalesce(array_agg(c.owner), '{}') into names, holders
        from {home}.cauce_claims c where c.owner <> '';
    select coalesce(max(t.change), 0), coalesce(bool_or(t.loud and t.writer <> by), false) into latest, touched
        from {home}.cauce_turns t where t.change > seen;
    latest := greatest(latest, seen);
    -- A writer's last row is what it asks for when it comes back after a long time.
    delete from {home}.cauce_turns t
        using (select change from {home}.cauce_turns order by change limit 10000) o
        where t.change = o.change and t.change < latest and t.at < clock_timestamp() - interval '5 minutes'
        and (t.at < clock_timestamp() - interval '7 days' or exists (
            select from {home}.cauce_turns n where n.writer = t.writer and n.number > t.number));
end $$;

create function {home}.cauce_take(who text, wanted text[], call text)
returns table (taken text, raised bigint, left_clean boolean, holder text) language plpgsql as $$
begin
    -- Nobody's fence may rise while units are written under it.
    perform pg_advisory_xact_lock({lock});
    if not exists (select from {home}.cauce_instances i where i.owner = who for share) then
        return;
    end if;
    insert into {home}.cauce_claims as c (name, owner, fence, before, token)
    select w, who, 1, '', call from unnest(wanted) w order by w
    on conflict (name) do update
        set owner = who, fence = c.fence + 1, before = c.owner, token = call
        where not exists (select from {home}.cauce_instances i where i.owner = c.owner);
    return query select c.name, c.fence, c.before = '', c.before from unnest(wanted) with ordinality w (name, n)
        join {home}.cauce_claims c on c.name = w.name and c.token = call and c.owner = who order by w.n;
end $$;

create function {home}.cauce_decide(whose text, which bigint, again boolean, call text)
returns boolean language plpgsql as $$
begin
    perform pg_advisory_xact_lock({lock});
    if exists (select from {home}.cauce_turns where writer = call) then
        return true;
    end if;
    if again then
        update {home}.cauce_waiting set dead = false, attempts = 0, due = 0
            where consumer = whose and position = which and dead;
    else
        delete from {home}.cauce_waiting where consumer = whose and position = which and dead;
    end if;
    if not found then
        return false;
    end if;
    insert into {home}.cauce_turns (writer, number, loud) values (call, 0, true);
    return true;
end $$;
"""

_LATER = """
create table {home}.cauce_later (
    id text collate "C" primary key, share text collate "C" not null, handler text not null, due bigint not null,
    said bytea not null, number bigint generated always as identity
);
create index cauce_later_due on {home}.cauce_later (share, due, number);

create function {home}.cauce_fire(held text[], fences bigint[], slots integer[], upto bigint, most integer)
returns bigint language plpgsql as $$
declare
    fired bigint;
begin
    -- Nobody's fence may rise meanwhile, and what is said is numbered in the order of the commits.
    perform pg_advisory_xact_lock({lock});
    with gone as (
        delete from {home}.cauce_later l using (
            select d.id, s.slot from unnest(held, fences, slots) s (name, fence, slot)
            join {home}.cauce_claims c on c.name = s.name and c.fence = s.fence
            cross join lateral (
                select id, due, number from {home}.cauce_later where share = s.name and due <= upto
                order by due, number limit most
            ) d order by d.due, d.number limit most
        ) d where l.id = d.id returning l.handler, d.slot, l.said, l.due, l.number
    )
    insert into {home}.cauce_outbox (consumer, slot, said) select handler, slot, said from gone order by due, number;
    get diagnostics fired = row_count;
    return fired;
end $$;
"""
"""Came later than the other tables, and is made in a store that has it not yet; older code does not mind."""


class Home(NamedTuple):
    """The schema of a service: as it is called, as SQL names it, and the number of the lock of its writers."""

    service: str
    schema: str
    quoted: str
    lock: int


def home_of(bus: str, service: str) -> Home:
    """Where a service of a bus lives: `cauce_users`. Another service, or another bus, has another schema.

    An underscore of the service is doubled, so that the last that stands alone divides; what is too long, or would
    begin with two, ends with a digest.
    """
    name = f"{bus}_{service.replace('_', '__')}"
    if len(name.encode()) > _LONGEST or bus.endswith("_"):
        digest = blake2b(f"{bus}/{service}".encode(), digest_size=8).hexdigest()
        # Two underscores and then 16 digits are the end of no other name: a service's digits follow one or four.
        name = f"{name[: _LONGEST - 19]}___{digest}"
    return Home(service, name, quoted(name), lock_number(name, "store"))


def quoted(name: str) -> str:
    """A name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def filled(sql: str, home: Home) -> str:
    """With the schema's name and the lock's number in their places."""
    return sql.replace("{home}", home.quoted).replace("{lock}", str(home.lock))


async def furnish(link: Link, home: Home, migrations: Sequence[str] | None) -> tuple[str, bool]:
    """Make what is missing and run the migrations that are due, in one transaction. Gives the id, and if it is fresh.

    Parameters:
        migrations: None where none is due.

    Raises `Refused` for the store of another service, for migrations that are not those it was made by, and where the
    role may not make it, with what is to be done.
    """
    session = await link.dedicated("store", search_path=f"{home.quoted}, pg_temp")
    try:
        async with session.transaction():
            # Whoever migrates may take his time.
            await session.execute(f"set local lock_timeout = 0; select pg_advisory_xact_lock({home.lock})")
            id, before = await _made(session, link, home)
            await _migrate(session, link, home, before, tuple(before if migrations is None else migrations))
            fresh = not await session.fetchval(filled("select exists (select from {home}.cauce_claims)", home))
        return id, fresh
    except asyncpg.InsufficientPrivilegeError as error:
        raise _not_permitted(link, home, error) from error
    except Exception as error:
        raise translate(error, f"{link.url}, schema {home.schema}") from error
    finally:
        session.terminate()


def _not_permitted(link: Link, home: Home, error: Exception) -> Refused:
    return Refused(
        f"the role may not make the store of service {home.service!r} at {link.url}: {error}. Let it be made once by a role "
        f"that may (start the service with its address), or run there: create schema if not exists {home.quoted} authorization "
        f"the_role; or, where the schema is there: grant usage, create on schema {home.quoted} to the_role; grant select, "
        f"insert, update, delete on all tables in schema {home.quoted} to the_role"
    )


async def _made(session: Session, link: Link, home: Home) -> tuple[str, list[str]]:
    row: Any = None
    if await session.fetchval("select to_regclass($1) is not null", f"{home.quoted}.cauce_store"):
        row = await session.fetchrow(
            filled("select id, service, bus, format, migrations from {home}.cauce_store", home)
        )
    else:
        if not await session.fetchval("select to_regnamespace($1) is not null", home.quoted):
            await session.execute(f"create schema {home.quoted}")
        await session.execute(filled(_TABLES, home))
    if not await session.fetchval("select to_regclass($1) is not null", f"{home.quoted}.cauce_later"):
        await session.execute(filled(_LATER, home))
    if row is None:
        row = link.clock.id(), home.service, link.schema, FORMAT, "[]"
        await session.execute(filled("insert into {home}.cauce_store values ($1, $2, $3, $4, $5)", home), *row)
    id, owner, bus, format, done = row
    if (owner, bus) != (home.service, link.schema):
        raise Refused(
            f"schema {home.schema} of {link.url} is the store of service {owner!r} of bus {bus}, not of {home.service!r} of {link.schema}: "
            "name another bus"
        )
    if format > FORMAT:
        raise Refused(
            f"schema {home.schema} of {link.url} has format {format}, this code knows {FORMAT}: deploy newer code"
        )
    return id, msgspec.json.decode(done, type=list[str])


async def _migrate(session: Session, link: Link, home: Home, before: list[str], parts: tuple[str, ...]) -> None:
    service = home.service
    if before != list(parts[: len(before)]):
        raise Refused(
            f"schema {home.schema} of {link.url} was made by other SQL than service {service!r} has now: leave what ran as it was, and add what is new behind it"
        )
    for number, part in enumerate(parts[len(before) :], len(before) + 1):
        try:
            for statement in statements(part):
                check(statement, link.schema, None)
                await session.execute(statement)
        except asyncpg.InsufficientPrivilegeError as error:
            raise NotPermitted(
                f"part {number} of the schema of service {service!r} cannot be run by this role: {error}: grant it, or start the service once as a role that may"
            ) from error
        except (asyncpg.PostgresError, Refused) as error:
            if isinstance(error, asyncpg.PostgresError) and str(error.sqlstate)[:2] in ("08", "40", "53", "57", "58"):
                raise
            raise Refused(f"part {number} of the schema of service {service!r} cannot be run: {error}") from None
    if len(parts) > len(before):
        done = msgspec.json.encode(list(parts)).decode()
        await session.execute(filled("update {home}.cauce_store set migrations = $1", home), done)
