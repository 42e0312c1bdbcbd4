"""The `eventsourcing` library on PostgreSQL, as its documentation sets it up, at the best of its settings.

It talks to the server with psycopg and a pool, which is as large as there are threads, and commits each save by itself,
under a lock of the table. `append` saves ready-made events as in `peer`: `WAYS` are numbers of threads, each with the
statements of the client and with the functions that it can keep in the database; each is tried, and the best one runs.

`deliver` follows a log: `FOLLOWING` are the runners of systems in `following`, and its two runners of projections,
which listen for notifications and are what its documentation recommends for a database that has them. An event-sourced
projection is an application of its own, the other one only tracks; neither has more to do than to count. The clock
stops when the tracking has reached the last event.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import psycopg
from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresTrackingRecorder
from eventsourcing.projection import (
    BaseProjectionRunner,
    EventSourcedProjection,
    EventSourcedProjectionRunner,
    Projection,
    ProjectionRunner,
)
from psycopg.sql import SQL, Identifier

from benchmarks._load import Load
from benchmarks._run import Sample
from benchmarks.contenders import following, peer
from cauce.backends.postgres.link import split

__all__ = ["FOLLOWING", "WAYS", "append", "best", "deliver"]

Place = Callable[[], AbstractContextManager[str]]
"""Gives the address of a schema that nobody used before."""

WAYS = [(threads, functions) for threads in (1, 2, 4, 8, 16) for functions in (False, True)]

_PATIENCE = 60.0


class Mirror(EventSourcedProjection[UUID]):
    """Who follows, as an application."""

    handled = 0

    def policy(self, domain_event: DomainEventProtocol[UUID], processing_event: ProcessingEvent[UUID]) -> None:
        self.handled += 1


class Counter(Projection[PostgresTrackingRecorder]):
    """Who follows, and keeps nothing but its place."""

    handled = 0

    def process_event(self, domain_event: Any, tracking: Tracking) -> None:
        self.handled += 1
        self.view.insert_tracking(tracking)


def _mirror(env: dict[str, str]) -> BaseProjectionRunner[following.Users]:
    return EventSourcedProjectionRunner(application_class=following.Users, projection_class=Mirror, env=env)


def _counter(env: dict[str, str]) -> BaseProjectionRunner[following.Users]:
    return ProjectionRunner(
        application_class=following.Users, projection_class=Counter, view_class=PostgresTrackingRecorder, env=env
    )


_PROJECTIONS = {"by an event-sourced projection": _mirror, "by a projection": _counter}
FOLLOWING = [
    # Systems with more than one saving thread get stuck on this database (two write the same tracking), or crawl.
    *((runner, 1) for runner in following.RUNNERS),
    *((runner, threads) for runner in _PROJECTIONS for threads in (1, 4, 16)),
]
"""With the statements of the client: what is saved by the functions in the database leads no runner."""


def best(ways: list[Any], work: Callable[..., Sample], place: Place) -> Any:
    """The way that gets most done, each tried twice, so that no hiccup of the machine decides."""

    def tried(way: Any) -> float:
        with place() as url:
            return work(url, way).rate

    return max((tried(way), way) for _ in range(2) for way in ways)[1]


def append(url: str, load: Load, way: tuple[int, bool], seconds: float) -> Sample:
    """`Application.save` of an event, by so many threads."""
    threads, functions = way
    with closing(Application[UUID](_env(url, threads, functions))) as app:
        return peer.saving(app, load, threads, seconds, {})


def deliver(url: str, load: Load, way: tuple[str, int], seconds: float) -> Sample:
    """`Application.save` of an event by so many threads, and who follows."""
    runner, threads = way
    env = _env(url, threads, functions=False)
    if runner in following.RUNNERS:
        return following.follow(env, load, runner, threads, seconds)
    with _PROJECTIONS[runner](env) as running:
        users, projection = running.app, running._projection
        assert isinstance(projection, Mirror | Counter)

        def tracked() -> None:
            running.wait(users.recorder.max_notification_id(), _PATIENCE)

        def warmed() -> None:
            projection.handled = 0

        sample = peer.saving(users, load, threads, seconds, {}, tracked, warmed)
        assert projection.handled == sample.count
        return sample


def _env(url: str, threads: int, functions: bool) -> dict[str, str]:
    dsn, schema = split(url)
    parts = urlsplit(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SQL("create schema if not exists {}").format(Identifier(schema)))
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": parts.path[1:],
        "POSTGRES_HOST": parts.hostname or "127.0.0.1",
        "POSTGRES_PORT": str(parts.port or 5432),
        "POSTGRES_USER": unquote(parts.username or "postgres"),
        "POSTGRES_PASSWORD": unquote(parts.password or "none"),
        "POSTGRES_SCHEMA": schema,
        "POSTGRES_POOL_SIZE": str(threads),
        "POSTGRES_ENABLE_DB_FUNCTIONS": "yes" if functions else "no",
    }
