"""The promises of the wire, each on every backend, between processes that are real and are really killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import pytest

from cauce import NoAnswer, Refused
from cauce.wire import Instance, Load, Wire, healthy_first, is_well
from tests.servers import Missing, Nats, absent
from tests.servers.process import free_port
from tests.wired import CLOCK
from tests.wires import NatsPlace, Peer, Place, PostgresPlace, SQLitePlace, Start, ask, starter

# A backend is one more name here, one more branch in `place`, and a class in `tests/wires.py`.
BACKENDS = ("sqlite", "postgres", "nats")


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, bus_name: str) -> Place:
    match request.param:
        case "sqlite":
            return SQLitePlace(tmp_path)
        case "postgres":
            url = request.getfixturevalue("postgres_bus")
            return PostgresPlace(request.getfixturevalue("postgres"), url, bus_name)
        case "nats":
            server, monitor = request.getfixturevalue("open_nats")
            return NatsPlace(server, monitor, request.getfixturevalue("bus_name"))
        case other:
            raise AssertionError(other)


@pytest.fixture(scope="module")
def open_nats() -> Iterator[tuple[Nats, int]]:
    """A NATS server, and the port where it tells what it is subscribed to."""
    port = free_port()
    try:
        server = Nats(config=f"http: '127.0.0.1:{port}'")
    except Missing as missing:
        absent(missing)
    yield server, port
    server.remove()


@pytest.fixture
async def wire(place: Place) -> AsyncIterator[Wire]:
    async with place.opened() as wire:
        yield wire


@pytest.fixture
def peer(program: Callable[..., Popen[str]], place: Place) -> Start:
    return starter(program, place.url)


async def known(place: Place, wanted: int) -> None:
    """Return when the registry holds so many processes: what leaves may take a moment."""
    async with asyncio.timeout(10):
        while await place.known() != wanted:  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.01)


async def test_a_question_is_answered_by_the_process_that_serves_the_address(wire: Wire, peer: Start) -> None:
    there = await peer("users")
    assert await ask(wire, "users", b"pid") == str(there.process.pid).encode()
    assert await ask(wire, "users", b"") == b""
    assert await ask(wire, "users", b"bytes") == bytes(range(256))


@pytest.mark.parametrize("size", [1000, 5000, 5900, 6000, 8000, 750_000])
async def test_a_question_and_an_answer_may_be_long(wire: Wire, peer: Start, size: int) -> None:
    await peer("users")
    assert await ask(wire, "users", b"y" * size) == b"y" * size
    assert await ask(wire, "users", b"large %d" % size) == b"x" * size
    several = [ask(wire, "users", b"%d" % n * size) for n in range(10)]
    assert await asyncio.gather(*several) == [b"%d" % n * size for n in range(10)]


async def test_what_is_longest_goes_over_too_and_what_is_too_long_is_refused_before_it_is_sent(
    wire: Wire, peer: Start, place: Place
) -> None:
    await peer("users")
    assert len(await ask(wire, "users", b"large %d" % place.most)) == place.most
    assert len(await ask(wire, "users", b"y" * place.most)) == place.most
    with pytest.raises(Refused, match="at most"):
        await ask(wire, "users", b"x" * (5 << 20))
    with pytest.raises(ConnectionError, match="at most"):
        await ask(wire, "users", b"huge")
    assert await ask(wire, "users", b"still there") == b"still there"


async def test_what_is_served_here_is_asked_here_though_others_serve_it_too(wire: Wire, peer: Start) -> None:
    await peer("users")

    async def here(payload: bytes) -> bytes:
        return b"here"

    leave = await wire.serve("users", here)
    assert {await ask(wire, "users", b"pid") for _ in range(4)} == {b"here"}
    with pytest.raises(Refused, match="users is served already"):
        await wire.serve("users", here)
    leave()
    assert await ask(wire, "users", b"pid") != b"here"


async def test_those_who_serve_the_same_address_share_the_questions(wire: Wire, peer: Start) -> None:
    several = [await peer("users") for _ in range(3)]
    answers = [await ask(wire, "users", b"pid") for _ in range(120)]
    assert {int(each) for each in answers} == {each.process.pid for each in several}
    # Who gets the next one is by turns on some backends and by chance on others.
    assert all(answers.count(each) >= 12 for each in answers)


async def test_a_thousand_questions_are_in_flight_at_once_and_each_gets_its_own_answer(wire: Wire, peer: Start) -> None:
    there = await peer("users")
    hanging = [asyncio.ensure_future(ask(wire, "users", b"hang", 30)) for _ in range(3)]
    for _ in hanging:
        assert await there.said() == "began"
    asked = [b"question %d" % n for n in range(1000)]
    assert await asyncio.gather(*(ask(wire, "users", each) for each in asked)) == asked
    for each in hanging:
        each.cancel()


async def test_a_handler_that_fails_is_a_lost_answer_that_says_why(wire: Wire, peer: Start) -> None:
    await peer("users")
    with pytest.raises(ConnectionError, match=r"process \d+ failed: ValueError\('cannot'\)"):
        await ask(wire, "users", b"fail")


async def test_where_nobody_serves_it_is_no_answer_at_once(wire: Wire, peer: Start) -> None:
    await peer("others", "others/1")
    began = CLOCK.monotonic()
    with pytest.raises(NoAnswer, match="nobody serves users/3"):
        await ask(wire, "users/3", b"pid")
    assert CLOCK.monotonic() - began < 1


async def test_where_an_instance_answers_in_the_domain_a_slot_that_nobody_holds_is_waited_for(
    wire: Wire, peer: Start
) -> None:
    one = await peer("users/1")
    other = await peer()
    asked = asyncio.ensure_future(ask(wire, "users/3", b"pid"))
    await asyncio.sleep(0.1)
    assert not asked.done()
    await other.does("serve users/3")
    assert int(await asked) == other.process.pid
    began = CLOCK.monotonic()
    with pytest.raises(NoAnswer):
        await ask(wire, "users/4", b"pid", 0.3)
    assert 0.1 < CLOCK.monotonic() - began < 2
    with pytest.raises(NoAnswer):
        await ask(wire, "users/4", b"pid")
    assert 1.9 < CLOCK.monotonic() - began < 10
    assert int(await ask(wire, "users/1", b"pid")) == one.process.pid


async def test_an_instance_that_starts_is_waited_for_but_not_when_it_was_killed(wire: Wire, peer: Start) -> None:
    there = await peer()
    await there.does("announce users")
    asked = asyncio.ensure_future(ask(wire, "users", b"pid"))
    await asyncio.sleep(0.05)
    await there.does("serve users")
    assert int(await asked) == there.process.pid
    starting = await peer()
    await starting.does("announce others")
    await starting.killed()
    began = CLOCK.monotonic()
    with pytest.raises(NoAnswer):
        await ask(wire, "others", b"pid")
    assert CLOCK.monotonic() - began < 1


async def test_a_slot_that_moved_is_asked_where_it_is_now_though_the_connection_to_the_first_stands(
    wire: Wire, peer: Start
) -> None:
    first, second = await peer("users/3", "users/1"), await peer("users/2")
    assert int(await ask(wire, "users/3", b"pid")) == first.process.pid
    for _ in range(3):
        await first.does("leave users/3")
        moved = asyncio.ensure_future(ask(wire, "users/3", b"pid"))
        await second.does("serve users/3")
        assert int(await moved) == second.process.pid
        await second.does("leave users/3")
        moved = asyncio.ensure_future(ask(wire, "users/3", b"pid"))
        await first.does("serve users/3")
        assert int(await moved) == first.process.pid


async def test_a_deadline_travels_and_cancels_what_it_was_for(wire: Wire, peer: Start) -> None:
    there = await peer("users")
    began = CLOCK.monotonic()
    with pytest.raises(TimeoutError):
        await ask(wire, "users", b"hang", 0.5)
    assert 0.25 < CLOCK.monotonic() - began < 5
    assert await there.said() == "began"
    assert await there.said() == "cancelled"


async def test_a_late_answer_is_dropped_and_the_next_question_gets_its_own(wire: Wire, peer: Start) -> None:
    there = await peer("users")
    with pytest.raises(TimeoutError):
        await ask(wire, "users", b"late", 0.5)
    assert [await there.said(), await there.said()] == ["began", "cancelled"]
    for n in range(20):
        assert await ask(wire, "users", b"%d" % n) == b"%d" % n


async def test_who_is_cancelled_forgets_the_question(wire: Wire, peer: Start) -> None:
    there = await peer("users")
    asked = asyncio.ensure_future(ask(wire, "users", b"hang", 60))
    assert await there.said() == "began"
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await ask(wire, "users", b"next") == b"next"


async def test_one_that_stands_still_is_a_timeout_and_when_it_goes_on_begins_nothing_that_is_over(
    wire: Wire, peer: Start
) -> None:
    there = await peer("users", "users/1")
    await there.does("announce users")
    assert await ask(wire, "users", b"first") == b"first"
    late = asyncio.ensure_future(ask(wire, "users", b"late", 0.5))
    assert await there.said() == "began"
    await there.stops()
    with pytest.raises(TimeoutError):
        await late
    with pytest.raises(TimeoutError):
        await ask(wire, "users", b"hang", 0.1)
    (instance,) = await wire.instances()
    assert instance.pid == there.process.pid, "one that stands still is alive"
    there.goes_on()
    assert await ask(wire, "users", b"next") == b"next"
    assert await there.said() == "cancelled"
    assert await there.does("leave users/1") == "done", "what was over when it went on has begun"


async def test_one_that_stands_still_costs_no_memory_for_questions_that_nobody_waits_for_any_more(
    wire: Wire, peer: Start, place: Place
) -> None:
    there = await peer("users")
    await ask(wire, "users", b"first")
    await there.stops()
    payload = b"x" * min(1 << 20, place.most)
    tracemalloc.start()
    try:
        for _ in range(40):
            with pytest.raises(TimeoutError):
                await ask(wire, "users", payload, 0.01)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        there.goes_on()
    assert held < 8 << 20
    assert await ask(wire, "users", b"next") == b"next"


async def test_one_that_is_killed_while_it_is_asked_is_a_lost_connection_and_then_no_answer(
    wire: Wire, peer: Start, place: Place
) -> None:
    there = await peer("users")
    asked = [asyncio.ensure_future(ask(wire, "users", b"hang")) for _ in range(5)]
    for _ in asked:
        assert await there.said() == "began"
    await there.killed()
    for each in asked:
        with pytest.raises(
            ConnectionError, match=f"(process {there.process.pid}|who was asked) went away before it answered"
        ):
            await each
    with pytest.raises(NoAnswer):
        await ask(wire, "users", b"pid")
    assert await place.known() == 0


async def test_the_death_of_one_that_left_a_child_behind_is_noticed_too(wire: Wire, peer: Start) -> None:
    there = await peer("users")
    assert await ask(wire, "users", b"first") == b"first"
    child = int(await there.does("fork"))
    try:
        asked = asyncio.ensure_future(ask(wire, "users", b"hang"))
        assert await there.said() == "began"
        await there.killed()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionError):
                await asked
            with pytest.raises(NoAnswer):
                await ask(wire, "users", b"pid")
    finally:
        os.kill(child, signal.SIGKILL)


async def test_one_that_is_dead_is_passed_over_for_one_that_lives(wire: Wire, peer: Start) -> None:
    dead, alive = await peer("users"), await peer("users")
    await dead.killed()
    for _ in range(4):
        assert int(await ask(wire, "users", b"pid")) == alive.process.pid


async def test_another_loop_in_the_same_process_is_asked_like_another_process(wire: Wire, place: Place) -> None:
    async def elsewhere() -> None:
        loop = asyncio.get_running_loop()

        async def handler(payload: bytes) -> bytes:
            assert asyncio.get_running_loop() is loop
            return payload

        async with place.opened() as other:
            await other.serve("users", handler)
            here.call_soon_threadsafe(served.set)
            await asyncio.to_thread(ended.wait)

    here, served, ended = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    thread = asyncio.ensure_future(asyncio.to_thread(asyncio.run, elsewhere()))
    try:
        async with asyncio.timeout(20):
            await served.wait()
        assert await ask(wire, "users", b"a") == b"a"
    finally:
        ended.set()
        await thread
    async with asyncio.timeout(20):
        # On a server it is heard of when the other end has read it.
        while await place.known():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


async def test_who_ends_in_good_order_leaves_nothing(wire: Wire, peer: Start, place: Place) -> None:
    there = await peer("users")
    assert await place.known() == 1
    asked = asyncio.ensure_future(ask(wire, "users", b"hang"))
    assert await there.said() == "began"
    there.ends()
    with pytest.raises(ConnectionError):
        await asked
    assert [await there.said(), await there.said()] == ["cancelled", "closed"]
    async with asyncio.timeout(5.0):
        while await place.known():  # noqa: ASYNC110 - a server hears a moment later that a connection was closed
            await asyncio.sleep(0.01)
    assert await asyncio.to_thread(there.process.wait) == 0


async def test_the_last_one_in_a_process_closes_the_wire_and_who_asks_then_gets_no_answer(place: Place) -> None:
    async def handler(payload: bytes) -> bytes:
        return payload

    before = len(os.listdir("/proc/self/fd")), asyncio.all_tasks()
    async with place.opened() as one:
        async with place.opened() as two:
            leave = await one.serve("users", handler)
            assert await ask(two, "users", b"a") == b"a"
            with pytest.raises(Refused, match="users is served already"):
                await two.serve("users", handler)
        assert await place.known() == 1
        leave()
        await known(place, 0)  # who serves nothing is not in the registry
        await one.serve("users", handler)
        assert await place.known() == 1
        assert await ask(one, "users", b"b") == b"b"
    assert await place.known() == 0
    with pytest.raises(NoAnswer):
        await ask(one, "others", b"a")
    await asyncio.sleep(0)
    assert (len(os.listdir("/proc/self/fd")), asyncio.all_tasks()) == before


async def test_what_the_registry_lost_is_said_again_with_the_next_beat(wire: Wire, peer: Start, place: Place) -> None:
    there = await peer("users")
    await there.does("announce users")
    assert int(await ask(wire, "users", b"pid")) == there.process.pid
    await place.wipe()
    async with asyncio.timeout(10):
        while [each.pid for each in await wire.instances()] != [there.process.pid]:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
    assert int(await ask(wire, "users", b"pid")) == there.process.pid


async def test_an_instance_is_seen_as_it_was_announced_last_until_it_leaves_or_is_killed(
    wire: Wire, peer: Start, place: Place
) -> None:
    there = await peer()
    await there.does("announce others")
    leave = await wire.announce(Instance("users", "a", ("users",), os.getpid(), "starting", 5))
    await wire.announce(Instance("users", "a", ("users", "users/1"), os.getpid(), "draining", 5))
    async with place.opened() as another:
        here, elsewhere = sorted(await another.instances(), key=lambda each: each.service == "others")
    assert (here.state, here.addresses, here.since) == ("draining", ("users", "users/1"), 5)
    assert (elsewhere.service, elsewhere.pid, elsewhere.state) == ("others", there.process.pid, "starting")
    for each in (here, elsewhere):
        assert abs(each.beat - CLOCK.now()) < 30_000_000
    leave()
    assert [each.service for each in await wire.instances()] == ["others"]
    await there.killed()
    assert await wire.instances() == []


# ------------------------------------------------------------------------------------------------- the service locator


async def three(peer: Start) -> list[Peer]:
    """Three processes that serve users, and say so in the registry."""
    several = [await peer("users") for _ in range(3)]
    for each in several:
        await each.does("runs users")
    return several


async def test_an_instance_tells_its_version_and_with_each_beat_how_much_it_has_to_do(
    wire: Wire, peer: Start, place: Place
) -> None:
    there = await peer("users")
    await there.does("runs users")
    (first,) = await wire.instances()
    assert (first.version, first.stale, first.load) == ("1.4.2", False, Load(0, 7))
    assert int(await ask(wire, "users", b"work")) == there.process.pid
    async with asyncio.timeout(20):
        while (await wire.instances())[0].load != Load(1, 7):  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.05)
    leave = await wire.announce(
        Instance("cards", "c", ("cards",), 1, host="here", answers=("WhoHas",), decides=("Issue",)), lambda: Load(3, 4)
    )
    async with place.opened() as another:
        here = next(each for each in await another.instances() if each.service == "cards")
    assert (here.host, here.answers, here.decides, here.load) == ("here", ("WhoHas",), ("Issue",), Load(3, 4))
    leave()


async def test_who_leaves_in_good_order_is_listed_no_more_and_who_is_killed_neither(
    wire: Wire, peer: Start, place: Place
) -> None:
    first, second, third = await three(peer)
    assert {each.pid for each in await wire.instances()} == {each.process.pid for each in (first, second, third)}
    first.ends()
    assert await first.said() == "closed"
    await asyncio.to_thread(first.process.wait)
    assert {each.pid for each in await wire.instances()} == {second.process.pid, third.process.pid}
    await second.killed()
    async with asyncio.timeout(10):
        while [each.pid for each in await wire.instances()] != [third.process.pid]:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)


async def test_one_that_stands_still_is_listed_with_its_old_beat_behind_those_that_are_well(
    wire: Wire, peer: Start
) -> None:
    still, *well = await three(peer)
    await still.stops()
    async with asyncio.timeout(30):
        while True:
            found = {each.pid: each for each in await wire.instances()}
            if CLOCK.now() - found[still.process.pid].beat > 8_000_000:
                break
            await asyncio.sleep(0.2)
    assert not is_well(found[still.process.pid], CLOCK.now())
    ranked = healthy_first(found.values(), CLOCK.now())
    assert [each.pid for each in ranked][-1] == still.process.pid
    assert {each.pid for each in ranked if is_well(each, CLOCK.now())} == {each.process.pid for each in well}
    still.goes_on()
    async with asyncio.timeout(20):
        while not all(is_well(each, CLOCK.now()) for each in await wire.instances()):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.05)


async def test_of_three_of_which_one_stands_still_all_questions_that_change_nothing_are_answered(
    wire: Wire, peer: Start
) -> None:
    still, *well = await three(peer)
    assert await ask(wire, "users", b"warm", safe=True) == b"warm"
    await still.stops()
    answers = list[bytes]()
    for _ in range(10):
        answers += await asyncio.gather(*(ask(wire, "users", b"pid", 2.0, safe=True) for _ in range(20)))
    still.goes_on()
    assert len(answers) == 200
    assert {int(each) for each in answers} <= {each.process.pid for each in well}


async def test_a_slot_that_another_took_from_one_that_stands_still_is_asked_of_that_other(
    wire: Wire, peer: Start
) -> None:
    still = await peer("users/3")
    await still.does("runs users/3")
    assert int(await ask(wire, "users/3", b"pid")) == still.process.pid
    await still.stops()
    async with asyncio.timeout(30):
        while any(is_well(each, CLOCK.now()) for each in await wire.instances()):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.05)
    other = await peer("users/3")
    await other.does("runs users/3")
    for _ in range(3):
        # It is known within a beat.
        with suppress(TimeoutError):
            await ask(wire, "users/3", b"pid", 1.0)
    for _ in range(20):
        assert int(await ask(wire, "users/3", b"pid", 1.0)) == other.process.pid
    still.goes_on()


async def died(several: list[Peer]) -> list[Peer]:
    """Those that are dead, once there are any: that a connection is gone is seen before the death."""
    async with asyncio.timeout(10):
        while all(each.process.poll() is None for each in several):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
    return [each for each in several if each.process.poll() is not None]


async def test_a_question_that_changes_nothing_is_asked_elsewhere_when_who_was_asked_dies(
    wire: Wire, peer: Start, tmp_path: Path
) -> None:
    several = await three(peer)
    answer = await ask(wire, "users", b"die %s" % os.fsencode(tmp_path / "one"), safe=True)
    (dead,) = await died(several)
    assert int(answer) in {each.process.pid for each in several} - {dead.process.pid}


async def test_a_question_that_may_change_something_is_never_asked_twice(
    wire: Wire, peer: Start, tmp_path: Path
) -> None:
    several = await three(peer)
    # Where the server chooses who is asked, nobody knows whose death to notice as long as others serve the address.
    with pytest.raises((ConnectionError, TimeoutError)):
        await ask(wire, "users", b"die %s" % os.fsencode(tmp_path / "one"), 4.0)
    assert (tmp_path / "one").exists()
    assert len(await died(several)) == 1


async def test_a_question_that_kills_who_answers_it_does_not_kill_them_all(wire: Wire, peer: Start) -> None:
    several = await three(peer)
    with pytest.raises(ConnectionError, match="went away before it answered"):
        await ask(wire, "users", b"die", safe=True)
    async with asyncio.timeout(10):
        while len([each for each in several if each.process.poll() is None]) != 1:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
    (left,) = [each for each in several if each.process.poll() is None]
    assert int(await ask(wire, "users", b"pid", safe=True)) == left.process.pid


async def test_who_is_slower_than_the_others_is_asked_less_than_in_turn(wire: Wire, peer: Start) -> None:
    slow, *others = await three(peer)
    await slow.does("takes 0.5")
    for each in others:
        await each.does("takes 0.02")
    answers = list[int]()

    async def some() -> None:
        while len(answers) < 150:
            answers.append(int(await ask(wire, "users", b"work", safe=True)))

    await asyncio.gather(*(some() for _ in range(12)))
    assert answers.count(slow.process.pid) < len(answers) / 5, "a third would be its turn"
    assert all(each.process.pid in answers for each in others)


async def test_who_drains_is_asked_only_when_nobody_else_is_there(wire: Wire, peer: Start) -> None:
    draining, *others = await three(peer)
    await draining.does("drains users")
    async with asyncio.timeout(20):
        # What is known of it may be a beat old on a backend that reads the registry beside the questions.
        while draining.process.pid in {int(await ask(wire, "users", b"pid", safe=True)) for _ in range(20)}:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.2)
    for each in others:
        await each.killed()
    assert int(await ask(wire, "users", b"pid", safe=True)) == draining.process.pid
