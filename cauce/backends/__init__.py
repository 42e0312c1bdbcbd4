"""What implements the seams. A backend is imported only when its address is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from cauce.clock import Clock
from cauce.errors import Refused
from cauce.log import Log
from cauce.wire import Wire

__all__ = ["Backend", "open_backend", "without_password"]


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
    """The backend at an address: `sqlite:///relative.db`, `sqlite:////absolute.db`, `postgresql://…`, `nats://…`.

    Raises `Refused` for an address nobody implements, or one whose library is not installed.
    """
    scheme, mark, rest = url.partition("://")
    if scheme == "sqlite" and mark and rest.startswith("/") and len(rest) > 1:
        from cauce.backends import sqlite

        return await sqlite.open(rest[1:], clock=clock)
    try:
        if scheme in ("postgresql", "postgres") and rest:
            from cauce.backends import postgres

            return await postgres.open(url, clock=clock)
        if scheme in ("nats", "tls") and rest:
            from cauce.backends import nats

            return await nats.open(url, clock=clock)
    except ModuleNotFoundError as error:
        extra = "postgres" if scheme.startswith("postgres") else "nats"
        raise Refused(f"bus address {scheme}://… needs {error.name}: pip install 'cauce[{extra}]'") from None
    raise Refused(
        f"bus address {without_password(url)!r}: write sqlite:///shop.db (relative) or sqlite:////var/lib/shop.db (absolute), "
        "postgresql://host/database or nats://host:4222"
    )


def without_password(url: str) -> str:
    """An address as it may be shown to anybody."""
    return re.sub(r"(?<=://)([^/@]*):[^@/]*@", r"\1:…@", url)
