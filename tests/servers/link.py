"""A way from one server to another that can be cut: a TCP relay that then holds all bytes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Links"]


class Links:
    """All ways of a cluster, in a thread with a loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        self._links: list[_Link] = []

    def add(self, target: int, port: int) -> Callable[[bool], None]:
        """Lead from one port of loopback to another. The function that this returns closes the way, or opens it."""
        link = _Link(target)
        self._links.append(link)
        self._run(link.listen(port))

        def let(through: bool) -> None:
            self._run(link.let(through))

        return let

    def close(self) -> None:
        for link in self._links:
            self._run(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)


class _Link:
    def __init__(self, target: int) -> None:
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._under_way: set[asyncio.Task[None]] = set()

    async def listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port)

    async def let(self, through: bool) -> None:
        """What was connected when the way was closed is broken when it opens: the ends have given it up, or soon do."""
        if through:
            await self._break()
            self._open.set()
        else:
            self._open.clear()

    async def close(self) -> None:
        self._server.close()
        await self._break()

    async def _break(self) -> None:
        for each in self._under_way:
            each.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._relay(reader, writer))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            await self._open.wait()
            there, onward = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(onward)
            pumps = [
                asyncio.ensure_future(self._pump(reader, onward)),
                asyncio.ensure_future(self._pump(there, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the other end is down: so is this one
        finally:
            for each in writers:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
