"""Group commit: one thread per file takes what waits into one transaction, one flush for all, each with its verdict.

A write that is alone when the loop has gone round needs no thread, whose waking twice costs as much as the flush: the
loop writes it itself, as long as flushes are short here and nobody else is in turn. There a signal handler may raise
after any step, which is why the steps there are made so that each can be taken back, or done again.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

_SMALL = 64 * 1024
"""Bytes that the loop writes itself at most."""

_Job = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...], int]


class Journal(Protocol):
    """What is written: called around the jobs of a transaction, in the writer thread or on the loop."""

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
        """Whether the next transaction has more to do than the jobs, and so is none for the loop. Called in turn."""
        ...

    def committed(self) -> Callable[[], None]:
        """After the commit, still in turn. What it returns is called on the loop, with the verdicts."""
        ...

    def rolled_back(self) -> None:
        """Nothing of the transaction remains."""
        ...


class _Outcome:
    """One transaction, how far it came, and what its callers are told. Telling it twice does no harm."""

    __slots__ = ("after", "announced", "begun", "commits", "committed", "jobs", "size", "verdicts")

    def __init__(self) -> None:
        self.jobs: list[_Job] = []
        self.verdicts: list[tuple[asyncio.Future[Any], bool, Any]] = []
        self.size = 0
        self.after: Callable[[], None] | None = None
        self.begun = self.commits = self.committed = self.announced = False

    def take(self, job: _Job) -> None:
        self.jobs.append(job)
        self.size += job[3]

    def fail(self, error: Exception) -> None:
        self.verdicts = [(job[0], False, error) for job in self.jobs]


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
        self._lock = threading.RLock()
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
        if self._watch is None:
            self._watch = self._loop.call_later(self._patience / 4, self._look)
        if not self._called:
            self._called = True
            self._loop.call_soon(self._go)
        return future

    def _go(self) -> None:
        """All who had something to write in this round of the loop have said it by now."""
        self._called = False
        try:
            if len(self._queue) == 1:
                self._alone()
        finally:
            self._ring()

    def _ring(self) -> None:
        """Whatever still waits, waits for the thread."""
        if self._queue and self._idle:
            self._idle = False
            self._bell.put(None)

    def _alone(self) -> None:
        """Write here, on the loop, if that is sure to be short. What does not come through is left to the thread."""
        if (
            self._calm < _CALM
            or self._bytes > _SMALL
            or self._wal_pages > _CHECKPOINT_PAGES
            or self._runway.is_short(self._wal_pages)
        ):
            return
        try:
            if self._lock.acquire(blocking=False):
                self._try_turn()
        finally:
            try:  # noqa: SIM105 - to enter a `suppress` is a step more at which a signal may come
                self._lock.release()
            except RuntimeError:
                # It had not been taken; whether it had, when a signal handler raised, only the lock itself can tell.
                pass

    def _try_turn(self) -> None:
        # A thread that ends closes its connection under the lock, and the turnstile after it.
        if self._closing or self._broken is not None:
            return
        try:
            if self._turnstile.try_enter():
                self._lone()
        finally:
            # Under the lock the turn is ours or not this process's: to leave what was not entered changes nothing.
            try:
                self._turnstile.leave()
            except BaseException:
                self._turnstile.leave()
                raise

    def _lone(self) -> None:
        """One job in one transaction. Raises what the thread would not meet: above all a signal handler's errors."""
        outcome, connection = _Outcome(), self._connection
        try:
            connection.set_busy_timeout(0)
            if self._journal.is_due():
                return
            self._write(connection, outcome, alone=True)
            self._announce(outcome)
            self._deliver(outcome)
        except BaseException as error:
            # SQLite's own error says that it did not commit; any other may have come after it had.
            if outcome.committed or (
                outcome.commits and not connection.in_transaction and not isinstance(error, apsw.Error)
            ):
                self._announce(outcome)
                self._deliver(outcome)
                raise
            self._give_back(outcome, error)
            if not isinstance(error, (apsw.Error, CauceError)):
                raise

    def _give_back(self, outcome: _Outcome, error: BaseException) -> None:
        """Nothing of a lone write remains, and the thread may do it."""
        for job in outcome.jobs:
            if not self._queue or self._queue[0] is not job:
                self._queue.appendleft(job)
        self._note(error)
        self._roll_back(self._connection, outcome)

    async def close(self) -> None:
        """Write what waits, then stop. Does not wait for a turn that nothing needs any more."""
        self.stop()
        while self._thread.is_alive() and (self._queue or self._since is None):
            await asyncio.to_thread(self._thread.join, 0.25)
        if self._watch is not None:
            self._watch.cancel()
        # A thread that died may have left some that came while it did.
        left = self._take()
        error = self._broken or Refused(f"{self._path} is closed")
        self._deliver(_failed(left, error))

    def _look(self) -> None:
        """Refuse what has waited too long for a turn. Jobs are taken off the queue only in turn, so none runs later."""
        self._watch = None
        since, error = self._since, self._broken
        if since is not None and self._clock.monotonic() - since > self._patience:
            error = Busy(f"{self._path} is being written by {self._holders()}: wait, or stop it")
        if error is not None:
            self._deliver(_failed(self._take(), error))
        # If a signal handler raised before the bell was rung, nobody else would.
        self._called = False
        self._ring()
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
                        self._fail(self._take(), self._broken)
                    elif self._queue:
                        self._turn(connection)
                        runway.keep(self._wal_pages)
        except BaseException as error:
            # A dead thread must not leave its callers waiting.
            with self._lock:
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
            # A lone write had no time to wait for a lock.
            connection.set_busy_timeout(round(self._patience * 1000))
            if self._queue:
                self._transaction(connection)
            if self._wal_pages > _CHECKPOINT_PAGES:
                self._checkpoint(connection)
        finally:
            self._turnstile.leave()
            self._since = None

    def _transaction(self, connection: apsw.Connection) -> None:
        """All that waits, in one transaction."""
        outcome = _Outcome()
        self._taken = outcome.jobs
        try:
            self._write(connection, outcome, alone=False)
        except Exception as error:
            for job in () if outcome.jobs else self._take():
                outcome.take(job)
            self._roll_back(connection, outcome)
            outcome.fail(self._translated(error))
            self._tell(self._deliver, outcome)
        else:
            try:
                self._announce(outcome)
            finally:
                # What is committed is told as committed, whatever befalls the thread.
                self._tell(self._deliver, outcome)
        self._taken = []

    def _write(self, connection: apsw.Connection, outcome: _Outcome, *, alone: bool) -> None:
        """From begin to commit. Alone it is one job, which stands in the queue until all but the commit is done."""
        refusal = CauceError if alone else Exception
        began = self._clock.monotonic()
        connection.execute("begin immediate")
        outcome.begun = True
        self._since = None
        self._journal.begin()
        for job in (self._queue[0],) if alone else self._take():
            outcome.take(job)
            try:
                outcome.verdicts.append((job[0], True, job[1](*job[2])))
            except apsw.Error:
                raise
            except refusal as error:
                outcome.verdicts.append((job[0], False, error))
        self._journal.flush()
        if alone:
            self._queue.popleft()
        outcome.commits = True
        connection.execute("commit")
        outcome.committed = True
        self._calm = self._calm + 1 if self._clock.monotonic() - began < _SHORT else 0

    def _announce(self, outcome: _Outcome) -> None:
        if not outcome.announced:
            outcome.announced = True
            outcome.after = self._journal.committed()

    def _roll_back(self, connection: apsw.Connection, outcome: _Outcome) -> None:
        begun = outcome.begun or connection.in_transaction
        if connection.in_transaction:
            connection.execute("rollback")
        if begun:
            self._journal.rolled_back()

    def _note(self, error: BaseException) -> None:
        if isinstance(error, apsw.IOError) and extended(error) == apsw.SQLITE_IOERR_FSYNC:
            # After a failed flush nobody knows what the disk holds; to go on would be to guess.
            self._broken = Damaged(f"{self._path}: the disk failed to flush: check the disk, then open the log again")

    def _translated(self, error: Exception) -> Exception:
        self._note(error)
        if self._broken is not None:
            return self._broken
        if isinstance(error, apsw.BusyError):
            return Busy(f"{self._path} is locked by {self._holders()}: close it there, then try again")
        return translate(error, self._path) if isinstance(error, apsw.Error) else error

    def _take(self) -> Iterator[_Job]:
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

    def _fail(self, jobs: Iterable[_Job], error: Exception) -> None:
        self._tell(self._deliver, _failed(jobs, error))

    def _tell(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            return

    def _deliver(self, outcome: _Outcome) -> None:
        size, outcome.size = outcome.size, 0
        self._bytes -= size
        for future, well, verdict in outcome.verdicts:
            if future.done():
                continue
            if well:
                future.set_result(verdict)
            else:
                future.set_exception(verdict)
        after, outcome.after = outcome.after, None
        if after is not None:
            after()


def _failed(jobs: Iterable[_Job], error: Exception) -> _Outcome:
    outcome = _Outcome()
    for job in jobs:
        outcome.take(job)
    outcome.fail(error)
    return outcome
