"""Whether the server, the role and the tables of a bus in PostgreSQL keep the promises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from cauce.backends import nothing_at
from cauce.backends.health import DURABLE, ONE_ORDER, Finding, Health
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.migrations import format_of
from cauce.backends.postgres.schema import STEPS
from cauce.clock import Clock

__all__ = ["examine", "health_of"]

_SAFE = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    # What a standby has to say is asked for on top of the flush of this server, whatever is asked for.
    "synchronous_commit": ("on", "local", "remote_write", "remote_apply"),
}
_SHOWN = ("synchronous_standby_names", "idle_in_transaction_session_timeout", "data_checksums")

_SETTINGS = """
select name, case when name like '%timeout' then current_setting(name) else setting end as is, source
from pg_settings where name = any($1) order by array_position($1, name)
"""

_ABOUT = """
select current_setting('server_version') as version, current_user as role,
    coalesce((select version from pg_stat_ssl where pid = pg_backend_pid() and ssl), 'none') as encryption,
    has_database_privilege(current_database(), 'create') as makes
"""

# Of the schema of the bus all that there is; of others only the stores of its services, and only if they survive.
_TABLES = """
select n.nspname as home, c.relname as name, c.relpersistence = 'u' as is_unlogged, array(
        select lower(r) from unnest(case
            when c.relkind = 'S' then '{}'::text[]
            when c.relname in ('bus', 'steps') then '{SELECT}'::text[]
            else '{SELECT,INSERT,UPDATE,DELETE}'::text[] end) r
        where n.nspname = $1 and not has_table_privilege(c.oid, r)
    ) || case when n.nspname = $1 and c.relkind = 'S' and not has_sequence_privilege(c.oid, 'usage')
        then '{usage}'::text[] else '{}' end as lacking
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p', 'S') and (n.nspname = $1 or (
    starts_with(n.nspname, $1 || '_')
    and exists (select from pg_class s where s.relnamespace = n.oid and s.relname = 'cauce_store')))
union all
select n.nspname, p.proname, false, '{execute}'
from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname = $1 and not has_function_privilege(p.oid, 'execute')
order by 1, 2
"""

_LONG = """
select pid, coalesce(nullif(application_name, ''), '?') as program, state,
    extract(epoch from clock_timestamp() - xact_start)::bigint as seconds
from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and xact_start < clock_timestamp() - interval '10 seconds'
    and backend_type = 'client backend'
order by xact_start limit 5
"""


async def examine(url: str, clock: Clock) -> Health:
    """The health of a bus that is there already.

    Raises `Refused` where there is none, or one of newer code, and what opening a link raises: `Unreachable`, for a
    replica too, and `NotPermitted`.
    """
    link = Link(url, clock)
    await link.open()
    try:
        format = await format_of(link)
        if format is None:
            raise nothing_at(link.url)
        health = await health_of(link)
        pooled = await _shares_sessions(link)
        seen = {**health.seen, "format": format, **_said(await link.fetch(_LONG))}
        return Health(
            health.bus, health.backend, seen, (*health.findings, *_behind(link, format), *_pooler(shares=pooled))
        )
    finally:
        await link.close()


async def health_of(link: Link) -> Health:
    """The health of a bus as a session like ours sees it, in three short statements."""
    settings = await link.fetch(_SETTINGS, [*_SAFE, *_SHOWN])
    ((version, role, encryption, makes),) = await link.fetch(_ABOUT)
    tables = await link.fetch(_TABLES, link.schema)
    seen: dict[str, str | int] = {
        "PostgreSQL": version,
        **{name: _with_source(is_, source) for name, is_, source in settings},
        "role": role,
        "makes schemas for stores": "yes" if makes else "no, its role may not",
        "encryption": encryption,
    }
    findings = (*_settings(settings), *_unlogged(tables), *_rights(link, role, tables))
    return Health(link.url, "postgresql", seen, findings)


# ---------------------------------------------------------------------------------------------------------- settings


def _with_source(is_: str, source: str) -> str:
    by = {"client": "said by Cauce", "configuration file": "configuration file", "default": "default"}.get(
        source, source
    )
    return f"{is_ or 'none'} ({by})"


def _settings(rows: Iterable[Any]) -> Iterator[Finding]:
    for name, is_, source in rows:
        if name in _SAFE and is_ not in _SAFE[name]:
            yield Finding(name, is_, "on", DURABLE, _cure(name, source))


def _cure(name: str, source: str) -> str:
    if name == "synchronous_commit":
        return (
            f"Cauce asks for it when it connects, and something between changed that (it is set by {source}): "
            "name the server itself in the address, not a pooler"
        )
    return f"alter system set {name} = on, then select pg_reload_conf() (a -c on the server's command line goes before)"


def _behind(link: Link, format: int) -> Iterator[Finding]:
    newest = STEPS[-1].number
    if format < newest:
        yield Finding(
            f"format of schema {link.schema}", str(format), str(newest), "services start (else they are refused)",
            "run cauce migrate as a role that may, or give a DBA what cauce migrate --sql prints",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ tables


def _unlogged(tables: Iterable[Any]) -> Iterator[Finding]:
    for home, name, is_unlogged, _ in tables:
        # Nothing on the wire is durable, on purpose.
        if is_unlogged and not name.startswith("wire_"):
            table = f"{home}.{name}"
            yield Finding(f"table {table}", "unlogged", "logged", DURABLE, f"alter table {table} set logged")


def _rights(link: Link, role: str, tables: Iterable[Any]) -> Iterator[Finding]:
    for home, name, _, lacking in tables:
        if lacking:
            rights = ", ".join(lacking)
            yield Finding(
                f"role {role} on {home}.{name}", f"without {rights}", f"with {rights}",
                "what services do is done (else they are told NotPermitted)",
                f"grant {rights} on {_kind(lacking)} {home}.{name} to {role} (cauce migrate --bus {link.url} --sql lists all)",
            )  # fmt: skip


def _kind(lacking: list[str]) -> str:
    return {"execute": "function", "usage": "sequence"}.get(lacking[0], "table")


# ---------------------------------------------------------------------------------------------------------- sessions


async def _shares_sessions(link: Link) -> bool:
    """Whether two connections that are open side by side are one on the server: then a pooler deals it out."""
    one = await link.dedicated("doctor")
    try:
        two = await link.dedicated("doctor")
        try:
            first, second = [await each.fetchval("select pg_backend_pid()") for each in (one, two)]
            return bool(first == second)
        finally:
            await two.close()
    finally:
        await one.close()


def _pooler(*, shares: bool) -> Iterator[Finding]:
    if shares:
        yield Finding(
            "sessions", "dealt out by a pooler, one a transaction", "one for each connection", ONE_ORDER,
            "name the server itself in the address, or set pool_mode = session",
        )  # fmt: skip


def _said(rows: Iterable[Any]) -> dict[str, str | int]:
    """Transactions that are open for long: they keep rows from being cleaned away, no more."""
    told = [f"process {pid} ({program}, {state}) for {seconds} s" for pid, program, state, seconds in rows]
    return {"open transactions": ", ".join(told) or "none for over 10 s"}
