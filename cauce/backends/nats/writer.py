"""What is written through one handle, in the order of the calls: gathered, sent together, each with its own verdict.

What comes up while a group is on its way is the next group: one atomic batch, or a chain where that is faster. Where a
batch is refused, what changed is looked up and it is sent again; then each alone, so that one bad append takes no other
with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from cauce.backends.nats.api import CHANGED, LATER, ApiError, refusal, told
from cauce.backends.nats.call import Lost, Reply
from cauce.backends.nats.chain import Pace
from cauce.backends.nats.heads import Heads
from cauce.backends.nats.job import Job
from cauce.backends.nats.plan import Plan, draw
from cauce.backends.nats.stream import Stream
from cauce.errors import NotPermitted, OutcomeUnknown, Overloaded, Unreachable
from cauce.log import Appended

__all__ = ["Writer"]

T = TypeVar("T")

_MOST_WAITING = 20_000
_MOST_BYTES = 64 * 1024 * 1024
_GROUP_ENTRIES = 900
_GROUP_BYTES = 4 * 1024 * 1024
_PAUSE = 0.01


class _Ack(msgspec.Struct, frozen=True):
    seq: int


class _Step:
    """Something else that takes its place among the appends, such as a claim."""

    __slots__ = ("future", "size", "work")

    def __init__(self, work: Callable[[], Awaitable[Any]]) -> None:
        self.work, self.size = work, 0
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Who stopped waiting does not ask how it went.
        self.future.add_done_callback(lambda future: future.cancelled() or future.exception())


class Writer:
    """Its task lives while there is something to write."""

    def __init__(self, stream: Stream, heads: Heads) -> None:
        self._stream, self._heads, self._link = stream, heads, stream.link
        self._queue: deque[Job | _Step] = deque()
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._batch, self._batches = self._link.clock.id().encode(), 0
        self._pace = Pace()
        self._closed = False

    def submit(self, job: Job) -> asyncio.Future[Appended]:
        """Queue a job. Raises `Overloaded` where too much waits already."""
        self._bound(job.size)
        job.until = asyncio.get_running_loop().time() + self._link.patience
        self._put(job)
        return job.future

    async def step(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something when all that was submitted before has its verdict, and before all that comes later."""
        self._bound(0)
        step = _Step(work)
        self._put(step)
        # Who stops waiting does not take it back.
        answer: T = await asyncio.shield(step.future)
        return answer

    def _bound(self, size: int) -> None:
        if self._stream.broken is not None:
            raise self._stream.broken
        if self._closed:
            raise Unreachable(f"{self._link} is closed: open the bus again")
        if len(self._queue) >= _MOST_WAITING or self._bytes + size > _MOST_BYTES:
            where = "is away" if self._link.is_away else "is behind"
            raise Overloaded(
                f"{len(self._queue):,} writes ({self._bytes:,} bytes) wait already, because {self._link} {where}: "
                "slow down, then try again"
            )

    def _put(self, job: Job | _Step) -> None:
        self._queue.append(job)
        self._bytes += job.size
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Write what waits."""
        self._closed = True
        if self._task is not None:
            await asyncio.wait({self._task})

    # ------------------------------------------------------------------------------------------------- groups

    async def _run(self) -> None:
        while self._queue:
            first = self._queue[0]
            if isinstance(first, _Step):
                self._queue.popleft()
                await self._do(first)
                continue
            jobs = self._gather()
            try:
                await self._write(jobs)
            except Exception as error:
                _fail(jobs, error)
            finally:
                self._bytes -= sum(job.size for job in jobs)
                # Only where the loop is being torn down is one left.
                for job in jobs:
                    job.future.cancel()

    async def _do(self, step: _Step) -> None:
        try:
            answer = await step.work()
        except Exception as error:
            if not step.future.done():
                step.future.set_exception(error)
        else:
            if not step.future.done():
                step.future.set_result(answer)

    def _gather(self) -> list[Job]:
        jobs: list[Job] = []
        entries = size = 0
        while self._queue and not isinstance(job := self._queue[0], _Step):
            entries += job.messages
            size += job.size
            if jobs and (entries > _GROUP_ENTRIES or size > _GROUP_BYTES):
                break
            self._queue.popleft()
            jobs.append(job)
        return jobs

    async def _write(self, jobs: list[Job]) -> None:
        while jobs:
            await self._write_together(jobs)
            jobs = [job for job in jobs if not job.over]

    # ------------------------------------------------------------------------------------------------- one plan

    async def _write_together(self, jobs: list[Job]) -> None:
        """Write what goes together of these, and tell its verdicts."""
        tries = 0
        while True:
            try:
                plan = await draw(self._stream, self._heads, jobs, trusting=not tries)
                if plan.messages:
                    await self._connected(plan)
                    plan.settle(await self._send(plan), self._heads)
                    self._link.trust()
            except ApiError as error:
                tries += 1
                if self._stream.replicas > 1:
                    # One that still believes to lead may refuse what another takes: its answer proves nothing.
                    self._note_tried(jobs)
                self._link.doubt()
                if error.code not in CHANGED and error.code not in LATER:
                    if len(jobs) == 1:
                        raise refusal(error, self._link, f"append to {jobs[0].stream}") from None
                    tries = 3
                with suppress(Unreachable):
                    await self._again(jobs, error.code in CHANGED)
            except (Lost, TimeoutError) as error:
                tries += 1
                if isinstance(error, TimeoutError):
                    self._link.doubt()
                self._note_tried(jobs)
                await self._again(jobs, False)
            except Unreachable:
                tries += 1
                await self._again(jobs, False)
            except NotPermitted:
                # One subject is; which, is found by asking for each alone.
                if len(jobs) == 1:
                    raise
                tries = 3
                self._note_tried(jobs)
                await self._again(jobs, False)
            else:
                plan.tell()
                return
            jobs = self._overdue(jobs)
            if not jobs:
                return
            if tries > 2 and len(jobs) > 1:
                for job in jobs:
                    await self._alone(job)
                return

    def _note_tried(self, jobs: list[Job]) -> None:
        """They went out, and may stand behind what was known before."""
        for job in jobs:
            if job.tried is None:
                known = self._heads.head(job.subject)
                job.tried = 0 if known is None else known.position

    async def _alone(self, job: Job) -> None:
        try:
            await self._write_together([job])
        except Exception as error:
            _fail([job], error)

    async def _again(self, jobs: list[Job], changed: bool) -> None:
        self._heads.forget({subject for job in jobs for subject in job.subjects})
        if self._stream.broken is not None:
            raise self._stream.broken
        if changed:
            # By another, it is to be hoped, and not because all of it is gone.
            await self._stream.state()
        if not changed or len(jobs) == 1:
            await self._link.clock.sleep(_PAUSE * (0.5 + self._link.clock.random()))

    async def _connected(self, plan: Plan) -> None:
        if self._link.is_away:
            until = min(job.until for job in plan.jobs)
            await self._link.connected(max(0.0, until - asyncio.get_running_loop().time()))

    def _overdue(self, jobs: list[Job]) -> list[Job]:
        """Those that have time left; the others are told."""
        now, left = asyncio.get_running_loop().time(), []
        for job in jobs:
            if now < job.until:
                left.append(job)
            elif job.tried is None:
                _fail([job], Unreachable(f"{self._link} is away: nothing was written to {job.stream}; try again"))
            else:
                _fail([job], OutcomeUnknown(job.entries[0].id, f"append to {job.stream} when {self._link} went away"))
        return left

    async def _send(self, plan: Plan) -> int:
        """The position of the last message, when all of them stand. Raises `ApiError`, `Lost` or `TimeoutError`."""
        if (
            len(plan.messages) > 1
            and plan.single
            and self._stream.replicas == 1
            and self._pace.chains(len(plan.messages))
        ):
            return await self._send_chain(plan)
        began = asyncio.get_running_loop().time()
        last = await self._send_whole(plan)
        self._pace.batch(len(plan.messages), asyncio.get_running_loop().time() - began)
        return last

    async def _send_chain(self, plan: Plan) -> int:
        """One message after the other, without waiting: each is taken only right behind the one before it."""
        link, count, before = self._link, len(plan.messages), self._stream.head
        began = asyncio.get_running_loop().time()
        name = b""
        for subject, lines, payload in plan.messages[:-1]:
            name, head = self._link_in_chain(name, lines)
            link.publish(subject, payload, head)
        subject, lines, payload = plan.messages[-1]
        future = link.call(
            subject, payload, self._link_in_chain(name, lines)[1], [each[0] for each in plan.messages[:-1]]
        )
        await link.client.kick()
        async with asyncio.timeout(link.turn):
            reply = await future
        try:
            last = await self._position(reply, count, before)
        except ApiError as error:
            # Only the last is answered: it stands if all do, else a beginning of them may.
            self._pace.broke()
            raise Lost(f"a chain to {self._stream.name} broke ({error})") from None
        self._pace.chain(count, asyncio.get_running_loop().time() - began)
        return last

    def _link_in_chain(self, before: bytes, lines: bytes) -> tuple[bytes, bytes]:
        """The name of the next message of a chain, and its header block."""
        self._batches += 1
        name = b"%b-%d" % (self._batch, self._batches)
        behind = b"Nats-Expected-Last-Msg-Id: %b\r\n" % before if before else b""
        return name, b"NATS/1.0\r\nNats-Msg-Id: %b\r\n%b%b\r\n" % (name, behind, lines)

    async def _send_whole(self, plan: Plan) -> int:
        link, count, before = self._link, len(plan.messages), self._stream.head
        head = b"NATS/1.0\r\n"
        if count > 1:
            self._batches += 1
            head += b"Nats-Batch-Id: %b-%d\r\n" % (self._batch, self._batches)
        for number, (subject, lines, payload) in enumerate(plan.messages[:-1], 1):
            link.publish(subject, payload, b"%bNats-Batch-Sequence: %d\r\n%b\r\n" % (head, number, lines))
        subject, lines, payload = plan.messages[-1]
        if count > 1:
            head += b"Nats-Batch-Sequence: %d\r\nNats-Batch-Commit: 1\r\n" % count
        also = [each[0] for each in plan.messages[:-1]]
        future = link.call(subject, payload, b"%b%b\r\n" % (head, lines), also)
        await link.client.kick()
        async with asyncio.timeout(link.turn):
            reply = await future
        return await self._position(reply, count, before)

    async def _position(self, reply: Reply, count: int, before: int) -> int:
        if not reply.data:
            # Nobody took it: the stream is gone, or its server is.
            await self._stream.state()
            self._link.doubt()
            if self._stream.replicas > 1:
                raise Lost(f"stream {self._stream.name} on {self._link} changes its leader")
            raise Unreachable(f"stream {self._stream.name} on {self._link} takes nothing now: it is tried again")
        last = told(reply, _Ack).seq
        if last - count < before:
            raise self._stream.stop("was deleted and made anew")
        self._stream.head = max(self._stream.head, last)
        return last


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        job.over = True
        if not job.future.done():
            job.future.set_exception(error)
