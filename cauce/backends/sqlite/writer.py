"""Group commit: one thread per file takes what waits into one transaction, one flush for all, each with its verdict.

A write that is alone when the loop has gone round needs no thread, whose waking twice costs as much as the flush: the
loop writes it itself, as long as flushes are short here and nobody else is in turn.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import apsw

from cauce.backends.sqlite.file import connect, extended, translate
from cauce.backends.sqlite.runway import Runway
from cauce.backends.sqlite.turnstile import Turnstile, describe, who_locks
from cauce.clock import Clock
from cauce.errors import Busy, CauceError, Damaged, Overloaded, Refused

__all__ = ["Journal", "Writer"]

T = TypeVar("T")

_MOST_WAITING = 20_000
_MOST_BYTES = 64 * 1024 * 1024
_CHECKPOINT_PAGES = 4_000
_SHORT = 0.001
"""Seconds for which the loop may stand still for a flush."""

_CALM = 16
"""So many transactions must have been short, one after the other, before the loop writes itself."""

_Job = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...], int]


class Journal(Protocol):
    """What is written: called in the writer thread, around the jobs of a transaction."""

    def open(self, connection: apsw.Connection) -> None:
        """Once, before the first transaction."""
        ...

    def begin(self) -> None:
        """Inside each transaction, before its jobs."""
        ...

    def flush(self) -> None:
        """Inside each transaction, after its jobs."""
        ...

    def is_due(self) -> bool:
        """Whether the next flush has more to write than the jobs."""
        ...

    def committed(self) -> Callable[[], None]:
        """After the commit, still in turn. What it returns is called on the loop, with the verdicts."""
        ...

    def rolled_back(self) -> None:
        """Nothing of the transaction remains."""
        ...


class Writer:
    """The thread, its queue and its connection.

    A job is a function that runs in the transaction: it returns a verdict, or raises one and has then changed nothing.

    Parameters:
        patience: seconds to wait for the turn before what waits is refused with `Busy`.
        ended: called in the thread when it has closed its connection. What the thread uses is let go of there: it may
            still wait for its turn when all others have gone, and a file closed under it may soon be another one.
    """

    def __init__(
        self,
        path: Path,
        turnstile: Turnstile,
        journal: Journal,
        clock: Clock,
        patience: float,
        ended: Callable[[], None],
    ) -> None:
        self._path, self._turnstile, self._journal, self._clock = path, turnstile, journal, clock
        self._patience, self._ended = patience, ended
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._queue: deque[_Job] = deque()
        self._taken: list[_Job] = []
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._idle = False
        self._called = False
        self._lock = threading.Lock()
        self._calm = 0
        self._closing = False
        self._bytes = 0
        self._since: float | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._wal_pages = 0
        self._broken: CauceError | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=f"cauce writer {path.name}", daemon=True)

    async def start(self) -> None:
        self._thread.start()
        await self._ready

    def _opened(self, error: BaseException | None) -> None:
        if self._ready.done():
            # Whoever opened has stopped waiting.
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)

    def stop(self) -> None:
        """Take no more; the thread ends when it has written what waits."""
        self._closing = True
        self._bell.put(None)
        if self._watch is not None and not self._queue:
            self._watch.cancel()

    def submit(self, job: Callable[..., T], *arguments: Any, size: int = 0) -> asyncio.Future[T]:
        """Queue a job of about `size` bytes. Raises `Overloaded` when too much waits already."""
        if os.getpid() != self._pid:
            raise Refused(
                f"{self._path} was opened before a fork: close it first, or start the process anew (spawn instead of fork)"
            )
        if self._closing:
            raise Refused(f"{self._path} is closed")
        if self._broken is not None:
            raise self._broken
        if len(self._queue) >= _MOST_WAITING or self._bytes > _MOST_BYTES:
            raise Overloaded(f"{len(self._queue):,} writes of {self._bytes:,} bytes wait for {self._path}: slow down")
        future: asyncio.Future[T] = self._loop.create_future()
        self._bytes += size
        self._queue.append((future, job, arguments, size))
        if not self._called:
            self._called = True
            self._loop.call_soon(self._go)
        return future

    def _go(self) -> None:
        """All who had something to write in this round of the loop have said it by now."""
        self._called = False
        if not self._queue or (len(self._queue) == 1 and self._alone()):
            return
        if self._idle:
            self._idle = False
            self._bell.put(None)
        if self._watch is None:
            self._watch = self._loop.call_later(self._patience / 4, self._look)

    def _alone(self) -> bool:
        """Write here, on the loop, if that is sure to be short."""
        if (
            self._calm < _CALM
            or self._wal_pages > _CHECKPOINT_PAGES
            or self._runway.is_short(self._wal_pages)
            or self._journal.is_due()
            or not self._lock.acquire(blocking=False)
        ):
            return False
        try:
            # A thread that ends closes its connection under the lock.
            if self._closing or self._broken is not None or not self._turnstile.try_enter():
                return False
            try:
                self._connection.set_busy_timeout(0)
                return self._transaction(self._connection, self._hear, wait=False)
            finally:
                self._connection.set_busy_timeout(round(self._patience * 1000))
                self._turnstile.leave()
        finally:
            self._lock.release()

    def _hear(self, function: Callable[..., object], *arguments: Any) -> None:
        function(*arguments)

    async def close(self) -> None:
        """Write what waits, then stop. Does not wait for a turn that nothing needs any more."""
        self.stop()
        while self._thread.is_alive() and (self._queue or self._since is None):
            await asyncio.to_thread(self._thread.join, 0.25)
        if self._watch is not None:
            self._watch.cancel()
        # A thread that died may have left some that came while it did.
        left = list(self._take())
        error = self._broken or Refused(f"{self._path} is closed")
        self._deliver([(job[0], False, error) for job in left], sum(job[3] for job in left), None)

    def _look(self) -> None:
        """Refuse what has waited too long for a turn. Jobs are taken off the queue only in turn, so none runs later."""
        self._watch = None
        since, error = self._since, self._broken
        if since is not None and self._clock.monotonic() - since > self._patience:
            error = Busy(f"{self._path} is being written by {self._holders()}: wait, or stop it")
        if error is not None:
            jobs = list(self._take())
            self._deliver([(job[0], False, error) for job in jobs], sum(job[3] for job in jobs), None)
        if self._queue or self._since is not None:
            self._watch = self._loop.call_later(self._patience / 4, self._look)

    def _holders(self) -> str:
        """Who is in turn, and who holds SQLite's own lock, be it a program that knows of no turns."""
        pids = self._turnstile.holders()
        shm = self._path.with_name(self._path.name + "-shm")
        if shm.exists():
            pids |= who_locks(shm.stat().st_ino)
        return describe(pids - {self._pid}) if pids != {self._pid} else "this process"

    def _run(self) -> None:
        try:
            self._connection = connection = connect(self._path, busy=self._patience)
            connection.set_wal_hook(self._wal_grew)
            wal = self._path.with_name(self._path.name + "-wal")
            self._runway = runway = Runway(wal, connection.pragma("page_size"))
            self._journal.open(connection)
        except BaseException as error:
            self._ended()
            self._tell(self._opened, error)
            return
        self._tell(self._opened, None)
        try:
            while True:
                self._idle = True
                if not self._queue:
                    if self._closing:
                        break
                    self._bell.get()
                self._idle = False
                with self._lock:
                    if self._broken is not None:
                        self._fail(list(self._take()), self._broken)
                    elif self._queue:
                        self._turn(connection)
                        runway.keep(self._wal_pages)
        except BaseException as error:
            # A dead thread must not leave its callers waiting.
            self._broken = Damaged(f"the writer of {self._path} stopped: {error!r}; open the log again")
            self._fail([*self._taken, *self._take()], self._broken)
        finally:
            with self._lock:
                runway.close()
                connection.close()
            self._ended()

    def _turn(self, connection: apsw.Connection) -> None:
        self._since = self._clock.monotonic()
        self._turnstile.enter()
        try:
            if self._queue:
                self._transaction(connection, self._tell)
            if self._wal_pages > _CHECKPOINT_PAGES:
                self._checkpoint(connection)
        finally:
            self._turnstile.leave()
            self._since = None

    def _transaction(self, connection: apsw.Connection, tell: Callable[..., None], *, wait: bool = True) -> bool:
        """All that waits, in one transaction. False: others are in the way, and it was not to wait for them."""
        jobs = self._taken
        verdicts: list[tuple[asyncio.Future[Any], bool, Any]] = []
        try:
            began = self._clock.monotonic()
            try:
                connection.execute("begin immediate")
            except apsw.BusyError:
                if wait:
                    raise
                return False
            self._since = None
            self._journal.begin()
            for each in self._take():
                jobs.append(each)
                try:
                    verdicts.append((each[0], True, each[1](*each[2])))
                except apsw.Error:
                    raise
                except Exception as error:
                    verdicts.append((each[0], False, error))
            self._journal.flush()
            connection.execute("commit")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("rollback")
            self._journal.rolled_back()
            if self._since is not None:
                jobs.extend(self._take())
            self._fail(jobs, self._translated(error))
        else:
            self._calm = self._calm + 1 if self._clock.monotonic() - began < _SHORT else 0
            after = self._journal.committed()
            tell(self._deliver, verdicts, sum(job[3] for job in jobs), after)
        self._taken = []
        return True

    def _translated(self, error: BaseException) -> BaseException:
        if isinstance(error, apsw.IOError) and extended(error) == apsw.SQLITE_IOERR_FSYNC:
            # After a failed flush nobody knows what the disk holds; to go on would be to guess.
            self._broken = Damaged(f"{self._path}: the disk failed to flush: check the disk, then open the log again")
            return self._broken
        if isinstance(error, apsw.BusyError):
            return Busy(f"{self._path} is locked by {self._holders()}: close it there, then try again")
        return translate(error, self._path) if isinstance(error, apsw.Error) else error

    def _take(self) -> Any:
        """What waits now, one by one: what is queued meanwhile comes with the next transaction."""
        for _ in range(len(self._queue)):
            try:
                yield self._queue.popleft()
            except IndexError:
                return

    def _checkpoint(self, connection: apsw.Connection) -> None:
        try:
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._wal_pages = 0
        except apsw.Error:
            # A full disk or a reader in the way: nothing is lost, the next turn tries again.
            self._wal_pages = _CHECKPOINT_PAGES // 2

    def _wal_grew(self, connection: apsw.Connection, name: str, pages: int) -> int:
        self._wal_pages = pages
        return 0

    def _fail(self, jobs: list[_Job], error: BaseException) -> None:
        self._tell(self._deliver, [(job[0], False, error) for job in jobs], sum(job[3] for job in jobs), None)

    def _tell(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            return

    def _deliver(
        self, verdicts: list[tuple[asyncio.Future[Any], bool, Any]], size: int, after: Callable[[], None] | None
    ) -> None:
        self._bytes -= size
        for future, well, verdict in verdicts:
            if future.done():
                continue
            if well:
                future.set_result(verdict)
            else:
                future.set_exception(verdict)
        if after is not None:
            after()
