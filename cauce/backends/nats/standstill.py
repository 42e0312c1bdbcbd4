"""Notices that this process stood still: what comes then may have lain in the socket, and its time may be over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cauce.clock import Clock
from cauce.errors import CauceError

__all__ = ["Standstill"]

_TICK = 0.1
_SLACK = 0.1


class Standstill:
    """How long the loop stood still before what is read now was read.

    A question says how long its asker waits, not when it was sent, because two machines' clocks do not agree. So all
    that may have waited here counts as having waited for the whole time. `barrier` returns when all has been read that
    the server had sent before.
    """

    def __init__(self, clock: Clock, barrier: Callable[[], Awaitable[None]]) -> None:
        self._clock, self._barrier = clock, barrier
        self._loop = asyncio.get_running_loop()
        self._last = self._stood = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._passing: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Begin, if not yet begun."""
        if self._timer is None:
            self._last = self._clock.monotonic()
            self._timer = self._loop.call_later(_TICK, self._tick)

    def before(self, now: float) -> float:
        """The seconds that a message which is read now may have waited for."""
        late = now - self._last - _TICK
        return max(late, self._stood) if late > _SLACK else self._stood

    def _tick(self) -> None:
        now = self._clock.monotonic()
        late, self._last = now - self._last - _TICK, now
        self._timer = self._loop.call_later(_TICK, self._tick)
        if late > _SLACK:
            self._stood = max(late, self._stood)
            if self._passing is None:
                self._passing = self._loop.create_task(self._pass())

    async def _pass(self) -> None:
        try:
            stood = 0.0
            while self._stood > stood:  # It may stand still again meanwhile.
                stood = self._stood
                await self._barrier()
        except (CauceError, OSError):
            pass  # The connection is lost, and with it what waited in it.
        finally:
            self._stood, self._passing = 0.0, None

    async def close(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._passing is not None:
            self._passing.cancel()
            await asyncio.wait([self._passing])
