"""Where the promises of the wire are tried: a place for each backend, and other processes there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.request import urlopen

from cauce.wire import Wire
from tests.servers import Nats, Postgres
from tests.wired import CLOCK, wire_at

__all__ = [
    "NatsPlace",
    "Peer",
    "Place",
    "PostgresPlace",
    "SQLitePlace",
    "Start",
    "ask",
    "starter",
    "until",
]

PEER = """
import asyncio, os, signal, sys
from cauce.wire import Instance, Load
from cauce.clock import SystemClock
from shifted import Shifted
from wired import wire_at

took, asked = 0.002, 0

def say(word):
    print(word, flush=True)

async def handler(payload):
    word = payload.decode()
    if word == "pid":
        return str(os.getpid()).encode()
    if word == "fail":
        raise ValueError("cannot")
    if word in ("hang", "late"):
        say("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say("cancelled")
            if word == "late":
                return b"late"
            raise
    if word == "bytes":
        return bytes(range(256))
    if word == "huge":
        return b"x" * (5 << 20)
    if word.startswith("large "):
        return b"x" * int(word[6:])
    if word.startswith("die "):
        try:
            os.close(os.open(word[4:], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return str(os.getpid()).encode()
        os._exit(1)
    if word == "die":
        os._exit(1)
    if word == "work":
        global asked
        asked += 1
        await asyncio.sleep(took)
        return str(os.getpid()).encode()
    return payload

async def main():
    async with wire_at(sys.argv[1], Shifted(sys.argv[2]) if len(sys.argv) > 2 else SystemClock()) as wire:
        leave = {}
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        say("ready")
        while line := (await lines.readline()).decode():
            order, _, what = line.strip().partition(" ")
            if order == "serve":
                leave[what] = await wire.serve(what, handler)
            elif order == "leave":
                leave.pop(what)()
            elif order == "announce":
                await wire.announce(Instance(what, what, (what,), os.getpid(), "starting", 1))
            elif order == "runs":
                running = Instance(what, f"{what} {os.getpid()}", (what,), os.getpid(), "running", 1, version="1.4.2")
                leave[what, "runs"] = await wire.announce(running, lambda: Load(asked, 7))
            elif order == "drains":
                await wire.announce(Instance(what, f"{what} {os.getpid()}", (what,), os.getpid(), "draining", 1))
            elif order == "takes":
                global took
                took = float(what)
            elif order == "fork":
                if not (child := os.fork()):
                    signal.pause()
                say(str(child))
            say("done")
    say("closed")

asyncio.run(main())
"""


class Place(Protocol):
    """A bus of one backend, as empty as the test needs it."""

    url: str
    most: int
    """Bytes of payload that surely go over this wire."""

    def opened(self) -> AbstractAsyncContextManager[Wire]: ...

    async def known(self) -> int:
        """How many processes the registry holds, alive or not."""
        ...

    async def wipe(self) -> None:
        """Let the registry lose all that it holds, as in a crash of what keeps it."""
        ...


class SQLitePlace:
    most = 3 << 20

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'bus.db'}"
        self._wire = folder / "bus.db.d" / "wire"

    def opened(self) -> AbstractAsyncContextManager[Wire]:
        return wire_at(self.url)

    async def known(self) -> int:
        if not self._wire.exists():
            return 0
        return len({name.rpartition(".")[0] for name in os.listdir(self._wire)})

    async def wipe(self) -> None:
        for each in self._wire.iterdir():
            each.unlink()


class PostgresPlace:
    most = 3 << 20

    def __init__(self, server: Postgres, url: str, schema: str) -> None:
        self.server, self.url, self.schema = server, url, schema

    def opened(self) -> AbstractAsyncContextManager[Wire]:
        return wire_at(self.url)

    async def count(self, table: str, where: str = "true") -> int:
        statement = f"select count(*) from {self.schema}.{table} where {where}"
        return int((await asyncio.to_thread(self.server.sql, statement))[0][0])

    async def known(self) -> int:
        return await self.count("wire_processes")

    async def wipe(self) -> None:
        await asyncio.to_thread(self.server.sql, f"truncate {self.schema}.wire_processes, {self.schema}.wire_epoch")


class Peer:
    """Another process at the wire."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    async def said(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    async def does(self, order: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        first = await self.said()
        if first != "done":
            assert await self.said() == "done"
        return first

    async def stops(self) -> None:
        """It stands still when this returns: a signal takes its time."""
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        await until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def goes_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def ends(self) -> None:
        """It is told to end in good order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None

    async def killed(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


Start = Callable[..., Coroutine[Any, Any, Peer]]


def starter(program: Callable[..., subprocess.Popen[str]], url: str, *more: str) -> Start:
    """Starts processes at the wire of a bus, each of which serves the addresses it is given.

    Parameters:
        more: the file of their clock, if it is to be set.
    """

    async def start(*addresses: str, url: str = url) -> Peer:
        peer = Peer(program(PEER, url, *more))
        assert await peer.said() == "ready"
        for address in addresses:
            await peer.does(f"serve {address}")
        return peer

    return start


async def ask(wire: Wire, address: str, payload: bytes, seconds: float = 20.0, *, safe: bool = False) -> bytes:
    return await wire.ask(address, payload, CLOCK.monotonic() + seconds, safe=safe)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for happens outside of this loop
            await asyncio.sleep(0.01)


class NatsPlace:
    """`server` tells its subscriptions by HTTP, at `monitor`: on NATS they are the registry of who serves what."""

    most = (1 << 20) - 2048

    def __init__(self, server: Nats, monitor: int, bus: str) -> None:
        self.url, self._server, self._bus, self._monitor = server.url(bus), server, bus, monitor

    def opened(self) -> AbstractAsyncContextManager[Wire]:
        return wire_at(self.url)

    async def known(self) -> int:
        return len([each for each in await asyncio.to_thread(self._subjects) if each.startswith(f"{self._bus}.wire.")])

    def _subjects(self) -> set[str]:
        with urlopen(f"http://127.0.0.1:{self._monitor}/subsz?subs=1&limit=10000") as answer:
            return {each["subject"] for each in json.load(answer).get("subscriptions_list", ())}

    async def wipe(self) -> None:
        purged = await asyncio.to_thread(self._server.request, f"$JS.API.STREAM.PURGE.{self._bus}_instances", {})
        assert purged["success"]
