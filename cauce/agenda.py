"""What a handler says for later: gathered while it runs, and stored with its unit or not at all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from cauce.clock import Clock
from cauce.codec import is_moment, micros
from cauce.duration import seconds_in
from cauce.errors import Refused
from cauce.messages import Command, Event, declared

__all__ = ["Agenda", "Later"]

Later = tuple[int, Command | Event, str]
"""When it is due, in microseconds since 1970, the message, and its id."""


class Agenda:
    """The timers that one handler sets and cancels.

    Parameters:
        due: when a timer is due, as last committed; 0 if none of that id waits.
    """

    def __init__(self, clock: Clock, due: Callable[[str], Awaitable[int]]) -> None:
        self._clock, self._due = clock, due
        self.later: dict[str, Later] = {}
        self.cancelled: list[str] = []

    def after(self, delay: float | timedelta, message: Command | Event, name: str, id: str) -> str:
        """A message for so much later by the wall clock."""
        due = self._clock.now() + round(seconds_in(delay, f"after: {declared(message).name} in") * 1_000_000)
        return self._add(due, message, name, id)

    def at(self, time: datetime, message: Command | Event, name: str, id: str) -> str:
        """A message for a moment; for one that is past already: as soon as may be."""
        if not isinstance(time, datetime):
            raise Refused(f"at {time!r}: pass a datetime with a time zone")
        return self._add(micros(time), message, name, id)

    def _add(self, due: int, message: Command | Event, name: str, id: str) -> str:
        if not isinstance(message, (Command, Event)):
            raise Refused(
                f"{type(message).__name__} cannot be said later: pass a command, or an event of an own domain"
            )
        if not is_moment(due):
            raise Refused(f"{declared(message).name} would be due after the year 9999: say it earlier")
        timer = name or id
        # 0 says that none waits, and what was before 1970 is past.
        self.later[timer] = max(due, 1), message, id
        return timer

    async def cancel(self, timer: str) -> bool:
        """Whether it waits, as last committed; then it is taken away with the unit."""
        was_queued = self.later.pop(timer, None) is not None
        waits = bool(await self._due(timer))
        if waits:
            self.cancelled.append(timer)
        return was_queued or waits
