"""Several things of one slot at once: each in its order, and the place is still that of the first not handled.

What is handled ahead of the place is committed with a mark, which goes when the place has passed it: so who takes over
neither skips what was not handled nor stores anything twice. What fails, or must wait, is set aside when it is the
first of its slot, as where one is handled after the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection

from cauce.aside import DIED, Aside, Handle, handled
from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import Unavailable
from cauce.lane import Lane
from cauce.store import BadStatement, Store, Unit, Waiting, mark_of

__all__ = ["Abreast"]

_MOMENT = 0.05
_AT_ONCE = 200
"""Marks that are taken away with one unit."""


class Abreast:
    """What one consumer handles at once in this instance, in all its lanes.

    Parameters:
        most: how many messages.
        log: the id of the log that is read.
        may_begin: whether the instance is sure enough of its slots to begin something new.
        has_room: waits until one more may wait in a slot behind its thing; False: the slot was given up.
        leaving: slots in which nothing more is begun.
        moved: set when something of this changes.
        stops: told what ends the consumer.
    """

    def __init__(
        self,
        most: int,
        name: str,
        log: str,
        store: Store,
        clock: Clock,
        may_begin: Callable[[], bool],
        has_room: Callable[[Lane, Entry], Awaitable[bool]],
        leaving: Collection[int],
        moved: asyncio.Event,
        stops: Callable[[BaseException], None],
    ) -> None:
        self.most, self._name, self._log, self._store, self._clock = most, name, log, store, clock
        self._may_begin, self._has_room, self._leaving = may_begin, has_room, leaving
        self._moved, self._stops = moved, stops
        self._ready: deque[tuple[Lane, str]] = deque()
        self._many = 0
        self._turns = asyncio.Semaphore(most)
        self._handle: Handle
        self._aside: Aside

    def gate(self, handle: Handle) -> Handle:
        """The same handler, never more than so many times at once: also what is tried again counts."""

        async def gated(entry: Entry, unit: Unit) -> None:
            async with self._turns:
                await handle(entry, unit)

        self._handle = gated
        return gated

    def beside(self, aside: Aside) -> None:
        """Where what fails is set aside."""
        self._aside = aside

    def hand(self, lane: Lane, entry: Entry) -> None:
        """An entry was queued in its lane."""
        before = lane.things.get(entry.stream)
        if before is not None:
            before.append(entry)
            return
        lane.things[entry.stream] = deque((entry,))
        self._ready.append((lane, entry.stream))
        self._begin()

    def _begin(self) -> None:
        while self._many < self.most and self._ready:
            lane, stream = self._ready.popleft()
            if self._is_open(lane) and stream in lane.things:
                self._many += 1
                task = asyncio.get_running_loop().create_task(self._run(lane, lane.things[stream][0]))
                lane.tasks.add(task)

    def _is_open(self, lane: Lane) -> bool:
        return not lane.gone and lane.slot[1] not in self._leaving

    async def _run(self, lane: Lane, entry: Entry) -> None:
        try:
            try:
                while not self._may_begin():
                    if not self._is_open(lane):
                        return
                    await self._clock.sleep(_MOMENT)
                await self._one(lane, entry)
            finally:
                # A slot whose place cannot move on keeps no other waiting.
                self._many -= 1
                self._begin()
            if not lane.moves:
                await self._advance(lane)
        except Exception as error:
            self._stops(error)
        finally:
            task = asyncio.current_task()
            assert task is not None
            lane.tasks.discard(task)
            self._moved.set()

    async def _one(self, lane: Lane, entry: Entry) -> None:
        """Handle an entry, unless it must be the first for that."""
        if lane.marks.get(entry.position) == entry.id:
            self._finish(lane, entry, marked=True)
            return
        if lane.careful or self._aside.last(entry.stream) is not None:
            lane.held.add(entry.stream)
            return
        unit = Unit(lane.share)
        error = await handled(self._handle, entry, unit)
        if error is None:
            try:
                self._finish(lane, entry, marked=await self._commit(lane, entry, unit))
                return
            except BadStatement as bad:
                error = bad
        waiting = Waiting(entry.position, entry.stream, lane.slot[1], 0 if isinstance(error, Unavailable) else 1)
        self._aside.failed(waiting, error, entry)
        lane.failed[entry.position] = waiting

    async def _commit(self, lane: Lane, entry: Entry, unit: Unit) -> bool:
        """Write what was handled, with the place if that is here by now. Whether a mark was written instead."""
        if unit.is_empty:
            return False
        first = bool(lane.queue) and lane.queue[0] is entry
        if first:
            unit.place = (self._name, *lane.slot, self._log, entry.position)
        else:
            unit.parked = (self._name, mark_of(entry.position, entry.stream, lane.slot[1], entry.id))
        await self._aside.commit(unit)
        return not first

    def _finish(self, lane: Lane, entry: Entry, *, marked: bool) -> None:
        lane.done[entry.position] = marked
        self._next(lane, entry)

    def _next(self, lane: Lane, entry: Entry) -> None:
        """Let the next entry of a thing have its turn."""
        things = lane.things[entry.stream]
        things.popleft()
        if things:
            self._ready.append((lane, entry.stream))
        else:
            del lane.things[entry.stream]

    async def _advance(self, lane: Lane) -> None:
        """Move the place on over all that is handled, and set aside what has become the first."""
        lane.moves = True
        try:
            while lane.queue and not lane.gone:
                first = lane.queue[0]
                if first.position in lane.done:
                    await self._pass(lane)
                elif first.position in lane.failed or first.stream in lane.held:
                    if not await self._set_aside(lane, first):
                        break
                else:
                    break
                self._begin()
        finally:
            lane.moves = False
            self._begin()

    async def _pass(self, lane: Lane) -> None:
        marks, place = list[tuple[str, int]](), lane.place
        many = 0
        for entry in lane.queue:
            if entry.position not in lane.done or len(marks) >= _AT_ONCE:
                break
            place, many = entry.position, many + 1
            if lane.done[place]:
                marks.append((self._name, place))
        unit = Unit(lane.share)
        unit.place, unit.passed = (self._name, *lane.slot, self._log, place), marks
        await self._aside.commit(unit)
        for _ in range(many):
            self._pop(lane)

    async def _set_aside(self, lane: Lane, first: Entry) -> bool:
        """What to do with the first of a lane that was not handled. False: it has its turn to be handled now."""
        waiting, ahead = lane.failed.get(first.position), self._aside.last(first.stream)
        if waiting is None and not self._is_open(lane):
            return False
        if waiting is None and ahead is not None:
            if not await self._has_room(lane, first):
                return False
            if ahead.position < first.position:
                waiting = Waiting(first.position, first.stream, lane.slot[1], error="waits behind an earlier one")
        elif waiting is None and lane.careful:
            waiting = Waiting(first.position, first.stream, lane.slot[1], due=-1, error=DIED)
            lane.careful -= 1
        elif waiting is None:
            lane.held.discard(first.stream)
            self._ready.appendleft((lane, first.stream))
            return False
        unit = Unit(lane.share)
        unit.place = (self._name, *lane.slot, self._log, first.position)
        unit.parked = None if waiting is None else (self._name, waiting)
        await self._aside.commit(unit)
        lane.failed.pop(first.position, None)
        lane.held.discard(first.stream)
        self._next(lane, first)
        self._pop(lane)
        if waiting is not None:
            self._aside.add(waiting)
        if not lane.careful:
            # They look again whether they must wait.
            self._ready.extend((lane, stream) for stream in lane.held if self._aside.last(stream) is None)
            lane.held = {stream for stream in lane.held if self._aside.last(stream) is not None}
        return True

    def _pop(self, lane: Lane) -> None:
        position = lane.queue[0].position
        lane.place = lane.written = position
        lane.done.pop(position, None)
        lane.marks.pop(position, None)
        lane.pop()
