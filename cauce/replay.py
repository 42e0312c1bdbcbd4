"""Samples of events through `evolve`: from nothing where it takes that, else upon a record that other samples make."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

import msgspec

from cauce.corpus import Locked
from cauce.fold import Evolve, Folder
from cauce.messages import Event, Message, Record, declared
from cauce.schema import Schema, key_of
from cauce.service import Bound, Service

__all__ = ["Failure", "Replay", "Sample"]

_MOST = 20
"""Records that an event is tried upon."""


class Sample(msgspec.Struct, frozen=True):
    """A body of a lock folder as today's code reads it: where it stands, and the message."""

    row: Locked
    number: int
    message: Message


class Failure(msgspec.Struct, frozen=True):
    """Samples of one type and version that cannot be folded, each with the reason, and by which function."""

    row: Locked
    reader: str
    samples: list[tuple[int, str]]


class Replay:
    """The folds of some services. `notes`: what could not be folded, and why."""

    def __init__(self, services: Iterable[tuple[Service, list[Bound]]], schema: Schema) -> None:
        found = [(service, bound) for service, bounds in services for bound in bounds if bound.part.kind == "evolve"]
        self._evolve = {cls: bound for _, bound in found for cls in bound.messages}
        self._names = {cls: f"evolve {service.name}.{bound.name}" for service, bound in found for cls in bound.messages}
        domains = {declared(cls).domain.name for cls in self._evolve}
        self._folders = {domain: Folder(domain, self._functions(domain), schema) for domain in domains}
        self.notes: list[str] = []

    def failures(self, samples: Sequence[Sample]) -> list[Failure]:
        """Samples of events that no start lets be folded."""
        events = [each for each in samples if type(each.message) in self._evolve]
        stood = [each.message for each in samples if isinstance(each.message, Record)]
        began = [self._step(None, each.message) for each in events if self._evolve[type(each.message)].gone]
        stood += [state for state in began if isinstance(state, Record)]
        found: dict[Locked, Failure] = {}
        for each in events:
            why = self._fold(each, stood)
            if why:
                name = self._names[type(each.message)]
                found.setdefault(each.row, Failure(each.row, name, [])).samples.append((each.number, why))
        return list(found.values())

    def _fold(self, sample: Sample, stood: Sequence[Record]) -> str:
        """Why an event cannot be folded upon anything; empty: it can, or there is nothing to fold it upon."""
        event = sample.message
        taken = self._evolve[type(event)]
        same = [_of_key(state, event) for state in stood if isinstance(state, taken.stands)]
        # One start is enough: a fold need not take what cannot have come before.
        starts: list[Record | None] = [*([None] if taken.gone else []), *same[:_MOST]]
        failures = [after for state in starts if isinstance(after := self._step(state, event), Exception)]
        if not starts:
            self.notes.append(
                f"{sample.row.name}: sample {sample.number} is not folded, for no sample makes a record that {self._names[type(event)]} could begin with"
            )
        return repr(failures[0]) if failures and len(failures) == len(starts) else ""

    def _step(self, state: Record | None, event: Message) -> Record | Exception | None:
        try:
            return self._folders[declared(event).domain.name].step(state, typing.cast("Event", event), 1)
        except Exception as error:
            return error

    def _functions(self, domain: str) -> dict[type[Message], Evolve]:
        return {cls: bound.part.function for cls, bound in self._evolve.items() if declared(cls).domain.name == domain}


def _of_key(state: Record, event: Message) -> Record:
    """The record as one of the event's own thing."""
    key = declared(state).domain.key
    return state if key is None else msgspec.structs.replace(state, **{key: key_of(event)})  # type: ignore[type-var]
