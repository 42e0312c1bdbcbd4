"""The tools for tests: deciders without a bus, a bus on a temporary file, and a clock to drive."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from cauce import Bus, Command, Context, Domain, Event, Record, Refused, Rejected, Service
from cauce.testing import VirtualClock, VirtualLoop, given
from shop.users import ChangeEmail, EmailChanged, RegisterUser, User, UserRegistered, service

Run = Callable[[Callable[[], Any]], Any]

boxes = Domain("boxes", key="name")
lids = Domain("lids", key="name")


class Box(Record, domain=boxes):
    name: str
    size: int = 0


class Packed(Event, domain=boxes):
    name: str
    size: int = 1


class Burnt(Event, domain=boxes):
    name: str


class Unfolded(Event, domain=boxes):
    name: str


class Pack(Command, domain=boxes):
    name: str
    how: str = "one"


class Look(Command, domain=boxes):
    name: str


class Unknown(Command, domain=boxes):
    name: str


class Lid(Event, domain=lids):
    name: str


class CloseLid(Command, domain=lids):
    name: str


packing = Service("packing", owns=boxes)


@packing.decide
async def pack(box: Box | None, command: Pack) -> Any:
    results: dict[str, Any] = {
        "one": Packed(command.name),
        "two": [Packed(command.name), Packed(command.name, 2)],
        "none": None,
        "empty": [],
        "burn": Burnt(command.name),
        "unfolded": Unfolded(command.name),
        "foreign": Lid(command.name),
        "another": Packed("another"),
        "not a number": Packed(command.name, float("nan")),  # type: ignore[arg-type]
        "a word": Packed(command.name, "large"),  # type: ignore[arg-type]
        "text": "done",
    }
    if command.how == "sleep":
        await asyncio.sleep(0)
    if command.how == "no":
        raise Rejected("no room")
    return results[command.how]


@packing.decide
def look(box: Box | None, command: Look, ctx: Context) -> None: ...


@packing.evolve
def packed(box: Box | None, event: Packed) -> Box:
    return Box(event.name, (box.size if box else 0) + event.size)


@packing.evolve
def burnt(box: Box, event: Burnt) -> None:
    return None


# -------------------------------------------------------------------------------------------------- given, when, then


def test_given_facts_when_a_wish_then_facts() -> None:
    registered = UserRegistered("42", "Ana", "ana@example.org")
    given(service).when(RegisterUser("42", "Ana", "ana@example.org")).then(registered)
    given(service, registered).when(RegisterUser("42", "Ana", "x@example.org")).rejected("already registered")
    given(service).when(ChangeEmail("42", "x@example.org")).rejected("no such user")
    given(service, registered).when(ChangeEmail("42", "ana@example.org")).then()
    outcome = (
        given(service, registered).when(ChangeEmail("42", "x@example.org")).then(EmailChanged("42", "x@example.org"))
    )
    assert outcome.state == User("42", "Ana", "x@example.org")


def test_what_does_not_come_out_as_expected_is_told_with_both() -> None:
    with pytest.raises(AssertionError, match="recorded .*Packed.*expected .*Burnt"):
        given(packing).when(Pack("a")).then(Burnt("a"))
    with pytest.raises(AssertionError, match="rejected: no room"):
        given(packing).when(Pack("a", "no")).then(Packed("a"))
    with pytest.raises(AssertionError, match="accepted with .*Packed.*expected the rejection 'no room'"):
        given(packing).when(Pack("a")).rejected("no room")
    with pytest.raises(AssertionError, match="rejected with 'no room', expected 'full'"):
        given(packing).when(Pack("a", "no")).rejected("full")


async def test_several_facts_none_or_the_end_of_a_thing_are_folded_as_on_a_bus_also_inside_a_running_loop() -> None:
    assert given(packing).when(Pack("a", "two")).then(Packed("a"), Packed("a", 2)).state == Box("a", 3)
    assert given(packing, Packed("a")).when(Pack("a", "empty")).then().state == Box("a", 1)
    assert given(packing, Packed("a")).when(Pack("a", "none")).then().state == Box("a", 1)
    assert given(packing, Packed("a")).when(Pack("a", "burn")).then(Burnt("a")).state is None
    assert given(packing, Packed("a")).when(Pack("a", "unfolded")).then(Unfolded("a")).state == Box("a", 1)
    assert given(packing, Packed("a"), Burnt("a"), Packed("a", 5)).when(Pack("a", "none")).then().state == Box("a", 5)


def test_what_a_bus_would_refuse_is_refused_here_too() -> None:
    for how, words in {
        "foreign": "lids",
        "another": "another",
        "not a number": "Packed",
        "a word": "Packed",
        "text": "pack returned 'done'",
        "sleep": "pack waits for something",
    }.items():
        with pytest.raises(Refused, match=words):
            given(packing).when(Pack("a", how))
    with pytest.raises(Refused, match="key"):
        given(packing).when(Pack(""))
    with pytest.raises(Refused, match="no decide function for Unknown"):
        given(packing).when(Unknown("a"))
    with pytest.raises(Refused, match="does not own 'lids'"):
        given(packing).when(CloseLid("a"))
    with pytest.raises(Refused, match="does not own 'lids'"):
        given(packing, Lid("a"))
    with pytest.raises(Refused, match="several things"):
        given(packing, Packed("a"), Packed("b"))
    with pytest.raises(Refused, match="one thing"):
        given(packing, Packed("a")).when(Pack("b"))
    with pytest.raises(Refused, match="look reads its service's copies: test it on a bus"):
        given(packing).when(Look("a"))


def test_a_service_that_cannot_be_right_is_refused_before_anything_is_given() -> None:
    broken = Service("broken", owns=boxes)

    @broken.decide
    def half(box, command: Pack) -> None:  # type: ignore[no-untyped-def]
        ...

    with pytest.raises(Refused, match="broken.half: parameter box has no annotation"):
        given(broken)


# ------------------------------------------------------------------------------------------------------ fixtures


async def test_the_fixture_runs_services_on_a_temporary_file(
    running_bus: Callable[..., AbstractAsyncContextManager[Bus]], bus_url: str, tmp_path: Path
) -> None:
    async with running_bus(service) as bus:
        await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
    assert bus_url == f"sqlite:///{tmp_path}/bus.db"
    assert (tmp_path / "bus.db").exists()
    async with running_bus(service) as bus:
        assert await bus.fetch(User, "42") == User("42", "Ana", "ana@example.org")


def test_the_fixtures_are_there_for_whoever_installed_the_library(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        """
from shop.users import RegisterUser, service

async def test_theirs(running_bus):
    async with running_bus(service) as bus:
        assert (await bus.call(RegisterUser("42", "Ana", "ana@example.org"))).version == 1
"""
    )
    root = Path(__file__).parent.parent
    plugins = ["-p", "cauce.testing.fixtures", "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-o", "asyncio_mode=auto", *plugins, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join((str(root), str(root / "examples"))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


# ----------------------------------------------------------------------------------------------------- virtual time


def test_time_jumps_to_the_next_timer_whenever_nothing_else_is_to_be_done(virtual: Run, clock: VirtualClock) -> None:
    order = list[str]()

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        order.append(name)

    async def main() -> float:
        await asyncio.gather(sleeper("day", 86_400), sleeper("second", 1), sleeper("hour", 3_600), sleeper("now", 0))
        return asyncio.get_running_loop().time()

    began, wall = time.monotonic(), clock.now()
    assert virtual(main) == pytest.approx(86_400)
    assert clock.monotonic() == pytest.approx(86_400)
    assert clock.now() - wall == pytest.approx(86_400_000_000)
    assert order == ["now", "second", "hour", "day"]
    assert time.monotonic() - began < 2


def test_a_deadline_passes_in_virtual_time(virtual: Run, clock: VirtualClock) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1_000):
                await asyncio.Event().wait()

    began = time.monotonic()
    virtual(main)
    assert clock.monotonic() == pytest.approx(1_000)
    assert time.monotonic() - began < 2


def test_what_other_threads_have_in_hand_comes_before_time_does(
    virtual: Run, clock: VirtualClock, bus_url: str, running_bus: Callable[..., AbstractAsyncContextManager[Bus]]
) -> None:
    async def main() -> None:
        async with running_bus(service, clock=clock) as bus:
            for n in range(50):
                await bus.call(RegisterUser(str(n), "Ana", "ana@example.org"), timeout=0.001)
            for _ in range(50):
                await asyncio.to_thread(sum, range(100))
            assert clock.monotonic() < 5

    virtual(main)


def test_the_wall_clock_can_be_set_and_monotonic_time_does_not_notice(clock: VirtualClock) -> None:
    wall = clock.now()
    clock.shift(-3_600)
    assert (clock.now() - wall, clock.monotonic()) == (-3_600_000_000, 0.0)
    ids = [clock.id()]
    clock.shift(-10)
    ids.append(clock.id())
    assert ids == sorted(ids), "ids rise, whatever is done to the clock"
    assert {UUID(id).version for id in ids} == {7}


def test_chance_repeats_itself(clock: VirtualClock) -> None:
    one, other, unlike = VirtualClock(seed=1), VirtualClock(seed=1), VirtualClock(seed=2)
    assert [one.random() for _ in range(5)] == [other.random() for _ in range(5)]
    assert one.id() == other.id() != unlike.id()


def test_the_loop_runs_without_a_fixture() -> None:
    clock = VirtualClock()

    async def main() -> float:
        await asyncio.sleep(60)
        return clock.monotonic()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        assert runner.run(main()) == pytest.approx(60)
