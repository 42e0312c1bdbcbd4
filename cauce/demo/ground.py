"""Where the demo plays: on a bus of its own, on whatever server, of which nothing stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from cauce.backends import installed, scheme_of, stores_at, without_password
from cauce.clock import Clock
from cauce.errors import Refused

__all__ = ["Ground", "ground"]


class Ground(msgspec.Struct, frozen=True):
    """The bus at `url`, which is there for this demo only, and where its services keep what is theirs; None: there."""

    url: str
    store: str | None

    @property
    def file(self) -> Path | None:
        """The file of the bus; None where it is on a server."""
        return Path(self.url.partition("://")[2][1:]) if scheme_of(self.url) == "sqlite" else None

    @property
    def shown(self) -> str:
        return without_password(self.url)


@asynccontextmanager
async def ground(bus: str | None, store: str | None, clock: Clock) -> AsyncIterator[Ground]:
    """A bus beside the one at an address, and a place for stores beside the one that is named, if one is.

    Parameters:
        bus: `postgresql://…` or `nats://…`; None: a file in a temporary folder.

    Raises `Refused`, `Unreachable` or `NotPermitted`, and `Unavailable` at the end, if something cannot be removed.
    """
    name = f"demo_{clock.id()[-12:]}"
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="cauce-demo-"))
        if bus is None:
            url = f"sqlite:///{folder}/bus.db"
        elif scheme_of(bus) == "sqlite":
            raise Refused("on SQLite the demo plays in a temporary file: leave --bus out")
        else:
            url = await _beside(stack, bus, name, folder, clock)
        yield Ground(url, None if store is None else await _store(stack, store, name, folder, clock))


async def _store(stack: AsyncExitStack, store: str, name: str, folder: str, clock: Clock) -> str:
    if scheme_of(store) != "sqlite":
        await stack.enter_async_context(stores_at(store, clock))  # Says where no store can be.
        return await _beside(stack, store, name, folder, clock)
    return f"sqlite:///{stack.enter_context(_folder(Path(store.partition('://')[2][1:])))}"


def _folder(place: Path) -> TemporaryDirectory[str]:
    if not place.is_dir():
        raise Refused(f"{place} is no folder: make it, or leave --store out")
    return TemporaryDirectory(prefix="cauce-demo-", dir=place.absolute())


async def _beside(stack: AsyncExitStack, url: str, name: str, folder: str, clock: Clock) -> str:
    if scheme_of(url) == "postgresql":
        with installed("postgres"):
            from cauce.backends.postgres import temporary as postgres
        found = postgres.beside(url, name)
        await stack.enter_async_context(postgres.temporary(found, clock))
    else:
        with installed("nats"):
            from cauce.backends.nats import temporary as nats
        found = nats.beside(url, name, f"{folder}/stores")
        await stack.enter_async_context(nats.temporary(found, clock))
    return found
