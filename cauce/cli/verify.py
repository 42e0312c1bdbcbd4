"""`cauce verify`: is everything still what was written?"""

from __future__ import annotations

import asyncio
import sys

import click
import msgspec

from cauce.backends import read_all
from cauce.cli.endings import DAMAGED
from cauce.cli.place import as_json, bus
from cauce.cli.text import one_line, print_json
from cauce.clock import SystemClock
from cauce.verify import Report

__all__ = ["entries_of", "verify"]


@click.command()
@bus
@as_json
@click.pass_context
def verify(ctx: click.Context, url: str, as_json: bool) -> None:
    """Read all of a log and say what is not as it was written. Changes nothing, and runs beside those who write.

    Ends with 5 if anything was found.
    """
    clock = SystemClock()
    began = clock.monotonic()
    report = asyncio.run(read_all(url, clock))
    seconds = clock.monotonic() - began
    if as_json:
        print_json({**msgspec.to_builtins(report), "seconds": round(seconds, 3)})
    else:
        _tell(report, seconds)
    sys.stdout.flush()
    if not report.ok:
        ctx.exit(DAMAGED)


def _tell(report: Report, seconds: float) -> None:
    click.echo(
        f"{one_line(report.path)}: "
        + (click.style("ok", fg="green") if report.ok else click.style("damaged", fg="red"))
    )
    click.echo(f"  log {one_line(report.id)}: {entries_of(report)}, {report.streams} streams")
    click.echo(f"  read in {seconds:.1f} s, {round(sum(report.entries.values()) / max(seconds, 1e-6))} entries/s")
    for finding in report.findings:
        click.echo(click.style(f"  {finding.kind:<10}", fg="red") + one_line(finding.message))
    if report.more:
        click.echo(f"  and {report.more} more")
    if not report.ok:
        click.echo(
            "Keep what is there, stop those who write, and restore a backup: cauce restore, or the tools of its server."
        )


def entries_of(report: Report) -> str:
    """How much each log holds, in words."""
    return ", ".join(f"{number} {log}" for log, number in report.entries.items())
