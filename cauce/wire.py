"""The second of the two seams: questions and answers between services. Nothing on it is durable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

import msgspec

__all__ = ["Handler", "Instance", "State", "Wire", "as_seen"]

Handler = Callable[[bytes], Awaitable[bytes]]
"""Makes an answer of a question. It is cancelled when the asker's deadline has passed."""

State = Literal["starting", "running", "blocked", "draining"]
"""`blocked`: a handler keeps its event loop, or runs on though it was given up, or the process is stopped."""


class Instance(msgspec.Struct, frozen=True):
    """One running service: its name, its own id, the addresses it answers at, its process, and how it is.

    `since` is when it started and `beat` when its process last gave a sign of life, in microseconds since 1970; `beat`
    is filled in by the wire.
    """

    service: str
    id: str
    addresses: tuple[str, ...]
    pid: int = 0
    state: State = "running"
    since: int = 0
    beat: int = 0


def as_seen(instance: Instance, beat: int, *, quiet: bool) -> Instance:
    """An instance as others see it: who has missed some beats cannot say itself that it is blocked."""
    return msgspec.structs.replace(instance, beat=beat, state="blocked" if quiet else instance.state)


class Wire(Protocol):
    """Carries a question to whoever serves an address, in whatever process, and the answer back.

    An address is `users`, served by every instance of a service, or `users/3`, served by the one that holds slot 3.
    """

    async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
        """The answer of one of those who serve the address. `deadline` is in seconds on the clock's `monotonic`.

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

    async def announce(self, instance: Instance) -> Callable[[], None]:
        """Say that an instance runs, until the function that this returns is called. The same id again replaces it."""
        ...

    async def instances(self) -> list[Instance]:
        """Who runs now, in all processes that are alive."""
        ...
