"""Many messages on the way at once without a batch, each behind the one before it: when that is faster."""

from __future__ import annotations

__all__ = ["Pace"]

_TRY = 256
"""After so many groups the other way is tried again."""

_SPOILT = 32


class Pace:
    """What a message costs in a chain, and what a batch costs whatever is in it: where the server flushes each message
    a batch is soon cheaper, where it does not a chain is."""

    def __init__(self) -> None:
        self._message, self._batch = 0.0, 0.004
        self._groups = self._spoilt = 0

    def chains(self, count: int) -> bool:
        """Whether a group of so many is faster as a chain."""
        self._groups += 1
        if self._spoilt:
            self._spoilt -= 1
            return False
        faster = self._message * count < self._batch
        return faster if self._groups % _TRY else not faster

    def chain(self, count: int, seconds: float) -> None:
        self._message = _next(self._message, seconds / count)

    def batch(self, count: int, seconds: float) -> None:
        if count > 1:
            self._batch = _next(self._batch, seconds)

    def broke(self) -> None:
        """Another wrote between; where others write all the time only batches stay whole."""
        self._spoilt = _SPOILT


def _next(known: float, seen: float) -> float:
    """It falls at once and rises slowly: one that took long says more of the machine than of the way it went."""
    return min(seen, 1.25 * known) if known else seen
