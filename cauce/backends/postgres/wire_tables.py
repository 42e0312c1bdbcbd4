"""The tables of the wire. Nothing on it is durable: they are not in the server's log, and a crash empties them."""

from __future__ import annotations

__all__ = ["WIRE_TABLES"]

# Rows come and go by the thousand: a table that is not cleaned for a minute is looked through in vain.
_BUSY = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000"

WIRE_TABLES = f"""
-- Which processes are there, and what each says of itself.
create unlogged table {{schema}}.wire_processes (
    token text collate "C" primary key,
    beat bigint not null,
    at timestamptz not null,
    present bytea not null
);

-- One row, another one after each crash.
create unlogged table {{schema}}.wire_epoch (
    one boolean primary key default true check (one),
    epoch text collate "C" not null
);

create unlogged table {{schema}}.wire_questions (
    asked text collate "C",
    asker text collate "C",
    n bigint,
    address text collate "C" not null,
    seconds double precision not null,
    until timestamptz not null,
    payload bytea not null,
    primary key (asked, asker, n)
) with ({_BUSY});

create unlogged table {{schema}}.wire_answers (
    asker text collate "C",
    n bigint,
    kind smallint not null,
    until timestamptz not null,
    payload bytea not null,
    primary key (asker, n)
) with ({_BUSY});
"""
