"""`cauce show`: the story of one thing."""

from __future__ import annotations

import asyncio
import unicodedata

import click
import msgspec

from cauce.cli.entries import body_of, cloudevent, local_time
from cauce.cli.place import as_json, bus, log_option, reading
from cauce.cli.text import one_line, write
from cauce.codec import Entry
from cauce.errors import Gone
from cauce.log import Filter, Log, entries_of

__all__ = ["show"]


@click.command()
@click.argument("stream")
@bus
@as_json
@log_option
def show(stream: str, url: str, as_json: bool, log: str) -> None:
    """Print all entries of STREAM, such as users/42, with bodies, and who caused them by what.

    With --json each is one CloudEvents object on one line.
    """
    # As keys are stored, whatever form a keyboard or a file system gives them.
    stream = unicodedata.normalize("NFC", stream)
    asyncio.run(_show(stream, url, as_json, log))


async def _show(stream: str, url: str, as_json: bool, name: str) -> None:
    async with reading(url) as logs:
        log: Log = getattr(logs, name)
        number = 0
        async for entry in entries_of(log, Filter(stream)):
            number += 1
            if as_json:
                write(cloudevent(entry))
            else:
                _tell(entry)
    if not number:
        raise Gone(f"{stream} has no entries among the {name}: look for its name with cauce tail, or try another --log")
    if not as_json:
        click.secho(f"{one_line(stream)}: {number} {'entry' if number == 1 else 'entries'} in {name}", dim=True)


def _tell(entry: Entry) -> None:
    entry.checked()
    meta = entry.meta
    click.echo(click.style(f"{entry.version:>4}  ", fg="cyan") + click.style(one_line(entry.type), bold=True))
    said = {
        "time": local_time(entry), "by": meta.by, "id": entry.id, "caused by": meta.causation,
        "correlation": meta.correlation, "verdict": meta.verdict, "trace": meta.trace,
        "position": str(entry.position), "schema": str(meta.schema) if meta.schema > 1 else "",
    }  # fmt: skip
    for name, value in said.items():
        if value:
            click.echo(click.style(f"      {name:<12}", dim=True) + one_line(value))
    if entry.wish is not None:
        click.echo(click.style(f"      {'wish':<12}", dim=True) + one_line(entry.wish.decode(errors="replace")))
    for line in _pretty(entry):
        click.echo(f"      {line}")
    click.echo()


def _pretty(entry: Entry) -> list[str]:
    if not entry.body:
        return [body_of(entry)]
    return [one_line(line) for line in msgspec.json.format(entry.body, indent=2).decode(errors="replace").split("\n")]
