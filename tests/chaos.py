"""The services of the chaos test: an owner that counts, one that reacts with effects and commands, one with copies.

`main` is a program that is one instance of one of them, or of two ("both"): which, the address of the bus, its
own name.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from cauce import Command, Context, Domain, Event, Query, Record, Rejected, Service, Store, running
from cauce import Copy as CopyOf

tallies = Domain("tallies", key="name")
copies = Domain("copies")


class Tally(Record, domain=tallies):
    name: str
    added: int
    confirmed: int


class Added(Event, domain=tallies):
    name: str


class Confirmed(Event, domain=tallies):
    name: str
    of: int


class Add(Command, domain=tallies):
    name: str
    amount: int = 1


class Confirm(Command, domain=tallies):
    name: str
    of: int


class Kept(CopyOf, of=Tally):
    name: str
    added: int
    confirmed: int


class Rows(Query[dict[str, list[tuple[str, int, int]]]], domain=copies):
    """What the replica and the view hold, as name, added, confirmed."""


EFFECTS = {
    "sqlite": "create table effects (number integer primary key autoincrement, key text, version integer, instance text)",
    "postgresql": "create table effects (number bigserial primary key, key text, version integer, instance text)",
}
SUMS = "create table sums (name text primary key, added integer not null, confirmed integer not null)"
_SUM = "insert into sums values (?, ?, ?) on conflict (name) do update set added = added + excluded.added, confirmed = confirmed + excluded.confirmed"


def owner() -> Service:
    """Owns the tallies. A wish for less than one is rejected."""
    service = Service("tallies", owns=tallies)

    @service.decide
    def add(tally: Tally | None, command: Add) -> Added:
        if command.amount < 1:
            raise Rejected("too little")
        return Added(command.name)

    @service.decide
    def confirm(tally: Tally | None, command: Confirm) -> Confirmed:
        return Confirmed(command.name, command.of)

    @service.evolve
    def added(tally: Tally | None, event: Added) -> Tally:
        return Tally(event.name, tally.added + 1 if tally else 1, tally.confirmed if tally else 0)

    @service.evolve
    def confirmed(tally: Tally, event: Confirmed) -> Tally:
        return Tally(event.name, tally.added, tally.confirmed + 1)

    return service


def reacting(instance: str) -> Service:
    """Stores an effect of each fact, and says a command because of it."""
    service = Service("reacting", schema=EFFECTS)

    @service.on
    async def react(event: Added, ctx: Context) -> Confirm:
        ctx.store.execute(
            "insert into effects (key, version, instance) values (?, ?, ?)", (event.name, ctx.version, instance)
        )
        return Confirm(event.name, ctx.version)

    return service


def copying() -> Service:
    """Keeps a replica and a view, and tells what they hold."""
    service = Service("copying", owns=copies)
    service.replica(Kept)

    @service.view("sums", schema=SUMS)
    def add(event: Added, db: Store) -> None:
        db.execute(_SUM, (event.name, 1, 0))

    @service.view("sums")
    def confirm(event: Confirmed, db: Store) -> None:
        db.execute(_SUM, (event.name, 0, 1))

    @service.answer
    async def rows(query: Rows, ctx: Context) -> dict[str, list[tuple[str, int, int]]]:
        return {
            "replica": [(each.name, each.added, each.confirmed) for each in await ctx.find(Kept)],
            "view": [(name, one, two) for name, one, two in await ctx.view("sums").fetch("select * from sums")],
        }

    return service


def main() -> None:
    """Run one instance until standard input ends, SIGTERM comes, or something stops it."""
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_serve(*sys.argv[1:]))


async def _serve(which: str, url: str, instance: str) -> None:
    services = {
        "tallies": lambda: [owner()],
        "reacting": lambda: [reacting(instance)],
        "copying": lambda: [copying()],
        "both": lambda: [owner(), reacting(instance)],
    }[which]()
    loop = asyncio.get_running_loop()
    async with running(*services, bus=url) as bus:
        ended = loop.create_future()
        loop.add_reader(0, ended.cancel)
        loop.add_signal_handler(signal.SIGTERM, ended.cancel)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.wait({ended, bus.failed}, return_when=asyncio.FIRST_COMPLETED)
        loop.remove_reader(0)
