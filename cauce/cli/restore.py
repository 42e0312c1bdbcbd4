"""`cauce restore`: a backup becomes a log again."""

from __future__ import annotations

from pathlib import Path

import click

from cauce.backends.sqlite.upkeep import restore as restore_file
from cauce.cli.place import as_json, bus, path_of
from cauce.cli.progress import pages
from cauce.cli.signals import terminable
from cauce.cli.text import one_line, print_json
from cauce.cli.verify import entries_of
from cauce.clock import SystemClock

__all__ = ["restore"]


@click.command()
@click.argument("backup")
@bus
@as_json
@click.option("--force", is_flag=True, help="Also where there is a log with entries; it is kept beside the new one.")
def restore(backup: str, url: str, as_json: bool, force: bool) -> None:
    """Verify the file BACKUP and put it where --bus points, as a log with a new id.

    The id is new so that nobody takes a place in the old log for one in it. Everybody who uses the old one has to stop
    first.
    """
    path = path_of(url)
    id = SystemClock().id()
    with terminable(), pages("copying") as told:
        report = restore_file(Path(backup), path, id, force=force, told=told)
    if as_json:
        print_json({"ok": True, "path": str(path), "id": id, "was": report.id, "entries": report.entries})
    else:
        click.echo(f"{one_line(str(path))}: {entries_of(report)}, restored as log {id}")
