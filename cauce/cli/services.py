"""`cauce services`: who runs on a bus, what they answer, and how they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import click
import msgspec

from cauce.cli.place import as_json, bus, reading
from cauce.cli.text import one_line, print_json
from cauce.clock import SystemClock
from cauce.codec import moment
from cauce.wire import Instance

__all__ = ["services", "summary"]

_COLOURS = {"starting": "yellow", "running": "green", "blocked": "red", "draining": "yellow"}


@click.command()
@bus
@as_json
def services(url: str, as_json: bool) -> None:
    """Say which services run on a bus, in all processes: on SQLite of this machine, else of all.

    For each instance: its service, how it is, its process, where it answers, since when it runs, and how long ago its
    process gave a sign of life. Opens nothing and asks nobody.
    """
    found = sorted(asyncio.run(_instances(url)), key=lambda each: (each.service, each.since, each.id))
    now = SystemClock().now()
    if as_json:
        print_json({"services": [_plain(each, now) for each in found]})
        return
    for each in found:
        _tell(each, now)
    if not found:
        click.echo("nothing runs here")


async def _instances(url: str) -> list[Instance]:
    async with reading(url) as bus:
        return await bus.instances()


def _plain(instance: Instance, now: int) -> dict[str, object]:
    return {
        **msgspec.to_builtins(instance),
        "since": moment(instance.since).isoformat(),
        "beat": moment(instance.beat).isoformat(),
        "quiet": round(_quiet(instance, now), 3),
    }


def _tell(instance: Instance, now: int) -> None:
    since = moment(instance.since).astimezone().isoformat(" ", "seconds")[:19]
    click.echo(
        click.style(f"{one_line(instance.service):<20}  ", bold=True)
        + click.style(f"{instance.state:<8}", fg=_COLOURS[instance.state])
        + f"  process {instance.pid:<8}"
        + click.style(f"  {one_line(summary(instance.addresses)) or '-':<24}", fg="cyan")
        + click.style(f"  since {since}  beat {_quiet(instance, now):.1f} s ago", dim=True)
    )


def _quiet(instance: Instance, now: int) -> float:
    return max(0, now - instance.beat) / 1_000_000


def summary(addresses: Iterable[str]) -> str:
    """Addresses in few words: a domain with its slots, `users 0-15`, or alone where it has none."""
    slots: dict[str, set[int]] = {}
    for address in addresses:
        domain, _, slot = address.partition("/")
        held = slots.setdefault(domain, set())
        if slot.isdecimal():
            held.add(int(slot))
    return ", ".join(" ".join((domain, *_ranges(sorted(held)))) for domain, held in slots.items())


def _ranges(numbers: list[int]) -> list[str]:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in found)] if found else []
