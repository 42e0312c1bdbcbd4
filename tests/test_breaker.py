"""A breaker opens when its callee is in trouble, leaves it alone, and lets one call try whether it is well again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cauce.errors import BreakerOpen, NoAnswer, Overloaded, Refused, Rejected, Unreachable
from cauce.guards.breaker import Breaker, Limits
from cauce.testing import VirtualClock

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


class Callee:
    """Does as it is told, and counts how often it was asked."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock, self.asked, self.seconds = clock, 0, 0.0
        self.error: Exception | None = None

    async def __call__(self, number: int = 0) -> int:
        self.asked += 1
        if self.seconds:
            await self._clock.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return number


async def ask(breaker: Breaker, callee: Callee, times: int = 1) -> list[str]:
    """What each call came to."""
    found = []
    for n in range(times):
        try:
            assert await breaker.call(callee, n) == n
            found.append("well")
        except Exception as error:
            found.append(type(error).__name__)
    return found


def opened(clock: VirtualClock, **limits: Any) -> tuple[Breaker, Callee]:
    given: dict[str, Any] = {"least": 4, **limits}
    return Breaker("users", clock, Limits(**given)), Callee(clock)


def test_it_opens_when_enough_of_enough_calls_failed_and_then_nothing_runs(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        assert await ask(breaker, callee, 2) == ["well"] * 2
        callee.error = Unreachable("it is away")
        assert await ask(breaker, callee, 4) == ["Unreachable"] * 2 + ["BreakerOpen"] * 2
        assert (callee.asked, breaker.opened, breaker.refused, breaker.state) == (4, 1, 2, "open")
        with pytest.raises(
            NoAnswer, match=r"users is in trouble and is not asked for 1\.0 s: nothing ran; wait, or use a fallback"
        ):
            await breaker.call(callee)

    virtual(main)


def test_a_few_failures_among_many_calls_or_few_calls_at_all_open_nothing(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        callee.error = TimeoutError()
        assert await ask(breaker, callee, 3) == ["TimeoutError"] * 3
        await clock.sleep(30)
        for _ in range(50):
            callee.error = None
            await ask(breaker, callee, 3)
            callee.error = ConnectionError()
            await ask(breaker, callee)
        assert breaker.state == "closed"

    virtual(main)


@pytest.mark.parametrize(
    "answer",
    [
        Rejected("no"),
        Refused("bad"),
        ValueError("its own fault"),
        NoAnswer("nobody is there to be burdened"),
        Overloaded("who sheds load is well"),
    ],
)
def test_a_no_is_an_answer(answer: Exception, virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        callee.error = answer
        assert await ask(breaker, callee, 20) == [type(answer).__name__] * 20
        assert breaker.state == "closed"

    virtual(main)


def test_after_a_rest_one_call_tries_and_closes_it(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        callee.error = Unreachable("it is away")
        await ask(breaker, callee, 4)
        callee.error, callee.seconds = None, 0.5
        await clock.sleep(1.0)
        probe = asyncio.ensure_future(breaker.call(callee))
        await clock.sleep(0.1)
        assert breaker.state == "half-open"
        assert await ask(breaker, callee, 3) == ["BreakerOpen"] * 3, "while one tries, no other does"
        await probe
        assert await ask(breaker, callee, 3) == ["well"] * 3, "it is closed"
        assert callee.asked == 8

    virtual(main)


def test_each_try_in_vain_doubles_the_rest_up_to_the_longest(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock, rest=1.0, longest=4.0)
        callee.error = Unreachable("it is away")
        await ask(breaker, callee, 4)
        tried = []
        began = clock.monotonic()
        while clock.monotonic() - began < 20:
            before = callee.asked
            await ask(breaker, callee)
            if callee.asked > before:
                tried.append(round(clock.monotonic() - began, 1))
            await clock.sleep(0.5)
        assert tried == [1.0, 3.0, 7.0, 11.0, 15.0, 19.0]
        callee.error = None
        await clock.sleep(4)
        assert await ask(breaker, callee) == ["well"]
        callee.error = Unreachable("again")
        await ask(breaker, callee, 4)
        await clock.sleep(1.0)
        before = callee.asked
        await ask(breaker, callee)
        assert callee.asked == before + 1, "who was well rests as short as at first"

    virtual(main)


def test_slow_calls_open_it_like_failed_ones(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock, slow=1.0)
        callee.seconds = 0.9
        assert await ask(breaker, callee, 8) == ["well"] * 8
        callee.seconds = 1.0
        assert (await ask(breaker, callee, 20))[-1] == "BreakerOpen"
        await clock.sleep(1.0)
        await ask(breaker, callee)
        assert breaker.state == "open", "a slow probe closes nothing"

    virtual(main)


def test_what_was_long_ago_does_not_count(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock, window=10.0)
        for _ in range(20):
            callee.error = Unreachable("now and then")
            await ask(breaker, callee, 2)
            callee.error = None
            await ask(breaker, callee)
            await clock.sleep(10.1)
        assert breaker.state == "closed"

    virtual(main)


def test_what_began_before_it_opened_says_nothing_when_it_ends(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        callee.seconds = 5.0
        late = [asyncio.ensure_future(breaker.call(callee)) for _ in range(20)]
        await clock.sleep(0.1)
        breaker.open("we know that it is ill")
        await asyncio.gather(*late)
        assert breaker.state == "open"
        breaker.close()
        assert await ask(breaker, Callee(clock)) == ["well"]

    virtual(main)


def test_a_probe_that_is_given_up_lets_the_next_one_try(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        callee.error = Unreachable("it is away")
        await ask(breaker, callee, 4)
        await clock.sleep(1.0)
        callee.error, callee.seconds = None, 60.0
        probe = asyncio.ensure_future(breaker.call(callee))
        await clock.sleep(0.1)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        callee.seconds = 0.0
        assert await ask(breaker, callee) == ["well"]
        assert breaker.state == "closed"

    virtual(main)


def test_by_hand_it_stays_open_until_it_is_closed_and_the_log_tells(
    virtual: Run, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        breaker, callee = opened(clock)
        caplog.set_level("INFO", "cauce")
        breaker.open("it is being repaired")
        await clock.sleep(3600)
        with pytest.raises(BreakerOpen, match="until it is closed"):
            await breaker.call(callee)
        breaker.close()
        assert await ask(breaker, callee) == ["well"]
        assert [record.getMessage() for record in caplog.records if record.name == "cauce"] == [
            "breaker of users: open, it is being repaired",
            "breaker of users: closed, by hand",
        ]

    virtual(main)


@pytest.mark.parametrize(
    "limits", [{"share": 0.0}, {"share": 1.1}, {"least": 0}, {"window": 0}, {"slow": 0}, {"rest": 40.0}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="say a share above 0"):
        Limits(**limits)
