"""`cauce undo`: take one thing back by facts that compensate, when they were shown and agreed to."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click
import msgspec

from cauce.bus import check_line
from cauce.cli.history import columns, told
from cauce.cli.place import as_json, bus, reading
from cauce.cli.text import count, one_line, print_json
from cauce.cli.thing import owner_of
from cauce.clock import SystemClock
from cauce.codec import moment
from cauce.errors import Refused
from cauce.folding import fold_of
from cauce.messages import Event, Record, declared
from cauce.past import Change
from cauce.runtime import connect
from cauce.schema import encode
from cauce.service import bind
from cauce.undo import Undoing
from cauce.undone import UNDO, Asked, Fact, Undo, undo_of

__all__ = ["undo"]


@click.command()
@click.argument("module", metavar="MODULE[:SERVICE]")
@click.argument("stream")
@bus
@as_json
@click.option("--to", type=int, metavar="VERSION", help="Back to this version, 0 for before the first fact.")
@click.option("--steps", type=int, metavar="NUMBER", help="So many facts back.")
@click.option("--correlation", metavar="ID", help="The facts with this correlation, as cauce show tells it.")
@click.option("--by", default="", help="Who wishes it, kept with the facts.")
@click.option("--without", multiple=True, metavar="SERVICE", help="A service that need not be told; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Only show what it would record.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def undo(
    module: str, stream: str, url: str, as_json: bool, to: int | None, steps: int | None, correlation: str | None,
    by: str, without: tuple[str, ...], dry_run: bool, yes: bool,
) -> None:  # fmt: skip
    """Take STREAM, such as users/42, back: to a version, by so many facts, or what had one correlation.

    Nothing is deleted: facts are recorded that compensate, inverses that the service declares, or one that carries what
    stood. They are shown first, made from the log by the functions of MODULE; its service must run to record them.
    """
    wanted, _ = undo_of(to, steps, correlation), check_line(by, "by")
    plan = asyncio.run(_plan(url, module, stream, wanted, by, without))
    if not as_json:
        _show(plan)
    if dry_run or not plan.changes:
        _tell(plan, as_json, changed=False)
        return
    if not yes:
        if as_json:
            raise Refused(
                "--json tells all at the end, so nobody could agree to it: look with --dry-run, and say --yes"
            )
        if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
            raise Refused("there is no terminal to ask at: look with --dry-run, and say --yes")
        click.confirm("Record this?", abort=True, err=True)
    asyncio.run(_record(url, plan, wanted, by, without))
    _tell(plan, as_json, changed=True)


class _Plan(NamedTuple):
    """What would be recorded, and the version of the thing at which that was found."""

    stream: str
    record: type[Record]
    version: int
    events: Sequence[Event]
    changes: Sequence[Change[Record]]

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(Fact(declared(each).name, msgspec.json.decode(encode(each))) for each in self.events)


async def _plan(url: str, module: str, stream: str, wanted: Undo, by: str, without: tuple[str, ...]) -> _Plan:
    service, domain, key = owner_of(module, stream)
    parts = bind(service)
    folder, name = fold_of(parts, domain), f"{domain.name}/{key}"
    inverses = {cls: bound.part.function for bound in parts if bound.part.kind == "invert" for cls in bound.messages}
    record = next((cls for cls in domain.messages.values() if issubclass(cls, Record)), None)
    if record is None:
        raise Refused(f"{domain.name} has no record, so nothing stands that could stand again")
    async with reading(url) as logs:
        stands = await folder.fold(logs.facts, key)
        events = await Undoing(folder, inverses, logs.facts).plan(
            record, key, stands, Asked(wanted, without=without, dry=True)
        )
    state, now, changes = stands.state, moment(SystemClock().now()), list[Change[Record]]()
    for version, event in enumerate(events, stands.version + 1):
        after = folder.step(state, event, version)
        changes.append(Change(version, 0, now, declared(event).name, "", by, UNDO, "", "", state, after))
        state = after
    return _Plan(name, record, stands.version, events, changes)


async def _record(url: str, plan: _Plan, wanted: Undo, by: str, without: tuple[str, ...]) -> None:
    """Have it recorded, if the owner that runs would record just what was shown: its code may be another."""
    async with connect(url) as bus:
        undo = functools.partial(
            bus.undo, plan.record, plan.stream.partition("/")[2], to=wanted.to, steps=wanted.steps,
            correlation=wanted.correlation, by=by, expect=plan.version, without=without,
        )  # fmt: skip
        would = await undo(dry_run=True)
        if would.facts != plan.facts:
            raise Refused(
                f"the service that runs would record other facts for {plan.stream} than MODULE: let both be of the same code"
            )
        await undo()


def _show(plan: _Plan) -> None:
    for change in plan.changes:
        for line in told(change, columns()):
            click.echo(line)
        click.echo()


def _tell(plan: _Plan, as_json: bool, *, changed: bool) -> None:
    if as_json:
        last = plan.changes[-1].after if plan.changes else None
        print_json(
            {
                "stream": plan.stream, "version": plan.version, "changed": changed,
                "facts": plan.facts,
                "before": plan.changes[0].before if plan.changes else None, "after": last,
            }
        )  # fmt: skip
        return
    what = f"{one_line(plan.stream)} at version {plan.version}"
    if not plan.changes:
        click.echo(f"{what}: nothing to record, it stands so already")
    elif changed:
        click.echo(f"{what}: undone by {count(len(plan.changes), 'fact')}")
    else:
        click.secho(f"{what}: {count(len(plan.changes), 'fact')} would be recorded", dim=True)
