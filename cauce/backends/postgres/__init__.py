"""A bus in a PostgreSQL database: three logs, a wire, and the stores of services, shared by many machines."""

from __future__ import annotations

from cauce.clock import Clock
from cauce.errors import Refused

__all__ = ["open"]


async def open(url: str, *, clock: Clock | None = None, make: bool = True) -> object:
    raise Refused("not built yet")
