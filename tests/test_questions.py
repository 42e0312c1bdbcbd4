"""Questions that somebody writes by hand: what is left out is filled in, and what comes in is looked at."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cauce import Bus, Command, Context, Domain, Event, Query, Record, Rejected, Service, running
from cauce.bus import Ask
from cauce.clock import SystemClock
from cauce.errors import Refused, Unreadable
from cauce.question import completed, read
from cauce.schema import Schema

pots = Domain("pots", key="name")
maths = Domain("maths")


class Pot(Record, domain=pots):
    name: str
    drops: int


class Filled(Event, domain=pots):
    name: str
    drops: int


class Fill(Command, domain=pots, version=2):
    name: str
    drops: int = 1


class Sum(Query[int], domain=maths):
    numbers: list[int]


potter = Service("potter", owns=pots)
teacher = Service("teacher", owns=maths)


@potter.decide
def fill(pot: Pot | None, command: Fill) -> Filled:
    if command.drops < 1:
        raise Rejected("nothing to fill in")
    return Filled(command.name, command.drops)


@potter.evolve
def filled(pot: Pot | None, event: Filled) -> Pot:
    return Pot(event.name, event.drops + (pot.drops if pot else 0))


@teacher.answer
async def total(query: Sum, ctx: Context) -> int:
    return sum(query.numbers)


@pytest.fixture
async def bus(each_bus: str) -> AsyncIterator[Bus]:
    async with running(potter, teacher, bus=each_bus) as bus:
        yield bus


async def asked(bus: Bus, address: str, question: object) -> dict[str, Any]:
    payload = json.dumps(question, indent=2).encode()
    answer: dict[str, Any] = json.loads(await bus.wire.ask(address, payload, bus.clock.monotonic() + 10))
    return answer


async def test_a_type_and_a_body_are_a_question(bus: Bus) -> None:
    assert await asked(bus, "maths", {"type": "Sum", "body": {"numbers": [1, 2, 3]}}) == {"body": 6}


async def test_a_type_and_a_body_are_a_command_that_is_kept_as_one_of_ours_would_be(bus: Bus) -> None:
    said = await asked(bus, "pots", {"type": "Fill", "by": "hand", "body": {"name": "a", "drops": 2, "colour": "red"}})
    assert (said["version"], said["changed"]) == (1, True)
    receipt = await bus.call(Fill("a", 3), by="hand")
    mine, theirs = (await bus.facts.read(after=said["position"] - 1)).entries
    assert (mine.meta.by, theirs.meta.by, theirs.position) == ("hand", "hand", receipt.position)
    assert mine.wished is not None
    assert theirs.wished is not None
    assert (mine.wished.type, mine.wished.schema) == (theirs.wished.type, theirs.wished.schema) == ("Fill", 2)
    assert bytes(mine.wished.body) == b'{"name":"a","drops":2}'
    assert mine.meta.causation
    assert await asked(bus, "pots", {"type": "Pot", "key": "a"}) == {
        "schema": 1, "version": 2, "position": receipt.position, "changed": True, "body": {"name": "a", "drops": 5},
    }  # fmt: skip
    before = await asked(bus, "pots", {"type": "Pot", "key": "a", "at_version": 1})
    assert before["body"] == {"name": "a", "drops": 2}


async def test_a_command_that_names_its_own_id_may_come_again(bus: Bus) -> None:
    question = {"type": "Fill", "id": "mine-1", "body": {"name": "a"}}
    first, second = await asked(bus, "pots", question), await asked(bus, "pots", question)
    assert first == second
    assert len((await bus.facts.read(after=first["position"] - 1)).entries) == 1
    other = await asked(bus, "pots", question | {"body": {"name": "a", "drops": 9}})
    assert other["error"] == "IdReused"


async def test_a_question_that_cannot_be_is_refused_with_the_cure(bus: Bus) -> None:
    head = await bus.facts.head()
    for question, error, cure in (
        ({}, "Refused", "name one of Fill, Pot as type"),
        ({"type": "Filled", "body": {"name": "a", "drops": 1}}, "Refused", "name one of Fill, Pot as type"),
        ([], "Refused", 'write {"type": "…", "body": {…}}'),
        ({"type": "Pot"}, "Refused", "key"),
        ({"type": "Fill", "body": {"name": ""}}, "Refused", "key"),
        ({"type": "Fill", "body": {"name": "a"}, "by": "a\nb"}, "Refused", "printable"),
        ({"type": "Fill", "body": {"name": "a"}, "id": "x" * 300}, "Refused", "printable"),
        ({"type": "Fill", "body": {"name": "a", "drops": "many"}}, "Unreadable", "does not fit its class"),
        ({"type": "Fill", "schema": 3, "body": {"name": "a"}}, "Unreadable", "deploy the newer code"),
        ({"type": "Fill", "body": {"name": "a", "drops": 0}}, "Rejected", "nothing to fill in"),
        ({"type": "Pot", "key": "a"}, "Gone", "does not stand"),
    ):
        said = await asked(bus, "pots", question)
        assert said["error"] == error, said
        assert cure in said["message"]
    assert await bus.facts.head() == head


def test_what_our_own_askers_send_is_taken_as_it_is_and_what_others_send_is_looked_at() -> None:
    schema, clock = Schema(pots.messages.values()), SystemClock()
    with pytest.raises(Refused, match="no question"):
        read(b'{"type": ' + b"[" * 10_000)
    with pytest.raises(Refused, match="control character"):
        completed(read(rb'{"type": "Fill", "body": {"name": "a\u0000"}}'), pots, schema, clock)
    with pytest.raises(Unreadable):
        completed(read(b'{"type": "Fill", "body": {"name": "a", "drops": 1e400}}'), pots, schema, clock)
    assert completed(read(b'{"type": "Pot", "key": "a"}'), pots, schema, clock).kind == "fetch"
    assert read(b'{"kind":"call","type":"Fill","id":"1","key":"a"}') == Ask("call", "Fill", "1", "a")
