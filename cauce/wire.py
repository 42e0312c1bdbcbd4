"""The second of the two seams: questions and answers between services. Nothing on it is durable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Literal, Protocol

import msgspec

__all__ = ["QUIET", "Handler", "Instance", "Load", "State", "Wire", "healthy_first", "is_well", "located"]

Handler = Callable[[bytes], Awaitable[bytes]]
"""Makes an answer of a question. It is cancelled when the asker's deadline has passed."""

State = Literal["starting", "running", "draining", "unknown"]
"""How an instance says that it is; `unknown` is what newer code says in a word that this code does not have."""

QUIET = 6.0
"""Seconds without a beat, three of them missed, after which others are asked first."""


class Load(msgspec.Struct, frozen=True):
    """How much an instance has to do: questions under way, and messages in hand or waiting in memory for their turn."""

    asked: int = 0
    waiting: int = 0


class Instance(msgspec.Struct, frozen=True):
    """One running service: its name, its own id, the addresses it answers at, its process, and how it is.

    `since` is when it started and `beat` when its process last gave a sign of life, in microseconds since 1970.
    `version` is that of the service's code, `answers` and `decides` are the queries and commands it has functions for,
    `load` is of its last beat. `stale`: the registry cannot be read just now, and this is what was last known of it.
    The wire fills in `beat`, `load` and `stale`.
    """

    service: str
    id: str
    addresses: tuple[str, ...]
    pid: int = 0
    state: State = "running"
    since: int = 0
    beat: int = 0
    version: str = ""
    host: str = ""
    answers: tuple[str, ...] = ()
    decides: tuple[str, ...] = ()
    load: Load = Load()
    stale: bool = False


def is_well(instance: Instance, now: int) -> bool:
    """Whether it is running and has lately given a sign of life. `now` is in microseconds since 1970."""
    return instance.state == "running" and now - instance.beat <= QUIET * 1_000_000


def healthy_first(instances: Iterable[Instance], now: int) -> list[Instance]:
    """Those that are well first, and of these the one with the least to do. `now` is in microseconds since 1970."""
    return sorted(
        instances,
        key=lambda each: (
            not is_well(each, now),
            each.state != "running",
            each.load.asked + each.load.waiting,
            each.since,
            each.id,
        ),
    )


def located(instances: Iterable[Instance], name: str) -> list[Instance]:
    """Those of a service, or that answer in a domain, by its name; all for an empty one."""
    return [
        each
        for each in instances
        if not name or name == each.service or any(name in (at, at.partition("/")[0]) for at in each.addresses)
    ]


class Wire(Protocol):
    """Carries a question to whoever serves an address, in whatever process, and the answer back.

    An address is `users`, served by every instance of a service, or `users/3`, served by the one that holds slot 3.
    """

    async def ask(self, address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
        """The answer of one of those who serve the address. `deadline` is in seconds on the clock's `monotonic`.

        Who serves it in this process is asked before all others, without a detour. Of the others those are asked that
        are well, as long as there are such.

        Parameters:
            safe: it changes nothing, so it may be asked twice: once more elsewhere when who was asked went away before
                it answered, and at a second one beside the first when that is silent for a part of the time.

        Raises `NoAnswer` if nobody serves it (nothing ran): at once, or, where an instance is announced that answers in
        the same domain, after up to two seconds, because a slot may be on its way from one to another. Raises
        `TimeoutError` when the deadline passes first, and `ConnectionError` when who was asked went away before it
        answered: then it is not known whether it ran. Who is cancelled forgets the question; a late answer is dropped.
        """
        ...

    async def serve(self, address: str, handler: Handler) -> Callable[[], None]:
        """Answer what is asked at an address, until the function that this returns is called.

        Several processes may serve one address; within one process the second is `Refused`. Who sees this return can
        be asked from every process.
        """
        ...

    async def announce(self, instance: Instance, load: Callable[[], Load] | None = None) -> Callable[[], None]:
        """Say that an instance runs, until the function that this returns is called. The same id again replaces it.

        Parameters:
            load: tells how much it has to do; asked with each beat.
        """
        ...

    async def instances(self) -> list[Instance]:
        """Who runs now, in all processes that are alive.

        When the registry cannot be read, who ran when that was last possible, each `stale`, and a warning in the log
        once. Raises `Unavailable` if nothing was known before.
        """
        ...
