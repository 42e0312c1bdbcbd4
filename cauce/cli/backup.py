"""`cauce backup`: a copy of a log while it is written."""

from __future__ import annotations

from pathlib import Path

import click

from cauce.backends.sqlite.upkeep import backup as copy_file
from cauce.cli.place import as_json, bus, path_of
from cauce.cli.progress import pages
from cauce.cli.signals import terminable
from cauce.cli.text import one_line, print_json
from cauce.cli.verify import entries_of
from cauce.clock import SystemClock

__all__ = ["backup"]


@click.command()
@click.argument("target")
@bus
@as_json
def backup(target: str, url: str, as_json: bool) -> None:
    """Copy a log to the new file TARGET, as it is when the copying begins, and verify the copy.

    Nobody who writes has to stop or wait. What services keep for themselves beside the log is not in it.
    """
    clock = SystemClock()
    began = clock.monotonic()
    with terminable(), pages("copying") as told:
        report = copy_file(path_of(url), Path(target), told=told)
    seconds = clock.monotonic() - began
    size = Path(target).stat().st_size
    if as_json:
        print_json(
            {
                "ok": True,
                "target": target,
                "id": report.id,
                "entries": report.entries,
                "bytes": size,
                "seconds": round(seconds, 3),
            }
        )
    else:
        click.echo(f"{one_line(target)}: {entries_of(report)}, {size} bytes, verified, in {seconds:.1f} s")
