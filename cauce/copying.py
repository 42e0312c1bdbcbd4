"""The views and replicas that a service's functions and copies describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from cauce.clock import Clock
from cauce.copies import Copies
from cauce.log import Log
from cauce.messages import Copy
from cauce.replica import Replica
from cauce.service import Bound, Service
from cauce.shelf import Shelf
from cauce.sql import spoken
from cauce.view import View

__all__ = ["copies_of", "replicas_of", "views_of"]


class _Logs(Protocol):
    facts: Log
    records: Log
    clock: Clock


def views_of(service: Service, parts: Sequence[Bound], shelf: Shelf) -> list[View]:
    """Raises `Refused` for a schema that is not given for this shelf, or that it does not take."""
    views = []
    for name, tables in service.views.items():
        functions = [(bound.part.function, bound.messages) for bound in parts if bound.part.view == name]
        what = f"view {name} of {service.name}"
        view = View(service.name, name, spoken(tables or "", shelf.dialect, what), functions)
        shelf.check(what, view.schema)
        views.append(view)
    return views


def replicas_of(service: Service, parts: Sequence[Bound], shelf: Shelf) -> list[Replica[Any]]:
    return [
        Replica(service.name, cast("type[Copy]", bound.part.function), shelf.dialect)
        for bound in parts
        if bound.part.kind == "replica"
    ]


def copies_of(service: Service, parts: Sequence[Bound], shelf: Shelf, bus: _Logs) -> Copies:
    views, replicas = views_of(service, parts, shelf), replicas_of(service, parts, shelf)
    return Copies(service.name, shelf, views, replicas, bus.facts, bus.records, bus.clock)
