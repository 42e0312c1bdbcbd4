"""Telling readers in other processes that something was committed: one datagram each, whose content means nothing.

It is a hint. A reader that misses it finds the entry at its next slow look.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cauce.backends.sqlite.short import short
from cauce.clock import Clock

__all__ = ["Wake"]

_COARSE = 100_000_000
"""Nanoseconds within which two changes of a folder may have the same time."""


class Wake:
    """The sockets in one folder: ours, and the others', told after each commit.

    `listen` and `deafen` belong to the loop's thread, `tell` and `close` to the writer's.
    """

    def __init__(self, folder: Path, name: str, clock: Clock) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder, self._name, self._clock = folder, name, clock
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._out.setblocking(False)
        self._in: socket.socket | None = None
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listed = -1
        self._others: list[str] = []

    def listen(self, woken: Callable[[], None]) -> None:
        """From now on call `woken`, on the running loop, when another process has committed."""
        if self._in is not None:
            return
        self._in = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._in.setblocking(False)
        self._in.bind(self._address(self._name))
        asyncio.get_running_loop().add_reader(self._in, self._drain, woken)

    def tell(self) -> None:
        """Wake the others. Called in the writer thread; never waits."""
        try:
            self._list()
        except OSError:
            # Somebody removed the folder. They look for themselves, only later.
            self._others = []
        for name in self._others:
            try:
                self._out.sendto(b"", self._address(name))
            except ConnectionRefusedError:
                # Nobody listens there any more: its process was killed.
                with suppress(OSError):
                    (self._folder / name).unlink()
            except OSError:
                # Its queue is full, so it will look anyway; or it has just gone.
                continue

    def _list(self) -> None:
        changed = os.fstat(self._directory).st_mtime_ns
        if changed == self._listed:
            return
        self._others = [name for name in os.listdir(self._folder) if name != self._name]
        # Whoever comes in the same tick of the file system's clock would not be seen: look again until it is over.
        self._listed = changed if abs(self._clock.now() * 1000 - changed) > _COARSE else -1

    def _address(self, name: str) -> str:
        return short(self._directory, self._folder, name)

    def _drain(self, woken: Callable[[], None]) -> None:
        assert self._in is not None
        try:
            while True:
                self._in.recv(16)
        except BlockingIOError:
            woken()

    def deafen(self) -> None:
        """The opposite of `listen`."""
        if self._in is not None:
            asyncio.get_running_loop().remove_reader(self._in)
            self._in.close()
            self._in = None
            (self._folder / self._name).unlink(missing_ok=True)

    def close(self) -> None:
        self._out.close()
        os.close(self._directory)
