"""The folder that a service's `evolve` functions describe. What an undo records needs none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cauce.fingerprint import fingerprint
from cauce.fold import Evolve, Folder
from cauce.messages import Domain, Message, Record, declared
from cauce.restored import Restored
from cauce.schema import Schema
from cauce.service import Bound

__all__ = ["fold_of"]


def fold_of(parts: Sequence[Bound], domain: Domain) -> Folder:
    """The `evolve` functions of one domain."""
    evolve = {
        cls: bound
        for bound in parts
        if bound.part.kind == "evolve"
        for cls in bound.messages
        if declared(cls).domain is domain
    }
    needs = {cls for cls, bound in evolve.items() if not bound.gone}
    records = [cls for cls in domain.messages.values() if issubclass(cls, Record)]
    functions: dict[type[Message], Evolve] = {Restored[record]: _stand for record in records}  # type: ignore[valid-type]
    functions |= {cls: bound.part.function for cls, bound in evolve.items()}
    schema = Schema([*domain.messages.values(), *(Restored[record] for record in records)])  # type: ignore[valid-type]
    return Folder(domain.name, functions, schema, needs, fingerprint(records, functions))


def _stand(before: Record | None, event: Restored[Any]) -> Record | None:
    return event.record
