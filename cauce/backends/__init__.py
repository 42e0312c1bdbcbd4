"""What implements the seams. A backend is imported only when its address is named."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from cauce.backends.health import Health
from cauce.clock import Clock
from cauce.errors import Refused
from cauce.log import Log
from cauce.store import Stores
from cauce.verify import Report
from cauce.wire import Instance, Wire

__all__ = [
    "Backend",
    "Kept",
    "Look",
    "examine",
    "installed",
    "look",
    "nothing_at",
    "open_backend",
    "read_all",
    "scheme_of",
    "stores_at",
    "without_password",
]


class Kept(Protocol):
    """What is kept on a bus: three logs, and what its services keep."""

    @property
    def id(self) -> str: ...
    @property
    def facts(self) -> Log: ...
    @property
    def commands(self) -> Log: ...
    @property
    def records(self) -> Log: ...
    @property
    def stores(self) -> Stores:
        """Where services keep what is their own, unless they are given another place."""
        ...


class Backend(Kept, Protocol):
    """A bus as a backend gives it: what it keeps, and a wire."""

    @property
    def wire(self) -> Wire: ...
    async def health(self) -> Health:
        """What it says of itself, against what the promises need. A few short questions to its server."""
        ...

    async def close(self) -> None:
        """Write what waits, then let go."""
        ...


class Look(Kept, Protocol):
    """A bus that is there already, to be looked at: what it keeps, and who runs on it."""

    async def instances(self) -> list[Instance]:
        """Who runs on it now."""
        ...

    async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
        """See `cauce.wire.Wire.ask`."""
        ...


@asynccontextmanager
async def look(url: str, clock: Clock, *, follow: bool = False) -> AsyncIterator[Look]:
    """A bus that is there already. Nothing is made where there is none: that is `Refused`.

    On SQLite the file is opened only to look, so it works beside any writer, on a file of somebody else, on a backup
    and on a damaged log.

    Parameters:
        follow: be woken by what others write: then a file, too, is opened as by those who take part.
    """
    if scheme_of(url) == "sqlite":
        from cauce.backends.sqlite.peek import peek

        with peek(_path(url), clock) as found:
            if not follow:
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

    async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
        return await self._backend.wire.ask(address, payload, deadline)


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

        return await sqlite.open(_path(url), clock=clock)
    if scheme == "postgresql":
        with installed("postgres"):
            from cauce.backends import postgres
        return cast(Backend, await postgres.open(url, clock=clock, make=make))
    with installed("nats"):
        from cauce.backends import nats
    return cast(Backend, await nats.open(url, clock=clock, make=make))


@asynccontextmanager
async def stores_at(url: str, clock: Clock) -> AsyncIterator[Stores]:
    """The stores of services at an address of their own: `sqlite:///folder` or `postgresql://…`.

    Raises `Refused` for an address where no store can be.
    """
    scheme = scheme_of(url)
    if scheme == "sqlite":
        from cauce.backends.sqlite.stores import SQLiteStores

        yield SQLiteStores(_path(url), clock)
    elif scheme == "postgresql":
        with installed("postgres"):
            from cauce.backends import postgres
        async with postgres.stores_at(url, clock=clock) as stores:
            yield stores
    else:
        raise Refused(
            f"store address {without_password(url)!r}: write sqlite:///folder or postgresql://host/database; "
            "on NATS a service that keeps no data needs none"
        )


async def examine(url: str, clock: Clock) -> Health:
    """What the backend of a bus that is there already says of itself, against what the promises need.

    Nothing is made or changed. Raises `Refused` where there is no bus, and what opening one raises where a server is
    away, too old, or a replica.
    """
    scheme = scheme_of(url)
    if scheme == "sqlite":
        from cauce.backends.sqlite.health import examine as examine_sqlite

        return await examine_sqlite(_path(url), clock)
    if scheme == "postgresql":
        with installed("postgres"):
            from cauce.backends.postgres.health import examine as examine_postgres
        return await examine_postgres(url, clock)
    with installed("nats"):
        from cauce.backends.nats.health import examine as examine_nats
    return await examine_nats(url, clock)


async def read_all(url: str, clock: Clock) -> Report:
    """Read all of a bus that is there already, and say what is not as it was written. Nothing is changed.

    Raises `Refused` where there is no bus, and what opening one raises; damage of any kind is a finding.
    """
    scheme = scheme_of(url)
    if scheme == "sqlite":
        from cauce.backends.sqlite.upkeep import verify as verify_sqlite

        return verify_sqlite(_path(url))
    if scheme == "postgresql":
        with installed("postgres"):
            from cauce.backends.postgres.verify import verify as verify_postgres
        return await verify_postgres(url, clock)
    with installed("nats"):
        from cauce.backends.nats.verify import verify as verify_nats
    return await verify_nats(url, clock)


@contextmanager
def installed(extra: str) -> Iterator[None]:
    """While a backend is imported. Raises `Refused` where a library is missing, saying what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Refused(f"this address needs {error.name}: pip install 'cauce[{extra}]'") from None


def nothing_at(place: object) -> Refused:
    """What is told where there is no bus, and none is to be made."""
    return Refused(f"there is no bus at {place}: name another with --bus, or let a service or an import make this one")


def _path(url: str) -> Path:
    return Path(url.partition("://")[2][1:])


def without_password(url: str) -> str:
    """An address as it may be shown to anybody."""
    url = re.sub(r"(?<=://)([^/@]*):[^@/]*@", r"\1:…@", url)
    # On NATS a user without a password is a token; PostgreSQL takes a password among the options, too.
    url = re.sub(r"^(nats|tls)://[^/@:]*@", r"\1://…@", url)
    return re.sub(r"(?<=password=)[^&]*", "…", url)
