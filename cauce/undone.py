"""What an undo is asked for, and what is told of it."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from cauce.errors import Refused
from cauce.messages import Record
from cauce.past import check_count
from cauce.receipt import Receipt

__all__ = ["UNDO", "Fact", "ToldUndo", "Undo", "Undone", "undo_of"]

R = TypeVar("R", bound=Record)

UNDO = "Undo"
"""By what name the wish travels."""


class Fact(msgspec.Struct, frozen=True):
    """A fact by the name of its type and its body, as plain values."""

    type: str
    body: dict[str, Any]


class Undone(msgspec.Struct, Generic[R], frozen=True):
    """What an undo recorded, or would record: the facts, and what stood before them and stands after them.

    `receipt` is that of the undo; of a dry run, or where nothing was left to undo, it is one that says not `changed`.
    """

    receipt: Receipt
    facts: tuple[Fact, ...]
    before: R | None
    after: R | None


class Undo(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is to be undone of a thing: all facts behind a version, the last so many, or those of one correlation."""

    to: int | None = None
    steps: int | None = None
    correlation: str | None = None


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    """An undo as it is asked of the owner.

    `expect`: the version that was looked at. `without`: services that need not take what restores. `dry`: only tell.
    """

    undo: Undo
    expect: int | None = None
    without: tuple[str, ...] = ()
    dry: bool = False


class ToldUndo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An undo as its owner tells it.

    `parts`: what stood before and what stands after (a `Stood`, or null), then each `Fact`. `more`: there are later
    ones.
    """

    version: int
    position: int
    changed: bool
    parts: list[msgspec.Raw]
    more: bool = False


def undo_of(to: object, steps: object, correlation: object) -> Undo:
    """What is asked for, if it is one thing. Raises `Refused`, saying what is wanted."""
    if [to, steps, correlation].count(None) != 2:
        raise Refused("say what is to be undone by one of to=version, steps=number and correlation=id")
    if correlation is not None and not (isinstance(correlation, str) and correlation):
        raise Refused(f"correlation={correlation!r}: pass the id with which it all began, as a history tells it")
    if to is not None:
        return Undo(to=check_count(to, "to", "a version, 0 or more"))
    if steps is not None:
        return Undo(steps=check_count(steps, "steps", "a number of facts, 1 or more"))
    return Undo(correlation=str(correlation))
