"""Guards between processes: one is stopped or drowned in questions, and those that ask it go on, on every backend."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from cauce import BreakerOpen, Bus, Guards, Limits, NoAnswer, OutcomeUnknown, Overloaded, Receipt, connect
from tests import guarded
from tests.guarded import Chain, Drown, Echo, InHand, Size, Step, Whoami
from tests.wires import Peer

RUN = """
import asyncio, sys
from cauce import running
from tests import guarded

async def main():
    service = getattr(guarded, sys.argv[2])
    async with running(service, bus=sys.argv[1]):
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


async def started(program: Callable[..., subprocess.Popen[str]], url: str, name: str) -> Peer:
    peer = Peer(program(RUN, url, name))
    assert await peer.said() == "ready"
    return peer


async def test_a_process_that_is_stopped_is_left_alone_its_fallback_answers_and_it_is_asked_when_it_goes_on(
    program: Callable[..., subprocess.Popen[str]], each_bus: str
) -> None:
    last = await started(program, each_bus, "last")
    limits = Limits(least=3, rest=0.3, longest=0.3)
    async with connect(each_bus, guards=Guards(breaker=limits)) as bus:
        assert await bus.ask(Whoami()) == last.process.pid
        await last.stops()
        async with asyncio.timeout(60):
            while state_of(bus) != "open":
                assert await bus.ask(Whoami(), timeout=0.2, fallback=lambda: -1) == -1
        with pytest.raises(BreakerOpen):
            await bus.ask(Whoami(), timeout=30.0)
        last.goes_on()
        async with asyncio.timeout(60):
            while await bus.ask(Whoami(), timeout=5.0, fallback=lambda: -1) < 0:  # noqa: ASYNC110 - it goes on outside
                await asyncio.sleep(0.02)
        assert state_of(bus) == "closed"


async def test_a_process_that_stands_still_every_200_ms_keeps_nobody_waiting_and_is_asked_when_it_has_settled(
    program: Callable[..., subprocess.Popen[str]], each_bus: str
) -> None:
    last = await started(program, each_bus, "last")
    limits = Limits(share=0.05, least=4, window=0.4, rest=0.05, longest=0.1)
    outcomes, wrong, flapping = Counter[str](), list[tuple[int, int]](), True
    async with connect(each_bus, guards=Guards(breaker=limits)) as bus:

        async def caller(first: int) -> None:
            n = first
            while flapping:
                n += 10
                try:
                    answered = await bus.ask(Echo(n), timeout=0.1)
                except NoAnswer as error:
                    outcomes[type(error).__name__] += 1
                else:
                    outcomes["well"] += 1
                    if answered != n:
                        wrong.append((n, answered))
                await bus.clock.sleep(0.01)

        callers = [asyncio.ensure_future(caller(n)) for n in range(10)]
        async with asyncio.timeout(60):
            while bus.guards.get("lasts") is None or bus.guards["lasts"].opened < 3 or min_of(outcomes) < 5:
                await last.stops()
                await asyncio.sleep(0.2)
                last.goes_on()
                await asyncio.sleep(0.2)
        flapping = False
        await asyncio.gather(*callers)
        assert wrong == []
        async with asyncio.timeout(60):
            while await bus.ask(Echo(7), timeout=5.0, fallback=lambda: -1) < 0:  # noqa: ASYNC110 - it goes on outside
                await asyncio.sleep(0.02)
        assert await asyncio.gather(*(bus.ask(Echo(n)) for n in range(50))) == list(range(50))
        assert state_of(bus) == "closed"


async def test_a_reply_that_comes_after_the_deadline_answers_neither_the_next_question_nor_the_next_call(
    program: Callable[..., subprocess.Popen[str]], each_bus: str
) -> None:
    await asyncio.gather(started(program, each_bus, "last"), started(program, each_bus, "steps"))
    async with connect(each_bus) as bus:
        assert await bus.ask(Echo(0)) == 0
        for n in range(1, 4):
            with pytest.raises(NoAnswer, match="within 0.05 s"):
                await bus.ask(Echo(-n, 0.3), timeout=0.05)
            assert await asyncio.gather(*(bus.ask(Echo(10 * n + each)) for each in range(10))) == [
                10 * n + each for each in range(10)
            ]
        await bus.call(Step("a"))
        with pytest.raises(OutcomeUnknown) as unknown:
            await bus.call(Step("a", 0.3), timeout=0.05)
        later = await asyncio.gather(*(bus.call(Step("a")) for _ in range(5)), bus.call(Step("b")))
        late = await bus.call(Step("a", 0.3), id=unknown.value.id)
        receipts = [*later, late]
        assert [each.key for each in receipts] == [*"aaaaa", "b", "a"]
        assert sorted(versions(receipts, "a")) == [2, 3, 4, 5, 6, 7]
        assert len({each.id for each in receipts}) == 7


async def test_a_caller_that_blocks_its_own_loop_hears_what_was_answered_meanwhile_and_opens_no_breaker(
    program: Callable[..., subprocess.Popen[str]], each_bus: str
) -> None:
    last = await started(program, each_bus, "last")
    async with connect(each_bus, guards=Guards(breaker=Limits(least=3))) as bus:
        assert await bus.ask(Whoami()) == last.process.pid
        for _ in range(3):
            asked = [asyncio.ensure_future(bus.ask(Whoami(), timeout=0.5)) for _ in range(20)]
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(time.sleep, 1.0)
            found = await asyncio.gather(*asked, return_exceptions=True)
            told = {str(each) for each in found if each != last.process.pid}
            assert all("in which this process stood still itself" in each for each in told), told
        assert (state_of(bus), bus.guards["lasts"].under_way) == ("closed", 0)


async def test_a_chain_whose_end_is_stopped_keeps_the_time_of_who_asked_first_and_cancels_what_is_between(
    program: Callable[..., subprocess.Popen[str]], each_bus: str
) -> None:
    last, middle = await asyncio.gather(started(program, each_bus, "last"), started(program, each_bus, "middle"))
    async with connect(each_bus) as bus:
        assert await bus.ask(Chain()) == str(last.process.pid)
        assert (await middle.said()).startswith("answered with")
        await last.stops()
        began = bus.clock.monotonic()
        with pytest.raises(NoAnswer, match="middles did not answer Chain within 1 s"):
            await bus.ask(Chain(), timeout=1.0)
        assert bus.clock.monotonic() - began < 10, "not the 30 s that the middle one gives"
        assert "lasts did not answer Whoami within 0." in await middle.said()
        assert await middle.said() == "cancelled"
        last.goes_on()
        # What the last one was asked before is over: it answers what it is asked now.
        assert await bus.ask(Chain()) == str(last.process.pid)


async def test_tens_of_thousands_of_questions_to_a_blocked_function_are_shed_and_take_no_memory(
    program: Callable[..., subprocess.Popen[str]], each_bus: str
) -> None:
    many = 20_000
    await started(program, each_bus, "last")
    async with connect(each_bus) as bus:
        blocked = [asyncio.ensure_future(bus.ask(Drown(), timeout=600)) for _ in range(guarded.AT_ONCE)]
        async with asyncio.timeout(60):
            while await bus.ask(InHand()) < guarded.AT_ONCE:  # noqa: ASYNC110 - another process takes them
                await asyncio.sleep(0.01)
        await drown(bus, many // 4)
        before = await bus.ask(Size())
        await drown(bus, many)
        grown = await bus.ask(Size()) - before
        assert grown < 4_000_000, "a question that is turned away leaves nothing behind"
        assert state_of(bus) == "closed"
        assert not any(each.done() for each in blocked)
        for each in blocked:
            each.cancel()
        await asyncio.wait(blocked)


def min_of(outcomes: Counter[str]) -> int:
    return min(outcomes[each] for each in ("well", "NoAnswer", "BreakerOpen"))


def versions(receipts: Sequence[Receipt], key: str) -> list[int]:
    return [each.version for each in receipts if each.key == key]


def state_of(bus: Bus) -> str:
    return bus.guards["lasts"].state


async def drown(bus: Bus, many: int) -> None:
    """Ask so many times, 250 at once: each is turned away."""
    left = many

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            with pytest.raises(Overloaded):
                await bus.ask(Drown(), timeout=60)

    await asyncio.gather(*(caller() for _ in range(250)))
