"""A bus in a PostgreSQL database: three logs, a wire, and the stores of services, shared by many machines."""

from __future__ import annotations

from typing import Any

from cauce.clock import Clock
from cauce.errors import Refused

__all__ = ["open"]


async def open(url: str, *, clock: Clock | None = None) -> Any:
    raise Refused("not built yet")
