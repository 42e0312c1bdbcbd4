"""The wire of a bus. Processes of tests load this, so it loads no more than the backend that they use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cauce.backends import open_backend
from cauce.clock import Clock, SystemClock
from cauce.wire import Wire

if TYPE_CHECKING:
    from cauce.backends.nats.wire import NatsWire
    from cauce.backends.postgres.wire import PostgresWire

__all__ = ["CLOCK", "nats_wire", "postgres_wire", "wire_at"]

CLOCK = SystemClock()


@asynccontextmanager
async def wire_at(url: str, clock: Clock = CLOCK) -> AsyncIterator[Wire]:
    """The wire of a bus, until it is left."""
    if url.startswith("nats://"):
        async with nats_wire(url, clock) as nats:
            yield nats
        return
    if url.startswith("postgresql:"):
        async with postgres_wire(url, clock) as postgres:
            yield postgres
        return
    backend = await open_backend(url, clock)
    try:
        yield backend.wire
    finally:
        await backend.close()


@asynccontextmanager
async def nats_wire(url: str, clock: Clock = CLOCK) -> AsyncIterator[NatsWire]:
    from cauce.backends.nats.link import connect
    from cauce.backends.nats.wire import NatsWire

    link = await connect(url, clock)
    wire = NatsWire(link, clock)
    try:
        yield wire
    finally:
        await wire.close()
        await link.close()


@asynccontextmanager
async def postgres_wire(url: str, clock: Clock = CLOCK) -> AsyncIterator[PostgresWire]:
    from cauce.backends.postgres.link import Link
    from cauce.backends.postgres.migrations import ensure
    from cauce.backends.postgres.wire import PostgresWire

    link = Link(url, clock)
    await link.open()
    try:
        await ensure(link)
        wire = PostgresWire(link, clock)
        try:
            yield wire
        finally:
            await wire.close()
    finally:
        await link.close()
