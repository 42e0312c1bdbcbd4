"""Reactions to records: each thing's current record to each `on` function that wants it, at least once per change."""

from __future__ import annotations

from typing import Any

import msgspec

from cauce.codec import Entry
from cauce.log import EVERYTHING, Filter, Log, Page
from cauce.messages import Message, Record, declared
from cauce.schema import Schema

__all__ = ["LastOfEach", "Superseded", "carried"]


class Superseded(Entry, frozen=True, gc=False):
    """What stands now, in the place of what was there: it comes again at its own place, so nothing is to be done."""


class LastOfEach:
    """A log that keeps only the last of each stream, for a consumer that looks again at what had to wait.

    Where a stream has moved on meanwhile, what stands there now is given as `Superseded`.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        if filter.stream is None:
            return await self._log.read(filter, after=after, limit=limit, wait=wait, bodies=bodies)
        page = await self._log.read(filter, limit=1, bodies=bodies)
        return Page([_at(after + 1, entry) for entry in page.entries], page.looked)


def _at(position: int, entry: Entry) -> Entry:
    if entry.position == position:
        return entry
    # The digest covers all but the position.
    return Superseded(position, *msgspec.structs.astuple(entry)[1:])


def carried(record: type[Message], schema: Schema, entry: Entry) -> Record | None:
    """The record in an entry; None: the thing does not stand, or stands as another kind of record."""
    meta = entry.checked().meta
    kind = declared(record)
    if not entry.body or (entry.type != kind.name and entry.type not in kind.was):
        return None
    found = schema.decode(entry.domain, entry.type, meta.schema, entry.body)
    assert isinstance(found, Record)
    return found
