"""`cauce doctor`: is the backend set up so that the promises hold?"""

from __future__ import annotations

import asyncio
import sys
import textwrap

import click
import msgspec

from cauce.backends import examine
from cauce.backends.health import Finding, Health
from cauce.cli.endings import FOUND
from cauce.cli.place import as_json, bus
from cauce.cli.text import count, one_line, print_json
from cauce.clock import SystemClock

__all__ = ["doctor"]

_WIDTH = 100


@click.command()
@bus
@as_json
@click.pass_context
def doctor(ctx: click.Context, url: str, as_json: bool) -> None:
    """Say whether the backend of a bus is set up so that the promises hold, and if not, what to do.

    Looks at versions and settings, not at what is stored: that is `cauce verify`. Changes nothing, and runs beside
    those who write. Ends with 6 if anything was found.
    """
    health = asyncio.run(examine(url, SystemClock()))
    if as_json:
        print_json({**msgspec.to_builtins(health), "ok": health.ok})
    else:
        _tell(health)
    sys.stdout.flush()
    if not health.ok:
        ctx.exit(FOUND)


def _tell(health: Health) -> None:
    click.echo(one_line(health.bus))
    for name, is_ in health.seen.items():
        for line in _lines(f"{one_line(name):<35}  {one_line(f'{is_:,}' if isinstance(is_, int) else is_)}", "  ", 37):
            click.echo(click.style(line, dim=True))
    for finding in health.findings:
        _complain(finding)
    number = len(health.findings)
    click.echo(
        click.style(count(number, "finding"), fg="red")
        if number
        else click.style("ok", fg="green") + ": as the promises need it"
    )


def _complain(finding: Finding) -> None:
    for line in _lines(
        f"{one_line(finding.what)}: {one_line(finding.found)}, needed: {one_line(finding.needed)}", "  "
    ):
        click.echo(click.style(line, fg="red"))
    for word, text in (("at stake", finding.promise), ("cure", finding.cure)):
        for line in _lines(f"{word + ':':<9} {one_line(text)}", "    ", 10):
            click.echo(line)


def _lines(text: str, before: str, hanging: int = 2) -> list[str]:
    """The text in lines of a terminal; a path or a command is never broken."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=before, subsequent_indent=before + " " * hanging,
        break_long_words=False, break_on_hyphens=False, drop_whitespace=True,
    )  # fmt: skip
