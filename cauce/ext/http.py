"""What probes and Prometheus ask of a process over HTTP: `/livez`, `/readyz` and `/metrics`.

It answers in threads of its own, so that it can say that the loop is blocked. Nothing that it tells holds a body of a
message, or a key.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

from cauce.errors import Refused
from cauce.ext import prometheus
from cauce.ext.observer import Observer
from cauce.ext.pulse import STALL, Pulse
from cauce.meter import Meter

__all__ = ["Health", "HttpServer", "parse_address"]

_log = logging.getLogger("cauce")

LOOPBACK = "127.0.0.1"
_MOST = 32
"""Requests that are answered at once. With one more, who has taken longest is hung up on: a sound one takes no time."""

_SECONDS = 5.0
_OLD = 60.0
"""Seconds without a look that succeeded, after which the bus counts as out of reach."""


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `[HOST:]PORT`, on loopback where no host is said. Raises `Refused`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else LOOPBACK
    if not (host and port.isascii() and port.isdecimal() and int(port) < 65_536):
        raise Refused(f"{text!r} is no address to listen at: write PORT, HOST:PORT or [::1]:PORT, port 0 for any")
    return host, int(port)


class Health:
    """Whether this process lives and is ready; any thread may ask.

    Parameters:
        services: that are to run here.
        stopped: why a service stopped by itself; empty while none has.
    """

    def __init__(
        self, services: Sequence[str], meter: Meter, pulse: Pulse, observer: Observer, stopped: Callable[[], str]
    ) -> None:
        self._services, self.meter, self.pulse, self.observer = services, meter, pulse, observer
        self._stopped = stopped

    def live(self) -> list[str]:
        """Why it does not live; nothing if it does."""
        silent = self.pulse.silent
        return [f"the loop has not ticked for {silent:.1f} s: a handler blocks it"] if silent > STALL else []

    def ready(self) -> list[str]:
        """Why it is not ready; nothing if it is."""
        reasons, states = self.live(), dict[str, str]()
        for each in list(self.meter.instances.values()):
            states[each.service] = each.state
        for service in self._services:
            state = states.get(service, "not there")
            if state != "running":
                reasons.append(f"{service} is {state}")
        if stopped := self._stopped():
            reasons.append(f"stopped: {stopped}")
        if self.observer.error:
            reasons.append(f"the bus cannot be read: {self.observer.error}")
        elif self.observer.age > _OLD and states:
            reasons.append(f"the bus has not been read for {self.observer.age:.0f} s")
        return reasons


class HttpServer:
    """Listens from `start` to `stop`; `port` is then the one that was given or found.

    On loopback it answers only those who ask for loopback: a page in a browser, which is led here by a name of its
    own, is refused.
    """

    def __init__(self, host: str, port: int, health: Health) -> None:
        self._host, self._health = host, health
        try:
            self._server = _Server(host, port, _handler(health, is_loopback(host)))
        except (OSError, OverflowError) as error:
            raise Refused(f"{host}:{port} cannot be listened at: {error}: name another with --http") from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="cauce http", daemon=True
        )

    @property
    def address(self) -> str:
        """Where it listens, as one types it."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Who has ended lets the next one have the port at once.
    allow_reuse_address = True
    request_queue_size = 2 * _MOST

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._open, self._lock = dict[Any, None](), threading.Lock()
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            longest = next(iter(self._open)) if len(self._open) >= _MOST else None
            self._open.pop(longest, None)
            self._open[request] = None
            if longest is not None:
                with suppress(OSError):
                    longest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Who asked went away; nothing of ours is at stake.
        _log.debug("http: a request was not answered", exc_info=True)


def _handler(health: Health, loopback: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "cauce", ""
        protocol_version = "HTTP/1.0"
        timeout = _SECONDS

        def do_GET(self) -> None:
            if why := self._refused():
                self._say(403, "text/plain; charset=utf-8", f"{why}\n")
                return
            path = self.path.partition("?")[0]
            if path == "/livez":
                self._probe(health.live())
            elif path == "/readyz":
                self._probe(health.ready())
            elif path == "/metrics":
                told = prometheus.text(health.meter, health.pulse, health.observer)
                self._say(200, prometheus.CONTENT_TYPE, told)
            else:
                self._say(404, "text/plain; charset=utf-8", "there are /livez, /readyz and /metrics\n")

        def do_HEAD(self) -> None:
            self.do_GET()

        def _refused(self) -> str:
            host = self.headers.get("Host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if loopback and not is_loopback(name.removeprefix("[").removesuffix("]")):
                return "ask for 127.0.0.1, ::1 or localhost: this is told on loopback only"
            origin = self.headers.get("Origin")
            if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
                return "this is not told to pages of others"
            return ""

        def _probe(self, reasons: list[str]) -> None:
            code = 503 if reasons else 200
            if "application/json" in self.headers.get("Accept", ""):
                told = json.dumps({"ok": not reasons, "reasons": reasons})
                self._say(code, "application/json", f"{told}\n")
            else:
                self._say(code, "text/plain; charset=utf-8", "".join(f"{each}\n" for each in reasons) or "ok\n")

        def _say(self, code: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "backslashreplace")
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug("http: %s", format % args)

    return Handler
