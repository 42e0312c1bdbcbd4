"""The life of a view or replica: fed from a log, written in batches with its place, rebuilt beside itself."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import apsw

from cauce.backends.sqlite.file import translate
from cauce.clock import Clock
from cauce.codec import Entry
from cauce.derived_file import DerivedFile, Files, Lock, Reading, Stamp, Unusable, in_thread
from cauce.errors import Busy, Damaged, Unavailable
from cauce.log import Log, filter_of
from cauce.sql import Fetch

__all__ = ["Derived", "Failed", "Shape", "Told", "feed", "schema_of"]

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
        """One thing for each entry, for the thread to apply."""
        ...

    def apply(self, connection: apsw.Connection, ready: Sequence[Any]) -> None:
        """Write them, in the thread and in its transaction. What goes wrong may be raised as it is."""
        ...

    def apply_one(self, connection: apsw.Connection, ready: Any) -> None:
        """The same for one; what is wrong with it is raised as `Failed`, and says where."""
        ...


class Derived:
    """A view or replica of a service: given the entries of one log, in order, it commits them with its place.

    What it is given is queued, up to a bound, and written in a thread, many entries a transaction; a quiet log is
    written at once. `failed` is done when it stopped.
    """

    bodies = True

    def __init__(self, shape: Shape, service: str, log: Log, folder: Path, clock: Clock) -> None:
        self.shape, self.name, self.wants = shape, shape.name, shape.wants
        self._service, self._log, self._clock = service, log, clock
        self.files = Files(folder / shape.name)
        self.reading = Reading(shape.what, self.files)
        self._building = Lock(self.files.folder / "build.lock")
        self._file: DerivedFile | None = None
        self._number = 0
        self._stamp: Stamp = None
        self._target: int | None = None
        self._gap = 0
        self._queue: list[Entry] = []
        self._in_hand: list[Entry] = []
        self._upto = self._given = self._looked = self._committed = self._written = 0
        self._bell, self._room, self._moved = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(_seen)

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
        """Whether all up to a position is committed, in the file that is read."""
        return self._target is None and self._committed >= head and self._stamp == self.files.stamp()

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
            self.reading.reached(min(position, self._file.position if self._file is not None else 0))
            return True
        self.check()
        place: Any = await self.reading.fetch("select position from cauce_place")
        self.reading.reached(min(position, place[0][0]))
        return place[0][0] >= position or await self._nothing(place[0][0]) >= position

    def _is_idle(self) -> bool:
        """Whether all that it was given is committed."""
        return not (self._queue or self._in_hand or self._committed < self._gap)

    async def _nothing(self, after: int) -> int:
        """How far after a position there is nothing that it wants."""
        page = await self._log.read(filter_of([self.wants]), after=after, limit=1, bodies=False)
        return after if page.entries else page.looked

    # ------------------------------------------------------------------------------------------------------- a life

    async def open(self) -> None:
        """Find the file to go on with, or make one. Raises `Damaged` for one of another log, or ahead of this."""
        head = await self._log.head()
        while not await in_thread(self._find, head):
            # Somebody rebuilds it; what comes of that is live then.
            await self._clock.sleep(_POLL)

    def _find(self, head: int) -> bool:
        live = self.files.live()
        self._stamp, self._target = self.files.stamp(), None
        if not live:
            if self.files.numbers():
                _log.warning("%s: %s is missing: it is built anew", self.shape.what, self.files.folder / "live")
            return self._make(live=True)
        try:
            file = self._checked(DerivedFile.open(self.files.path(live)), head)
        except Unusable as error:
            _log.warning("%s: %s: it is built anew", self.shape.what, error)
            return self._make(live=True)
        if file.fingerprint == self.shape.fingerprint:
            self._use(file, live)
            self._clear()
            return True
        file.close()
        _log.info("%s has changed: it is built anew beside the old one", self.shape.what)
        if not self._beside(head):
            return False
        self._target = head
        return True

    def _beside(self, head: int) -> bool:
        """Go on with the file that was not finished, or begin one. False: another process is at it."""
        if not self._building.take():
            return False
        live = self.files.live()
        for number in reversed([each for each in self.files.numbers() if each > live]):
            try:
                file = self._checked(DerivedFile.open(self.files.path(number)), head)
            except (Unusable, Damaged) as error:
                _log.warning("%s: %s: that build begins again", self.shape.what, error)
            else:
                if file.fingerprint == self.shape.fingerprint:
                    self._use(file, number)
                    return True
                file.close()
            self.files.remove([number])
        return self._make(live=False)

    def _make(self, *, live: bool) -> bool:
        if not self._building.take():
            return False
        number = max([self.files.live(), *self.files.numbers(), 0]) + 1
        path, shape = self.files.path(number), self.shape
        self._use(DerivedFile.create(path, shape.schema, self._log.id, shape.fingerprint), number)
        if live:
            self._switch()
        return True

    def _use(self, file: DerivedFile, number: int) -> None:
        if self._file is not None:
            with suppress(apsw.Error):
                # It may be broken, and is not needed any more.
                self._file.close()
        self._file, self._number = file, number
        self._committed = self._written = file.position
        self._given, self._looked = max(self._given, file.position), max(self._looked, file.position)

    def _switch(self) -> None:
        """What was built is what is read from now on."""
        self.files.switch(self._number)
        self._stamp, self._target = self.files.stamp(), None
        self._building.release()
        self._clear()

    def _clear(self) -> None:
        self.files.remove([number for number in self.files.numbers() if number < self._number])

    def _checked(self, file: DerivedFile, head: int) -> DerivedFile:
        cure = (
            f"run cauce rebuild {self._service} {self.name}, or remove the folder {self.files.folder} to build it anew"
        )
        if file.log != self._log.id:
            file.close()
            raise Damaged(f"{file.path} was built from log {file.log}, this one is {self._log.id} (restored?): {cure}")
        if file.position > head:
            file.close()
            raise Damaged(
                f"{file.path} was built up to position {file.position}, the log ends at {head}: entries are lost; restore a newer backup, or {cure}"
            )
        return file

    async def close(self) -> None:
        """Write what was given and the place, and let go."""
        try:
            await self._stop()
        except Exception as error:
            _log.warning("%s: what it read last is read again: %s", self.shape.what, error)
        self.reading.close()
        self._building.release()
        if self._file is not None:
            self._file.close()
            self._file = None

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
            await self._follow()
            if self._committed < self._gap:
                if last:
                    return
                await self._reach()
            await self._commit_all(last=last)
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

    async def _commit_all(self, *, last: bool) -> None:
        if not self._in_hand:
            self._in_hand, self._queue = self._queue, []
            self._upto = max(self._looked, self._in_hand[-1].position if self._in_hand else 0)
            self._room.set()
        upto = self._upto
        while self._in_hand:
            await self._commit(upto)
        if upto - self._written >= _RARELY or (last and upto > self._written):
            await in_thread(self._write, [], upto)
        self._committed = max(self._committed, upto)

    async def _commit(self, looked: int) -> None:
        """Write a part of what is in hand, as much as is done in time."""
        file = self._file
        assert file is not None
        if self._in_hand[0].position <= file.position:
            # Who was told to stop did not see how the thread ended: what is committed is not written a second time.
            self._in_hand = [entry for entry in self._in_hand if entry.position > file.position]
            if not self._in_hand:
                return
        try:
            ready = await self.shape.ready(self._in_hand, self.reading.fetch)
            done = await in_thread(self._write, ready, looked)
        except (apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError) as error:
            raise Unusable(str(error)) from error
        except apsw.Error as error:
            told = translate(error, file.path)
            if isinstance(told, Unavailable):
                raise told from error
            if isinstance(error, apsw.IOError):
                raise Unusable(str(error)) from error
            await self._one_by_one()
            return
        except (Unavailable, Damaged):
            raise
        except Exception:
            await self._one_by_one()
            return
        del self._in_hand[:done]
        if self._in_hand:
            self._committed = max(self._committed, file.position)
            self._moved.set()

    def _write(self, ready: Sequence[Any], looked: int) -> int:
        """In the thread: one transaction. How many of them are in it."""
        file = self._file
        assert file is not None
        done, until = 0, self._clock.monotonic() + _LONGEST

        def change() -> int | None:
            nonlocal done
            while done < len(ready):
                chunk = ready[done : done + _CHUNK]
                self.shape.apply(file.connection, chunk)
                done += len(chunk)
                if done < len(ready) and self._clock.monotonic() > until:
                    return self._in_hand[done - 1].position
            return None

        self._written = file.write(looked, change)
        return done

    async def _one_by_one(self) -> None:
        """Something in it is wrong: what stands before that is committed, then it is raised."""
        file = self._file
        assert file is not None
        while self._in_hand:
            entry = self._in_hand[0]
            (ready,) = await self.shape.ready([entry], self.reading.fetch)
            try:
                self._written = await in_thread(
                    file.write, entry.position, partial(self.shape.apply_one, file.connection, ready)
                )
            except apsw.Error as error:
                raise translate(error, file.path) from error
            self._committed = max(self._committed, entry.position)
            del self._in_hand[0]

    async def _follow(self) -> None:
        """Go on with another file, if somebody has switched."""
        if self._target is not None or self.files.stamp() == self._stamp:
            return
        number = self.files.live()
        if not number:
            raise Unusable(f"{self.files.folder / 'live'} is missing")
        file = self._checked(await in_thread(DerivedFile.open, self.files.path(number)), await self._log.head())
        _log.info("%s goes on with %s", self.shape.what, file.path)
        self._gap = max(self._gap, self._committed)
        self._use(file, number)
        self._stamp = self.files.stamp()
        self._clear()

    async def _anew(self, error: Unusable) -> None:
        """Begin another file, because the one in use is gone or broken."""
        _log.warning("%s: %s: it is built anew", self.shape.what, error)
        self._gap = max(self._gap, self._committed)
        while not await in_thread(self._make_live):
            await self._clock.sleep(_POLL)

    def _make_live(self) -> bool:
        return self._make(live=True)

    async def _reach(self) -> None:
        """Read by itself what the new file lacks of what the old one held; what was given comes after that."""
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
            await in_thread(self._write, [], self._committed)
        try:
            await in_thread(self._switch)
        except OSError as error:
            raise Unavailable(f"{self.files.folder} cannot be written: {error}") from None
        _log.info("%s is built: %s is live", self.shape.what, self.files.path(self._number))

    # ------------------------------------------------------------------------------------------------------- rebuild

    async def rebuild(self, told: Told) -> int:
        """Build a new file beside the live one, or go on with one that was not finished, and switch. Effects stay off.

        Parameters:
            told: is told position, head, and how many entries were read.

        Returns that number. Raises `Busy` if it is being built already.
        """
        if not await in_thread(self._beside, await self._log.head()):
            raise Busy(f"{self.shape.what} is being built by another process: wait until that is done, or stop it")
        # Only when it writes no more it goes live: from then on that is for who leads to do.
        self._target = sys.maxsize
        entries = await feed(self._log, [self], self._clock, told)
        # What somebody has read must not be gone again: nothing new comes into the old file until the new one has all.
        old = await in_thread(self._hold_live)
        try:
            entries += await feed(self._log, [self], self._clock, told)
            while self._committed < self._looked:
                await self.moved()
            await self._stop()
            self.check()
            await in_thread(self._switch)
        finally:
            if old is not None:
                old.close()
        return entries

    def _hold_live(self) -> DerivedFile | None:
        """The live file, kept from being written until it is closed; None if there is none that is of use."""
        with suppress(Unusable):
            file = DerivedFile.open(self.files.path(self.files.live()))
            try:
                file.connection.execute("begin immediate")
            except apsw.Error as error:
                file.close()
                raise translate(error, file.path) from error
            return file
        return None

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


def schema_of(entry: Entry) -> int:
    """The schema version of a body. Most envelopes do not name it, and need not be decoded for it."""
    return entry.meta.schema if b'"schema":' in entry.raw else 1


def _seen(failed: asyncio.Future[None]) -> None:
    """It was told of when it stopped."""
    if not failed.cancelled():
        failed.exception()
