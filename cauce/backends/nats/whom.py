"""Whom a question may be asked by name: those who have lately said that they answer at its address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from cauce.backends.nats.registry import BEAT
from cauce.backends.spread import Spread
from cauce.clock import Clock
from cauce.wire import Instance, is_well

__all__ = ["Whom"]

_log = logging.getLogger("cauce")

_FIRST = 0.25
"""Seconds that the very first question waits to know whom it may ask; after that it goes to whom the server chooses."""


class Whom:
    """What the registry said of the others a beat ago at most, read beside the questions and only while there are some.

    The server itself gives a question to any of those who serve an address, also to one that is stopped.

    Parameters:
        read: what each process announces, by its name.
        me: the name of this process.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Mapping[str, tuple[Instance, ...]]]], me: str, spread: Spread, clock: Clock
    ) -> None:
        self._read, self._me, self._spread, self._clock = read, me, spread, clock
        self._said: Mapping[str, tuple[Instance, ...]] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def order(self, address: str) -> tuple[list[str], list[str]]:
        """The names of the processes that serve an address: the well ones, in the order to ask them, and others."""
        if self._reading is None and self._clock.monotonic() - self._read_at > BEAT:
            self._reading = asyncio.get_running_loop().create_task(self._refresh())
            if self._read_at == float("-inf"):
                await asyncio.wait((self._reading,), timeout=_FIRST)
        now, well, others = self._clock.now(), list[str](), list[str]()
        for name, instances in self._said.items():
            serving = [each for each in instances if address in each.addresses] if name != self._me else []
            if serving:
                (well if all(is_well(each, now) for each in serving) else others).append(name)
        return self._spread.order(well), others

    def doubt(self) -> None:
        """Read it again with the next question."""
        self._read_at = min(self._read_at, self._clock.monotonic() - 2 * BEAT)

    async def _refresh(self) -> None:
        try:
            self._said = await self._read()
        except Exception as error:
            # What was known serves on; and the server knows in any case who is not there.
            _log.debug("whom to ask is as last known: %s", error)
        finally:
            self._read_at, self._reading = self._clock.monotonic(), None

    async def close(self) -> None:
        """Read nothing any more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))
