"""Callers that ask the desk, the cards and the CRM, and how long each of them waits."""

import asyncio
from collections.abc import Awaitable, Callable

from blocked.desk import Page
from cauce import Bus, Unavailable
from shop.cards import Card
from shop.crm import WhoHas

CALLERS = 4
PAUSE = 0.005
"""Seconds between two questions of a caller: what is looked at is how long one waits, not how many there are."""


class Load:
    """What the callers found, over all rounds; `p99` in seconds, by callee, one for each round."""

    def __init__(self, users: int) -> None:
        self._users = users
        self.pages = self.fallen_back = 0
        self.failed = list[str]()
        self.p99: dict[str, list[float]] = {"cards": [], "crm": []}

    async def during(self, bus: Bus, seconds: float) -> None:
        """Ask for so long."""
        took: dict[str, list[float]] = {"desk": [], "cards": [], "crm": []}
        until = bus.clock.monotonic() + seconds

        async def page(key: str) -> None:
            name, from_owner = await bus.ask(Page(key))
            assert name == f"User {key}"
            self.pages += 1
            self.fallen_back += not from_owner

        async def card(key: str) -> None:
            await bus.fetch(Card, key)

        async def directory(key: str) -> None:
            await bus.ask(WhoHas("example.org"))

        async def caller(callee: str, ask: Callable[[str], Awaitable[None]]) -> None:
            n = 0
            while (began := bus.clock.monotonic()) < until:
                try:
                    await ask(f"{n % self._users}")
                except Unavailable as error:
                    self.failed.append(f"{callee} did not answer: {error}")
                took[callee].append(bus.clock.monotonic() - began)
                n += 1
                await bus.clock.sleep(PAUSE)

        asked = (("desk", page), ("cards", card), ("crm", directory))
        await asyncio.gather(*(caller(callee, ask) for callee, ask in asked for _ in range(CALLERS)))
        for callee, found in self.p99.items():
            found.append(sorted(took[callee])[len(took[callee]) * 99 // 100])
