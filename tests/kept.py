"""What is kept on a bus, seen and changed from outside of a run, whatever the backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cauce.backends import Backend, open_backend
from cauce.clock import SystemClock
from cauce.retry import Retry
from cauce.store import Store, Stores, Waiting

__all__ = ["backend_at", "forget_places", "hurry", "move_places", "rows", "store_of", "stores_of", "waiting"]


@asynccontextmanager
async def backend_at(url: str) -> AsyncIterator[Backend]:
    """A bus, as another process opens it."""
    backend = await open_backend(url, SystemClock())
    try:
        yield backend
    finally:
        await backend.close()


@asynccontextmanager
async def stores_of(url: str) -> AsyncIterator[Stores]:
    """The stores of the services of a bus."""
    async with backend_at(url) as backend:
        yield backend.stores


@asynccontextmanager
async def store_of(url: str, service: str, migrations: Sequence[str] = ()) -> AsyncIterator[Store]:
    """The store of a service, opened beside those of its instances."""
    async with stores_of(url) as stores:
        store = await stores.open(service, migrations, keeps=bool(migrations))
        yield store
        await store.close()


async def waiting(url: str, service: str, consumer: str) -> list[Waiting]:
    """The messages that wait."""
    async with store_of(url, service) as store:
        return await store.waiting(consumer)


async def rows(url: str, service: str, schema: str, sql: str) -> list[tuple[Any, ...]]:
    """What a service has in tables of its own."""
    async with store_of(url, service, [schema]) as store:
        return await store.fetch(sql)


async def forget_places(url: str, service: str, *consumers: str) -> None:
    """As after a crash before any place was written: all is handled again."""
    await move_places(url, service, *consumers, to=0)


async def move_places(url: str, service: str, *consumers: str, to: int, log: str = "") -> None:
    """Have consumers stand elsewhere, in a log that may be another one."""
    async with backend_at(url) as backend, store_of(url, service) as store:
        for consumer in consumers:
            read = backend.commands if consumer.startswith("decide ") else backend.facts
            places = await store.places(consumer, read.id, await read.head())
            assert places, f"{consumer} of {service} has no place"
            for domain, slot in places:
                store.move(None, consumer, domain, slot, log or read.id, to)
        await store.flush()


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again after a tenth of the time, where time is real."""
    delay = Retry.delay
    monkeypatch.setattr(Retry, "delay", lambda self, tries, chance: delay(self, tries, chance) / 10)
