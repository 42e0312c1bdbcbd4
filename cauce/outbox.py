"""Bringing what handlers said to its log: in order per thing, once however often that is tried.

What a handler said lies in the store, committed with the place of its message. One thing that takes long, or fails,
holds up no other: it is tried again by itself, and what comes behind it waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from cauce.bus import Ask, Bus
from cauce.codec import Entry
from cauce.errors import CauceError, Unavailable

if TYPE_CHECKING:
    from cauce.store import Store

__all__ = ["Outbox", "packed"]

_log = logging.getLogger("cauce")

_AT_ONCE = 500
_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
_HOPELESS_PAUSE = 60.0
_ATTEMPTS = 12
_REST = 1.0
_MOST_UNDER_WAY = 5_000


class _Said(msgspec.Struct, frozen=True, array_like=True):
    """What a handler said, as it lies in the outbox: a command to send, or an event to record."""

    kind: str
    stream: str
    type: str
    id: str
    raw: bytes
    body: bytes


class _PutOff(msgspec.Struct):
    """A thing that the outbox tries again later.

    When by monotonic time, after how many seconds, and how often it failed by somebody's fault.
    """

    due: float = 0.0
    pause: float = 0.0
    failures: int = 0


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(_Said).decode


def packed(kind: str, entry: Entry) -> bytes:
    """What a handler said, as it is stored."""
    return _pack(_Said(kind, entry.stream, entry.type, entry.id, entry.raw, entry.body or b""))


class Outbox:
    """What one instance of a service relays: that of the slots it holds.

    Parameters:
        slots: those that it holds now.
        record: records an event of a domain.
    """

    def __init__(
        self,
        service: str,
        store: Store,
        bus: Bus,
        slots: Callable[[], Iterable[int]],
        record: Callable[[str, Ask], Awaitable[None]],
    ) -> None:
        self._service, self._store, self._bus = service, store, bus
        self._slots, self._record = slots, record
        self._said = asyncio.Event()
        self._put_off: dict[str, _PutOff] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._stands: list[int] = []
        self._looked, self._looked_for, self._look_anew = 0, set[int](), True

    @property
    def put_off(self) -> int:
        """How many things wait because something of them failed."""
        return len(self._put_off)

    def look(self) -> None:
        """Something was said, or a slot was gained."""
        self._said.set()

    async def relayed(self, *, patient: bool = True) -> None:
        """Wait until all that was said is in its log.

        Parameters:
            patient: wait for the things too that were put off because something of them failed.
        """
        while await self._unsaid(patient):
            self._said.set()
            await self._bus.clock.sleep(0.01)

    async def _unsaid(self, patient: bool) -> bool:
        """Whether something waits in the outbox for this instance."""
        after, mine = 0, set(self._slots())
        while rows := await self._store.outbox(after, 10_000):
            after = rows[-1][0]
            if any(row[2] in mine and (patient or _unpack(row[3]).stream not in self._put_off) for row in rows):
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
            streams: dict[str, list[tuple[int, _Said]]] = {}
            for number, _, slot, packed in rows:
                if slot in mine:
                    said = _unpack(packed)
                    met.add(said.stream)
                    # What waits behind one that failed may be in a later page.
                    if said.stream not in held_up:
                        streams.setdefault(said.stream, []).append((number, said))
            await self._relay_page(streams)
            held_up |= streams.keys() & (self._under_way.keys() | self._put_off.keys())
        if whole:
            # What another instance relayed for a slot that was given away.
            self._put_off = {stream: off for stream, off in self._put_off.items() if stream in met}
        self._looked, self._looked_for = after, mine

    async def _relay_page(self, streams: dict[str, list[tuple[int, _Said]]]) -> None:
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

    async def _relay_stream(self, stream: str, waiting: list[tuple[int, _Said]]) -> None:
        """One after the other; what comes behind one that failed waits for it."""
        me = asyncio.current_task()
        assert me is not None
        try:
            for number, said in waiting:
                try:
                    await self._relay_one(said)
                except (Exception, asyncio.CancelledError) as error:
                    if me.cancelling():
                        raise
                    self._delay(said, error)
                    break
                self._put_off.pop(stream, None)
                self._stands.append(number)
        finally:
            del self._under_way[stream]

    def _delay(self, said: _Said, error: BaseException) -> None:
        """Try a thing again later, and leave all others alone."""
        off = self._put_off.setdefault(said.stream, _PutOff())
        off.pause = min(_LONGEST_PAUSE, off.pause * 2 or _PAUSE)
        level, more = logging.WARNING, ""
        if not isinstance(error, Unavailable):
            off.failures += 1
            level = logging.ERROR
            if off.failures >= _ATTEMPTS:
                off.pause = _HOPELESS_PAUSE
            if off.failures == _ATTEMPTS:
                level, more = logging.CRITICAL, f" (failed {_ATTEMPTS} times, from now on tried once a minute)"
        off.due = self._bus.clock.monotonic() + off.pause
        _log.log(
            level, "%s of %s waits in the outbox of %s%s: %s", said.type, said.stream, self._service, more,
            error if isinstance(error, CauceError) else repr(error),
            exc_info=error if off.failures in (1, _ATTEMPTS) and not isinstance(error, CauceError) else None,
        )  # fmt: skip

    async def _relay_one(self, said: _Said) -> None:
        entry = Entry(0, said.stream, 0, said.type, said.id, said.raw, None, said.body, 0)
        if said.kind == "command":
            await self._bus.commands.append(said.stream, [entry], repeat=True)
            return
        meta = entry.meta
        ask = Ask(
            "publish", said.type, said.id, entry.key, meta.schema, msgspec.Raw(said.body), False, meta.by,
            meta.correlation, meta.causation, meta.trace, meta.tracestate,
        )  # fmt: skip
        await self._record(entry.domain, ask)
