"""The registry: who runs, in a small stream in the server's memory that forgets whoever gives no sign of life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from cauce.backends.nats.api import NAME_IN_USE, ApiError, ask, refusal
from cauce.backends.nats.call import Reply
from cauce.backends.nats.direct import pages
from cauce.backends.nats.link import Link
from cauce.backends.present import instances_of
from cauce.clock import Clock
from cauce.errors import NoAnswer, Unavailable, Unreachable
from cauce.wire import Instance

__all__ = ["BEAT", "LEASE", "Registry"]

_log = logging.getLogger("cauce")

BEAT = 2.0
LEASE = 30.0
"""Seconds after which the server forgets who said nothing. Who is not connected any more is known at once; in the time
between three beats missed and this, one that stands still is shown with the age of its beat."""

_MOST = 1000

_encode = msgspec.json.Encoder().encode


class _Told(msgspec.Struct, frozen=True):
    """As much of what JetStream's API answers as is looked at."""

    ts: str = ""


class Registry:
    """One message for each process that announces something, under its name; the next takes its place."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link, self._clock = link, clock
        self._stream = link.stream("instances")
        self._known: dict[str, tuple[Instance, ...]] | None = None
        self._stale = False

    def _subject(self, name: str) -> str:
        return self._link.subject("here", name)

    async def publish(self, name: str, instances: Collection[Instance]) -> None:
        """Say this of a process. The stream is made where it is missing: it is gone with the server's memory.

        Raises `Unavailable`, `NotPermitted`, `Refused` if the server makes no such stream, `OSError`.
        """
        body = _encode(tuple(instances))
        try:
            await self._link.request(self._subject(name), body)
        except NoAnswer:
            await self._make()
            await self._link.request(self._subject(name), body)

    async def _make(self) -> None:
        config = {
            "name": self._stream,
            "subjects": [self._subject("*")],
            "storage": "memory",
            "num_replicas": self._link.address.replicas,
            "max_msgs_per_subject": 1,
            "max_age": int(LEASE * 1e9),
            "allow_direct": True,
        }
        try:
            await ask(self._link, f"STREAM.CREATE.{self._stream}", config, _Told)
        except ApiError as error:
            if error.code != NAME_IN_USE:
                raise refusal(error, self._link, "the list of who runs") from None

    async def instances(self, is_there: Callable[[str], Any]) -> dict[str, tuple[Instance, ...]]:
        """What each process announces, by its name; when the registry cannot be read, as last known.

        `is_there` says of a name whether its process is still connected: who was killed is not waited for. Raises
        `Unavailable` if it cannot be read and never could.
        """
        try:
            if self._known is not None and self._link.is_away:
                raise Unreachable("the server is away")
            found = await self.read()
        except (Unavailable, OSError, ApiError, msgspec.MsgspecError) as error:
            if self._known is None:
                raise (
                    error if isinstance(error, Unavailable) else Unavailable(f"who runs is not known: {error}")
                ) from error
            if not self._stale:
                self._stale = True
                _log.warning("the registry cannot be read, who runs is told as last known: %s", error)
            return {name: tuple(replace(each, stale=True) for each in said) for name, said in self._known.items()}
        if self._stale:
            self._stale = False
            _log.warning("the registry can be read again")
        alive = await asyncio.gather(*(is_there(name) for name in found))
        self._known = {name: said for (name, said), there in zip(found.items(), alive, strict=True) if there}
        return self._known

    async def read(self) -> dict[str, tuple[Instance, ...]]:
        """What each process has lately announced, by its name, whether or not it is still connected."""
        found: dict[str, tuple[Instance, ...]] = {}
        start = len(self._subject(""))
        said = await self._all()
        if said:
            told = await ask(self._link, f"STREAM.INFO.{self._stream}", None, _Told)
            # Ages, not times: the server's clock is only compared with itself.
            here, there = self._clock.now(), _micros(told.ts)
            for each in said:
                headers = each.headers
                beat = here - max(0, there - _micros(headers["Nats-Time-Stamp"]))
                instances = instances_of(each.data) if each.data else ()
                if instances:
                    found[headers["Nats-Subject"][start:]] = tuple(
                        replace(instance, beat=beat) for instance in instances
                    )
        return found

    async def _all(self) -> list[Reply]:
        """The last message of each process, in one go."""
        found, _ = await pages(self._link, self._stream, {"multi_last": [self._subject("*")], "batch": _MOST})
        return [Reply(data, head) for head, data in found]


def _micros(text: str) -> int:
    """Microseconds since 1970 of a time as the server writes it, which may have nanoseconds."""
    moment = datetime.fromisoformat(text[:19]).replace(tzinfo=UTC)
    fraction = text[19:].removeprefix(".").rstrip("Z")
    return int(moment.timestamp()) * 1_000_000 + int(fraction[:6].ljust(6, "0") if fraction else 0)
