"""A bulkhead: so many at once and no more, so that one who is slow cannot use up all that others need.

After M. Nygard, Release It! (2nd edition, 2018). What is beyond does not queue: it is told so at once, while who waits
already goes on waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from cauce.errors import Overloaded

__all__ = ["Bulkhead"]

_log = logging.getLogger("cauce")

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

    __slots__ = ("_cure", "most", "name", "shed", "under_way")

    def __init__(self, name: str, most: float, cure: str) -> None:
        self.name, self.most, self._cure = name, most, cure
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
        # Told once for as many as may be under way: the log must not drown in what is shed.
        if self.shed % self.most == 0:
            _log.warning("%s: %d questions are under way, what comes beyond is turned away", self.name, self.most)
        self.shed += 1
        raise Overloaded(
            f"{self.name}: {self.most:,} questions are under way already, so nothing ran: ask fewer at once, or {self._cure}"
        )
