"""The views and replicas that a service's functions and copies describe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from cauce.clock import Clock
from cauce.copies import Copies
from cauce.log import Log
from cauce.messages import Copy
from cauce.replica import Replica
from cauce.service import Bound, Service
from cauce.view import View

__all__ = ["copies_of", "replicas_of", "views_of"]


class _Logs(Protocol):
    facts: Log
    records: Log
    clock: Clock


def views_of(service: Service, parts: Sequence[Bound]) -> list[View]:
    """Raises `Refused` for a schema that SQLite does not take."""
    return [
        View(
            service.name,
            name,
            schema or "",
            [(bound.part.function, bound.messages) for bound in parts if bound.part.view == name],
        )
        for name, schema in service.views.items()
    ]


def replicas_of(service: Service, parts: Sequence[Bound]) -> list[Replica[Any]]:
    return [
        Replica(service.name, cast("type[Copy]", bound.part.function))
        for bound in parts
        if bound.part.kind == "replica"
    ]


def copies_of(service: Service, parts: Sequence[Bound], folder: Path, bus: _Logs) -> Copies:
    return Copies(
        service.name, folder, views_of(service, parts), replicas_of(service, parts), bus.facts, bus.records, bus.clock
    )
