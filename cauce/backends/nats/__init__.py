"""A bus on NATS JetStream: three streams, and a wire that any client of NATS can ask."""

from __future__ import annotations

from cauce.clock import Clock
from cauce.errors import Refused

__all__ = ["open"]


async def open(url: str, *, clock: Clock | None = None, make: bool = True) -> object:
    raise Refused("a bus on NATS is not built yet: use sqlite:///… or postgresql://…")
