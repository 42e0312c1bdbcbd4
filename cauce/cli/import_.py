"""`cauce import`: events from a file, each once, however often it is run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import click
import msgspec

from cauce.accept import SLOTS, slot_of
from cauce.backends import open_backend, scheme_of
from cauce.bus import own, owned
from cauce.cli.intake import LINE_BYTES, Fields, Intake
from cauce.cli.lines import Lines, opened
from cauce.cli.place import as_json, bus
from cauce.cli.progress import bar
from cauce.cli.text import count, one_line, print_json
from cauce.cli.window import Window
from cauce.clock import Clock, SystemClock
from cauce.errors import CauceError
from cauce.lease import Leases, identity
from cauce.log import Claim, Log
from cauce.rules import void

__all__ = ["import_"]

_TOLD = 2000


class Summary(msgspec.Struct, frozen=True):
    """What an import did. `repeated`: events that stood there already. `rate` is in events a second."""

    file: str
    domain: str
    events: int
    streams: int
    written: int
    repeated: int
    seconds: float
    rate: int


@click.command("import")
@click.argument("file")
@bus
@as_json
@click.option("--domain", required=True, help="The domain whose events they are.")
@click.option("--key", required=True, metavar="FIELD", help="The field that names the thing.")
@click.option("--type", required=True, metavar="FIELD", help="The field that holds the type.")
@click.option("--time", required=True, metavar="FIELD", help="The field that holds the time, with its zone.")
@click.option("--as", "service", required=True, metavar="SERVICE", help="The service that owns the domain.")
def import_(file: str, url: str, as_json: bool, domain: str, key: str, type: str, time: str, service: str) -> None:
    """Bring the events in FILE, one JSON object a line, plain or gzip; - is standard input.

    The whole line becomes the body. The n-th line of a key becomes version n of its stream, so a second run writes
    nothing, and one after an interruption writes the rest. Nobody else may write the domain meanwhile.
    """
    scheme_of(url)
    clock = SystemClock()
    name = "standard input" if file == "-" else file
    intake = Intake(name, domain, Fields(key, type, time), service)
    began = clock.monotonic()
    with opened(file, LINE_BYTES) as lines, bar("importing", "events") as told:
        window = asyncio.run(_import(url, clock, intake, lines, lambda: told(lines.done, lines.size, intake.events)))
    seconds = clock.monotonic() - began
    summary = Summary(
        file, domain, intake.events, intake.streams, window.written, window.repeated,
        round(seconds, 3), round(intake.events / max(seconds, 1e-6)),
    )  # fmt: skip
    if as_json:
        print_json(summary)
    else:
        click.echo(
            f"{one_line(name)}: {count(summary.events, 'event')}, {count(summary.streams, 'stream')}, {summary.written} written "
            f"in {seconds:.1f} s ({summary.rate} events/s)"
        )


async def _import(url: str, clock: Clock, intake: Intake, lines: Lines, tell: Callable[[], None]) -> Window:
    backend = await open_backend(url, clock)
    try:
        await owned(backend.facts, intake.domain, intake.service)
        window = Window(backend.facts, clock, intake)
        async with _held(backend.facts, intake.domain, intake.service, clock) as claims:
            try:
                async for line in lines.each():
                    taken = intake.take(line)
                    if taken is not None:
                        # Not before: a domain is given away for good, and a file that is refused gives nothing for it.
                        if intake.events == 1:
                            await own(backend.facts, intake.domain, intake.service, clock)
                            # Nobody decides what is imported, so its owner counts anew what stands then.
                            await void(backend.facts, intake.domain, claims[0], clock)
                        await window.add(intake.line, *taken, claims[slot_of(taken[0].key)])
                    if intake.line % _TOLD == 0:
                        tell()
            finally:
                # What was accepted before a line that is wrong stays; if one of these differs, that is told first.
                await window.drain()
        return window
    finally:
        await backend.close()


@asynccontextmanager
async def _held(facts: Log, domain: str, service: str, clock: Clock) -> AsyncIterator[list[Claim]]:
    """The claims of all slots of a domain, kept by a beat."""
    leases = Leases(facts, identity(service, clock), clock)
    names = [f"{domain}/{slot}" for slot in range(SLOTS)]
    await leases.take(*names)
    beating = asyncio.create_task(leases.beat())
    try:
        yield [leases.claims[name] for name in names]
    finally:
        beating.cancel()
        # What ended it is told; that claims cannot be released after that is not the news.
        with suppress(CauceError, asyncio.CancelledError):
            await beating
        with suppress(CauceError):
            await leases.release(*leases.claims)
