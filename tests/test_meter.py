"""What a process counts of its work, and that nothing is counted where nobody asked for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from cauce import Domain, NoAnswer, Query, Service, running
from cauce.backends import look
from cauce.clock import SystemClock
from cauce.errors import Unreachable
from cauce.meter import Meter, address_of
from tests.test_lag import Note, Read, bills, owner, say

talk = Domain("talk")
nowhere = Domain("nowhere")


class Word(Query[str], domain=talk):
    text: str


class Lost(Query[str], domain=nowhere):
    pass


def talker() -> Service:
    service = Service("talker", owns=talk)

    @service.answer
    async def answer(query: Word) -> str:
        if query.text == "slow":
            await asyncio.sleep(600)
        if query.text == "bad":
            raise ValueError
        return query.text

    return service


async def test_what_a_handler_did_is_counted_by_how_it_ended(each_bus: str) -> None:
    meter, seen = Meter(), list[str]()

    async def work(event: Read) -> None:
        seen.append(event.name)
        if event.name == "waits" and seen.count("waits") == 1:
            raise NoAnswer("not there")
        if event.name == "bad" or (event.name == "twice" and seen.count("twice") == 1):
            raise ValueError

    async with running(bills(work, attempts=2), bus=each_bus, meter=meter) as bus:
        await say(each_bus, *(Read(name, 1) for name in ("good", "waits", "twice", "bad")))
        await bus.settled()
    counts = meter.handled["bills", "bill"]
    assert (counts.handled, counts.failed, counts.waited) == (3, 3, 1)
    assert (counts.retried, counts.parked, counts.in_flight) == (3, 1, 0)
    assert sum(counts.times.parts) == len(seen) == 7


async def test_what_is_asked_and_answered_is_counted_by_how_it_ended(each_bus: str) -> None:
    meter = Meter()
    async with running(talker(), owner(), bus=each_bus, meter=meter) as bus:
        assert await bus.ask(Word("hi")) == "hi"
        with pytest.raises(Exception, match="ValueError"):
            await bus.ask(Word("bad"))
        with pytest.raises(NoAnswer):
            await bus.ask(Word("slow"), timeout=0.2)
        with pytest.raises(NoAnswer):
            await bus.ask(Lost(), timeout=3)
        await bus.call(Note("m", 1))
    asked = meter.asked["talk"]
    assert (asked.answered, asked.timeout, asked.nobody, asked.in_flight) == (2, 1, 0, 0)
    assert meter.asked["nowhere"].nobody == 1
    answered = meter.answered["talker", "talk", "ask", "Word"]
    assert (answered.answered, answered.failed, answered.in_flight) == (1, 1, 0)
    assert sum(answered.times.parts) == 3, "what was given up took its time, too"
    assert meter.answered["meters", "meters", "call", "Note"].answered == 1


async def test_what_is_asked_while_the_server_between_is_away_is_counted_as_lost() -> None:
    class Away:
        serve = None

        async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
            raise Unreachable("the server is away")

    meter, away = Meter(), cast(Any, Away())
    with pytest.raises(Unreachable):
        await meter.wire(away).ask("talk", b"{}", 1.0)
    assert (meter.asked["talk"].lost, meter.asked["talk"].in_flight) == (1, 0)


async def test_an_instance_tells_what_it_counted_as_long_as_it_runs(each_bus: str) -> None:
    clock = SystemClock()
    async with running(bills(), bus=each_bus, meter=Meter()), look(each_bus, clock) as bus:
        (instance,) = await bus.instances()
        told = json.loads(await bus.ask(address_of(instance.id), b"{}", clock.monotonic() + 30))
        assert {work["handler"] for work in told["work"]} == {"bill", "close"}
    async with running(talker(), bus=each_bus), look(each_bus, clock) as bus:
        with pytest.raises(NoAnswer):
            await bus.ask(address_of(instance.id), b"{}", clock.monotonic() + 30)


async def test_an_instance_tells_how_the_breakers_of_its_process_stand(bus_url: str) -> None:
    clock, meter = SystemClock(), Meter()
    async with running(talker(), bus=bus_url, meter=meter) as bus, look(bus_url, clock) as seen:
        await bus.ask(Word("hi"))
        bus.guards["talk"].open()
        (instance,) = await seen.instances()
        told = json.loads(await seen.ask(address_of(instance.id), b"{}", clock.monotonic() + 30))
        assert told["breakers"] == {"talk": "open"}
        assert meter.guards["talk"].state == "open"


async def test_without_a_meter_nothing_stands_around_anything(bus_url: str) -> None:
    async with running(bills(), bus=bus_url) as bus:
        assert bus.meter is None
        assert type(bus.wire).__module__.startswith("cauce.backends")
        assert {each for each in await addresses(bus_url) if each.startswith("_")} == set()


async def addresses(url: str) -> set[str]:
    async with look(url, SystemClock()) as bus:
        return {address for each in await bus.instances() for address in each.addresses}
