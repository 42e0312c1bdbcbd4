"""A bus on NATS JetStream: three streams, and a wire that any client of NATS can ask."""

from __future__ import annotations

import os
from pathlib import Path

from cauce.backends.health import Health
from cauce.backends.nats.health import PAYLOAD, health_of
from cauce.backends.nats.link import Link, connect
from cauce.backends.nats.log import NatsLog
from cauce.backends.nats.stores import NatsStores
from cauce.backends.nats.stream import streams_of
from cauce.backends.nats.wire import NatsWire
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.clock import Clock, SystemClock
from cauce.errors import Refused

__all__ = ["NatsBus", "open"]


class NatsBus:
    """The logs `facts`, `commands` and `records`, and the `wire`, of one bus on a server or a cluster."""

    facts: NatsLog
    commands: NatsLog
    records: NatsLog
    wire: NatsWire
    stores: NatsStores

    def __init__(self, link: Link, clock: Clock) -> None:
        self.link, self._clock, self._pid = link, clock, os.getpid()
        self.id = ""

    async def _open(self, make: bool) -> None:
        link = self.link
        if link.client.max_payload < PAYLOAD:
            raise Refused(
                f"{link} takes messages of {link.client.max_payload:,} bytes, an entry may need {PAYLOAD:,}: "
                "set max_payload to 1MB in the server's configuration"
            )
        *streams, leases = streams_of(link)
        for stream in (leases, *streams):
            await stream.open(make=make)
        self.facts, self.commands, self.records = (NatsLog(stream, leases) for stream in streams)
        self.id = self.facts.id.partition(":")[0]
        folder = Path(link.address.files or f".cauce/nats/{self.id}")
        self.stores = NatsStores(link, self._clock, SQLiteStores(folder, self._clock))
        self.wire = NatsWire(link, self._clock)

    async def health(self) -> Health:
        """What the server and the streams are, against what the promises need."""
        return await health_of(self.link)

    async def close(self) -> None:
        """Write what waits, then let go of the connection. In a process forked since, nothing is touched."""
        if os.getpid() != self._pid:
            return
        await self.wire.close()
        for log in (self.facts, self.commands, self.records):
            await log.close()
        await self.link.close()


async def open(url: str, *, clock: Clock | None = None, patience: float = 5.0, make: bool = True) -> NatsBus:
    """Open, and make if need be, the bus at an address such as `nats://host:4222/shop?replicas=3`.

    Parameters:
        patience: seconds that a write waits for a server that is away.
        make: whether the bus is made where there is none.

    Raises `Refused` for a server that cannot keep the promises, saying what to change, `Unreachable` and
    `NotPermitted`.
    """
    clock = clock or SystemClock()
    bus = NatsBus(await connect(url, clock, patience), clock)
    try:
        await bus._open(make)
    except BaseException:
        await bus.link.close()
        raise
    return bus
