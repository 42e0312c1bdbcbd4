"""`cauce tail`: the last entries of a log, and the next ones."""

from __future__ import annotations

import asyncio
import shutil
import sys
import unicodedata
from collections.abc import Callable

import click

from cauce.cli.entries import body_of, cloudevent, last, local_time
from cauce.cli.place import as_json, bus, log_option, reading
from cauce.cli.text import one_line, write
from cauce.codec import Entry
from cauce.log import Filter, Log

__all__ = ["tail"]

_WAIT = 60.0
_UNCUT = 200


@click.command()
@bus
@as_json
@log_option
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "--last", "number", default=20, show_default=True, type=click.IntRange(min=0), help="How many to begin with."
)
@click.option("--domain", "domains", multiple=True, help="Only this domain; may be given again.")
@click.option("--type", "types", multiple=True, help="Only this type; may be given again.")
@click.option("--slot", "slots", multiple=True, type=click.IntRange(0, 15), help="Only this slot; may be given again.")
@click.option("--stream", help="Only this stream, as domain/key.")
def tail(
    url: str, as_json: bool, log: str, follow: bool, number: int,
    domains: tuple[str, ...], types: tuple[str, ...], slots: tuple[int, ...], stream: str | None,
) -> None:  # fmt: skip
    """Print the last entries of a log: position, local time, stream, version, type, body.

    With --json each is one CloudEvents object on one line.
    """
    # As keys are stored, whatever form a keyboard or a file system gives them.
    stream = stream and unicodedata.normalize("NFC", stream)
    wanted = Filter(stream, frozenset(domains), frozenset(types), frozenset(slots))
    asyncio.run(_tail(url, log, wanted, number, follow, _tell_json if as_json else _tell))


async def _tail(url: str, name: str, wanted: Filter, number: int, follow: bool, tell: Callable[[Entry], None]) -> None:
    async with reading(url, follow=follow) as logs:
        log: Log = getattr(logs, name)
        found, after = await last(log, wanted, number)
        for entry in found:
            tell(entry)
        while follow:
            sys.stdout.flush()
            page = await log.read(wanted, after=after, wait=_WAIT)
            for entry in page.entries:
                tell(entry)
            after = page.looked


def _tell_json(entry: Entry) -> None:
    write(cloudevent(entry))


def _tell(entry: Entry) -> None:
    entry.checked()
    stream, type = one_line(entry.stream), one_line(entry.type)
    before = f"{entry.position:>9}  {local_time(entry)}  {stream:<24} {entry.version:>4}  {type:<24}  "
    left = shutil.get_terminal_size().columns - len(before) if sys.stdout.isatty() else _UNCUT
    body = body_of(entry)
    click.echo(
        click.style(f"{entry.position:>9}  {local_time(entry)}  ", dim=True)
        + click.style(f"{stream:<24}", fg="cyan")
        + f" {entry.version:>4}  "
        + click.style(f"{type:<24}  ", bold=True)
        + click.style(body if len(body) <= left else f"{body[: max(0, left - 1)]}…", dim=True)
    )
