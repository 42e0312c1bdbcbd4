"""Nothing is begun on a lease past two thirds of its time, on none of the ways on which work begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cauce import Retry, Service, running
from cauce.lease import TTL
from cauce.shares import Shares
from cauce.testing import VirtualClock
from tests.counters import Add, Added, owner

Run = Callable[[Callable[[], Any]], Any]

WAYS = ["a lane", "several at once", "a retry", "an interval"]


def test_a_lease_is_stale_after_two_thirds_of_its_time(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        shares = Shares.__new__(Shares)
        shares._clock, shares._beaten = clock, clock.monotonic()
        assert shares.is_fresh
        await clock.sleep(TTL * 2 / 3 - 0.01)
        assert shares.is_fresh
        await clock.sleep(0.02)
        assert not shares.is_fresh

    virtual(main)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_begun_on_a_lease_past_two_thirds_of_its_time(
    way: str, virtual: Run, clock: VirtualClock, bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, begun, fails = Service("careful"), list[str](), [way == "a retry"]
    if way == "an interval":

        @service.every(1)
        async def tick() -> None:
            begun.append("tick")

    else:

        @service.on(concurrency=20 if way == "several at once" else 0, retry=Retry(first=1.0))
        async def handle(event: Added) -> None:
            if fails[0]:
                raise ValueError
            begun.append(event.name)

    beat = Shares._beat
    away = asyncio.Event()

    async def missed(self: Shares) -> Any:
        if away.is_set() and self.owner.startswith("careful"):
            await asyncio.Event().wait()
        return await beat(self)

    monkeypatch.setattr(Shares, "_beat", missed)

    async def main() -> None:
        async with running(owner, bus=bus_url, clock=clock) as bus:
            context = running(service, bus=bus_url, clock=clock, drain=0)
            async with context:
                if way == "a retry":
                    await bus.call(Add("a"))
                    await clock.sleep(1)
                away.set()
                await clock.sleep(TTL)
                fails[0] = False
                many = len(begun)
                if way != "a retry":
                    await bus.call(Add("b"))
                await clock.sleep(30)
                assert len(begun) == many, "its slots may be another's by now"

    virtual(main)
