"""What each reader of a service wants of a log, as its functions say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, cast

from cauce.messages import Copy, Message, Record, copied, declared
from cauce.service import Bound
from cauce.takes import Reads

__all__ = ["reads_of", "wants_of"]


def reads_of(parts: Sequence[Bound]) -> tuple[Reads, ...]:
    """One for each reaction, view and replica, in the order of their names."""
    found, views = list[Reads](), dict[str, list[type[Message]]]()
    for bound in parts:
        part = bound.part
        if part.kind == "on":
            log: Literal["facts", "records"] = "records" if issubclass(bound.messages[0], Record) else "facts"
            found.append(Reads("on", bound.name, log, wants_of(bound.messages), part.start == "now"))
        elif part.kind == "view":
            views.setdefault(part.view, []).extend(bound.messages)
        elif part.kind == "replica":
            copy = cast("type[Copy]", part.function)
            found.append(Reads("replica", copy.__name__, "records", wants_of([copied(copy)])))
    found += [Reads("view", name, "facts", wants_of(messages)) for name, messages in views.items()]
    return tuple(sorted(found, key=lambda each: (each.kind, each.name)))


def wants_of(messages: Iterable[type[Message]]) -> dict[str, tuple[str, ...]]:
    """By domain all names of the types of these; none means all."""
    found = dict[str, set[str]]()
    for cls in messages:
        kind = declared(cls)
        names = found.setdefault(kind.domain.name, set())
        if not issubclass(cls, Record):
            # Of records a deletion is wanted, too, which has a name of its own.
            names.update(kind.names)
    return {domain: tuple(sorted(types)) for domain, types in sorted(found.items())}
