"""Undo: facts that take a thing back, and never a fact less. The owner decides which, from the facts since then.

If each fact has an inverse (`service.invert`), these are recorded, the newest first; else one `Restored` that carries
the earlier record, if everybody who heard of the facts hears of it, too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from cauce.accept import APPEND_ENTRIES, ENTRY_BYTES
from cauce.codec import Entry, moment
from cauce.errors import Refused
from cauce.fold import Folder, messages_of
from cauce.folded import Folded
from cauce.log import Filter, Log, entries_of
from cauce.messages import Declared, Event, Message, Record, declared
from cauce.past import Stood
from cauce.restored import Restored, restored
from cauce.takes import check_told
from cauce.undone import UNDO, Asked, ToldUndo, Undo

__all__ = ["Invert", "Undoing", "part", "told"]

Invert = Callable[[Any, Any], Any]

_READ = 511
_BYTES = ENTRY_BYTES
"""Bytes that are told at once: nothing is larger than an entry."""

_encode = msgspec.json.Encoder().encode
_decode_undo = msgspec.json.Decoder(Undo).decode


class Undoing:
    """What one owner of a domain can undo.

    Parameters:
        inverses: by event class the function that makes of (what stood before, the event) the facts that undo it.
    """

    def __init__(self, folder: Folder, inverses: Mapping[type[Message], Invert], facts: Log) -> None:
        self._folder, self._inverses, self._facts = folder, inverses, facts

    async def plan(self, record: type[Record], key: str, stands: Folded, asked: Asked) -> list[Event]:
        """The facts that undo what is asked of a thing that stands so by the log; none: nothing is left to undo.

        Parameters:
            record: of which kind the record is where nothing stood then.

        Raises `Refused`, with the reason, for what cannot be undone; and what an inverse raises.
        """
        stream = f"{self._folder.domain}/{key}"
        if asked.expect is not None and asked.expect != stands.version:
            raise Refused(
                f"{stream} went on from version {asked.expect} to {stands.version} meanwhile: look at it, and undo what is to be undone then"
            )
        to, wanted = await self._wanted(stream, stands, asked)
        then = await self._folder.fold(self._facts, key, at_version=to)
        is_tail = len(wanted) == stands.version - to
        types, inverses, missing, behind = (
            dict[str, frozenset[str]](),
            list[list[Event]](),
            dict[str, None](),
            list[Entry](),
        )
        async with aclosing(self._since(stream, then, stands.version)) as facts:
            async for entry, event, before in facts:
                if entry.version not in wanted:
                    behind.append(entry)
                    continue
                kind = _reversible(entry, event)
                types[kind.name] = kind.names
                invert = self._inverses.get(type(event))
                if invert is None:
                    missing[kind.name] = None
                elif not missing:
                    inverses.append(self._inverted(invert, before, event))
        if is_tail and then.state == stands.state:
            return []
        if not missing:
            return _joined(stream, inverses)
        if not is_tail:
            raise Refused(
                f"{stream} went on with {', '.join(_named(each) for each in behind[:3])}{' …' if len(behind) > 3 else ''}, so what was before it is undone "
                f"by inverses only: declare one with @service.invert for {', '.join(missing)}, or undo with to={to}, which takes back all of it"
            )
        stood: type[Record] = record if then.state is None else type(then.state)
        name = declared(Restored[stood]).name  # type: ignore[valid-type]
        await check_told(self._facts, self._folder.domain, types, name, asked.without)
        return [restored(stood, key, then.state, to)]

    async def _wanted(self, stream: str, stands: Folded, asked: Asked) -> tuple[int, Collection[int]]:
        """The version before what is to be undone, and the versions that are."""
        undo, version = asked.undo, stands.version
        if undo.correlation is not None:
            wanted = await self._of(stream, undo.correlation, version)
            return wanted[0] - 1, wanted
        to = undo.to if undo.to is not None else version - (undo.steps or 0)
        if to == version:
            raise Refused(f"{stream} is at version {version}, so there is nothing to undo: name an earlier version")
        if not 0 <= to < version:
            raise Refused(
                f"{stream} has {version} {'version' if version == 1 else 'versions'}, there was never a {to}: name one that was"
                if undo.to is not None
                else f"{stream} has {version} {'fact' if version == 1 else 'facts'}: {undo.steps} steps back there was nothing"
            )
        return to, range(to + 1, version + 1)

    async def _of(self, stream: str, correlation: str, upto: int) -> list[int]:
        """The facts of a correlation, without those that an undo took back: twice would be once too often."""
        found, by = list[int](), 0
        async for entry in entries_of(self._facts, Filter(stream)):
            left = _left(found, entry, correlation)
            found, by = (found, by) if len(left) == len(found) else (left, entry.version)
            if entry.correlation == correlation and entry.version <= upto:
                found.append(entry.version)
        if not found and by:
            raise Refused(
                f"{stream} had its facts with correlation {correlation} taken back by version {by} already: to undo that, or to go back further, say to="
            )
        if not found:
            raise Refused(f"{stream} has no facts with correlation {correlation}: see its history")
        return found

    async def _since(
        self, stream: str, then: Folded, upto: int
    ) -> AsyncGenerator[tuple[Entry, Event, Record | None], None]:
        """The facts behind what stood then, each with what stood before it."""
        folded, looked = then, then.position
        while folded.version < upto:
            page = await self._facts.read(Filter(stream), after=looked, limit=_READ)
            for entry in page.entries:
                if folded.version == upto:
                    return
                yield entry, self._folder.event(entry.checked()), folded.state
                folded = self._folder.over(folded, [entry])
            looked = page.looked

    def _inverted(self, invert: Invert, before: Record | None, event: Event) -> list[Event]:
        name = getattr(invert, "__name__", "invert")
        made = messages_of(invert(before, event), name, "events, or None")
        for each in made:
            if not isinstance(each, Event):
                raise Refused(f"{name} returned {each!r}: return events, or None")
        return made


def told(
    entries: Sequence[Entry], stands: Folded, before: Stood | None, after: Stood | None, *, changed: bool
) -> ToldUndo:
    """What is told of an undo by these facts.

    Parameters:
        stands: whose version and position the asker is told.
    """
    facts = ({"type": entry.type, "body": msgspec.Raw(entry.body or b"{}")} for entry in entries)
    parts = [msgspec.Raw(_encode(each)) for each in (before, after, *facts)]
    return ToldUndo(stands.version, stands.position, changed, parts)


def part(told: ToldUndo, since: int) -> ToldUndo:
    """What is told from a part on, as much as is never too large for a wire."""
    some, size = list[msgspec.Raw](), 0
    for each in told.parts[since:]:
        size += len(bytes(each))
        if some and size > _BYTES:
            break
        some.append(each)
    return msgspec.structs.replace(told, parts=some, more=since + len(some) < len(told.parts))


def _left(versions: list[int], entry: Entry, correlation: str) -> list[int]:
    """Which facts of a correlation are not taken back by what an entry begins, if that is an undo."""
    wished = entry.wished if versions else None
    if wished is None or wished.type != UNDO:
        return versions
    try:
        undo = _decode_undo(wished.body)
    except msgspec.MsgspecError:
        return versions  # a command of the domain has that name, too
    if undo.correlation == correlation:
        return []
    to = entry.version - 1 - undo.steps if undo.steps is not None else undo.to
    return versions if to is None else [each for each in versions if each <= to]


def _joined(stream: str, inverses: list[list[Event]]) -> list[Event]:
    events = [event for each in reversed(inverses) for event in each]
    if len(events) > APPEND_ENTRIES:
        raise Refused(
            f"{stream}: {len(events)} facts would undo that, and at most {APPEND_ENTRIES} are recorded at once: undo it in parts, the last first"
        )
    return events


def _reversible(entry: Entry, event: Event) -> Declared:
    """What a fact is declared as. Raises `Refused` if nothing goes back over it."""
    kind = declared(event)
    if kind.irreversible:
        raise Refused(
            f"{_named(entry)}, of {moment(entry.meta.time).isoformat()}, is irreversible: undo what came after it, or record what makes up for it"
        )
    return kind


def _named(entry: Entry) -> str:
    return f"{entry.stream} version {entry.version} {entry.type}"
