"""The services of `test_guards_apart`, each of which runs in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from cauce import Command, Context, Domain, Event, NoAnswer, Query, Record, Service

__all__ = [
    "AT_ONCE",
    "Chain",
    "Drown",
    "Echo",
    "InHand",
    "Size",
    "Step",
    "Stepped",
    "Whoami",
    "last",
    "middle",
    "steps",
]

AT_ONCE = 50

middles, lasts = Domain("middles"), Domain("lasts")
stepping = Domain("steps", key="name")
middle, last = Service("middle", owns=middles), Service("last", owns=lasts)
steps = Service("steps", owns=stepping)


class Chain(Query[str], domain=middles):
    """Answered by asking the last one."""


class Whoami(Query[int], domain=lasts):
    """Which process it is."""


class Drown(Query[str], domain=lasts):
    """Never answered."""


class Size(Query[int], domain=lasts):
    """Bytes of memory that the process has in use."""


class InHand(Query[int], domain=lasts):
    """How many such questions it has in hand."""


class Echo(Query[int], domain=lasts):
    """Answered with the number; after so many seconds, for which the process does nothing else."""

    n: int
    slow: float = 0.0


class Stepped(Event, domain=stepping):
    name: str


class Steps(Record, domain=stepping):
    name: str
    n: int


class Step(Command, domain=stepping):
    """Decided after so many seconds, for which the process does nothing else."""

    name: str
    slow: float = 0.0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@middle.answer
async def chain(query: Chain, ctx: Context) -> str:
    try:
        answer = await ctx.ask(Whoami())
    except NoAnswer as error:
        say(str(error))
        try:
            await ctx.bus.clock.sleep(600)
        finally:
            say("cancelled")
        raise
    say(f"answered with {ctx.left} s left")
    return str(answer)


@last.answer
async def whoami(query: Whoami) -> int:
    return os.getpid()


@last.answer(at_once=AT_ONCE)
async def drown(query: Drown) -> str:
    await asyncio.Event().wait()
    return ""


@last.answer
async def size(query: Size) -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@last.answer
async def in_hand(query: InHand, ctx: Context) -> int:
    return ctx.bus.bulkheads["last.drown"].under_way


@last.answer
async def echo(query: Echo) -> int:
    time.sleep(query.slow)  # noqa: ASYNC251 - that it comes late whatever its asker does about it is the point
    return query.n


@steps.decide
def step(standing: Steps | None, command: Step) -> Stepped:
    time.sleep(command.slow)
    return Stepped(command.name)


@steps.evolve
def stepped(standing: Steps | None, event: Stepped) -> Steps:
    return Steps(event.name, (standing.n if standing else 0) + 1)
