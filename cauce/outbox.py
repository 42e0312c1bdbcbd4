"""Bringing what handlers said to its log: in order per thing, once however often that is tried.

What a handler said lies in the store, committed with the place of its message. One thing that takes long, or fails,
holds up no other: it is tried again by itself, and what comes behind it waits. What its log refuses too often is a dead
letter of the consumer `SAID`, like any other: a person decides, and until then its thing waits.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

import msgspec

from cauce.aside import Aside
from cauce.bus import Ask, Bus
from cauce.codec import Entry
from cauce.errors import CauceError, Fenced, Unavailable
from cauce.retry import Retry
from cauce.said import Said, Spoken, kept, read_said, spoken, spoken_again
from cauce.store import SAID, Share, Store, Unit, Waiting
from cauce.task import ended

__all__ = ["Outbox"]

_log = logging.getLogger("cauce")

_AT_ONCE = 500
_PAUSE = 0.25
_RETRY = Retry(first=0.25, longest=30.0)
_REST = 1.0
_MOST_UNDER_WAY = 5_000
_DEAF = 1.0
"""Seconds that what is relayed gets to end once it is cancelled."""


class _PutOff(msgspec.Struct):
    """A thing that the outbox tries again later: when by monotonic time, how often it was tried, and failed by
    somebody's fault."""

    due: float = 0.0
    tries: int = 0
    failures: int = 0


class _Row(msgspec.Struct, frozen=True):
    """A row of the outbox: its number, which handler said it, in which slot, and what."""

    number: int
    handler: str
    slot: int
    said: Said


class Outbox:
    """What one instance of a service relays: that of the slots it holds.

    Parameters:
        slots: those that it holds now.
        record: records an event of a domain.
        may_begin: whether the instance is sure enough of its slots to begin something new.
        stops: told what ends the service.
    """

    def __init__(
        self,
        service: str,
        store: Store,
        bus: Bus,
        slots: Callable[[], Iterable[int]],
        record: Callable[[str, Ask], Awaitable[None]],
        may_begin: Callable[[], bool],
        stops: Callable[[BaseException], None],
    ) -> None:
        self._service, self._store, self._bus = service, store, bus
        self._slots, self._record, self._may_begin, self._stops = slots, record, may_begin, stops
        self._asides: dict[int, Aside] = {}
        self._shares: dict[int, Share] = {}
        self._leaving: set[int] = set()
        self._moved, self._caution = asyncio.Event(), asyncio.Lock()
        self._said = asyncio.Event()
        self._put_off: dict[str, _PutOff] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._stands: list[int] = []
        self._looked, self._looked_for, self._look_anew = 0, set[int](), True

    @property
    def put_off(self) -> int:
        """How many things wait because something of them failed."""
        return len(self._put_off)

    def look(self, *, anew: bool = False) -> None:
        """Something was said, or a slot was gained.

        Parameters:
            anew: look at all that lies there, also where that was done before.
        """
        self._look_anew |= anew
        self._said.set()

    # ---------------------------------------------------------------------------------------- what a person decides

    async def hold(self, shares: dict[int, Share]) -> None:
        """Work on these slots from now on."""
        self._leaving.difference_update(shares)
        self._shares.update(shares)
        for waiting in await self._store.waiting(SAID):
            if waiting.slot in shares:
                self._aside(waiting.slot).add(waiting)
        self.look(anew=True)

    async def drop(self, slots: Iterable[int], within: float) -> None:
        """Begin no more in these slots of what waits, and forget it.

        Parameters:
            within: seconds for what is in hand.
        """
        gone = set(slots)
        self._leaving.update(gone)
        asides = [(slot, aside) for slot, aside in self._asides.items() if slot in gone]
        tasks = {task for _, aside in asides for task in aside.leave(gone)}
        if tasks:
            await ended((await asyncio.wait(tasks, timeout=within))[1], _DEAF)
        for slot, aside in asides:
            aside.drop(gone)
            if self._asides.get(slot) is aside:
                del self._asides[slot]

    async def abandon(self, within: float) -> None:
        """Forget all that is known of its slots: others have them.

        Parameters:
            within: seconds for what is cancelled to end.
        """
        asides, self._asides, self._shares = self._asides, {}, {}
        tasks = {task for aside in asides.values() for task in aside.tasks}
        for aside in asides.values():
            aside.abandon()
        await ended(tasks, within)
        self.look(anew=True)

    async def reload(self) -> None:
        """Look again: a person may have decided, or another instance have said something."""
        self._said.set()
        for aside in list(self._asides.values()):
            await aside.reload()

    def _works_on(self, slot: int) -> bool:
        return slot in self._shares and slot not in self._leaving

    def _aside(self, slot: int) -> Aside:
        found = self._asides.get(slot)
        if found is None:
            found = self._asides[slot] = Aside(
                SAID, self._handle, self._read, self._store, self._bus.clock, _RETRY, self._may_begin, self._caution,
                self._shares.get, self._leaving, self._moved, self._stops,
            )  # fmt: skip
        return found

    async def _read(self, waiting: Waiting) -> Entry:
        return spoken_again(waiting.raw)

    async def _handle(self, entry: Entry, unit: Unit) -> None:
        assert isinstance(entry, Spoken)
        await self._relay_one(entry)

    async def _set_aside(self, row: _Row, error: BaseException | None = None, failures: int = 0) -> None:
        """Let a person decide about what failed for good; without an error, about what is before it."""
        aside = self._aside(row.slot)
        waiting = Waiting(row.number, row.said.stream, row.slot, failures, error="waits behind an earlier one")
        waiting.raw = kept(row.said, row.handler)
        if error is not None:
            waiting.error = f"{type(error).__name__}: {error}"
            aside.bury(waiting, "".join(traceback.format_exception(error)), None)
        last = aside.last(row.said.stream)
        if last is None or last.position < row.number:
            unit = Unit(self._shares[row.slot])
            unit.parked = SAID, waiting
            await aside.commit(unit)
            aside.add(waiting)
        # At once: what a person discards must not come back from here.
        await self._store.relayed([row.number])

    # ------------------------------------------------------------------------------------------------ what is relayed

    async def relayed(self, *, patient: bool = True) -> None:
        """Wait until all that was said is in its log.

        Parameters:
            patient: wait for the things too that were put off because something of them failed.
        """
        while await self._unsaid(patient) or (patient and not self._are_decided()):
            self._said.set()
            await self._bus.clock.sleep(0.01)

    def _are_decided(self) -> bool:
        """Whether nothing of what was set aside is being tried again."""
        return all(aside.passed(sys.maxsize) for aside in self._asides.values())

    async def _unsaid(self, patient: bool) -> bool:
        """Whether something waits in the outbox for this instance."""
        after, mine = 0, set(self._slots())
        while rows := await self._store.outbox(after, 10_000):
            after = rows[-1][0]
            if any(row[2] in mine and (patient or read_said(row[3]).stream not in self._put_off) for row in rows):
                return True
        return False

    async def run(self) -> None:
        """Bring what was said to its log, in order per thing, once however often that is tried; for ever."""
        try:
            while True:
                await self._due()
                self._said.clear()
                try:
                    await self._relay_all()
                except Unavailable as error:
                    _log.warning("the outbox of %s waits: %s", self._service, error)
                    self._look_anew = True
                    await self._bus.clock.sleep(_REST)
                    self._said.set()
        finally:
            under_way = list(self._under_way.values())
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _due(self) -> None:
        """Wait until something was said, or what was put off is due."""
        due = min((off.due for stream, off in self._put_off.items() if stream not in self._under_way), default=None)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if due is None else max(0.0, due - self._bus.clock.monotonic())):
                await self._said.wait()

    async def _relay_all(self) -> None:
        """Relay what is new; and all from the beginning, where something behind may go on by now."""
        await self._strike_out()
        now, mine = self._bus.clock.monotonic(), set(self._slots())
        held_up = {stream for stream, off in self._put_off.items() if off.due > now}
        whole = self._look_anew or len(held_up) < len(self._put_off) or not mine <= self._looked_for
        held_up |= self._under_way.keys()
        self._look_anew, met = False, set[str]()
        after = 0 if whole else self._looked
        while rows := await self._store.outbox(after, _AT_ONCE):
            after = rows[-1][0]
            # Of a slot that is gained meanwhile the earlier pages were passed by.
            mine.intersection_update(self._slots())
            streams: dict[str, list[_Row]] = {}
            for number, handler, slot, payload in rows:
                if slot in mine:
                    said = read_said(payload)
                    met.add(said.stream)
                    # What waits behind one that failed may be in a later page.
                    if said.stream not in held_up:
                        streams.setdefault(said.stream, []).append(_Row(number, handler, slot, said))
            await self._relay_page(streams)
            held_up |= streams.keys() & (self._under_way.keys() | self._put_off.keys())
        if whole:
            # What another instance relayed for a slot that was given away.
            self._put_off = {stream: off for stream, off in self._put_off.items() if stream in met}
        self._looked, self._looked_for = after, mine

    async def _relay_page(self, streams: dict[str, list[_Row]]) -> None:
        """Each thing by itself: one that takes long, such as one whose instance is stopped, goes on behind."""
        tasks = []
        for stream, waiting in streams.items():
            task = asyncio.get_running_loop().create_task(self._relay_stream(stream, waiting))
            self._under_way[stream] = task
            tasks.append(task)
        if tasks:
            _, slow = await asyncio.wait(tasks, timeout=_PAUSE)
            for task in slow:
                task.add_done_callback(self._went_on)
        while len(self._under_way) > _MOST_UNDER_WAY:
            await asyncio.wait(self._under_way.values(), return_when=asyncio.FIRST_COMPLETED)
        await self._strike_out()

    async def _strike_out(self) -> None:
        numbers, self._stands = self._stands, []
        if numbers:
            await self._store.relayed(numbers)

    def _went_on(self, task: asyncio.Task[None]) -> None:
        # What came behind it meanwhile was passed by.
        self._look_anew = True
        self._said.set()

    async def _relay_stream(self, stream: str, rows: Sequence[_Row]) -> None:
        """One after the other; what comes behind one that failed waits for it."""
        me = asyncio.current_task()
        assert me is not None
        try:
            for row in rows:
                if not await self._relay_row(row, me):
                    break
                self._put_off.pop(stream, None)
        finally:
            del self._under_way[stream]

    async def _relay_row(self, row: _Row, me: asyncio.Task[None]) -> bool:
        """Whether it is in its log, or a person decides. False: it is tried again later, here or by another."""
        if not self._works_on(row.slot):
            return False
        try:
            if self._aside(row.slot).last(row.said.stream) is not None:
                await self._set_aside(row)
                return True
            await self._relay_one(spoken(row.said))
        except (Exception, asyncio.CancelledError) as error:
            if me.cancelling():
                raise
            off = self._delay(row.said, error)
            # Without its slot nothing is set aside: whoever has it counts anew.
            if off.failures < _RETRY.attempts or not self._works_on(row.slot):
                return False
            try:
                await self._set_aside(row, error, off.failures)
            except (Fenced, Unavailable):
                return False
            return True
        self._stands.append(row.number)
        return True

    def _delay(self, said: Said, error: BaseException) -> _PutOff:
        """Try a thing again later, and leave all others alone."""
        off = self._put_off.setdefault(said.stream, _PutOff())
        off.tries += 1
        # A slot that another instance has by now is nobody's fault.
        fault = not isinstance(error, (Unavailable, Fenced))
        off.failures += fault
        pause = _RETRY.delay(off.tries, self._bus.clock.random())
        off.due = self._bus.clock.monotonic() + pause
        _log.log(
            logging.ERROR if fault else logging.WARNING, "%s of %s waits %.1f s in the outbox of %s: %s", said.type,
            said.stream, pause, self._service, error if isinstance(error, CauceError) else repr(error),
            exc_info=error if off.failures == 1 and not isinstance(error, CauceError) else None,
        )  # fmt: skip
        return off

    async def _relay_one(self, spoken: Spoken) -> None:
        if spoken.kind == "command":
            entry = Entry(*msgspec.structs.astuple(spoken)[:9])
            await self._bus.commands.append(spoken.stream, [entry], repeat=True)
            return
        meta = spoken.meta
        ask = Ask(
            "publish", spoken.type, spoken.id, spoken.key, meta.schema, msgspec.Raw(spoken.body or b""), False, meta.by,
            meta.correlation, meta.causation, meta.trace, meta.tracestate,
        )  # fmt: skip
        await self._record(spoken.domain, ask)
