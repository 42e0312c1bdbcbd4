"""`cauce reset`: after a restore, a service goes on with the log that is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import groupby
from typing import NamedTuple

import click

from cauce.backends import Look, stores_at
from cauce.cli.place import as_json, bus, reading, store
from cauce.cli.text import count, one_line, print_json
from cauce.clock import SystemClock
from cauce.errors import Busy, Refused
from cauce.reset import Logs, Move, Plan, planned
from cauce.reset import reset as reset_all
from cauce.shelf import Shelf
from cauce.store import Store

__all__ = ["reset"]


@click.command()
@click.argument("service")
@bus
@store
@as_json
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--from-first", is_flag=True, help="All is handled again, from the first entry, with all its effects.")
def reset(service: str, url: str, store: str | None, as_json: bool, yes: bool, from_first: bool) -> None:
    """Let SERVICE go on after its log was put back, or has lost its end.

    Says what would be done, asks, and does it. Places beyond the end go to the end, so nothing is handled a second
    time; views and replicas are built anew at the next start. The service has to be stopped first.
    """
    plan = asyncio.run(_look(url, store, service, from_first=from_first))
    if not as_json:
        for line in _lines(plan):
            click.echo(one_line(line))
    if plan.is_needed:
        if not yes:
            _ask(service)
        plan = asyncio.run(_do(url, store, service, from_first=from_first))
    if as_json:
        print_json(_plain(plan))
    elif plan.is_needed:
        click.echo(f"Done: start {one_line(service)} now.")


def _ask(service: str) -> None:
    """Raises `Refused` where nobody can be asked."""
    if not sys.stdin.isatty():
        raise Refused(f"nothing was done to {service}, because nobody is there to be asked: say --yes")
    if not click.confirm("Do that?", err=True):
        raise Refused(f"nothing was done to {service}")


class _Kept(NamedTuple):
    logs: Logs
    store: Store
    shelf: Shelf


@asynccontextmanager
async def _kept(url: str, at: str | None, service: str) -> AsyncIterator[_Kept]:
    """What a service keeps, and the logs that it is about. Raises `Busy` while an instance of it runs."""
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(reading(url))
        await _check_alone(bus, service)
        stores = bus.stores if at is None else await stack.enter_async_context(stores_at(at, SystemClock()))
        opened = await stores.open(service, None)
        stack.push_async_callback(opened.close)
        logs = {"facts": bus.facts, "commands": bus.commands, "records": bus.records}
        yield _Kept(logs, opened, stores.shelf(service))


async def _check_alone(bus: Look, service: str) -> None:
    for instance in await bus.instances():
        if instance.service == service:
            raise Busy(f"service {service!r} runs in process {instance.pid} ({instance.id}): stop it first")


async def _look(url: str, at: str | None, service: str, *, from_first: bool) -> Plan:
    async with _kept(url, at, service) as kept:
        return await planned(service, kept.logs, kept.store, kept.shelf, from_first=from_first)


async def _do(url: str, at: str | None, service: str, *, from_first: bool) -> Plan:
    async with _kept(url, at, service) as kept:
        return await reset_all(service, kept.logs, kept.store, kept.shelf, SystemClock(), from_first=from_first)


def _lines(plan: Plan) -> Iterable[str]:
    yield f"{plan.service}: " + ("what is to be done" if plan.is_needed else "all that it keeps fits its log")
    for (consumer, name, to_first), moves in groupby(plan.moves, _consumer):
        some = list(moves)
        first, last = min(move.to for move in some), max(move.to for move in some)
        where = "the first entry" if to_first else f"{last}" if first == last else f"{first} to {last}"
        was = max(move.place.position for move in some)
        yield f"  place    {consumer}: {count(len(some), 'slot')} of {name}, read up to {was} of log {some[0].place.log}: to {where}"
    for dropped in plan.dropped:
        yield f"  waiting  {dropped.consumer} {dropped.position} ({dropped.stream}): dropped"
    for name in plan.builds:
        yield f"  build    {name}: removed, and built anew"
    kept = (
        count(plan.waiting, "waiting message"), f"{count(plan.outbox, 'message')} of the outbox", count(plan.timers, "timer"),
    )  # fmt: skip
    yield f"  kept     {', '.join(kept)}"


def _consumer(move: Move) -> tuple[str, str, bool]:
    return move.place.consumer, move.log, move.to == 0


def _plain(plan: Plan) -> dict[str, object]:
    return {
        "service": plan.service,
        "places": [
            {
                "consumer": move.place.consumer, "log": move.log, "domain": move.place.domain, "slot": move.place.slot,
                "was": move.place.log, "read": move.place.position, "to": move.to,
            }
            for move in plan.moves
        ],
        "dropped": [
            {"consumer": each.consumer, "position": each.position, "stream": each.stream} for each in plan.dropped
        ],
        "builds": plan.builds,
        "kept": {"waiting": plan.waiting, "outbox": plan.outbox, "timers": plan.timers},
    }  # fmt: skip
