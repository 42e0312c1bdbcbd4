"""The folder that a service's `evolve` functions describe."""

from __future__ import annotations

from collections.abc import Sequence

from cauce.fingerprint import fingerprint
from cauce.fold import Folder
from cauce.messages import Domain, Record, declared
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
    functions = {cls: bound.part.function for cls, bound in evolve.items()}
    needs = {cls for cls, bound in evolve.items() if not bound.gone}
    records = [cls for cls in domain.messages.values() if issubclass(cls, Record)]
    schema = Schema(domain.messages.values())
    return Folder(domain.name, functions, schema, needs, fingerprint(records, functions))
