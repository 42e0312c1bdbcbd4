"""Entries on the command line: reading them up to the end, or the last so many, and how each is told."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

import msgspec

from cauce.cli.text import one_line
from cauce.codec import Entry, moment, to_cloudevent
from cauce.log import Filter, Log, entries_of

__all__ = ["body_of", "cloudevent", "last", "local_time"]

_PAGE = 1000


async def last(log: Log, filter: Filter, number: int) -> tuple[list[Entry], int]:
    """The last so many entries that the filter wants, and the position up to which was looked.

    Logs are read forwards only, so this looks at a piece of the end, and at larger pieces until it holds enough.
    """
    head = await log.head()
    number = min(number, head)
    # A backend finds the entries of one stream at once, however long the log is.
    far = head if filter.stream is not None else max(4 * number, _PAGE)
    while number:
        after = max(0, head - far)
        found: deque[Entry] = deque(maxlen=number)
        async for entry in entries_of(log, filter, after=after):
            if entry.position <= head:
                found.append(entry)
        if len(found) == number or not after:
            return list(found), head
        far *= 8
    return [], head


def cloudevent(entry: Entry) -> bytes:
    """The entry as a line of JSON. Raises `Damaged` if it is not what was written."""
    return msgspec.json.encode(to_cloudevent(entry.checked()))


def local_time(entry: Entry) -> str:
    """When it happened, on the clock of whoever reads it, to the millisecond."""
    when = moment(entry.meta.time)
    # At the edges of the calendar a local time may lie in no year that there is: then it is told in UTC.
    with suppress(OverflowError, ValueError, OSError):
        when = when.astimezone()
    return when.isoformat(" ", "milliseconds")[:23]


def body_of(entry: Entry) -> str:
    """A body on one line."""
    return one_line(entry.body.decode(errors="replace")) if entry.body else "(deleted)"
