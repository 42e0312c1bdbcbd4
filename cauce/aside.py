"""What a consumer has set aside: messages that failed, and the later ones of their things, which wait behind in order.

The first of each thing is tried again with growing, jittered delay, one thing beside the other. What has failed too
often is a dead letter: a person decides, and until then its thing waits, and no other.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection

from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import Damaged, Overran, Refused, Unavailable
from cauce.letter import letter_of, mended, mending_of
from cauce.log import Filter, Log
from cauce.retry import Retries, longest, retry_for, usual
from cauce.store import Share, Store, Unit, Waiting
from cauce.task import given_up

__all__ = ["DIED", "Aside", "Handle", "entry_of", "handled"]

_log = logging.getLogger("cauce")

_RETRIES_AT_ONCE = 4
_MOMENT = 0.05
_CAUTION = 10.0
"""Seconds for which a message that may have killed the process keeps others of its kind from beginning."""

_CALM = 1.0
"""Seconds that a process must have lived, for each before it that died, until it tries what that had in hand."""

DIED = "the process died, or stood still, while this was handled"

_DEATHS = 3
"""How many processes in a row, dead or struck off, a message may be in the hands of before it is a dead letter."""

Handle = Callable[[Entry, Unit], Awaitable[None]]


async def handled(handle: Handle, entry: Entry, unit: Unit) -> Exception | None:
    """What the handler raised, if trying again may help. Raises `Damaged`, and what stops this task."""
    failed: Exception | None = None
    try:
        await handle(entry, unit)
    except Damaged:
        raise
    except asyncio.CancelledError as error:
        # If nobody stops this task, something that the handler waited for was cancelled.
        failed = RuntimeError(f"what it waited for was cancelled: {error!r}")
    except Exception as error:
        failed = error
    if given_up():
        # Whatever the handler made of that: its slot may be another's by now, who handles this again.
        raise asyncio.CancelledError
    return failed


async def entry_of(log: Log, consumer: str, waiting: Waiting) -> Entry:
    """What waits, from its log, with the body that a person gave it if one did. Raises `Damaged` if it is not there."""
    page = await log.read(Filter(waiting.stream), after=waiting.position - 1, limit=1)
    if not page.entries or page.entries[0].position != waiting.position:
        raise Damaged(
            f"position {waiting.position} ({waiting.stream}), which waits for {consumer}, is not in the log any more: run cauce "
            "verify, and if an older log was put back, cauce reset"
        )
    entry = page.entries[0]
    if type(entry) is not Entry or mending_of(waiting.raw) is None:
        # What is given in the place of another is not what was mended.
        return entry
    # Damage must be found before a new digest hides it.
    return mended(entry.checked(), waiting.raw)


class Aside:
    """The messages of one consumer that wait, by thing, and the tasks that try them again.

    Parameters:
        read: what waits.
        retry: when a message is tried again, and how often before it is a dead letter.
        may_begin: whether the instance is sure enough of its slots to begin something new.
        caution: held while what may have killed the process is tried.
        share: by which a slot is held.
        leaving: slots in which nothing more is begun.
        moved: set when something of this changes.
        stops: told what ends the consumer.
    """

    def __init__(
        self,
        name: str,
        handle: Handle,
        read: Callable[[Waiting], Awaitable[Entry]],
        store: Store,
        clock: Clock,
        retry: Retries,
        may_begin: Callable[[], bool],
        caution: asyncio.Lock,
        share: Callable[[int], Share | None],
        leaving: Collection[int],
        moved: asyncio.Event,
        stops: Callable[[BaseException], None],
    ) -> None:
        self._name, self._handle, self._read, self._store, self._clock = name, handle, read, store, clock
        self._retry, self._may_begin, self._caution = retry, may_begin, caution
        self._usual, self._longest = usual(retry), longest(retry)
        self._share, self._leaving, self._moved, self._stops = share, leaving, moved, stops
        self._waiting: dict[str, deque[Waiting]] = {}
        self._many: Counter[int] = Counter()
        self._retries: dict[str, asyncio.Task[None]] = {}
        self._in_hand: set[asyncio.Task[None] | None] = set()
        self._newer: set[str] = set()
        self._slots: dict[int, asyncio.Semaphore] = {}

    # ------------------------------------------------------------------------------------------ what waits

    def last(self, stream: str) -> Waiting | None:
        """The last message of a thing that waits."""
        queue = self._waiting.get(stream)
        return queue[-1] if queue else None

    def many(self, slot: int) -> int:
        """How many messages wait in a slot."""
        return self._many[slot]

    def passed(self, head: int) -> bool:
        """Whether all that waits up to a position waits for a person, and that is stored."""
        return all(
            (queue[0].dead and stream not in self._retries) or queue[0].position > head
            for stream, queue in self._waiting.items()
        )

    @property
    def tasks(self) -> Collection[asyncio.Task[None]]:
        """Those that try again."""
        return self._retries.values()

    def add(self, waiting: Waiting) -> None:
        """Set a message aside, behind those of its thing."""
        queue = self._waiting.setdefault(waiting.stream, deque())
        if queue and queue[-1].position >= waiting.position:
            return
        queue.append(waiting)
        self._newer.add(waiting.stream)
        self._many[waiting.slot] += 1
        self._begin_retries(queue[0])

    def leave(self, slots: Collection[int]) -> set[asyncio.Task[None]]:
        """Begin nothing more in these slots. Gives the tasks that have something in hand there."""
        tasks = {task for stream, task in self._retries.items() if self._waiting[stream][0].slot in slots}
        for task in tasks - self._in_hand:
            task.cancel()
        return tasks

    def drop(self, slots: Collection[int]) -> None:
        """Forget what waits in these slots: another instance has it."""
        for stream in [each for each, queue in self._waiting.items() if queue[0].slot in slots]:
            queue = self._waiting.pop(stream)
            self._many[queue[0].slot] -= len(queue)
            if (task := self._retries.pop(stream, None)) is not None:
                # Set aside by what was in hand at the end: it must not be tried without the slot.
                task.cancel()

    def abandon(self) -> None:
        """Forget all that waits: other instances have it. Who cancels the tasks is the caller."""
        self._waiting, self._retries = {}, {}
        self._many = Counter()
        self._in_hand, self._newer = set(), set()

    async def reload(self) -> None:
        """Look again at what waits for a person: one may have decided."""
        if not self._waiting:
            return
        # What is tried or set aside while the store is asked is newer than the answer.
        self._newer = set(self._retries)
        rows: dict[tuple[int, str], deque[Waiting]] = {}
        for waiting in await self._store.waiting(self._name):
            if waiting.mark:
                continue
            rows.setdefault((waiting.slot, waiting.stream), deque()).append(waiting)
        for stream, queue in list(self._waiting.items()):
            if stream in self._retries or stream in self._newer:
                continue
            slot = queue[0].slot
            now = rows.get((slot, stream), deque())
            self._many[slot] += len(now) - len(queue)
            if now:
                self._waiting[stream] = now
                self._begin_retries(now[0])
            else:
                del self._waiting[stream]
        self._moved.set()

    async def commit(self, unit: Unit) -> None:
        """Write a unit, however long that takes. Raises `BadStatement`, `Fenced`."""
        if unit.is_empty and unit.place is not None:
            self._store.move(unit.share, *unit.place)
            return
        while True:
            try:
                await self._store.commit(unit)
                if unit.committed is not None:
                    unit.committed()
                return
            except Unavailable as error:
                _log.warning("%s: its store takes nothing now, so it waits: %s", self._name, error)
                await self._clock.sleep(1.0)

    # ---------------------------------------------------------------------------------------------- trying again

    def failed(self, waiting: Waiting, error: Exception, entry: Entry | None, tries: int = 0) -> None:
        """Delay it, or give it up. What is not the message's fault is delayed only."""
        retry = retry_for(self._retry, error)
        delay = retry.delay(max(waiting.attempts, tries), self._clock.random())
        waiting.due = self._clock.now() + round(delay * 1_000_000)
        waiting.error = f"{type(error).__name__}: {error}"
        if retry.attempts and waiting.attempts >= retry.attempts and not isinstance(error, Unavailable):
            self.bury(waiting, "".join(traceback.format_exception(error)), entry)
            return
        _log.warning(
            "%s: position %d (%s) failed %d times and waits %.1f s: %s", self._name, waiting.position, waiting.stream, waiting.attempts, delay, waiting.error,
            exc_info=None if isinstance(error, (Unavailable, Overran)) else error,
        )  # fmt: skip

    def bury(self, waiting: Waiting, trace: str, entry: Entry | None) -> None:
        """Let a person decide. `due` of what is dead is when it died."""
        waiting.dead, waiting.due, waiting.trace = True, self._clock.now(), trace
        if entry is not None and not waiting.raw:
            waiting.raw = letter_of(entry)
        _log.error(
            "%s: position %d (%s) is a dead letter after %d attempts, later ones of %s wait behind it: %s; see cauce dead",
            self._name, waiting.position, waiting.stream, waiting.attempts, waiting.stream, waiting.error,
        )  # fmt: skip

    def _begin_retries(self, first: Waiting) -> None:
        if not first.dead and first.stream not in self._retries:
            self._newer.add(first.stream)
            self._retries[first.stream] = asyncio.get_running_loop().create_task(self._try_again(first.stream))

    async def _try_again(self, stream: str) -> None:
        queue, retries = self._waiting[stream], self._retries
        slot, tries = queue[0].slot, 0
        try:
            while queue and not queue[0].dead and slot not in self._leaving:
                waiting = queue[0]
                # The wall clock may have been set back since.
                left = (waiting.due - self._clock.now()) / 1_000_000
                await self._clock.sleep(min(max(0.0, left), 2 * self._longest))
                if waiting.due < 0:
                    # What dies of something else, again and again, must not use up the tries of what it had in hand.
                    await self._clock.sleep(_CALM * -waiting.due)
                    done = await self._carefully(waiting, tries)
                else:
                    async with self._slots.setdefault(slot, asyncio.Semaphore(_RETRIES_AT_ONCE)):
                        done = await self._again(waiting, tries)
                tries = 0 if done else tries + 1
                if done:
                    queue.popleft()
                    self._many[slot] -= 1
                    self._moved.set()
        except Exception as error:
            self._stops(error)
            return
        finally:
            # Who goes on though it was cancelled may end when another tries the same again.
            if retries.get(stream) is asyncio.current_task():
                del retries[stream]
            if not queue and self._waiting.get(stream) is queue:
                del self._waiting[stream]
            self._moved.set()

    async def _carefully(self, waiting: Waiting, tries: int) -> bool:
        """One by one, so that whatever kills the process is known; but not for ever."""
        try:
            async with asyncio.timeout(_CAUTION):
                await self._caution.acquire()
        except TimeoutError:
            return await self._again(waiting, tries)
        try:
            return await self._again(waiting, tries)
        finally:
            self._caution.release()

    async def _again(self, waiting: Waiting, tries: int) -> bool:
        """Try once more, counted before it is begun: if that kills the process, the next start knows.

        While it is in hand `due` is below 0: how many processes in a row had it in hand, with this one.
        """
        share = self._share(waiting.slot)
        deaths = max(0, -waiting.due)
        if self._usual.attempts and deaths >= min(_DEATHS, self._usual.attempts):
            waiting.error, waiting.attempts = f"{DIED}, {deaths} times", max(waiting.attempts, deaths)
            self.bury(waiting, "", await self._read_at_last(waiting))
            await self._park(share, waiting)
            return False
        while not self._may_begin():
            await self._clock.sleep(_MOMENT)
        self._in_hand.add(asyncio.current_task())
        try:
            waiting.attempts, waiting.due = waiting.attempts + 1, -1 - deaths
            await self._park(share, waiting)
            unit = Unit(share)
            unit.unparked = (self._name, waiting.position)
            entry, error = None, None
            try:
                entry = await self._read(waiting)
                error = await handled(self._handle, entry, unit)
                if error is None:
                    await self.commit(unit)
                    if (by := mending_of(waiting.raw)) is not None:
                        _log.info(
                            "%s: position %d (%s) was handled as %s mended it at %s",
                            self._name,
                            waiting.position,
                            waiting.stream,
                            by.by or "somebody",
                            by.time,
                        )
                    return True
            except (Unavailable, Refused) as failure:
                error = failure
            if isinstance(error, Unavailable):
                waiting.attempts -= 1
            self.failed(waiting, error, entry, tries + 1)
            await self._park(share, waiting)
            return False
        finally:
            self._in_hand.discard(asyncio.current_task())

    async def _read_at_last(self, waiting: Waiting) -> Entry:
        """What waits, however long its log is away."""
        while True:
            try:
                return await self._read(waiting)
            except Unavailable as error:
                _log.warning("%s: reading waits: %s", self._name, error)
                await self._clock.sleep(1.0)

    async def _park(self, share: Share | None, waiting: Waiting) -> None:
        unit = Unit(share)
        unit.parked = (self._name, waiting)
        await self.commit(unit)
