"""Delivery: each entry to each consumer that wants it, in order per thing, at least once, until it is handled.

A consumer works on the slots that its instance holds, one lane for each, side by side. An entry whose handler fails is
set aside with the later ones of its thing, and tried again with growing, jittered delay; all other things go on. What
has failed too often is a dead letter: a person decides.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from cauce.abreast import Abreast
from cauce.accept import slot_of
from cauce.aside import DIED, Aside, Handle, entry_of, handled
from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import Fenced, Unavailable
from cauce.lane import Lane, Slot
from cauce.log import Log, filter_of
from cauce.portion import Load, Portion
from cauce.retry import USUAL, Retries
from cauce.store import BadStatement, Share, Store, Unit, Waiting, places_in
from cauce.task import ended, given_up

__all__ = ["Consumer", "Tail"]

_log = logging.getLogger("cauce")

_PAGE = 500
_LANE = 500
_BYTES = 16 * 1024 * 1024
"""What waits for a consumer weighs about so much at most; beyond that each lane has the one it works on."""

_MOST_WAITING = 10_000
_OFTEN = 10_000
_MOMENT = 0.05
_DEAF = 1.0
"""Seconds that a handler gets to end once it is cancelled."""


class Consumer:
    """A named reader of a log: one handler, its lanes, and what waits for it.

    Parameters:
        wants: the types it handles, by domain; none means all.
        now: whether it begins, in slots it has no place in, with what comes from now on, not with the first.
        bodies: whether it needs more than envelopes.
        retry: when a message is tried again, and how often before it is a dead letter.
        may_begin: whether the instance is sure enough of its slots to begin something new.
        concurrency: how many messages it handles at once; 0: one in each slot of each domain.
        caution: shared by all consumers of a service: held while what may have killed the process is tried.
        fenced: told when another instance has what this one still works on; without it, that stops the consumer.
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
        now: bool = False,
        bodies: bool = True,
        retry: Retries = USUAL,
        may_begin: Callable[[], bool] = lambda: True,
        concurrency: int = 0,
        caution: asyncio.Lock | None = None,
        fenced: Callable[[Fenced], None] | None = None,
    ) -> None:
        self.name, self.wants, self.bodies = name, wants, bodies
        self._leaving: set[int] = set()
        self._moved = asyncio.Event()
        self._abreast = None
        if concurrency:
            self._abreast = Abreast(
                concurrency, name, log.id, store, clock, may_begin, self._has_room, self._leaving, self._moved, self._stops
            )  # fmt: skip
            handle = self._abreast.gate(handle)
        self._handle, self._log, self._store, self._clock = handle, log, store, clock
        self._now, self._begin = now, 0
        self._may_begin, self._fenced = may_begin, fenced
        self._lanes: dict[Slot, Lane] = {}
        self._looked = 0
        self._tail: Tail | None = None
        self._load, self._portion = Load(), Portion(_LANE // 2)
        self._readers: set[asyncio.Task[None]] = set()
        self._aside = Aside(
            name, handle, functools.partial(entry_of, log, name), store, clock, retry, may_begin,
            caution or asyncio.Lock(), self._share, self._leaving, self._moved, self._stops,
        )  # fmt: skip
        if self._abreast is not None:
            self._abreast.beside(self._aside)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # ------------------------------------------------------------------------------------------ what it works on

    def begin_now(self, head: int) -> None:
        """Where "now" is, for who begins there."""
        if self._now:
            self._begin = head

    async def hold(self, tail: Tail, shares: Mapping[int, Share | None]) -> None:
        """Work on these slots from now on. Raises `Damaged` for places that are not of this log."""
        self._tail = tail
        self._looked = max(self._looked, tail.looked)
        self._leaving.difference_update(shares)
        places = await places_in(self._store, self.name, self._log)
        kept = [waiting for waiting in await self._store.waiting(self.name) if waiting.slot in shares]
        marks: dict[Slot, dict[int, str]] = {}
        for waiting in kept:
            if mark := waiting.mark:
                marks.setdefault((waiting.stream.partition("/")[0], waiting.slot), {})[waiting.position] = mark
        lanes = []
        careful = 1 if self._abreast is None else self._abreast.most
        for domain in self.wants:
            for slot, share in shares.items():
                place, here = places.get((domain, slot)), (domain, slot)
                begin = self._begin if place is None else place
                lane = Lane(here, share, begin, self._load, marks.get(here, {}), careful)
                await self._forget_marks(lane)
                self._lanes[here] = lane
                lanes.append(lane)
                if place is None:
                    # Written down at once: what "now" meant must not change with a restart.
                    self._store.move(share, self.name, domain, slot, self._log.id, lane.place)
        for waiting in kept:
            if not waiting.mark:
                share = shares[waiting.slot]
                if waiting.due < 0 and share is not None and share.clean:
                    # The last one who had it in hand ended, or gave it away, in good order: it has not killed that one.
                    waiting.due += 1
                self._aside.add(waiting)
        self._catch_up(lanes)

    async def _forget_marks(self, lane: Lane) -> None:
        """Those that the place has passed without meeting them, such as of what is not wanted any more."""
        passed = [position for position in lane.marks if position <= lane.place]
        if passed:
            unit = Unit(lane.share)
            unit.passed = [(self.name, position) for position in passed]
            await self._aside.commit(unit)
            for position in passed:
                del lane.marks[position]

    def begin_no_more(self, slots: Iterable[int]) -> None:
        """Finish what is in hand in these slots, and begin nothing more there."""
        self._leaving.update(slots)
        self._moved.set()

    async def drop(self, slots: Iterable[int], within: float) -> None:
        """Finish what is in hand in these slots, begin nothing more there, and note the places.

        Parameters:
            within: seconds that handlers get; what takes longer is cancelled, and handled again. One that ignores that
                is left alone: nothing of it is stored any more.
        """
        gone = set(slots)
        self.begin_no_more(gone)
        lanes = [lane for lane in self._lanes.values() if lane.slot[1] in gone]
        for lane in lanes:
            lane.handed = self._handed(lane)
            lane.joined = False
            lane.group.discard(lane)
            lane.room.set()
        working = {lane.task for lane in lanes if lane.task is not None} | self._aside.leave(gone)
        working.update(*(lane.tasks for lane in lanes))
        if working:
            _, late = await asyncio.wait(working, timeout=within)
            if late:
                _log.warning("%s: %d handlers did not finish within %g s", self.name, len(late), within)
                if deaf := await ended(late, _DEAF):
                    _log.error(
                        "%s: %d handlers go on though they were cancelled: nothing of it is stored",
                        self.name,
                        len(deaf),
                    )
        for lane in lanes:
            if lane.gone:
                continue  # Ended meanwhile by another, who emptied it: that nothing waits says nothing of the place.
            self._note(lane, lane.place if lane.queue else lane.handed)
            self._lanes.pop(lane.slot, None)
            lane.close()
        self._aside.drop(gone)
        self._moved.set()

    def stop(self) -> None:
        """Stop at once; what is not finished is handled again after the next start."""
        for task in self._at_work():
            task.cancel()

    async def abandon(self, within: float) -> None:
        """Forget all that is in hand, because others have it: nothing more is begun, and no place is noted.

        Parameters:
            within: seconds that handlers get to end when they are cancelled; what still runs then can store nothing.
        """
        working, lanes = self._at_work(), list(self._lanes.values())
        self._lanes, self._readers = {}, set()
        self._aside.abandon()
        for lane in lanes:
            lane.gone = True
        if late := await ended(working, within):
            _log.warning("%s: %d handlers did not end when they were cancelled", self.name, len(late))
        for lane in lanes:
            lane.close()
        self._moved.set()

    def _at_work(self) -> set[asyncio.Task[None]]:
        tasks = {task for lane in self._lanes.values() for task in (lane.task, *lane.tasks) if task is not None}
        return tasks.union(self._readers, self._aside.tasks)

    async def reload(self) -> None:
        """Look again at what waits for a person: one may have decided."""
        await self._aside.reload()

    @property
    def held(self) -> int:
        """How many messages are in hand, or wait in memory for their turn; without those that are set aside."""
        return sum(len(lane.queue) for lane in self._lanes.values())

    # ---------------------------------------------------------------------------------------------- what comes in

    def offer(self, entry: Entry, slot: Slot) -> None:
        """The tail met an entry: it is queued, unless its lane reads alone, or must from now on."""
        lane = self._lanes.get(slot)
        if lane is None or not lane.joined or entry.position <= lane.handed:
            return
        if self._is_full(lane, _LANE):
            # Whoever is slow must not keep the others waiting.
            lane.joined, lane.handed = False, entry.position - 1
            self._catch_up([lane])
            return
        self._hand(lane, entry)

    def looked(self, position: int) -> None:
        """All that it wants up to a position was offered to it."""
        if position > self._looked:
            self._looked = position
            for lane in self._lanes.values():
                if lane.joined and not lane.queue and position - lane.written >= _OFTEN:
                    self._note(lane, self._handed(lane))
        self._moved.set()

    def _hand(self, lane: Lane, entry: Entry) -> None:
        lane.add(entry)
        if self._abreast is not None:
            self._abreast.hand(lane, entry)
        elif lane.task is None:
            lane.task = asyncio.get_running_loop().create_task(self._run(lane))

    def _is_full(self, lane: Lane, many: int) -> bool:
        return len(lane.queue) >= many or (self._load.bytes >= _BYTES and bool(lane.queue))

    def _handed(self, lane: Lane) -> int:
        return max(lane.handed, self._looked) if lane.joined else lane.handed

    def _catch_up(self, lanes: Sequence[Lane]) -> None:
        """Let these lanes read for themselves until they are where the tail is. Who is far behind hinders nobody."""
        assert self._tail is not None
        near = self._tail.looked - _OFTEN
        self._read_apart({each for each in lanes if each.handed >= near})
        self._read_apart({each for each in lanes if each.handed < near})

    def _read_apart(self, group: set[Lane]) -> None:
        if group and self._tail is not None:
            for lane in group:
                lane.group = group
            task = asyncio.get_running_loop().create_task(self._read(group, self._tail))
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

    async def _read(self, group: set[Lane], tail: Tail) -> None:
        """Read for a group, which lanes may leave meanwhile: the full ones to read alone, others with their slot."""
        wanted = filter_of([self.wants])
        try:
            while group:
                await self._part(group)
                if not group:
                    return
                after = min(lane.handed for lane in group)
                filter = msgspec.structs.replace(wanted, slots=frozenset(lane.slot[1] for lane in group))
                try:
                    page = await self._log.read(filter, after=after, limit=self._portion.limit, bodies=self.bodies)
                except Unavailable as error:
                    _log.warning("%s: reading waits: %s", self.name, error)
                    await self._clock.sleep(1.0)
                    continue
                self._portion.met(page.entries)
                for entry in page.entries:
                    lane = self._lanes.get((entry.domain, slot_of(entry.key)))
                    if lane in group and entry.position > lane.handed and self.has(entry.domain, entry.type):
                        self._hand(lane, entry)
                for lane in group:
                    lane.handed = max(lane.handed, page.looked)
                if page.looked >= tail.looked:
                    for lane in group:
                        lane.joined = True
                    self._looked = max(self._looked, tail.looked)
                    self._moved.set()
                    return
                # A long log gives others their turn between two pages.
                await self._clock.sleep(0)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._stops(error)

    async def _part(self, group: set[Lane]) -> None:
        """Let the full lanes go their own way; one that is alone waits until there is room."""
        for lane in [each for each in group if self._is_full(each, _LANE // 2)]:
            if len(group) > 1:
                group.discard(lane)
                self._read_apart({lane})
            else:
                while lane in group and self._is_full(lane, _LANE // 2):
                    lane.room.clear()
                    await lane.room.wait()

    def has(self, domain: str, type: str) -> bool:
        """Whether it wants entries of a type."""
        types = self.wants.get(domain)
        return types is not None and (not types or type in types)

    # -------------------------------------------------------------------------------------------------- settled

    def passed(self, head: int) -> bool:
        """Whether all up to a position is handled, or waits for a person."""
        return all(
            self._handed(lane) >= head and (not lane.queue or lane.queue[0].position > head)
            for lane in self._lanes.values()
        ) and self._aside.passed(head)

    async def settled(self) -> None:
        """Wait until it has passed the head as it is now. Raises what stopped it."""
        head = await self._log.head()
        wanted = filter_of([self.wants])
        while not self.passed(head):
            if self.failed.done():
                await self.failed
            self._moved.clear()
            # Its tail waits for what is wanted, and does not tell soon how far it saw nothing of that.
            looked = self._looked
            page = await self._log.read(wanted, after=looked, limit=1, bodies=False)
            if not page.entries and looked == self._looked:
                self._looked = max(self._looked, page.looked)
            if not self.passed(head) and (page.entries or self._looked >= head):
                await self._moved.wait()

    # ------------------------------------------------------------------------------------------------- one lane

    async def _run(self, lane: Lane) -> None:
        try:
            while lane.queue and lane.slot[1] not in self._leaving:
                if not await self._one(lane, lane.queue[0]):
                    break
                lane.pop()
        except Exception as error:
            self._stops(error)
        finally:
            lane.task = None
            self._moved.set()

    async def _one(self, lane: Lane, entry: Entry) -> bool:
        """Handle an entry, or set it aside. False: its slot was given up before it began."""
        domain, slot = lane.slot
        while not self._may_begin():
            if slot in self._leaving:
                return False
            await self._clock.sleep(_MOMENT)
        if self._aside.many(slot) >= _MOST_WAITING and not await self._has_room(lane, entry):
            return False
        ahead, waiting = self._aside.last(entry.stream), None
        unit = Unit(lane.share)
        if lane.marks and lane.marks.pop(entry.position, "") == entry.id:
            # Several were handled at once before.
            unit.passed = [(self.name, entry.position)]
        elif ahead is not None:
            if ahead.position < entry.position:
                waiting = Waiting(entry.position, entry.stream, slot, error="waits behind an earlier one")
        elif lane.careful:
            waiting = Waiting(entry.position, entry.stream, slot, due=-1, error=DIED)
            lane.careful = 0
        else:
            error = await handled(self._handle, entry, unit)
            if error is not None:
                waiting = self._wrong(entry, unit, slot, error)
            elif unit.is_empty:
                # What most reactions leave behind: a place, and nothing to wait for.
                self._store.move(lane.share, self.name, domain, slot, self._log.id, entry.position)
                lane.place = lane.written = entry.position
                return True
        while True:
            unit.place = (self.name, domain, slot, self._log.id, entry.position)
            unit.parked = None if waiting is None else (self.name, waiting)
            try:
                await self._aside.commit(unit)
                break
            except BadStatement as error:
                waiting, unit = Waiting(entry.position, entry.stream, slot, 1), Unit(lane.share)
                self._aside.failed(waiting, error, entry)
        lane.place = lane.written = entry.position
        if waiting is not None:
            self._aside.add(waiting)
        return True

    async def _has_room(self, lane: Lane, entry: Entry) -> bool:
        """Wait while too much waits in its slot to set this aside, too. False: the slot was given up meanwhile."""
        slot = lane.slot[1]
        while self._aside.many(slot) >= _MOST_WAITING and self._aside.last(entry.stream) is not None:
            if slot in self._leaving:
                return False
            if not lane.full:
                lane.full = True
                _log.error(
                    "%s: %d messages wait in slot %d, so it handles no more there: see cauce dead, and %s",
                    self.name, self._aside.many(slot), slot, entry.stream,
                )  # fmt: skip
            self._moved.clear()
            await self._moved.wait()
        lane.full = False
        return True

    def _wrong(self, entry: Entry, unit: Unit, slot: int, error: Exception) -> Waiting:
        unit.statements.clear()
        unit.said.clear()
        waiting = Waiting(entry.position, entry.stream, slot, 0 if isinstance(error, Unavailable) else 1)
        self._aside.failed(waiting, error, entry)
        return waiting

    def _share(self, slot: int) -> Share | None:
        return next((lane.share for lane in self._lanes.values() if lane.slot[1] == slot), None)

    def _note(self, lane: Lane, position: int) -> None:
        if position > lane.written:
            lane.place = lane.written = position
            self._store.move(lane.share, self.name, *lane.slot, self._log.id, position)

    def _stops(self, error: BaseException) -> None:
        if given_up():
            return  # Others do its work.
        if isinstance(error, Fenced) and self._fenced is not None:
            self._fenced(error)
            return
        _log.critical("%s stops: %s", self.name, error)
        if not self.failed.done():
            self.failed.set_exception(error)
        self._moved.set()


class Tail:
    """Reads one log once, from where it ends now, for all consumers in this process that are that far."""

    def __init__(self, log: Log, clock: Clock) -> None:
        self._log, self._clock = log, clock
        self.consumers: list[Consumer] = []
        self.looked = 0

    async def start(self) -> None:
        """Begin at the end: what lies before it each lane reads by itself."""
        self.looked = await self._log.head()

    async def run(self) -> None:
        """Read and hand out, for ever."""
        consumers, portion = self.consumers, Portion(_PAGE)
        table: dict[tuple[str, str], list[Consumer]] = {}
        wanted = filter_of(each.wants for each in consumers)
        bodies = any(consumer.bodies for consumer in consumers)
        while True:
            try:
                page = await self._log.read(wanted, after=self.looked, limit=portion.limit, wait=5.0, bodies=bodies)
            except Unavailable as error:
                _log.warning("reading waits: %s", error)
                await self._clock.sleep(1.0)
                continue
            portion.met(page.entries)
            for entry in page.entries:
                domain, _, key = entry.stream.partition("/")
                found = table.get((domain, entry.type))
                if found is None:
                    found = table[domain, entry.type] = [each for each in consumers if each.has(domain, entry.type)]
                slot = (domain, slot_of(key))
                for consumer in found:
                    consumer.offer(entry, slot)
            self.looked = page.looked
            for consumer in consumers:
                consumer.looked(page.looked)
            if page.entries:
                # Lanes get their turn before the next look, which finds the more under load.
                await self._clock.sleep(0)
