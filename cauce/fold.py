"""Folding: what stands is what `evolve` makes of the facts, one by one. All that a replay runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from cauce.codec import Entry, check, schema_of, time_in
from cauce.errors import CauceError, Damaged, Inconsistent, Refused, Unreadable
from cauce.folded import EMPTY, Folded
from cauce.log import Filter, Log, Page
from cauce.messages import Event, Message, Record, declared
from cauce.schema import Schema, key_of
from cauce.snapshot import Snapshots

__all__ = ["Evolve", "Folder", "messages_of"]

Evolve = Callable[[Any, Any], Record | None]

_PAGE = 2_047
"""The facts in eight chapters of a stream on SQLite: so nothing is read that lies behind the page."""
_SHORT = 48
"""Facts that are read in the time that it takes to look at a record and what came after it, on each backend."""


def messages_of(result: Any, where: str, wanted: str) -> list[Any]:
    """What a handler returned, one or several or None, as a list."""
    if result is None:
        return []
    if isinstance(result, Message):
        return [result]
    if isinstance(result, Iterable) and not isinstance(result, (str, bytes, Mapping)):
        return list(result)
    raise Refused(f"{where} returned {result!r}: return {wanted}")


class Folder:
    """The `evolve` functions of one domain.

    Parameters:
        domain: its name.
        evolve: by event class; an event without one leaves what stands as it is.
        schema: knows the domain's events and records.
        needs: events whose `evolve` takes a record, and not None.
        fingerprint: names the code by which it folds: from a record that other code made it does not go on.
    """

    def __init__(
        self,
        domain: str,
        evolve: Mapping[type[Message], Evolve],
        schema: Schema,
        needs: Collection[type[Message]] = (),
        fingerprint: str = "",
    ) -> None:
        self.domain, self._evolve, self.schema, self.fingerprint = domain, dict(evolve), schema, fingerprint
        self._snapshots = Snapshots(domain, fingerprint, schema)
        self._begin = {cls: each for cls, each in evolve.items() if cls not in needs}
        # By name: how a body in its first version is read, and its `evolve`.
        self._quick = {
            declared(cls).name: (read, self._evolve[cls]) for cls, read in schema.quick() if cls in self._evolve
        }
        self._right: set[type] = {type(None)}
        self._usual = 0.0

    def step(self, state: Record | None, event: Event, version: int) -> Record | None:
        """What stands after one more event, the one that makes this version.

        Raises what `evolve` raises, `Refused` if it returns no record, and `Inconsistent` if it needs a record, and
        there is none.
        """
        cls = type(event)
        evolve = (self._begin if state is None else self._evolve).get(cls)
        if evolve is None:
            if cls in self._evolve:
                raise self._without_start(event, version)
            return state
        after = evolve(state, event)
        if type(after) not in self._right:
            self._check(after, cls.__name__)
        return after

    def _without_start(self, event: Event, version: int) -> Inconsistent:
        name = getattr(self._evolve[type(event)], "__name__", "evolve")
        return Inconsistent(
            f"{self.domain}/{key_of(event)} version {version} is {type(event).__name__}, which {name} adds to a record, but none stands: "
            f"let {name} take None, too, or let no decider record it then"
        )

    def _check(self, after: Any, event: str) -> None:
        if not isinstance(after, Record) or declared(after).domain.name != self.domain:
            raise Refused(f"evolve for {event} returned {after!r}: return a record of {self.domain!r}, or None")
        self._right.add(type(after))

    async def fold(
        self,
        facts: Log,
        key: str,
        *,
        records: Log | None = None,
        at_version: int | None = None,
        at_time: int | None = None,
        upto: int | None = None,
    ) -> Folded:
        """How a thing stands by its facts, or stood at a version, or at a moment in microseconds since 1970.

        At a moment: after the longest beginning of the stream before the first fact later than it.

        Parameters:
            records: the written records, to go on from the thing's, if it is sound. At a moment it is of no use: an
                earlier fact may be later by its time.
            upto: only the facts up to this position, which the log has reached.
        """
        stream, head = Filter(f"{self.domain}/{key}"), await facts.head() if upto is None else upto
        folded, page = EMPTY, Page([], 0)
        if records is not None and at_time is None:
            if self._usual < _SHORT:
                page = await facts.read(stream, limit=_SHORT)
            if page.looked < head:
                folded, page = await self._from_record(facts, records, stream, page, at_version, upto)
        while True:
            wanted = _until(page.entries, at_version, at_time, upto)
            folded = self.over(folded, wanted)
            if page.looked >= head or len(wanted) < len(page.entries):
                self._usual += (folded.version - self._usual) / 8
                return folded
            page = await facts.read(stream, after=page.looked, limit=_PAGE)

    async def _from_record(
        self, facts: Log, records: Log, stream: Filter, page: Page, at_version: int | None, upto: int | None
    ) -> tuple[Folded, Page]:
        """What stands by the record of a thing, and a page of facts behind it; else nothing, and the page given."""
        before = await self._snapshots.read(records, stream)
        later = before is not None and (
            (at_version is not None and before.version > at_version) or (upto is not None and before.position > upto)
        )
        if before is not None and not later:
            # The fact that made the record is read again: only that proves that it is one of this stream.
            behind = await facts.read(stream, after=max(before.position - 1, 0), limit=_PAGE)
            if self._snapshots.follows(before, behind.entries, stream):
                return before, Page(behind.entries[1:], behind.looked)
        return EMPTY, page

    def over(self, folded: Folded, entries: Sequence[Entry]) -> Folded:
        """How a thing stands after the next facts of its stream: the hot loop, every fact that is folded passes here.

        Raises what `step` raises, and `Unreadable` and `Damaged` with position and version.
        """
        if not entries:
            return folded
        check(entries)
        state, version, quick, right = folded.state, folded.version, self._quick, self._right
        entry = entries[0]
        try:
            for entry in entries:
                version += 1
                if entry.version != version:
                    raise _gap(entry, version - 1)
                usual = quick.get(entry.type)
                if usual is None or state is None or b'"schema":' in entry.raw:
                    state = self.step(state, self.event(entry), version)
                else:
                    read, evolve = usual
                    state = evolve(state, read(entry.body or b""))
                    if type(state) not in right:
                        self._check(state, entry.type)
        except CauceError:
            raise
        except Exception as error:
            # If it was not the body, it was `evolve`.
            self.event(entry)
            error.add_note(
                f"while folding position {entry.position}: {entry.stream} version {entry.version}, {entry.type}"
            )
            raise
        return Folded(state, version, entry.position, entry.id)

    def event(self, entry: Entry) -> Event:
        """The fact in an entry, as it reads today. Raises `Unreadable`, with position and version."""
        try:
            event = self.schema.decode(entry.domain, entry.type, schema_of(entry), entry.body or b"")
        except Unreadable as error:
            raise Unreadable(f"position {entry.position} ({entry.stream} version {entry.version}): {error}") from error
        return cast("Event", event)


def _gap(entry: Entry, version: int) -> Damaged:
    return Damaged(
        f"{entry.stream} goes from version {version} to {entry.version} at position {entry.position}: run cauce verify"
    )


def _until(entries: list[Entry], at_version: int | None, at_time: int | None, upto: int | None) -> list[Entry]:
    """The entries before the first that is later."""
    if upto is not None and entries and entries[-1].position > upto:
        entries = [entry for entry in entries if entry.position <= upto]
    if at_version is not None:
        return [entry for entry in entries if entry.version <= at_version]
    if at_time is not None:
        for number, entry in enumerate(entries):
            if time_in(entry.raw) > at_time:
                entry.checked()
                return entries[:number]
    return entries
