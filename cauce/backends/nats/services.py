"""The services API of NATS (ADR-32): other clients discover our services, ping them and read their statistics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import msgspec

from cauce.backends.nats.answering import Endpoint
from cauce.backends.nats.client import Tapped
from cauce.backends.nats.frames import QUEUE
from cauce.backends.nats.link import Link
from cauce.wire import Instance

__all__ = ["Services"]

_VERBS = ("PING", "INFO", "STATS")
_encode = msgspec.json.Encoder().encode


class Services:
    """The instances announced here, each a service of its own.

    Done by hand, not with `nats.micro`: endpoints come and go with the slots here, which it does not know, and each of
    its requests takes a queue, a turn of the loop and a wrapper more.
    """

    def __init__(
        self, link: Link, endpoints: Callable[[], Iterable[Endpoint]], send: Callable[[bytes, bytes], None]
    ) -> None:
        self._link, self._endpoints, self._send = link, endpoints, send
        self._version = _semantic(version("cauce"))
        self.instances: dict[str, Instance] = {}
        self._taps: dict[str, list[Tapped]] = {}

    async def show(self, instance: Instance) -> None:
        """Let it be found. The same id again replaces it."""
        new = instance.id not in self.instances
        self.instances[instance.id] = instance
        if new:
            self._taps[instance.id] = taps = list[Tapped]()
            name, id = self._name(instance), _plain(instance.id)
            for verb in _VERBS:
                for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{id}"):
                    taps.append(await self._link.client.tap(subject, self._answers(instance.id, verb)))

    def hide(self, id: str) -> bool:
        """Let it be found no more. False: it was not there."""
        for tapped in self._taps.pop(id, ()):
            tapped()
        return self.instances.pop(id, None) is not None

    def _name(self, instance: Instance) -> str:
        return self._link.stream(_plain(instance.service))

    def _answers(self, id: str, verb: str) -> Callable[[bytes, bytes, bytes, bytes], None]:
        def answer(subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
            instance = self.instances.get(id)
            if instance is not None and reply:
                self._send(reply, _encode(self._said(instance, verb)))

        return answer

    def _said(self, instance: Instance, verb: str) -> dict[str, Any]:
        said = {
            "type": f"io.nats.micro.v1.{verb.lower()}_response",
            "name": self._name(instance),
            "id": _plain(instance.id),
            "version": _semantic(instance.version) if instance.version else self._version,
            "metadata": {
                "cauce": version("cauce"),
                "version": instance.version,
                "host": instance.host,
                "domains": ",".join(sorted({address.partition("/")[0] for address in instance.addresses})),
                "instance": instance.id,
                "pid": str(instance.pid),
            },
        }
        if verb == "PING":
            return said
        domains = {address.partition("/")[0] for address in instance.addresses}
        endpoints = [each for each in self._endpoints() if each.address.partition("/")[0] in domains]
        if verb == "INFO":
            about = f'{instance.service}, a service of Cauce: ask with {{"type": "…", "body": {{…}}}}'
            return {
                **said,
                "description": about,
                "endpoints": [_endpoint(each) | {"metadata": {}} for each in endpoints],
            }
        started = datetime.fromtimestamp(instance.since / 1_000_000, UTC)
        return {
            **said,
            "started": started.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            # What changes is no metadata.
            "endpoints": [
                _endpoint(each) | _statistics(each) | {"data": {"state": instance.state}} for each in endpoints
            ],
        }


def _endpoint(endpoint: Endpoint) -> dict[str, Any]:
    return {"name": _plain(endpoint.address), "subject": endpoint.subject, "queue_group": QUEUE}


def _statistics(endpoint: Endpoint) -> dict[str, Any]:
    nanoseconds = int(endpoint.time * 1e9)
    return {
        "num_requests": endpoint.requests,
        "num_errors": endpoint.errors,
        "last_error": endpoint.last_error,
        "processing_time": nanoseconds,
        "average_processing_time": nanoseconds // endpoint.requests if endpoint.requests else 0,
    }


def _plain(text: str) -> str:
    """A name as the services API takes it: letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", text) or "-"


def _semantic(text: str) -> str:
    """A version as the services API takes it: `1.2.3`, and what Python puts behind it after a `-`."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?[.+-]?(.*)\Z", text)
    if found is None:
        return "0.0.0"
    major, minor, patch, rest = found.groups()
    return f"{major}.{minor}.{patch or 0}" + (f"-{_plain(rest)}" if rest else "")
