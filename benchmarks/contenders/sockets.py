"""Bare Unix sockets between two processes: what no message between them can be quicker than.

`ping_pong` sends a datagram there and back, `echo` a few bytes over a stream, both with calls that block; `protocol` is
the same echo on an `asyncio.Protocol` at both ends, which is the least that a program on a loop can have.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive, repeat
from benchmarks.contenders.child import child, ready, until_told

__all__ = ["echo", "ping_pong", "protocol"]

_SAID = b'{"user_id":"42"}'
_MOST = 64


def ping_pong(path: Path, seconds: float) -> Sample:
    """A datagram to the other process and one back."""
    back = path.with_name(f"{path.name}.back")
    other = child("benchmarks.contenders.sockets", "ping_pong", str(path))
    with other, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.bind(_short(back))
        here.connect(_short(path))

        def work() -> None:
            here.send(_SAID)
            here.recv(_MOST)

        repeat(work, seconds * WARM)
        sample = repeat(work, seconds)
        here.send(b"")
    back.unlink()
    path.unlink()
    return sample


def echo(path: Path, seconds: float) -> Sample:
    """A few bytes to the other process and back, over a stream."""
    other = child("benchmarks.contenders.sockets", "echo", str(path))
    with other, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as here:
        here.connect(_short(path))

        def work() -> None:
            here.sendall(_SAID)
            here.recv(_MOST)

        repeat(work, seconds * WARM)
        sample = repeat(work, seconds)
    path.unlink()
    return sample


def protocol(path: Path, seconds: float) -> Sample:
    """The same, on a loop at both ends."""
    with child("benchmarks.contenders.sockets", "protocol", str(path)):
        sample = asyncio.run(_ask(path, seconds))
    path.unlink(missing_ok=True)
    return sample


async def _ask(path: Path, seconds: float) -> Sample:
    loop = asyncio.get_running_loop()
    transport, asking = await loop.create_unix_connection(_Asking, _short(path))

    def work() -> asyncio.Future[None]:
        asking.answered = loop.create_future()
        transport.write(_SAID)
        return asking.answered

    await drive(work, 1, seconds * WARM)
    sample = await drive(work, 1, seconds)
    transport.close()
    return sample


class _Asking(asyncio.Protocol):
    answered: asyncio.Future[None]

    def data_received(self, data: bytes) -> None:
        self.answered.set_result(None)


class _Echoing(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def _short(path: Path) -> str:
    """The address of a socket has room for about a hundred characters."""
    return os.path.relpath(path)


def _answer_datagrams(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.bind(_short(Path(path)))
        ready()
        while True:
            said, back = here.recvfrom(_MOST)
            if not said:
                return
            here.sendto(said, back)


def _answer_stream(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(_short(Path(path)))
        listening.listen()
        ready()
        here, _ = listening.accept()
        with here:
            while said := here.recv(_MOST):
                here.sendall(said)


async def _answer_on_a_loop(path: str) -> None:
    async with await asyncio.get_running_loop().create_unix_server(_Echoing, _short(Path(path))):
        ready()
        await until_told()


if __name__ == "__main__":
    if sys.argv[1] == "ping_pong":
        _answer_datagrams(sys.argv[2])
    elif sys.argv[1] == "echo":
        _answer_stream(sys.argv[2])
    else:
        asyncio.run(_answer_on_a_loop(sys.argv[2]))
