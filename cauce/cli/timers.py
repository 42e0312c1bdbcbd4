"""`cauce timers`: what waits for its time, and how it is kept from coming."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import msgspec

from cauce.cli.place import as_json, bus, store, stores_of
from cauce.cli.text import one_line, print_json
from cauce.codec import moment
from cauce.said import read_said, spoken
from cauce.store import Timer

__all__ = ["timers"]


@click.group()
def timers() -> None:
    """What handlers said for later, and when functions that run by the clock are due."""


@timers.command("list")
@click.argument("service", default="")
@click.option("--limit", type=click.IntRange(1), default=1_000, show_default=True, help="At most so many of a service.")
@bus
@store
@as_json
def list_(service: str, limit: int, url: str, store: str | None, as_json: bool) -> None:
    """The timers of a service, or of all: first its intervals, then its messages, the next one first."""
    found = asyncio.run(_found(url, store, service, limit))
    for name, timer in found:
        if as_json:
            print_json(_shown(name, timer))
        else:
            click.echo(_line(name, timer))
    if not found and not as_json:
        click.echo("No timers.")


@timers.command()
@click.argument("service")
@click.argument("id")
@bus
@store
@as_json
def cancel(service: str, id: str, url: str, store: str | None, as_json: bool) -> None:
    """Let a message for later never be sent; what has fired already is not taken back."""
    asyncio.run(_cancel(url, store, service, id))
    if as_json:
        print_json({"service": service, "id": id})
    else:
        click.echo(one_line(f"{service} {id} is cancelled"))


async def _found(url: str, store: str | None, service: str, limit: int) -> list[tuple[str, Timer]]:
    async with stores_of(url, store) as stores:
        return await stores.timers(service, limit)


async def _cancel(url: str, store: str | None, service: str, id: str) -> None:
    async with stores_of(url, store) as stores:
        await stores.cancel(service, id)


def _shown(service: str, timer: Timer) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "service": service, "id": timer.id, "handler": timer.handler, "due": moment(timer.due).isoformat(),
        "interval": not timer.said,
    }  # fmt: skip
    if timer.said:
        entry = spoken(read_said(timer.said))
        shown |= {
            "stream": entry.stream, "type": entry.type, "message": entry.id, "data": msgspec.Raw(entry.body or b"null"),
            "causation": entry.meta.causation, "correlation": entry.correlation,
        }  # fmt: skip
    return shown


def _line(service: str, timer: Timer) -> str:
    due = moment(timer.due).isoformat(timespec="seconds")
    if not timer.said:
        return one_line(f"{service} {timer.id}: interval, next {due}")
    entry = spoken(read_said(timer.said))
    return one_line(
        f"{service} {timer.id}: {entry.type} of {entry.stream} at {due}, by {timer.handler} because of {entry.meta.causation}"
    )
