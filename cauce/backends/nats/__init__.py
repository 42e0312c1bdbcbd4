"""A bus on NATS JetStream: three streams, and a wire that any client of NATS can ask."""

from __future__ import annotations

from cauce.accept import ENTRY_BYTES
from cauce.backends.nats.link import Link, connect
from cauce.backends.nats.log import NatsLog
from cauce.backends.nats.stream import Stream
from cauce.clock import Clock, SystemClock
from cauce.errors import Refused

__all__ = ["NatsBus", "open"]

_PAYLOAD = ENTRY_BYTES + 96 * 1024
"""What the server must take: the largest entry, and its header lines."""


class NatsBus:
    """The logs `facts`, `commands` and `records`, and the `wire`, of one bus on a server or a cluster."""

    facts: NatsLog
    commands: NatsLog
    records: NatsLog

    def __init__(self, link: Link) -> None:
        self.link = link

    @property
    def id(self) -> str:
        return self.facts.id

    async def _open(self) -> None:
        link = self.link
        if link.client.max_payload < _PAYLOAD:
            raise Refused(
                f"{link} takes messages of {link.client.max_payload:,} bytes, an entry may need {_PAYLOAD:,}: "
                "set max_payload to 1MB in the server's configuration"
            )
        leases = Stream(link, "leases", last=True, lasting=False)
        streams = [
            Stream(link, "facts"),
            Stream(link, "commands", lasting=False),
            Stream(link, "records", last=True, lasting=False),
        ]
        for stream in (leases, *streams):
            await stream.open()
        self.facts, self.commands, self.records = (NatsLog(stream, leases) for stream in streams)

    async def close(self) -> None:
        """Write what waits, then let go of the connection."""
        for log in (self.facts, self.commands, self.records):
            await log.close()
        await self.link.close()


async def open(url: str, *, clock: Clock | None = None, patience: float = 5.0) -> NatsBus:
    """Open, and make if need be, the bus at an address such as `nats://host:4222/shop?replicas=3`.

    Parameters:
        patience: seconds that a write waits for a server that is away.

    Raises `Refused` for a server that cannot keep the promises, saying what to change, `Unreachable` and
    `NotPermitted`.
    """
    bus = NatsBus(await connect(url, clock or SystemClock(), patience))
    try:
        await bus._open()
    except BaseException:
        await bus.link.close()
        raise
    return bus
