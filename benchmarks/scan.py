"""Reading the whole log from its beginning, beside a cursor of SQLite over the same rows and columns.

`scan.bare_scan` selects every column that an entry is made of; `scan.fewer_columns` leaves out identity, envelope, wish
and digest, and is a figure only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import apsw

from benchmarks._run import Found, Run, Sample, Turn, Versus
from benchmarks.contenders import ours
from cauce.backends import sqlite

__all__ = ["GOALS", "measure"]

GOALS = {"scan.vs_bare_scan": 0.5}

_RATIOS = (Versus("scan.vs_bare_scan", "scan.ours", "scan.bare_scan"),)
_PAGE = 5000
_ALL = "select position, stream, version, type, id, meta, wish, body, digest from facts where position > 0 order by position"
_FEWER = "select position, stream, version, type, body from facts where position > 0 order by position"


def measure(run: Run) -> Found:
    scans: dict[str, Callable[[Path], tuple[int, int]]] = {
        "scan.ours": lambda path: asyncio.run(_ours(path)),
        "scan.bare_scan": partial(_bare, select=_ALL, body=7),
        "scan.fewer_columns": partial(_bare, select=_FEWER, body=4),
    }

    def contender(scan: Callable[[Path], tuple[int, int]]) -> Callable[[Turn], Sample]:
        return lambda turn: _timed(
            scan, run.ground.made("log", lambda path: ours.prefill(path, run.load)), run.load.events
        )

    contenders = {name: contender(scan) for name, scan in scans.items()}
    return run.race(contenders, run.wanted(_RATIOS), also=("scan.fewer_columns",))


def _timed(scan: Callable[[Path], tuple[int, int]], path: Path, events: int) -> Sample:
    began = perf_counter()
    count, size = scan(path)
    seconds = perf_counter() - began
    assert count == events
    assert size > count
    return Sample(count, seconds)


async def _ours(path: Path) -> tuple[int, int]:
    """Count the entries, touch position and body of each."""
    bus = await sqlite.open(path)
    try:
        after = count = size = 0
        while True:
            page = await bus.facts.read(after=after, limit=_PAGE)
            if page.looked == after:
                return count, size
            for entry in page.entries:
                if entry.position > after and entry.body is not None:
                    count += 1
                    size += len(entry.body)
            after = page.looked
    finally:
        await bus.close()


def _bare(path: Path, select: str, body: int) -> tuple[int, int]:
    """The same with a cursor."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.execute("pragma cache_size = -65536")
    after = count = size = 0
    for row in connection.execute(select):
        if row[0] > after:
            count += 1
            size += len(row[body])
    connection.close()
    return count, size
