"""`cauce export`: a log as lines of JSON that any program reads."""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cauce.backends.sqlite.part import flush, move, no_room, unfinished
from cauce.cli.entries import cloudevent
from cauce.cli.place import as_json, bus, log_option, reading
from cauce.cli.signals import terminable
from cauce.cli.text import one_line, print_json, write
from cauce.errors import Refused
from cauce.log import Log, entries_of

__all__ = ["export"]


@click.command()
@bus
@as_json
@log_option
@click.option(
    "--output", metavar="FILE", help="Write to a new file, compressed if it ends in .gz, instead of standard output."
)
@click.option(
    "--all", "everything", is_flag=True, help="Also what the bus notes for itself, in domains that begin with _."
)
def export(url: str, as_json: bool, log: str, output: str | None, everything: bool) -> None:
    """Write a log, up to its end as it is now, as JSON lines: one CloudEvents object for each entry, in order.

    Each entry is checked; the first that is damaged ends it. With --output, --json prints how many were written.
    """
    if output == "":
        raise Refused("the name of the file is empty: write one behind --output")
    if output is None:
        asyncio.run(_export(url, log, everything, write))
        return
    with terminable(), _new(Path(output)) as line:
        number = asyncio.run(_export(url, log, everything, line))
    if as_json:
        print_json({"output": output, "log": log, "entries": number})
    else:
        click.echo(f"{number} {'entry' if number == 1 else 'entries'} of {log} written to {one_line(output)}")


async def _export(url: str, name: str, everything: bool, line: Callable[[bytes], None]) -> int:
    number = 0
    async with reading(url) as logs:
        log: Log = getattr(logs, name)
        async for entry in entries_of(log):
            if everything or not entry.stream.startswith("_"):
                line(cloudevent(entry))
                number += 1
    return number


@contextmanager
def _new(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A file that appears under its name when it is whole, and never in the place of another."""
    try:
        if path.exists() or path.is_symlink() or not path.name:
            raise Refused(f"{str(path)!r} exists: name another file, an export never overwrites")
        with unfinished(path) as part:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as raw:
                file = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
                yield lambda line: (file.write(line), file.write(b"\n"), None)[-1]
                file.close()
            flush(part)
            move(part, path)
    except OSError as error:
        raise no_room(error, path) from None
