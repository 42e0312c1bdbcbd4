"""Many appends under way at once: as many as one flush can serve, in order, but never without bound."""

from __future__ import annotations

import asyncio
from array import array
from asyncio import Future
from collections import deque

from cauce.cli.intake import Intake
from cauce.clock import Clock
from cauce.codec import Entry, digest
from cauce.errors import Conflict, IdReused, Overloaded, Refused
from cauce.log import Appended, Claim, Filter, Log, entries_of

__all__ = ["Window"]

_MOST = 4096
_NONE = array("I")


class Window:
    """What becomes of the entries of one import. Whoever adds holds the claims, so nobody else writes these streams."""

    def __init__(self, facts: Log, clock: Clock, intake: Intake) -> None:
        self._facts, self._clock, self._intake = facts, clock, intake
        self._waiting: deque[tuple[int, Entry, int, Future[Appended]]] = deque()
        self._stored: dict[str, array[int]] = {}
        self.written = self.repeated = 0

    async def add(self, line: int, entry: Entry, version: int, claim: Claim) -> None:
        """Append an entry, unless it stands there already. Raises `Refused` for an earlier one that differs."""
        stored = self._stored.get(entry.stream)
        if stored is None:
            stored = self._stored[entry.stream] = await self._read(entry.stream)
        if version <= len(stored) and digest(entry, version) == stored[version - 1]:
            self.repeated += 1
            return
        if len(self._waiting) >= _MOST:
            await self.drain(_MOST // 2)
        appended = await self._append(entry, version, claim, version <= len(stored))
        self._waiting.append((line, entry, version, appended))

    async def drain(self, left: int = 0) -> None:
        """Wait until no more than so many are under way. The first that failed is raised, when all are done."""
        try:
            while len(self._waiting) > left:
                await self._done(*self._waiting.popleft())
        except BaseException:
            await asyncio.gather(*(each[3] for each in self._waiting), return_exceptions=True)
            self._waiting.clear()
            raise

    async def _read(self, stream: str) -> array[int]:
        """The digests of what stands in a stream: to compare with them costs a tenth of an append that repeats."""
        digests = array("I")
        async for entry in entries_of(self._facts, Filter(stream), bodies=False):
            digests.append(entry.digest)
        return digests or _NONE

    async def _append(self, entry: Entry, version: int, claim: Claim, repeat: bool) -> Future[Appended]:
        while True:
            try:
                return self._facts.append(entry.stream, [entry], expect=version - 1, fence=claim, repeat=repeat)
            except Overloaded:
                # The bound of the log may be in bytes, and others write, too.
                await self.drain()
                await self._clock.sleep(0.01)

    async def _done(self, line: int, entry: Entry, version: int, future: Future[Appended]) -> None:
        try:
            appended = await future
        except (Conflict, IdReused):
            raise self._differs(line, entry, version) from None
        if appended.version != version:
            raise self._differs(line, entry, version)
        if appended.repeated:
            self.repeated += 1
        else:
            self.written += 1

    def _differs(self, line: int, entry: Entry, version: int) -> Refused:
        return self._intake.refused(
            line,
            f"{entry.stream} has another version {version} in the log: a file may grow at its end, not change; "
            "mend the line, or import the file into another domain",
        )
