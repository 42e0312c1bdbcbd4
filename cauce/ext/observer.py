"""Looks at lags again and again, in a thread with a loop of its own: the loop of the services is not asked for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from cauce.backends import look
from cauce.clock import Clock, SystemClock
from cauce.errors import CauceError
from cauce.lag import Seen, surveying

__all__ = ["Observer"]

_EVERY = 5.0
_PATIENCE = 30.0
"""Seconds for one look, behind which the bus counts as out of reach."""

_JOIN = 5.0


class Observer:
    """What a look at a bus has seen last; any thread may ask.

    Parameters:
        services: at which of them to look.
        every: seconds between two looks.

    Attributes:
        seen: what was seen last; None before the first look.
        error: why the last look failed; empty if it did not.
    """

    def __init__(
        self,
        url: str,
        store: str | None,
        services: Sequence[str],
        clock: Clock | None = None,
        *,
        every: float = _EVERY,
    ) -> None:
        self._url, self._store, self._services = url, store, services
        self._clock, self._every = clock or SystemClock(), every
        self.seen: Seen | None = None
        self.error = ""
        self._at = self._clock.monotonic()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    @property
    def age(self) -> float:
        """Seconds since the last look that succeeded, or since the beginning."""
        return max(0.0, self._clock.monotonic() - self._at)

    def start(self) -> None:
        """Look from now on. The services must be running: what they open they must not find open."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="cauce observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        if self._thread is None:
            return
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stopping.set)
        self._thread.join(_JOIN)

    async def _run(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        looking = asyncio.ensure_future(self._look_on())
        stopped = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({looking, stopped}, return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    async def _look_on(self) -> None:
        while True:
            try:
                async with (
                    look(self._url, self._clock) as bus,
                    surveying(bus, self._store, self._clock) as survey,
                ):
                    while True:
                        async with asyncio.timeout(_PATIENCE):
                            seen = await survey.look(self._services)
                        self.seen, self.error, self._at = seen, "", self._clock.monotonic()
                        await self._clock.sleep(self._every)
            except CauceError as error:
                self.error = str(error)
            except Exception as error:
                self.error = repr(error)
            await self._clock.sleep(self._every)
