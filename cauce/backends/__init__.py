"""What implements the seams. A backend is imported only when its address is named."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from cauce.clock import Clock
from cauce.errors import Refused
from cauce.log import Log
from cauce.store import Stores
from cauce.wire import Instance, Wire

__all__ = ["Backend", "Look", "look", "open_backend", "scheme_of", "stores_at", "without_password"]


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
    @property
    def stores(self) -> Stores:
        """Where services keep what is their own, unless they are given another place."""
        ...

    async def close(self) -> None:
        """Write what waits, then let go."""
        ...


class Look(Protocol):
    """A bus that is there already, to be looked at: its logs, who runs on it, and what its services keep."""

    @property
    def id(self) -> str: ...
    @property
    def facts(self) -> Log: ...
    @property
    def commands(self) -> Log: ...
    @property
    def records(self) -> Log: ...
    @property
    def stores(self) -> Stores: ...
    async def instances(self) -> list[Instance]:
        """Who runs on it now."""
        ...


@asynccontextmanager
async def look(url: str, clock: Clock) -> AsyncIterator[Look]:
    """Looks at a bus without changing anything. Raises `Refused` where there is none: it is not made."""
    if scheme_of(url) == "sqlite":
        from cauce.backends.sqlite.peek import peek

        with peek(Path(url.partition("://")[2][1:]), clock) as found:
            yield found
        return
    backend = await open_backend(url, clock, make=False)
    try:
        yield _Looked(backend)
    finally:
        await backend.close()


class _Looked:
    """A backend that makes no difference between looking and taking part."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def instances(self) -> list[Instance]:
        return await self._backend.wire.instances()


def scheme_of(url: str) -> str:
    """Which backend an address means: `sqlite`, `postgresql` or `nats`.

    Raises `Refused` for an address nobody implements.
    """
    scheme, mark, rest = url.partition("://")
    if any("\ud800" <= character <= "\udfff" for character in url):
        raise Refused(f"bus address {url!r} is not UTF-8: name a file or a host in UTF-8")
    if scheme == "sqlite" and mark and rest.startswith("/") and Path(rest[1:]).name:
        return "sqlite"
    if scheme in ("postgresql", "postgres") and rest:
        return "postgresql"
    if scheme in ("nats", "tls") and rest:
        return "nats"
    raise Refused(
        f"bus address {without_password(url)!r}: write sqlite:///shop.db (relative) or sqlite:////var/lib/shop.db (absolute), "
        "postgresql://host/database or nats://host:4222"
    )


async def open_backend(url: str, clock: Clock, *, make: bool = True) -> Backend:
    """The backend at an address: `sqlite:///relative.db`, `sqlite:////absolute.db`, `postgresql://…`, `nats://…`.

    Parameters:
        make: whether a bus is made where there is none.

    Raises `Refused` for an address nobody implements, or one whose library is not installed.
    """
    scheme = scheme_of(url)
    if scheme == "sqlite":
        from cauce.backends import sqlite

        return await sqlite.open(url.partition("://")[2][1:], clock=clock)
    try:
        if scheme == "postgresql":
            from cauce.backends import postgres

            return cast(Backend, await postgres.open(url, clock=clock, make=make))
        from cauce.backends import nats

        return cast(Backend, await nats.open(url, clock=clock, make=make))
    except ModuleNotFoundError as error:
        extra = "postgres" if scheme == "postgresql" else "nats"
        raise Refused(f"a bus at {scheme}:// needs {error.name}: pip install 'cauce[{extra}]'") from None


@asynccontextmanager
async def stores_at(url: str, clock: Clock) -> AsyncIterator[Stores]:
    """The stores of services at an address of their own: `sqlite:///folder` or `postgresql://…`.

    Raises `Refused` for an address where no store can be.
    """
    scheme = scheme_of(url)
    if scheme == "sqlite":
        from cauce.backends.sqlite.stores import SQLiteStores

        yield SQLiteStores(Path(url.partition("://")[2][1:]), clock)
    elif scheme == "postgresql":
        try:
            from cauce.backends import postgres
        except ModuleNotFoundError as error:
            raise Refused(f"a store at postgresql:// needs {error.name}: pip install 'cauce[postgres]'") from None
        async with postgres.stores_at(url, clock=clock) as stores:
            yield stores
    else:
        raise Refused(
            f"store address {without_password(url)!r}: write sqlite:///folder or postgresql://host/database; "
            "on NATS a service that keeps no data needs none"
        )


def without_password(url: str) -> str:
    """An address as it may be shown to anybody."""
    return re.sub(r"(?<=://)([^/@]*):[^@/]*@", r"\1:…@", url)
