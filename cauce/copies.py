"""All views and replicas of one service in this process: who leads, what feeds them, and how they are read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from cauce.bus import After, Receipt
from cauce.clock import Clock
from cauce.derived import Derived, feed
from cauce.errors import Damaged, Refused, Unavailable
from cauce.log import Log, Page, filter_of
from cauce.messages import Copy
from cauce.replica import Replica
from cauce.shelf import Shelf
from cauce.sql import Row
from cauce.view import View

__all__ = ["Copies"]

_log = logging.getLogger("cauce")
C = TypeVar("C", bound=Copy)
_LOOK = 1.0
_POLL = 0.05
_PAGE = 2_000
_WAIT = 5.0
_ROOM = 2.0
"""Seconds for which all wait for one that makes no room, before it is left behind."""


class _Reading:
    """One view, as handlers read it."""

    def __init__(self, derived: Derived) -> None:
        self._derived = derived

    async def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        self._derived.check()
        return await self._derived.reading.fetch(sql, tuple(params))

    async def wait(self, receipt: Receipt) -> None:
        await self._derived.wait(receipt.position)


class _Feed:
    """Reads one log once for all of many. Who makes no room reads alone, until it is where the others are."""

    def __init__(self, service: str, log: Log, many: Sequence[Derived], clock: Clock) -> None:
        self._service, self._log, self._many, self._clock = service, log, many, clock
        self._looked = min(derived.after for derived in many)
        self._alone: dict[Derived, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Feed them, for ever."""
        try:
            for derived in self._many:
                derived.start()
                derived.looked(self._looked)
            await self._read(await self._log.head())
        finally:
            for task in self._alone.values():
                task.cancel()

    async def _read(self, head: int) -> None:
        wanted = filter_of(each.wants for each in self._many)
        while True:
            # What was there before is looked through page by page, and tells after each how far that is.
            wait = _WAIT if self._looked >= head else 0.0
            try:
                page = await self._log.read(wanted, after=self._looked, limit=_PAGE, wait=wait)
            except Unavailable as error:
                _log.warning("the views and replicas of %s wait: %s", self._service, error)
                await self._clock.sleep(_LOOK)
                continue
            self._looked = page.looked
            for derived in self._many:
                if derived not in self._alone:
                    await self._give(derived, page)
            # A read does not give up the loop.
            await self._clock.sleep(0)

    async def _give(self, derived: Derived, page: Page) -> None:
        try:
            async with asyncio.timeout(_ROOM):
                await derived.take_all([entry for entry in page.entries if derived.has(entry)])
        except TimeoutError:
            _log.warning("%s is slow: the others go on without it", derived.shape.what)
            self._alone[derived] = asyncio.get_running_loop().create_task(self._catch_up(derived))
        derived.looked(page.looked)

    async def _catch_up(self, derived: Derived) -> None:
        try:
            await derived.room()
            while derived.after < self._looked:
                await feed(self._log, [derived], self._clock)
        except Exception as error:
            derived.fail(error)
        del self._alone[derived]


class Copies:
    """The views and replicas of a service, on a shelf. One process feeds them, all read them.

    Who feeds holds a lock that is free again when the process dies; the others watch, and one of them takes over.
    """

    def __init__(
        self,
        service: str,
        shelf: Shelf,
        views: Sequence[View],
        replicas: Sequence[Replica[Any]],
        facts: Log,
        records: Log,
        clock: Clock,
    ) -> None:
        self._service, self._facts, self._records, self._clock = service, facts, records, clock
        self._views = {view.name: Derived(view, service, facts, shelf, clock) for view in views}
        self._replicas = {
            replica.copy: (replica, Derived(replica, service, records, shelf, clock)) for replica in replicas
        }
        self._lead = shelf.lead
        self._readings = {name: _Reading(derived) for name, derived in self._views.items()}

    @property
    def facts_side(self) -> list[Derived]:
        return list(self._views.values())

    @property
    def records_side(self) -> list[Derived]:
        return [derived for _, derived in self._replicas.values()]

    async def start(self, fail: Callable[[BaseException], None]) -> None:
        """Return when all replicas are complete, by this process or by the one that leads.

        One that leads and does not know a view, as older code does not, is not waited for long: it is built later.
        Raises `Damaged` for a build of another log, or ahead of this one. What is found damaged later is given to
        `fail`.
        """
        for derived in (*self.facts_side, *self.records_side):
            derived.failed.add_done_callback(lambda failed: _told(failed, fail))
        head, began, told = await self._records.head(), self._clock.monotonic(), False
        while not await self._lead.take():
            if await self._complete(head, views=not told):
                return
            if not told and self._clock.monotonic() - began > _WAIT:
                told = True
                _log.warning(
                    "%s: who feeds its views and replicas has not all of them: if that is older code, stop it",
                    self._service,
                )
            await self._clock.sleep(_POLL)
        await self._open()
        if self.records_side:
            await feed(self._records, self.records_side, self._clock)
        for derived in self.records_side:
            await derived.wait(head)

    async def _complete(self, head: int, *, views: bool) -> bool:
        """Whether who leads has all builds there, or those of replicas alone, and the replicas up to the head."""
        try:
            for derived in self.facts_side if views else ():
                await derived.holds(0)
            return all([await derived.holds(head) for derived in self.records_side])
        except Unavailable:
            return False

    async def _open(self) -> None:
        for derived in (*self.facts_side, *self.records_side):
            await derived.open()

    async def run(self) -> None:
        """Feed them, for ever, as soon as this process leads."""
        while True:
            if not self._lead.held:
                await self._take_over()
            await self._feed()
            _log.warning("the views and replicas of %s may be fed by another process from now on", self._service)
            await asyncio.gather(*(derived.stop() for derived in (*self.facts_side, *self.records_side)))

    async def _take_over(self) -> None:
        while not await self._taken():
            await self._clock.sleep(_LOOK)
        _log.info("the views and replicas of %s are fed from here now", self._service)

    async def _taken(self) -> bool:
        try:
            if not await self._lead.take():
                return False
            await self._open()
        except Unavailable as error:
            _log.warning("the views and replicas of %s wait: %s", self._service, error)
            await self._lead.release()
            return False
        return True

    async def _feed(self) -> None:
        """Feed them as long as that is for this process to do."""
        sides = ((self._facts, self.facts_side), (self._records, self.records_side))
        feeds = [_Feed(self._service, log, many, self._clock).run() for log, many in sides if many]
        tasks = {asyncio.ensure_future(each) for each in (*feeds, self._lead.lost())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await asyncio.gather(*(derived.close() for derived in (*self.facts_side, *self.records_side)))
        await self._lead.release()

    # ------------------------------------------------------------------------------------------------------ reading

    def view(self, name: str) -> _Reading:
        """A view by its name."""
        found = self._readings.get(name)
        if found is None:
            raise Refused(f"service {self._service!r} has no view {name!r}, only {', '.join(self._readings) or 'none'}")
        return found

    async def get(self, copy: type[C], key: str) -> C | None:
        """The copy of one thing; None if it does not stand."""
        replica, derived = self._of(copy)
        derived.check()
        rows = await derived.reading.rows(*replica.by_key(key))
        return replica.made(rows[0]) if rows else None

    async def find(self, copy: type[C], limit: int, equals: Mapping[str, Any]) -> list[C]:
        """The copies whose fields have these values, in the order of their keys."""
        if type(limit) is not int or limit < 0:
            raise Refused(f"limit={limit!r}: pass a whole number from 0")
        replica, derived = self._of(copy)
        derived.check()
        return [replica.made(row) for row in await derived.reading.fetch(*replica.equal(equals, limit))]

    async def count(self, copy: type[Copy], equals: Mapping[str, Any]) -> int:
        """How many copies have these values."""
        replica, derived = self._of(copy)
        derived.check()
        ((number,),) = await derived.reading.fetch(*replica.number(equals))
        return int(number)

    async def passed(self, after: After) -> None:
        """Wait until all views have passed a receipt, and the replicas of its domain hold its version or a newer one.

        Raises `Unavailable` if one of them has stopped.
        """
        for derived in self.facts_side:
            await derived.wait(after.position)
        for replica, derived in self._replicas.values():
            if replica.domain == after.domain:
                await self._holds(replica, derived, after)

    async def _holds(self, replica: Replica[Any], derived: Derived, after: After) -> None:
        while after.version and after.key:
            rows = await derived.reading.rows(*replica.version_of(after.key))
            if rows and rows[0][0] >= after.version:
                return
            await derived.moved()

    async def settled_views(self) -> None:
        """Wait until all views have passed the head of the facts as it is now."""
        for derived in self.facts_side:
            await derived.settled()

    async def settled_replicas(self) -> None:
        """Wait until all replicas have passed the head of the records as it is now."""
        for derived in self.records_side:
            await derived.settled()

    def _of(self, copy: type[C]) -> tuple[Replica[C], Derived]:
        found = self._replicas.get(copy)
        if found is None:
            name = getattr(copy, "__name__", copy)
            raise Refused(f"service {self._service!r} keeps no replica {name}: say so with service.replica({name})")
        return found


def _told(failed: asyncio.Future[None], fail: Callable[[BaseException], None]) -> None:
    """A view that is wrong stops alone; a damaged log stops the service."""
    if not failed.cancelled() and isinstance(error := failed.exception(), Damaged):
        fail(error)
