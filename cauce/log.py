"""The first of the two seams: what a backend must do to hold facts, commands and records.

The words here are the contract; `cauce.conformance` is the same contract as code that runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import msgspec

from cauce.accept import APPEND_BYTES, APPEND_ENTRIES, ENTRY_BYTES, SLOTS, check_id, check_key, check_name, check_stream
from cauce.codec import Entry, time_in
from cauce.errors import Fenced, Refused

__all__ = [
    "EVERYTHING",
    "Also",
    "Appended",
    "Claim",
    "Filter",
    "Log",
    "Page",
    "check_append",
    "check_claim",
    "check_filter",
    "check_forget",
    "check_put",
    "entries_of",
    "filter_of",
    "old_of",
]


class Appended(msgspec.Struct, frozen=True, gc=False):
    """Where the last entry of an append stands. `repeated`: it stood there before, nothing was written."""

    version: int
    position: int
    repeated: bool = False


class Also(msgspec.Struct, frozen=True):
    """What an append writes to another stream of its log, and the version that one must be at, if any."""

    stream: str
    entries: Sequence[Entry]
    expect: int | None = None


class Filter(msgspec.Struct, frozen=True):
    """Which entries a reader wants; what is empty or None does not narrow."""

    stream: str | None = None
    domains: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    slots: frozenset[int] = frozenset()


EVERYTHING = Filter()

_PAGE = 1_000
"""Entries that are read at once, where all that a filter wants is read."""

_MOST = 2**63 - 2**20
"""Beyond it no fence and no beat is counted: the next ones would not fit 64 bits."""


def filter_of(wants: Iterable[Mapping[str, frozenset[str]]]) -> Filter:
    """What many readers want, each its types by domain (none means all), and perhaps more."""
    pairs = [each for one in wants for each in one.items()]
    types = frozenset[str]().union(*(types for _, types in pairs)) if all(types for _, types in pairs) else frozenset()
    return Filter(domains=frozenset(domain for domain, _ in pairs), types=types)


class Page(msgspec.Struct, frozen=True):
    """Entries in the order of their positions.

    All that the filter wants at or below `looked` is in this page or before it.
    """

    entries: list[Entry]
    looked: int


class Claim(msgspec.Struct, frozen=True):
    """Who holds a name. `fence` rises with every change of holder, `beat` with every sign of life. No owner: free."""

    name: str
    owner: str
    fence: int
    beat: int = 0


class Log(Protocol):
    """An ordered sequence of entries, the same for every reader, for ever.

    Positions are whole numbers from 1 that fit 64 bits; they rise, and may have holes. The versions of a stream count
    1, 2, 3 without holes. What may raise: `Refused`, `Conflict`, `Fenced`, `IdReused`, `NotPermitted`, `Busy`,
    `Overloaded`, `Unreachable`, `StorageFull`, `Damaged`, be it the call or the future that it returns; after each of
    them nothing was written, and the next append works. Where a server went away before it answered, `OutcomeUnknown`:
    append again with `repeat`. What is acknowledged is read at once, through every handle.

    A log keeps all, and is appended to, or the last of each stream, and is put to: the other is `Refused`.
    """

    @property
    def id(self) -> str:
        """Names this log. A restored copy gets a new one, so that places in the old one cannot be mistaken."""
        ...

    def append(
        self,
        stream: str,
        entries: Sequence[Entry],
        *,
        expect: int | None = None,
        fence: Claim | None = None,
        repeat: bool = False,
        also: Sequence[Also] = (),
    ) -> asyncio.Future[Appended]:
        """Add entries at the end of one stream, all or none. When the future is done they survive power loss.

        Appends take place in the order of the calls, and so do puts, claims, beats and releases among them. To stop
        waiting for the future does not take the append back.

        Of several things that are wrong the first is told, in this order: what no log takes (`Refused`), the `fence`,
        the `repeat` with its `IdReused`, then `expect`, then what `also` expects, in its order. So a stale holder
        learns that it is one, whatever it expects.

        Parameters:
            expect: the version the stream must be at (0: it must not be yet), else `Conflict`.
            fence: the claim under which is written; if another holds the name by now, `Fenced`.
            repeat: look first whether the stream holds the first id already. If so, and type, schema and body of all
                are the same, the first result is given again, whatever `expect` and `also` say; if they differ,
                `IdReused`.
            also: what is written to other streams, each another one, right behind these entries: with them, or not at
                all. What is told is where the last of `entries` stands. A repeat looks for those of `stream` only.
        """
        ...

    def put(self, stream: str, version: int, entry: Entry) -> asyncio.Future[Appended]:
        """Set the one entry of a stream, in a log that keeps only the last of each.

        A version newer than the stored one moves the stream to a new position at the end; any other is a no-op that
        says `repeated`. An empty body is a tombstone: it is kept and read like any other entry.
        """
        ...

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        """The next entries after a position, in one order that never changes.

        Never shows an entry while a smaller position may still appear. An empty page may come before the end of a long
        log: go on from `looked`. Where only the last is kept, a reader that has looked to P holds, for each stream,
        something at least as new as anything at or below P: it may skip versions and see repeats, never miss. What
        moves ahead of it is met at the end: it holds something of every stream once `looked` has reached the head as
        that is after the look.

        Parameters:
            after: a position, 0 for the beginning.
            limit: the most entries to give.
            wait: so many seconds to wait for the first entry that the filter wants.
            bodies: False leaves `body` and `wish` None, and does not read them.
        """
        ...

    async def claim(self, name: str, owner: str, *, over: Claim | None = None) -> Claim:
        """Become the holder of a name: the fence rises, what the former holder appends under it is refused from now on.

        Raises `Held`, with the claim that stands, unless the name is free or released, or `over` has the standing
        fence: only who watched the holder die, by that very fence, takes over. A claim that fences the streams of a
        slot is named `domain/slot`: where storage checks one condition a write, that makes two into one.
        """
        ...

    async def beat(self, claim: Claim) -> Claim:
        """A sign of life. Raises `Fenced` if another holds the name by now."""
        ...

    async def release(self, claim: Claim) -> None:
        """Let the name go; nothing happens if another holds it by now."""
        ...

    async def head(self) -> int:
        """The last position, 0 in an empty log."""
        ...

    async def forget(self, domain: str, slot: int, upto: int, before: int) -> int:
        """Remove what is decided and old from a log of commands; gives how many entries that were.

        Of this domain and slot, in their order, those at or below `upto`, up to the first that is not older than
        `before`; never the last entry of the log. Nothing else changes: positions and versions of the others stay, and
        a reader passes over what is gone as over any hole, because a log tells it apart from what is lost. A stream of
        which nothing is left begins again at version 1; an id that is gone may be given again. Where a claim is kept
        among the entries that it fences, what lies behind it may stay until the next holder.

        Parameters:
            upto: the place of the one who decides; what lies behind it is not decided yet.
            before: in microseconds since 1970, as in the envelopes.

        Raises `Refused` where all is kept for good, as facts are and the last of each stream, and for a domain or slot
        that cannot be; `Busy` while another removes.
        """
        ...


async def entries_of(
    log: Log, filter: Filter = EVERYTHING, *, after: int = 0, bodies: bool = True
) -> AsyncIterator[Entry]:
    """What the filter wants, from a position to the end as it is now."""
    head = await log.head()
    while after < head:
        page = await log.read(filter, after=after, limit=_PAGE, bodies=bodies)
        for entry in page.entries:
            if entry.position > head:
                return
            yield entry
        after = page.looked


def old_of(rows: Iterable[tuple[int, bool, bytes]], before: int) -> tuple[list[int], int, bool]:
    """What `forget` may remove of a page of a log: the positions, how far it was looked, and whether to look further.

    Parameters:
        rows: in their order the position of each entry, whether it is in the slot, and its envelope.
    """
    gone, looked, old = list[int](), 0, False
    for looked, own, raw in rows:
        old = time_in(raw) < before
        if own and not old:
            return gone, looked, False
        if own:
            gone.append(looked)
    # What is old behind one that is not was said by a clock that was wrong, and goes later.
    return gone, looked, old


# Each append asks, mostly for what it asked before.
_check_stream = lru_cache(maxsize=16_384)(check_stream)
_check_name = lru_cache(maxsize=1_024)(check_name)


def check_append(stream: str, entries: Sequence[Entry], also: Sequence[Also] = ()) -> int:
    """How many bytes an append has. Raises `Refused` for what no log takes, before anything else is looked at."""
    _check_stream(stream)
    if not 0 < len(entries) <= APPEND_ENTRIES:
        raise Refused(f"an append to {stream} of {len(entries)} entries: 1 to {APPEND_ENTRIES} are taken at once")
    size = 0
    for entry in entries:
        size += _size(stream, entry)
    if also:
        size += _size_of_others(stream, len(entries), also)
    if size > APPEND_BYTES:
        raise Refused(f"an append to {stream} of {size:,} bytes: at most {APPEND_BYTES:,}, so append it in parts")
    return size


def check_put(stream: str, version: int, entry: Entry) -> int:
    """How many bytes a put has. Raises `Refused` for what no log takes, before anything else is looked at."""
    _check_stream(stream)
    if not 0 < version < 2**63:
        raise Refused(
            f"{stream} cannot be put at version {version}: versions are whole numbers from 1 that fit 64 bits"
        )
    return _size(stream, entry)


def check_claim(claim: Claim) -> None:
    """Raises `Fenced` for a claim that no log gave, because none takes such a name or such numbers."""
    try:
        check_key(claim.name)
        possible = 0 < claim.fence < _MOST and 0 <= claim.beat < _MOST
    except Refused:
        possible = False
    if not possible:
        raise Fenced(f"no log gave the claim {claim!r:.200}: claim the name, and write under what is given")


def check_filter(filter: Filter) -> None:
    """Raises `Refused` for a filter that names what no log takes, so that nobody waits for it in vain."""
    if filter.stream is not None:
        check_stream(filter.stream)
    for type in filter.types:
        check_name(type)


def check_forget(log: str, domain: str, slot: int) -> None:
    """Raises `Refused` for a log that keeps all for good, and for a domain or slot that no log has."""
    if log != "commands":
        raise Refused(f"{log} forget nothing: only commands are removed when they are decided and old")
    check_stream(f"{domain}/-")
    if "/" in domain or slot not in range(SLOTS):
        raise Refused(f"there is no slot {slot!r} of {domain!r}: name a domain, and a slot from 0 to {SLOTS - 1}")


def _size_of_others(stream: str, count: int, also: Sequence[Also]) -> int:
    """How many bytes an append of so many entries writes to other streams."""
    seen, size = {stream}, 0
    for each in also:
        _check_stream(each.stream)
        if each.stream in seen:
            raise Refused(f"an append to {stream} also names {each.stream} a second time: name each stream once")
        if not each.entries:
            raise Refused(f"an append to {stream} also writes nothing to {each.stream}: leave that out")
        seen.add(each.stream)
        count += len(each.entries)
        size += sum(_size(each.stream, entry) for entry in each.entries)
    if count > APPEND_ENTRIES:
        raise Refused(
            f"an append to {stream} and others of {count} entries: at most {APPEND_ENTRIES} are taken at once"
        )
    return size


def _size(stream: str, entry: Entry) -> int:
    if entry.stream != stream or entry.body is None:
        raise Refused(
            f"an entry for {entry.stream!r}, or one read without its body, cannot be written to {stream!r}: seal it for that stream"
        )
    _check_name(entry.type)
    check_id(entry.id)
    size = len(entry.body) + len(entry.raw) + (0 if entry.wish is None else len(entry.wish))
    if size > ENTRY_BYTES:
        raise Refused(
            f"an entry for {stream} of {size:,} bytes: at most {ENTRY_BYTES:,}, so keep large things elsewhere"
        )
    return size
