"""Group commit of units: all that wait in this process go into one transaction, each with its verdict.

Writers of a store take turns under an advisory lock, so that what is said is numbered in the order of the commits, and
no fence rises meanwhile. First all statements are sent as if none could fail. When one does, nothing of that try
remains, and each unit gets a savepoint of its own. A commit whose reply is lost is looked up after the reconnect: what
stands is not done again, and what does not is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import msgspec

from cauce.backends.postgres.dialect import numbered
from cauce.backends.postgres.faults import GRACE, SLOWEST, blamed
from cauce.backends.postgres.home import Home, filled
from cauce.backends.postgres.link import Link, Session, is_lost, translate
from cauce.errors import Busy, CauceError, Fenced, Overloaded, Refused, Unreachable
from cauce.store import BadStatement, Share, Timer, Unit, Waiting

__all__ = ["Units", "bad_statement"]

_MOST_WAITING = 20_000
_MOST_BYTES = 64 * 1024 * 1024
_AT_ONCE = 1_000
_LONGEST_PAUSE = 1.0
_TEXT = str.maketrans({0: "\\0"})

_PLACES = """insert into {home}.cauce_places as p select * from unnest(%s::text[], %s::text[], %s::int[], %s::text[], %s::bigint[])
    on conflict (consumer, domain, slot) do update set log = excluded.log, position = excluded.position"""
_PARKED = """insert into {home}.cauce_waiting as w
    select * from unnest(%s::text[], %s::bigint[], %s::text[], %s::int[], %s::int[], %s::bigint[], %s::bool[], %s::text[], %s::text[], %s::bytea[])
    on conflict (consumer, position) do update set stream = excluded.stream, slot = excluded.slot, attempts = excluded.attempts,
    due = excluded.due, dead = excluded.dead, error = excluded.error, trace = excluded.trace, raw = excluded.raw"""
_UNPARKED = """delete from {home}.cauce_waiting w using unnest(%s::text[], %s::bigint[]) u (consumer, position)
    where w.consumer = u.consumer and w.position = u.position"""
_SAID = """insert into {home}.cauce_outbox (consumer, slot, said) select u.consumer, u.slot, u.said
    from unnest(%s::text[], %s::int[], %s::bytea[]) with ordinality u (consumer, slot, said, n) order by u.n"""
_TIMERS = """insert into {home}.cauce_timers as t select * from unnest(%s::text[], %s::bigint[])
    on conflict (name) do update set due = excluded.due"""
_LATER = """insert into {home}.cauce_later as l (id, share, handler, due, said) select u.id, u.share, u.handler, u.due, u.said
    from unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::bytea[]) with ordinality u (id, share, handler, due, said, n) order by u.n
    on conflict (id) do update set share = excluded.share, handler = excluded.handler, due = excluded.due, said = excluded.said,
    number = default"""
_CANCELLED = "delete from {home}.cauce_later where id = any(%s::text[])"
_TURN = "insert into {home}.cauce_turns (writer, number, loud) values (%s, %s, %s)"
_FENCES = "select name, fence from {home}.cauce_claims where name = any($1)"
_STANDS = "select exists (select from {home}.cauce_turns where writer = $1 and number = $2)"
_WHO = """select pid, application_name, state from pg_stat_activity where pid <> $2 and pid in (select pid from pg_locks
    where locktype = 'advisory' and granted and ((classid::bigint << 32) | objid::bigint) = $1) limit 5"""

_log = logging.getLogger("cauce")
Place = tuple[str, str, int]
Noted = tuple[Share | None, str, int]


def bad_statement(error: BaseException, sql: str, service: str) -> BadStatement | None:
    """What a handler is told, where its statement is to blame; None where the moment is."""
    told = blamed(error)
    return None if told is None else BadStatement(f"{sql!r} cannot be run on {service}'s store: {told}")


class _Job:
    """A unit that waits for its verdict."""

    __slots__ = ("future", "since", "size", "unit")

    def __init__(self, unit: Unit, future: asyncio.Future[None], size: int, since: float) -> None:
        self.unit, self.future, self.size, self.since = unit, future, size, since


class _Batch:
    """What one transaction writes of ours: of each thing the last that its units say."""

    def __init__(self, places: dict[Place, Noted]) -> None:
        self.places = {place: (log, position) for place, (_, log, position) in places.items()}
        self.waiting: dict[tuple[str, int], Waiting | None] = {}
        self.timers: dict[str, int] = {}
        self.later: dict[str, Timer | None] = {}
        self.said: list[tuple[str, int, bytes]] = []

    def add(self, unit: Unit) -> None:
        if unit.parked is not None:
            consumer, waiting = unit.parked
            self.waiting[consumer, waiting.position] = waiting
        if unit.unparked is not None:
            self.waiting[unit.unparked] = None
        self.waiting.update(dict.fromkeys(unit.passed))
        if unit.timer is not None:
            self.timers[unit.timer[0]] = unit.timer[1]
        self.later |= dict.fromkeys(unit.cancelled)
        for timer in unit.later:
            # The last that was set of an id is the newest.
            self.later.pop(timer.id, None)
            self.later[timer.id] = timer
        if unit.place is not None:
            consumer, domain, slot, log, position = unit.place
            self.places[consumer, domain, slot] = log, position
        self.said += unit.said

    def statement(self, turn: tuple[str, int] | None) -> tuple[str, list[Any]]:
        """All rows as one statement with its values; without text if there is nothing to write."""
        parked = [(consumer, each) for (consumer, _), each in self.waiting.items() if each is not None]
        parts = [
            (_PLACES, _columns([(*place, *noted) for place, noted in self.places.items()])),
            (_PARKED, _columns([(consumer, *map(_clean, msgspec.structs.astuple(each))) for consumer, each in parked])),
            (_UNPARKED, _columns([key for key, each in self.waiting.items() if each is None])),
            (_SAID, _columns(self.said)),
            (_TIMERS, _columns(list(self.timers.items()))),
            (_LATER, _columns([msgspec.structs.astuple(each) for each in self.later.values() if each is not None])),
            (_CANCELLED, _columns([(id,) for id, each in self.later.items() if each is None])),
            (_TURN, [] if turn is None else [*turn, bool(self.said)]),
        ]
        sql, values = list[str](), list[Any]()
        for text, some in parts:
            if some:
                sql.append(text % tuple(f"${n}" for n in range(len(values) + 1, len(values) + 1 + len(some))))
                values += some
        *before, last = sql or [""]
        return "".join(
            (f"{', ' if n else 'with '}p{n} as ({text})") for n, text in enumerate(before)
        ) + f" {last}", values


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [list(column) for column in zip(*rows, strict=True)]


def _clean(value: Any) -> Any:
    """Text as PostgreSQL keeps it: what a handler raised may be no Unicode, or hold NUL."""
    return value.translate(_TEXT).encode(errors="backslashreplace").decode() if isinstance(value, str) else value


class _Lost(msgspec.Struct, eq=False):
    """A transaction of which it is not known whether it was committed, and what its units are told if it was."""

    number: int
    jobs: list[_Job]
    refused: dict[int, CauceError]
    moving: dict[Place, Noted]


class Units:
    """The queue, the connection that writes, and the task that carries one to the other."""

    def __init__(self, link: Link, home: Home) -> None:
        self._link, self._home, self._clock = link, home, link.clock
        self._loop = asyncio.get_running_loop()
        self.writer = link.clock.id()
        self._number = 0
        self._queue: deque[_Job] = deque()
        self._bytes = 0
        self._bell = asyncio.Event()
        self._moves: dict[Place, Noted] = {}
        self._flushes: list[asyncio.Future[None]] = []
        self._session: Session | None = None
        self._lost: _Lost | None = None
        self._trouble: CauceError | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        self._current: list[_Job] = []
        self._pid = os.getpid()
        self._task: asyncio.Task[None] | None = None
        self._what = f"{home.schema} at {link.url}"

    async def start(self) -> None:
        """Connect, or raise why not."""
        await self._connect()
        self._task = self._loop.create_task(self._run())

    def note(self, place: Place, noted: Noted) -> None:
        """A place, to be written with the next unit."""
        self._moves[place] = noted

    @property
    def has_moves(self) -> bool:
        return bool(self._moves)

    def flush(self) -> asyncio.Future[None]:
        """Write the places that were noted."""
        future = self._loop.create_future()
        if self._closing:
            future.set_exception(Refused(f"{self._what} is closed"))
        self._flushes.append(future)
        self._bell.set()
        self._look_later()
        return future

    def submit(self, unit: Unit) -> asyncio.Future[None]:
        """Queue a unit. Raises `Overloaded` when too much waits already."""
        if self._closing:
            raise Refused(f"{self._what} is closed")
        if os.getpid() != self._pid:
            raise Refused(
                f"{self._what} was opened before a fork: open it anew in this process (spawn instead of fork)"
            )
        size = unit.size
        if len(self._queue) >= _MOST_WAITING or self._bytes > _MOST_BYTES:
            raise Overloaded(f"{len(self._queue):,} units of {self._bytes:,} bytes wait for {self._what}: slow down")
        job = _Job(unit, self._loop.create_future(), size, self._clock.monotonic())
        self._bytes += size
        self._queue.append(job)
        self._bell.set()
        self._look_later()
        return job.future

    async def close(self) -> None:
        """Write what waits, for as long as anybody is patient, then stop."""
        self._closing = True
        self._bell.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=2 * self._link.patience + GRACE)
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self._watch is not None:
            self._watch.cancel()
        self._abandon(Refused(f"{self._what} is closed"))
        if self._session is not None:
            with suppress(Exception):
                await self._session.close(timeout=self._link.patience)

    # ------------------------------------------------------------------------------------------------- the task

    async def _run(self) -> None:
        try:
            while True:
                # Whatever becomes ready in this round of the loop goes along.
                await self._clock.sleep(0)
                if self._is_idle:
                    if self._closing:
                        return
                    self._bell.clear()
                    await self._bell.wait()
                elif not await self._connected():
                    return
                else:
                    await self._turn(self._take(_AT_ONCE))
        except Exception as error:
            # A task that died must not leave its callers waiting.
            _log.exception("the writer of %s stopped", self._what)
            self._closing = True
            self._abandon(Refused(f"the writer of {self._what} stopped: {error!r}"))

    def _abandon(self, error: CauceError) -> None:
        lost = self._lost.jobs if self._lost is not None else []
        self._lost = None
        self._fail([*lost, *self._current, *self._take(_MOST_WAITING)], error)
        self._flushed(error)

    @property
    def _is_idle(self) -> bool:
        return not self._queue and not self._flushes and self._lost is None

    def _take(self, most: int) -> list[_Job]:
        return [self._queue.popleft() for _ in range(min(most, len(self._queue)))]

    async def _connected(self) -> bool:
        """Until there is a session, and what was lost is settled. False when it closes and nobody waits any more."""
        pause = 0.02
        while self._session is None or self._session.is_closed() or self._lost is not None:
            if self._closing and self._is_idle:
                return False
            try:
                if self._session is None or self._session.is_closed():
                    await self._connect()
                if self._lost is not None:
                    await self._settle(self._lost)
            except Exception as error:
                self._trouble = translate(error, self._what)
                self._drop()
                await self._clock.sleep(pause * (1 + self._clock.random()))
                pause = min(pause * 2, _LONGEST_PAUSE)
        return True

    async def _connect(self) -> None:
        self._session = None
        self._session = await self._link.dedicated(
            "store",
            search_path=f"{self._home.quoted}, pg_temp",
            statement_timeout=f"{SLOWEST}s",
            # A process that is stopped while it has the turn is ended before others lose their patience.
            idle_in_transaction_session_timeout=str(max(round(self._link.patience * 500), 200)),
        )

    def _drop(self) -> None:
        if self._session is not None:
            self._session.terminate()
        self._session = None

    async def _say(self, sql: str) -> None:
        """Statements without values, all in one message."""
        assert self._session is not None
        async with asyncio.timeout(SLOWEST + GRACE):
            await self._session.execute(sql)

    async def _ask(self, sql: str, *values: Any) -> list[Any]:
        assert self._session is not None
        async with asyncio.timeout(SLOWEST + GRACE):
            return await self._session.fetch(sql, *values)

    # ---------------------------------------------------------------------------------------- one transaction

    async def _turn(self, jobs: list[_Job]) -> None:
        """All these units, and the places that were noted, in one transaction."""
        flushes, self._flushes = self._flushes, []
        moving, self._moves = self._moves, {}
        self._number += 1
        self._current = jobs
        lost = _Lost(self._number, jobs, {}, moving)
        try:
            if not await self._written(lost, careful=False):
                await self._written(lost, careful=True)
        except Exception as error:
            await self._failed(lost, flushes, error)
        else:
            self._deliver(lost)
            self._tell(flushes, None)
        self._current = []

    async def _failed(self, lost: _Lost, flushes: list[asyncio.Future[None]], error: Exception) -> None:
        ours = translate(error, self._what)
        if self._lost is None:
            self._put_back(lost.moving)
        if self._lost is not None or is_lost(error) or isinstance(ours, Unreachable):
            self._trouble = ours
            self._drop()
            self._flushes += flushes
            if self._lost is None:
                self._queue.extendleft(reversed(lost.jobs))
            return
        if isinstance(error, asyncpg.LockNotAvailableError):
            ours = await self._who()
        await self._roll_back()
        self._fail(lost.jobs, ours)
        self._tell(flushes, ours)

    def _put_back(self, moving: dict[Place, Noted]) -> None:
        # What was noted since is newer.
        self._moves = moving | self._moves

    async def _roll_back(self) -> None:
        try:
            if self._session is not None and self._session.is_in_transaction():
                await self._say("rollback")
        except Exception:
            self._drop()

    async def _written(self, lost: _Lost, *, careful: bool) -> bool:
        """Whether it is committed; False where a statement failed, and nothing remains."""
        lost.refused.clear()
        fast = "" if lost.jobs else "set local synchronous_commit = off; "
        await self._say(f"begin; {fast}select pg_advisory_xact_lock({self._home.lock})")
        names = {share.name for job in lost.jobs if (share := job.unit.share) is not None}
        names |= {share.name for share, _, _ in lost.moving.values() if share is not None}
        fences = dict(await self._ask(filled(_FENCES, self._home), list(names))) if names else {}

        def stands(share: Share | None) -> bool:
            return share is None or fences.get(share.name, 0) == share.fence

        good = list[_Job]()
        for n, job in enumerate(lost.jobs):
            if stands(job.unit.share):
                good.append(job)
            else:
                assert job.unit.share is not None
                lost.refused[n] = Fenced(
                    f"{job.unit.share.name} of {self._what} has another holder by now: nothing of this message was stored"
                )
        with_statements = any(job.unit.statements for job in good)
        if careful:
            good = [job for job in good if await self._savepoint(job, lost)]
        elif not await self._hopefully(good):
            return False
        batch = _Batch({place: noted for place, noted in lost.moving.items() if stands(noted[0])})
        for job in good:
            batch.add(job.unit)
        sql, values = batch.statement((self.writer, lost.number) if good else None)
        if values:
            await self._ask(filled(sql, self._home), *values)
        return await self._commit(lost, checks=with_statements and not careful)

    async def _commit(self, lost: _Lost, *, checks: bool) -> bool:
        try:
            # What a table checks only at the end shall fail before the commit, which has one reply for all units.
            await self._say("set constraints all immediate; commit" if checks else "commit")
        except Exception as error:
            if checks and isinstance(error, asyncpg.PostgresError) and not is_lost(error):
                await self._say("rollback")
                return False
            if lost.jobs and (is_lost(error) or not isinstance(error, asyncpg.PostgresError)):
                self._lost = lost
            raise
        return True

    async def _hopefully(self, jobs: list[_Job]) -> bool:
        """All statements, neighbours with the same text in one message. False if one failed."""
        assert self._session is not None
        runs = list[tuple[str, list[Sequence[Any]]]]()
        for job in jobs:
            for sql, values in job.unit.statements:
                if not runs or runs[-1][0] != sql:
                    runs.append((sql, []))
                runs[-1][1].append(values)
        for sql, many in runs:
            try:
                async with asyncio.timeout(SLOWEST + GRACE):
                    if len(many) > 1:
                        await self._session.executemany(numbered(sql), many)
                    else:
                        await self._session.fetch(*_with(sql, many[0]))
            except Exception as error:
                if is_lost(error):
                    raise
                await self._say("rollback")
                return False
        return True

    async def _savepoint(self, job: _Job, lost: _Lost) -> bool:
        """One unit's statements. Whether all of them were executed."""
        if not job.unit.statements:
            return True
        assert self._session is not None
        await self._say("savepoint unit")
        sql = ""
        try:
            for sql, values in job.unit.statements:
                async with asyncio.timeout(SLOWEST + GRACE):
                    await self._session.fetch(*_with(sql, values))
            await self._say("set constraints all immediate; release unit; set constraints all deferred")
            return True
        except Exception as error:
            if is_lost(error):
                raise
            ours = bad_statement(error, sql, self._home.service) or translate(error, self._what)
            lost.refused[lost.jobs.index(job)] = ours
            await self._say("rollback to unit; release unit")
            return False

    async def _settle(self, lost: _Lost) -> None:
        # Who has the lock now knows that the transaction is over: it had the lock when it was lost.
        await self._say(f"begin; select pg_advisory_xact_lock({self._home.lock})")
        ((stands,),) = await self._ask(filled(_STANDS, self._home), self.writer, lost.number)
        await self._say("commit")
        self._lost = None
        if stands:
            self._deliver(lost)
        else:
            self._put_back(lost.moving)
            self._queue.extendleft(reversed(lost.jobs))

    # ------------------------------------------------------------------------------------------------ verdicts

    def _deliver(self, lost: _Lost) -> None:
        self._trouble = None
        for n, job in enumerate(lost.jobs):
            self._bytes -= job.size
            if not job.future.done():
                if n in lost.refused:
                    job.future.set_exception(lost.refused[n])
                else:
                    job.future.set_result(None)

    def _fail(self, jobs: Sequence[_Job], error: CauceError) -> None:
        for job in jobs:
            self._bytes -= job.size
            if not job.future.done():
                job.future.set_exception(type(error)(*error.args))

    def _flushed(self, error: CauceError) -> None:
        flushes, self._flushes = self._flushes, []
        self._tell(flushes, error)

    def _tell(self, flushes: Sequence[asyncio.Future[None]], error: CauceError | None) -> None:
        for future in flushes:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(type(error)(*error.args))

    async def _who(self) -> CauceError:
        """Who has the turn for longer than we wait."""
        session = self._session
        rows: list[Any] = []
        with suppress(CauceError):
            rows = await self._link.fetch(_WHO, self._home.lock, -1 if session is None else session.get_server_pid())
        who = "; ".join(f"pid {pid} ({name or 'unnamed'}, {state or 'state not shown'})" for pid, name, state in rows)
        return Busy(f"{self._what} is being written by {who or 'another session'}: wait, or end that session")

    def _look_later(self) -> None:
        if self._watch is None:
            self._watch = self._loop.call_later(self._link.patience / 4, self._look)

    def _look(self) -> None:
        """Tell so what waited too long for a server that is away. What may be committed waits until it is known."""
        self._watch = None
        if self._session is None or self._lost is not None:
            before = self._clock.monotonic() - self._link.patience
            error = self._trouble or Unreachable(f"{self._what} is away: it is tried again by itself")
            late = [job for job in self._queue if job.since < before]
            if late:
                self._queue = deque(job for job in self._queue if job.since >= before)
                self._fail(late, error)
            if late or not self._queue:
                self._flushed(error)
        if not self._is_idle:
            self._look_later()


def _with(sql: str, values: Sequence[Any]) -> tuple[Any, ...]:
    # Fetched, because what is executed without values may be several statements.
    return (numbered(sql), *values)
