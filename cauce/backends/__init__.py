"""What implements the seams. A backend is imported only when its address is named."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cauce.clock import Clock
from cauce.errors import Refused
from cauce.log import Log
from cauce.wire import Wire

__all__ = ["Backend", "open_backend"]


class Backend(Protocol):
    """A bus as a backend gives it: three logs and a wire."""

    @property
    def id(self) -> str: ...
    @property
    def facts(self) -> Log: ...
    @property
    def commands(self) -> Log: ...
    @property
    def records(self) -> Log: ...
    @property
    def wire(self) -> Wire: ...
    def store(self, service: str) -> Path:
        """The folder where a service keeps its own data."""
        ...

    async def close(self) -> None:
        """Write what waits, then let go."""
        ...


async def open_backend(url: str, clock: Clock) -> Backend:
    """The backend at an address: `sqlite:///relative.db`, `sqlite:////absolute.db`.

    Raises `Refused` for an address nobody implements.
    """
    scheme, mark, rest = url.partition("://")
    if scheme == "sqlite" and mark and rest.startswith("/") and len(rest) > 1:
        from cauce.backends import sqlite

        return await sqlite.open(rest[1:], clock=clock)
    raise Refused(f"bus address {url!r}: write sqlite:///shop.db (relative) or sqlite:////var/lib/shop.db (absolute)")
