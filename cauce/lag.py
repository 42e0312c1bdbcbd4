"""How far each reader of each service is behind, found in stores and logs, whether its service runs or not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

import msgspec

from cauce.backends import Kept as Bus
from cauce.backends import stores_at
from cauce.backlog import WHOLE, Backlog, Spot, WentBack
from cauce.clock import Clock
from cauce.errors import Unavailable
from cauce.shelf import Builds
from cauce.store import SAID, Outline, Pending, Stores
from cauce.takes import Reads, readers

__all__ = ["Kept", "Progress", "Seen", "Survey", "surveying"]

_MOST = 2_000_000
"""Positions of one reader that are remembered; what is beyond is not counted until some of them are passed."""

_WITHIN = 20.0
_DECIDES = "decide "
_BY_SLOT = ("on", "decide")
"""Those who set aside what fails, and have a place for each slot."""

_NO_FUNCTION = "has places here, and no function in the code that was started last"
_NOT_SAID = "was last started by code that did not say what it wants: start it once with this version"

Key = tuple[str, str, str]
"""A service, the kind of one of its readers, and its name."""


class Progress(msgspec.Struct, frozen=True):
    """How far one reader is.

    `lag` counts the entries of its log that it wants and that lie behind its places; `at_least`: there are more, which
    were not counted. `seconds` is the age of the oldest that is neither handled nor dead. `retrying`, `dead` and
    `behind` wait, as `cauce.store.Pending` says. `rate` is what it passed a second since the look before. None: not
    known, and `note` may say why.
    """

    service: str
    kind: Literal["on", "decide", "view", "replica", "outbox", "gone"]
    name: str
    log: str
    lag: int | None = None
    at_least: bool = False
    seconds: float | None = None
    retrying: int = 0
    dead: int = 0
    behind: int = 0
    rate: float | None = None
    note: str = ""


class Kept(msgspec.Struct, frozen=True):
    """What a service has said that is not in its log yet, and its timers; `due`: so many of them are over."""

    service: str
    outbox: int
    timers: int
    due: int


class Seen(msgspec.Struct, frozen=True):
    """What one look saw. `time` is in microseconds since 1970, `heads` are the last positions of the logs."""

    time: int
    heads: dict[str, int]
    services: list[Kept]
    readers: list[Progress]


class Survey:
    """Looks at how far all readers on a bus are, again and again, and changes nothing.

    Parameters:
        most: positions of one reader that are remembered: beyond them a lag is told as "at least".
        within: seconds for which is counted in one look; what is left is counted in the next.
    """

    def __init__(self, bus: Bus, stores: Stores, clock: Clock, *, most: int = _MOST, within: float = _WITHIN) -> None:
        self._logs = {"facts": bus.facts, "commands": bus.commands, "records": bus.records}
        self._stores, self._clock, self._most, self._within = stores, clock, most, within
        self._readers: dict[Key, Backlog] = {}
        self._builds: dict[tuple[str, str], Builds] = {}
        self._before: dict[Key, int] = {}
        self._looked = 0.0

    async def look(self, only: Iterable[str] = ()) -> Seen:
        """How far they are now.

        Parameters:
            only: these services; none: all.

        Raises `Refused` for a service that is not known here, and what reading raises.
        """
        heads = {name: await log.head() for name, log in self._logs.items()}
        catalogue, here = await readers(self._logs["facts"]), await self._stores.services()
        wanted = set(only)
        names = sorted(wanted or {*here, *(service for service, reads in catalogue.items() if reads)})
        until = self._clock.monotonic() + self._within
        kept, found = list[Kept](), list[Progress]()
        counted = dict[Key, int]()
        for service in names:
            if service not in here and service in catalogue:
                found += [_elsewhere(service, reads) for reads in catalogue[service]]
                continue
            outline = await self._stores.outline(service, self._clock.now())
            for reads in (*catalogue.get(service, ()), *_deciders(outline)):
                await self._count(service, reads, outline, heads, until)
            # Once more: what was counted is compared with where they stand after it.
            outline = await self._stores.outline(service, self._clock.now())
            all_reads = [*catalogue.get(service, ()), *_deciders(outline)]
            kept.append(Kept(service, outline.outbox, outline.timers, outline.due))
            for reads in all_reads:
                found.append(await self._progress(service, reads, outline, heads, until))
                if (reader := self._readers.get(_key(service, reads))) is not None:
                    counted[_key(service, reads)] = reader.passed
            found += [_said(service, each) for each in outline.pending if each.consumer == SAID]
            known = {SAID, *(each.name for each in all_reads if each.kind in _BY_SLOT)}
            found += _gone(service, outline, known, _NO_FUNCTION if service in catalogue else _NOT_SAID)
        self._before, self._looked = counted, self._clock.monotonic()
        return Seen(self._clock.now(), heads, kept, found)

    async def _count(
        self, service: str, reads: Reads, outline: Outline, heads: Mapping[str, int], until: float
    ) -> None:
        key, head = _key(service, reads), heads[reads.log]
        reader = self._readers.get(key)
        if reader is None or reader.reads != reads:
            places, note = await self._places(service, reads, outline)
            if note:
                return
            self._readers[key] = reader = Backlog(reads, self._logs[reads.log])
            reader.begin(places, head)
        await reader.count(head, self._most, until, self._clock)

    async def _progress(
        self, service: str, reads: Reads, outline: Outline, heads: Mapping[str, int], until: float
    ) -> Progress:
        key, head = _key(service, reads), heads[reads.log]
        pending = next(
            (each for each in outline.pending if each.consumer == reads.name and reads.kind in _BY_SLOT), None
        )
        waits = (0, 0, 0) if pending is None else (pending.retrying, pending.dead, pending.behind)
        places, note = await self._places(service, reads, outline)
        reader = self._readers.get(key)
        if note:
            self._readers.pop(key, None)
            return Progress(service, reads.kind, reads.name, reads.log, None, False, None, *waits, None, note)
        try:
            if reader is None:
                raise WentBack  # It had no place yet, or none that was of use, when was counted.
            reader.move(places)
        except WentBack:
            self._readers[key] = reader = Backlog(reads, self._logs[reads.log])
            reader.begin(places, head)
            await reader.count(head, self._most, until, self._clock)
        oldest = await reader.oldest(pending)
        seconds = 0.0 if oldest is None else max(0, self._clock.now() - oldest) / 1_000_000
        return Progress(
            service, reads.kind, reads.name, reads.log, reader.held, reader.looked < head, seconds, *waits,
            self._rate(key, reader), note,
        )  # fmt: skip

    def _rate(self, key: Key, reader: Backlog) -> float | None:
        before, passed = self._before.get(key), self._clock.monotonic() - self._looked
        return None if before is None or passed <= 0 else max(0, reader.passed - before) / passed

    async def _places(self, service: str, reads: Reads, outline: Outline) -> tuple[dict[Spot, int], str]:
        """Where a reader stands, and what is wrong with that."""
        log = self._logs[reads.log]
        if reads.kind in _BY_SLOT:
            mine = [each for each in outline.places if each.consumer == reads.name]
            if any(each.log != log.id for each in mine):
                return {}, f"has read another log than this one: see cauce reset {service}"
            places = {(each.domain, each.slot): each.position for each in mine if each.domain in reads.wants}
        else:
            places, note = await self._derived(service, reads)
            if note:
                return {}, note
        if max(places.values(), default=0) > await log.head():
            return {}, f"stands beyond the end of its log: see cauce reset {service}"
        return places, ""

    async def _derived(self, service: str, reads: Reads) -> tuple[dict[Spot, int], str]:
        builds = self._builds.get((service, reads.name))
        if builds is None:
            shelf = self._stores.shelf(service)
            what = f"{reads.kind} {reads.name} of {service}"
            builds = self._builds[service, reads.name] = shelf.builds(reads.name, what)
        try:
            if not await builds.live():
                return {}, "is not built yet, or lies on another machine"
            return {WHOLE: await builds.reading.position()}, ""
        except Unavailable as error:
            return {}, str(error)

    async def close(self) -> None:
        """Let go of what was opened to look."""
        for builds in self._builds.values():
            await builds.reading.close()
        self._builds.clear()


@asynccontextmanager
async def surveying(bus: Bus, store: str | None, clock: Clock) -> AsyncIterator[Survey]:
    """Looks at a bus, and at the stores there or at an address of their own."""
    async with AsyncExitStack() as stack:
        stores = bus.stores if store is None else await stack.enter_async_context(stores_at(store, clock))
        survey = Survey(bus, stores, clock)
        stack.push_async_callback(survey.close)
        yield survey


def _key(service: str, reads: Reads) -> Key:
    return service, reads.kind, reads.name


def _deciders(outline: Outline) -> list[Reads]:
    """Those who decide what was sent: their name says what they want."""
    names = sorted({each.consumer for each in outline.places if each.consumer.startswith(_DECIDES)})
    return [Reads("decide", name, "commands", {name.removeprefix(_DECIDES): ()}) for name in names]


def _said(service: str, pending: Pending) -> Progress:
    """What was said and is set aside, because its log refuses it."""
    return Progress(service, "outbox", SAID, "", retrying=pending.retrying, dead=pending.dead, behind=pending.behind)


def _gone(service: str, outline: Outline, known: set[str], note: str) -> list[Progress]:
    """Consumers that have places or waiting messages, and of which is not known what they want."""
    pending = {each.consumer: each for each in outline.pending}
    names = {each.consumer for each in outline.places} | pending.keys()
    found = list[Progress]()
    for name in sorted(names - known):
        each = pending.get(name, Pending(name))
        found.append(
            Progress(service, "gone", name, "", retrying=each.retrying, dead=each.dead, behind=each.behind, note=note)
        )
    return found


def _elsewhere(service: str, reads: Reads) -> Progress:
    note = "its service has its store elsewhere: name it with --store, on its machine"
    return Progress(service, reads.kind, reads.name, reads.log, note=note)
