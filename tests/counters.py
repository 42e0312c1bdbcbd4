"""A domain of counters and its owner: light to import, because tests start processes with it by the dozen."""

from __future__ import annotations

from cauce import Command, Context, Domain, Event, Record, Rejected, Retry, Service, running

__all__ = [
    "SEEN", "Add", "Added", "Context", "Counted", "Double", "Doubled", "Retry", "Service", "counters", "owner", "running",
]  # fmt: skip

counters = Domain("counters", key="name")


class Counted(Record, domain=counters):
    name: str
    n: int


class Added(Event, domain=counters):
    name: str
    n: int


class Add(Command, domain=counters):
    name: str


class Doubled(Event, domain=counters):
    name: str


class Double(Command, domain=counters):
    name: str


owner = Service("counters", owns=counters)


@owner.decide
def add(counted: Counted | None, command: Add) -> Added:
    return Added(command.name, (counted.n if counted else 0) + 1)


@owner.decide
def double(counted: Counted | None, command: Double) -> Doubled:
    if counted is None:
        raise Rejected("there is none")
    return Doubled(command.name)


@owner.evolve
def added(counted: Counted | None, event: Added) -> Counted:
    return Counted(event.name, event.n)


@owner.evolve
def doubled(counted: Counted, event: Doubled) -> Counted:
    return Counted(counted.name, counted.n * 2)


SEEN = {
    "sqlite": "create table seen (name text, n integer, by text)",
    "postgresql": "create table seen (name text, n integer, by text, rowid bigserial)",
}
