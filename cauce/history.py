"""Looking back: what changed of a thing and how things stood, folded from the facts by whoever has the functions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from cauce.accept import ENTRY_BYTES
from cauce.bus import Ask, Reply
from cauce.codec import Entry, Meta, micros, moment, time_in
from cauce.errors import Refused
from cauce.fold import Folder
from cauce.folded import EMPTY, Folded
from cauce.log import Filter, Log
from cauce.messages import Record
from cauce.past import Change, Changes, Standing, Stood, Told, stood_as

__all__ = ["changes", "page", "stood"]

_MOST = 2_000
"""The most changes, or things, in one page."""
_BYTES = ENTRY_BYTES
"""Bytes of a page that holds more than one: as it is of no use to split one, nothing is larger than an entry."""
_READ = 511
"""Facts that are read at once, two chapters of a stream on SQLite."""
_LOOKED = 50_000
"""Facts that are looked through or folded for one page of things: then it is given as it is, before the asker has
waited long."""
_FIRSTS = 1_000
"""Facts of a domain that are read at once, without bodies, to find the first ones."""
_AT_ONCE = 16
"""Things that are folded at once."""

_encode = msgspec.json.Encoder().encode


async def stood(
    folder: Folder,
    facts: Log,
    key: str,
    *,
    records: Log | None = None,
    at_version: int | None = None,
    at_time: int | None = None,
) -> Folded:
    """How a thing stands, or stood. As `Folder.fold`, but raises `Refused` for a version that never was."""
    folded = await folder.fold(facts, key, records=records, at_version=at_version, at_time=at_time)
    if at_version is not None and folded.version < at_version:
        has = {0: "no versions", 1: "1 version"}.get(folded.version, f"{folded.version} versions")
        raise Refused(f"{folder.domain}/{key} has {has}, there was never a {at_version}: name one that was")
    return folded


async def changes(folder: Folder, facts: Log, key: str, *, after: int = 0) -> AsyncGenerator[Change[Record], None]:
    """What each fact of a thing changed, from the first one behind a version to the last one as it is now."""
    stream, head = Filter(f"{folder.domain}/{key}"), await facts.head()
    folded, looked, wisher = EMPTY, 0, None
    while looked < head:
        read = await facts.read(stream, after=looked, limit=_READ)
        known = [entry for entry in read.entries if entry.version <= after]
        folded = folder.over(folded, known)
        wisher = next((entry for entry in reversed(known) if entry.wish is not None), wisher)
        for entry in read.entries[len(known) :]:
            before, folded = folded.state, folder.over(folded, [entry])
            # Only the first fact of an append carries the wish.
            wisher = wisher if entry.wish is None else entry
            yield _change(folder, entry, wisher, before, folded.state)
        looked = read.looked


def _change(
    folder: Folder, entry: Entry, wisher: Entry | None, before: Record | None, after: Record | None
) -> Change[Record]:
    meta = entry.meta
    return Change(
        entry.version, entry.position, moment(meta.time), folder.schema.today(folder.domain, entry.type), entry.id, meta.by,
        _wish(folder, meta, wisher), meta.causation, entry.correlation, before, after,
    )  # fmt: skip


def _wish(folder: Folder, meta: Meta, wisher: Entry | None) -> str:
    wished = None if wisher is None or wisher.meta.causation != meta.causation else wisher.wished
    return "" if wished is None else folder.schema.today(folder.domain, wished.type)


async def page(folder: Folder, facts: Log, records: Log, ask: Ask) -> Reply:
    """The next page of what was asked as `history` or `states`, never too large for a wire."""
    if ask.kind == "history":
        return Reply(body=msgspec.Raw(_encode(await _changes(folder, facts, ask))))
    return Reply(body=msgspec.Raw(_encode(await _standing(folder, facts, records, ask))))


async def _changes(folder: Folder, facts: Log, ask: Ask) -> Changes:
    told, size = list[Told](), 0
    async with aclosing(changes(folder, facts, ask.key, after=ask.since)) as all_of_them:
        try:
            async for change in all_of_them:
                each = _told(change, stood_as(folder.schema, ask.type, change.after))
                size += len(_encode(each))
                if told and (size > _BYTES or len(told) >= _MOST):
                    return Changes(told, more=True)
                told.append(each)
        except Exception:
            # What comes before a fact that cannot be folded is told; who asks on learns of it.
            if not told:
                raise
            return Changes(told, more=True)
    return Changes(told)


def _told(change: Change[Record], after: Stood | None) -> Told:
    return Told(
        change.version, change.position, micros(change.time), change.event, change.id, change.by, change.wish,
        change.causation, change.correlation, after,
    )  # fmt: skip


async def _standing(folder: Folder, facts: Log, records: Log, ask: Ask) -> Standing:
    head = await facts.head()
    upto = head if ask.upto is None else ask.upto
    if upto > head:
        raise Refused(f"the facts go up to position {head}, there was never a {upto}: name one that was")
    domain = Filter(domains=frozenset({folder.domain}))
    found, size, looked, left = list[Stood](), 0, ask.since, _LOOKED
    while looked < upto and left > 0:
        # A thing is met at its first fact, and never again: so nobody has to remember which ones were told.
        read = await facts.read(domain, after=looked, limit=_FIRSTS, bodies=False)
        firsts = [entry for entry in read.entries if entry.version == 1 and _began(entry, upto, ask.at_time)]
        for start in range(0, len(firsts), _AT_ONCE):
            some = firsts[start : start + _AT_ONCE]
            if left <= 0:
                return Standing(found, some[0].position - 1, upto)
            folded = await asyncio.gather(
                *(folder.fold(facts, entry.key, records=records, at_time=ask.at_time, upto=upto) for entry in some)
            )
            for first, each in zip(some, folded, strict=True):
                told = stood_as(folder.schema, ask.type, each.state)
                if told is None:
                    continue
                size += len(_encode(told))
                if found and (size > _BYTES or len(found) >= _MOST):
                    return Standing(found, first.position - 1, upto)
                found.append(told)
            left -= sum(each.version for each in folded)
        # Where others wrote most of the log, a look that finds little takes as long.
        looked, left = read.looked, left - max(len(read.entries), _FIRSTS)
    return Standing(found, min(looked, upto), upto)


def _began(first: Entry, upto: int, at_time: int | None) -> bool:
    return first.position <= upto and (at_time is None or time_in(first.raw) <= at_time)
