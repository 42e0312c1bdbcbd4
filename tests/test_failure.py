"""Failure: when a message is tried again, and what the dependency that died, or the poison, does to all others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest

from cauce import (
    ALWAYS,
    NEVER,
    BreakerOpen,
    Bus,
    Busy,
    Command,
    Context,
    Domain,
    Event,
    NoAnswer,
    OutcomeUnknown,
    Overloaded,
    Query,
    Record,
    Refused,
    Retry,
    Service,
    StorageFull,
    Unreachable,
    running,
)
from cauce.retry import retry_for
from cauce.store import Letter
from cauce.testing import VirtualClock
from tests.kept import hurry, stores_of, waiting

Run = Callable[[Callable[[], Any]], None]

jobs = Domain("jobs", key="name")
prices = Domain("prices")


class Job(Record, domain=jobs):
    name: str
    n: int


class Begun(Event, domain=jobs):
    name: str
    n: int


class Begin(Command, domain=jobs):
    name: str


class PriceOf(Query[int], domain=prices):
    name: str


owner = Service("jobs", owns=jobs)


@owner.decide
def begin(job: Job | None, command: Begin) -> Begun:
    return Begun(command.name, (job.n if job else 0) + 1)


@owner.evolve
def begun(job: Job | None, event: Begun) -> Job:
    return Job(event.name, event.n)


def reacting(function: Callable[..., Any], retry: Retry | Mapping[type[Exception], Retry] | None = None) -> Service:
    """A service with one reaction, called `handle`."""
    service = Service("reacting")
    function.__name__ = "handle"
    service.on(retry=Retry() if retry is None else retry)(function)
    return service


async def letters_of(url: str) -> list[Letter]:
    async with stores_of(url) as stores:
        return await stores.letters("reacting")


async def until(condition: Callable[[], bool], bus: Bus, within: float = 60.0) -> None:
    end = bus.clock.monotonic() + within
    while not condition():
        assert bus.clock.monotonic() < end, "it never came"
        await bus.clock.sleep(0.01)


# -------------------------------------------------------------------------------------------------- when it is tried


def test_a_delay_lies_between_half_and_all_of_what_grows_up_to_the_longest() -> None:
    retry = Retry(first=0.5, longest=20.0, factor=3)
    most = [0.5, 1.5, 4.5, 13.5, 20.0, 20.0]
    assert [retry.delay(tries, 1.0) for tries in range(1, 7)] == most
    assert [retry.delay(tries, 0.0) for tries in range(1, 7)] == [each / 2 for each in most]
    assert retry.delay(10**9, 1.0) == 20.0
    assert Retry(factor=1).delay(50, 1.0) == 0.1


def test_of_several_policies_that_of_the_nearest_class_counts() -> None:
    some, other = Retry(attempts=3), Retry(attempts=4)
    policies = {OSError: some, ValueError: NEVER, ConnectionError: ALWAYS}
    assert retry_for(policies, ConnectionResetError()) is ALWAYS
    assert retry_for(policies, FileNotFoundError()) is some
    assert retry_for(policies, UnicodeError()) is NEVER
    assert retry_for(policies, KeyError()) == Retry()
    assert retry_for({Exception: other, ValueError: NEVER}, KeyError()) is other
    assert retry_for(some, KeyError()) is some


# The checkers find most of these, too.
anything: Any = Retry
service: Any = Service("s")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: anything(attempts=-1), lambda: anything(attempts=1.5), lambda: anything(first=0),
        lambda: anything(first=9, longest=1), lambda: anything(longest=float("nan")),
        lambda: anything(longest=float("inf")), lambda: anything(factor=0.5), lambda: service.on(retry=3),
        lambda: service.on(retry={"ValueError": NEVER}), lambda: service.on(retry={ValueError: 3}),
        lambda: service.on(retry={KeyboardInterrupt: NEVER}),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_right_is_refused_when_it_is_said(wrong: Callable[[], Any]) -> None:
    with pytest.raises(Refused, match=r"say|pass a Retry|name a class of exceptions"):
        wrong()


async def test_what_is_never_to_be_tried_again_is_a_dead_letter_at_once_and_all_else_is_tried_as_its_kind_says(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    tries, kinds = Counter[str](), {"bad": ValueError, "odd": KeyError, "slow": TimeoutError, "other": RuntimeError}

    async def handle(event: Begun) -> None:
        tries[event.name] += 1
        if event.name != "slow" or tries["slow"] < 20:
            raise kinds[event.name](event.name)

    policies = {
        ValueError: NEVER, LookupError: Retry(attempts=3), TimeoutError: Retry(attempts=0, longest=0.1),
        Exception: Retry(attempts=2),
    }  # fmt: skip
    async with running(owner, reacting(handle, policies), bus=each_bus) as bus:
        for name in kinds:
            await bus.call(Begin(name))
        await bus.settled(timeout=60)
    assert tries == {"bad": 1, "odd": 3, "slow": 20, "other": 2}
    found = {each.stream: (each.attempts, each.error) for each in await letters_of(each_bus)}
    assert found == {
        "jobs/bad": (1, "ValueError: bad"), "jobs/odd": (3, "KeyError: 'odd'"), "jobs/other": (2, "RuntimeError: other"),
    }  # fmt: skip


def test_five_hundred_that_fail_together_do_not_come_back_together(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    """Their dependency dies while they are in flight: each next try of all of them is spread over half its delay."""
    at, back = defaultdict[str, list[float]](list), list[bool]()

    async def handle(event: Begun, ctx: Context) -> None:
        at[event.name].append(clock.monotonic())
        if not back:
            raise ConnectionError("the dependency is away")

    async def main() -> None:
        async with running(owner, reacting(handle, Retry(first=10.0, longest=160.0)), bus=bus_url, clock=clock) as bus:
            for n in range(500):
                await bus.call(Begin(f"job{n}"))
            await until(lambda: min(map(len, at.values())) >= 4, bus, 1000.0)
            back.append(True)
            await bus.settled(timeout=1000.0)
        assert len(at) == 500
        for number, most in enumerate((10.0, 20.0, 40.0)):
            delays = [times[number + 1] - times[number] for times in at.values()]
            assert min(delays) >= most / 2
            tenths = Counter(int((delay - most / 2) / (most / 20)) for delay in delays)
            assert max(tenths.values()) < 100, f"of 500 in a tenth of the time: {tenths}"
            assert len(tenths) >= 10
        assert await letters_of(bus_url) == []

    virtual(main)


@pytest.mark.parametrize(
    "error",
    [
        NoAnswer("x"), OutcomeUnknown("x", "x"), Busy("x"), Overloaded("x"), StorageFull("x"), BreakerOpen("x"),
        Unreachable("x"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_is_not_the_messages_fault_waits_with_growing_delay_and_never_parks(
    error: Exception, virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    at = list[float]()

    async def handle(event: Begun) -> None:
        at.append(clock.monotonic())
        if clock.monotonic() - at[0] < 600:
            raise error

    async def main() -> None:
        async with running(owner, reacting(handle, Retry(attempts=2)), bus=bus_url, clock=clock) as bus:
            await bus.call(Begin("a"))
            await bus.settled(timeout=1000)
        delays = [after - before for before, after in pairwise(at)]
        assert 15 < len(delays) < 40
        assert all(after > before for before, after in pairwise(delays[:8:2])), "they grow"
        assert max(delays) <= 60.1
        assert await waiting(bus_url, "reacting", "handle") == []

    virtual(main)


def test_errors_of_a_clients_own_connections_count_unless_the_policy_says_otherwise(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def handle(event: Begun) -> None:
        raise ConnectionRefusedError("no smtp") if event.name == "mail" else TimeoutError("no smtp in time")

    async def main() -> None:
        service = reacting(handle, {Exception: Retry(attempts=2), ConnectionError: ALWAYS})
        async with running(owner, service, bus=bus_url, clock=clock) as bus:
            for name in ("mail", "late"):
                await bus.call(Begin(name))
            await clock.sleep(600)
            assert [each.stream for each in await letters_of(bus_url)] == ["jobs/late"]
            (mail,) = [each for each in await waiting(bus_url, "reacting", "handle") if each.stream == "jobs/mail"]
            assert mail.attempts > 10

    virtual(main)


def test_while_a_callee_is_down_for_ten_minutes_nothing_is_parked_and_then_all_is_handled_in_order(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    told = list[tuple[str, int]]()

    async def handle(event: Begun, ctx: Context) -> None:
        assert await ctx.ask(PriceOf(event.name)) == 1
        told.append((event.name, event.n))

    callee = Service("callee", owns=prices)

    @callee.answer
    async def price(query: PriceOf) -> int:
        return 1

    async def main() -> None:
        async with running(owner, reacting(handle), bus=bus_url, clock=clock) as bus:
            for n in range(60):
                await bus.call(Begin(f"job{n % 20}"))
                await clock.sleep(10)
            assert told == []
            assert await letters_of(bus_url) == []
            async with running(callee, bus=bus_url, clock=clock):
                await bus.settled(timeout=1000)
        assert sorted(told) == sorted((f"job{n}", each) for n in range(20) for each in (1, 2, 3))
        assert all([n for name, n in told if name == each] == [1, 2, 3] for each in {name for name, _ in told}), (
            "in order per thing"
        )

    virtual(main)


# ------------------------------------------------------------------------------------------------------- the poison


async def test_one_poison_among_a_hundred_delays_only_its_own_thing(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    handled = list[tuple[str, int]]()

    async def handle(event: Begun) -> None:
        if (event.name, event.n) == ("job7", 3):
            raise ValueError("poison")
        handled.append((event.name, event.n))

    async with running(owner, reacting(handle, Retry(attempts=3)), bus=each_bus) as bus:
        for n in range(100):
            await bus.call(Begin(f"job{n % 10}"))
        await bus.settled(timeout=60)
    expected = [(f"job{n}", each) for n in range(10) for each in range(1, 11) if n != 7 or each < 3]
    assert sorted(handled) == sorted(expected)
    assert all(
        [n for name, n in handled if name == each] == sorted(n for name, n in handled if name == each)
        for each, _ in expected
    )
    (letter,) = await letters_of(each_bus)
    assert (letter.stream, letter.attempts, letter.behind) == ("jobs/job7", 3, 7)
