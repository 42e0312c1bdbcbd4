"""Cauce on a file: typed events appended to the log of facts, and commands decided by the owner, both awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import apsw
import msgspec

from benchmarks._load import NAME, ChangeEmail, EmailChanged, Load, email, service
from benchmarks._run import Sample
from benchmarks.contenders import anywhere
from benchmarks.contenders.callers import WARM, drive
from cauce import running
from cauce.backends import sqlite
from cauce.backends.sqlite.file import connect
from cauce.backends.sqlite.table import Names, Table
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed

__all__ = ["append", "call", "catch_up", "fill", "prefill", "register"]

_TRANSACTION = 100_000


def append(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    """`bus.facts.append` by so many callers of one event loop."""
    return anywhere.append(f"sqlite:///{path}", load, callers, seconds)


def call(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    """`bus.call` by so many callers: within the clock, too, is the writing of the records behind.

    Each thing is called once beforehand, so that the owner knows how it stands. The bytes are those by which the
    database grew, all of its pages counted.
    """
    return asyncio.run(_call(path, load, callers, seconds))


async def _call(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    turns = load.turns(callers)
    async with running(service, bus=f"sqlite:///{path}") as bus:

        def work() -> Awaitable[object]:
            number, key = next(turns)
            return bus.call(ChangeEmail(str(key), NAME, email(number)))

        await anywhere.each(load, lambda key: bus.call(ChangeEmail(str(key), NAME, email(key))))
        await drive(work, callers, seconds * WARM)
        await bus.settled()
        size = _size(path)
        sample = await drive(work, callers, seconds, bus.settled)
        return replace(sample, figures={"bytes_per_call": (_size(path) - size) / sample.count})


def register(path: Path, load: Load) -> None:
    """All things, once, by calls."""
    anywhere.register(f"sqlite:///{path}", load)


def catch_up(path: Path) -> None:
    """Let the owner write the records of what was pre-filled."""
    asyncio.run(_catch_up(path))


async def _catch_up(path: Path) -> None:
    async with running(service, bus=f"sqlite:///{path}") as bus:
        await bus.settled()


def _size(path: Path) -> int:
    """Bytes of the database with what is still in its write-ahead log."""
    connection = apsw.Connection(str(path))
    pages: int = connection.pragma("page_count")
    size: int = connection.pragma("page_size")
    connection.close()
    return pages * size


def prefill(path: Path, load: Load, spread: int = 1) -> None:
    """The facts to fill in, as `append` would have written them, put there in large transactions.

    Parameters:
        spread: over how many times more things; those are of another domain.
    """
    clock = SystemClock()

    def entries() -> Iterator[Entry]:
        for number, key in enumerate(load.filling(spread), start=1):
            stream, type = (f"users/{key}", "EmailChanged") if key < load.things else (f"visits/{key}", "Visited")
            body = msgspec.json.encode(EmailChanged(str(key), NAME, email(number)))
            yield sealed(stream, type, clock.id(), Meta(clock.now()), body)

    fill(path, entries())


def fill(path: Path, entries: Iterable[Entry]) -> None:
    """These facts, put there in large transactions."""
    asyncio.run(_create(path))
    connection = connect(path)
    connection.execute("pragma synchronous = off")
    table = Table(connection, Names(connection), "facts", last=False)
    connection.execute("begin immediate")
    table.begin()
    for number, entry in enumerate(entries, start=1):
        table.append(entry.stream, [entry], None, None, False)
        if number % _TRANSACTION == 0:
            _commit(table, connection)
            connection.execute("begin immediate")
    _commit(table, connection)
    connection.close()


async def _create(path: Path) -> None:
    bus = await sqlite.open(path)
    await bus.close()


def _commit(table: Table, connection: apsw.Connection) -> None:
    table.flush()
    connection.execute("commit")
    table.committed()
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
