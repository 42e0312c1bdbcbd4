"""Where time, sleep, randomness and fresh ids come from: one clock, passed in, so that tests can drive it."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import sys
import time
from typing import Protocol

__all__ = ["Clock", "SystemClock", "uuid7"]


class Clock(Protocol):
    """The only door to time and chance."""

    def now(self) -> int:
        """The wall clock, in microseconds since 1970 in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...

    def id(self) -> str:
        """A fresh UUIDv7; ids of one clock rise."""
        ...

    def random(self) -> float:
        """A number from 0 up to, not including, 1."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        ...


def uuid7(tick: int, chance: int) -> str:
    """The text of a UUIDv7 (RFC 9562, section 5.7) with sub-millisecond order (section 6.2, method 3).

    `tick` is milliseconds since 1970 times 4096 plus a finer part, `chance` holds 62 random bits.
    """
    # One format: every append makes an id, and f-strings or slices take twice as long.
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031
        tick >> 28,
        tick >> 12 & 0xFFFF,
        tick & 0xFFF,
        0x8000 | chance >> 48,
        chance & 0xFFFFFFFFFFFF,
    )


# Where there is such a clock, one that goes on while the machine sleeps: what was held before is another's after that.
_elapsed = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic


class SystemClock:
    """The real thing."""

    def __init__(self) -> None:
        self._random = random.Random()  # noqa: S311 - ids must not collide; they are no secrets
        self._tick = 0
        # A forked child would otherwise go on with its parent's ids.
        os.register_at_fork(after_in_child=self._random.seed)

    def now(self) -> int:
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        return _elapsed()

    def id(self) -> str:
        milliseconds, rest = divmod(time.time_ns(), 1_000_000)
        tick = milliseconds << 12 | rest >> 8
        if tick <= self._tick:
            tick = self._tick + 1
        self._tick = tick
        return uuid7(tick, self._random.getrandbits(62))

    def random(self) -> float:
        return self._random.random()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
