"""`cauce state`: how one thing stands, or stood."""

from __future__ import annotations

import asyncio
from datetime import datetime

import click
import msgspec

from cauce.cli.place import as_json, bus, reading
from cauce.cli.text import one_line, print_json
from cauce.cli.thing import exact_time, thing, version_or_time
from cauce.codec import Entry, moment
from cauce.errors import Gone
from cauce.fold import Folder
from cauce.folded import Folded
from cauce.history import stood
from cauce.log import Filter
from cauce.messages import declared
from cauce.past import moment_or_version

__all__ = ["state"]


@click.command()
@click.argument("module", metavar="MODULE[:SERVICE]")
@click.argument("stream")
@bus
@as_json
@click.option(
    "--at",
    metavar="VERSION|TIME",
    callback=version_or_time,
    help="A version, or a time such as 2026-01-31T12:30, of the local clock if it names no zone.",
)
def state(module: str, stream: str, url: str, as_json: bool, at: int | datetime | None) -> None:
    """Print how STREAM, such as users/42, stands, or stood at a version or a time.

    It is folded from the log by the functions of MODULE; the service need not run.
    """
    folder, key = thing(module, stream)
    folded, last = asyncio.run(_stood(url, folder, key, at))
    name = f"{folder.domain}/{key}"
    if folded.state is None or last is None:
        then = "does not stand" if at is None else "did not stand then"
        raise Gone(f"{name} {then}: it was deleted, or not there yet; cauce history tells what was")
    if as_json:
        print_json(
            {
                "stream": name, "version": folded.version, "position": folded.position, "time": moment(last.meta.time).isoformat(),
                "event": folder.schema.today(last.domain, last.type), "by": last.meta.by,
                "record": declared(folded.state).name, "state": folded.state,
            }
        )  # fmt: skip
        return
    by = f" by {one_line(last.meta.by)}" if last.meta.by else ""
    click.echo(
        click.style(one_line(name), bold=True)
        + click.style(f"  version {folded.version}", fg="cyan")
        + click.style(f"  {exact_time(moment(last.meta.time))}  {one_line(folder.schema.today(last.domain, last.type))}{by}", dim=True)
    )  # fmt: skip
    for line in msgspec.json.format(msgspec.json.encode(folded.state), indent=2).decode().split("\n"):
        click.echo(one_line(line))


async def _stood(url: str, folder: Folder, key: str, at: int | datetime | None) -> tuple[Folded, Entry | None]:
    """How it stood, and the fact that made it so."""
    at_version, at_time = moment_or_version(at)
    async with reading(url) as logs:
        folded = await stood(folder, logs.facts, key, at_version=at_version, at_time=at_time)
        page = await logs.facts.read(
            Filter(f"{folder.domain}/{key}"), after=max(folded.position - 1, 0), limit=1, bodies=False
        )
        return folded, page.entries[0] if page.entries else None
