"""What is told of the past: a change of a thing, and how changes and things travel from their owner, page by page."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, TypeVar

import msgspec

from cauce.codec import micros
from cauce.errors import Refused
from cauce.messages import Record, declared
from cauce.schema import Schema, encode

__all__ = ["Change", "Changes", "Standing", "Stood", "Told", "check_count", "moment_or_version", "stood_as"]

R = TypeVar("R", bound=Record)

_MOST = 2**63


class Change(msgspec.Struct, Generic[R], frozen=True):
    """What one fact changed of a thing: which fact it was, whose wish made it, what stood before and after.

    `time` is the event's own, `event` and `wish` are the names that these types have today. `wish` is the command that
    was decided, empty where none was: of an import, or of an event that a reaction returned. `causation` is its id.
    `before` is None where nothing stood, `after` where nothing stands any more.
    """

    version: int
    position: int
    time: datetime
    event: str
    id: str
    by: str
    wish: str
    causation: str
    correlation: str
    before: R | None
    after: R | None

    @property
    def fields(self) -> dict[str, tuple[object, object]]:
        """The fields that differ, each with its value before and after; None where there was no record to have it."""
        names = dict.fromkeys(
            name for record in (self.before, self.after) if record is not None for name in _names(record)
        )
        both = {name: (getattr(self.before, name, None), getattr(self.after, name, None)) for name in names}
        return {name: (before, after) for name, (before, after) in both.items() if before != after}


class Stood(msgspec.Struct, frozen=True):
    """A record that stood: the name and version of its type, and its body."""

    record: str
    schema: int
    body: msgspec.Raw


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change as its owner tells it.

    `time` is in microseconds since 1970. What stood before is what the change before it says.
    """

    version: int
    position: int
    time: int
    event: str
    id: str
    by: str = ""
    wish: str = ""
    causation: str = ""
    correlation: str = ""
    after: Stood | None = None


class Changes(msgspec.Struct, frozen=True, omit_defaults=True):
    """Changes of one thing, in the order of their versions. `more`: there are later ones."""

    told: list[Told]
    more: bool = False


class Standing(msgspec.Struct, frozen=True):
    """Things of one domain, in the order of their first facts, as all of them stood at position `upto`.

    `looked`: the first facts up to this position have been looked at; go on from there until it is `upto`.
    """

    stood: list[Stood]
    looked: int
    upto: int


def stood_as(schema: Schema, asked: str, state: Record | None) -> Stood | None:
    """How a record is told to who asked for one by this name: an earlier name of it, or that of another record."""
    if state is None:
        return None
    kind = declared(state)
    name = asked if schema.today(kind.domain.name, asked) == kind.name else kind.name
    return Stood(name, kind.version, msgspec.Raw(encode(state)))


def moment_or_version(at: object) -> tuple[int | None, int | None]:
    """A version, or a moment in microseconds since 1970, of what was given as `at`. Raises `Refused` for all else."""
    if isinstance(at, datetime):
        return None, micros(at)
    if at is None:
        return None, None
    return check_count(at, "at", "a version, 0 or more, or a datetime with a time zone"), None


def check_count(number: object, what: str, wanted: str) -> int:
    """A whole number from 0 that fits 64 bits. Raises `Refused`, saying what is wanted."""
    if type(number) is not int or not 0 <= number < _MOST:
        raise Refused(f"{what}={number!r}: pass {wanted}")
    return number


def _names(record: Record) -> tuple[str, ...]:
    names: tuple[str, ...] = type(record).__struct_fields__  # type: ignore[attr-defined]
    return names
