"""The wire: in one process a question is a call, between processes it goes through two tables of the database."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import asyncpg
import msgspec

from cauce.backends.board import announce, loaded, serve
from cauce.backends.candidates import answers_in, candidates
from cauce.backends.postgres.answering import MOST, Answering
from cauce.backends.postgres.asking import Asking
from cauce.backends.postgres.lane import Lane
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.parcel import ASKED
from cauce.backends.postgres.registry import BEAT, CHANGED, Present, Registry
from cauce.backends.spread import Lost, NotServed, Spread
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.errors import CauceError, NoAnswer, Refused
from cauce.identity import identity
from cauce.wire import Handler, Instance, Load

__all__ = ["PostgresWire"]

_log = logging.getLogger("cauce")

_MOVING = 2.0
"""Seconds for which an address that nobody serves may be on its way from one instance to another."""

_MOVED = 0.05
"""Seconds between two looks for where it has gone."""

_SWEEP = 15
"""Beats between two sweeps."""

_HEARD = 2.0
"""Seconds that the first one waits until notifications are heard; without them it goes on, only slower."""


class _Board:
    """What is served on one database in this process and loop: shared by all who opened it here."""

    def __init__(self, clock: Clock) -> None:
        self._loop, self._clock = asyncio.get_running_loop(), clock
        self.links: list[Link] = []
        self.token = f"{os.getpid()}-{clock.id()[-12:]}"
        self._owner = identity("wire", clock)
        self.deadlines = Deadlines()
        self.handlers: dict[str, Handler] = {}
        self.instances: dict[str, Instance] = {}
        self.loads: dict[str, Callable[[], Load]] = {}
        self.spread = Spread(clock)
        self._starting: set[asyncio.Task[None]] = set()
        self._publishing = asyncio.Lock()
        self._changes = self._published = self._beats = 0
        self._shown = self._due = self.closed = False
        self._opening: asyncio.Task[None] | None = None
        self._deaf: list[Callable[[], None]] = []
        self._beating: asyncio.TimerHandle | None = None
        self._heard = asyncio.Event()

    @property
    def _link(self) -> Link:
        return self.links[0]

    async def open(self) -> None:
        """Be ready to ask and to answer other processes."""
        if self._opening is None:
            prefix = f"{self._link.schema}:"
            self.registry = Registry(self._fetch, self._clock, prefix + CHANGED)
            self._asking = Asking(Lane(lambda: self._link, "ask"), self.token, self.registry, prefix)
            self._answering = Answering(
                Lane(lambda: self._link, "answer"), self.token, self.handlers, self.deadlines, self._clock, prefix
            )
            self._opening = self._loop.create_task(self._listen())
        await asyncio.shield(self._opening)

    async def _listen(self) -> None:
        self._heard.clear()
        self._deaf = [self._link.listen(self.token, self._told), self._link.listen(CHANGED, self._changed)]
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEARD):
                await self._heard.wait()

    def _fetch(self, statement: str, *values: Any) -> Coroutine[Any, Any, list[asyncpg.Record]]:
        return self._link.fetch(statement, *values)

    def _told(self, text: str) -> None:
        if text == ASKED:
            self._answering.look()
        elif text:
            self._asking.told(text)
        else:
            self._heard.set()
            self._answering.look()
            self._asking.look()
            if self._shown and not self.closed:
                # The server may have crashed, and lost what was said.
                self._start(self._beat_now())

    def _changed(self, text: str) -> None:
        self.registry.doubt()
        self._asking.look()

    # ------------------------------------------------------------------------------------------------ to be seen

    async def show(self) -> None:
        """Let the others see what is served and announced here."""
        self._changes += 1
        wanted = self._changes
        await self.open()
        if not self._shown:
            self._shown = True
            self._answering.start()
            self._beating = self._loop.call_later(BEAT, self._beat)
        await self._publish(wanted)

    async def _publish(self, wanted: int) -> None:
        async with self._publishing:
            if self._published >= wanted:
                return  # together with what somebody else wanted to be seen
            changes = self._changes
            if self.handlers or self.instances:
                await self.registry.publish(self.token, self._present())
            else:
                await self.registry.bury(self.token)
            self._published = changes

    def hide(self) -> None:
        """Let the others see, soon, that something is served or announced here no more."""
        self._changes += 1
        if not self._due and not self.closed:
            self._due = True
            self._loop.call_soon(self._hide)

    def _hide(self) -> None:
        self._due = False
        if self._shown and not self.closed:
            self._start(self._publish(self._changes))

    def _present(self) -> Present:
        return Present(self._owner, tuple(self.handlers), loaded(self.instances, self.loads))

    def _beat(self) -> None:
        self._beating = self._loop.call_later(BEAT, self._beat)
        self._start(self._beat_now())

    async def _beat_now(self) -> None:
        if self._published < self._changes:
            await self._publish(self._changes)
        elif (self.handlers or self.instances) and not await self.registry.beat(self.token, self._present()):
            _log.warning("what this process said at the wire is not there any more: it is said again")
            self._changes += 1
            await self._publish(self._changes)
        # So that the silence of others is watched.
        self.registry.doubt()
        await self.registry.look()
        self._beats += 1
        if self._beats % _SWEEP == 0:
            await self.registry.sweep()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Who asks for what is not served is told so, and the next beat tries again.
            _log.warning("the wire does not show what is served here, for now: %s", error)

    async def all_instances(self, now: int) -> list[Instance]:
        """Those here, and those elsewhere."""
        here = [msgspec.structs.replace(instance, beat=now) for instance in loaded(self.instances, self.loads)]
        if self.closed:
            return here
        await self.open()
        return here + await self.registry.instances(but=self.token)

    # --------------------------------------------------------------------------------------------------------- end

    async def left(self, link: Link) -> None:
        """One who opened it here lets go of it, and its connections with it."""
        last, first = len(self.links) == 1, self._link is link
        if last:
            await self._close()
        self.links.remove(link)
        if not last and first and self._opening is not None:
            for undo in self._deaf:
                undo()
            self._opening = self._loop.create_task(self._listen())
            await asyncio.shield(self._opening)

    async def _close(self) -> None:
        self.closed = True
        if self._opening is None:
            return
        await asyncio.wait((self._opening,))
        if self._beating is not None:
            self._beating.cancel()
        for undo in self._deaf:
            undo()
        await self._answering.close()
        if self._starting:
            await asyncio.wait(self._starting)
        if self._shown:
            try:
                async with asyncio.timeout(1):
                    await self.registry.bury(self.token)
            except (CauceError, OSError, TimeoutError) as error:
                _log.warning("the wire still shows this process, until it is found silent: %s", error)
        await self._asking.close()

    # --------------------------------------------------------------------------------------------------- questions

    async def ask(self, address: str, payload: bytes, deadline: float, clock: Clock, safe: bool) -> bytes:
        """Ask those who serve the address elsewhere, until one of them takes the question."""

        async def one(token: str) -> bytes:
            left = deadline - clock.monotonic()
            return await self.deadlines.within(left, self._asking.ask(token, address, payload, left))

        if len(payload) > MOST:
            raise Refused(f"a question to {address} has {len(payload)} bytes: at most {MOST} can be asked")
        if not self.closed:
            await self.deadlines.within(deadline - clock.monotonic(), self.open())
        moving, sure, lost = min(deadline, clock.monotonic() + _MOVING), False, None
        while not self.closed:
            late = clock.monotonic() + _MOVED >= moving
            try:
                await self.deadlines.within(deadline - clock.monotonic(), self.registry.look())
            except TimeoutError:
                if sure:
                    break  # Nobody was there, and there is no time left to look for one that came.
                raise
            if order := self._candidates(address, late=late):
                try:
                    return await self.spread.ask(order, one, deadline - clock.monotonic(), safe=safe)
                except NotServed:
                    self.registry.doubt()
                except Lost as error:
                    if lost is not None or not safe:
                        raise
                    lost = error
                    self.registry.doubt()
                    continue
            handler = self.handlers.get(address)
            if handler is not None:
                return await self.deadlines.within(deadline - clock.monotonic(), handler(payload))
            if not sure:
                sure = True
                self.registry.doubt()
                continue
            if late or not (self.registry.is_new() or self._answers_in(address)):
                break
            await clock.sleep(_MOVED)
            self.registry.doubt()
        if lost is not None:
            raise lost
        raise NoAnswer(f"nobody serves {address}: run the service that owns it, or send a command instead")

    def _answers_in(self, address: str) -> bool:
        return answers_in(self.registry, self._present, address.partition("/")[0], but=self.token)

    def _candidates(self, address: str, *, late: bool) -> list[str]:
        known, domain = self.registry, address.partition("/")[0]
        serving = [token for token in known.serving(address) if token != self.token and known.is_alive(token)]
        return candidates(known, self.spread, serving, self._present, domain, late=late)


_boards: WeakValueDictionary[tuple[str, asyncio.AbstractEventLoop], _Board] = WeakValueDictionary()


class PostgresWire:
    """See `cauce.wire.Wire` for what each method promises.

    Parameters:
        link: open, and closed only after this wire.
    """

    def __init__(self, link: Link, clock: Clock) -> None:
        self._key = link.url, asyncio.get_running_loop()
        board = _boards.get(self._key)
        if board is None:
            board = _boards[self._key] = _Board(clock)
        board.links.append(link)
        self._board, self._clock, self._link, self._deadlines = board, clock, link, board.deadlines
        self._handlers = board.handlers
        self._closed = False

    async def ask(self, address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
        handler = self._handlers.get(address)
        if handler is not None:
            return await self._deadlines.within(deadline - self._clock.monotonic(), handler(payload))
        return await self._board.ask(address, payload, deadline, self._clock, safe)

    async def serve(self, address: str, handler: Handler) -> Callable[[], None]:
        return await serve(self._board, address, handler)

    async def announce(self, instance: Instance, load: Callable[[], Load] | None = None) -> Callable[[], None]:
        return await announce(self._board, instance, load)

    async def instances(self) -> list[Instance]:
        return await self._board.all_instances(self._clock.now())

    async def close(self) -> None:
        """Let go of it; the last one in the process gives the last answers and says nothing more of it."""
        if self._closed:
            return
        self._closed = True
        if len(self._board.links) == 1:
            _boards.pop(self._key, None)
        await self._board.left(self._link)
