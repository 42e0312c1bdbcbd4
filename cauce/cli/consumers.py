"""`cauce consumers`: how far each consumer is, what waits, and how fast it goes."""

from __future__ import annotations

import asyncio

import click

from cauce.cli.place import Seconds, as_json, bus, store
from cauce.cli.sight import Sight, lines, plain, sights
from cauce.cli.text import print_json
from cauce.errors import Refused

__all__ = ["consumers"]


@click.command()
@click.argument("service", default="")
@bus
@store
@as_json
@click.option(
    "--window",
    default=1.0,
    show_default=True,
    type=Seconds(0, 3600),
    help="Seconds for which rates are measured; 0: they are not.",
)
def consumers(service: str, url: str, store: str | None, as_json: bool, window: float) -> None:
    """Say how far the consumers of SERVICE, or of all services, are behind.

    Views, replicas and what decides commands are among them. Reads stores and logs, whether services run or not, and
    changes nothing. Only a running instance knows what is in flight: without one that stays blank.
    """
    sight = asyncio.run(_look(url, store, service, window))
    if as_json:
        print_json(plain(sight))
        return
    for line in lines(sight):
        click.echo(line)


async def _look(url: str, store: str | None, service: str, window: float) -> Sight:
    async with sights(url, store, [service] if service else []) as found:
        sight = await found.look()
        if service and not sight.seen.readers and not sight.seen.services:
            raise Refused(f"service {service!r} is not known here: see cauce consumers")
        if window:
            await found.clock.sleep(window)
            sight = await found.look()
        return sight
