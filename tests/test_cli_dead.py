"""`cauce dead`: what a person sees of dead letters, and decides about one, or about many."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cauce import Command, Domain, Event, Record, Retry, Service, running
from cauce.cli import main
from cauce.cli.dead import dead
from tests.kept import hurry

tickets = Domain("tickets", key="name")


class Ticket(Record, domain=tickets):
    name: str
    price: int


class Sold(Event, domain=tickets):
    name: str
    price: int


class Sell(Command, domain=tickets):
    name: str
    price: int


box = Service("box", owns=tickets)
gate = Service("gate")
seen: list[tuple[str, int]] = []


@box.decide
def sell(ticket: Ticket | None, command: Sell) -> Sold:
    return Sold(command.name, command.price)


@box.evolve
def sold(ticket: Ticket | None, event: Sold) -> Ticket:
    return Ticket(event.name, event.price)


@gate.on(retry=Retry(attempts=2))
async def admit(event: Sold) -> None:
    if event.price < 0:
        raise ValueError(f"{event.name} cannot cost {event.price}")
    if event.price > 100:
        raise KeyError(event.name)
    seen.append((event.name, event.price))


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bus with four dead letters of two causes, one of them with two later messages behind it."""
    hurry(monkeypatch)
    seen.clear()
    url = f"sqlite:///{tmp_path}/bus.db"
    asyncio.run(fill(url))
    return url


async def fill(url: str) -> None:
    async with running(box, gate, bus=url) as bus:
        for name, price in (("a", -1), ("b", -22), ("c", -333), ("d", 500), ("a", 10), ("a", 20)):
            await bus.call(Sell(name, price))
        await bus.settled(timeout=60)


async def again(url: str) -> None:
    async with running(box, gate, bus=url) as bus:
        await bus.settled(timeout=60)


def cauce(url: str, *arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(main, ["dead", *arguments, "--bus", url], input=input)


def letters(url: str, *filters: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cauce(url, "list", *filters, "--json").stdout.splitlines()]


def test_dead_letters_are_listed_by_cause_with_their_number_and_an_example(url: str) -> None:
    lines = cauce(url, "list").stdout.splitlines()
    assert lines[0] == "gate admit: 3 dead letters, 2 later messages behind: ValueError: … cannot cost -…"
    assert lines[1:3] == [
        "    tickets/a: ValueError: a cannot cost -1",
        f"    cauce dead show gate admit {letters(url)[0]['position']}",
    ]
    assert lines[3] == "gate admit: 1 dead letter: KeyError: …"
    assert len(lines) == 6
    each = cauce(url, "list", "--each").stdout.splitlines()
    assert [line.split(" ")[3] for line in each] == [f"tickets/{name}," for name in "abcd"]
    assert each[0].endswith(", 2 later messages behind it: ValueError: a cannot cost -1")
    assert {each["cause"] for each in letters(url)} == {"ValueError: … cannot cost -…", "KeyError: …"}


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (("gate",), "abcd"), (("gate", "admit"), "abcd"), (("gate", "other"), ""), (("--cause", "keyerror"), "d"),
        (("--cause", "cannot cost -22"), "b"), (("--cause", "… cannot"), "abc"), (("--stream", "tickets/c"), "c"),
        (("--since", "2001-01-01"), "abcd"), (("--since", "2999-01-01"), ""), (("--cause", "cost", "--stream", "tickets/d"), ""),
    ],
)  # fmt: skip
def test_dead_letters_are_narrowed_by_service_consumer_cause_thing_and_time(
    filters: tuple[str, ...], names: str, url: str
) -> None:
    assert "".join(each["stream"][-1] for each in letters(url, *filters)) == names


def test_a_service_that_is_not_there_and_a_time_that_is_none_are_refused(url: str) -> None:
    assert cauce(url, "list", "nobody").exit_code == 1
    assert cauce(url, "list", "--since", "soon").exit_code == 2
    assert cauce(url, "retry", "gate", "admit", "999999").exit_code == 1


def test_many_are_decided_about_only_when_that_was_agreed_to(url: str) -> None:
    for what in ("retry", "discard"):
        refused = cauce(url, what, "--cause", "cannot cost")
        assert refused.exit_code == 1
        assert "3 dead letters would be" in refused.stderr
        assert "say --yes" in refused.stderr
        shown = cauce(url, what, "--dry-run")
        would = {"retry": "tried again", "discard": "given up"}[what]
        assert (shown.exit_code, shown.stdout.splitlines()[-1]) == (0, f"4 dead letters would be {would}")
        assert len(letters(url)) == 4
    done = cauce(url, "discard", "--cause", "cannot cost", "--yes")
    assert done.stdout.splitlines()[-1] == "3 dead letters given up"
    assert [each["stream"] for each in letters(url)] == ["tickets/d"]
    asyncio.run(again(url))
    assert seen == [("a", 10), ("a", 20)]
    assert cauce(url, "discard", "--cause", "cannot cost", "--yes").stdout.splitlines() == [
        "0 dead letters would be given up"
    ]


def test_a_bulk_retry_lets_each_be_tried_again_and_tells_which_as_json(url: str) -> None:
    done = [json.loads(line) for line in cauce(url, "retry", "gate", "--yes", "--json").stdout.splitlines()]
    assert [each["stream"] for each in done] == [f"tickets/{name}" for name in "abcd"]
    assert letters(url) == []
    asyncio.run(again(url))
    assert [each["attempts"] for each in letters(url)] == [2] * 4


def test_a_mended_body_is_what_the_handler_is_given_and_the_original_is_kept_beside_it(
    url: str, tmp_path: Path
) -> None:
    first = letters(url)[0]
    named = ("gate", "admit", str(first["position"]))
    (tmp_path / "body.json").write_text('{"name": "a",\n "price": 1}')
    told = cauce(url, "edit", *named, "--body", f"{tmp_path}/body.json", "--by", "ana", "--code", "tests.test_cli_dead")
    assert (told.exit_code, told.stdout) == (
        0, f"gate admit {first['position']} (tickets/a) is mended, and tried so by: cauce dead retry {' '.join(named)}\n",
    )  # fmt: skip
    message = letters(url)[0]["message"]
    assert (message["data"], message["mended"]["data"], message["mended"]["by"]) == (
        {"name": "a", "price": -1}, {"name": "a", "price": 1}, "ana",
    )  # fmt: skip
    assert {**message, "mended": 0} == {**first["message"], "mended": 0}
    shown = cauce(url, "show", *named).stdout
    assert shown.index('"price": -1') < shown.index("mended by ana at 20") < shown.index('"price": 1')
    # A second edit takes the place of the first, not of the message as it came.
    assert cauce(url, "edit", *named, "--body", "-", input='{"name": "a", "price": 7}').exit_code == 0
    message = letters(url)[0]["message"]
    assert (message["data"]["price"], message["mended"]["data"]["price"]) == (-1, 7)
    assert message["mended"]["by"]
    assert cauce(url, "retry", *named).exit_code == 0
    asyncio.run(again(url))
    assert seen == [("a", 7), ("a", 10), ("a", 20)]
    assert [each["stream"][-1] for each in letters(url)] == ["b", "c", "d"]


def test_what_fails_again_as_it_was_mended_keeps_what_it_was_and_what_it_became(url: str) -> None:
    named = ("gate", "admit", str(letters(url)[0]["position"]))
    assert cauce(url, "edit", *named, "--body", "-", input='{"name": "a", "price": -5}').exit_code == 0
    assert cauce(url, "retry", *named).exit_code == 0
    asyncio.run(again(url))
    first = letters(url)[0]
    assert (first["error"], first["attempts"], first["behind"]) == ("ValueError: a cannot cost -5", 2, 2)
    assert (first["message"]["data"]["price"], first["message"]["mended"]["data"]["price"]) == (-1, -5)


@pytest.mark.parametrize(
    ("body", "code", "why"),
    [
        ("{", False, "is not JSON"), ("[1]", False, "is no JSON object"), ('{"name": "a\\u0000"}', False, "NUL"),
        ('{"name": "a"}', True, "does not fit its class"), ('{"name": "z", "price": 1}', True, "another thing than 'a'"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_right_is_refused_and_nothing_is_changed(
    body: str, code: bool, why: str, url: str
) -> None:
    before = letters(url)
    named = ("gate", "admit", str(before[0]["position"]))
    told = cauce(url, "edit", *named, "--body", "-", *(("--code", "tests.test_cli_dead") if code else ()), input=body)
    assert told.exit_code == 1
    assert why in told.stderr
    assert letters(url) == before


def test_without_a_terminal_and_a_file_there_is_nothing_to_edit_with(url: str) -> None:
    told = cauce(url, "edit", "gate", "admit", str(letters(url)[0]["position"]))
    assert (told.exit_code, "--body FILE" in told.stderr) == (1, True)


def test_what_was_mended_to_be_about_another_thing_is_not_handled(url: str) -> None:
    named = ("gate", "admit", str(letters(url)[0]["position"]))
    assert cauce(url, "edit", *named, "--body", "-", input='{"name": "z", "price": 1}').exit_code == 0
    assert cauce(url, "retry", *named).exit_code == 0
    asyncio.run(again(url))
    assert seen == []
    assert (
        letters(url)[0]["error"]
        == "Refused: Sold is about another thing than 'a': leave the key as it was, or discard it"
    )


def test_every_verb_about_dead_letters_speaks_json(url: str) -> None:
    assert sorted(dead.commands) == ["discard", "edit", "list", "retry", "show"]
    position = str(letters(url)[-1]["position"])
    for verb, more in (("show", ()), ("edit", ("--body", "-")), ("retry", ()), ("discard", ("--dry-run",))):
        told = cauce(url, verb, "gate", "admit", position, *more, "--json", input='{"name": "d", "price": 500}')
        if verb == "discard":
            assert (told.exit_code, json.loads(told.stdout)["error"]) == (1, "Refused"), "it is being tried again"
        else:
            assert json.loads(told.stdout)["stream"] == "tickets/d"
