"""What is logged says because of what, in text and in JSON, to any handler that asks for it."""

from __future__ import annotations

import enum
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cauce import Domain, Query, Service, running
from cauce.cli.logs import formatter
from cauce.ext.logs import Because
from tests.test_lag import Read, bills, say

talk = Domain("talk")


class Say(Query[str], domain=talk):
    word: str


class Keeping(logging.Handler):
    """A handler of a team's own."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.addFilter(Because())

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def kept() -> Iterator[Keeping]:
    handler, logger = Keeping(), logging.getLogger("team")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


async def test_a_record_knows_service_handler_message_and_where_it_stands(each_bus: str, kept: Keeping) -> None:
    async def work(event: Read) -> None:
        logging.getLogger("team").info("billing %s", event.name)

    async with running(bills(work), bus=each_bus) as bus:
        await say(each_bus, Read("m1", 1))
        await bus.settled()
    (record,) = kept.records
    found: Any = record
    assert (found.service, found.handler, found.stream) == ("bills", "bill", "meters/m1")
    assert found.position > 0
    assert found.message_id == found.correlation != ""


async def test_an_answer_and_a_plain_function_in_a_thread_are_known_too(bus_url: str, kept: Keeping) -> None:
    service = Service("talker", owns=talk)

    @service.answer
    def answer(query: Say) -> str:
        logging.getLogger("team").info("asked")
        return query.word

    async with running(service, bus=bus_url) as bus:
        assert await bus.ask(Say("hi")) == "hi"
        logging.getLogger("team").info("outside")
    inside, outside = kept.records
    told: Any = inside
    assert (told.service, told.handler, told.stream, told.position) == ("talker", "answer", "", 0)
    assert told.correlation
    told = outside
    assert (told.service, told.handler, told.correlation) == ("", "", "")


def test_what_a_caller_gave_by_extra_stays(kept: Keeping) -> None:
    logging.getLogger("team").info("mine", extra={"service": "theirs"})
    found: Any = kept.records[0]
    assert (found.service, found.handler) == ("theirs", "")


def record_of(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("team", logging.ERROR, "x.py", 1, message, arguments, None)
    vars(record).update(extra)
    Because().filter(record)
    return record


def test_json_is_one_object_a_line_whatever_others_wrote() -> None:
    line = formatter("json").format(record_of("bad %s", "\x1b[2J\n{}\u202e\u0085\udcff", order=7, odd=object()))
    assert line.isprintable()
    told = json.loads(line)
    assert (told["level"], told["logger"]) == ("ERROR", "team")
    assert told["message"].startswith("bad \x1b[2J\n{}")
    assert told["extra"]["order"] == 7
    assert told["extra"]["odd"].startswith("<object")
    assert told["time"].endswith("+00:00")
    assert not {"service", "handler", "exception"} & told.keys(), "what is not known is left out"


def test_what_cannot_be_told_is_still_an_object_and_ends_no_handler() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise ValueError("no")

    class Kind(enum.StrEnum):
        ONE = "1"

    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    odd = {"mute": Mute(), "deep": deep, "nan": float("nan"), "large": 2**80, "kind": Kind.ONE, "service": Mute()}
    told = json.loads(formatter("json").format(record_of("hello", **odd)), parse_constant=pytest.fail)
    assert told["extra"]["mute"] == told["service"] == "<Mute without a repr: ValueError>"
    assert told["extra"]["deep"] == "<list without a repr: RecursionError>"
    assert (told["extra"]["large"], told["extra"]["nan"]) == (str(2**80), None)
    told = json.loads(formatter("json").format(record_of("%d of %s", "x")))
    assert told["message"] == "'%d of %s' cannot be told with ('x',): TypeError"


def test_json_holds_the_exception_and_what_it_was_because_of() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("team", logging.ERROR, "x.py", 1, "bad", (), sys.exc_info())
    vars(record).update(correlation="c1", service="bills", handler="bill", message_id="m", stream="a/b", position=7)
    told = json.loads(formatter("json").format(record))
    assert told["exception"].splitlines()[-1] == "ValueError: no"
    assert {key: told[key] for key in ("correlation", "service", "handler", "message_id", "stream", "position")} == {
        "correlation": "c1", "service": "bills", "handler": "bill", "message_id": "m", "stream": "a/b", "position": 7,
    }  # fmt: skip


def test_text_names_what_it_began_with() -> None:
    assert "[c1] hello" in formatter("text").format(record_of("hello", correlation="c1"))
    assert formatter("text", "%(because)s%(message)s").format(record_of("hello")) == "hello"
