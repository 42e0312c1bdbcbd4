"""`cauce undo`: what it would record is shown, agreed to, and then recorded by the owner."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cauce import connect, running
from cauce.cli import main
from cauce.cli.text import width
from tests.test_undo import ChangeEmail, Earn, Join, Person, SendCard, entries, owner

ROOT = Path(__file__).parent.parent
people = owner()
"""What the command finds in this module."""

MODULE = "tests.test_cli_undo:people"


def cauce(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["undo", MODULE, *arguments, "--bus", url], catch_exceptions=False)


@pytest.fixture
def thing(each_bus: str) -> str:
    """A bus with a thing of four facts, which nobody serves."""

    async def fill() -> None:
        async with running(owner(), bus=each_bus) as bus:
            await bus.call(Join("a", "ana@corp.example"), by="web")
            await bus.call(ChangeEmail("a", "ana@home.example"), by="crm:joe", id="moved")
            await bus.call(Earn("a", 2))

    asyncio.run(fill())
    return each_bus


async def after(url: str, *arguments: str) -> tuple[Result, list[str], Person | None]:
    """What the command does while the owner runs elsewhere in this process, and what stands then."""
    async with running(owner(), bus=url):
        result = await asyncio.to_thread(cauce, url, *arguments)
    async with connect(url) as bus:
        return result, [each.type for each in await entries(bus)], await bus.record(Person, "a")


def test_a_dry_run_shows_the_facts_field_by_field_and_needs_no_service(thing: str) -> None:
    result = cauce(thing, "people/a", "--to", "1", "--by", "ops", "--dry-run")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].split()[0] == "5"
    assert lines[0].split()[3:] == ["RestoredPerson", "Undo", "by", "ops"]
    assert lines[1:] == [
        "        email   ana@home.example → ana@corp.example",
        "        points  2 → 0",
        "",
        "people/a at version 4: 1 fact would be recorded",
    ]
    assert max(map(width, lines)) <= 100
    result = cauce(thing, "people/a", "--steps", "2", "--dry-run", "--json")
    told = json.loads(result.stdout)
    assert [each["body"]["points"] for each in told["facts"]] == [-1, -1]
    assert (told["version"], told["changed"], told["after"]["points"]) == (4, False, 0)


def test_what_was_agreed_to_is_recorded_by_the_owner(thing: str) -> None:
    result, types, stands = asyncio.run(after(thing, "people/a", "--to", "1", "--by", "ops", "--yes"))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "people/a at version 4: undone by 1 fact"
    assert types == ["Joined", "EmailChanged", "Earned", "Earned", "RestoredPerson"]
    assert stands == Person("a", "ana@corp.example")
    result, types, _ = asyncio.run(after(thing, "people/a", "--to", "1", "--yes"))
    assert result.stdout == "people/a at version 5: nothing to record, it stands so already\n"
    assert len(types) == 5


WRONG: list[tuple[list[str], int, str]] = [
    (["--to", "1"], 1, "no terminal to ask at: look with --dry-run, and say --yes"),
    (["--to", "1", "--by", "a\nb", "--dry-run"], 1, "by="),
    (["--to", "4", "--yes"], 1, "nothing to undo"),
    (["--to", "9", "--yes"], 1, "has 4 versions, there was never a 9"),
    (["--to", "-1", "--yes"], 1, "to=-1"),
    ([], 1, "one of to=version, steps=number and correlation=id"),
    (["--correlation", "moved", "--yes"], 1, "by inverses only"),
    (["--to", "1", "--yes"], 4, "nobody serves people"),
]


def test_what_cannot_be_undone_is_told_on_one_line_with_its_code(thing: str) -> None:
    for arguments, code, why in WRONG:
        result = cauce(thing, "people/a", *arguments)
        assert why in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.exit_code == code


def test_with_json_nobody_is_asked(thing: str) -> None:
    result = cauce(thing, "people/a", "--to", "1", "--json")
    assert "nobody could agree to it: look with --dry-run, and say --yes" in result.output
    assert result.exit_code == 1


def test_what_the_owner_would_not_record_as_it_was_shown_is_refused(thing: str) -> None:
    without = owner()
    without.parts[:] = [each for each in without.parts if each.kind != "invert"]

    async def main() -> tuple[Result, int]:
        async with running(without, bus=thing) as bus:
            result = await asyncio.to_thread(cauce, thing, "people/a", "--steps", "2", "--yes")
            return result, len(await entries(bus))

    result, facts = asyncio.run(main())
    assert "the service that runs would record other facts for people/a than MODULE" in result.stderr
    assert (result.exit_code, facts) == (1, 4)


def test_on_a_terminal_it_asks_first(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"

    async def main() -> list[str]:
        async with running(owner(), bus=url) as bus:
            await bus.call(Join("a", "1@x"))
            await bus.call(ChangeEmail("a", "2@x"))
            assert "undone" not in await asyncio.to_thread(ask, url, b"n\n")
            assert len(await entries(bus)) == 2
            assert "undone by 1 fact" in await asyncio.to_thread(ask, url, b"y\n")
            await bus.call(SendCard("a"))
            assert "irreversible" in await asyncio.to_thread(ask, url, b"")
            return [each.type for each in await entries(bus)]

    assert asyncio.run(main()) == ["Joined", "EmailChanged", "RestoredPerson", "CardSent"]


def ask(url: str, answer: bytes) -> str:
    """What the command says on a terminal where somebody answers."""
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "examples")))}
    command: list[Any] = [
        sys.executable,
        "-c",
        "from cauce.cli import main; main()",
        "undo",
        MODULE,
        "people/a",
        "--to",
        "1",
        "--bus",
        url,
    ]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env)
    os.close(theirs)
    if answer:
        os.write(ours, answer)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:
            break
    process.wait(30)
    os.close(ours)
    return said.decode()
