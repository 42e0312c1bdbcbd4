"""Many messages on the way at once without a batch, each behind the one before it: when that is faster."""

from __future__ import annotations

__all__ = ["Pace"]

_FADES = 0.995
"""What is not taken is thought a little cheaper each time, until it is tried again: soon where both cost the same."""

_SPOILT = 32


class Pace:
    """What a message costs in a chain, and what a batch costs whatever is in it: where the server flushes each message
    a batch is soon cheaper, where it does not a chain is."""

    def __init__(self) -> None:
        self._message, self._batch = 0.0, 0.004
        self._spoilt = 0
        self._chained = self._turned = False

    def chains(self, count: int) -> bool:
        """Whether a group of so many is faster as a chain."""
        if self._spoilt:
            self._spoilt -= 1
            return False
        faster = self._message * count < self._batch
        if faster:
            self._batch *= _FADES
        else:
            self._message *= _FADES
        self._turned, self._chained = faster != self._chained, faster
        return faster

    def chain(self, count: int, seconds: float) -> None:
        self._message = self._learned(self._message, seconds / count)

    def batch(self, count: int, seconds: float) -> None:
        if count > 1:
            self._batch = self._learned(self._batch, seconds)

    def broke(self) -> None:
        """Another wrote between; where others write all the time only batches stay whole."""
        self._spoilt = _SPOILT

    def _learned(self, known: float, seen: float) -> float:
        # One that took very long says more of the machine than of the way it went.
        seen = min(seen, 4 * known) if known else seen
        return seen if self._turned or not known else known + (seen - known) / 4
