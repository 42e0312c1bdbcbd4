"""Whether a loop still ticks, as another thread can tell."""

from __future__ import annotations

import asyncio

from cauce.clock import Clock, SystemClock
from cauce.lease import TTL

__all__ = ["STALL", "Pulse"]

STALL = TTL
"""Seconds without a tick after which a loop counts as blocked: as long as a rival watches a beat."""

_EVERY = 0.1


class Pulse:
    """Ticks on the running loop, ten times a second, until it is stopped.

    `late` is by how many seconds the last tick was late, and `latest` the most that any was.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._now = (clock or SystemClock()).monotonic
        self._loop = asyncio.get_running_loop()
        self._ticked, self.late, self.latest = self._now(), 0.0, 0.0
        self._next = self._loop.call_later(_EVERY, self._tick)

    def _tick(self) -> None:
        now = self._now()
        self.late = max(0.0, now - self._ticked - _EVERY)
        self.latest = max(self.latest, self.late)
        self._ticked = now
        self._next = self._loop.call_later(_EVERY, self._tick)

    @property
    def silent(self) -> float:
        """Seconds since the last tick; any thread may ask."""
        return max(0.0, self._now() - self._ticked)

    def stop(self) -> None:
        """Tick no more."""
        self._next.cancel()
