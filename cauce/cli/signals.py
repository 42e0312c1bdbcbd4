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
from cauce.cli.endings import exit_code
from cauce.errors import CauceError

__all__ = ["LATEST", "stopped", "terminable", "when_orphaned"]

LATEST = 5.0
"""Seconds that a process takes to end, at most, once its handlers had their time."""


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


async def stopped(bus: Bus, *, with_parent: bool = False, drain: float | None = None) -> None:
    """Wait for SIGTERM or Ctrl-C, or for a service that stops by itself.

    A second signal ends the process at once, as if it had been killed by it: with 128 and the signal's number.

    Parameters:
        with_parent: stop, too, when the other end of standard input closes: who started this process is gone.
        drain: seconds after which, and `LATEST` more, the first signal has ended the process, whatever it still does.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()
    came = list[int]()

    def end() -> None:
        if not stop.done():
            stop.set_result(None)

    def signalled(number: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        if drain is not None:
            _end_within(drain + LATEST)
        loop.call_soon_threadsafe(end)

    for number in (signal.SIGTERM, signal.SIGINT):
        # Not a handler of the loop, as there may have been: a function that blocks it must not keep the process alive.
        loop.remove_signal_handler(number)
        signal.signal(number, signalled)
    if with_parent:
        when_orphaned(end)
    await asyncio.wait({stop, bus.failed}, return_when=asyncio.FIRST_COMPLETED)
    if drain is not None and not stop.done():
        error = bus.failed.exception()
        _end_within(drain + LATEST, exit_code(error) if isinstance(error, CauceError) else 1)


def _end_within(seconds: float, code: int = 0) -> None:
    """End the process after so many seconds, with this code: what is not finished by then is handled again."""

    def end() -> None:
        threading.Event().wait(seconds)
        os.write(2, b"what is in hand does not end, so the process does: it is handled again\n")
        os._exit(code)

    threading.Thread(target=end, name="cauce end", daemon=True).start()


def when_orphaned(call: Callable[[], object]) -> None:
    """Call this once the other end of standard input closes."""
    loop, input = asyncio.get_running_loop(), sys.stdin.fileno()

    def readable() -> None:
        if not os.read(input, 4096):
            loop.remove_reader(input)
            call()

    loop.add_reader(input, readable)
