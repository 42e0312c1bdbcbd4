"""The services of `test_poison`: a reaction that records what it was given, and fails or dies of one message."""

from __future__ import annotations

import asyncio
import os
import sys

from cauce import Domain, Event, Record, Retry, Service, running
from tests.counters import Added

__all__ = ["POISON", "Note", "Noted", "made"]

POISON = "job7", 3

notes = Domain("notes", key="name")


class Note(Record, domain=notes):
    name: str
    last: int


class Noted(Event, domain=notes):
    name: str
    n: int
    by: int


def made(how: str) -> Service:
    """A service that notes all that was added.

    Parameters:
        how: what it does with the poison: `raises`, `dies`, or anything else for nothing.
    """
    service = Service("noting", owns=notes)

    @service.evolve
    def noted(note: Note | None, event: Noted) -> Note:
        return Note(event.name, event.n)

    @service.on(retry=Retry(attempts=3, first=0.1))
    async def handle(event: Added) -> Noted:
        if (event.name, event.n) == POISON:
            if how == "raises":
                raise ValueError("poison")
            if how == "dies":
                os._exit(7)
        return Noted(event.name, event.n, os.getpid())

    return service


async def main() -> None:
    """Run it until the input ends."""
    async with running(made(sys.argv[2]), bus=sys.argv[1]):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
