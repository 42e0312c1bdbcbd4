"""Where the views and replicas of one service lie, as a role: builds of each, one of them live, with its own place.

A build is derived: lost or broken, it is made anew from the log. What is written into it is one transaction with the
place up to which it then holds everything, so that each entry counts once, whoever writes and whatever ends when.

Like the store of a service it is no part of a bus: files in a folder, or schemas in PostgreSQL, serve any bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from cauce.sql import Row, Run

__all__ = ["Build", "Builds", "Lock", "Moved", "Part", "Reading", "Shelf", "Unusable", "Wrong"]

Part = tuple[int, Iterable[Run]]
"""Statements, and the position up to which all is in the build once they are carried out."""


class Unusable(Exception):
    """A build that is missing, cut off or cannot be read: it is made anew."""


class Moved(Exception):
    """Another process has written this build, or has let another one be live: go on from what stands."""


class Wrong(Exception):
    """A statement that the database refuses, whatever the moment. Nothing of its transaction was written.

    Parameters:
        number: which of the statements of this writing, counted from 0.
    """

    def __init__(self, number: int, words: str) -> None:
        super().__init__(words)
        self.number = number


class Lock(Protocol):
    """Who alone may do something, among all processes; whoever dies has let go of it."""

    @property
    def held(self) -> bool: ...
    async def take(self) -> bool:
        """Whether it is ours now; it does not wait. Raises `Refused` where nobody can take it, with the cure."""
        ...

    async def lost(self) -> None:
        """Wait until it is ours no more, though we did not let go: another may have it now."""
        ...

    async def release(self) -> None: ...


class Reading(Protocol):
    """Reads the build that is live, in however many processes."""

    async def fetch(self, sql: str, params: Row = ()) -> list[Row]:
        """The rows of somebody's query, as last committed. Raises `Refused` for what is no query."""
        ...

    async def rows(self, sql: str, params: Row = ()) -> list[Row]:
        """The rows of a query of our own, which takes no time."""
        ...

    async def position(self) -> int:
        """Up to which position the live build holds everything. Raises `Unavailable` while there is none."""
        ...

    def reached(self, position: int) -> None:
        """Somebody was told that all up to a position is in what is read: no build is read that holds less."""
        ...

    async def close(self) -> None: ...


class Build(Protocol):
    """One build, as its only writer has it. `place` says in messages where it lies."""

    @property
    def number(self) -> int: ...
    @property
    def place(self) -> str: ...
    @property
    def log(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    async def write(self, parts: Iterable[Part]) -> int:
        """Carry out all parts in one transaction, with the position of the last. Gives that.

        The parts are asked for one after the other, with the transaction open; what asking raises is raised as it is,
        and nothing is written then, nor after `Wrong`, `Unusable`, `Moved` and `Unavailable`. But if the writer's wait
        is cancelled, or the connection is lost, all may be written or nothing: `position` of a build opened anew says.
        """
        ...

    async def close(self) -> None: ...


class Builds(Protocol):
    """The builds of one view or replica, with rising numbers. `place` says in messages where they lie."""

    @property
    def place(self) -> str: ...
    @property
    def reading(self) -> Reading: ...
    @property
    def building(self) -> Lock:
        """Held by who makes a build."""
        ...

    def stamp(self) -> object:
        """Another one than before when, as far as is known without waiting, another build is live; None: none is."""
        ...

    async def live(self) -> int:
        """The number of the build that is read; 0 if there is none."""
        ...

    async def numbers(self) -> list[int]:
        """Which builds there are, the oldest first."""
        ...

    async def open(self, number: int) -> Build:
        """A build that is there. Raises `Unusable` if it is not, or cannot be read."""
        ...

    async def create(self, number: int, tables: str, log: str, fingerprint: str) -> Build:
        """Make one with its tables, at the beginning of the log. Raises `Refused` for tables that cannot be made."""
        ...

    async def switch(self, build: Build) -> None:
        """Let a build be the live one. After a crash at any moment it is the old one or this."""
        ...

    async def hold(self) -> Any:
        """Keep the live build from being written until what this gives is closed; None if there is none of use."""
        ...

    async def remove(self, numbers: Iterable[int]) -> None:
        """Builds that nobody needs any more. What cannot go now goes another time."""
        ...

    async def clear(self) -> None:
        """Take all builds away, the live one, too. Only who holds the lead and `building` may."""
        ...


class Shelf(Protocol):
    """Where the builds of one service lie."""

    @property
    def dialect(self) -> str:
        """Whose SQL it speaks: one of `cauce.sql.DIALECTS`."""
        ...

    @property
    def lead(self) -> Lock:
        """Held by who feeds all of them."""
        ...

    def builds(self, name: str, what: str) -> Builds:
        """Those of one view or replica.

        Parameters:
            what: what it is called in messages, as `view directory of crm`.
        """
        ...

    async def names(self) -> list[str]:
        """The views and replicas of which there are builds."""
        ...

    def check(self, what: str, tables: str) -> None:
        """Raises `Refused` for tables of which one can say without making them that they cannot be made."""
        ...
