"""Reactions: each message to each consumer that wants it, in order per thing, at least once, until it is handled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest

from cauce import (
    Bus,
    Command,
    Context,
    Damaged,
    Domain,
    Event,
    NoAnswer,
    Notice,
    Query,
    Record,
    Rejected,
    Retry,
    Service,
    connect,
    outbox,
    running,
)
from cauce.accept import slot_of
from cauce.backends.sqlite.file import folder_of
from cauce.bus import correlation
from cauce.codec import Entry, Meta, seal
from cauce.log import Log
from cauce.store import SAID
from cauce.testing import VirtualClock
from tests import kept
from tests.kept import forget_places, hurry, move_places

Run = Callable[[Callable[[], Any]], None]

things = Domain("things", key="name")
letters = Domain("letters", key="name")


class Thing(Record, domain=things):
    name: str
    n: int


class Grown(Event, domain=things):
    name: str
    n: int


class Shrunk(Event, domain=things):
    name: str
    n: int


class Grow(Command, domain=things):
    name: str
    n: int = 1


class Shrink(Command, domain=things):
    name: str


class HowMany(Query[int], domain=things):
    pass


class Letter(Record, domain=letters):
    name: str
    pages: int


class Written(Event, domain=letters):
    name: str
    pages: int


class Posted(Event, domain=letters):
    name: str


class Write(Command, domain=letters):
    name: str
    pages: int


owner = Service("things", owns=things)


@owner.decide
def grow(thing: Thing | None, command: Grow) -> Grown | None:
    return Grown(command.name, (thing.n if thing else 0) + command.n) if command.n else None


@owner.decide
def shrink(thing: Thing | None, command: Shrink) -> Shrunk:
    if thing is None:
        raise Rejected("there is none")
    return Shrunk(command.name, thing.n - 1)


@owner.evolve
def changed(thing: Thing | None, event: Grown | Shrunk) -> Thing:
    return Thing(event.name, event.n)


def writers(**reactions: Callable[..., Any]) -> Service:
    """A service that owns letters, with some reactions."""
    service = Service("letters", owns=letters)

    @service.decide
    def write(letter: Letter | None, command: Write) -> Written:
        return Written(command.name, (letter.pages if letter else 0) + command.pages)

    @service.evolve
    def written(letter: Letter | None, event: Written) -> Letter:
        return Letter(event.name, event.pages)

    for name, function in reactions.items():
        function.__name__ = name
        service.on(function)
    return service


async def entries(log: Log, domain: str) -> list[Entry]:
    found, looked, head = list[Entry](), 0, await log.head()
    while looked < head:
        page = await log.read(after=looked)
        found += (each for each in page.entries if each.domain == domain)
        looked = page.looked
    return found


def store_of(url: str, service: str) -> apsw.Connection:
    return apsw.Connection(str(folder_of(Path(url.removeprefix("sqlite:///"))) / service / "store.db"))


async def waiting(url: str, consumer: str) -> list[tuple[str, int, str]]:
    """The thing, the attempts and the error of each message of the letters that waits."""
    return [(each.stream, each.attempts, each.error) for each in await kept.waiting(url, "letters", consumer)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again after a tenth of the time, where time is real."""
    hurry(monkeypatch)


def damage(url: str, statement: str) -> None:
    connection = apsw.Connection(url.removeprefix("sqlite:///"))
    connection.execute(statement)
    connection.close()


async def until(condition: Callable[[], bool], bus: Bus) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await bus.clock.sleep(0.01)


# ---------------------------------------------------------------------------------- what a reaction is told


async def test_the_type_of_the_parameter_tells_whether_a_reaction_gets_the_event_or_only_its_notice(
    each_bus: str,
) -> None:
    seen = list[tuple[str, Any]]()

    async def event(event: Grown) -> None:
        seen.append(("event", event))

    async def notice(notice: Notice[Grown]) -> None:
        seen.append(("notice", notice))

    async def either(event: Grown | Shrunk, ctx: Context) -> None:
        seen.append(("either", (event, ctx.version)))

    async def notices(notice: Notice[Grown] | Notice[Shrunk]) -> None:
        seen.append(("notices", notice.type))

    def plain(event: Shrunk) -> None:
        seen.append(("plain", event))

    reacting = writers(event=event, notice=notice, either=either, notices=notices, plain=plain)
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Grow("a", 5))
        await bus.call(Shrink("a"))
        await bus.call(Write("not-wanted", 1))
        await bus.settled()

    def of(kind: str) -> list[Any]:
        return [what for name, what in seen if name == kind]

    assert of("event") == [Grown("a", 5)]
    assert of("notice") == [Notice("Grown", "a", 1)]
    assert of("either") == [(Grown("a", 5), 1), (Shrunk("a", 4), 2)]
    assert of("notices") == ["Grown", "Shrunk"]
    assert of("plain") == [Shrunk("a", 4)]


async def test_a_plain_reaction_may_block_without_holding_up_the_others(each_bus: str) -> None:
    import threading

    gate, seen = threading.Event(), list[str]()

    def blocks(event: Grown) -> None:
        gate.wait(20)

    async def goes_on(event: Grown) -> None:
        seen.append(event.name)

    async with running(owner, writers(blocks=blocks, goes_on=goes_on), bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await until(lambda: seen == ["a"], bus)
        gate.set()
        await bus.settled()


async def test_plain_reactions_that_hang_hold_up_neither_other_services_nor_the_threads_of_the_program(
    bus_url: str,
) -> None:
    import threading

    gate, hanging, seen = threading.Event(), list[str](), list[str]()
    threads = os.cpu_count() or 1
    stuck, well = Service("stuck"), Service("well")

    def make(number: int) -> Callable[[Grown], None]:
        def hang(event: Grown) -> None:
            hanging.append(event.name)
            gate.wait()

        hang.__name__ = f"hang{number}"
        return hang

    for number in range(threads + 8):
        stuck.on(make(number))

    @well.on
    def see(event: Grown) -> None:
        seen.append(event.name)

    try:
        async with running(owner, stuck, well, bus=bus_url, drain=0.1) as bus:
            await bus.call(Grow("a"))
            await until(lambda: len(hanging) == min(32, threads + 8), bus)
            await until(lambda: seen == ["a"], bus)
            async with asyncio.timeout(10):
                assert await asyncio.to_thread(lambda: 1) == 1
    finally:
        gate.set()


async def test_a_plain_reaction_runs_in_the_context_of_its_message_and_threads_are_used_again(bus_url: str) -> None:
    import threading

    seen = list[tuple[str, str]]()

    def see(event: Grown, ctx: Context) -> None:
        assert correlation.get() == ctx.correlation
        seen.append((threading.current_thread().name, str(threading.get_ident())))

    async with running(owner, writers(see=see), bus=bus_url) as bus:
        for n in range(5):
            await bus.call(Grow("a"))
            await until(lambda n=n: len(seen) > n, bus)  # type: ignore[misc]
            await bus.settled()
        assert len(set(seen)) == 1


async def test_a_reaction_told_only_the_key_fetches_what_is_at_least_as_new(each_bus: str) -> None:
    seen = list[int]()

    async def look(notice: Notice[Grown], ctx: Context) -> None:
        thing = await ctx.fetch(Thing, notice.key)
        assert notice.version <= thing.n
        seen.append(thing.n)

    async with running(owner, writers(look=look), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Grow("a")) for _ in range(50)))
        await bus.settled()
        assert seen == sorted(seen)
        assert seen[-1] == 50


async def test_services_may_be_named_in_any_order_since_all_answer_before_any_reacts(each_bus: str) -> None:
    tries = list[str]()

    async def look(notice: Notice[Grown], ctx: Context) -> None:
        tries.append(notice.key)
        await ctx.fetch(Thing, notice.key)

    async with running(owner, bus=each_bus) as bus:
        await bus.call(Grow("a"))
    async with running(writers(look=look), owner, bus=each_bus) as bus:
        await bus.settled()
        assert tries == ["a"]


@pytest.mark.usefixtures("impatient")
async def test_the_idempotency_key_is_one_for_each_handler_and_message_however_often_it_is_handled(
    each_bus: str,
) -> None:
    keys = dict[str, set[str]]()

    async def fails_first(event: Grown, ctx: Context) -> None:
        seen = keys.setdefault(f"fails_first {event.n}", set())
        seen.add(ctx.idempotency_key)
        seen.add(ctx.idempotency_key)
        tries.append(event.n)
        if tries.count(event.n) < 3:
            raise ValueError

    async def other(event: Grown, ctx: Context) -> None:
        keys.setdefault(f"other {event.n}", set()).add(ctx.idempotency_key)

    tries = list[int]()
    reacting = writers(fails_first=fails_first, other=other)

    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await bus.call(Grow("a"))
        await bus.settled()
    await forget_places(each_bus, "letters", "fails_first", "other")
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
    assert len(tries) == 8
    assert len(keys) == 4
    assert [len(each) for each in keys.values()] == [1] * 4
    assert len(set.union(*keys.values())) == 4


# ----------------------------------------------------------------------------------------- failing and waiting


def test_a_failing_message_is_tried_again_with_growing_jittered_delay_until_it_is_handled(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    at = list[float]()

    async def fails(event: Grown) -> None:
        at.append(clock.monotonic())
        if len(at) < 9:
            raise ValueError("not yet")

    async def main() -> None:
        async with running(owner, writers(fails=fails), bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("a"))
            await bus.settled(timeout=1000)
        delays = [after - before for before, after in pairwise(at)]
        assert len(delays) == 8
        plain = [0.1 * 2**n for n in range(8)]
        for delay, expected in zip(delays, plain, strict=True):
            assert 0.5 * expected <= delay <= expected + 0.1
        assert len({round(delay / expected, 2) for delay, expected in zip(delays, plain, strict=True)}) > 3, "no jitter"
        assert await waiting(bus_url, "fails") == []

    virtual(main)


@pytest.mark.usefixtures("impatient")
async def test_a_failing_message_is_tried_again_later_each_time_until_it_is_handled(each_bus: str) -> None:
    at = list[float]()

    async def fails(event: Grown, ctx: Context) -> None:
        at.append(ctx.bus.clock.monotonic())
        if len(at) < 5:
            raise ValueError("not yet")

    async with running(owner, writers(fails=fails), bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
    assert len(at) == 5
    # Whoever is busy may be late, nobody too early.
    assert all(after - before >= 0.5 * 0.01 * 2**n for n, (before, after) in enumerate(pairwise(at)))
    assert await waiting(each_bus, "fails") == []


@pytest.mark.usefixtures("impatient")
async def test_later_messages_of_a_failing_thing_wait_behind_it_in_order_while_all_other_things_go_on(
    each_bus: str,
) -> None:
    failing = "failing"
    same_slot = next(name for name in map(str, range(1000)) if slot_of(name) == slot_of(failing))
    handled = list[tuple[str, int]]()
    mended = asyncio.Event()

    async def handle(event: Grown) -> None:
        if event.name == failing and event.n == 1 and not mended.is_set():
            raise ValueError("broken")
        handled.append((event.name, event.n))

    async with running(owner, writers(handle=handle), bus=each_bus) as bus:
        for _ in range(5):
            for name in (failing, same_slot, "elsewhere"):
                await bus.call(Grow(name))
        await until(lambda: len(handled) == 10, bus)
        assert [n for name, n in handled if name == same_slot] == [1, 2, 3, 4, 5]
        assert [n for name, n in handled if name == "elsewhere"] == [1, 2, 3, 4, 5]
        with pytest.raises(TimeoutError):
            await bus.settled(timeout=0.5)
        mended.set()
        await bus.settled(timeout=200)
        assert [n for name, n in handled if name == failing] == [1, 2, 3, 4, 5]


async def test_a_failing_reaction_holds_up_no_other_reaction_to_the_same_message(each_bus: str) -> None:
    seen = list[int]()

    async def fails(event: Grown) -> None:
        raise ValueError("for ever")

    async def works(event: Grown) -> None:
        seen.append(event.n)

    async with running(owner, writers(fails=fails, works=works), bus=each_bus) as bus:
        for _ in range(3):
            await bus.call(Grow("a"))
        await until(lambda: len(seen) == 3, bus)


@pytest.mark.usefixtures("impatient")
async def test_what_is_nobodys_fault_but_the_moments_never_counts_as_an_attempt(each_bus: str) -> None:
    tries = list[str]()

    async def asks(event: Grown, ctx: Context) -> None:
        tries.append("asks")
        await ctx.ask(HowMany())

    async with running(owner, writers(asks=asks), bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await until(lambda: len(tries) >= 6, bus)
    ((stream, attempts, error),) = await waiting(each_bus, "asks")
    assert (stream, attempts) == ("things/a", 0)
    assert "NoAnswer" in error


@pytest.mark.usefixtures("impatient")
async def test_the_count_of_attempts_survives_a_restart_and_so_does_the_order(each_bus: str) -> None:
    tries, mended = list[int](), asyncio.Event()

    async def handle(event: Grown) -> None:
        tries.append(event.n)
        if not mended.is_set():
            raise ValueError(f"broken {event.n}")

    reacting = writers(handle=handle)
    async with running(owner, reacting, bus=each_bus) as bus:
        for _ in range(4):
            await bus.call(Grow("a"))
        await until(lambda: len(tries) >= 3, bus)
    first = len(tries)
    before = await waiting(each_bus, "handle")
    assert [each[:2] for each in before] == [("things/a", n) for n in (first, 0, 0, 0)]
    assert "ValueError: broken 1" in before[0][2]
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await until(lambda: len(tries) >= first + 2, bus)
    after = await waiting(each_bus, "handle")
    last = len(tries)
    assert [attempts for _, attempts, _ in after] == [last, 0, 0, 0, 0]
    assert set(tries) == {1}
    mended.set()
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled(timeout=200)
    assert tries[last:] == [1, 2, 3, 4, 5]
    assert await waiting(each_bus, "handle") == []


def test_a_message_that_failed_for_weeks_is_still_tried_if_that_was_asked_for(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    tries, mended = list[int](), asyncio.Event()

    async def handle(event: Grown) -> None:
        tries.append(event.n)
        if not mended.is_set():
            raise ValueError("broken")

    async def main() -> None:
        reacting = Service("letters")
        reacting.on(retry=Retry(attempts=0))(handle)
        async with running(owner, reacting, bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("a"))
            await until(lambda: len(tries) == 1, bus)
        store_of(bus_url, "letters").execute("update cauce_waiting set attempts = 100000")
        tries.clear()
        async with running(owner, reacting, bus=bus_url, clock=clock) as bus:
            async with asyncio.timeout(300):
                while len(tries) < 2:
                    await clock.sleep(5)
            mended.set()
            await bus.settled(timeout=300)

    virtual(main)


def test_a_wall_clock_that_was_set_back_keeps_no_message_waiting_for_long(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    tries = list[int]()

    async def handle(event: Grown) -> None:
        tries.append(event.n)
        if len(tries) == 1:
            raise ValueError("broken")

    async def main() -> None:
        reacting = writers(handle=handle)
        async with running(owner, reacting, bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("a"))
            await until(lambda: len(tries) == 1, bus)
        clock.shift(-1_000_000)
        async with running(owner, reacting, bus=bus_url, clock=clock) as bus:
            await bus.settled(timeout=150)

    virtual(main)


def test_something_cancelled_inside_a_reaction_is_a_failure_like_any_other(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    tries = list[int]()

    async def handle(event: Grown) -> None:
        tries.append(event.n)
        if len(tries) < 3:
            task = asyncio.ensure_future(asyncio.sleep(100))
            task.cancel()
            await task

    async def main() -> None:
        async with running(owner, writers(handle=handle), bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("a"))
            await bus.settled(timeout=10)
            assert tries == [1, 1, 1]

    virtual(main)


# ------------------------------------------------------------------------------------------------ place and restart


async def test_what_was_handled_before_a_restart_in_good_order_is_not_handled_again(each_bus: str) -> None:
    handled = list[int]()

    async def handle(event: Grown) -> None:
        handled.append(event.n)

    reacting = writers(handle=handle)
    for round in range(1, 5):
        async with running(owner, reacting, bus=each_bus) as bus:
            await bus.call(Grow("a"))
            await until(lambda least=round: len(handled) >= least, bus)  # type: ignore[misc]
    assert handled == list(range(1, 5))


async def test_what_was_not_handled_before_a_stop_is_handled_after_the_next_start(each_bus: str) -> None:
    handled = list[tuple[str, int]]()

    async def handle(event: Grown) -> None:
        handled.append((event.name, event.n))

    reacting = writers(handle=handle)
    for _ in range(3):
        async with running(owner, reacting, bus=each_bus) as bus:
            await asyncio.gather(*(bus.call(Grow(name)) for name in "abcdefgh" for _ in range(5)))
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
    for name in "abcdefgh":
        assert [n for each, n in handled if each == name] == list(range(1, 16))


_KILLED = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from cauce import Context, Service, running
from shop.users import ChangeEmail, RegisterUser, UserRegistered, EmailChanged, service

mails = Service("mails")
out = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@mails.on
async def told(event: UserRegistered | EmailChanged, ctx: Context) -> None:
    os.write(out, f"{event.user_id} {ctx.version} {ctx.idempotency_key}\\n".encode())

async def main():
    async with running(service, mails, bus=sys.argv[1]) as bus:
        round = sys.argv[4]
        for n in range(10_000):
            user = str(n % 7)
            if await bus.record_or_none(user) if False else (n < 7 and round == "0"):
                receipt = await bus.call(RegisterUser(user, "Ana", "ana@example.org"))
            else:
                receipt = await bus.call(ChangeEmail(user, f"{round}-{n}@example.org"))
            print(user, receipt.version, flush=True)

asyncio.run(main())
"""


def test_after_a_kill_messages_are_handled_again_with_the_same_key_and_none_is_skipped(
    backend: str, each_bus: str, tmp_path: Path, program: Callable[..., Any]
) -> None:
    out, acknowledged = tmp_path / "out", dict[str, int]()
    for round in range(4 if backend == "sqlite" else 2):
        process = program(_KILLED, each_bus, "examples", str(out), str(round))
        for _ in range(40 + 13 * round):
            user, version = process.stdout.readline().split()
            acknowledged[user] = int(version)
        process.send_signal(signal.SIGKILL)
        process.wait()

    seen = dict[str, list[tuple[int, str]]]()

    async def main() -> None:
        from shop.users import EmailChanged, UserRegistered, service

        mails = Service("mails")

        async def told(event: UserRegistered | EmailChanged, ctx: Context) -> None:
            with out.open("a") as file:
                file.write(f"{event.user_id} {ctx.version} {ctx.idempotency_key}\n")

        mails.on(told)
        async with running(service, mails, bus=each_bus) as bus:
            await bus.settled()

    asyncio.run(main())
    for line in out.read_text().splitlines():
        user, version, key = line.split()
        seen.setdefault(user, []).append((int(version), key))
    assert set(seen) == set(acknowledged)
    for user, handled in seen.items():
        assert {version for version, _ in handled} >= set(range(1, acknowledged[user] + 1)), "one was skipped"
        assert len(set(handled)) == len({version for version, _ in handled}), "a key changed"
        furthest = 0
        for version, _ in handled:
            assert version <= furthest + 1, "out of order"
            furthest = max(furthest, version)


async def test_a_reaction_that_begins_now_never_sees_what_was_before_nor_misses_what_came_while_it_was_away(
    each_bus: str,
) -> None:
    handled = list[tuple[str, int]]()
    reacting = writers()

    @reacting.on(start="now")
    async def handle(event: Grown) -> None:
        handled.append((event.name, event.n))

    names = "abcdefghijklmnop"
    async with running(owner, bus=each_bus) as bus:
        for name in names:
            await bus.call(Grow(name))
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
        assert handled == []
        await bus.call(Grow("a"))
        await bus.settled()
        assert handled == [("a", 2)]
    async with running(owner, bus=each_bus) as bus:
        for name in names:
            await bus.call(Grow(name))
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
        assert sorted(handled[1:]) == sorted([("a", 3), *((name, 2) for name in names[1:])])


async def test_a_reaction_that_learns_of_another_domain_now_misses_nothing_of_it_from_then_on(each_bus: str) -> None:
    handled = list[str]()

    def reacting(hint: Any) -> Service:
        service = Service("reading")

        async def handle(event: Any) -> None:
            handled.append(type(event).__name__)

        handle.__annotations__["event"] = hint
        service.on(start="now")(handle)
        return service

    async with running(owner, writers(), reacting(Grown), bus=each_bus) as bus:
        await bus.call(Write("a", 1))
        await bus.call(Grow("a"))
        await bus.settled()
    async with running(owner, writers(), reacting(Grown | Written), bus=each_bus) as bus:
        await bus.settled()
    async with running(owner, writers(), bus=each_bus) as bus:
        await bus.call(Write("b", 1))
    async with running(owner, writers(), reacting(Grown | Written), bus=each_bus) as bus:
        await bus.settled()
    assert handled == ["Grown", "Written"]


async def test_a_restart_runs_evolve_only(each_bus: str) -> None:
    ran = list[str]()
    counted = Service("things", owns=things)

    def count(name: str) -> None:
        ran.append(name)

    @counted.decide
    def decide_grow(thing: Thing | None, command: Grow) -> Grown | None:
        count("decide")
        return None if not command.n else Grown(command.name, (thing.n if thing else 0) + command.n)

    @counted.evolve
    def evolve_grown(thing: Thing | None, event: Grown) -> Thing:
        count("evolve")
        return Thing(event.name, event.n)

    @counted.answer
    async def answer(query: HowMany) -> int:
        count("answer")
        return 1

    @counted.evolve
    def evolve_shrunk(thing: Thing | None, event: Shrunk) -> Thing:
        return Thing(event.name, event.n)

    @counted.on
    async def on_event(event: Grown) -> Grow:
        count("on event")
        return Grow(event.name, 0)

    @counted.on
    async def on_notice(notice: Notice[Grown]) -> None:
        count("on notice")

    @counted.decide
    def decide_shrink(thing: Thing | None, command: Shrink) -> Shrunk:
        raise Rejected("never")

    async with running(counted, bus=each_bus) as bus:
        await bus.call(Grow("a", 5))
        await bus.send(Shrink("a"))
        await bus.ask(HowMany())
        await bus.clock.sleep(0.02)
        for _ in range(3):
            await bus.settled()
    assert {"decide", "evolve", "on event", "on notice", "answer"} == set(ran)
    async with connect(each_bus) as client:
        await client.facts.append("things/b", [seal(Shrunk("b", 7), "id-b", Meta(client.clock.now()))])
    ran.clear()
    async with running(counted, bus=each_bus) as bus:
        await bus.settled()
        assert await bus.record(Thing, "b") == Thing("b", 7)
        await bus.state(Thing, "a", at=1)
    assert set(ran) == {"evolve"}


# --------------------------------------------------------------------------------------------- what it says


async def test_what_a_reaction_returns_is_sent_once_though_it_is_handled_twice(each_bus: str) -> None:
    times = list[int]()

    async def orders(event: Grown) -> list[Command]:
        times.append(event.n)
        return [Write("one", 1), Write("one", 1), Write("two", 5), Grow("b", 0)]

    reacting = writers(orders=orders)
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
    await forget_places(each_bus, "letters", "orders")
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
        await bus.settled()
        assert times == [1, 1]
        assert await bus.fetch(Letter, "one") == Letter("one", 2)
        assert await bus.fetch(Letter, "two") == Letter("two", 5)
        assert len([each for each in await entries(bus.commands, "letters") if not each.meta.verdict]) == 3


async def test_what_a_reaction_calls_or_sends_itself_is_done_once_though_it_is_handled_twice(each_bus: str) -> None:
    receipts = list[Any]()

    async def orders(event: Grown, ctx: Context) -> None:
        receipts.append(await ctx.call(Write("one", 1)))
        await ctx.send(Write("one", 1))

    reacting = writers(orders=orders)
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
    await forget_places(each_bus, "letters", "orders")
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
        await bus.settled()
        assert receipts[0] == receipts[1]
        assert await bus.fetch(Letter, "one") == Letter("one", 2)


async def test_an_event_of_the_own_domain_that_a_reaction_returns_is_recorded_once_with_its_cause(
    each_bus: str,
) -> None:
    times = list[int]()

    async def copies(event: Grown) -> list[Event]:
        times.append(event.n)
        return [Written("copy", event.n), Posted("copy")]

    reacting = writers(copies=copies)
    async with running(owner, reacting, bus=each_bus) as bus:
        receipt = await bus.call(Grow("a", 3))
        await bus.settled()
        await bus.settled()
        assert await bus.record(Letter, "copy") == Letter("copy", 3)
    await forget_places(each_bus, "letters", "copies")
    async with running(owner, reacting, bus=each_bus) as bus:
        await bus.settled()
        assert times == [3, 3]
        first, second = await entries(bus.facts, "letters")
        (cause,) = await entries(bus.facts, "things")
        assert (first.type, second.type) == ("Written", "Posted")
        assert first.meta.causation == second.meta.causation == cause.id
        assert first.correlation == cause.correlation == receipt.id
        assert first.wish is None


async def test_facts_of_reactions_and_of_calls_on_one_thing_are_decided_on_what_stands(each_bus: str) -> None:
    async def copies(event: Grown) -> Posted:
        return Posted("shared")

    reacting = writers(copies=copies)
    async with running(owner, reacting, bus=each_bus) as bus:
        for _ in range(10):
            await asyncio.gather(
                *(bus.call(Grow(f"a{n}")) for n in range(5)), *(bus.call(Write("shared", 1)) for _ in range(5))
            )
        await bus.settled()
        facts = await entries(bus.facts, "letters")
        assert [fact.version for fact in facts] == list(range(1, 101))
        assert [b'"pages":%d}' % n for n in range(1, 51)] == [
            (fact.body or b"")[-len(b'"pages":%d}' % n) :]
            for n, fact in enumerate((fact for fact in facts if fact.type == "Written"), 1)
        ]
        assert await bus.record(Letter, "shared") == await bus.fetch(Letter, "shared") == Letter("shared", 50)


def recorders(tries: list[str], broken: list[str]) -> Service:
    """A service that records letters, and fails on those that are broken."""
    service = Service("letters", owns=letters)

    @service.evolve
    def written(letter: Letter | None, event: Written) -> Letter:
        tries.append(event.name)
        if event.name in broken:
            raise KeyError(event.name)
        return Letter(event.name, event.pages)

    @service.on
    async def copies(event: Grown) -> Written:
        return Written(event.name, event.n)

    return service


def test_an_event_that_evolve_fails_on_becomes_a_dead_letter_and_holds_up_no_other_thing_nor_the_end(
    virtual: Run,
    clock: VirtualClock,
    bus_url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries, broken = list[str](), ["bad"]
    monkeypatch.setattr(outbox, "_RETRY", Retry(first=0.25, longest=2.0))

    async def main() -> None:
        async with running(owner, recorders(tries, broken), bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("bad"))
            await bus.call(Grow("bad"))
            for n in range(8):
                at = clock.monotonic()
                await bus.call(Grow(f"good{n}"))
                await until(lambda n=n: f"good{n}" in tries, bus)  # type: ignore[misc]
                assert clock.monotonic() - at < 1, "it waited for the bad one"
                await clock.sleep(3)
            await bus.settled()
            assert tries.count("bad") == 12, "within 20 s"
            assert not bus.failed.done()
            at = clock.monotonic()
        assert clock.monotonic() - at < 2
        assert [record.levelname for record in caplog.records].count("CRITICAL") == 0
        async with running(owner, recorders(tries, broken), bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("bad"))
            await bus.settled()
            assert tries.count("bad") == 12, "a person decides"
            async with kept.stores_of(bus_url) as stores:
                (letter,) = await stores.letters("letters")
                assert (letter.consumer, letter.stream, letter.attempts, letter.behind) == (SAID, "letters/bad", 12, 2)
                assert letter.error == "KeyError: 'bad'"
                assert "in written" in letter.trace
                broken.clear()
                await stores.retry("letters", SAID, letter.position)
            await until(lambda: tries.count("bad") == 15, bus)
            await bus.settled()
            assert await bus.record(Letter, "bad") == Letter("bad", 3)
            bodies = [fact.body or b"" for fact in await entries(bus.facts, "letters") if fact.key == "bad"]
            assert [b'"pages":%d' % n in body for n, body in enumerate(bodies, 1)] == [True] * 3
            assert await kept.waiting(bus_url, "letters", SAID) == []

    virtual(main)


async def test_an_event_that_takes_long_to_be_recorded_holds_up_no_other_thing_and_keeps_its_order(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cauce.outbox import Outbox

    gate, relay, came, tries = asyncio.Event(), Outbox._relay_one, list[str](), list[str]()

    async def slow(self: Outbox, said: Any) -> None:
        came.append(said.stream)
        if said.stream == "letters/slow":
            await gate.wait()
        await relay(self, said)

    monkeypatch.setattr(Outbox, "_relay_one", slow)
    async with running(owner, recorders(tries, []), bus=each_bus) as bus:
        await bus.call(Grow("slow"))
        await until(lambda: came == ["letters/slow"], bus)
        await bus.call(Grow("slow"))
        for n in range(3):
            await bus.call(Grow(f"good{n}"))
            await until(lambda n=n: f"good{n}" in tries, bus)  # type: ignore[misc]
        assert came.count("letters/slow") == 1
        gate.set()
        await bus.settled()
        assert came.count("letters/slow") == 2
        pages = [fact.body for fact in await entries(bus.facts, "letters") if fact.key == "slow"]
        assert [b'"pages":%d' % n in (body or b"") for n, body in enumerate(pages, 1)] == [True, True]


@pytest.mark.usefixtures("impatient")
async def test_a_foreign_event_that_a_reaction_returns_is_not_recorded_nor_what_it_returned_beside_it(
    each_bus: str,
) -> None:
    tries = list[str]()

    async def forges(event: Grown) -> list[Any]:
        tries.append(event.name)
        return [Write("one", 1), Posted("one"), Shrunk("a", 0)]

    async with running(owner, writers(forges=forges), bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await until(lambda: len(tries) >= 2, bus)
        assert len(await entries(bus.facts, "things")) == 1
        assert await entries(bus.facts, "letters") == []
        assert await entries(bus.commands, "letters") == []
    ((_, attempts, error),) = await waiting(each_bus, "forges")
    assert attempts == len(tries)
    assert "NotOwner" in error
    assert "letters.forges" in error
    assert "things" in error


@pytest.mark.parametrize("what", [7, "text", [7], Thing("a", 1), {"a": 1}, True])
def test_what_a_reaction_may_not_return_is_told_with_its_name(
    virtual: Run, clock: VirtualClock, bus_url: str, what: Any
) -> None:
    tries = list[str]()

    async def errs(event: Grown) -> Any:
        tries.append(event.name)
        return what

    async def main() -> None:
        async with running(owner, writers(errs=errs), bus=bus_url, clock=clock) as bus:
            await bus.call(Grow("a"))
            await until(lambda: len(tries) == 1, bus)
        ((_, _, error),) = await waiting(bus_url, "errs")
        assert "Refused: letters.errs returned" in error

    virtual(main)


async def test_what_a_reaction_says_carries_on_the_beginning_the_cause_and_the_trace(each_bus: str) -> None:
    from cauce.bus import Cause

    async def orders(event: Grown, ctx: Context) -> Write:
        assert ctx.correlation == "began"
        await ctx.call(Write("called", 1))
        return Write("sent", 1)

    cause = Cause("x", "began", "", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "vendor=1")
    async with running(owner, writers(orders=orders), bus=each_bus) as bus:
        await bus.call(Grow("a"), cause=cause)
        await bus.settled()
        await bus.settled()
        (grown,) = await entries(bus.facts, "things")
        (wish,) = await entries(bus.commands, "letters")
        facts = await entries(bus.facts, "letters")
        assert wish.meta.causation == grown.id
        assert [fact.key for fact in facts] == ["called", "sent"]
        for entry in (grown, wish, *facts):
            assert (entry.correlation, entry.meta.trace, entry.meta.tracestate) == ("began", cause.trace, "vendor=1")
        assert facts[1].meta.causation == wish.id


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("bytes_or_text", [f"x'{b'{}'.hex()}'", "'{}'", "7"])
async def test_a_damaged_entry_stops_its_reader_loudly_and_no_handler_sees_it(bus_url: str, bytes_or_text: str) -> None:
    handled = list[int]()

    async def handle(event: Grown) -> None:
        handled.append(event.n)

    async with running(owner, bus=bus_url) as bus:
        for _ in range(3):
            await bus.call(Grow("a"))
    damage(bus_url, f"update facts set body = {bytes_or_text} where version = 2")
    with pytest.raises(Damaged, match="things/a version 2"):
        async with running(writers(handle=handle), bus=bus_url) as bus:
            with pytest.raises(Damaged, match="things/a version 2"):
                await bus.settled()
            assert bus.failed.done()
            with pytest.raises(Damaged):
                bus.failed.result()
    assert handled == [1]


def test_a_damaged_entry_that_waited_behind_another_stops_its_reader_just_as_loudly(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    handled, mended = list[int](), asyncio.Event()

    async def handle(event: Grown) -> None:
        if not mended.is_set():
            raise ValueError("broken")
        handled.append(event.n)

    async def main() -> None:
        async with running(owner, writers(handle=handle), bus=bus_url, clock=clock) as bus:
            for _ in range(3):
                await bus.call(Grow("a"))
            await clock.sleep(0.3)
        damage(bus_url, """update facts set body = x'7b7d' where version = 2""")
        mended.set()
        with pytest.raises(Damaged, match="things/a version 2"):
            async with running(writers(handle=handle), bus=bus_url, clock=clock) as bus:
                await asyncio.wait({bus.failed}, timeout=100)
        assert handled == [1]

    virtual(main)


async def test_a_place_beyond_the_end_of_its_log_stops_the_start(each_bus: str) -> None:
    async def handle(event: Grown) -> None: ...

    async with running(owner, writers(handle=handle), bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
    await move_places(each_bus, "letters", "handle", to=1000)
    with pytest.raises(Damaged, match="handle.*1000"):
        async with running(owner, writers(handle=handle), bus=each_bus):
            pass


async def test_a_place_in_another_log_stops_the_start(each_bus: str) -> None:
    async def handle(event: Grown) -> None: ...

    async with running(owner, writers(handle=handle), bus=each_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
    await move_places(each_bus, "letters", "handle", to=1, log="another")
    with pytest.raises(Damaged, match="another"):
        async with running(owner, writers(handle=handle), bus=each_bus):
            pass


async def test_a_waiting_message_that_is_in_the_log_no_more_stops_its_reader_loudly(bus_url: str) -> None:
    async def handle(event: Grown) -> None:
        raise NoAnswer("not now")

    async with running(owner, writers(handle=handle), bus=bus_url) as bus:
        await bus.call(Grow("a"))
        await bus.clock.sleep(0.05)
    store_of(bus_url, "letters").execute("update cauce_waiting set position = position - 1, due = 0")
    with pytest.raises(Damaged, match="things/a"):
        async with running(owner, writers(handle=handle), bus=bus_url) as bus:
            await asyncio.wait({bus.failed}, timeout=10)


async def test_a_fact_of_a_newer_schema_or_an_unknown_shape_waits_and_is_named(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    handled = list[int]()

    async def handle(event: Grown) -> None:
        handled.append(event.n)

    async with connect(each_bus) as client:
        await client.facts.append("things/a", [seal(Grown("a", 1), "id-1", Meta(1, schema=2))])
        await client.facts.append("things/b", [seal(Grown("b", 2), "id-2", Meta(1))])
    async with running(writers(handle=handle), bus=each_bus) as bus:
        await until(lambda: handled == [2], bus)
        await until(lambda: "schema version 2" in caplog.text, bus)
    ((stream, attempts, error),) = await waiting(each_bus, "handle")
    assert (stream, attempts >= 1) == ("things/a", True)
    assert "Unreadable" in error
