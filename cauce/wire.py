"""The second of the two seams: questions and answers between services. Nothing on it is durable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

__all__ = ["Handler", "Instance", "Wire"]

Handler = Callable[[bytes], Awaitable[bytes]]


class Instance(msgspec.Struct, frozen=True):
    """One running service: its name, its own id, and the addresses it answers at."""

    service: str
    id: str
    addresses: tuple[str, ...]


class Wire(Protocol):
    """Carries a question to whoever serves an address, and the answer back."""

    async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
        """The answer. `deadline` is in seconds on the clock's `monotonic`.

        Raises `NoAnswer` at once if nobody serves the address, and `TimeoutError` when the deadline passes first.
        """
        ...

    async def serve(self, address: str, handler: Handler) -> Callable[[], None]:
        """Answer what is asked at an address, until the function that this returns is called."""
        ...

    async def announce(self, instance: Instance) -> Callable[[], None]:
        """Say that an instance runs, until the function that this returns is called."""
        ...

    async def instances(self) -> list[Instance]:
        """Who runs now."""
        ...
