"""Whether the servers and streams of a bus keep the promises, as far as that can be seen from a client."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from cauce.accept import ENTRY_BYTES
from cauce.backends.health import DURABLE, ONE_WRITER, PRIVATE, Finding, Health
from cauce.backends.nats.bucket import buckets
from cauce.backends.nats.call import Lost
from cauce.backends.nats.link import Link, connect
from cauce.backends.nats.stream import Info, info_of, streams_of
from cauce.clock import Clock
from cauce.errors import CauceError

__all__ = ["PAYLOAD", "examine", "health_of"]

PAYLOAD = ENTRY_BYTES + 96 * 1024
"""What the server must take: the largest entry, and its header lines."""

_JETSTREAM = "$SYS.REQ.SERVER.PING.JSZ"
"""Where servers say how JetStream is set up: to the system account, and to who imports it from there."""

_PATIENCE = 1.0
_SYNC_CURE = "set sync_interval: always in the jetstream block of the configuration of each server, and restart it"
_UNSEEN_CURE = f"{_SYNC_CURE}; then say so with ?sync=always in the address, or let the account import {_JETSTREAM} so that it is seen"


class _Settings(msgspec.Struct, frozen=True):
    sync_interval: int = 0
    sync_always: bool = False


class _JetStream(msgspec.Struct, frozen=True):
    config: _Settings | None = None


class _Server(msgspec.Struct, frozen=True):
    name: str = ""


class _Said(msgspec.Struct, frozen=True):
    server: _Server = _Server()
    data: _JetStream = _JetStream()


async def examine(url: str, clock: Clock) -> Health:
    """The health of a bus that is there already, with the stores of its services.

    Raises `Refused` where there is none, and what `connect` raises.
    """
    link = await connect(url, clock)
    try:
        names = await buckets(link, "store")
        return await health_of(link, await asyncio.gather(*(info_of(link, name) for name in names)))
    finally:
        await link.close()


async def health_of(link: Link, stores: Iterable[Info] = ()) -> Health:
    """The health of a bus: one round trip for its streams, one for the settings of the servers that hold them.

    Parameters:
        stores: what the server says of the buckets of its services, which are streams, too.
    """
    streams = streams_of(link)
    logs = await asyncio.gather(*(stream.info() for stream in streams))
    infos = (*logs, *stores)
    holders = sorted({name for info in infos for name in info.holders}) or [str(link.client.told.get("server_name"))]
    syncs = dict(zip(holders, await asyncio.gather(*(_sync(link, name) for name in holders)), strict=True))
    findings = (
        *(each for one, info in zip(streams, logs, strict=True) for each in one.breaches(info.config)),
        *(each for one, info in zip(streams, logs, strict=True) for each in one.lapses(info.config)),
        *_copies(link.address.replicas, infos),
        *(each for name, is_ in syncs.items() for each in _flushes(link, name, is_)),
        *_access(
            link.client.peer,
            is_open=not link.client.told.get("auth_required"),
            is_encrypted=link.client.is_encrypted,
        ),
        *_payload(link.client.max_payload),
    )
    return Health(str(link), "nats", _seen(link, infos, syncs), findings)


def _seen(link: Link, infos: Sequence[Info], syncs: Mapping[str, _Settings | None]) -> dict[str, str | int]:
    client = link.client
    return {
        "NATS": str(client.told.get("version")),
        "servers": ", ".join(syncs),
        "cluster": infos[0].cluster.name or "none",
        "replicas": _by_value({info.config.name: str(info.config.num_replicas) for info in infos}),
        "storage": _by_value({info.config.name: info.config.storage for info in infos}),
        "sync_interval": _by_value({name: _shown(link, each) for name, each in syncs.items()}),
        "authorization": "asked for" if client.told.get("auth_required") else "none",
        "encryption": "TLS" if client.is_encrypted else "none",
        "max_payload": client.max_payload,
    }


def _by_value(values: Mapping[str, str]) -> str:
    """What all have, or each value with the names of those that have it."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return ", ".join(value if len(names) == 1 else f"{value} ({' '.join(of)})" for value, of in names.items())


# ---------------------------------------------------------------------------------------------------------- flushing


async def _sync(link: Link, server: str) -> _Settings | None:
    """How a server flushes, None where it does not tell us."""
    question = msgspec.json.encode({"server_name": server, "exact_match": True})
    try:
        reply = await link.request(_JETSTREAM, question, timeout=_PATIENCE)
        said = msgspec.json.decode(reply.data, type=_Said)
    except (CauceError, Lost, TimeoutError, msgspec.MsgspecError):
        return None
    return said.data.config if said.server.name == server else None


def _shown(link: Link, settings: _Settings | None) -> str:
    if settings is None:
        return f"{link.address.sync}, as the address says" if link.address.sync else "cannot be seen"
    return "always" if settings.sync_always else f"every {settings.sync_interval / 1e9:g} s"


def _flushes(link: Link, server: str, settings: _Settings | None) -> Iterator[Finding]:
    if settings is None and link.address.sync:
        return
    if settings is None or not settings.sync_always:
        found = "unknown (a client is not told)" if settings is None else _shown(link, settings)
        cure = _UNSEEN_CURE if settings is None else _SYNC_CURE
        yield Finding(f"sync_interval of server {server}", found, "always", DURABLE, cure)


# ----------------------------------------------------------------------------------------------------------- streams


def _copies(asked: int, infos: Sequence[Info]) -> Iterator[Finding]:
    """One server alone is as one disk is, on every backend. In a cluster each entry is expected to outlive a server."""
    needed = 3 if asked == 1 and infos[0].cluster.name else asked
    few = [info.config.name for info in infos if info.config.num_replicas < needed]
    if few:
        stand = sorted({info.config.num_replicas for info in infos if info.config.num_replicas < needed})
        yield Finding(
            f"replicas of {', '.join(few)}", " or ".join(map(str, stand)), str(needed), f"{DURABLE} of a server",
            f"nats stream edit --replicas {needed}, for each of them, and ?replicas={needed} in the address",
        )  # fmt: skip
    away = sorted({peer.name for info in infos for peer in info.cluster.replicas or () if peer.offline})
    if away:
        yield Finding(f"server {', '.join(away)}", "away", "there", f"{DURABLE} of another server", "start it")


# ------------------------------------------------------------------------------------------------------------ access


def _access(peer: str, *, is_open: bool, is_encrypted: bool) -> Iterator[Finding]:
    if _is_loopback(peer):
        return
    if is_open:
        yield Finding(
            "authorization", "none", "a user for each service", ONE_WRITER,
            "give the server an authorization or accounts block, and say nats://user:password@host in the address",
        )  # fmt: skip
    if not is_encrypted:
        yield Finding(
            f"encryption of the connection to {peer}", "none", "TLS", PRIVATE,
            "give the server a tls block, and say tls://host in the address",
        )  # fmt: skip


def _is_loopback(peer: str) -> bool:
    try:
        return ipaddress.ip_address(peer.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _payload(largest: int) -> Iterator[Finding]:
    if largest < PAYLOAD:
        yield Finding(
            "max_payload", f"{largest:,}", f"{PAYLOAD:,} or more", "an entry of any size is taken",
            "set max_payload: 1MB in the server's configuration",
        )  # fmt: skip
