"""What each reader of a service wants of a log, as its functions say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from cauce.messages import Copy, Message, Record, copied, declared
from cauce.service import Bound
from cauce.takes import Reads

__all__ = ["reads_of"]


def reads_of(parts: Sequence[Bound]) -> tuple[Reads, ...]:
    """One for each reaction, view and replica, in the order of their names."""
    found, views = list[Reads](), dict[str, list[type[Message]]]()
    for bound in parts:
        part = bound.part
        if part.kind == "on" and issubclass(bound.messages[0], Record):
            found.append(Reads("on", bound.name, "records", _all_of(bound.messages), part.start == "now"))
        elif part.kind == "on":
            found.append(Reads("on", bound.name, "facts", _types_of(bound.messages), part.start == "now"))
        elif part.kind == "view":
            views.setdefault(part.view, []).extend(bound.messages)
        elif part.kind == "replica":
            copy = cast("type[Copy]", part.function)
            found.append(Reads("replica", copy.__name__, "records", _all_of([copied(copy)])))
    found += [Reads("view", name, "facts", _types_of(messages)) for name, messages in views.items()]
    return tuple(sorted(found, key=lambda each: (each.kind, each.name)))


def _all_of(messages: Iterable[type[Message]]) -> dict[str, tuple[str, ...]]:
    """Of records a deletion is wanted, too, which has a name of its own."""
    return {declared(cls).domain.name: () for cls in messages}


def _types_of(messages: Iterable[type[Message]]) -> dict[str, tuple[str, ...]]:
    found = dict[str, set[str]]()
    for cls in messages:
        kind = declared(cls)
        found.setdefault(kind.domain.name, set()).update(kind.names)
    return {domain: tuple(sorted(types)) for domain, types in sorted(found.items())}
