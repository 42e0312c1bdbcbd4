"""The `eventsourcing` library that follows its own notification log, as its documentation sets it up.

`deliver`: a system of two applications, each with a SQLite file of its own. One saves ready-made events, as in `peer`;
the other is a process application, whose policy sees each event, and which commits its tracking with it. `WAYS` are the
four runners that the library has for that, each with some numbers of saving threads; each is tried, and the best one
runs. The clock stops when the tracking has reached the last event. Both wait for a lock as long as they are let.

`rebuild`: reads the notifications in large sections, lets the mapper decode each into its event, and upserts a row for
each into a table in another SQLite file: a section a transaction, with its tracking. Its own projections make one for
each event.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import UUID

from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import ProcessRecorder
from eventsourcing.system import (
    MultiThreadedRunner,
    NewMultiThreadedRunner,
    NewSingleThreadedRunner,
    ProcessApplication,
    Runner,
    SingleThreadedRunner,
    System,
)

from benchmarks._load import Load
from benchmarks._run import Sample
from benchmarks.contenders import peer

__all__ = ["RUNNERS", "WAYS", "Users", "best", "deliver", "follow", "rebuild"]

RUNNERS: dict[str, Callable[[System, dict[str, str]], Runner[UUID]]] = {
    "in the saving thread": SingleThreadedRunner,
    "in the saving thread, new": NewSingleThreadedRunner,
    "in a thread": MultiThreadedRunner,
    "in threads, new": NewMultiThreadedRunner,
}
WAYS = [(runner, threads) for runner in RUNNERS for threads in (1, 4, 16)]
_SECTION = 5_000
_PATIENCE = 120.0


class Users(Application[UUID]):
    """Whose events are followed."""


class Mirror(ProcessApplication[UUID]):
    """Who follows."""

    handled = 0

    def policy(self, domain_event: DomainEventProtocol[UUID], processing_event: ProcessingEvent[UUID]) -> None:
        self.handled += 1


def best(path: Callable[[], Path], load: Load, seconds: float) -> tuple[str, int]:
    """The runner and number of threads that get most done, each tried twice."""
    tries = [(deliver(path(), load, *way, seconds).rate, way) for _ in range(2) for way in WAYS]
    return max(tries)[1]


def deliver(path: Path, load: Load, runner: str, threads: int, seconds: float) -> Sample:
    """`Application.save` of an event by so many threads, and the other application behind it."""
    beside = path.with_name(f"{path.name}.d")
    beside.mkdir()
    files = {"USERS_SQLITE_DBNAME": str(path), "MIRROR_SQLITE_DBNAME": str(beside / "mirror.db")}
    env = {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_LOCK_TIMEOUT": "60", **files}
    return follow(env, load, runner, threads, seconds)


def follow(env: dict[str, str], load: Load, runner: str, threads: int, seconds: float) -> Sample:
    """The same on any database."""
    with RUNNERS[runner](System(pipes=[[Users, Mirror]]), env) as running:
        users, mirror = running.get(Users), running.get(Mirror)

        def tracked() -> None:
            last, recorder = users.recorder.max_notification_id(), mirror.recorder
            assert isinstance(recorder, ProcessRecorder)
            until = perf_counter() + _PATIENCE
            while (recorder.max_tracking_id(Users.name) or 0) < (last or 0):
                if perf_counter() > until:
                    raise TimeoutError(f"followed {runner} it got stuck before {last}")
                time.sleep(0.002)

        def warmed() -> None:
            mirror.handled = 0

        sample = peer.saving(users, load, threads, seconds, {}, tracked, warmed)
        assert mirror.handled == sample.count
        return sample


def rebuild(log: Path, view: Path, schema: str, upsert: str) -> Sample:
    """Every event of a log into a table."""
    env = {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(log)}
    with closing(Application[UUID](env)) as app, closing(sqlite3.connect(view, isolation_level=None)) as connection:
        for statement in ("pragma journal_mode = wal", "pragma synchronous = normal", schema, _TRACKING):
            connection.execute(statement)
        began = perf_counter()
        count, last = 0, 0
        for section in _sections(app):
            rows = []
            for notification in section:
                event: Any = app.mapper.to_domain_event(notification)
                rows.append((event.originator_id.hex, event.name, event.email))
            last = section[-1].id
            connection.execute("begin")
            connection.executemany(upsert, rows)
            connection.execute("insert or replace into tracking values ('users', ?)", (last,))
            connection.execute("commit")
            count += len(rows)
        return Sample(count, perf_counter() - began)


_TRACKING = "create table tracking (application text primary key, notification integer not null) without rowid"


def _sections(app: Application[UUID]) -> Iterator[Any]:
    start = 0
    while section := app.recorder.select_notifications(start, _SECTION, inclusive_of_start=False):
        yield section
        start = section[-1].id
