"""Deadlines by the thousand: one timer for all that wait, instead of one for each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T")


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

    async def within(self, seconds: float, work: Awaitable[T], late: Callable[[float], float] | None = None) -> T:
        """The result of the work; after so many seconds it is cancelled and `TimeoutError` raised.

        Parameters:
            late: called when the time is over, with the seconds since then: they are many where the loop stood still.
                It gives the seconds that the work gets still; 0: it is cancelled now.
        """
        task = asyncio.current_task()
        assert task is not None
        me = object()
        until = self._loop.time() + seconds
        self._waiting[me] = until, task
        if late is not None:
            self._late[me] = late
        if self._timer is None or until < self._timer.when():
            self._arm(until)
        try:
            return await work
        except asyncio.CancelledError:
            if me in self._over and task.uncancel() == 0:
                raise TimeoutError from None
            raise
        finally:
            del self._waiting[me]
            self._over.discard(me)
            if late is not None:
                del self._late[me]

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        now = self._loop.time()
        self._timer = None
        for me, (until, task) in self._waiting.items():
            if until <= now and me not in self._over:
                if me in self._late and (more := self._late[me](now - until)) > 0:
                    self._waiting[me] = now + more, task
                    continue
                self._over.add(me)
                task.cancel()
        left = [until for me, (until, _) in self._waiting.items() if me not in self._over]
        if left:
            self._arm(min(left))
