"""What stands between a caller and a callee that is blocked: breaker, bulkhead, fallback, and deadlines that shrink."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cauce import (
    BreakerOpen,
    Command,
    Context,
    Copy,
    Domain,
    Event,
    Gone,
    Guards,
    Limits,
    NoAnswer,
    OutcomeUnknown,
    Overloaded,
    Query,
    Record,
    Refused,
    Rejected,
    Retry,
    Service,
    connect,
    running,
)
from cauce.testing import VirtualClock
from tests.kept import stores_of

Run = Callable[[Callable[[], Awaitable[Any]]], Any]
LIMITS = Limits(least=4)

things = Domain("things", key="name")
fronts = Domain("fronts")
backs = Domain("backs")


class Thing(Record, domain=things):
    name: str


class Made(Event, domain=things):
    name: str


class Unmade(Event, domain=things):
    name: str


class Make(Command, domain=things):
    name: str


class Unmake(Command, domain=things):
    name: str


class Count(Query[int], domain=things):
    pass


class Front(Query[str], domain=fronts):
    timeout: float = 30.0


class Back(Query[str], domain=backs):
    pass


class Held(Copy, of=Thing):
    name: str


class Owner:
    """A service whose answers, and decisions, take as long and end as they are told; `began` counts the questions."""

    def __init__(self, clock: VirtualClock, at_once: int = 2000) -> None:
        self.clock, self.service = clock, Service("things", owns=things)
        self.frozen, self.seconds, self.began = False, 0.0, 0
        self.cancelled = 0
        self._go_on = asyncio.Event()

        @self.service.decide
        async def make(thing: Thing | None, command: Make, ctx: Context) -> Made:
            await self._work()
            if thing is not None:
                raise Rejected("it is there")
            return Made(command.name)

        @self.service.decide
        def unmake(thing: Thing | None, command: Unmake) -> Unmade | None:
            return None if thing is None else Unmade(command.name)

        @self.service.evolve
        def made(thing: Thing | None, event: Made) -> Thing:
            return Thing(event.name)

        @self.service.evolve
        def unmade(thing: Thing, event: Unmade) -> None:
            return None

        @self.service.answer(at_once=at_once)
        async def count(query: Count) -> int:
            await self._work()
            return self.began

    async def _work(self) -> None:
        self.began += 1
        try:
            if self.frozen:
                await self._go_on.wait()
            await self.clock.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def freeze(self) -> None:
        self.frozen = True
        self._go_on.clear()

    def thaw(self) -> None:
        self.frozen = False
        self._go_on.set()


async def outcomes(work: Callable[[], Awaitable[Any]], times: int) -> list[str]:
    """What each came to, one after the other."""
    found = []
    for _ in range(times):
        try:
            await work()
            found.append("well")
        except Exception as error:
            found.append(type(error).__name__)
    return found


# ------------------------------------------------------------------------------------------------------ the breaker


def test_a_frozen_callee_is_soon_left_alone_and_asked_again_when_it_is_well(
    virtual: Run, clock: VirtualClock, bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus:
            owner.freeze()
            assert await outcomes(lambda: bus.ask(Count(), timeout=1.0), 4) == ["NoAnswer"] * 4
            began = clock.monotonic()
            with pytest.raises(BreakerOpen, match="things is in trouble and is not asked for 1.0 s: nothing ran"):
                await bus.ask(Count(), timeout=1.0)
            assert clock.monotonic() == began, "who asks is told so at once"
            assert owner.began == 4, "and nothing runs"
            guard = bus.guards["things"]
            assert (guard.name, guard.state, guard.opened, guard.refused, guard.under_way) == (
                "things",
                "open",
                1,
                1,
                0,
            )
            owner.thaw()
            await clock.sleep(1.0)
            assert await outcomes(lambda: bus.ask(Count()), 3) == ["well"] * 3
            assert bus.guards["things"].state == "closed"

    with caplog.at_level(logging.INFO, "cauce"):
        virtual(main)
    turns = [each.getMessage() for each in caplog.records if "breaker of things" in each.getMessage()]
    assert [turn.partition(",")[0].rpartition(" ")[2] for turn in turns] == ["open", "half-open", "closed"]


def test_a_caller_whose_own_loop_stood_still_hears_the_answers_that_came_and_opens_no_breaker(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus:
            owner.seconds = 0.05
            asyncio.get_running_loop().call_later(0.01, clock.advance, 9.0)
            asked = [bus.ask(Count(), timeout=0.5) for _ in range(20)]
            assert await asyncio.gather(*asked, return_exceptions=True) == [20] * 20, "they had answered in time"
            await clock.sleep(30)
            owner.freeze()
            asyncio.get_running_loop().call_later(0.01, clock.advance, 9.0)
            found = await asyncio.gather(*(bus.ask(Count(), timeout=0.5) for _ in range(20)), return_exceptions=True)
            assert {str(each).partition(":")[0] for each in found} == {
                "things did not answer Count within 0.5 s, in which this process stood still itself"
            }
            assert bus.guards["things"].state == "closed", "that is nobody's fault but one's own"
            assert await outcomes(lambda: bus.ask(Count(), timeout=0.5), 5) == ["NoAnswer"] * 4 + ["BreakerOpen"]
            owner.thaw()

    virtual(main)


def test_one_breaker_stands_before_all_slots_of_a_domain_and_all_that_it_is_asked(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus:
            owner.freeze()
            calls = (bus.call(Make(name), timeout=1.0) for name in "abcd")
            assert [type(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == [OutcomeUnknown] * 4
            for work in (
                lambda: bus.call(Make("e")), lambda: bus.ask(Count()), lambda: bus.fetch(Thing, "a"), lambda: bus.state(Thing, "a"),
            ):  # fmt: skip
                assert await outcomes(work, 1) == ["BreakerOpen"]
            assert list(bus.guards) == ["things"]
            owner.thaw()

    virtual(main)


def test_where_a_limit_for_slow_answers_is_set_slow_ones_open_the_breaker(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        guards = Guards(breaker=Limits(least=4, slow=0.5))
        async with running(owner.service, bus=bus_url, clock=clock, guards=guards) as bus:
            owner.seconds = 0.4
            assert await outcomes(lambda: bus.ask(Count()), 4) == ["well"] * 4
            owner.seconds = 0.6
            assert await outcomes(lambda: bus.ask(Count()), 6) == ["well"] * 4 + ["BreakerOpen"] * 2

    virtual(main)


def test_answers_that_say_no_open_nothing(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus:
            await bus.call(Make("a"))
            assert await outcomes(lambda: bus.call(Make("a")), 20) == ["Rejected"] * 20
            assert await outcomes(lambda: bus.fetch(Thing, "none"), 20) == ["Gone"] * 20
            assert await outcomes(lambda: bus.ask(Back()), 20) == ["NoAnswer"] * 20
            assert {guard.opened for guard in bus.guards.values()} == {0}

    virtual(main)


def test_a_breaker_is_opened_and_closed_by_hand_before_anybody_asked(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock) as bus:
            bus.guards["things"].open("they are being moved")
            await clock.sleep(60)
            assert await outcomes(lambda: bus.ask(Count()), 2) == ["BreakerOpen"] * 2
            bus.guards["things"].close()
            assert await outcomes(lambda: bus.ask(Count()), 2) == ["well"] * 2

    virtual(main)


def test_of_many_who_ask_when_the_rest_is_over_one_is_let_through_in_each_process(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with (
            running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus,
            connect(bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as other,
        ):
            owner.freeze()
            for each in (bus, other):
                await outcomes(lambda each=each: each.ask(Count(), timeout=1.0), 4)  # type: ignore[misc]
            await clock.sleep(1.0)
            owner.began = 0
            owner.thaw()
            owner.seconds = 0.1
            asked = [each.ask(Count()) for each in (bus, other) for _ in range(100)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert owner.began == 2
            assert sum(isinstance(each, BreakerOpen) for each in found) == 198

    virtual(main)


def test_a_callee_that_flaps_is_left_alone_again_and_again_and_asked_soon_after_it_has_settled(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        guards = Guards(breaker=Limits(share=0.25, least=4, window=0.4, rest=0.1, longest=2.0))
        async with running(owner.service, bus=bus_url, clock=clock, guards=guards) as bus:

            async def flap() -> None:
                while True:
                    owner.freeze()
                    await clock.sleep(0.2)
                    owner.thaw()
                    await clock.sleep(0.2)

            flapping = asyncio.ensure_future(flap())
            found, took, until = list[str](), list[float](), clock.monotonic() + 20

            async def caller() -> None:
                while (began := clock.monotonic()) < until:
                    found.extend(await outcomes(lambda: bus.ask(Count(), timeout=0.05), 1))
                    took.append(clock.monotonic() - began)
                    await clock.sleep(0.05)

            await asyncio.gather(*(caller() for _ in range(10)))
            flapping.cancel()
            owner.thaw()
            assert set(found) == {"well", "NoAnswer", "BreakerOpen"}
            assert bus.guards["things"].opened > 10
            assert max(took) < 0.1
            await clock.sleep(2.0)
            assert await outcomes(lambda: bus.ask(Count(), timeout=0.05), 5) == ["well"] * 5

    virtual(main)


def test_a_reaction_waits_ten_minutes_for_a_callee_that_is_blocked_and_nothing_is_parked(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    handled, errors = list[str](), list[str]()

    async def main() -> None:
        owner, well = Owner(clock), asyncio.Event()
        back, reacting = Service("backs", owns=backs), Service("reacting")

        @back.answer
        async def answer(query: Back) -> str:
            await well.wait()
            return "well"

        @reacting.on(retry=Retry(attempts=2))
        async def react(event: Made, ctx: Context) -> None:
            try:
                await ctx.ask(Back(), timeout=1.0)
            except NoAnswer as error:
                errors.append(type(error).__name__)
                raise
            handled.append(event.name)

        guards = Guards(breaker=LIMITS)
        async with running(owner.service, back, reacting, bus=bus_url, clock=clock, guards=guards) as bus:
            await asyncio.gather(*(bus.call(Make(f"t{n}")) for n in range(20)))
            await clock.sleep(600)
            assert handled == []
            well.set()
            await bus.settled(timeout=600)
        async with stores_of(bus_url) as stores:
            assert await stores.letters("reacting") == []

    virtual(main)
    assert sorted(handled) == sorted(f"t{n}" for n in range(20))
    assert set(errors) == {"NoAnswer", "BreakerOpen"}


# ----------------------------------------------------------------------------------------------------- the bulkhead


def test_more_questions_than_may_be_under_way_are_turned_away_at_once_and_nothing_ran(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(at_once=5)) as bus:
            owner.freeze()
            asked = [asyncio.ensure_future(bus.ask(Count())) for _ in range(5)]
            await clock.sleep(0.1)
            began = clock.monotonic()
            with pytest.raises(
                Overloaded,
                match="things: 5 questions are under way already, so nothing ran: ask fewer at once, or raise at_once of its guards",
            ):
                await bus.ask(Count())
            assert clock.monotonic() == began
            assert (bus.guards["things"].under_way, bus.guards["things"].shed, owner.began) == (5, 1, 5)
            assert (await bus.record(Thing, "a"), await outcomes(lambda: bus.ask(Back()), 1)) == (None, ["NoAnswer"])
            owner.thaw()
            await asyncio.gather(*asked)
            assert bus.guards["things"].under_way == 0
            assert await outcomes(lambda: bus.ask(Count()), 9) == ["well"] * 9

    virtual(main)


def test_a_storm_that_is_turned_away_is_told_of_every_ten_seconds_and_not_each_time(
    virtual: Run, clock: VirtualClock, bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=None, at_once=1)) as bus:
            owner.freeze()
            asked = asyncio.ensure_future(bus.ask(Count(), timeout=60.0))
            for _ in range(300):
                await clock.sleep(0.05)
                assert await outcomes(lambda: bus.ask(Count()), 10) == ["Overloaded"] * 10
            owner.thaw()
            await asked

    with caplog.at_level(logging.WARNING, "cauce"):
        virtual(main)
    told = [each.getMessage() for each in caplog.records if "turned away" in each.getMessage()]
    assert len(told) == 2
    assert told[0] == "things: 1 questions are under way, what comes beyond is turned away; 1 until now"


def test_who_gives_up_or_is_told_no_makes_room(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    async def main() -> None:
        owner = Owner(clock)
        guards = Guards(breaker=None, at_once=1)
        async with running(owner.service, bus=bus_url, clock=clock, guards=guards) as bus:
            owner.freeze()
            given_up = asyncio.ensure_future(bus.ask(Count()))
            await clock.sleep(0.1)
            given_up.cancel()
            await asyncio.wait({given_up})
            assert await outcomes(lambda: bus.ask(Count(), timeout=0.1), 9) == ["NoAnswer"] * 9
            owner.thaw()
            assert await outcomes(lambda: bus.fetch(Thing, "none"), 2) == ["Gone"] * 2
            assert await outcomes(lambda: bus.ask(Count()), 2) == ["well"] * 2

    virtual(main)


def test_a_thousand_callers_of_a_healthy_system_meet_no_guard(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    async def main() -> None:
        owner = Owner(clock)
        owner.seconds = 0.05
        async with running(owner.service, bus=bus_url, clock=clock) as bus:
            for _ in range(3):
                await asyncio.gather(*(bus.ask(Count()) for _ in range(1000)))
            await asyncio.gather(*(bus.call(Make(f"t{n}")) for n in range(1000)))
            await asyncio.gather(*(bus.fetch(Thing, f"t{n}") for n in range(1000)))
            assert [(each.opened, each.refused, each.shed) for each in bus.guards.values()] == [(0, 0, 0)]
            assert {each.shed for each in bus.bulkheads.values()} == {0}

    virtual(main)


def test_guards_are_switched_off_each_by_itself(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    async def main() -> None:
        owner = Owner(clock)
        off = Guards(breaker=None, at_once=None)
        async with running(owner.service, bus=bus_url, clock=clock, guards=off) as bus:
            owner.freeze()
            asked = [bus.ask(Count(), timeout=1.0) for _ in range(1500)]
            assert {type(each) for each in await asyncio.gather(*asked, return_exceptions=True)} == {NoAnswer}
            assert await outcomes(lambda: bus.ask(Count(), timeout=0.1), 30) == ["NoAnswer"] * 30
            owner.thaw()

    virtual(main)


def test_a_time_out_that_is_no_length_of_time_is_refused_and_one_that_is_over_is_nobody_s_standing_still(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock)
        owner.seconds = 1.0
        async with running(owner.service, bus=bus_url, clock=clock) as bus:
            wrong: list[Any] = [float("nan"), "5", None]
            for timeout in wrong:
                for work in (bus.ask(Count(), timeout=timeout), bus.call(Make("a"), timeout=timeout)):
                    with pytest.raises(Refused, match="say seconds, inf for as long as it takes"):
                        await work
            assert await bus.ask(Count(), timeout=float("inf")) == 1
            for over in (0.0, -1.0):
                with pytest.raises(NoAnswer, match=rf"did not answer Count within {over:g} s: look"):
                    await bus.ask(Count(), timeout=over)

    virtual(main)


def test_a_time_out_leaves_nothing_behind_in_the_task_though_who_was_asked_swallowed_it(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    stubborn = Service("stubborn", owns=backs)

    @stubborn.answer
    async def back(query: Back) -> str:
        try:
            await clock.sleep(60.0)
        except asyncio.CancelledError:
            return "all the same"
        return ""

    async def main() -> None:
        owner, task = Owner(clock), asyncio.current_task()
        assert task is not None
        async with running(stubborn, owner.service, bus=bus_url, clock=clock) as bus:
            owner.freeze()
            assert await bus.ask(Back(), timeout=1.0) == "all the same"
            assert task.cancelling() == 0
            with pytest.raises(NoAnswer):
                await bus.ask(Count(), timeout=1.0)
            owner.thaw()

    virtual(main)


def test_who_is_cancelled_may_ask_once_more_and_is_told_of_the_time_out(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, told = Owner(clock), list[str]()
        async with running(owner.service, bus=bus_url, clock=clock) as bus:
            owner.freeze()

            async def work() -> None:
                try:
                    await clock.sleep(60.0)
                finally:
                    told.extend(await outcomes(lambda: bus.ask(Count(), timeout=1.0), 2))

            task = asyncio.ensure_future(work())
            await clock.sleep(0.1)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            assert told == ["NoAnswer"] * 2
            owner.thaw()

    virtual(main)


def test_a_number_that_makes_no_sense_is_refused() -> None:
    for at_once in (0, -1):
        with pytest.raises(Refused, match="say a number of questions, 1 or more"):
            Guards(at_once=at_once)
        with pytest.raises(Refused, match="say a number of questions, 1 or more"):
            Service("things", owns=things).answer(at_once=at_once)


def test_an_answer_function_has_so_many_in_hand_and_no_more_and_the_others_answer_on(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner = Owner(clock, at_once=5)
        async with running(owner.service, bus=bus_url, clock=clock) as bus:
            owner.freeze()
            asked = [asyncio.ensure_future(bus.ask(Count())) for _ in range(5)]
            await clock.sleep(0.1)
            with pytest.raises(
                Overloaded,
                match="things.count: 5 questions are under way already, so nothing ran: ask fewer at once, or raise its at_once",
            ):
                await bus.ask(Count())
            assert await outcomes(lambda: bus.ask(Count()), 50) == ["Overloaded"] * 50
            assert (bus.bulkheads["things.count"].under_way, bus.bulkheads["things.count"].shed) == (5, 51)
            assert owner.began == 5
            assert await outcomes(lambda: bus.fetch(Thing, "none"), 2) == ["Gone"] * 2, "no breaker has opened"
            owner.thaw()
            await asyncio.gather(*asked)
            assert await outcomes(lambda: bus.ask(Count()), 9) == ["well"] * 9

    virtual(main)


# ----------------------------------------------------------------------------------------------------- the fallback


def test_a_fallback_answers_where_the_callee_cannot_be_asked_and_only_there(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def later() -> int:
        await clock.sleep(0.1)
        return -2

    async def main() -> None:
        owner = Owner(clock)
        async with running(owner.service, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus:
            assert await bus.ask(Count(), fallback=lambda: -1) == 1
            with pytest.raises(Gone):
                await bus.fetch(Thing, "none", fallback=lambda: Thing("made up"))
            owner.freeze()
            assert await bus.ask(Count(), timeout=1.0, fallback=lambda: -1) == -1
            assert await bus.ask(Count(), timeout=1.0, fallback=later) == -2
            assert await bus.ask(Count(), timeout=1.0, fallback=lambda: later()) == -2
            bus.guards["things"].open()
            assert await bus.fetch(Thing, "none", fallback=lambda: Thing("made up")) == Thing("made up")
            assert await bus.ask(Back(), fallback=lambda: None) is None, "nobody is there"
            with pytest.raises(ValueError, match="its own"):
                await bus.ask(Back(), fallback=fails)
            owner.thaw()

    def fails() -> str:
        raise ValueError("its own fault")

    virtual(main)


def test_a_copy_of_the_service_is_the_fallback_of_what_its_context_fetches(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, front = Owner(clock), Service("fronts", owns=fronts)
        front.replica(Held)
        key = "a"

        @front.answer
        async def answer(query: Front, ctx: Context) -> str:
            found = await ctx.fetch(Thing, key, timeout=1.0, fallback=Held)
            return f"{type(found).__name__} {found.name}"

        async with running(owner.service, front, bus=bus_url, clock=clock) as bus:
            await bus.call(Make("a"))
            await bus.settled(timeout=60)
            assert await bus.ask(Front()) == "Thing a"
            bus.guards["things"].open()
            assert await bus.ask(Front()) == "Held a"
            key = "unknown"
            with pytest.raises(BreakerOpen, match="things is in trouble"):
                await bus.ask(Front())
            bus.guards["things"].close()
            with pytest.raises(Gone):
                await bus.ask(Front())

    virtual(main)


def test_a_fallback_that_cannot_be_one_is_refused_before_anything_is_asked(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, front = Owner(clock), Service("fronts", owns=fronts)

        @front.answer
        async def answer(query: Front, ctx: Context) -> str:
            found = await ctx.fetch(Thing, "a", fallback=Held)
            return found.name

        async with running(owner.service, front, bus=bus_url, clock=clock) as bus:
            for wrong in (Held, -1):
                fallback: Any = wrong
                with pytest.raises(Refused, match="pass a function without parameters"):
                    await bus.ask(Count(), fallback=fallback)
            assert owner.began == 0
            with pytest.raises(Refused, match="service 'fronts' has no views and no replicas"):
                await bus.ask(Front())

    virtual(main)


# ------------------------------------------------------------------------------------------------------- deadlines


def chained(owner: Owner, left: list[float | None], seen: list[str]) -> Service:
    """A service that answers by asking another one, for as long as it is told."""
    front = Service("fronts", owns=fronts)

    @front.answer
    async def answer(query: Front, ctx: Context) -> str:
        left.append(ctx.left)
        try:
            return str(await ctx.ask(Count(), timeout=query.timeout))
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        except NoAnswer as error:
            seen.append(str(error))
            raise

    return front


def test_what_is_asked_because_of_a_question_gets_less_time_than_is_left_of_it(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, left, seen = Owner(clock), list[float | None](), list[str]()
        front = chained(owner, left, seen)
        async with running(owner.service, front, bus=bus_url, clock=clock) as bus:
            owner.freeze()
            began = clock.monotonic()
            with pytest.raises(NoAnswer):
                await bus.ask(Front(), timeout=1.0)
            assert clock.monotonic() - began == pytest.approx(0.9, abs=0.01), "time is left to fall back"
            assert left == [pytest.approx(1.0)]
            assert seen == ["things did not answer Count within 0.9 s: look whether it is blocked"]
            assert owner.cancelled == 1, "nobody works on"
            with pytest.raises(NoAnswer):
                await bus.ask(Front(timeout=0.5), timeout=1.0)
            assert seen[1:] == ["things did not answer Count within 0.5 s: look whether it is blocked"]
            owner.thaw()

    virtual(main)


def test_a_handler_that_has_no_time_left_asks_nothing(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    async def main() -> None:
        owner, seen = Owner(clock), list[str]()
        front = Service("fronts", owns=fronts)

        @front.answer
        async def answer(query: Front, ctx: Context) -> str:
            try:
                await clock.sleep(60)
            finally:
                seen.append(str(ctx.left))
                for work in (ctx.ask(Count()), ctx.fetch(Thing, "a"), ctx.call(Make("a"))):
                    try:
                        await work
                    except NoAnswer as error:
                        seen.append(str(error))
            return ""

        async with running(owner.service, front, bus=bus_url, clock=clock) as bus:
            with pytest.raises(NoAnswer):
                await bus.ask(Front(), timeout=1.0)
            assert owner.began == 0
            assert await outcomes(lambda: bus.ask(Count()), 1) == ["well"], "who asked has all the time it wants"
            assert bus.guards["things"].opened == 0
        assert seen[0] == "0.0"
        assert [each.partition(":")[0].partition(" is ")[2] for each in seen[1:]] == [
            "not asked Count", "not asked Thing", "not asked Make",
        ]  # fmt: skip

    virtual(main)


def test_what_a_handler_began_beside_itself_is_bound_by_the_question_only_until_it_is_answered(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, front, beside = Owner(clock), Service("fronts", owns=fronts), list[asyncio.Task[int]]()

        @front.answer
        async def answer(query: Front, ctx: Context) -> str:
            async def later() -> int:
                await clock.sleep(60)
                return await ctx.ask(Count())

            beside.append(asyncio.ensure_future(later()))
            return ""

        async with running(owner.service, front, bus=bus_url, clock=clock) as bus:
            await bus.ask(Front(), timeout=1.0)
            assert await beside[0] == 1

    virtual(main)


def test_what_a_commander_asks_while_it_decides_gets_less_time_than_is_left_of_the_wish(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, left = Owner(clock), list[float | None]()
        back = Service("backs", owns=backs)
        deciding = Service("deciding", owns=(decided := Domain("decided", key="name")))

        class Decided(Event, domain=decided):
            name: str

        class Decide(Command, domain=decided):
            name: str

        class Stands(Record, domain=decided):
            name: str

        @deciding.decide
        async def decide(stands: Stands | None, command: Decide, ctx: Context) -> Decided:
            left.append(ctx.left)
            await ctx.ask(Count())
            return Decided(command.name)

        @deciding.evolve
        def evolve(stands: Stands | None, event: Decided) -> Stands:
            return Stands(event.name)

        @back.answer
        def answer(query: Back, ctx: Context) -> str:
            left.append(ctx.left)
            return ""

        async with running(owner.service, back, deciding, bus=bus_url, clock=clock) as bus:
            owner.freeze()
            began = clock.monotonic()
            with pytest.raises(NoAnswer, match="did not answer Count within 0.9 s"):
                await bus.call(Decide("a"), timeout=1.0)
            assert clock.monotonic() - began < 1.0
            await bus.ask(Back(), timeout=2.0)
            assert left == [pytest.approx(1.0, abs=0.01), pytest.approx(2.0, abs=0.1)], "a plain one in a thread, too"
            owner.thaw()

    virtual(main)


def test_a_reaction_has_no_deadline_but_what_it_asks_has_the_one_it_says(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    left = list[float | None]()

    async def main() -> None:
        owner, reacting = Owner(clock), Service("reacting")

        @reacting.on
        async def react(event: Made, ctx: Context) -> None:
            left.append(ctx.left)
            assert await ctx.ask(Count(), timeout=5.0)

        async with running(owner.service, reacting, bus=bus_url, clock=clock) as bus:
            await bus.call(Make("a"), timeout=1.0)
            await bus.settled(timeout=60)

    virtual(main)
    assert left == [None]


def test_the_breaker_of_who_is_asked_in_turn_opens_too_though_all_that_wait_are_given_up(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        owner, left, seen = Owner(clock), list[float | None](), list[str]()
        front = chained(owner, left, seen)
        async with (
            running(owner.service, bus=bus_url, clock=clock),
            running(front, bus=bus_url, clock=clock, guards=Guards(breaker=LIMITS)) as bus,
        ):
            owner.freeze()
            assert await outcomes(lambda: bus.ask(Front(), timeout=1.0), 5) == ["NoAnswer"] * 4 + ["BreakerOpen"]
            assert bus.guards["things"].state == "open"
            assert bus.guards["fronts"].state == "closed", "who answers that it has no answer is well"
            owner.thaw()

    virtual(main)


# ----------------------------------------------------------------------------------------------------------- the page


def test_what_the_how_to_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parent.parent / "docs" / "how-to" / "when-a-service-blocks.md"
    names: dict[str, Any] = {"__name__": "how_to"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)  # noqa: S102 - it is ours, and what is tested
    asyncio.run(names["main"]())
    assert capsys.readouterr().out.splitlines() == [
        "not known now",
        "not known now",
        "not known now",
        "users is in trouble and is not asked",
        "Hello Ana, if that is still your name",
        "open 1 0",
        "1 Hello Ana",
    ]
