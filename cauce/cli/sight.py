"""What `cauce consumers` and `cauce top` look at: stores, logs, and what running instances tell of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from cauce.backends import Look
from cauce.cli.place import reading
from cauce.cli.services import told
from cauce.cli.text import one_line, width
from cauce.clock import Clock, SystemClock
from cauce.codec import moment
from cauce.errors import CauceError
from cauce.lag import Progress, Seen, Survey, surveying
from cauce.meter import Told, address_of
from cauce.wire import Instance

__all__ = ["Breaker", "Sight", "Sights", "age", "lines", "notes", "plain", "rate", "row", "sights"]

_PATIENCE = 1.0
"""Seconds that an instance gets to tell what it is at: one that is blocked does not."""

_decode = msgspec.json.Decoder(Told).decode


class Breaker(msgspec.Struct, frozen=True):
    """A breaker that lets not all through, as an instance told."""

    service: str
    pid: int
    callee: str
    state: str


class Sight(msgspec.Struct, frozen=True):
    """One look.

    `in_flight` is by service and reader, of those all whose instances told it; `breakers` are those that are not
    closed, of which process and service, by the callee.
    """

    seen: Seen
    instances: list[Instance]
    in_flight: dict[tuple[str, str], int]
    breakers: list[Breaker]


class Sights:
    """Looks again and again. Made by `sights`."""

    def __init__(self, bus: Look, survey: Survey, services: Sequence[str], clock: Clock) -> None:
        self._bus, self._survey, self._services, self.clock = bus, survey, services, clock

    async def look(self) -> Sight:
        """How things are now. Raises `Refused` for a service that is not known, and what reading raises."""
        instances = [
            each for each in await self._bus.instances() if not self._services or each.service in self._services
        ]
        telling = asyncio.ensure_future(self._told(instances))
        try:
            seen = await self._survey.look(self._services)
            told = [(instance, each) for instance, each in zip(instances, await telling, strict=True)]
        finally:
            telling.cancel()
        instances.sort(key=lambda each: (each.service, each.since, each.id))
        return Sight(seen, instances, _in_flight(told), _breakers(told))

    async def _told(self, instances: Iterable[Instance]) -> list[Told | None]:
        return await asyncio.gather(*(self._ask(each) for each in instances))

    async def _ask(self, instance: Instance) -> Told | None:
        deadline = self.clock.monotonic() + _PATIENCE
        try:
            return _decode(await self._bus.ask(address_of(instance.id), b"{}", deadline))
        except (CauceError, OSError, TimeoutError, msgspec.MsgspecError):
            return None


def _in_flight(told: Iterable[tuple[Instance, Told | None]]) -> dict[tuple[str, str], int]:
    found, silent = dict[tuple[str, str], int](), set[str]()
    for instance, each in told:
        if each is None:
            silent.add(instance.service)
            continue
        for work in each.work:
            key = each.service, work.handler
            found[key] = found.get(key, 0) + work.in_flight
    return {key: number for key, number in found.items() if key[0] not in silent}


def _breakers(told: Iterable[tuple[Instance, Told | None]]) -> list[Breaker]:
    return [
        Breaker(instance.service, instance.pid, callee, state)
        for instance, each in told
        if each is not None
        for callee, state in each.breakers.items()
        if state != "closed"
    ]


@asynccontextmanager
async def sights(url: str, store: str | None, services: Sequence[str] = ()) -> AsyncIterator[Sights]:
    """A bus to look at, beside whoever runs on it."""
    clock = SystemClock()
    async with reading(url) as bus, surveying(bus, store, clock) as survey:
        yield Sights(bus, survey, services, clock)


# ---------------------------------------------------------------------------------------------------------- to tell


def plain(sight: Sight) -> dict[str, Any]:
    """As JSON."""
    return {
        "time": moment(sight.seen.time).isoformat(),
        "heads": sight.seen.heads,
        "instances": [told(each) for each in sight.instances],
        "breakers": [msgspec.to_builtins(each) for each in sight.breakers],
        "services": [msgspec.to_builtins(each) for each in sight.seen.services],
        "consumers": [
            {**msgspec.to_builtins(each), "in_flight": sight.in_flight.get((each.service, each.name))}
            for each in sight.seen.readers
        ],
    }


_HEAD = ("SERVICE", "CONSUMER", "KIND", "LAG", "OLDEST", "IN FLIGHT", "RETRYING", "DEAD", "BEHIND", "RATE/S")
_RIGHT = 3
"""From this column on there are numbers, which stand at the right."""


def lines(sight: Sight) -> list[str]:
    """As text: a table, then what is to be said of single consumers, and what services have said and not sent yet."""
    rows = [_HEAD, *(row(each, sight) for each in sight.seen.readers)]
    widths = [max(width(cell) for cell in column) for column in zip(*rows, strict=True)]
    found = ["  ".join(_cell(cell, widths[n], n >= _RIGHT) for n, cell in enumerate(each)).rstrip() for each in rows]
    if len(rows) == 1:
        found = ["no consumers"]
    found += notes(sight)
    for kept in sight.seen.services:
        if kept.outbox or kept.timers:
            timers = f"{kept.timers} timers, {kept.due} of them due"
            found.append(one_line(f"{kept.service}: {kept.outbox} messages in the outbox, {timers}"))
    return found


def notes(sight: Sight) -> list[str]:
    """What is to be said of single consumers, and of breakers."""
    found = [one_line(f"{each.service} {each.name}: {each.note}") for each in sight.seen.readers if each.note]
    return [
        *found,
        *(
            one_line(f"{each.service} (process {each.pid}): breaker of {each.callee} {each.state}")
            for each in sight.breakers
        ),
    ]


def row(each: Progress, sight: Sight) -> tuple[str, ...]:
    """The cells of one consumer; - is what is not known."""
    flight = sight.in_flight.get((each.service, each.name))
    lag = "-" if each.lag is None else f"{'≥' if each.at_least else ''}{each.lag}"
    return (
        one_line(each.service), one_line(each.name), each.kind, lag, age(each.seconds), _number(flight),
        str(each.retrying), str(each.dead), str(each.behind), rate(each.rate),
    )  # fmt: skip


def _cell(text: str, wide: int, right: bool) -> str:
    space = " " * (wide - width(text))
    return space + text if right else text + space


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def rate(rate: float | None) -> str:
    """So many a second."""
    return "-" if rate is None else f"{rate:.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"


_UNITS: tuple[tuple[float, str], ...] = ((86_400, "d"), (3_600, "h"), (60, "min"))


def age(seconds: float | None) -> str:
    """How long ago, in the largest unit that fits."""
    if seconds is None:
        return "-"
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds else "0 s"
