"""Records are written behind: after the facts, coalesced, so that a burst on one thing costs one write."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Sequence

from cauce.accept import slot_of
from cauce.clock import Clock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import CauceError, Damaged, Refused, Unavailable
from cauce.folded import Folded
from cauce.log import Appended, Filter, Log
from cauce.messages import declared
from cauce.schema import encode

__all__ = ["Records", "ahead", "written"]

_log = logging.getLogger("cauce")
_LONGEST_REST = 0.25
_AT_ONCE = 1_000


class Records:
    """What waits to be written to the records of one domain, and up to which facts position each slot is.

    Marks are written only when nothing waits and no thing is unsure (an append of it has an unknown outcome), so that
    who takes a slot over misses no stream.

    Parameters:
        fold: names the code that makes the records.
    """

    def __init__(self, log: Log, domain: str, clock: Clock, fold: str = "") -> None:
        self._log, self._domain, self._clock, self._fold = log, domain, clock, fold
        self.unsure: dict[str, int] = {}
        self._dirty: dict[str, tuple[Folded, bytes | None]] = {}
        self._marks: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._bell = asyncio.Event()
        self._clean = asyncio.Event()
        self._clean.set()
        self._hurry = asyncio.Event()
        self._flushing = asyncio.Lock()

    def changed(self, key: str, folded: Folded, body: bytes | None = None) -> None:
        """A fact of this thing was committed. Calls come in the order of positions.

        Parameters:
            body: the record, where it is encoded already.
        """
        before = self._dirty.get(key)
        if before is None or folded.version > before[0].version:
            self._dirty[key] = folded, body
        slot = slot_of(key)
        if folded.position > self._marks.get(slot, 0):
            self._marks[slot] = folded.position
        if before is None:
            self._clean.clear()
            self._bell.set()

    def leave(self, slots: Collection[int]) -> None:
        """Write nothing more of these slots: who takes them over begins at their marks as they are."""
        self._dirty = {key: what for key, what in self._dirty.items() if slot_of(key) not in slots}
        for slot in slots:
            self._marks.pop(slot, None)
        if not self._dirty:
            self._clean.set()

    async def settled(self) -> None:
        """Wait until nothing waits to be written, and hurry it."""
        self._hurry.set()
        await self._clean.wait()

    async def run(self) -> None:
        """Write behind, for ever.

        After each flush comes a rest ten times as long, up to a quarter of a second: what changes often is then written
        once, and many records share the pages they lie on, which halves their price under load.
        """
        while True:
            await self._bell.wait()
            self._bell.clear()
            began = self._clock.monotonic()
            try:
                await self.flush()
            except Unavailable as error:
                _log.warning("records of %s wait: %s", self._domain, error)
                self._bell.set()
                await self._clock.sleep(1.0)
            await self._rest(min(_LONGEST_REST, 10 * (self._clock.monotonic() - began)))

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def flush(self) -> None:
        """Write what waits now, then how far each slot is."""
        # Two at once: the marks of one would pass what the other has taken away and not written yet.
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        marks = (
            {}
            if self.unsure
            else {slot: mark for slot, mark in self._marks.items() if mark > self._written.get(slot, 0)}
        )
        waiting = list(dirty.items())
        try:
            for first in range(0, len(waiting), _AT_ONCE):
                await self._put_all(waiting[first : first + _AT_ONCE])
        except BaseException:
            self._dirty = dirty | self._dirty
            raise
        if not self.unsure:
            await all_of([self._mark(slot, mark) for slot, mark in marks.items()])
            self._written.update(marks)
        if not self._dirty:
            self._hurry.clear()
            self._clean.set()

    async def _put_all(self, some: Sequence[tuple[str, tuple[Folded, bytes | None]]]) -> None:
        puts = [(key, what[0].version, put) for key, what in some if (put := self._put(key, *what)) is not None]
        for (key, version, _), placed in zip(puts, await all_of([put for _, _, put in puts]), strict=True):
            if placed.version > version:
                # Nobody else writes it, so there are no facts for that. It is not gone on from, but replicas have it.
                _log.error("%s", ahead(f"{self._domain}/{key} has one of version {placed.version}", f"have {version}"))

    def _put(self, key: str, folded: Folded, body: bytes | None) -> asyncio.Future[Appended] | None:
        stream = f"{self._domain}/{key}"
        try:
            return self._log.put(stream, folded.version, self._sealed(stream, folded, body))
        except Refused as error:
            # Only an evolve function that was changed since the facts makes such a record: the next start tries again.
            _log.error("%s has no record of version %d: %s", stream, folded.version, error)
            self.unsure[key] = 1
            return None

    def _sealed(self, stream: str, folded: Folded, body: bytes | None) -> Entry:
        type, schema = "Gone", 1
        if folded.state is None:
            body = b""
        else:
            kind = declared(folded.state)
            type, schema = kind.name, kind.version
            if body is None:
                body = encode(folded.state)
        # A record bears the id of the fact that made it.
        meta = Meta(self._clock.now(), schema, upto=folded.position, fold=self._fold)
        return sealed(stream, type, folded.id, meta, body)

    def _mark(self, slot: int, position: int) -> asyncio.Future[Appended]:
        stream = f"_written/{self._domain}/{slot}"
        entry = sealed(stream, "Written", self._clock.id(), Meta(self._clock.now(), upto=position), b"{}")
        return self._log.put(stream, position, entry)


async def all_of(futures: Sequence[asyncio.Future[Appended]]) -> list[Appended]:
    """Wait for many futures that are done together, which is cheaper than to gather them. Raises the first error."""
    placed, errors = list[Appended](), []
    for future in futures:
        try:
            placed.append(await future)
        except CauceError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return placed


async def written(records: Log, domain: str, slot: int) -> int:
    """The facts position up to which the records of a slot are known to be written."""
    page = await records.read(Filter(f"_written/{domain}/{slot}"), limit=1)
    return page.entries[-1].version if page.entries else 0


def ahead(records: str, facts: str) -> Damaged:
    """What is told where there are records of facts that are not there."""
    return Damaged(
        f"records are ahead of their facts: {records}, but the facts {facts}: facts were lost, or put back without their "
        "records: restore both of one backup (on NATS the stream of records may be removed instead: it is written anew), "
        "then cauce reset each service that does not start"
    )
