"""`concurrency=`: several things at once in one instance, each in its order, and every effect once."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cauce import Bus, Context, Refused, Retry, Service, running
from cauce.accept import slot_of
from cauce.testing import VirtualClock
from tests.counters import SEEN, Add, Added, owner
from tests.kept import store_of, waiting
from tests.test_instances import letters_of, schema_of, seen, until

Run = Callable[[Callable[[], Any]], Any]
Program = Callable[..., subprocess.Popen[str]]
TESTS = Path(__file__).parent


def in_slot(slot: int, many: int) -> list[str]:
    """Names of things that fall into one slot."""
    return [name for n in range(20_000) if slot_of(name := f"thing{n}") == slot][:many]


async def add_all(bus: Bus, names: list[str], times: int = 1) -> None:
    for _ in range(times):
        await asyncio.gather(*(bus.call(Add(name)) for name in names))


@pytest.mark.parametrize("wrong", [-1, 10_001, True, 1.5, "many"])
def test_a_concurrency_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(Refused, match="say how many messages at once"):
        Service("s").on(concurrency=wrong)


@pytest.mark.parametrize(
    ("concurrency", "things", "seconds"), [(0, 1000, 3.0), (1, 100, 5.0), (50, 1000, 1.0), (1000, 1000, 0.05)]
)
def test_a_handler_that_waits_is_as_much_faster_as_it_handles_things_at_once(
    concurrency: int, things: int, seconds: float, virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    names, service = [f"thing{n}" for n in range(things)], Service("waiting")
    handled, at_once, most = Counter[str](), 0, 0

    @service.on(concurrency=concurrency)
    async def handle(event: Added) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await clock.sleep(0.05)
        at_once -= 1
        handled[event.name] += 1

    async def main() -> None:
        async with running(owner, bus=bus_url, clock=clock) as bus:
            await add_all(bus, names)
        async with running(service, bus=bus_url, clock=clock) as bus:
            began = clock.monotonic()
            while handled.total() < len(names):
                await clock.sleep(0.01)
            took = clock.monotonic() - began
            await bus.settled()
        assert handled == dict.fromkeys(names, 1)
        assert most == (concurrency or 16)
        assert seconds * 0.9 < took < seconds * 1.5 + 0.1, took

    virtual(main)


@pytest.mark.parametrize("concurrency", [1, 3, 40])
async def test_each_thing_keeps_its_order_and_each_effect_is_stored_once(concurrency: int, each_bus: str) -> None:
    names, service = [*in_slot(3, 12), *in_slot(4, 4)], Service("writer", schema=SEEN)
    at_once, tried = Counter[str](), Counter[tuple[str, int]]()

    @service.on(concurrency=concurrency, retry=Retry(first=0.01))
    async def handle(event: Added, ctx: Context) -> None:
        at_once[event.name] += 1
        assert at_once[event.name] == 1, "never two of one thing"
        assert at_once.total() <= concurrency
        await asyncio.sleep(0.001 * (sum(map(ord, event.name)) % 5))
        at_once[event.name] -= 1
        ctx.store.execute("insert into seen values (?, ?, '')", (event.name, event.n))
        tried[event.name, event.n] += 1
        if event.n == 2 and tried[event.name, event.n] < 3:
            raise ValueError("not yet")

    async with running(owner, service, bus=each_bus) as bus:
        await add_all(bus, names, 5)
        await bus.settled()
    by_name = defaultdict[str, list[int]](list)
    for name, n, _ in await seen(each_bus, "writer"):
        by_name[name].append(n)
    assert by_name == {name: [1, 2, 3, 4, 5] for name in names}
    async with store_of(each_bus, "writer", [schema_of(each_bus)]) as store:
        assert await store.waiting("handle") == []


ABREAST = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from counters import Added, Context, SEEN, Service, running
service = Service("abreast", schema=SEEN)
hangs = sys.argv[2]

@service.on(concurrency=int(sys.argv[3]))
async def handle(event: Added, ctx: Context) -> None:
    if event.name == hangs:
        await asyncio.Event().wait()
    ctx.store.execute("insert into seen values (?, ?, ?)", (event.name, event.n, sys.argv[4]))

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        if not hangs:
            await bus.settled()
            print("settled", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@pytest.mark.parametrize("concurrency", [0, 8])
@pytest.mark.parametrize("end", ["killed", "drained"])
# On NATS a service with tables has the same store as on SQLite.
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
async def test_what_was_handled_ahead_of_the_place_is_not_stored_twice_when_another_takes_over(
    concurrency: int, end: str, each_bus: str, program: Program
) -> None:
    names = in_slot(5, 30)
    async with running(owner, bus=each_bus) as bus:
        for name in names:
            await bus.call(Add(name))
    script = ABREAST.format(tests=str(TESTS))
    first = program(script, each_bus, names[0], "8", "first")
    async with asyncio.timeout(30):
        while len(await seen(each_bus, "abreast")) < 29:  # noqa: ASYNC110 - another process stores it
            await asyncio.sleep(0.02)
    async with store_of(each_bus, "abreast", [schema_of(each_bus)]) as store:
        found = await store.waiting("handle")
        assert [each.stream for each in found] == [f"counters/{name}" for name in names[1:]], "a mark of each"
        assert len({each.mark for each in found}) == 29
    assert await letters_of(each_bus) == []
    if end == "killed":
        first.kill()
        first.wait()
    second = program(script, each_bus, "", str(concurrency), "second")
    if end == "drained":
        assert first.stdin is not None
        first.stdin.close()
        first.stdin = None
        await asyncio.to_thread(first.wait, 60)
    assert second.stdout is not None
    # It may be settled before it is given the slots.
    assert await asyncio.to_thread(second.stdout.readline) == "settled\n"
    async with asyncio.timeout(30):
        while len(await seen(each_bus, "abreast")) < 30:  # noqa: ASYNC110 - another process stores it
            await asyncio.sleep(0.02)
    assert sorted(await seen(each_bus, "abreast")) == sorted(
        [(names[0], 1, "second"), *((name, 1, "first") for name in names[1:])]
    )
    async with store_of(each_bus, "abreast", [schema_of(each_bus)]) as store:
        async with asyncio.timeout(30):
            while await store.waiting("handle"):  # noqa: ASYNC110 - another process removes it
                await asyncio.sleep(0.02)


async def test_what_fails_ahead_of_the_place_waits_with_the_later_ones_of_its_thing_and_no_other_does(
    each_bus: str,
) -> None:
    names, service, goes_on = in_slot(6, 6), Service("failing"), asyncio.Event()
    handled = list[tuple[str, int]]()

    @service.on(concurrency=10, retry=Retry(attempts=2, first=0.01))
    async def handle(event: Added) -> None:
        if event.name == names[0]:
            await goes_on.wait()
        if event.name == names[1]:
            raise ValueError
        handled.append((event.name, event.n))

    async with running(owner, service, bus=each_bus) as bus:
        await bus.call(Add(names[0]))
        await add_all(bus, names, 2)
        await add_all(bus, names[1:])
        await until(lambda: len(handled) == 3 * 4)
        assert await letters_of(each_bus) == []
        goes_on.set()
        await bus.settled()
        assert len(handled) == 3 * 5
        (letter,) = await letters_of(each_bus)
        assert (letter.stream, letter.behind) == (f"counters/{names[1]}", 2)
    assert len(await waiting(each_bus, "failing", "handle")) == 3
