"""What `cauce run` tells of itself while it runs: its meter, and over HTTP with `--http`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from cauce.bus import Bus
from cauce.cli.logs import tell
from cauce.ext.http import Health, HttpServer, parse_address
from cauce.ext.observer import Observer
from cauce.ext.pulse import Pulse
from cauce.meter import Meter

__all__ = ["Probes", "options", "probed"]


class Probes:
    """What is counted, and who looks at it."""

    def __init__(self, observer: Observer | None) -> None:
        self.meter, self._observer = Meter(), observer
        self._bus: Bus | None = None

    def started(self, bus: Bus) -> None:
        """All services run."""
        self._bus = bus
        if self._observer is not None:
            self._observer.start()

    def stopped(self) -> str:
        """Why a service stopped by itself."""
        failed = None if self._bus is None else self._bus.failed
        if failed is None or not failed.done() or failed.cancelled():
            return ""
        return str(failed.exception())


@asynccontextmanager
async def probed(services: Sequence[str], bus: str, store: str | None, http: str | None) -> AsyncIterator[Probes]:
    """Answer probes from before the services start until they have stopped. Raises `Refused` for an address in use."""
    if http is None:
        yield Probes(None)
        return
    observer, pulse = Observer(bus, store, services), Pulse()
    probes = Probes(observer)
    server = HttpServer(*parse_address(http), Health(services, probes.meter, pulse, observer, probes.stopped))
    server.start()
    tell(f"{', '.join(services)}: answering {server.address}/livez, /readyz and /metrics")
    try:
        yield probes
    finally:
        observer.stop()
        server.stop()
        pulse.stop()


def options(http: str | None, log_format: str) -> Callable[[int], list[str]]:
    """What the nth process of many is given of these options: a port of its own, the next one, or any if that is 0."""

    def of(number: int) -> list[str]:
        given = ["--log-format", log_format]
        if http is None:
            return given
        host, colon, _ = http.rpartition(":")
        port = parse_address(http)[1]
        return [*given, "--http", f"{host}{colon}{port + number if port else 0}"]

    return of
