"""A clock and an event loop that share one virtual time, which jumps ahead whenever nothing else is to be done."""

from __future__ import annotations

import asyncio
import os
import random
import selectors
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cauce.clock import uuid7

__all__ = ["VirtualClock", "VirtualLoop"]

T = TypeVar("T")

_GRACE = 0.02
_LOOK = 0.0003
_LOOKS = 3


class VirtualClock:
    """Time that stands still until the loop has nothing to do, then jumps to the next timer. Chance is seeded.

    Parameters:
        start: microseconds since 1970.
    """

    def __init__(self, start: int = 1_767_225_600_000_000, seed: int = 0) -> None:
        self._start, self._elapsed = start, 0.0
        self._skew = 0.0
        self._random = random.Random(seed)  # noqa: S311 - a test must repeat itself
        self._tick = 0

    def now(self) -> int:
        return self._start + round((self._elapsed + self._skew) * 1_000_000)

    def monotonic(self) -> float:
        return self._elapsed

    def id(self) -> str:
        self._tick = tick = max(self.now() * 4096 // 1000, self._tick + 1)
        return uuid7(tick, self._random.getrandbits(62))

    def random(self) -> float:
        return self._random.random()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once."""
        self._elapsed += seconds

    def shift(self, seconds: float) -> None:
        """Set the wall clock forward, or back, as an administrator does; monotonic time does not notice."""
        self._skew += seconds


class _Selector(selectors.DefaultSelector):
    """Waits for files and threads in real time, and for timers not at all."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock
        self.jobs = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = self._told()
        if not ready:
            self._clock.advance(timeout)
        return ready

    def _told(self) -> list[tuple[selectors.SelectorKey, int]]:
        """What other threads have to say: what they have in hand comes before time does."""
        if self.jobs:
            return super().select(_GRACE)
        looks = 0
        while looks < _LOOKS:
            ready = super().select(_LOOK)
            if ready:
                return ready
            looks = 0 if _busy() else looks + 1
        return []


def _busy() -> bool:
    """Whether another thread of this process runs, or waits for the disk. Where this cannot be told: after a while."""
    me = threading.get_native_id()
    try:
        for thread in os.listdir("/proc/self/task"):
            if int(thread) != me:
                with open(f"/proc/self/task/{thread}/stat") as file:
                    if file.read().rpartition(")")[2].split()[0] in "RD":
                        return True
    except FileNotFoundError:
        pass  # it has just ended
    return False


class VirtualLoop(asyncio.SelectorEventLoop):
    """Run with `asyncio.Runner(loop_factory=lambda: VirtualLoop(clock))`."""

    def __init__(self, clock: VirtualClock) -> None:
        self._patient = _Selector(clock)
        super().__init__(self._patient)
        self._clock_of_tests = clock

    def time(self) -> float:
        return self._clock_of_tests.monotonic()

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """A plain function may wait for something outside: while one runs, time goes on slowly."""
        future = super().run_in_executor(executor, func, *args)
        self._patient.jobs += 1
        future.add_done_callback(self._done)
        return future

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._patient.jobs -= 1
