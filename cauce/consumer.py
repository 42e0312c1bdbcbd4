"""Delivery: each entry to each consumer that wants it, in order per thing, at least once, until it is handled.

An entry whose handler fails is set aside with the later ones of its thing, and tried again with growing, jittered
delay; all other things go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from cauce.accept import SLOTS, slot_of
from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import Damaged, Unavailable
from cauce.log import Filter, Log
from cauce.store import Store, Waiting

__all__ = ["Consumer", "Tail"]

_log = logging.getLogger("cauce")
_PAGE = 500
_LANE = 500
_MOST_WAITING = 10_000
_RETRIES_AT_ONCE = 16
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 60.0
_DOUBLINGS = 10

Handle = Callable[[Entry], Awaitable[None]]
Slot = tuple[str, int]


class _Lane:
    """What waits to be handled of one slot, one after the other."""

    __slots__ = ("queue", "room", "task")

    def __init__(self) -> None:
        self.queue: deque[Entry] = deque()
        self.room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Consumer:
    """A named reader of a log: one handler, its places, and what waits for it.

    Parameters:
        wants: the types it handles, by domain; none means all.
        begin: where it begins in slots it has no place in.
        bodies: whether it needs more than envelopes.
    """

    def __init__(
        self,
        name: str,
        wants: dict[str, frozenset[str]],
        handle: Handle,
        log: Log,
        store: Store,
        clock: Clock,
        *,
        begin: int,
        head: int,
        bodies: bool = True,
    ) -> None:
        self.name, self.wants, self.bodies = name, wants, bodies
        self._handle, self._log, self._store, self._clock = handle, log, store, clock
        self._begin = begin
        self._places = store.places(name, log.id, head)
        self._lanes: dict[Slot, _Lane] = {}
        self._looked = 0
        self._waiting: dict[str, deque[Waiting]] = {}
        self._many = 0
        self._retries: dict[str, asyncio.Task[None]] = {}
        self._in_hand: set[str] = set()
        self._draining = False
        self._slots = asyncio.Semaphore(_RETRIES_AT_ONCE)
        self._moved = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for domain in wants.keys() - {domain for domain, _ in self._places}:
            # Written down at once: what "now" meant must not change with a restart.
            for slot in range(SLOTS):
                self._place((domain, slot), begin)

    @property
    def after(self) -> int:
        """The position after which it has something to read."""
        places = [self._places.get((domain, slot), self._begin) for domain in self.wants for slot in range(SLOTS)]
        return min(places, default=self._begin)

    def start(self) -> None:
        """Take up again what waited at the last stop."""
        for waiting in self._store.waiting(self.name):
            self._set_aside(waiting)

    async def take(self, entry: Entry) -> None:
        """Queue an entry for its slot; waits while too much is queued there."""
        slot = (entry.domain, slot_of(entry.key))
        if entry.position <= self._places.get(slot, self._begin):
            return
        lane = self._lanes.get(slot)
        if lane is None:
            lane = self._lanes[slot] = _Lane()
        while len(lane.queue) >= _LANE:
            lane.room.clear()
            await lane.room.wait()
        while self._many >= _MOST_WAITING:
            self._moved.clear()
            await self._moved.wait()
        lane.queue.append(entry)
        if lane.task is None:
            lane.task = asyncio.get_running_loop().create_task(self._run(slot, lane))

    def looked(self, position: int) -> None:
        """All that it wants up to a position was given to it."""
        self._looked = max(self._looked, position)
        self._moved.set()

    def passed(self, head: int) -> bool:
        """Whether all up to a position is handled."""
        return (
            self._looked >= head
            and all(not lane.queue or lane.queue[0].position > head for lane in self._lanes.values())
            and all(queue[0].position > head for queue in self._waiting.values())
        )

    async def settled(self) -> None:
        """Wait until it has passed the head as it is now. Raises what stopped it."""
        head = await self._log.head()
        wanted = filter_of([self])
        while not self.passed(head):
            if self.failed.done():
                await self.failed
            self._moved.clear()
            # Its tail waits for what is wanted, and does not tell soon how far it saw nothing of that.
            page = await self._log.read(wanted, after=self._looked, limit=1, bodies=False)
            if not page.entries:
                self._looked = max(self._looked, page.looked)
            if not self.passed(head) and (page.entries or self._looked >= head):
                await self._moved.wait()

    async def drain(self) -> None:
        """Finish what is being handled now, and start no more."""
        self._draining = True
        for stream, task in self._retries.items():
            if stream not in self._in_hand:
                task.cancel()
        running = [lane.task for lane in self._lanes.values() if lane.task is not None]
        await asyncio.gather(*running, *self._retries.values(), return_exceptions=True)

    def stop(self) -> None:
        """Stop at once; what is not finished is handled again after the next start."""
        for task in (*(lane.task for lane in self._lanes.values()), *self._retries.values()):
            if task is not None:
                task.cancel()

    async def _run(self, slot: Slot, lane: _Lane) -> None:
        try:
            while lane.queue and not self._draining:
                entry = lane.queue[0]
                ahead = self._waiting.get(entry.stream)
                if ahead is None:
                    await self._try(entry)
                elif ahead[-1].position < entry.position:
                    self._set_aside(
                        Waiting(entry.position, entry.stream, 0, 0, "waits behind an earlier one"), store=True
                    )
                self._place(slot, entry.position)
                lane.queue.popleft()
                lane.room.set()
        except Exception as error:
            self._stops(error)
        finally:
            lane.task = None
            self._moved.set()

    async def _try(self, entry: Entry) -> None:
        error = await self._handled(entry)
        if error is not None:
            waiting = Waiting(entry.position, entry.stream, 0, 0, "")
            self._failed(waiting, error, 0)
            self._set_aside(waiting, store=True)

    async def _handled(self, entry: Entry) -> Exception | None:
        """What the handler raised, if trying again may help. Raises `Damaged`, and what stops this task."""
        try:
            await self._handle(entry)
        except Damaged:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody stops this task: something that the handler waited for was cancelled.
            return RuntimeError(f"what it waited for was cancelled: {error!r}")
        except Exception as error:
            return error
        return None

    def _stops(self, error: BaseException) -> None:
        _log.critical("%s stops: %s", self.name, error)
        if not self.failed.done():
            self.failed.set_exception(error)
        self._moved.set()

    def _failed(self, waiting: Waiting, error: Exception, tries: int) -> None:
        """Count and delay. What is not the message's fault is delayed only."""
        if not isinstance(error, Unavailable):
            waiting.attempts += 1
        doublings = min(_DOUBLINGS, max(waiting.attempts - 1, tries))
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**doublings) * (0.5 + self._clock.random())
        waiting.due = self._clock.now() + round(delay * 1_000_000)
        waiting.error = f"{type(error).__name__}: {error}"
        _log.warning(
            "%s: position %d (%s) failed %d times and waits %.1f s: %s", self.name, waiting.position, waiting.stream, waiting.attempts, delay, waiting.error,
            exc_info=None if isinstance(error, Unavailable) else error,
        )  # fmt: skip

    def _set_aside(self, waiting: Waiting, *, store: bool = False) -> None:
        if store:
            self._store.park(self.name, waiting)
        self._waiting.setdefault(waiting.stream, deque()).append(waiting)
        self._many += 1
        if waiting.stream not in self._retries:
            self._retries[waiting.stream] = asyncio.get_running_loop().create_task(self._retry(waiting.stream))

    async def _retry(self, stream: str) -> None:
        queue = self._waiting[stream]
        tries = 0
        while queue and not self._draining:
            waiting = queue[0]
            # The wall clock may have been set back since.
            left = (waiting.due - self._clock.now()) / 1_000_000
            await self._clock.sleep(min(max(0.0, left), 2 * _LONGEST_DELAY))
            try:
                async with self._slots:
                    error = await self._again(waiting)
            except Exception as stop:
                self._stops(stop)
                return
            if error is not None:
                tries += 1
                self._failed(waiting, error, tries)
                self._store.park(self.name, waiting)
                continue
            tries = 0
            queue.popleft()
            self._many -= 1
            self._store.unpark(self.name, waiting.position)
            self._moved.set()
        del self._waiting[stream], self._retries[stream]
        self._moved.set()

    async def _again(self, waiting: Waiting) -> Exception | None:
        self._in_hand.add(waiting.stream)
        try:
            page = await self._log.read(Filter(waiting.stream), after=waiting.position - 1, limit=1)
            if not page.entries or page.entries[0].position != waiting.position:
                raise Damaged(
                    f"position {waiting.position} ({waiting.stream}) is not in the log any more: run cauce verify"
                )
            return await self._handled(page.entries[0])
        except Unavailable as error:
            return error
        finally:
            self._in_hand.discard(waiting.stream)

    def _place(self, slot: Slot, position: int) -> None:
        self._places[slot] = position
        self._store.move(self.name, *slot, self._log.id, position)


def filter_of(consumers: Sequence[Consumer]) -> Filter:
    """What these want, and perhaps more."""
    wants = [each for consumer in consumers for each in consumer.wants.items()]
    types = frozenset[str]().union(*(types for _, types in wants)) if all(types for _, types in wants) else frozenset()
    return Filter(domains=frozenset(domain for domain, _ in wants), types=types)


class Tail:
    """Reads one log once for all its consumers in this process."""

    def __init__(self, log: Log, consumers: Sequence[Consumer], clock: Clock) -> None:
        self._log, self._consumers, self._clock = log, consumers, clock

    async def run(self) -> None:
        """Read and hand out, for ever."""
        consumers = self._consumers
        table: dict[tuple[str, str], list[Consumer]] = {}
        for consumer in consumers:
            for domain, types in consumer.wants.items():
                for type in types or {""}:
                    table.setdefault((domain, type), []).append(consumer)
        wanted = filter_of(consumers)
        bodies = any(consumer.bodies for consumer in consumers)
        looked = min(consumer.after for consumer in consumers)
        for consumer in consumers:
            consumer.start()
            consumer.looked(looked)
        while True:
            try:
                page = await self._log.read(wanted, after=looked, limit=_PAGE, wait=5.0, bodies=bodies)
            except Unavailable as error:
                _log.warning("reading waits: %s", error)
                await self._clock.sleep(1.0)
                continue
            for entry in page.entries:
                for consumer in (*table.get((entry.domain, entry.type), ()), *table.get((entry.domain, ""), ())):
                    await consumer.take(entry)
            looked = page.looked
            for consumer in consumers:
                consumer.looked(looked)
