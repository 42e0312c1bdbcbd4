"""Deadlines: those that travel from question to question, and one timer for all that wait instead of one for each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from math import inf
from typing import TypeVar

__all__ = ["STILL", "Deadlines", "End", "StoodStill", "ending", "share"]

T = TypeVar("T")

STILL = 0.1
"""Seconds by which a time-out may be late. More, and the loop stood still: that is not the fault of others."""

_MORE = 0.1
"""Seconds in which is heard, before a late time-out counts, what came while the loop stood still."""


class StoodStill(TimeoutError):
    """The time was over while this loop itself stood still, which says nothing of who was waited for."""


class End:
    """When nobody waits any more for what is done here: `at`, on the loop's clock; `inf`: nobody waits, or for ever."""

    __slots__ = ("at",)

    def __init__(self, at: float) -> None:
        self.at = at


ending: ContextVar[End] = ContextVar("cauce.ending", default=End(inf))  # noqa: B039 - the default is never changed
"""The end of what is done here. What it began beside itself may outlive it, and is then bound by it no more."""

_TENTH = 0.1
_MOST_KEPT = 0.1
"""Of what is left a question leaves a tenth to who asks it, at most so many seconds: to hear of the time-out, to fall
back, and to answer."""


def share(seconds: float) -> float:
    """How long a question may take that is asked here and now, of the seconds that it is given; 0: not at all."""
    at = ending.get().at
    if at == inf:
        return seconds
    left = at - asyncio.get_running_loop().time()
    return max(0.0, min(seconds, left - min(_MOST_KEPT, left * _TENTH)))


class Deadlines:
    """What waits in this loop, each until its own moment.

    Does what `asyncio.timeout` does, at a tenth of the price: a call is cheaper than the timer that guards it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[object, tuple[float, asyncio.Task[object]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._over: set[object] = set()
        self._late: dict[object, Callable[[float], float]] = {}
        self._still: set[object] = set()

    async def within(self, seconds: float, work: Awaitable[T], late: Callable[[float], float] | None = None) -> T:
        """The result of the work; after so many seconds it is cancelled and `TimeoutError` raised.

        What the work asks of others meanwhile is given no more time than is left of it. Where the loop stood still
        until the time was over, what came meanwhile is heard first, and `StoodStill` raised if it was not the result.

        Parameters:
            late: called when the time is over, with the seconds since then: they are many where the loop stood still.
                It gives the seconds that the work gets still; 0: it is cancelled now, and never by `StoodStill`.
        """
        task = asyncio.current_task()
        assert task is not None
        me, cancelled = object(), task.cancelling()
        end = self._loop.time() + max(seconds, 0.0)
        self._waiting[me] = end, task
        if late is not None:
            self._late[me] = late
        if self._timer is None or end < self._timer.when():
            self._arm(end)
        bound = End(min(end, ending.get().at))
        before = ending.set(bound)
        try:
            return await work
        except asyncio.CancelledError:
            if me in self._over:
                self._over.discard(me)
                if task.uncancel() <= cancelled:
                    raise (StoodStill if me in self._still else TimeoutError) from None
            raise
        finally:
            ending.reset(before)
            bound.at = inf
            del self._waiting[me]
            if me in self._over:
                # The work swallowed it. What this task waits for later must not take it for a cancellation.
                self._over.discard(me)
                task.uncancel()
            self._still.discard(me)
            if late is not None:
                del self._late[me]

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        now = self._loop.time()
        self._timer = None
        for me, (end, task) in self._waiting.items():
            if end <= now and me not in self._over:
                if (more := self._more(me, now - end)) > 0:
                    self._waiting[me] = now + more, task
                    continue
                self._over.add(me)
                task.cancel()
        left = [end for me, (end, _) in self._waiting.items() if me not in self._over]
        if left:
            self._arm(min(left))

    def _more(self, me: object, behind: float) -> float:
        """The seconds that what is over, and by how much, gets still."""
        late = self._late.get(me)
        if late is not None:
            return late(behind)
        if behind <= STILL or me in self._still:
            return 0.0
        self._still.add(me)
        return _MORE
