"""The life of a view or replica: fed from a log, written in batches with its place, rebuilt beside itself."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import Busy, Damaged, Unavailable
from cauce.log import Log, filter_of
from cauce.shelf import Build, Moved, Part, Shelf, Unusable, Wrong
from cauce.sql import Fetch, Run, Statement

__all__ = ["Derived", "Failed", "Shape", "Told", "feed"]

_log = logging.getLogger("cauce")
_BATCH = 20_000
_CHUNK = 250
_PAGE = 2_000
_LONGEST = 0.5
_RARELY = 10_000
_NEAR = 10_000
_LOOK = 1.0
_POLL = 0.05
_PAUSE = 0.25
_LONGEST_PAUSE = 10.0
_LAST = 3.0
"""Seconds that a view has, when its service stops, for what it was given last."""


Told = Callable[[int, int, int], None]


class Failed(Exception):
    """What a view function or its statement did wrong; the message says which, and where."""


class Shape(Protocol):
    """What is built: which entries it wants, and what it makes of them."""

    @property
    def what(self) -> str:
        """What it is called in messages, as `view directory of crm`."""
        ...

    @property
    def name(self) -> str: ...
    @property
    def wants(self) -> dict[str, frozenset[str]]:
        """The types by domain; none means all."""
        ...

    @property
    def schema(self) -> str: ...
    @property
    def fingerprint(self) -> str:
        """Another one means that it has to be built anew."""
        ...

    async def ready(self, entries: Sequence[Entry], fetch: Fetch) -> Sequence[Any]:
        """One thing for each entry, of which its statements are made."""
        ...

    def runs(self, ready: Sequence[Any]) -> Iterable[Run]:
        """The statements for them, in the thread that writes if there is one. What goes wrong is raised as it is."""
        ...

    def blamed(self, ready: Any) -> Sequence[tuple[str, Statement]]:
        """The same for one, each with the words that say whose statement it is. Raises `Failed`."""
        ...


class Derived:
    """A view or replica of a service: given the entries of one log, in order, it commits them with its place.

    What it is given is queued, up to a bound, and written in a thread, many entries a transaction; a quiet log is
    written at once. `failed` is done when it stopped.
    """

    bodies = True

    def __init__(self, shape: Shape, service: str, log: Log, shelf: Shelf, clock: Clock) -> None:
        self.shape, self.name, self.wants = shape, shape.name, shape.wants
        self._service, self._log, self._clock = service, log, clock
        self._builds = shelf.builds(shape.name, shape.what)
        self.reading = self._builds.reading
        # What its own functions ask for must come when all others wait until it holds what was promised to them.
        self._asking = shelf.builds(shape.name, shape.what).reading
        self._build: Build | None = None
        self._stamp: object = None
        self._target: int | None = None
        self._gap = 0
        self._queue: list[Entry] = []
        self._in_hand: list[Entry] = []
        self._upto = self._given = self._looked = self._committed = self._written = 0
        self._bell, self._room, self._moved = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(_seen)

    @property
    def place(self) -> str:
        """Where the build lies that is written; without one, where all do."""
        return self._build.place if self._build is not None else self._builds.place

    # ------------------------------------------------------------------------------------------------ a tail's view

    @property
    def after(self) -> int:
        """The position after which it has something to read."""
        return self._looked

    def start(self) -> None:
        """Write from now on what it is given."""
        if self._task is None and not self.failed.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"cauce {self.shape.what}")

    async def take(self, entry: Entry) -> None:
        """Queue an entry; waits while a batch is written and the next one is full."""
        if entry.position > self._given and not self.failed.done():
            self._given = entry.position
            self._queue.append(entry)
            if len(self._queue) >= _BATCH:
                await self.room()

    async def take_all(self, entries: Sequence[Entry]) -> None:
        """Queue entries that it wants, in order."""
        if entries and not self.failed.done():
            if entries[0].position <= self._given:
                entries = [entry for entry in entries if entry.position > self._given]
            self._given = max(self._given, entries[-1].position if entries else 0)
            self._queue += entries
            if len(self._queue) >= _BATCH:
                await self.room()

    async def room(self) -> None:
        """Wait until it may be given more, or has stopped."""
        while len(self._queue) >= _BATCH and not self.failed.done():
            self._bell.set()
            self._room.clear()
            await self._room.wait()

    def has(self, entry: Entry) -> bool:
        """Whether it wants an entry."""
        types = self.wants.get(entry.domain)
        return types is not None and (not types or entry.type in types)

    def looked(self, position: int) -> None:
        """All that it wants up to a position was given to it."""
        if position > self._looked:
            self._looked = position
        self._bell.set()

    def passed(self, head: int) -> bool:
        """Whether all up to a position is committed, in the build that is read."""
        return self._target is None and self._committed >= head and self._stamp == self._builds.stamp()

    async def settled(self) -> None:
        """Wait until it has passed the head as it is now. Raises what stopped it."""
        await self.wait(await self._log.head())

    # ----------------------------------------------------------------------------------------------------- reading

    async def wait(self, position: int) -> None:
        """Wait until what is read holds all up to a position. Raises `Unavailable` if it stopped."""
        while not await self.holds(position):
            await self.moved()

    async def moved(self) -> None:
        """Wait until something was committed, here or, as far as one can tell, elsewhere."""
        self.check()
        self._moved.clear()
        if self._task is None:
            await self._clock.sleep(_POLL)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK):
                await self._moved.wait()
        self.check()

    def check(self) -> None:
        """Raises `Unavailable` if it stopped."""
        if self.failed.done() and (error := self.failed.exception()) is not None:
            raise Unavailable(f"{self.shape.what} has stopped: {error}")

    async def holds(self, position: int) -> bool:
        """Whether what is read holds all up to a position."""
        if self._task is not None:
            if self._committed < position and self._is_idle():
                # Its tail waits for what is wanted, and does not tell soon how far it saw nothing of that.
                looked = await self._nothing(self._looked)
                if self._is_idle():
                    self._looked = max(self._looked, looked)
                    self._committed = max(self._committed, self._looked)
            if not self.passed(position):
                self._bell.set()
                return False
            self.reading.reached(min(position, self._build.position if self._build is not None else 0))
            return True
        self.check()
        place = await self.reading.position()
        self.reading.reached(min(position, place))
        return place >= position or await self._nothing(place) >= position

    def _is_idle(self) -> bool:
        """Whether all that it was given is committed."""
        return not (self._queue or self._in_hand or self._committed < self._gap)

    async def _nothing(self, after: int) -> int:
        """How far after a position there is nothing that it wants."""
        page = await self._log.read(filter_of([self.wants]), after=after, limit=1, bodies=False)
        return after if page.entries else page.looked

    # ------------------------------------------------------------------------------------------------------- a life

    async def open(self) -> None:
        """Find the build to go on with, or make one. Raises `Damaged` for one of another log, or ahead of this."""
        head, told = await self._log.head(), False
        while not await self._find(head):
            # What comes of that is live then.
            if not told:
                _log.warning("%s waits: another process builds it", self.shape.what)
                told = True
            await self._clock.sleep(_POLL)

    async def _find(self, head: int) -> bool:
        live = await self._builds.live()
        self._stamp, self._target = self._builds.stamp(), None
        if not live:
            if await self._builds.numbers():
                _log.warning("%s: none in %s is live: it is built anew", self.shape.what, self._builds.place)
            return await self._make(live=True)
        try:
            build = await self._checked(await self._builds.open(live), head)
        except Unusable as error:
            _log.warning("%s: %s: it is built anew", self.shape.what, error)
            return await self._make(live=True)
        if build.fingerprint == self.shape.fingerprint:
            await self._use(build)
            await self._clear()
            return True
        await build.close()
        _log.info("%s has changed: it is built anew beside the old one", self.shape.what)
        if not await self._beside(head):
            return False
        self._target = head
        return True

    async def _beside(self, head: int) -> bool:
        """Go on with the build that was not finished, or begin one. False: another process is at it."""
        if not await self._builds.building.take():
            return False
        live = await self._builds.live()
        for number in reversed([each for each in await self._builds.numbers() if each > live]):
            try:
                build = await self._checked(await self._builds.open(number), head)
            except (Unusable, Damaged) as error:
                _log.warning("%s: %s: that build begins again", self.shape.what, error)
            else:
                if build.fingerprint == self.shape.fingerprint:
                    await self._use(build)
                    return True
                await build.close()
            await self._builds.remove([number])
        return await self._make(live=False)

    async def _make(self, *, live: bool) -> bool:
        if not await self._builds.building.take():
            return False
        number = max([await self._builds.live(), *await self._builds.numbers(), 0]) + 1
        shape = self.shape
        await self._use(await self._builds.create(number, shape.schema, self._log.id, shape.fingerprint))
        if live:
            await self._switch()
        return True

    async def _use(self, build: Build) -> None:
        if self._build is not None:
            await self._build.close()
        self._build = build
        self._committed = self._written = build.position
        self._given, self._looked = max(self._given, build.position), max(self._looked, build.position)

    async def _switch(self) -> None:
        """What was built is what is read from now on."""
        assert self._build is not None
        await self._builds.switch(self._build)
        self._stamp, self._target = self._builds.stamp(), None
        await self._builds.building.release()
        await self._clear()

    async def _clear(self) -> None:
        assert self._build is not None
        await self._builds.remove([each for each in await self._builds.numbers() if each < self._build.number])

    async def _checked(self, build: Build, head: int) -> Build:
        cure = f"run cauce reset {self._service}, which has it built anew and looks after what else the service keeps"
        wrong = ""
        if build.log != self._log.id:
            wrong = f"{build.place} was built from log {build.log}, this one is {self._log.id} (restored?): {cure}"
        elif build.position > head:
            wrong = (
                f"{build.place} was built up to position {build.position}, the log ends at {head}: entries are lost; "
                f"restore a newer backup, or {cure}"
            )
        if wrong:
            await build.close()
            raise Damaged(wrong)
        return build

    async def stop(self) -> None:
        """Write what was given and the place, and no more until it is opened again."""
        try:
            await self._stop()
        except Exception as error:
            _log.warning("%s: what it read last is read again: %s", self.shape.what, error)
        await self._builds.building.release()
        self._queue, self._in_hand = [], []
        self._upto = self._given = self._looked = self._committed = self._written = self._gap = 0

    async def close(self) -> None:
        """Write what was given and the place, and let go."""
        await self.stop()
        await self.reading.close()
        await self._asking.close()
        if self._build is not None:
            await self._build.close()
            self._build = None

    async def _run(self) -> None:
        pause = 0.0
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK):
                        await self._bell.wait()
                try:
                    await self._step()
                    pause = 0.0
                except Unavailable as error:
                    pause = min(_LONGEST_PAUSE, pause * 2 or _PAUSE)
                    _log.warning("%s waits: %s", self.shape.what, error)
                    await self._clock.sleep(pause)
                    self._bell.set()
        except Exception as error:
            self.fail(error)
        finally:
            self._room.set()
            self._moved.set()

    def fail(self, error: Exception) -> None:
        """Say what stopped it."""
        _log.critical("%s stops: %s", self.shape.what, error, exc_info=None if isinstance(error, Failed) else error)
        self._queue.clear()
        if not self.failed.done():
            self.failed.set_exception(error)

    # ------------------------------------------------------------------------------------------------------- a batch

    async def _step(self, *, last: bool = False) -> None:
        """Commit what was given."""
        self._bell.clear()
        try:
            await self._catch_up(last=last)
        except Unusable as error:
            if last:
                raise
            await self._anew(error)
            self._bell.set()
        if self._target is not None and self._committed >= self._target and not last:
            await self._caught_up()
        self._moved.set()
        if self._queue:
            self._bell.set()

    async def _catch_up(self, *, last: bool) -> None:
        try:
            await self._follow()
            if self._committed < self._gap:
                if last:
                    return
                await self._reach()
            await self._commit_all(last=last)
        except Moved as error:
            if last:
                raise
            _log.info("%s: %s", self.shape.what, error)
            await self._again()
            self._bell.set()

    async def _commit_all(self, *, last: bool) -> None:
        if not self._in_hand:
            self._in_hand, self._queue = self._queue, []
            self._upto = max(self._looked, self._in_hand[-1].position if self._in_hand else 0)
            self._room.set()
        upto = self._upto
        while self._in_hand:
            await self._commit(upto)
        if upto - self._written >= _RARELY or (last and upto > self._written):
            await self._place(upto)
        self._committed = max(self._committed, upto)

    async def _place(self, position: int) -> None:
        assert self._build is not None
        self._written = await self._build.write([(position, ())])

    async def _commit(self, looked: int) -> None:
        """Write a part of what is in hand, as much as is done in time."""
        build = self._build
        assert build is not None
        if self._in_hand[0].position <= build.position:
            # Who was told to stop did not see how the writing ended: what is committed is not written a second time.
            self._in_hand = [entry for entry in self._in_hand if entry.position > build.position]
            if not self._in_hand:
                return
        try:
            ready = await self.shape.ready(self._in_hand, self._asking.fetch)
            self._written = await build.write(self._parts(ready, looked))
        except (Unusable, Moved, Unavailable, Damaged):
            raise
        except Exception:
            await self._one_by_one()
            return
        self._in_hand = [entry for entry in self._in_hand if entry.position > build.position]
        if self._in_hand:
            self._committed = max(self._committed, build.position)
            self._moved.set()

    def _parts(self, ready: Sequence[Any], looked: int) -> Iterator[Part]:
        """Chunk by chunk until it has lasted long enough, each with the position that it brings the build to."""
        until, in_hand = self._clock.monotonic() + _LONGEST, self._in_hand
        for first in range(0, len(ready), _CHUNK):
            chunk = ready[first : first + _CHUNK]
            done = first + len(chunk)
            yield looked if done == len(ready) else in_hand[done - 1].position, self.shape.runs(chunk)
            if self._clock.monotonic() > until:
                return

    async def _one_by_one(self) -> None:
        """Something in it is wrong: what stands before that is committed, then it is raised."""
        build = self._build
        assert build is not None
        while self._in_hand:
            entry = self._in_hand[0]
            (ready,) = await self.shape.ready([entry], self._asking.fetch)
            blamed: list[tuple[str, Statement]] = []

            def one(
                blamed: list[tuple[str, Statement]] = blamed, ready: Any = ready, entry: Entry = entry
            ) -> Iterator[Part]:
                blamed += self.shape.blamed(ready)
                yield entry.position, [(sql, [values]) for _, (sql, values) in blamed]

            try:
                self._written = await build.write(one())
            except Wrong as wrong:
                raise Failed(f"{blamed[wrong.number][0]}: {wrong}") from wrong
            self._committed = max(self._committed, entry.position)
            del self._in_hand[0]

    async def _follow(self) -> None:
        """Go on with another build, if somebody has switched."""
        if self._target is None and self._builds.stamp() != self._stamp:
            await self._again()

    async def _again(self) -> None:
        """Go on with the build that is live, or with the one that is made here, as it stands now."""
        assert self._build is not None
        number, stamp = self._build.number, self._builds.stamp()
        if self._target is None and not (number := await self._builds.live()):
            raise Unusable(f"{self._builds.place} has none that is live")
        build = await self._checked(await self._builds.open(number), await self._log.head())
        if build.fingerprint != self.shape.fingerprint:
            await build.close()
            raise Unavailable(f"{build.place} was built by other code: start this process anew with it")
        if number != self._build.number:
            _log.info("%s goes on with %s", self.shape.what, build.place)
        self._gap = max(self._gap, self._committed)
        await self._use(build)
        if self._target is None:
            self._stamp = stamp
            await self._clear()

    async def _anew(self, error: Unusable) -> None:
        """Begin another build, because the one in use is gone or broken. What others read they go on reading."""
        _log.warning("%s: %s: it is built anew", self.shape.what, error)
        self._gap = max(self._gap, self._committed)
        while not await (self._make(live=True) if self._target is None else self._beside(await self._log.head())):
            await self._clock.sleep(_POLL)

    async def _reach(self) -> None:
        """Read by itself what the new build lacks of what the old one held; what was given comes after that."""
        self._queue[:0] = self._in_hand
        self._in_hand = []
        try:
            while (looked := self._committed) < self._gap:
                page = await self._log.read(filter_of([self.wants]), after=looked, limit=_PAGE)
                self._in_hand = [entry for entry in page.entries if self.has(entry) and entry.position <= self._gap]
                looked = min(page.looked, self._gap)
                while self._in_hand:
                    await self._commit(looked)
                self._committed = max(self._committed, looked)
        finally:
            self._in_hand = []

    async def _caught_up(self) -> None:
        """It goes live if it is near the head, which may have moved on meanwhile."""
        head = await self._log.head()
        if head - self._committed > _NEAR:
            self._target = head
            return
        if self._written < self._committed:
            await self._place(self._committed)
        old = await self._builds.hold()
        try:
            # Who fed the old one before may have gone on for a moment, and somebody has read that.
            reached = await self.reading.position() if old is not None else 0
            if self._committed < reached <= await self._log.head():
                self._target = reached
                return
            await self._switch()
        finally:
            if old is not None:
                await old.close()
        assert self._build is not None
        _log.info("%s is built: %s is live", self.shape.what, self._build.place)

    # ------------------------------------------------------------------------------------------------------- rebuild

    async def rebuild(self, told: Told) -> int:
        """Build a new file beside the live one, or go on with one that was not finished, and switch. Effects stay off.

        Parameters:
            told: is told position, head, and how many entries were read.

        Returns that number. Raises `Busy` if it is being built already.
        """
        if not await self._beside(await self._log.head()):
            raise Busy(f"{self.shape.what} is being built by another process: wait until that is done, or stop it")
        # Only when it writes no more it goes live: from then on that is for who leads to do.
        self._target = sys.maxsize
        entries = await feed(self._log, [self], self._clock, told)
        # What somebody has read must not be gone again: nothing new comes into the old build until the new one has all.
        old = await self._builds.hold()
        try:
            entries += await feed(self._log, [self], self._clock, told)
            while self._committed < self._looked:
                await self.moved()
            await self._stop()
            self.check()
            await self._switch()
        finally:
            if old is not None:
                await old.close()
        return entries

    async def _stop(self) -> None:
        """Write no more than what was given, and the place."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            if not self.failed.done():
                try:
                    async with asyncio.timeout(_LAST):
                        await self._step(last=True)
                except TimeoutError:
                    raise Unavailable(f"it is not done within {_LAST:g} s") from None


def _quiet(looked: int, head: int, entries: int) -> None:
    """Nobody wants to know."""


async def feed(log: Log, many: Sequence[Derived], clock: Clock, told: Told = _quiet) -> int:
    """Give them all that they want up to the head, in one pass of large pages. Returns how many entries were read."""
    looked, entries = min((each.after for each in many), default=0), 0
    for each in many:
        each.start()
    wanted, head = filter_of(each.wants for each in many), await log.head()
    exact = len(many) == 1 and len(many[0].wants) == 1
    while looked < head:
        try:
            page = await log.read(wanted, after=looked, limit=_PAGE)
        except Unavailable as error:
            _log.warning("reading waits: %s", error)
            await clock.sleep(1.0)
            continue
        for each in many:
            await each.take_all(page.entries if exact else [entry for entry in page.entries if each.has(entry)])
            each.looked(page.looked)
        looked, entries = page.looked, entries + len(page.entries)
        # A read does not give up the loop.
        await clock.sleep(0)
        head = await log.head()
        told(looked, head, entries)
    return entries


def _seen(failed: asyncio.Future[None]) -> None:
    """It was told of when it stopped."""
    if not failed.cancelled():
        failed.exception()
