"""Domains with rules over several things, and their owners: light to import, because tests start processes with it."""

from __future__ import annotations

from typing import Any

from cauce import Command, Domain, Event, Record, Rejected, Service, replace

__all__ = [
    "Gift",
    "Join",
    "Joined",
    "Leave",
    "Left",
    "Move",
    "Moved",
    "Other",
    "Person",
    "Redeem",
    "Redeemed",
    "Seat",
    "Seated",
    "gifts",
    "giving",
    "made",
    "others",
    "people",
]

people = Domain("people", key="name")


class Person(Record, domain=people):
    name: str
    email: str
    show: str = ""


class Joined(Event, domain=people):
    name: str
    email: str


class Moved(Event, domain=people):
    name: str
    email: str


class Seated(Event, domain=people):
    name: str
    show: str


class Left(Event, domain=people):
    name: str


class Join(Command, domain=people):
    name: str
    email: str


class Move(Command, domain=people):
    name: str
    email: str


class Seat(Command, domain=people):
    name: str
    show: str


class Leave(Command, domain=people):
    name: str


others = Domain("others", key="name")


class Other(Record, domain=others):
    name: str


gifts = Domain("gifts", key="card")


class Gift(Record, domain=gifts):
    card: str
    left: int


class Redeemed(Event, domain=gifts):
    card: str
    left: int


class Redeem(Command, domain=gifts):
    card: str
    amount: int


giving = Service("gifts", owns=gifts)


@giving.decide
def redeem(gift: Gift | None, command: Redeem) -> Redeemed:
    left = (100 if gift is None else gift.left) - command.amount
    if left < 0:
        raise Rejected("not enough is left")
    return Redeemed(command.card, left)


@giving.evolve
def redeemed(gift: Gift | None, event: Redeemed) -> Gift:
    return Gift(event.card, event.left)


def made(*, email: bool = True, seats: Any = 0, fold: bool = True) -> Service:
    """The owner of people, with the rules that are wanted."""
    service = Service("people", owns=people)

    @service.decide
    def join(person: Person | None, command: Join) -> Joined | None:
        return None if person else Joined(command.name, command.email)

    @service.decide
    def move(person: Person | None, command: Move) -> Moved:
        if person is None:
            raise Rejected("nobody")
        return Moved(command.name, command.email)

    @service.decide
    def seat(person: Person | None, command: Seat) -> tuple[Event, ...]:
        seated = Seated(command.name, command.show)
        return (seated,) if person else (Joined(command.name, ""), seated)

    @service.decide
    def leave(person: Person | None, command: Leave) -> Left | None:
        return Left(command.name) if person else None

    @service.evolve
    def joined(person: Person | None, event: Joined) -> Person:
        return Person(event.name, event.email)

    @service.evolve
    def moved(person: Person, event: Moved) -> Person:
        return replace(person, email=event.email)

    @service.evolve
    def seated(person: Person, event: Seated) -> Person:
        return replace(person, show=event.show)

    @service.evolve
    def left(person: Person, event: Left) -> None:
        return None

    if email and fold:

        @service.unique
        def mail(person: Person) -> str | None:
            return person.email.casefold() or None

    elif email:

        @service.unique
        def mail(person: Person) -> str | None:
            return person.email or None

    if seats:

        @service.unique(most=seats)
        def show(person: Person) -> str | None:
            return person.show or None

    return service
