"""`cauce rebuild`: a view or replica from the beginning of its log, beside the one that is in use."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import click

from cauce.backends.sqlite.file import folder_of
from cauce.cli.place import as_json, bus, path_of, reading
from cauce.cli.progress import bar
from cauce.cli.run import find
from cauce.cli.text import count, one_line, print_json
from cauce.clock import SystemClock
from cauce.copying import replicas_of, views_of
from cauce.derived import Derived, Shape
from cauce.errors import Refused
from cauce.service import Service, bind

__all__ = ["rebuild"]


@click.command()
@click.argument("service", metavar="MODULE[:SERVICE]")
@click.argument("name")
@bus
@as_json
def rebuild(service: str, name: str, url: str, as_json: bool) -> None:
    """Build the view or replica NAME of a service anew, and let it be the live one when it has caught up.

    Runs beside the service, or while it does not run. Only view functions run, no reaction does. What was interrupted
    is gone on with.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    path = path_of(url)
    owner, shape, on_records = _wanted(list(find(service).values()), name)
    clock = SystemClock()
    began = clock.monotonic()
    derived, entries = asyncio.run(_rebuild(url, folder_of(path.resolve()) / owner.name, owner, shape, on_records))
    seconds = clock.monotonic() - began
    if as_json:
        print_json(
            {
                "service": owner.name, "name": name, "kind": "replica" if on_records else "view", "entries": entries,
                "file": str(derived.files.path(derived.files.live())),
                "seconds": round(seconds, 3), "rate": round(entries / max(seconds, 1e-6)),
            }
        )  # fmt: skip
    else:
        what = count(entries, "record" if on_records else "event")
        click.echo(f"{one_line(shape.what)}: built from {what} in {seconds:.1f} s, and live")


def _wanted(services: list[Service], name: str) -> tuple[Service, Shape, bool]:
    found: list[tuple[Service, Shape, bool]] = []
    names = list[str]()
    for service in services:
        parts = bind(service)
        shapes: list[tuple[Shape, bool]] = [(view, False) for view in views_of(service, parts)]
        shapes += [(replica, True) for replica in replicas_of(service, parts)]
        names += [f"{service.name} {shape.name}" for shape, _ in shapes]
        found += [(service, shape, on_records) for shape, on_records in shapes if shape.name == name]
    if not found:
        raise Refused(f"there is no view or replica {name!r} here, only: {', '.join(names) or 'none'}")
    if len(found) > 1:
        raise Refused(
            f"{name!r} is in {' and '.join(service.name for service, _, _ in found)}: name the service, as MODULE:SERVICE"
        )
    return found[0]


async def _rebuild(url: str, folder: Path, service: Service, shape: Shape, on_records: bool) -> tuple[Derived, int]:
    async with reading(url) as logs:
        derived = Derived(
            shape, service.name, logs.records if on_records else logs.facts, folder / "views", SystemClock()
        )
        try:
            with bar(f"rebuild {shape.name}", "records" if on_records else "events") as told:
                return derived, await derived.rebuild(told)
        finally:
            await derived.close()
