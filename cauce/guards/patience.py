"""Patience: a handler that takes too long is given up, its stack is told of once, and others go on.

A coroutine is cancelled. A plain function cannot be: it is left to its thread, and while it runs there nothing more of
its thing is begun. Both count as failed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, TypeVar

from cauce.deadline import Deadlines
from cauce.errors import Busy, Overloaded, Overran
from cauce.guards.stack import of_coroutine, tell
from cauce.threads import Threads, Work

__all__ = ["Patience"]

_log = logging.getLogger("cauce")
T = TypeVar("T")
Handler = Callable[..., Awaitable[Any]]
Left = tuple[Work | None, float]
"""What runs on although nobody waits for it, in its thread if it has one, and since when on the loop's clock."""

_STILL = 0.5
"""Seconds by which a time-out may be late. More, and the loop stood still: that is not the handler's time."""

_GRACE = 1.0
"""Seconds after which a coroutine that was cancelled and has not ended is told of."""


class _Call:
    """A call of an async handler: its patience is looked at from when it waits for the first time."""

    __slots__ = ("_handler", "_name", "_seconds", "_thing", "_waits")

    def __init__(self, waits: Handler, name: str, seconds: float, thing: str, handler: Any) -> None:
        self._waits, self._name, self._seconds, self._thing, self._handler = waits, name, seconds, thing, handler

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            first = self._handler.send(None)
        except StopIteration as stop:
            return stop.value
        rest = self._waits(self._name, self._seconds, self._thing, self._handler, first)
        return (yield from rest.__await__())


class _Rest:
    """What remains of a coroutine that has begun: it waits for this first."""

    __slots__ = ("_coroutine", "_first")

    def __init__(self, coroutine: Any, first: Any) -> None:
        self._coroutine, self._first = coroutine, first

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine, wanted = self._coroutine, self._first
        try:
            while True:
                try:
                    got = yield wanted
                except BaseException as error:
                    wanted = coroutine.throw(error)
                else:
                    wanted = coroutine.send(got)
        except StopIteration as stop:
            return stop.value
        finally:
            coroutine.close()


class Patience:
    """What stands between a service and its handlers: each is waited for so long and no longer.

    Parameters:
        threads: in which plain functions run.
        changed: called when a handler hangs, though it was given up, and when it does no more.
    """

    def __init__(self, threads: Threads, changed: Callable[[], None]) -> None:
        self._threads, self._changed = threads, changed
        self._loop, self._deadlines = asyncio.get_running_loop(), Deadlines()
        self._left: dict[tuple[str, object], Left] = {}

    @property
    def hanging(self) -> list[str]:
        """The names of the handlers that run on after they were given up."""
        return sorted(name for name, _ in self._left)

    def guard(self, name: str, seconds: float, function: Callable[..., Any], *, is_async: bool) -> Handler:
        """The handler, given up after so many seconds; 0: never. It takes what the function takes, behind its thing.

        Parameters:
            name: as it is told of, `service.function`.

        What it returns raises `Overran`; `Overloaded` where no thread was free for so long, and nothing ran; and `Busy`
        while an earlier call for the same thing, that nobody waits for any more, has not ended.
        """
        if not is_async:
            return functools.partial(self._in_thread, name, seconds, function)
        if not seconds:
            return lambda thing, *told, **named: function(*told, **named)
        # No coroutine of our own for each message: most handlers are done before they ever wait.
        return lambda thing, *told, **named: _Call(self._waits, name, seconds, thing, function(*told, **named))

    async def _waits(self, name: str, seconds: float, thing: str, handler: Any, first: Any) -> Any:
        """What a handler that has begun, and waits for the first time, returns in the end."""
        over, token = False, object()
        watching: asyncio.TimerHandle | None = None

        def late(behind: float) -> float:
            nonlocal over, watching
            if behind > _STILL:
                return behind
            over = True
            _tell(name, seconds, thing, of_coroutine(handler))
            watching = self._loop.call_later(_GRACE, self._leave, (name, token), None)
            return 0.0

        try:
            return await self._deadlines.within(seconds, _Rest(handler, first), late)
        except TimeoutError:
            if not over:
                raise
            raise _overran(name, seconds) from None
        finally:
            if watching is not None:
                watching.cancel()
                self._ended((name, token))

    async def _in_thread(
        self, name: str, seconds: float, function: Callable[..., Any], thing: str, /, *told: Any, **named: Any
    ) -> Any:
        self._check(name, seconds, thing)
        work, over = Work(name), False

        def late(behind: float) -> float:
            nonlocal over
            if behind > _STILL or work.is_over:
                return max(behind, _STILL)
            over = True
            _tell(name, seconds, thing, work.stack())
            return 0.0

        running = self._threads.do(work, functools.partial(function, *told, **named))
        try:
            return await (self._deadlines.within(seconds, running, late) if seconds else running)
        except TimeoutError:
            if not over:
                raise
            if not work.begun:
                raise Overloaded(
                    f"{name} found no free thread for {seconds:g} s: handlers of its service hang in theirs"
                ) from None
            raise _overran(name, seconds) from None
        finally:
            if work.begun and not work.is_over:
                self._leave((name, thing or work), work)

    def _check(self, name: str, seconds: float, thing: str) -> None:
        """Raises what keeps a function from running again for a thing that it still works on."""
        left = self._left.get((name, thing)) if thing else None
        if left is None:
            return
        what = f"{name} still runs in its thread for {thing}, though nobody waits for it any more"
        if seconds and self._loop.time() - left[1] >= seconds:
            raise Overran(f"{what}: it has outlived its patience of {seconds:g} s")
        raise Busy(f"{what}: it is tried again when that has ended")

    def _leave(self, key: tuple[str, object], work: Work | None) -> None:
        self._left[key] = work, self._loop.time()
        if work is None:
            _log.error("%s was cancelled, and has not ended: it must not swallow that", key[0])
        else:
            work.ended = functools.partial(self._ended_there, key)
            if work.is_over:  # just now
                self._left.pop(key, None)
                return
        self._changed()

    def _ended_there(self, key: tuple[str, object]) -> None:
        with suppress(RuntimeError):  # The loop may have been closed meanwhile.
            self._loop.call_soon_threadsafe(self._ended, key)

    def _ended(self, key: tuple[str, object]) -> None:
        if (left := self._left.pop(key, None)) is not None:
            _log.warning("%s has ended after all, %.1f s later", key[0], self._loop.time() - left[1])
            self._changed()


def _tell(name: str, seconds: float, thing: str, stack: str) -> None:
    tell(
        logging.ERROR, stack, "%s takes longer than its patience of %g s%s, and is given up; this is where it stands:",
        name, seconds, f" for {thing}" if thing else "",
    )  # fmt: skip


def _overran(name: str, seconds: float) -> Overran:
    return Overran(f"{name} took longer than its patience of {seconds:g} s: make it quicker, or give it more patience=")
