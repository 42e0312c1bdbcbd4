"""A view and a replica from the beginning of their logs, as `cauce rebuild` builds them, in entries a second.

The view upserts one row for each event. `eventsourcing` reads its notification log, decodes each event, and upserts the
same rows. The replica is beside bare upserts of its rows, made in advance, in transactions of 20,000 by `executemany`.
All write into an empty file in WAL mode at `synchronous=NORMAL`, each with its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import apsw

from benchmarks._load import NAME, EmailChanged, Load, User, email
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import following, ours, peer
from cauce import Copy, Service
from cauce.backends import sqlite
from cauce.backends.sqlite.builds import SQLiteShelf
from cauce.clock import SystemClock
from cauce.codec import Meta, seal
from cauce.copying import replicas_of, views_of
from cauce.derived import Derived, Shape
from cauce.service import bind
from cauce.sql import Store

__all__ = ["GOALS", "measure"]

GOALS = {
    "rebuild.vs_eventsourcing_log": 1.5,
    "rebuild.replica_vs_bare_upserts": 0.3,
}

_RATIOS = (
    Versus("rebuild.vs_eventsourcing_log", "rebuild.view", "rebuild.eventsourcing"),
    Versus("rebuild.replica_vs_bare_upserts", "rebuild.replica", "rebuild.bare_upserts"),
)
_MOST = 200_000
"""A rebuild of 2,000,000 events is as fast by the second, and takes a minute."""

_BATCH = 20_000
_SCHEMA = "create table directory (user_id text primary key, name text, email text)"
_UPSERT = (
    "insert into directory values (?, ?, ?) "
    "on conflict (user_id) do update set name = excluded.name, email = excluded.email"
)

service = Service("crm")


@service.view("directory", schema=_SCHEMA)
def entry(event: EmailChanged, db: Store) -> None:
    db.execute(_UPSERT, (event.user_id, event.name, event.email))


@service.replica
class Holder(Copy, of=User):
    """The service's copy of all three fields."""

    user_id: str
    name: str
    email: str


def measure(run: Run) -> Found:
    ground, load = run.ground, replace(run.load, events=min(run.load.events, _MOST))

    def log() -> Path:
        return ground.made("rebuild.facts", lambda path: ours.prefill(path, load))

    def records() -> Path:
        return ground.made("rebuild.records", lambda path: asyncio.run(_records(path, load)))

    def theirs(turn: Turn) -> Sample:
        path = ground.made("rebuild.events", lambda path: peer.prefill(path, load))
        return following.rebuild(path, ground.fresh("view"), _SCHEMA, _UPSERT)

    parts, shelf = bind(service), SQLiteShelf(Path())
    contenders: dict[str, Contender] = {
        "rebuild.view": lambda turn: _rebuild(log(), views_of(service, parts, shelf)[0], load.events, False),
        "rebuild.eventsourcing": theirs,
        "rebuild.replica": lambda turn: _rebuild(records(), replicas_of(service, parts, shelf)[0], load.events, True),
        "rebuild.bare_upserts": lambda turn: _upserts(ground.fresh("rows"), load),
    }
    return run.race(contenders, run.wanted(_RATIOS))


def _rebuild(path: Path, shape: Shape, events: int, on_records: bool) -> Sample:
    return asyncio.run(_rebuilt(path, shape, events, on_records))


async def _rebuilt(path: Path, shape: Shape, events: int, on_records: bool) -> Sample:
    bus = await sqlite.open(path)
    try:
        shelf = bus.stores.shelf(service.name)
        log = bus.records if on_records else bus.facts
        began = perf_counter()
        derived = Derived(shape, service.name, log, shelf, SystemClock())
        count = await derived.rebuild(lambda looked, head, entries: None)
        seconds = perf_counter() - began
        await derived.close()
        assert count == events
        return Sample(count, seconds)
    finally:
        await bus.close()


def _rows(load: Load) -> Iterator[User]:
    """As many things as there are events to read."""
    return (User(str(number), NAME, email(number)) for number in range(load.events))


async def _records(path: Path, load: Load) -> None:
    clock, bus = SystemClock(), await sqlite.open(path)
    waiting = []
    for user in _rows(load):
        record = seal(user, clock.id(), Meta(clock.now()))
        waiting.append(bus.records.put(record.stream, 1, record))
        if len(waiting) == 5_000:
            await asyncio.gather(*waiting)
            waiting = []
    await asyncio.gather(*waiting)
    await bus.close()


def _upserts(path: Path, load: Load) -> Sample:
    rows = [(user.user_id, user.name, user.email, 1, 0) for user in _rows(load)]
    connection = apsw.Connection(str(path))
    for statement in (
        "pragma journal_mode = wal",
        "pragma synchronous = normal",
        "pragma cache_size = -65536",
        "pragma wal_autocheckpoint = 16000",
        "create table holder (user_id text not null primary key, name, email, version integer not null, gone integer not null)",
        "create table place (position integer not null)",
        "insert into place values (0)",
    ):
        connection.execute(statement)
    upsert = (
        "insert into holder values (?, ?, ?, ?, ?) on conflict (user_id) do update set name = excluded.name, "
        "email = excluded.email, version = excluded.version, gone = excluded.gone where excluded.version > version"
    )
    began = perf_counter()
    for start in range(0, len(rows), _BATCH):
        with connection:
            connection.executemany(upsert, rows[start : start + _BATCH])
            connection.execute("update place set position = ?", (start + _BATCH,))
    seconds = perf_counter() - began
    connection.close()
    return Sample(len(rows), seconds)
