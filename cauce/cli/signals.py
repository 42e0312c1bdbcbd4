"""How a command that keeps running is ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cauce.bus import Bus

__all__ = ["stopped", "terminable", "when_orphaned"]


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what is in it as Ctrl-C does, so that nothing unfinished is left behind.

    Signals belong to the main thread; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


async def stopped(bus: Bus, *, with_parent: bool = False) -> None:
    """Wait for SIGTERM or Ctrl-C, or for a service that stops by itself. A second signal ends the process at once.

    Parameters:
        with_parent: stop, too, when the other end of standard input closes: who started this process is gone.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def signalled() -> None:
        if stop.done():
            os._exit(1)
        stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    if with_parent:
        when_orphaned(lambda: None if stop.done() else stop.set_result(None))
    await asyncio.wait({stop, bus.failed}, return_when=asyncio.FIRST_COMPLETED)


def when_orphaned(call: Callable[[], object]) -> None:
    """Call this once the other end of standard input closes."""
    loop, input = asyncio.get_running_loop(), sys.stdin.fileno()

    def readable() -> None:
        if not os.read(input, 4096):
            loop.remove_reader(input)
            call()

    loop.add_reader(input, readable)
