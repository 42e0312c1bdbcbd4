"""Group commit on a bucket: one batch takes the units that wait, each with its verdict, and the places with them.

One batch is under way at a time, so that units stand in the order in which they were given. The first message of each
share in it carries the share's fence. If the server refuses a batch, the fences are looked up: units of a share that
has another holder are `Fenced`, the others go again. If it does not say whether it wrote, the fences rise, then that is
looked up, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import msgspec

from cauce.backends.nats.bucket import MOST, Bucket, Put, Stale, Unsure
from cauce.backends.nats.fences import Fences, claim_of
from cauce.backends.nats.names import token
from cauce.backends.nats.timers import Timers, cancelled, puts_of
from cauce.errors import CauceError, Fenced, Overloaded, Refused
from cauce.store import BadStatement, Share, Unit, Waiting

__all__ = ["Place", "Units", "packed"]

T = TypeVar("T")

_log = logging.getLogger("cauce")
_MOST_WAITING = 20_000
_MOST_BYTES = 64 * 1024 * 1024
_BATCH_BYTES = 4 * 1024 * 1024

Spot = tuple[str, str, int]
"""A consumer, a domain and a slot."""


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a consumer stands, as it is stored."""

    log: str
    position: int


class _Job:
    """A unit that waits, or something that must have the bucket for itself."""

    __slots__ = ("alone", "future", "puts", "size", "unit")

    def __init__(self, unit: Unit | None, puts: list[Put], alone: Callable[[], Awaitable[Any]] | None = None) -> None:
        self.unit, self.puts, self.alone = unit, puts, alone
        self.size = sum(len(put.payload) + 200 for put in puts)
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def tell(self, error: BaseException | None, verdict: object = None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(verdict)
        else:
            self.future.set_exception(error)


class Units:
    """What waits to be written, and the one task that writes it. `moves` are places that no unit carries."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self.fences = bucket, Fences(bucket)
        self.timers = Timers(bucket, self.fences, self.alone)
        self.moves: dict[Spot, tuple[Share | None, str, int]] = {}
        self._queue: deque[_Job] = deque()
        self._bytes = 0
        self._bell = asyncio.Event()
        self._closing = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    # ------------------------------------------------------------------------------------------------- what comes

    def write(self, unit: Unit | None) -> asyncio.Future[None]:
        """Write a unit, or with none the places that wait. Raises `BadStatement`, `Overloaded`, `Refused` at once."""
        puts = [] if unit is None else _puts(unit, self._bucket.link.clock.id)
        if len(puts) >= MOST:
            # The handler's fault, which must not stop the service.
            raise BadStatement(
                f"one message says and changes {len(puts):,} things, a bucket of NATS takes {MOST - 1} at once: say fewer"
            )
        future = self._add(_Job(unit, puts))
        if unit is not None and unit.later:
            # Not before: who looks for what is due would find nothing there yet.
            future.add_done_callback(lambda _: self.timers.note(unit.later))
        return future

    def alone(self, work: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Do something in its turn, while nothing else is written."""
        return self._add(_Job(None, [], work))

    def _add(self, job: _Job) -> asyncio.Future[Any]:
        if self._closing or self._task.done():
            raise Refused(f"the store in {self._bucket.name} is closed")
        if len(self._queue) >= _MOST_WAITING or self._bytes > _MOST_BYTES:
            raise Overloaded(f"{len(self._queue):,} writes wait for {self._bucket.name}: slow down")
        self._queue.append(job)
        self._bytes += job.size
        self._bell.set()
        return job.future

    async def close(self) -> None:
        """Write what waits, then stop."""
        self._closing = True
        self._bell.set()
        await self._task

    # ------------------------------------------------------------------------------------------------- what goes

    async def _run(self) -> None:
        try:
            while True:
                while self._queue:
                    await self._turn()
                if self._closing:
                    return
                self._bell.clear()
                await self._bell.wait()
        finally:
            for job in self._queue:
                job.tell(Refused(f"the store in {self._bucket.name} is closed"))

    async def _turn(self) -> None:
        if (work := self._queue[0].alone) is not None:
            job = self._pop()
            try:
                job.tell(None, await work())
            except Exception as error:
                job.tell(error)
            return
        jobs, places = self._take()
        try:
            await self._write(jobs, places)
        except Exception as error:
            self._give_back(places, jobs)
            if len(jobs) > 1 and not isinstance(error, CauceError):
                _log.error("a batch for %s failed: %r", self._bucket.name, error)
            for job in jobs:
                job.tell(error)

    def _pop(self) -> _Job:
        job = self._queue.popleft()
        self._bytes -= job.size
        return job

    def _take(self) -> tuple[list[_Job], dict[Spot, tuple[Share | None, str, int]]]:
        """As many units as one batch takes, with their places; what room is left takes places that wait."""
        jobs: list[_Job] = []
        places: dict[Spot, tuple[Share | None, str, int]] = {}
        many = size = 0
        while self._queue and self._queue[0].alone is None:
            job = self._queue[0]
            if jobs and (many + len(job.puts) + 1 > MOST or size + job.size > _BATCH_BYTES):
                break
            jobs.append(self._pop())
            many, size = many + len(job.puts) + 1, size + job.size
            if job.unit is not None and job.unit.place is not None:
                consumer, domain, slot, log, position = job.unit.place
                # One that was noted before must not be written behind it.
                self.moves.pop((consumer, domain, slot), None)
                places[consumer, domain, slot] = job.unit.share, log, position
        while self.moves and many < MOST:
            spot, noted = self.moves.popitem()
            places[spot] = noted
            many += 1
        return jobs, places

    def _give_back(self, places: dict[Spot, tuple[Share | None, str, int]], jobs: Iterable[_Job]) -> None:
        """The places of units go with them; those that were noted alone still hold."""
        mine = {job.unit.place[:3] for job in jobs if job.unit is not None and job.unit.place is not None}
        for spot, noted in places.items():
            if spot not in mine:
                self.moves.setdefault(spot, noted)

    # ------------------------------------------------------------------------------------------------- one batch

    async def _write(self, jobs: list[_Job], places: dict[Spot, tuple[Share | None, str, int]]) -> None:
        sent: list[Put] = []
        while True:
            await self.fences.settle()
            if sent and await self._stands(sent):
                self._bucket.written += len(sent)
                break
            puts = self._fenced(jobs, places)
            if not puts:
                break
            try:
                await self._bucket.write(puts)
                break
            except Stale:
                if not await self._weed(jobs, places):
                    raise Unsure(f"{self._bucket.name} refused what should be right: it is tried again") from None
            except Unsure:
                sent = puts
                self.fences.doubt(_shares(jobs, places))
            except Refused:
                if len(jobs) < 2:
                    raise
                # One of them is too big, or not allowed: each gets its own verdict.
                await self._singly(jobs, places)
                return
        for job in jobs:
            job.tell(None)

    async def _singly(self, jobs: list[_Job], places: dict[Spot, tuple[Share | None, str, int]]) -> None:
        self._give_back(places, jobs)
        for job in jobs:
            place = job.unit.place if job.unit is not None else None
            own = {} if job.unit is None or place is None else {place[:3]: (job.unit.share, place[3], place[4])}
            try:
                await self._write([job], own)
            except CauceError as error:
                job.tell(error)

    async def _weed(self, jobs: list[_Job], places: dict[Spot, tuple[Share | None, str, int]]) -> bool:
        """Take out what belongs to shares that have another holder; False if all fences were right."""
        before = {share: self.fences.of(share) for share in _shares(jobs, places)}
        lost = {share for share in before if not await self.fences.holds(share)}
        for job in [job for job in jobs if job.unit is not None and job.unit.share in lost]:
            assert job.unit is not None
            assert job.unit.share is not None
            jobs.remove(job)
            job.tell(
                Fenced(
                    f"{job.unit.share.name} of {self._bucket.name} has another holder by now: "
                    "nothing of this message was stored"
                )
            )
        for spot in [spot for spot, (share, _, _) in places.items() if share in lost]:
            del places[spot]
        return bool(lost) or any(self.fences.of(share) != fence for share, fence in before.items())

    async def _stands(self, puts: list[Put]) -> bool:
        """Whether a batch without an answer was written: what was said has a subject of its own, once for all time.

        All else may be written again: it says the same, and the fence is checked again.
        """
        said = next((put for put in puts if put.name.startswith("outbox.")), None)
        return said is not None and await self._bucket.last(said.name) > 0

    def _fenced(self, jobs: list[_Job], places: dict[Spot, tuple[Share | None, str, int]]) -> list[Put]:
        """All messages of a batch. The server checks a fence once for all of a share: nothing comes between them."""
        checked: set[str] = set()
        puts: list[Put] = []

        def fence(share: Share | None) -> tuple[str, int] | None:
            if share is None or share.name in checked:
                return None
            checked.add(share.name)
            return claim_of(share.name), self.fences.of(share)

        for job in jobs:
            for put in job.puts:
                put.fence = fence(None if job.unit is None else job.unit.share)
                puts.append(put)
        for (consumer, domain, slot), (share, log, position) in places.items():
            name = f"place.{token(consumer)}.{domain}.{slot}"
            puts.append(Put(name, msgspec.json.encode(Place(log, position)), fence=fence(share)))
        return puts


def packed(waiting: Waiting) -> bytes:
    """A message that waits, as it is stored: a line of JSON, then the message as it came."""
    return msgspec.json.encode(msgspec.structs.replace(waiting, raw=b"")) + b"\n" + waiting.raw


def _puts(unit: Unit, fresh: Callable[[], str]) -> list[Put]:
    puts = []
    if unit.parked is not None:
        consumer, waiting = unit.parked
        puts.append(Put(f"waiting.{token(consumer)}.{waiting.position}", packed(waiting)))
    if unit.unparked is not None:
        consumer, position = unit.unparked
        puts.append(Put(f"waiting.{token(consumer)}.{position}", gone=True))
    puts += [Put(f"waiting.{token(consumer)}.{position}", gone=True) for consumer, position in unit.passed]
    puts += [Put(f"outbox.{slot}.{token(consumer)}.{fresh()}", said) for consumer, slot, said in unit.said]
    if unit.timer is not None:
        name, due = unit.timer
        puts.append(Put(f"timer.{token(name)}", b"%d" % due))
    puts += [cancelled(id) for id in unit.cancelled]
    for timer in unit.later:
        puts += puts_of(timer)
    return puts


def _shares(jobs: list[_Job], places: dict[Spot, tuple[Share | None, str, int]]) -> set[Share]:
    """All shares under whose fences something of this is written."""
    of_jobs = {job.unit.share for job in jobs if job.unit is not None}
    return {share for share in of_jobs | {share for share, _, _ in places.values()} if share is not None}
