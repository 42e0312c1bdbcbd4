"""What one reader of a log wants and has not passed, counted entry by entry, by its places.

What was counted is remembered as positions, so that a second look costs what came and went since, not all again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping

from cauce.accept import SLOTS, slot_of
from cauce.clock import Clock
from cauce.codec import Entry, time_in
from cauce.log import Filter, Log, filter_of
from cauce.store import Pending
from cauce.takes import Reads

__all__ = ["WHOLE", "Backlog", "Spot", "WentBack"]

_PAGE = 5_000

WHOLE = ("", -1)
"""The one lane of a view or replica, which has one place for all."""

Spot = tuple[str, int]
"""A domain and a slot."""


class WentBack(Exception):
    """A place went back: what was counted says nothing any more."""


class _Lane:
    """What one reader wants in one slot of one domain and has not passed, by position, and where it stands."""

    __slots__ = ("first", "place", "positions")

    def __init__(self, place: int) -> None:
        self.first = self.place = place
        self.positions = array("q")


class Backlog:
    """What is known of one reader between two looks."""

    def __init__(self, reads: Reads, log: Log) -> None:
        self.reads, self.log = reads, log
        self.wants = {domain: frozenset(types) for domain, types in reads.wants.items()}
        self.filter = filter_of([self.wants])
        self.lanes: dict[Spot, _Lane] = {}
        self.looked, self.beyond = 0, 0
        self.passed = self.held = 0
        # Where only the last of each stream is kept, what is counted may move.
        self._at: dict[str, int] | None = {} if reads.log == "records" else None
        self._times: dict[int, int] = {}

    def begin(self, places: Mapping[Spot, int], head: int) -> None:
        """Count from these places on. Where it has none it begins at the first entry, or with what comes."""
        self.beyond = head if self.reads.now else 0
        self.lanes = {spot: _Lane(place) for spot, place in places.items()}
        whole = WHOLE in places or len(places) == SLOTS * len(self.wants)
        self.looked = min((*places.values(), *(() if whole else (self.beyond,))))

    async def count(self, upto: int, most: int, until: float, clock: Clock) -> None:
        """Look at what comes, to a position or beyond, or until there is no room or no time."""
        while self.looked < upto and self.held < most and clock.monotonic() < until:
            page = await self.log.read(self.filter, after=self.looked, limit=_PAGE, bodies=False)
            for entry in page.entries:
                domain, _, key = entry.stream.partition("/")
                types = self.wants.get(domain)
                if types is not None and (not types or entry.type in types):
                    self._meet(entry, (domain, slot_of(key)))
            if page.looked <= self.looked:
                return
            self.looked = page.looked

    def _meet(self, entry: Entry, spot: Spot) -> None:
        lane = self.lanes.get(WHOLE) or self.lanes.get(spot)
        if lane is None:
            lane = self.lanes[spot] = _Lane(self.beyond)
        if self._at is not None:
            self._forget(lane, self._at.get(entry.stream, 0))
            self._at[entry.stream] = entry.position
        if entry.position > lane.place:
            lane.positions.append(entry.position)
            self.held += 1
        elif entry.position > lane.first:
            self.passed += 1

    def _forget(self, lane: _Lane, position: int) -> None:
        index = bisect_left(lane.positions, position)
        if index < len(lane.positions) and lane.positions[index] == position:
            del lane.positions[index]
            self.held -= 1

    def move(self, places: Mapping[Spot, int]) -> None:
        """It stands here now. Raises `WentBack`."""
        for spot, place in places.items():
            lane = self.lanes.get(spot)
            if lane is None:
                lane = self.lanes[spot] = _Lane(self.beyond)
            if place < lane.place:
                raise WentBack
            done = bisect_right(lane.positions, place)
            del lane.positions[:done]
            lane.place = place
            self.passed += done
            self.held -= done

    async def oldest(self, pending: Pending | None) -> int | None:
        """When what was said that is not handled yet and was said first; None: nothing waits."""
        found = list[int]()
        firsts = [lane.positions[0] for lane in self.lanes.values() if lane.positions]
        if firsts:
            found += await self._time(self.filter, min(firsts))
        if pending is not None and pending.position:
            found += await self._time(Filter(pending.stream), pending.position)
        self._times = {position: time for position, time in self._times.items() if time in found}
        return min(found, default=None)

    async def _time(self, filter: Filter, position: int) -> list[int]:
        if position not in self._times:
            page = await self.log.read(filter, after=position - 1, limit=1, bodies=False)
            if not page.entries:
                return []
            self._times[position] = time_in(page.entries[0].raw)
        return [self._times[position]]
