"""The end of the audit time: so long is kept what is decided, and what is undecided for as long as it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from cauce.clock import Clock
from cauce.errors import CauceError, Unavailable
from cauce.log import Log
from cauce.store import Store, places_in

__all__ = ["SHORTEST", "Audit"]

_log = logging.getLogger("cauce")

SHORTEST = 3_600.0
"""Seconds that the audit time is at least: whoever says a command again within half of it is heard."""

_EVERY = 3_600.0
_SOON = 30.0


class Audit:
    """Lets a log of commands forget what one instance has decided in the slots that it holds.

    Parameters:
        seconds: the audit time.
        consumers: by domain the name under which what is decided there has its places.
        slots: those of a domain that this instance holds.
    """

    def __init__(
        self,
        commands: Log,
        store: Store,
        clock: Clock,
        seconds: float,
        consumers: Mapping[str, str],
        slots: Callable[[str], Collection[int]],
    ) -> None:
        self._commands, self._store, self._clock = commands, store, clock
        self._seconds, self._consumers, self._slots = seconds, dict(consumers), slots

    async def run(self) -> None:
        """At once, and then once an hour, for ever."""
        while True:
            await self._clock.sleep(_EVERY if await self._look() else _SOON)

    async def _look(self) -> bool:
        """Whether it need not be tried again soon."""
        well = True
        for domain, consumer in self._consumers.items():
            try:
                await self._forget(domain, consumer)
            except Unavailable as error:
                well = False
                _log.info("old commands of %s are kept a little longer: %s", domain, error)
            except CauceError as error:
                _log.warning("old commands of %s are kept: %s", domain, error)
        return well

    async def _forget(self, domain: str, consumer: str) -> None:
        log, count = self._commands, 0
        before = self._clock.now() - round(self._seconds * 1_000_000)
        places = await places_in(self._store, consumer, log)
        # Asked for after the places, which pass what is set aside: it may be tried again, and must be there.
        waiting: dict[int, int] = {}
        for each in await self._store.waiting(consumer):
            waiting[each.slot] = min(each.position, waiting.get(each.slot, each.position))
        for slot in sorted(self._slots(domain)):
            place = places.get((domain, slot), 0)
            upto = min(place, waiting.get(slot, place + 1) - 1)
            if upto > 0:
                count += await log.forget(domain, slot, upto, before)
        if count:
            _log.info("%d commands of %s were decided, and are older than the audit time: removed", count, domain)
