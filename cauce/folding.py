"""What a service's functions say of one of its domains: the folder that `evolve` makes, and the rules that bind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cauce.fingerprint import code_of, fingerprint
from cauce.fold import Evolve, Folder
from cauce.messages import Domain, Message, Record, declared
from cauce.restored import Restored
from cauce.schema import Schema
from cauce.service import Bound
from cauce.tags import Rule

__all__ = ["fold_of", "rules_of"]


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


def rules_of(parts: Sequence[Bound], domain: Domain, folder: Folder) -> list[Rule]:
    """The rules of one domain. They go by what `evolve` makes, so what it does is part of what they do."""
    return [
        Rule(
            bound.name,
            domain.name,
            bound.stands[0],
            bound.part.function,
            bound.part.most,
            code_of(folder.fingerprint, bound.part.function, bound.part.most),
        )
        for bound in parts
        if bound.part.kind == "unique" and declared(bound.stands[0]).domain is domain
    ]
