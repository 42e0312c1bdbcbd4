"""`cauce rebuild`: a view or replica from the beginning of its log, beside the one that is in use."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import NamedTuple

import click

from cauce.backends import stores_at
from cauce.cli.place import as_json, bus, reading, store
from cauce.cli.progress import bar
from cauce.cli.run import find
from cauce.cli.text import count, one_line, print_json
from cauce.clock import SystemClock
from cauce.copying import replicas_of, views_of
from cauce.derived import Derived, Shape
from cauce.errors import Refused
from cauce.service import Service, bind
from cauce.store import Stores

__all__ = ["rebuild"]


@click.command()
@click.argument("service", metavar="MODULE[:SERVICE]")
@click.argument("name")
@bus
@store
@as_json
def rebuild(service: str, name: str, url: str, store: str | None, as_json: bool) -> None:
    """Build the view or replica NAME of a service anew, and let it be the live one when it has caught up.

    Runs beside the service, or while it does not run. Only view functions run, no reaction does. What was interrupted
    is gone on with.
    """
    found = asyncio.run(_rebuild(url, store, list(find(service).values()), name))
    if as_json:
        print_json(
            {
                "service": found.service, "name": name, "kind": found.kind, "entries": found.entries, "place": found.place,
                "seconds": round(found.seconds, 3), "rate": round(found.entries / max(found.seconds, 1e-6)),
            }
        )  # fmt: skip
    else:
        what = count(found.entries, "record" if found.kind == "replica" else "event")
        click.echo(f"{one_line(found.what)}: built from {what} in {found.seconds:.1f} s, and live")


class _Rebuilt(NamedTuple):
    service: str
    what: str
    kind: str
    entries: int
    place: str
    seconds: float


def _wanted(services: list[Service], name: str, stores: Stores) -> tuple[Service, Shape, bool]:
    found: list[tuple[Service, Shape, bool]] = []
    names = list[str]()
    for service in services:
        parts, shelf = bind(service), stores.shelf(service.name)
        shapes: list[tuple[Shape, bool]] = [(view, False) for view in views_of(service, parts, shelf)]
        shapes += [(replica, True) for replica in replicas_of(service, parts, shelf)]
        names += [f"{service.name} {shape.name}" for shape, _ in shapes]
        found += [(service, shape, on_records) for shape, on_records in shapes if shape.name == name]
    if not found:
        raise Refused(f"there is no view or replica {name!r} here, only: {', '.join(names) or 'none'}")
    if len(found) > 1:
        raise Refused(
            f"{name!r} is in {' and '.join(service.name for service, _, _ in found)}: name the service, as MODULE:SERVICE"
        )
    return found[0]


async def _rebuild(url: str, store: str | None, services: list[Service], name: str) -> _Rebuilt:
    clock = SystemClock()
    began = clock.monotonic()
    async with AsyncExitStack() as stack:
        logs = await stack.enter_async_context(reading(url))
        stores = logs.stores if store is None else await stack.enter_async_context(stores_at(store, clock))
        service, shape, on_records = _wanted(services, name, stores)
        shelf, log = stores.shelf(service.name), logs.records if on_records else logs.facts
        derived = Derived(shape, service.name, log, shelf, clock)
        stack.push_async_callback(derived.close)
        kind = "replica" if on_records else "view"
        with bar(f"rebuild {shape.name}", "records" if on_records else "events") as told:
            entries = await derived.rebuild(told)
        return _Rebuilt(service.name, shape.what, kind, entries, derived.place, clock.monotonic() - began)
