"""A bulkhead: so many at once and no more, so that one who is slow cannot use up all that others need.

After M. Nygard, Release It! (2nd edition, 2018). What is beyond does not queue: it is told so at once, while who waits
already goes on waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from cauce.clock import Clock
from cauce.errors import Overloaded

__all__ = ["Bulkhead"]

_log = logging.getLogger("cauce")

_TELL = 10.0
"""Seconds between two lines of the log about what is turned away: it must not drown in them."""

P = ParamSpec("P")
T = TypeVar("T")


class Bulkhead:
    """So many calls at once.

    Parameters:
        name: what is called, as messages and the log name it.
        most: calls under way at a time; `inf`: they are only counted.
        cure: what who is turned away can do, beside asking less.

    Attributes:
        under_way: how many are now.
        shed: how many were too many.
    """

    __slots__ = ("_clock", "_cure", "_told", "most", "name", "shed", "under_way")

    def __init__(self, name: str, most: float, cure: str, clock: Clock) -> None:
        self.name, self.most, self._cure, self._clock = name, most, cure, clock.monotonic
        self._told: float | None = None
        self.under_way = self.shed = 0

    async def call(self, work: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of the work. Raises `Overloaded` if too many are under way, and then nothing ran."""
        if self.under_way >= self.most:
            self._refuse()
        self.under_way += 1
        try:
            return await work(*args, **kwargs)
        finally:
            self.under_way -= 1

    def _refuse(self) -> None:
        self.shed += 1
        now = self._clock()
        if self._told is None or now - self._told >= _TELL:
            self._told = now
            _log.warning(
                "%s: %d questions are under way, what comes beyond is turned away; %d until now",
                self.name, self.most, self.shed,
            )  # fmt: skip
        raise Overloaded(
            f"{self.name}: {self.most:,} questions are under way already, so nothing ran: ask fewer at once, or {self._cure}"
        )
