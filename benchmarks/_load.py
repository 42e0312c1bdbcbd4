"""What every contender is asked to store: a typed event of three text fields about one of many things."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from cauce import Command, Domain, Event, Record, Rejected, Service, replace

__all__ = ["NAME", "ChangeEmail", "EmailChanged", "Load", "RegisterUser", "email", "service"]

NAME = "Ana Example"

users = Domain("users", key="user_id")


class User(Record, domain=users):
    user_id: str
    name: str
    email: str


class UserRegistered(Event, domain=users):
    user_id: str
    name: str
    email: str


class EmailChanged(Event, domain=users):
    user_id: str
    name: str
    email: str


class RegisterUser(Command, domain=users):
    user_id: str
    name: str
    email: str


class ChangeEmail(Command, domain=users):
    user_id: str
    name: str
    email: str


service = Service("users", owns=users)


@service.decide
def register(user: User | None, command: RegisterUser) -> UserRegistered:
    if user is not None:
        raise Rejected("already registered")
    return UserRegistered(command.user_id, command.name, command.email)


@service.decide
def change_email(user: User | None, command: ChangeEmail) -> EmailChanged:
    if user is None:
        raise Rejected("no such user")
    return EmailChanged(command.user_id, command.name, command.email)


@service.evolve
def registered(user: User | None, event: UserRegistered) -> User:
    return User(event.user_id, event.name, event.email)


@service.evolve
def email_changed(user: User, event: EmailChanged) -> User:
    return replace(user, email=event.email)


def email(number: int) -> str:
    """An address that nobody had before."""
    return f"user{number}@example.org"


@dataclass(frozen=True)
class Load:
    """How many things there are, and how many events are in a log that was filled beforehand."""

    things: int
    events: int

    def turns(self, seed: int) -> Iterator[tuple[int, int]]:
        """Endless pairs of a new number and a thing chosen by chance; the choice is made beforehand."""
        chance = random.Random(seed)
        keys = [chance.randrange(self.things) for _ in range(1 << 16)]
        number = self.things
        while True:
            for key in keys:
                yield number, key
                number += 1

    def filling(self, spread: int = 1) -> Iterator[int]:
        """The thing of each event to fill in; of so many times more things, each pass over them in another order."""
        chance = random.Random(0)
        keys = list(range(self.things * spread))
        for start in range(0, self.events, len(keys)):
            chance.shuffle(keys)
            yield from keys[: self.events - start]
