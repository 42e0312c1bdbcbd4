"""Rules over several things: a tag that at most one bears, or so many, in whatever process that is decided."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cauce import (
    Bus,
    Command,
    Domain,
    Event,
    Gone,
    Record,
    Rejected,
    Service,
    Unavailable,
    connect,
    replace,
    running,
)
from tests.test_instances import close, standing, until_shared

Program = Callable[..., subprocess.Popen[str]]

people = Domain("people", key="name")


class Person(Record, domain=people):
    name: str
    email: str
    show: str = ""


class Joined(Event, domain=people):
    name: str
    email: str


class Moved(Event, domain=people):
    name: str
    email: str


class Seated(Event, domain=people):
    name: str
    show: str


class Left(Event, domain=people):
    name: str


class Join(Command, domain=people):
    name: str
    email: str


class Move(Command, domain=people):
    name: str
    email: str


class Seat(Command, domain=people):
    name: str
    show: str


class Leave(Command, domain=people):
    name: str


def made(*, email: bool = True, seats: Any = 0, fold: bool = True) -> Service:
    """The owner of people, with the rules that are wanted."""
    service = Service("people", owns=people)

    @service.decide
    def join(person: Person | None, command: Join) -> Joined | None:
        return None if person else Joined(command.name, command.email)

    @service.decide
    def move(person: Person | None, command: Move) -> Moved:
        if person is None:
            raise Rejected("nobody")
        return Moved(command.name, command.email)

    @service.decide
    def seat(person: Person | None, command: Seat) -> tuple[Event, ...]:
        seated = Seated(command.name, command.show)
        return (seated,) if person else (Joined(command.name, ""), seated)

    @service.decide
    def leave(person: Person | None, command: Leave) -> Left | None:
        return Left(command.name) if person else None

    @service.evolve
    def joined(person: Person | None, event: Joined) -> Person:
        return Person(event.name, event.email)

    @service.evolve
    def moved(person: Person, event: Moved) -> Person:
        return replace(person, email=event.email)

    @service.evolve
    def seated(person: Person, event: Seated) -> Person:
        return replace(person, show=event.show)

    @service.evolve
    def left(person: Person, event: Left) -> None:
        return None

    if email and fold:

        @service.unique
        def mail(person: Person) -> str | None:
            return person.email.casefold() or None

    elif email:

        @service.unique
        def mail(person: Person) -> str | None:
            return person.email or None

    if seats:

        @service.unique(most=seats)
        def show(person: Person) -> str | None:
            return person.show or None

    return service


async def verdicts(*calls: Any) -> Counter[str]:
    """How often each kind of answer came."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return Counter("accepted" if not isinstance(each, BaseException) else type(each).__name__ for each in answers)


async def audited(bus: Bus) -> list[str]:
    return [each.meta.verdict for each in (await bus.commands.read()).entries]


PROCESS = """
import asyncio, sys
from cauce import running
from tests.test_unique import made

async def main():
    async with running(made(**eval(sys.argv[2])), bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@asynccontextmanager
async def instances(program: Program, url: str, count: int, **rules: Any) -> AsyncIterator[list[subprocess.Popen[str]]]:
    """So many processes of the owner, each with its share of the slots."""
    processes = [program(PROCESS, url, repr(rules)) for _ in range(count)]
    async with standing(url, "people") as holders:
        await until_shared(holders, *sorted(len(range(n, 16, count)) for n in range(count)))
    yield processes
    for process in processes:
        if process.poll() is None:
            await asyncio.to_thread(close, process)


# ------------------------------------------------------------------------------------------------- at most one


async def test_of_two_that_claim_one_e_mail_at_once_one_wins(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        for n in range(5):
            calls = [bus.call(Join(f"{who}{n}", f"{spelt}@{n}.example")) for who, spelt in (("ana", "x"), ("bob", "X"))]
            assert await verdicts(*calls) == {"accepted": 1, "Rejected": 1}
        await bus.settled()
        people = [await bus.record(Person, f"{who}{n}") for who in ("ana", "bob") for n in range(5)]
        assert sum(each is not None for each in people) == 5
        assert all(each.startswith("rejected: mail 'x@") for each in await audited(bus))
        assert len(await audited(bus)) == 5


async def test_who_is_rejected_is_told_rule_tag_and_who_has_it(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        await bus.call(Join("ana", "Ana@x.example"))
        with pytest.raises(Rejected, match=r"^mail 'ana@x.example' is borne by people/ana already$"):
            await bus.call(Join("bob", "ana@X.example"))
        await bus.send(Join("bob", "ana@x.example"))
        await bus.settled()
        assert await bus.record(Person, "bob") is None
        assert (await audited(bus)).count("rejected: mail 'ana@x.example' is borne by people/ana already") == 2


async def test_a_tag_is_free_when_its_thing_changes_or_goes(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        await bus.call(Join("ana", "a@x"))
        await bus.call(Join("bob", "b@x"))
        with pytest.raises(Rejected, match="people/bob"):
            await bus.call(Move("ana", "b@x"))
        # Two change places by way of a third one.
        for name, email in (("ana", "c@x"), ("bob", "a@x"), ("ana", "b@x")):
            await bus.call(Move(name, email))
        await bus.call(Leave("bob"))
        await bus.call(Join("cid", "a@x"))
        await bus.call(Leave("cid"))
        await bus.call(Join("cid", "a@x"))
        await bus.call(Move("cid", "A@x"))
        with pytest.raises(Rejected, match="people/cid"):
            await bus.call(Join("dan", "a@x"))
    async with running(made(), bus=each_bus) as bus:
        with pytest.raises(Rejected, match="people/ana"):
            await bus.call(Join("eve", "b@x"))
        await bus.call(Join("eve", "c@x"))


async def test_what_is_decided_ahead_of_the_disk_keeps_the_rule(each_bus: str) -> None:
    """Changes of one thing and of many, all on the way at once, over a few tags."""
    async with running(made(), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Join(f"p{n}", f"{n}@x")) for n in range(6)))
        calls = [bus.call(Move(f"p{n % 6}", f"{n * 5 % 9}@x")) for n in range(90)]
        kinds = await verdicts(*calls)
        assert set(kinds) == {"accepted", "Rejected"}
        await bus.settled()
        stand = [await bus.fetch(Person, f"p{n}") for n in range(6)]
        assert len({each.email for each in stand}) == 6
        for each in stand:
            with pytest.raises(Rejected, match=f"people/{each.name} "):
                await bus.call(Join("other", each.email))
        free = {f"{n}@x" for n in range(9)} - {each.email for each in stand}
        for n, email in enumerate(sorted(free)):
            await bus.call(Join(f"new{n}", email))


async def test_two_instances_give_one_e_mail_once_and_a_third_when_one_is_killed(
    each_bus: str, program: Program
) -> None:
    async with instances(program, each_bus, 2) as (first, _), connect(each_bus) as bus:
        for n in range(10):
            calls = [bus.call(Join(f"{who}-{n}", f"{n}@x")) for who in "abcd"]
            assert await verdicts(*calls) == {"accepted": 1, "Rejected": 3}
        # What it had in hand is known to nobody.
        calls = [bus.call(Join(f"{who}-{n}", f"{n}@x"), timeout=2.0) for n in range(10, 20) for who in "abcd"]
        answers = asyncio.gather(*calls, return_exceptions=True)
        first.kill()
        await answers
        async with running(made(), bus=each_bus), asyncio.timeout(60.0):
            for n in range(20):
                for who in "abcd":
                    await decided(bus, Join(f"{who}-{n}", f"{n}@x"))
                stand = [await bus.fetch(Person, f"{who}-{n}") for who in "abcd" if await stands(bus, f"{who}-{n}")]
                assert len(stand) == 1


async def decided(bus: Bus, command: Command) -> bool:
    """Whether it was accepted, asked as often as it takes for somebody to answer."""
    while True:
        try:
            await bus.call(command, timeout=5.0)
            return True
        except Rejected:
            return False
        except Unavailable:
            await asyncio.sleep(0.1)


async def stands(bus: Bus, name: str) -> bool:
    try:
        await bus.fetch(Person, name)
    except Gone:
        return False
    return True


# -------------------------------------------------------------------------------------------------- so many


async def test_just_so_many_get_a_seat_whichever_instance_decides(each_bus: str, program: Program) -> None:
    async with instances(program, each_bus, 3, seats=20), connect(each_bus) as bus:
        calls = [bus.call(Seat(f"p{n}", "hamlet")) for n in range(50)]
        assert await verdicts(*calls) == {"accepted": 20, "Rejected": 30}
        with pytest.raises(Rejected, match=r"show 'hamlet' is borne by 20 of people already, and no more may"):
            await bus.call(Seat("late", "hamlet"))
        seated = [n for n in range(50) if await stands(bus, f"p{n}")]
        assert len(seated) == 20
        await bus.call(Seat(f"p{seated[0]}", "macbeth"))
        calls = [bus.call(Seat(name, "hamlet")) for name in ("x", "y")]
        assert await verdicts(*calls) == {"accepted": 1, "Rejected": 1}


async def test_the_record_may_say_how_many(bus_url: str) -> None:
    async with running(made(email=False, seats=lambda person: 2 if person.show == "small" else 4), bus=bus_url) as bus:
        calls = [bus.call(Seat(f"{show}{n}", show)) for show in ("small", "large") for n in range(6)]
        assert await verdicts(*calls) == {"accepted": 6, "Rejected": 6}
