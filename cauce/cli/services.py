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
from cauce.wire import QUIET, Instance, healthy_first

__all__ = ["COLOURS", "services", "summary", "told"]

COLOURS = {"starting": "yellow", "running": "green", "blocked": "red", "draining": "yellow"}


@click.command()
@bus
@as_json
def services(url: str, as_json: bool) -> None:
    """Say which services run on a bus, in all processes: on SQLite of this machine, else of all.

    A line for each service, and under it one for each instance, those that are well first: how it is, its process, the
    questions under way and the messages in hand, since when it runs, how long ago its process gave a sign of life, and
    where it answers. With --json also the host, and the queries and commands it answers and decides. Opens nothing and
    asks nobody.
    """
    now = SystemClock().now()
    found = healthy_first(asyncio.run(_instances(url)), now)
    if as_json:
        print_json(
            {
                "services": [
                    told(each) | {"quiet": round(_quiet(each, now), 3)}
                    for each in sorted(found, key=lambda each: each.service)
                ]
            }
        )
        return
    for name in sorted({each.service for each in found}):
        click.secho(one_line(name), bold=True)
        for each in found:
            if each.service == name:
                _tell(each, now)
    if not found:
        click.echo("nothing runs here")


async def _instances(url: str) -> list[Instance]:
    async with reading(url) as bus:
        return await bus.instances()


def told(instance: Instance) -> dict[str, object]:
    """As JSON."""
    since, beat = moment(instance.since).isoformat(), moment(instance.beat).isoformat()
    return {**msgspec.to_builtins(instance), "since": since, "beat": beat}


def _tell(instance: Instance, now: int) -> None:
    quiet = _quiet(instance, now)
    click.echo(
        click.style(f"  {instance.state:<8}", fg=COLOURS.get(instance.state, "red"))
        + f" {one_line(instance.version) or '-':<8.8} {instance.pid:>7}"
        + f" {instance.load.asked:>4} asked {instance.load.waiting:>5} waiting"
        + click.style(f"  up {_short(max(0, now - instance.since) / 1_000_000):>5}", dim=True)
        + click.style(f"  beat {_short(quiet):>5} ago", dim=quiet <= QUIET, fg=None if quiet <= QUIET else "red")
        + (click.style(" stale", fg="red") if instance.stale else "")
        + click.style(f"  {one_line(summary(instance.addresses)) or '-'}", fg="cyan")
    )


def _short(seconds: float) -> str:
    """A time in four characters and its unit."""
    for unit, many in (("s", 1), ("m", 60), ("h", 3600)):
        if seconds < 100 * many:
            return f"{seconds / many:.1f}{unit}"
    return f"{seconds / 86400:.0f}d"


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
