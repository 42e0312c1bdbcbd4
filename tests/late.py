"""A way to a server on which what is sent can be held back: its connection breaks, and it arrives later."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["Late"]


class Late:
    """A relay to a port of loopback. `held` is what was sent since `hold`, `answers` what came back to it."""

    def __init__(self, port: int) -> None:
        self._port, self.held = port, b""
        self._holding: asyncio.StreamWriter | None = None
        self._latest: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
        self._streams: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.answers = b""
        self._came = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, onward = await asyncio.open_connection("127.0.0.1", self._port)
            self._streams += [writer, onward]
            self._latest = writer, onward
            self._tasks += [
                asyncio.ensure_future(self._up(reader, onward)),
                asyncio.ensure_future(self._down(there, writer, onward)),
            ]

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            for stream in self._streams:
                stream.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if onward is self._holding:
                self.held += data
                self._came.set()
            else:
                onward.write(data)

    async def _down(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, onward: asyncio.StreamWriter
    ) -> None:
        while data := await there.read(65536):
            if onward is self._holding:
                self.answers += data
                self._came.set()
            elif not writer.is_closing():
                writer.write(data)

    def hold(self) -> None:
        """From now on nothing is sent on."""
        self._holding = self._latest[1]

    async def break_after(self, mark: bytes) -> None:
        """Break the connection when this is on its way; another one goes through."""
        async with asyncio.timeout(10.0):
            await self._until(lambda: mark in self.held)
        self._latest[0].transport.abort()

    async def arrive(self) -> None:
        """Let it arrive, and wait for the answer to its last question; those to others are heard here, too."""
        assert self._holding is not None
        inbox = re.findall(rb"_INBOX\.[\w.]+", self.held)[-1]
        self._holding.write(self.held)
        async with asyncio.timeout(10.0):
            await self._until(
                lambda: re.search(rb"MSG %b [^\n]*\n[^\n]+\n" % re.escape(inbox), self.answers) is not None
            )
        self.answers = self.answers[self.answers.index(inbox) :]

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._came.clear()
            await self._came.wait()
