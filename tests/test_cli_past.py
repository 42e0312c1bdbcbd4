"""`cauce state` and `cauce history`: looking back from the command line, whether the service runs or not."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import permits
from cauce import Change, Event, Record, connect, running
from cauce.cli import main
from cauce.cli.history import told
from cauce.cli.text import cut, width
from cauce.codec import Meta, seal, sealed
from permits import Permit
from shop.users import EmailChanged, User, UserRegistered, service
from tests.test_past import Person

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
NOON = int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp() * 1_000_000)


@pytest.fixture(autouse=True)
def madrid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local time that is an hour ahead of UTC."""
    monkeypatch.setenv("TZ", "Europe/Madrid")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def cauce(url: str, command: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, [command, *arguments, "--bus", url], catch_exceptions=False)


def objects(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def wrote(url: str, *facts: tuple[Event, Meta, bytes | None]) -> None:
    async def fill() -> None:
        async with connect(url) as bus:
            for n, (event, meta, wish) in enumerate(facts):
                entry = seal(event, f"id-{n}", meta, wish)
                await bus.facts.append(entry.stream, [entry])

    asyncio.run(fill())


@pytest.fixture
def users(each_bus: str) -> str:
    """A bus with two facts of one user, which nobody serves."""
    registered = json.dumps({"type": "RegisterUser", "body": {}}).encode()
    wrote(
        each_bus,
        (UserRegistered("42", "Ana", "ana@x.org"), Meta(NOON, by="web:eva", causation="wish-1"), registered),
        (EmailChanged("42", "b@x.org"), Meta(NOON + 60_123_456, by="crm:joe"), None),
    )
    return each_bus


def test_a_thing_is_told_as_it_stands_and_as_it_stood_at_a_version_or_a_time(users: str) -> None:
    assert cauce(users, "state", "shop", "users/42").stdout == (
        "users/42  version 2  2026-01-01 13:01:00.123456  EmailChanged by crm:joe\n"
        '{\n  "user_id": "42",\n  "name": "Ana",\n  "email": "b@x.org",\n  "address": ""\n}\n'
    )
    for at, email in (
        ("1", "ana@x.org"),
        ("2", "b@x.org"),
        ("2026-01-01 13:01:00.123455", "ana@x.org"),
        ("2026-01-01 13:01:00.123456", "b@x.org"),
        ("2026-01-01T12:00:30Z", "ana@x.org"),
        ("2026-01-01T12:00:30+00:00", "ana@x.org"),
        ("2026-01-02", "b@x.org"),
    ):
        (found,) = objects(cauce(users, "state", "shop.users:service", "users/42", "--at", at, "--json"))
        assert found["state"]["email"] == email, at
    (found,) = objects(cauce(users, "state", "shop.users:service", "users/42", "--json"))
    assert found == {
        "stream": "users/42", "version": 2, "position": found["position"], "time": "2026-01-01T12:01:00.123456+00:00",
        "event": "EmailChanged", "by": "crm:joe", "record": "User",
        "state": {"user_id": "42", "name": "Ana", "email": "b@x.org", "address": ""},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("users/42", "--at", "2026-01-01"), 1, "users/42 did not stand then"),
        (("users/42", "--at", "0"), 1, "users/42 did not stand then"),
        (("users/9",), 1, "users/9 does not stand"),
        (("users/42", "--at", "3"), 1, "users/42 has 2 versions, there was never a 3"),
        (("orders/42",), 1, "no service in shop owns 'orders', only cards, directory, users"),
        (("users",), 1, "write it as domain/key"),
        (("users/42", "--at", "yesterday"), 2, "neither a version nor a time"),
        (("users/42", "--at", "-1"), 2, "neither a version nor a time"),
        (("users/42", "--at", "9999-12-31T23:59:59-01:00"), 2, "neither a version nor a time"),
    ],
)
def test_what_did_not_stand_and_what_is_no_version_is_told(
    arguments: tuple[str, ...], code: int, says: str, bus_url: str
) -> None:
    wrote(
        bus_url,
        (UserRegistered("42", "Ana", "ana@x.org"), Meta(NOON), None),
        (EmailChanged("42", "b@x.org"), Meta(NOON), None),
    )
    result = cauce(bus_url, "state", "shop", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr


def test_a_history_is_told_in_blocks_with_a_line_for_each_field(users: str) -> None:
    assert cauce(users, "history", "shop", "users/42").stdout == (
        "   1  2026-01-01 13:00:00.000     UserRegistered            RegisterUser by web:eva\n"
        '      + user_id  "42"\n'
        "      + name     Ana\n"
        "      + email    ana@x.org\n"
        '      + address  ""\n'
        "\n"
        "   2  2026-01-01 13:01:00.123456  EmailChanged              by crm:joe\n"
        "        email  ana@x.org → b@x.org\n"
        "\n"
        "users/42: 2 changes\n"
    )
    assert cauce(users, "history", "shop", "users/42", "--after", "1").stdout.startswith("   2  ")
    for arguments in (("users/9",), ("users/42", "--after", "2")):
        result = cauce(users, "history", "shop", *arguments)
        assert result.exit_code == 1
        assert "has no facts" in result.stderr


def test_a_thing_is_found_however_its_name_is_typed(bus_url: str) -> None:
    wrote(bus_url, (UserRegistered("jos\u00e9", "Ana", "ana@x.org"), Meta(NOON), None))
    for command in ("state", "history"):
        assert "jos\u00e9" in cauce(bus_url, command, "shop", "users/jose\u0301").stdout


def test_a_history_as_json_is_an_object_a_line(users: str) -> None:
    first, second = objects(cauce(users, "history", "shop", "users/42", "--json"))
    assert (first["wish"], first["by"], first["causation"]) == ("RegisterUser", "web:eva", "wish-1")
    assert first["fields"]["name"] == {"before": None, "after": "Ana"}
    assert second == {
        "stream": "users/42", "version": 2, "position": second["position"], "time": "2026-01-01T12:01:00.123456+00:00",
        "event": "EmailChanged", "id": "id-1", "by": "crm:joe", "wish": "", "causation": "", "correlation": "id-1",
        "fields": {"email": {"before": "ana@x.org", "after": "b@x.org"}},
        "after": {"user_id": "42", "name": "Ana", "email": "b@x.org", "address": ""},
    }  # fmt: skip


def test_what_comes_before_a_fact_that_cannot_be_read_is_printed_and_then_the_error(bus_url: str) -> None:
    wrote(bus_url, (UserRegistered("42", "Ana", "ana@x.org"), Meta(NOON), None))

    async def spoil() -> None:
        async with connect(bus_url) as bus:
            await bus.facts.append("users/42", [sealed("users/42", "EmailChanged", "x", Meta(NOON), b"{}")])

    asyncio.run(spoil())
    result = cauce(bus_url, "history", "shop", "users/42")
    assert result.exit_code == 1
    assert "UserRegistered" in result.stdout
    assert "users/42 version 2" in result.stderr


def test_what_the_how_to_shows_runs(users: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/look-back.md").read_text(), re.DOTALL)
    program = f"async def main():\n{textwrap.indent(block, '    ')}".replace("sqlite:///.cauce/bus.db", users)
    names: dict[str, Any] = {"connect": connect, "User": User, "datetime": datetime, "UTC": UTC}
    exec(compile(program, "look-back.md", "exec", dont_inherit=True), names)  # noqa: S102 - it is ours, and what is tested

    async def beside_the_owner() -> None:
        async with running(service, bus=users):
            await names["main"]()

    asyncio.run(beside_the_owner())
    assert capsys.readouterr().out == (
        "2026-01-01 12:00:00+00:00 web:eva RegisterUser None ana@x.org\n"
        "2026-01-01 12:01:00.123456+00:00 crm:joe  ana@x.org b@x.org\n"
        "42 b@x.org\n"
    )


# -------------------------------------------------------------------------------------------------------- the form


def change(
    before: Record | None, after: Record | None, event: str = "Tagged", by: str = "", wish: str = ""
) -> Change[Any]:
    return Change(7, 7, datetime(2026, 1, 1, tzinfo=UTC), event, "id", by, wish, "", "", before, after)


WIDE = "漢字" * 60
LONG: list[tuple[Record | None, Record | None]] = [
    (Person("a", "x" * 300), Person("a", "y" * 300)),
    (Person("a", WIDE), Person("a", WIDE + "!")),
    (Person("a", "x"), Person("a", WIDE)),
    (Person("a", WIDE), None),
    (None, Person("a", "\x1b[31m" * 40, "é" * 200, ["a", "b" * 99])),
    (
        Permit("c", "a", "r", 1, data={"k" * 90: "x" * 90, WIDE: "x", "z": ""}),
        Permit("c", "a", "r", 1, data={"k" * 90: "y" * 90, WIDE: "y"}),
    ),
    (Person("a", "a", tags=["t" * 99]), Person("a", "a", tags=["t" * 99, "u" * 99])),
]


@pytest.mark.parametrize("columns", [60, 100, 173])
@pytest.mark.parametrize("number", range(len(LONG)))
def test_no_line_is_wider_than_the_terminal_and_none_commands_it(columns: int, number: int) -> None:
    for event, by, wish in (("Tagged", "crm:joe", "Tag"), ("T" * 128, "x" * 256, "W" * 128), (WIDE[:40], WIDE, WIDE)):
        lines = list(told(change(*LONG[number], event=event, by=by, wish=wish), columns))
        plain = [_plain(line) for line in lines]
        assert all(width(line) <= columns for line in plain), plain
        assert all(line.isprintable() for line in plain)


def _plain(line: str) -> str:
    return click.unstyle(line)


def test_a_long_name_of_an_event_leaves_room_between_it_and_who_wished_it() -> None:
    for letters, who in ((30, "  Tag by crm:joe"), (44, "  Tag by crm:joe"), (128, "  Tag by crm:joe")):
        first, *_ = map(
            _plain, told(change(None, Person("a", "a"), event="T" * letters, by="crm:joe", wish="Tag"), 100)
        )
        assert first.partition("T")[2].lstrip("T").removeprefix("…") == who
    first, *_ = map(_plain, told(change(None, Person("a", "a"), event="T" * 30), 100))
    assert first.endswith("T")


def test_of_two_long_values_what_differs_is_seen() -> None:
    before, after = "https://example.org/" + "a" * 90 + "/one", "https://example.org/" + "a" * 90 + "/two"
    (_, line) = map(_plain, told(change(Person("a", before), Person("a", after)), 100))
    assert line == "        name  …aaaaaaa/one → …aaaaaaa/two"
    (_, line) = map(_plain, told(change(Person("a", "x" * 90), Person("a", "y")), 100))
    assert line == f"        name  {'x' * 81}… → y"


def test_an_empty_text_and_one_that_looks_like_a_number_are_told_apart_from_others() -> None:
    (_, line) = map(_plain, told(change(Person("a", ""), Person("a", "3")), 100))
    assert line == '        name  "" → "3"'
    (_, line) = map(_plain, told(change(Person("a", "null"), Person("a", " b\n")), 100))
    assert line == '        name  "null" → " b\\n"'
    (_, line) = map(_plain, told(change(Person("a", "a"), Person("a", "a"), event="Seen"), 100))
    assert line == "        nothing changed"


def test_of_a_changed_object_each_inner_field_that_differs_has_its_line() -> None:
    before = Permit("c", "a", "r", 1, data={"size": "1", "kept": "x", "gone": "y", "odd\x1b": "1"})
    after = Permit("c", "a", "r", 1, data={"size": "2", "kept": "x", "new": "z", "odd\x1b": "2"})
    assert [_plain(each) for each in told(change(before, after), 100)][1:] == [
        '        data.size     "1" → "2"',
        "        data.gone     y → (none)",
        '        data.odd\\x1b  "1" → "2"',
        "        data.new      (none) → z",
    ]
    whole = Permit("c", "a", "r", 1, data={"other": "q"})
    assert [_plain(each) for each in told(change(before, whole), 100)][1] == (
        '        data  {"size":"1","kept":"x","gone":"y","odd\\u001b":"1"} → {"other":"q"}'
    )


def test_columns_are_counted_as_a_terminal_does() -> None:
    assert [width(each) for each in ("abc", "漢字", "e\u0301", "")] == [3, 4, 1, 0]
    assert [cut("abcdef", columns) for columns in (6, 5, 1, 0, -1)] == ["abcdef", "abcd…", "…", "", ""]
    assert [cut("漢字漢字", columns) for columns in (8, 7, 6, 2)] == ["漢字漢字", "漢字漢…", "漢字…", "…"]


# ------------------------------------------------------------------------------------------------- after an import

LINES = [
    ("Confirmation of receipt", "2010-10-02T09:20:39.266+02:00", "Resource26", "Group 1", {"department": "General"}),
    ("T02 Check confirmation of receipt", "2010-10-02T09:21:26.588+02:00", "Resource26", "Group 4", None),
    ("T04 Determine confirmation of receipt", "2010-11-09T14:14:10.016+01:00", "Resource21", "Group 4", None),
]


def imported(url: str, file: Path) -> None:
    options = ["--domain", "permits", "--key", "case", "--type", "type", "--time", "time", "--as", "permits"]
    assert cauce(url, "import", str(file), *options).exit_code == 0


def test_what_was_imported_is_looked_at_through_a_few_functions(each_bus: str, tmp_path: Path) -> None:
    lines = [
        {
            "case": "case-1", "seq": n, "type": type, "time": time, "lifecycle": "complete", "resource": resource,
            "data": {"org:group": group}, "case_data": about,
        }
        for n, (type, time, resource, group, about) in enumerate(LINES)
    ]  # fmt: skip
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    imported(each_bus, file)
    assert cauce(each_bus, "history", "permits", "permits/case-1", "--after", "1").stdout == (
        "   2  2010-10-02 09:21:26.588     StepDone                  by permits\n"
        "        activity        Confirmation of receipt → T02 Check confirmation of receipt\n"
        "        steps           1 → 2\n"
        "        data.org:group  Group 1 → Group 4\n"
        "\n"
        "   3  2010-11-09 14:14:10.016     StepDone                  by permits\n"
        "        activity  T02 Check confirmation of receipt → T04 Determine confirmation of receipt\n"
        "        resource  Resource26 → Resource21\n"
        "        steps     2 → 3\n"
        "\n"
        "permits/case-1: 2 changes\n"
    )
    (found,) = objects(cauce(each_bus, "state", "permits", "permits/case-1", "--at", "2010-10-03", "--json"))
    assert (found["version"], found["state"]["activity"]) == (2, "T02 Check confirmation of receipt")
    assert found["state"]["department"] == "General"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real event logs lie outside this repository, in ../shared/data")
def test_every_permit_of_a_dutch_municipality_can_be_looked_at(bus_url: str) -> None:
    file = DATA / "receipt.jsonl.gz"
    imported(bus_url, file)
    told = cauce(bus_url, "history", "permits", "permits/case-891")
    assert told.exit_code == 0
    assert all(width(line) <= 100 for line in told.stdout.splitlines())
    assert told.stdout.endswith("permits/case-891: 18 changes\n")
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    new_year = datetime(2011, 1, 1, tzinfo=UTC)

    async def count() -> None:
        async with running(permits.service, bus=bus_url) as bus:
            found = [each async for each in bus.states(Permit)]
            assert len(found) == 1434
            assert sum(each.activity == "T10 Determine necessity to stop indication" for each in found) == 828
            then = {each.case: each async for each in bus.states(Permit, at=new_year)}
        # Times rise within a case, so what had happened by then can be counted in the file.
        earlier = [each for each in lines if datetime.fromisoformat(each["time"]) <= new_year]
        assert {case: permit.steps for case, permit in then.items()} == Counter(each["case"] for each in earlier)

    asyncio.run(count())
