"""Folding: what stands is what `evolve` makes of the facts, one by one. All that a replay runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from cauce.errors import CauceError, Damaged, Refused, Unreadable
from cauce.log import Filter, Log
from cauce.messages import Event, Message, Record, declared
from cauce.schema import Schema

__all__ = ["EMPTY", "Evolve", "Folded", "Folder", "messages_of"]

Evolve = Callable[[Any, Any], Record | None]


class Folded(msgspec.Struct, frozen=True, gc=False):
    """How a thing stands: its record (None: it does not stand), version, and the position and id of its last fact."""

    state: Record | None
    version: int
    position: int
    id: str


def messages_of(result: Any, where: str, wanted: str) -> list[Any]:
    """What a handler returned, one or several or None, as a list."""
    if result is None:
        return []
    if isinstance(result, Message):
        return [result]
    if isinstance(result, Iterable) and not isinstance(result, (str, bytes, Mapping)):
        return list(result)
    raise Refused(f"{where} returned {result!r}: return {wanted}")


EMPTY = Folded(None, 0, 0, "")


class Folder:
    """The `evolve` functions of one domain.

    Parameters:
        domain: its name.
        evolve: by event class; an event without one leaves what stands as it is.
        schema: knows the domain's events.
    """

    def __init__(self, domain: str, evolve: Mapping[type[Message], Evolve], schema: Schema) -> None:
        self.domain, self._evolve, self._schema = domain, dict(evolve), schema

    def step(self, state: Record | None, event: Event) -> Record | None:
        """What stands after one more event. Raises what `evolve` raises, and `Refused` if it returns no record."""
        evolve = self._evolve.get(type(event))
        if evolve is None:
            return state
        after = evolve(state, event)
        if after is not None and (not isinstance(after, Record) or declared(after).domain.name != self.domain):
            raise Refused(
                f"evolve for {type(event).__name__} returned {after!r}: return a record of {self.domain!r}, or None"
            )
        return after

    async def fold(self, facts: Log, key: str, *, at_version: int | None = None, at_time: int | None = None) -> Folded:
        """How a thing stands by its facts, or stood at a version, or at a moment in microseconds since 1970.

        At a moment: after the longest beginning of the stream before the first fact later than it.
        """
        state: Record | None = None
        version, position, id = 0, 0, ""
        stream = Filter(f"{self.domain}/{key}")
        looked, head = 0, await facts.head()
        while looked < head:
            page = await facts.read(stream, after=looked)
            for entry in page.entries:
                meta = entry.checked().meta
                if (at_version is not None and entry.version > at_version) or (
                    at_time is not None and meta.time > at_time
                ):
                    return Folded(state, version, position, id)
                if entry.version != version + 1:
                    raise Damaged(
                        f"{entry.stream} goes from version {version} to {entry.version} at position {entry.position}: run cauce verify"
                    )
                try:
                    event = self._schema.decode(entry.domain, entry.type, meta.schema, entry.body or b"")
                except Unreadable as error:
                    where = f"position {entry.position} ({entry.stream} version {entry.version})"
                    raise Unreadable(f"{where}: {error}") from error
                try:
                    state = self.step(state, event)  # type: ignore[arg-type]
                except CauceError:
                    raise
                except Exception as error:
                    error.add_note(
                        f"while folding position {entry.position}: {entry.stream} version {entry.version}, {entry.type}"
                    )
                    raise
                version, position, id = entry.version, entry.position, entry.id
            looked = page.looked
        return Folded(state, version, position, id)
