"""The folder that a service's `evolve` functions describe."""

from __future__ import annotations

from collections.abc import Sequence

from cauce.fold import Folder
from cauce.messages import Domain, declared
from cauce.schema import Schema
from cauce.service import Bound

__all__ = ["folder_of"]


def folder_of(parts: Sequence[Bound], domain: Domain) -> Folder:
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
    return Folder(domain.name, functions, Schema(domain.messages.values()), needs)
