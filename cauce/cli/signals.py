"""How a command that keeps running is ended."""

from __future__ import annotations

import asyncio
import os
import signal

from cauce.bus import Bus

__all__ = ["stopped"]


async def stopped(bus: Bus) -> None:
    """Wait for SIGTERM or Ctrl-C, or for a service that stops by itself. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def signalled() -> None:
        if stop.done():
            os._exit(1)
        stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    await asyncio.wait({stop, bus.failed}, return_when=asyncio.FIRST_COMPLETED)
