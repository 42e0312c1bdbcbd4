"""Many messages on the way at once without a batch: what their acknowledgements say, and when that is faster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

__all__ = ["Acks", "Pace"]

_TRY = 64
"""After so many groups the other way is tried again."""

_SPOILT = 32


class Acks:
    """The acknowledgements of as many messages as there are subjects, in their order. See `Call`."""

    def __init__(self, subjects: list[str]) -> None:
        self._subjects = subjects
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.replies: list[bytes] = []

    def good(self) -> int:
        """How many of the first are good; all behind the first that is not are bad, too."""
        for number, reply in enumerate(self.replies):
            if not reply or b'"error":' in reply:
                return number
        return len(self.replies)

    def subjects(self) -> Collection[str]:
        return self._subjects

    def done(self, end: Callable[[], Any]) -> None:
        self.future.add_done_callback(lambda _: end())

    def take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        self.replies.append(data)
        if len(self.replies) == len(self._subjects) and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


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
        self._message += (seconds / count - self._message) / 4 if self._message else seconds / count

    def batch(self, count: int, seconds: float) -> None:
        if count > 1:
            self._batch += (seconds - self._batch) / 4

    def broke(self) -> None:
        """Another wrote between; where others write all the time only batches stay whole."""
        self._spoilt = _SPOILT
