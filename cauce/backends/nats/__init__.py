"""A bus on NATS JetStream: three streams, and a wire that any client of NATS can ask."""

from __future__ import annotations

from typing import Any

from cauce.clock import Clock
from cauce.errors import Refused

__all__ = ["open"]


async def open(url: str, *, clock: Clock | None = None) -> Any:
    raise Refused("not built yet")
