"""The commands about a log say the same to people and to programs, end with the right code, and harm no terminal."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import apsw
import click
import pytest
from click.testing import CliRunner, Result

from cauce import errors
from cauce.backends import sqlite
from cauce.cli import COMMANDS, main
from cauce.cli.endings import exit_code
from cauce.cli.text import one_line, write
from cauce.clock import SystemClock
from cauce.codec import Meta, derive_id, from_cloudevent, sealed

ROOT = Path(__file__).parent.parent
NOON = 1_700_000_000_000_000
EVIL = "\u202egnp.exe\u009b31m"


def cauce(path: Path, *arguments: str) -> Result:
    """Run a command in this process on the log at a path."""
    command, *rest = arguments
    return CliRunner().invoke(main, [command, "--bus", f"sqlite:///{path}", *rest], catch_exceptions=False)


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from cauce.cli import main; main()", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CAUCE_BUS": f"sqlite:///{path}"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def objects(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def only(result: Result) -> dict[str, Any]:
    (found,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Thirty facts of two domains and three types, a command, and a record that was deleted."""

    async def fill() -> None:
        bus = await sqlite.open(tmp_path / "bus.db")
        for n in range(30):
            stream = f"{'users' if n % 3 else 'orders'}/{n % 5}"
            meta = Meta(NOON + n * 1000, by="ana", causation=derive_id("0" * 36, "c") if n == 29 else "")
            body = json.dumps({"n": n}).encode()
            await bus.facts.append(stream, [sealed(stream, f"Type {n % 3}", derive_id("0" * 36, str(n)), meta, body)])
        entry = sealed("users/1", "Do", SystemClock().id(), Meta(NOON), b'{"do":1}')
        await bus.commands.append("users/1", [entry])
        await bus.records.put("users/1", 7, sealed("users/1", "User", SystemClock().id(), Meta(NOON), b""))
        owner = sealed("_catalogue/users", "Owned", bus.id, Meta(NOON), b'{"service":"users"}')
        await bus.facts.append("_catalogue/users", [owner])
        await bus.close()

    asyncio.run(fill())
    return tmp_path / "bus.db"


# -------------------------------------------------------------------------------------------------------------- tail


def test_tail_tells_position_time_stream_version_type_and_body(log: Path) -> None:
    result = cauce(log, "tail")
    lines = result.stdout.splitlines()
    assert (result.exit_code, len(lines)) == (0, 20)
    found = re.fullmatch(r" +30  (\S+ \S+)  users/4 +(\d+)  Type 2 +(.*)", lines[-2])
    assert found is not None, lines[-2]
    assert (found[2], found[3]) == ("4", '{"n": 29}')
    assert lines[-1].split()[3] == "_catalogue/users"


def test_tail_as_json_prints_cloudevents(log: Path) -> None:
    found = objects(cauce(log, "tail", "--json", "--last", "3"))
    assert [each["position"] for each in found] == ["29", "30", "31"]
    assert found[0] | {"digest": "", "id": ""} == {
        "specversion": "1.0", "id": "", "source": "/users", "type": "Type 1", "subject": "3",
        "time": "2023-11-14T22:13:20.028000Z", "schemaversion": 1, "streamversion": "4", "position": "29",
        "correlation": found[0]["id"], "digest": "", "by": "ana", "datacontenttype": "application/json", "data": {"n": 28},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--domain", "orders", "--last", "2"), [24, 27]),
        (("--type", "Type 1", "--last", "2"), [25, 28]),
        (("--type", "Type 1", "--type", "Type 2", "--last", "3"), [26, 28, 29]),
        (("--stream", "users/1"), [1, 11, 16, 26]),
        (("--stream", "users/1", "--last", "1"), [26]),
        (("--stream", "users/none"), []),
        (("--slot", "7", "--domain", "users", "--last", "2"), [16, 26]),
        (("--last", "0"), []),
    ],
)
def test_tail_narrows_to_domain_type_slot_and_stream(options: tuple[str, ...], numbers: list[int], log: Path) -> None:
    assert [each["data"]["n"] for each in objects(cauce(log, "tail", "--json", *options))] == numbers


def test_tail_finds_the_last_of_what_is_rare_far_back(tmp_path: Path) -> None:
    async def fill() -> None:
        bus = await sqlite.open(tmp_path / "bus.db")
        told = []
        for n in range(12_000):
            name = "rare" if n in (5, 11) else "users"
            told.append(
                bus.facts.append(f"{name}/1", [sealed(f"{name}/1", "T", SystemClock().id(), Meta(n), b"%d" % n)])
            )
        await asyncio.gather(*told)
        await bus.close()

    asyncio.run(fill())
    found = objects(cauce(tmp_path / "bus.db", "tail", "--domain", "rare", "--json"))
    assert [each["data"] for each in found] == [5, 11]


def test_tail_reads_the_other_logs_too(log: Path) -> None:
    assert objects(cauce(log, "tail", "--json", "--log", "commands"))[0]["data"] == {"do": 1}
    assert cauce(log, "tail", "--log", "records").stdout.endswith("(deleted)\n")


async def test_tail_follows_what_others_write_until_ctrl_c(log: Path) -> None:
    process = await asyncio.to_thread(start, log, "tail", "--follow", "--json", "--last", "1", "--domain", "users")
    assert process.stdout is not None
    assert json.loads(await asyncio.to_thread(process.stdout.readline))["data"] == {"n": 29}
    bus = await sqlite.open(log)
    for n in (100, 101):
        for stream in ("orders/1", "users/1"):
            await bus.facts.append(stream, [sealed(stream, "T", SystemClock().id(), Meta(n), b"%d" % n)])
        assert json.loads(await asyncio.to_thread(process.stdout.readline))["data"] == n
    await bus.close()
    process.send_signal(signal.SIGINT)
    _, said = await asyncio.to_thread(process.communicate)
    assert (process.returncode, said.strip()) == (130, "")


# -------------------------------------------------------------------------------------------------------------- show


def test_show_tells_the_story_of_one_thing(log: Path) -> None:
    result = cauce(log, "show", "users/4")
    assert result.exit_code == 0
    assert re.findall(r"^ +(\d+)  Type \d$", result.stdout, re.MULTILINE) == ["1", "2", "3", "4"]
    for part in (
        "by          ana",
        f"caused by   {derive_id('0' * 36, 'c')}",
        f"id          {derive_id('0' * 36, '29')}",
        '"n": 29',
    ):
        assert part in result.stdout
    found = objects(cauce(log, "show", "users/4", "--json"))
    assert [each["streamversion"] for each in found] == ["1", "2", "3", "4"]
    assert found[-1]["causation"] == derive_id("0" * 36, "c")


def test_show_of_a_thing_that_is_not_there_is_an_error(log: Path) -> None:
    result = cauce(log, "show", "users/none")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: users/none has no entries among the facts")
    assert cauce(log, "show", "users").stderr == "error: stream 'users': write it as domain/key\n"


# ------------------------------------------------------------------------------------------------------------ export


def test_export_prints_each_fact_as_a_cloudevent_in_order(log: Path) -> None:
    result = cauce(log, "export")
    found = objects(result)
    assert [each["data"]["n"] for each in found] == list(range(30))
    entries = [from_cloudevent(line) for line in result.stdout.splitlines()]
    assert all(entry.checked() for entry in entries), "all that the digest covers is in it"
    assert len(objects(cauce(log, "export", "--all"))) == 31
    assert len(objects(cauce(log, "export", "--log", "commands"))) == 1
    assert "data" not in objects(cauce(log, "export", "--log", "records"))[0]


def test_export_to_a_file_says_how_many_and_never_overwrites(log: Path, tmp_path: Path) -> None:
    plain, packed = tmp_path / "out.jsonl", tmp_path / "out.jsonl.gz"
    assert cauce(log, "export", "--output", str(plain)).stdout == f"30 entries of facts written to {plain}\n"
    assert plain.read_text() == cauce(log, "export").stdout
    assert only(cauce(log, "export", "--output", str(packed), "--json")) == {
        "output": str(packed),
        "log": "facts",
        "entries": 30,
    }
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    result = cauce(log, "export", "--output", str(plain))
    assert (result.exit_code, "never overwrites" in result.stderr) == (1, True)
    result = cauce(log, "export", "--output", str(tmp_path / "no" / "where"))
    assert (result.exit_code, "cannot be written" in result.stderr) == (1, True)


def damage(log: Path) -> None:
    connection = apsw.Connection(str(log))
    connection.execute("update facts set body = x'7b7d' where position = 9")
    connection.close()


def test_export_tail_and_show_stop_at_a_damaged_entry(log: Path, tmp_path: Path) -> None:
    damage(log)
    result = cauce(log, "export")
    assert (result.exit_code, result.stdout.count("\n")) == (5, 8)
    assert "position 9 " in result.stderr
    assert cauce(log, "show", "users/3", "--json").exit_code == 5
    assert cauce(log, "show", "users/3").exit_code == 5
    assert cauce(log, "tail", "--json", "--last", "30").exit_code == 5
    assert cauce(log, "tail", "--last", "30").exit_code == 5
    assert cauce(log, "export", "--output", str(tmp_path / "out")).exit_code == 5
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("out")]


# ------------------------------------------------------------------------------------------ verify, backup, restore


def test_verify_says_ok_or_what_is_damaged(log: Path) -> None:
    assert cauce(log, "verify").stdout.startswith(f"{log}: ok\n")
    found = only(cauce(log, "verify", "--json"))
    assert (found["ok"], found["findings"]) == (True, [])
    assert found["entries"] == {"facts": 31, "commands": 1, "records": 1}
    damage(log)
    result = cauce(log, "verify")
    assert (result.exit_code, "facts position 9 " in result.stdout) == (5, True)
    result = cauce(log, "verify", "--json")
    found = only(result)
    assert (result.exit_code, found["ok"], found["findings"][0]["position"]) == (5, False, 9)


def test_a_backup_is_restored_as_another_log_with_the_same_entries(log: Path, tmp_path: Path) -> None:
    copy, back = tmp_path / "copy.db", tmp_path / "back.db"
    found = only(cauce(log, "backup", str(copy), "--json"))
    assert (found["ok"], found["entries"]["facts"], found["bytes"]) == (True, 31, copy.stat().st_size)
    restored = only(cauce(back, "restore", str(copy), "--json"))
    assert (restored["ok"], restored["was"]) == (True, found["id"])
    assert restored["id"] == only(cauce(back, "verify", "--json"))["id"] != found["id"]
    assert cauce(back, "export", "--all").stdout == cauce(log, "export", "--all").stdout
    assert cauce(log, "backup", str(copy)).exit_code == 1
    assert "--force" in cauce(back, "restore", str(copy)).stderr
    assert "restored as log" in cauce(back, "restore", str(copy), "--force").stdout
    assert cauce(copy, "verify").exit_code == 0
    damage(copy)
    assert cauce(back, "restore", str(copy), "--force").exit_code == 5


async def test_a_log_in_use_is_not_restored_over(log: Path, tmp_path: Path) -> None:
    assert (await asyncio.to_thread(cauce, log, "backup", str(tmp_path / "copy.db"))).exit_code == 0
    bus = await sqlite.open(log)
    process = start(log, "restore", str(tmp_path / "copy.db"), "--force", "--json")
    said, _ = await asyncio.to_thread(process.communicate)
    await bus.close()
    assert (process.returncode, json.loads(said)["error"]) == (4, "Busy")
    assert str(os.getpid()) in json.loads(said)["message"]


# ------------------------------------------------------------------------------------------------- what all have alike


@pytest.mark.parametrize(
    "command",
    [
        ("tail",),
        ("tail", "--follow"),
        ("show", "users/1"),
        ("export",),
        ("verify",),
        ("doctor",),
        ("backup", "copy"),
        ("state", "shop", "users/1"),
        ("history", "shop", "users/1"),
    ],
)
def test_who_only_reads_makes_no_log(command: tuple[str, ...], tmp_path: Path) -> None:
    result = cauce(tmp_path / "deep" / "bus.db", *command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: there is no log at {tmp_path}/deep/bus.db: ")
    assert list(tmp_path.iterdir()) == []
    found = cauce(tmp_path / "bus.db", *command, "--json")
    assert only(found).keys() == {"error", "message"}
    assert only(found)["error"] == "Refused"
    assert list(tmp_path.iterdir()) == []


def test_who_only_reads_changes_no_file(log: Path) -> None:
    before = log.read_bytes(), sorted(each.name for each in log.with_name("bus.db.d").iterdir())
    for command in (("tail",), ("show", "users/1"), ("export",), ("verify",), ("doctor",)):
        assert cauce(log, *command).exit_code == 0
    assert (log.read_bytes(), sorted(each.name for each in log.with_name("bus.db.d").iterdir())) == before


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bus.db").write_text("nothing of the kind\n" * 100)
    other = apsw.Connection(str(tmp_path / "other.db"))
    other.execute("create table t (a)")
    other.close()
    for name in ("bus.db", "other.db"):
        for command in (("tail",), ("show", "users/1"), ("export",), ("verify",), ("doctor",)):
            result = cauce(tmp_path / name, *command)
            assert (result.exit_code, "no Cauce log" in result.stderr) == (1, True)


def test_an_address_of_another_kind_is_refused() -> None:
    for url in ("kafka://host", "bus.db", "sqlite:///", "sqlite://bus.db"):
        result = CliRunner().invoke(main, ["tail", "--bus", url])
        assert (result.exit_code, f"bus address {url!r}" in result.stderr) == (1, True)


def test_the_address_comes_from_the_environment_too(log: Path) -> None:
    result = CliRunner(env={"CAUCE_BUS": f"sqlite:///{log}"}).invoke(main, ["tail", "--last", "1"])
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)


def test_exit_codes_say_what_the_caller_can_do() -> None:
    codes = {
        name: exit_code(cls("x") if name not in ("Conflict", "OutcomeUnknown", "Held") else cls.__new__(cls))
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.CauceError)
    }
    four = {name for name, code in codes.items() if code == 4}
    waits = {
        "Unavailable",
        "NoAnswer",
        "OutcomeUnknown",
        "BreakerOpen",
        "Busy",
        "Overloaded",
        "StorageFull",
        "Held",
        "Fenced",
        "Unreachable",
    }
    assert four == waits & codes.keys()
    assert {name: code for name, code in codes.items() if name not in four and code != 1} == {
        "Rejected": 3,
        "Damaged": 5,
    }


def test_wrong_usage_ends_with_2(log: Path) -> None:
    for command in (("nothing",), ("tail", "--nothing"), ("tail", "--slot", "16"), ("show",), ("import", "f")):
        assert CliRunner().invoke(main, command).exit_code == 2


def test_every_command_loads_and_takes_bus(tmp_path: Path) -> None:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.name == name
        for each in command.commands.values() if isinstance(command, click.Group) else [command]:
            if name not in {"demo", "schema"}:
                assert "--bus" in [option for parameter in each.params for option in parameter.opts], each.name


def test_a_reader_that_goes_away_ends_a_command_quietly(tmp_path: Path) -> None:
    async def fill() -> None:
        bus = await sqlite.open(tmp_path / "bus.db")
        body = b'"' + b"x" * 1000 + b'"'
        await asyncio.gather(
            *(
                bus.facts.append(f"a/{n}", [sealed(f"a/{n}", "T", SystemClock().id(), Meta(n), body)])
                for n in range(500)
            )
        )
        await bus.close()

    asyncio.run(fill())
    for command in (("export",), ("tail", "--last", "500"), ("tail", "--last", "500", "--json")):
        process = start(tmp_path / "bus.db", *command)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (141, "")
        process.stderr.close()


# ---------------------------------------------------------------------------------------------------------- terminals


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Keys, types and bodies that would turn, colour or clear a terminal."""

    async def fill() -> None:
        bus = await sqlite.open(tmp_path / "bus.db")
        stream = "users/\u202egnp.exe"
        body = json.dumps({"name": EVIL, "other": "\x1b[2J"}, ensure_ascii=False).encode()
        await bus.facts.append(stream, [sealed(stream, "Type\u2066", SystemClock().id(), Meta(NOON, by=EVIL), body)])
        await bus.close()

    asyncio.run(fill())
    return tmp_path / "bus.db"


def test_nothing_that_people_read_commands_their_terminal(evil: Path) -> None:
    for command in (
        ("tail",),
        ("show", "users/\u202egnp.exe"),
        ("show", EVIL),
        ("show", "users/\x1b[2J"),
        ("tail", "--stream", EVIL),
    ):
        result = cauce(evil, *command)
        assert result.output
        for line in result.output.splitlines():
            assert line.isprintable(), line
    assert "\\u202egnp.exe" in cauce(evil, "tail").stdout


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_json_on_a_terminal_is_harmless_and_still_the_same_json(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = cauce(evil, "tail", "--json").stdout.encode()
    assert EVIL.encode() in line, "a file gets the bytes as they are"
    screen = io.BytesIO()
    with monkeypatch.context() as patched:
        terminal = Terminal(screen)
        patched.setattr(sys, "stdout", terminal)
        write(line.rstrip(b"\n"))
    shown = screen.getvalue().decode()
    assert shown.rstrip("\n").isprintable()
    assert json.loads(shown) == json.loads(line)


def test_text_on_one_line_keeps_letters_of_all_scripts() -> None:
    assert one_line("añade 水 \N{SNOWMAN}") == "añade 水 \N{SNOWMAN}"
    assert one_line("a\nb\x1b[0m\x9b\x7f\u202e\ud800") == "a\\nb\\x1b[0m\\x9b\\x7f\\u202e\\ud800"
