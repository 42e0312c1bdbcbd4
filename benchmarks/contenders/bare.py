"""SQLite and nothing else: one row and its place in its stream, with no name, envelope, identity or digest.

The table has position, stream, version and body, and an index on (stream, version), all numbers but the body; streams
are numbers from the start. `commits` makes one commit for each row, in the thread that wants it, and lets SQLite make
its checkpoints as it does by itself. `append` is the least that lets many callers share a flush: one thread takes what
waits into one transaction, and wakes the loop once for all; checkpoints are as far apart as those of Cauce. Journal
mode, flush and page cache are the same for all.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from pathlib import Path
from queue import SimpleQueue

import apsw
import msgspec

from benchmarks._load import NAME, Load, email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive, repeat

__all__ = ["append", "commits", "prefill"]

_INSERT = "insert into entries values (?, ?, ?, ?)"


class EmailChanged(msgspec.Struct, frozen=True):
    """The same event without a domain."""

    user_id: str
    name: str
    email: str


_encode = msgspec.json.Encoder().encode


def _body(number: int, key: int) -> bytes:
    return _encode(EmailChanged(str(key), NAME, email(number)))


class Rows:
    """The table, and where its streams stand."""

    def __init__(self, path: Path, checkpoint: int) -> None:
        self.connection = apsw.Connection(str(path))
        for pragma in (
            "journal_mode = wal",
            "synchronous = full",
            f"wal_autocheckpoint = {checkpoint}",
            "cache_size = -65536",
            "temp_store = memory",
        ):
            self.connection.execute(f"pragma {pragma}")
        self.connection.execute(
            "create table if not exists entries "
            "(position integer primary key, stream integer not null, version integer not null, body blob not null)"
        )
        self.connection.execute("create index if not exists entries_stream on entries (stream, version)")
        self.position: int = self.connection.execute("select coalesce(max(position), 0) from entries").get
        self.versions: dict[int, int] = {}

    def next(self, stream: int, body: bytes) -> tuple[int, int, int, bytes]:
        """The row that comes next."""
        version = self.versions.get(stream)
        if version is None:
            select = "select coalesce(max(version), 0) from entries where stream = ?"
            version = self.connection.execute(select, (stream,)).get
        self.versions[stream] = version = version + 1
        self.position += 1
        return self.position, stream, version, body


def commits(path: Path, load: Load, seconds: float) -> Sample:
    """One caller, one thread, one commit for each row."""
    rows, turns = Rows(path, checkpoint=1000), load.turns(1)

    def work() -> None:
        number, key = next(turns)
        rows.connection.execute(_INSERT, rows.next(key, _body(number, key)))

    try:
        repeat(work, seconds * WARM)
        return repeat(work, seconds)
    finally:
        rows.connection.close()


_Job = tuple["asyncio.Future[int]", int, bytes]


class Writer:
    """One thread, one queue, one transaction for whatever waits."""

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Job] = deque()
        self._bell: SimpleQueue[bool] = SimpleQueue()
        self._idle = False
        self._rows = Rows(path, checkpoint=16000)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def append(self, stream: int, body: bytes) -> asyncio.Future[int]:
        future: asyncio.Future[int] = self._loop.create_future()
        self._queue.append((future, stream, body))
        if self._idle:
            self._idle = False
            self._bell.put(True)
        return future

    async def close(self) -> None:
        self._bell.put(False)
        await asyncio.to_thread(self._thread.join)
        self._rows.connection.close()

    def _run(self) -> None:
        while True:
            self._idle = True
            if not self._queue and not self._bell.get():
                return
            self._idle = False
            jobs = [self._queue.popleft() for _ in range(len(self._queue))]
            self._rows.connection.execute("begin immediate")
            rows = [self._rows.next(stream, body) for _, stream, body in jobs]
            self._rows.connection.executemany(_INSERT, rows)
            self._rows.connection.execute("commit")
            self._loop.call_soon_threadsafe(_deliver, jobs, rows)


def _deliver(jobs: list[_Job], rows: list[tuple[int, int, int, bytes]]) -> None:
    for (future, _, _), row in zip(jobs, rows, strict=True):
        future.set_result(row[0])


def append(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    """The bare group commit, by so many callers of one event loop."""
    return asyncio.run(_append(path, load, callers, seconds))


async def _append(path: Path, load: Load, callers: int, seconds: float) -> Sample:
    writer, turns = Writer(path), load.turns(callers)

    def work() -> asyncio.Future[int]:
        number, key = next(turns)
        return writer.append(key, _body(number, key))

    try:
        await drive(work, callers, seconds * WARM)
        return await drive(work, callers, seconds)
    finally:
        await writer.close()


def prefill(path: Path, load: Load) -> None:
    """The rows to fill in, in one transaction."""
    rows = Rows(path, checkpoint=16000)
    rows.connection.execute("pragma synchronous = off")
    with rows.connection:
        rows.connection.executemany(
            _INSERT, (rows.next(key, _body(number, key)) for number, key in enumerate(load.filling()))
        )
    rows.connection.close()
