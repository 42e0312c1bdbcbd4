"""Streams of so many events, and what stands by them: read from a SQLite file, each event decoded and evolved.

Ours is `Folder.fold`, as the commander loads a thing that it does not know; digests are checked. `eventsourcing` is
`Application.repository.get`, without snapshots and without its cache, on its own SQLite recorder. A file holds 20
things; their events lie in turn, as they would have come. A turn loads one thing after the other, again and again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from time import perf_counter
from uuid import UUID

import msgspec
from eventsourcing.application import Application

from benchmarks._load import NAME, EmailChanged, Load, UserRegistered, email, service, users
from benchmarks._run import Sample
from benchmarks.contenders import ours, peer
from benchmarks.contenders.callers import WARM, drive
from cauce.backends import sqlite
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, Wish, derive_id, sealed
from cauce.folding import fold_of
from cauce.service import bind

__all__ = ["fold", "get", "load", "of_calls", "of_facts", "of_peer", "of_records"]

_BEHIND = 4
"""Events of a thing that came after its record."""

_THINGS = 20


def _load(load: Load, length: int) -> Load:
    """Of at most 20 things, and of at most about as many events as are asked for."""
    things = max(1, min(_THINGS, load.events // length))
    return replace(load, things=things, events=things * length)


def fold(path: Path, load: Load, length: int, seconds: float) -> Sample:
    """Fold the facts of one thing after the other, from the first to the last; counted in events."""
    return asyncio.run(_fold(path, _load(load, length).things, length, seconds))


async def _fold(path: Path, things: int, length: int, seconds: float) -> Sample:
    folder, bus = fold_of(bind(service), users), await sqlite.open(path)
    facts = bus.facts

    async def work(seconds: float) -> Sample:
        count, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            folded = await folder.fold(facts, str(count % things))
            assert folded.version == length
            assert folded.state is not None
            count += 1
        return Sample(count * length, perf_counter() - began)

    try:
        await work(seconds * WARM)
        return await work(seconds)
    finally:
        await bus.close()


def load(path: Path, length: int, things: int, seconds: float) -> Sample:
    """Load one thing after the other by its record and what came after it, in a domain of 10 long and 10 short ones."""
    return asyncio.run(_loads(path, length, things, seconds))


async def _loads(path: Path, length: int, things: int, seconds: float) -> Sample:
    folder, bus = fold_of(bind(service), users), await sqlite.open(path)

    async def work() -> None:
        key = next(keys)
        folded = await folder.fold(bus.facts, key, records=bus.records)
        assert folded.version == length + _BEHIND

    try:
        keys = cycle([f"{length}.{number}" for number in range(things)])
        await drive(work, 1, seconds * WARM)
        return await drive(work, 1, seconds)
    finally:
        await bus.close()


def get(path: Path, load: Load, length: int, seconds: float) -> Sample:
    """Get one aggregate of `eventsourcing` after the other; counted in events."""
    things = _load(load, length).things
    app = Application[UUID]({"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(path)})
    with closing(app):
        assert app.repository.cache is None
        assert app.snapshots is None

        def work(seconds: float) -> Sample:
            count, began = 0, perf_counter()
            while perf_counter() - began < seconds:
                user: peer.User = app.repository.get(peer.id_of(count % things))
                assert user.version == length
                count += 1
            return Sample(count * length, perf_counter() - began)

        work(seconds * WARM)
        return work(seconds)


def of_facts(path: Path, load: Load, length: int) -> None:
    """Facts as `append` writes them: event and envelope."""
    ours.fill(path, _facts(_load(load, length), wished=False))


def of_calls(path: Path, load: Load, length: int) -> None:
    """Facts as `call` writes them: each has the command that was wished with it, and because of what it was."""
    ours.fill(path, _facts(_load(load, length), wished=True))


def of_records(path: Path, lengths: Sequence[int], things: int) -> None:
    """So many things of each length, their records, and a few facts of each behind them."""
    ours.fill(path, _mixed([(f"{length}.{number}", length) for length in lengths for number in range(things)], 0))
    ours.catch_up(path)
    ours.fill(path, _mixed([(f"{length}.{number}", _BEHIND) for length in lengths for number in range(things)], 1))


def _mixed(wanted: Sequence[tuple[str, int]], begin: int) -> Iterator[Entry]:
    """The facts of things of unlike length, spread evenly over the whole."""
    clock, rounds = SystemClock(), max(length for _, length in wanted)
    for round in range(rounds):
        for key, length in wanted:
            if (round + 1) * length // rounds == round * length // rounds:
                continue
            cls = EmailChanged if begin + round * length // rounds else UserRegistered
            body = msgspec.json.encode(cls(key, NAME, email(round)))
            yield sealed(f"users/{key}", cls.__name__, clock.id(), Meta(clock.now()), body)


def _facts(load: Load, *, wished: bool) -> Iterator[Entry]:
    clock = SystemClock()
    for number, key in enumerate(load.filling()):
        cls = UserRegistered if number < load.things else EmailChanged
        command, now = clock.id(), clock.now()
        body = msgspec.json.encode(cls(str(key), NAME, email(number)))
        wish = msgspec.json.encode(Wish("ChangeEmail", msgspec.Raw(body), 1, now)) if wished else None
        meta = Meta(now, correlation=command, causation=command, by="web:joe") if wished else Meta(now)
        id = derive_id(command, "users", f"users/{key}", "0") if wished else command
        yield sealed(f"users/{key}", cls.__name__, id, meta, body, wish)


def of_peer(path: Path, load: Load, length: int) -> None:
    """The same things and events of the other library."""
    load = _load(load, length)
    peer.register(path, load)
    peer.prefill(path, replace(load, events=load.events - load.things))
