"""Group commit: all that waits in this process goes into one turn, one call of the server, each with its verdict.

One turn is on its way at a time. A turn whose reply is lost is settled after the reconnect: it stands, or it is made
impossible and its jobs run again. So a server that goes away and comes back in time is noticed by nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import msgspec

from cauce.backends.postgres.faults import GRACE
from cauce.backends.postgres.link import Link, Session, is_lost, translate
from cauce.backends.postgres.table import LOGS, Asked, Draft, Found, Job, Known, Placed
from cauce.errors import Busy, CauceError, OutcomeUnknown, Overloaded, Refused, Unreachable
from cauce.log import Appended

__all__ = ["Writer"]

_MOST_WAITING = 20_000
_MOST_BYTES = 64 * 1024 * 1024
_TURN_JOBS = 2_000
_TURN_BYTES = 4 * 1024 * 1024
_TRIES = 4
"""So often a turn may have presumed wrongly before it keeps the lock while it learns."""

_TIDY_EVERY = 1_000
_KEPT = "interval '5 minutes'"
"""For how long it can be told whether a turn stands; longer than anybody waits to be told."""

_LONGEST_PAUSE = 1.0
_TAKE_TURN = f"select * from take_turn({', '.join(f'${n}' for n in range(1, 38))})"
_SETTLE = "select * from settle_turn($1, $2)"
_STANDS = """
    select type, meta, body, version, position from {} where domain = $1 and key = $2
    and position >= $3 and position < $3 + $4 order by position"""
_BLOCKERS = """
    select a.pid, a.application_name, a.state from unnest(pg_blocking_pids($1)) b (pid)
    join pg_stat_activity a on a.pid = b.pid limit 5"""
_TIDY = f"""
    delete from turns where change in (select t.change from turns t where t.change < $1 and not t.void
    and t.at < now() - {_KEPT} order by t.change limit 5000 for update skip locked)"""

_log = logging.getLogger("cauce")
_Verdicts = list[tuple[Job, Any]]


class _Lost(msgspec.Struct, eq=False):
    """A turn of which it is not known whether it stands."""

    number: int
    draft: Draft
    verdicts: _Verdicts
    since: float
    told: bool = False


class Writer:
    """The queue, the connection that writes, and the task that carries one to the other.

    Parameters:
        told: called on the loop with each turn that wrote something.
    """

    def __init__(self, link: Link, told: Callable[[Draft], None]) -> None:
        self._link, self._clock, self._told = link, link.clock, told
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._id = link.clock.id()
        self._number = 0
        self._known = Known()
        self._queue: deque[Job] = deque()
        self._bytes = 0
        self._bell: asyncio.Future[None] | None = None
        self._closing = False
        self._session: Session | None = None
        self._call: Any = None
        self._lost: _Lost | None = None
        self._trouble: CauceError | None = None
        self._began: float | None = None
        self._blocker = ""
        self._watch: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, or raise why not."""
        await self._open_session()
        self._task = self._loop.create_task(self._run())

    def submit(self, decide: Callable[..., Any], *arguments: Any, id: str, size: int = 0) -> asyncio.Future[Any]:
        """Queue a method of `Draft` with its arguments. Raises `Overloaded` when too much waits already."""
        if os.getpid() != self._pid:
            raise Refused(
                f"{self._link.url} was opened before a fork: open it anew in this process (spawn instead of fork)"
            )
        if self._closing:
            raise Refused(f"{self._link.url} is closed")
        if len(self._queue) >= _MOST_WAITING or self._bytes > _MOST_BYTES:
            raise Overloaded(
                f"{len(self._queue):,} writes of {self._bytes:,} bytes wait for {self._link.url}: slow down"
            )
        future: asyncio.Future[Any] = self._loop.create_future()
        self._bytes += size
        self._queue.append(Job(future, decide, arguments, id, size, self._clock.monotonic()))
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
        if self._watch is None:
            self._watch = self._loop.call_later(self._link.patience / 4, self._look)
        return future

    async def close(self) -> None:
        """Write what waits, for as long as anybody is patient, then stop."""
        self._closing = True
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
        tasks = [task for task in (self._task, self._asking, self._tidying) if task is not None]
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=2 * (self._link.patience + GRACE))
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._watch is not None:
            self._watch.cancel()
        self._fail(self._take(len(self._queue), _MOST_BYTES * 2), Refused(f"{self._link.url} is closed"))
        if self._session is not None:
            with suppress(Exception):
                await self._session.close(timeout=self._link.patience)

    # ---------------------------------------------------------------------------------------------- the task

    async def _run(self) -> None:
        try:
            while True:
                if not self._queue and self._lost is None:
                    if self._closing:
                        return
                    self._bell = self._loop.create_future()
                    await self._bell
                    self._bell = None
                elif not await self._connected():
                    return
                elif self._queue:
                    await self._turn(self._take(_TURN_JOBS, _TURN_BYTES))
        except Exception as error:
            # A task that died must not leave its callers waiting.
            _log.exception("the writer of %s stopped", self._link.url)
            self._closing = True
            lost, self._lost = self._lost, None
            jobs = [] if lost is None else [job for job, _ in lost.verdicts]
            self._fail(
                [*jobs, *self._take(len(self._queue), _MOST_BYTES * 2)], Refused(f"the writer stopped: {error!r}")
            )

    def _take(self, jobs: int, size: int) -> list[Job]:
        taken: list[Job] = []
        while self._queue and jobs > 0 and size > 0:
            job = self._queue.popleft()
            taken.append(job)
            jobs, size = jobs - 1, size - job.size
        return taken

    async def _connected(self) -> bool:
        """Until there is a session, and what was lost is settled. False when it closes and nobody waits any more."""
        pause = 0.02
        while self._session is None or self._session.is_closed() or self._lost is not None:
            if self._closing and not self._queue and (self._lost is None or self._lost.told):
                return False
            try:
                if self._session is None or self._session.is_closed():
                    await self._open_session()
                if self._lost is not None:
                    await self._settle(self._lost)
            except Exception as error:
                self._trouble = translate(error, self._link.url)
                if is_lost(error) or isinstance(self._trouble, Unreachable):
                    self._drop()
                await self._clock.sleep(pause * (1 + self._clock.random()))
                # A server that is back must be found before whoever comes then loses patience.
                pause = min(pause * 2, _LONGEST_PAUSE, self._link.patience / 4)
        return True

    async def _open_session(self) -> None:
        self._session = None
        # A process that is stopped while it keeps the lock is ended by the server before others lose their patience.
        idle = str(max(round(self._link.patience * 500), 200))
        session = await self._link.dedicated("writer", idle_in_transaction_session_timeout=idle)
        try:
            async with asyncio.timeout(self._link.patience + GRACE):
                self._call = await session.prepare(_TAKE_TURN)
        except BaseException:
            session.terminate()
            raise
        self._known.doubt()
        self._session = session

    def _drop(self) -> None:
        if self._session is not None:
            self._session.terminate()
        self._session = None

    # ---------------------------------------------------------------------------------------------- one turn

    async def _turn(self, jobs: list[Job]) -> None:
        """All these jobs, in one transaction."""
        self._number += 1
        self._began, self._blocker = self._clock.monotonic(), ""
        sent: list[tuple[Draft, _Verdicts]] = []
        try:
            reply = await self._agreed(jobs, sent)
        except Exception as error:
            if self._session is not None and self._session.is_in_transaction():
                self._drop()
            if is_lost(error):
                self._trouble = translate(error, self._link.url)
                self._drop()
                if sent:
                    self._lost = _Lost(self._number, *sent[-1], self._clock.monotonic())
                else:
                    self._queue.extendleft(reversed(jobs))
            else:
                await self._refused(jobs, error)
        else:
            self._deliver(*sent[-1], reply["heads"])
        finally:
            self._began = None

    async def _agreed(self, jobs: list[Job], sent: list[tuple[Draft, _Verdicts]]) -> Mapping[str, Any]:
        """Say it until nothing was presumed wrongly. What was said last stands at the end of `sent`."""
        session, found = self._session, dict[Asked, list[Found]]()
        assert session is not None
        for _ in range(_TRIES):
            reply = await self._say(jobs, sent, found)
            if reply["well"]:
                return reply
        async with asyncio.timeout(2 * (self._link.patience + GRACE)):
            # The first of these calls takes the lock, and the transaction keeps it.
            await session.execute("begin")
            while not (reply := await self._say(jobs, sent, found))["well"]:
                continue
            await session.execute("commit")
        return reply

    async def _say(
        self, jobs: list[Job], sent: list[tuple[Draft, _Verdicts]], found: dict[Asked, list[Found]]
    ) -> Mapping[str, Any]:
        draft = Draft(self._known, found)
        verdicts = _decided(draft, jobs)
        arguments = draft.arguments()
        sent.append((draft, verdicts))
        async with asyncio.timeout(self._link.patience + GRACE):
            (reply,) = await self._call.fetch(self._known.change, self._id, self._number, *arguments)
            if reply["repeats"]:
                asked = list(draft.asked.items())
                for n, place in zip(reply["repeats"], reply["places"], strict=True):
                    (log, stream, id), count = asked[n - 1]
                    found[log, stream, id] = await self._standing(log, stream, place, count)
        self._known.learn(draft, reply)
        answer: Mapping[str, Any] = reply
        return answer

    async def _standing(self, log: int, stream: str, place: int, count: int) -> list[Found]:
        assert self._session is not None
        domain, _, key = stream.partition("/")
        rows = await self._session.fetch(_STANDS.format(LOGS[log]), domain, key, place, count)
        return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]

    async def _refused(self, jobs: list[Job], error: Exception) -> None:
        """The server, or the driver, took nothing of a turn."""
        ours = translate(error, self._link.url)
        if isinstance(error, asyncpg.LockNotAvailableError):
            who = self._blocker or "another session"
            ours = Busy(f"{self._link.url} is being written by {who}: wait, or end that session")
            # Whoever queued up behind would wait as long again, for the same.
            jobs = [*jobs, *self._take(len(self._queue), _MOST_BYTES * 2)]
        elif isinstance(ours, Refused) and len(jobs) > 1:
            # One of them may be what is wrong: it shall not take the others with it.
            for job in reversed(jobs[1:]):
                self._queue.appendleft(job)
            jobs = jobs[:1]
            await self._turn(jobs)
            return
        self._fail(jobs, ours)

    async def _settle(self, lost: _Lost) -> None:
        assert self._session is not None
        async with asyncio.timeout(self._link.patience + GRACE):
            (reply,) = await self._session.fetch(_SETTLE, self._id, lost.number)
        self._lost = None
        self._known.doubt()
        if reply["stands"]:
            heads = [after - count for after, count in zip(reply["heads"], lost.draft.counts, strict=True)]
            self._deliver(lost.draft, lost.verdicts, heads)
        elif not lost.told:
            for job, _ in reversed(lost.verdicts):
                self._queue.appendleft(job)

    def _deliver(self, draft: Draft, verdicts: _Verdicts, heads: Sequence[int]) -> None:
        for job, verdict in verdicts:
            self._bytes -= job.size
            future = job.future
            if future.done():
                continue
            if type(verdict) is Placed:
                future.set_result(Appended(verdict.version, heads[verdict.log] + verdict.at, verdict.repeated))
            elif isinstance(verdict, Exception):
                future.set_exception(verdict)
            else:
                future.set_result(verdict)
        if any(draft.counts):
            self._told(draft)
        if self._number % _TIDY_EVERY == 0 and self._tidying is None:
            self._tidying = self._loop.create_task(self._tidy())

    def _fail(self, jobs: Sequence[Job], error: CauceError) -> None:
        for job in jobs:
            self._bytes -= job.size
            if not job.future.done():
                job.future.set_exception(type(error)(*error.args))

    async def _tidy(self) -> None:
        try:
            await self._link.fetch(_TIDY, self._known.change - 1)
        except CauceError as error:
            _log.debug("old turns of %s are kept: %r", self._link.url, error)
        finally:
            self._tidying = None

    # ------------------------------------------------------------------------------------------------ watching

    def _look(self) -> None:
        """What has waited too long for a server that is away is told so; who stands in the way is asked in time."""
        self._watch = None
        now, patience = self._clock.monotonic(), self._link.patience
        if self._session is None or self._lost is not None:
            self._lose_patience(now - patience)
        elif self._began is not None and now - self._began > patience * 0.4 and self._asking is None:
            self._asking = self._loop.create_task(self._ask_who())
        if self._queue or self._began is not None or (self._lost is not None and not self._lost.told):
            self._watch = self._loop.call_later(patience / 4, self._look)

    def _lose_patience(self, before: float) -> None:
        old: list[Job] = []
        while self._queue and self._queue[0].since < before:
            old.append(self._queue.popleft())
        self._fail(old, self._trouble or Unreachable(f"{self._link.url} is away: it is tried again by itself"))
        lost = self._lost
        if lost is not None and not lost.told and lost.since < before:
            lost.told = True
            for job, _ in lost.verdicts:
                self._bytes -= job.size
                if not job.future.done():
                    job.future.set_exception(
                        OutcomeUnknown(job.id, f"{self._link.url} went away before it answered ({self._trouble})")
                    )

    async def _ask_who(self) -> None:
        session = self._session
        try:
            if session is not None:
                rows = await self._link.fetch(_BLOCKERS, session.get_server_pid())
                self._blocker = (
                    "; ".join(
                        f"pid {pid} ({name or 'unnamed'}, {state or 'state not shown to this role'})"
                        for pid, name, state in rows
                    )
                    or self._blocker
                )
        except CauceError as error:
            _log.debug("who stands in the way at %s is not known: %r", self._link.url, error)
        finally:
            self._asking = None


def _decided(draft: Draft, jobs: list[Job]) -> _Verdicts:
    verdicts: _Verdicts = []
    for job in jobs:
        try:
            verdicts.append((job, job.decide(draft, *job.arguments)))
        except Exception as error:
            verdicts.append((job, error))
    return verdicts
