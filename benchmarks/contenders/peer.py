"""The `eventsourcing` library on a SQLite file, as its documentation sets it up, at its best number of threads.

Its SQLite module opens the file in WAL mode by itself and leaves `synchronous` at SQLite's default, FULL: the same
durability. Both are asked of a connection of its pool and told in the settings. `append` saves one ready-made event of
three text fields with `Application.save`, without loading an aggregate: event in, row on the disk, as ours. `call` gets
an aggregate, calls its command method and saves it. The cache of aggregates holds all of them and is neither copied nor
fast-forwarded, which is the fastest it offers to a single process. Threads share no aggregate, so none conflicts.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from uuid import NAMESPACE_URL, UUID, uuid5

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, AggregateEvent, DomainEventProtocol, event
from eventsourcing.sqlite import SQLiteFactory

from benchmarks._load import NAME, Load, email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM

__all__ = ["EmailChanged", "append", "best", "call", "drive", "id_of", "prefill", "register", "saving", "settings"]

_THREADS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class EmailChanged(AggregateEvent):
    """The event of the load; the thing it is about is its `originator_id`."""

    name: str
    email: str


class User(Aggregate):
    """The thing of the load."""

    def __init__(self, key: int, name: str, email: str) -> None:
        self.key, self.name, self.email = key, name, email

    @staticmethod
    def create_id(key: int, name: str, email: str) -> UUID:
        return id_of(key)

    @event("Changed")
    def change_email(self, name: str, email: str) -> None:
        self.name, self.email = name, email


@cache
def id_of(key: int) -> UUID:
    return uuid5(NAMESPACE_URL, str(key))


def _open(path: Path) -> Application[UUID]:
    return Application(
        {
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": str(path),
            "AGGREGATE_CACHE_MAXSIZE": "0",  # no bound
            "AGGREGATE_CACHE_FASTFORWARD": "n",
            "DEEPCOPY_FROM_AGGREGATE_CACHE": "n",
        }
    )


def settings(path: Path) -> dict[str, str]:
    """What its own connections are set to."""
    with closing(_open(path)) as app:
        assert isinstance(app.factory, SQLiteFactory)
        with app.factory.datastore.transaction(commit=False) as cursor:
            told = {}
            for pragma in ("journal_mode", "synchronous"):
                cursor.execute(f"pragma {pragma}")
                told[pragma] = str(cursor.fetchone()[0])
    levels = {"0": "off", "1": "normal", "2": "full", "3": "extra"}
    return {"journal_mode": told["journal_mode"], "synchronous": levels[told["synchronous"]]}


def best(work: Callable[[int], Sample]) -> int:
    """The number of threads that gets most done, each tried twice, so that no hiccup of the machine decides."""
    tries = [(work(threads).rate, threads) for _ in range(2) for threads in _THREADS]
    return max(tries)[1]


def append(path: Path, load: Load, threads: int, seconds: float) -> Sample:
    """`Application.save` of an event, by so many threads."""
    with closing(_open(path)) as app, closing(sqlite3.connect(path)) as connection:
        heads = connection.execute(
            "select originator_id, max(originator_version) from stored_events group by 1"
        ).fetchall()
        return saving(app, load, threads, seconds, {UUID(id): version for id, version in heads})


def saving(
    app: Application[UUID],
    load: Load,
    threads: int,
    seconds: float,
    versions: dict[UUID, int],
    finish: Callable[[], object] = lambda: None,
    warmed: Callable[[], object] = lambda: None,
) -> Sample:
    """`Application.save` of an event, by so many threads, on any database.

    Parameters:
        versions: where aggregates stand.
        finish: what is done before the clock stops.
        warmed: called when what comes next is measured.
    """

    def work(number: int, key: int) -> None:
        id = id_of(key)
        versions[id] = version = versions.get(id, 0) + 1
        app.save(
            EmailChanged(
                originator_id=id, originator_version=version, timestamp=EmailChanged.create_timestamp(),
                name=NAME, email=email(number),
            )
        )  # fmt: skip

    drive(work, load, threads, seconds * WARM, finish)
    warmed()
    return drive(work, load, threads, seconds, finish)


def call(path: Path, load: Load, threads: int, seconds: float) -> Sample:
    """Get an aggregate, change it, save it, by so many threads."""
    with closing(_open(path)) as app:

        def work(number: int, key: int) -> None:
            user: User = app.repository.get(id_of(key))
            user.change_email(NAME, email(number))
            app.save(user)

        for key in range(load.things):
            app.repository.get(id_of(key))
        drive(work, load, threads, seconds * WARM)
        return drive(work, load, threads, seconds)


def drive(
    work: Callable[[int, int], None],
    load: Load,
    threads: int,
    seconds: float,
    finish: Callable[[], object] = lambda: None,
) -> Sample:
    """Each thread has its own things, so that versions need no lock. The clock stops after `finish`.

    Raises what the first thread raised that failed.
    """
    latencies: list[list[float]] = [[] for _ in range(threads)]
    failed: list[Exception] = []
    end = perf_counter() + seconds

    def caller(thread: int) -> None:
        turns, done = load.turns(thread), latencies[thread].append
        since = perf_counter()
        while since < end:
            number, key = next(turns)
            work(number, key - key % threads + thread)
            now = perf_counter()
            done(now - since)
            since = now

    def kept(thread: int) -> None:
        try:
            caller(thread)
        except Exception as error:
            failed.append(error)

    running = [threading.Thread(target=kept, args=(thread,)) for thread in range(threads)]
    began = perf_counter()
    for each in running:
        each.start()
    for each in running:
        each.join()
    if failed:
        raise failed[0]
    finish()
    took = [latency for each in latencies for latency in each]
    return Sample(len(took), perf_counter() - began, took)


def register(path: Path, load: Load) -> None:
    """All things, once."""
    with closing(_open(path)) as app:
        for start in range(0, load.things, 1000):
            app.save(*(User(key, NAME, email(key)) for key in range(start, min(start + 1000, load.things))))


def prefill(path: Path, load: Load, spread: int = 1) -> None:
    """The events to fill in, put into its own table, in the form its own mapper gives them."""
    with closing(_open(path)) as app:
        stored = [app.mapper.to_stored_event(_changed(key)) for key in range(load.things)]
    versions = [0] * load.things * spread
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma synchronous = off")
        ((first,),) = connection.execute("select coalesce(max(originator_version), 0) from stored_events").fetchall()

        def rows() -> Iterator[tuple[str, int, str, bytes]]:
            for key in load.filling(spread):
                versions[key] += 1
                event = stored[key % load.things]
                yield id_of(key).hex, first + versions[key], event.topic, event.state

        with connection:
            connection.executemany("insert into stored_events values (?, ?, ?, ?)", rows())


def _changed(key: int) -> DomainEventProtocol[UUID]:
    """What the command method makes of a new address."""
    user = User(key, NAME, "")
    user.change_email(NAME, email(key))
    return user.collect_events()[-1]
