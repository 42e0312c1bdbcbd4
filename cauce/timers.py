"""Letting go what is due: each message that waits for its time is said when it has come, under the fence of its share.

Times are the wall clock's. It may be set forward or back while this sleeps, which no sleep notices: so none is long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from cauce.clock import Clock
from cauce.errors import Unavailable
from cauce.schedule import Schedule
from cauce.store import Share, Store

__all__ = ["LONGEST", "Timers", "until"]

_log = logging.getLogger("cauce")

LONGEST = 5.0
"""Seconds after which a clock that was set forward is noticed."""

_AT_ONCE = 1_000
_REST = 1.0


async def until(due: int, schedule: Schedule, clock: Clock) -> int:
    """Wait until the wall clock has come to a time, or to the one that stands when it was set back. Gives that."""
    while (left := (due := schedule.standing(due, clock.now())) - clock.now()) > 0:
        await clock.sleep(min(left / 1_000_000, LONGEST))
    return due


class Timers:
    """What of one service is let go by one instance.

    Parameters:
        held: what the instance holds now.
        fired: called when something was said.
    """

    def __init__(
        self, service: str, store: Store, clock: Clock, held: Callable[[], Sequence[Share]], fired: Callable[[], None]
    ) -> None:
        self._service, self._store, self._clock = service, store, clock
        self._held, self._fired = held, fired
        self._next, self._anew = 0, True
        self._bell = asyncio.Event()
        self._one = asyncio.Lock()

    def note(self, due: int) -> None:
        """A timer was set for this time."""
        if not self._next or due < self._next:
            self._next = due
            self._bell.set()

    def look(self) -> None:
        """There may be others to let go: something was gained, or changed by another process."""
        self._anew = True
        self._bell.set()

    async def run(self) -> None:
        """Let go what is due, when it is, for ever."""
        while True:
            await self._wait()
            try:
                await self.fire()
            except Unavailable as error:
                _log.warning("what %s said for later waits: %s", self._service, error)
                self._anew = True
                await self._clock.sleep(_REST)

    async def fire(self) -> None:
        """Let go all that is due now."""
        async with self._one:
            many = 1
            while many and self._is_due:
                # What is noted meanwhile may not be among what is looked at.
                self._next, self._anew = 0, False
                try:
                    now = self._clock.now()
                    many, due = await self._store.fire(self._held(), now, _AT_ONCE)
                except BaseException:
                    self._anew = True
                    raise
                if due:
                    # What is due and was not let go is another's by now, of which this instance has not heard yet.
                    self.note(due if many or due > now else now + round(_REST * 1_000_000))
                if many:
                    self._fired()

    @property
    def _is_due(self) -> bool:
        return self._anew or 0 < self._next <= self._clock.now()

    async def _wait(self) -> None:
        while not self._is_due:
            self._bell.clear()
            left = min((self._next - self._clock.now()) / 1_000_000, LONGEST) if self._next else None
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._bell.wait()
