"""Wrong input, full disks, closed streams, missing permissions and signals end in one line, and leave nothing."""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from click.testing import CliRunner, Result

from cauce.backends import sqlite
from cauce.backends.sqlite.upkeep import backup, restore, verify
from cauce.cli import main
from cauce.cli.logs import formatter
from cauce.cli.run import find
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, micros, moment, sealed, to_cloudevent
from cauce.errors import Busy, Refused

ROOT = Path(__file__).parent.parent
MAIN = "from cauce.cli import main; main()"
FIELDS = ("--domain", "permits", "--key", "case", "--type", "type", "--time", "time", "--as", "permits")
RAW = os.fsdecode(b"\xff")
"""A name that is no UTF-8."""

# Becomes somebody else when all is loaded, because the interpreter may lie where this one may not look.
NOBODY = """
import difflib, encodings.idna, importlib, os, sys, click
from cauce.backends import sqlite
from cauce.cli import COMMANDS, main
for name in COMMANDS:
    main.get_command(click.Context(main), name)
if os.geteuid() == 0:
    os.setuid(65534)
main()
"""


def cauce(path: Path, *arguments: str, content: bytes | None = None) -> Result:
    """Run a command in this process on the log at a path."""
    command, *rest = arguments
    told = [command, "--bus", f"sqlite:///{path}", *rest]
    return CliRunner().invoke(main, told, input=content, catch_exceptions=False)


def environment(path: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "CAUCE_BUS": f"sqlite:///{path}"} | more


def shell(path: Path, line: str, *, code: str = MAIN, **more: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a line of bash, in which `cauce` is the command line on the log at a path."""
    script = f"cauce() {{ {sys.executable} -c '{code}' \"$@\"; }}\nset -o pipefail\n{line}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment(path, **more), cwd=path.parent, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def fill(path: Path, entries: int = 3, time: int = 0, size: int = 0) -> Path:
    async def write() -> None:
        bus = await sqlite.open(path)
        body = b'"' + b"x" * size + b'"'
        told = []
        for n in range(entries):
            entry = sealed(f"users/{n}", "T", SystemClock().id(), Meta(time), body)
            told.append(bus.facts.append(entry.stream, [entry]))
        await asyncio.gather(*told)
        await bus.close()

    asyncio.run(write())
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return fill(tmp_path / "bus.db")


def files(folder: Path) -> list[str]:
    """What lies there, but for what SQLite may leave beside a log that is looked at."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(("-shm", "-wal")))


def one_line(result: Result, *says: str) -> None:
    """It was refused in one line that says this."""
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output
    assert result.stderr.startswith("error: ")
    for part in says:
        assert part in result.stderr


# -------------------------------------------------------------------------------------------------------------- time


def line(when: str, case: str = "a") -> bytes:
    return json.dumps({"case": case, "type": "T", "time": when}).encode() + b"\n"


@pytest.mark.parametrize("when", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_beyond_the_calendar_is_refused_before_it_is_written(when: str, tmp_path: Path) -> None:
    result = cauce(tmp_path / "bus.db", "import", "-", *FIELDS, content=line(when))
    one_line(result, "standard input line 1: field 'time'", "years 1 to 9999")
    assert cauce(tmp_path / "bus.db", "export", "--all").stdout == ""


@pytest.mark.parametrize("time", [-(10**18), 10**18, -(2**63), 2**63 - 1])
def test_a_log_that_holds_a_time_beyond_the_calendar_stays_readable(time: int, tmp_path: Path) -> None:
    path = fill(tmp_path / "bus.db", 1, time)
    for command in (("tail",), ("tail", "--json"), ("show", "users/0"), ("show", "users/0", "--json"), ("export",)):
        assert cauce(path, *command).exit_code == 0
    assert cauce(path, "verify").exit_code == 0
    entry = Entry(1, "users/0", 1, "T", "", b'{"time":%d}' % time, None, b"1", 0)
    assert to_cloudevent(entry)["time"] == ("0001-01-01T00:00:00Z" if time < 0 else "9999-12-31T23:59:59.999999Z")


@pytest.mark.parametrize(
    ("when", "zone", "told"),
    [
        ("9999-12-31T23:59:59Z", "Asia/Tokyo", "9999-12-31 23:59:59.000"),
        ("0001-01-01T00:00:00Z", "America/Bogota", "0001-01-01 00:00:00.000"),
    ],
)
def test_a_time_that_the_local_clock_does_not_know_is_told_in_utc(
    when: str, zone: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        path = tmp_path / "bus.db"
        assert cauce(path, "import", "-", *FIELDS, content=line(when)).exit_code == 0
        for command in (("tail",), ("show", "permits/a")):
            result = cauce(path, *command)
            assert (result.exit_code, told in result.stdout) == (0, True)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_every_moment_that_is_taken_comes_back() -> None:
    for at in (moment(-(2**63)), moment(0), moment(2**63)):
        assert moment(micros(at)) == at


# ------------------------------------------------------------------------------------------------------------ import


def test_a_pipe_is_a_file_too(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "f.gz", "wb") as file:
        file.writelines(line("2010-10-02T07:20:39Z", f"c{n}") for n in range(5000))
    code, said, _ = shell(tmp_path / "bus.db", f"cauce import <(zcat f.gz) {' '.join(FIELDS)}")
    assert (code, "5000 written" in said) == (0, True)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no event\n", line("yesterday")])
def test_a_file_without_an_event_gives_no_domain_away(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    cauce(path, "import", "-", *FIELDS[:-1], "somebody", content=content)
    assert cauce(path, "export", "--all").stdout == ""
    good = line("2010-10-02T07:20:39Z")
    assert cauce(path, "import", "-", *FIELDS, content=good).exit_code == 0
    result = cauce(path, "import", "-", *FIELDS[:-1], "somebody", content=b"")
    one_line(result, "owned by service 'permits'")


def test_an_import_says_what_is_wrong_with_names_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    one_line(cauce(path, "import", "", *FIELDS), "the name of the file is empty")
    one_line(cauce(path, "import", "nothing", *FIELDS), "nothing cannot be read: No such file or directory: name a")
    one_line(cauce(path, "import", "-", *FIELDS[:-1], " "), "service name ' '")
    result = cauce(path, "import", "-", *FIELDS, content=line("2010-10-02T07:20:39Z", "cafe\u0301"))
    one_line(result, "NFC", "uconv")
    assert "unicodedata" not in result.stderr


def test_a_stream_is_found_by_its_name_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "bus.db"
    assert cauce(path, "import", "-", *FIELDS, content=line("2010-10-02T07:20:39Z", "caf\u00e9")).exit_code == 0
    assert cauce(path, "show", "permits/cafe\u0301").exit_code == 0
    assert cauce(path, "tail", "--stream", "permits/cafe\u0301").stdout.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- streams

PRINTING = (
    "tail",
    "export",
    "tail --json",
    "show users/1",
    "verify --json",
    "services --json",
    "--help",
    "tail --help",
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", PRINTING)
def test_a_full_disk_behind_the_output_is_one_line_and_4(command: str, log: Path) -> None:
    code, _, said = shell(log, f"cauce {command} > /dev/full")
    assert (code, said.count("\n")) == (4, 1), said
    assert "No space left on device" in said


@pytest.mark.parametrize("command", PRINTING)
def test_a_closed_output_is_read_by_nobody(command: str, log: Path) -> None:
    assert shell(log, f"cauce {command} >&-") == (141, "", "")


def test_closed_input_and_errors_are_no_obstacle(log: Path) -> None:
    code, _, said = shell(log, f"cauce import - {' '.join(FIELDS)} <&-")
    assert (code, said) == (1, "error: standard input is closed: name a file, or write the lines into it\n")
    assert shell(log, "cauce tail 2>&-")[0] == 0
    assert shell(log, "cauce show users/none 2>&-")[0] == 1
    assert shell(log, "cauce export <&- 2>&-")[1].count("\n") == 3


def test_ctrl_c_while_the_program_is_loaded_is_no_traceback(log: Path) -> None:
    code = 'import sys, signal; sys.modules["click"] = None; \nclass F:\n def find_spec(self, name, *_):\n  if name == "cauce.cli.endings": signal.raise_signal(2)\nsys.meta_path.insert(0, F()); del sys.modules["click"]\n'
    done = subprocess.run(
        [sys.executable, "-c", code + MAIN], env=environment(log), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


# ------------------------------------------------------------------------------------------------------------- files


def test_verify_refuses_what_never_was_a_log(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing of the kind\n" * 500)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    other = apsw.Connection(str(tmp_path / "other.db"))
    for n in range(30):
        other.execute(f"create table t{n} (a)")
    other.close()
    for name in ("text", "empty", "folder", "other.db", "text/below", "/dev/null"):
        one_line(cauce(tmp_path / name, "verify"))
    assert files(tmp_path) == ["empty", "folder", "other.db", "text"]


def test_another_database_where_a_log_was_is_one_finding(log: Path) -> None:
    log.unlink()
    other = apsw.Connection(str(log))
    for n in range(30):
        other.execute(f"create table t{n} (a)")
    other.close()
    result = cauce(log, "verify", "--json")
    assert (result.exit_code, len(json.loads(result.stdout)["findings"])) == (5, 1)


@pytest.mark.parametrize("wiped", [16, 100, 4096])
def test_a_log_whose_beginning_is_lost_is_damaged_and_never_ok(wiped: int, log: Path) -> None:
    copy = log.with_name("copy.db")
    backup(log, copy)
    for path in (log, copy):
        with path.open("r+b") as file:
            file.write(bytes(wiped))
    assert cauce(log, "verify").exit_code == 5
    assert cauce(copy, "verify").exit_code in (1, 5)


@pytest.fixture
def others() -> Iterator[Path]:
    """A log of somebody else, open to everybody but for the folder beside it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder / "bus.db")
        folder.chmod(0o777)
        (folder / "bus.db").chmod(0o666)
        if os.geteuid():
            (folder / "bus.db.d").chmod(0o000)
        yield folder / "bus.db"
        (folder / "bus.db.d").chmod(0o700)


@pytest.mark.parametrize(
    "command", ["verify", "tail -f", "backup /tmp/never-made.db", f"import - {' '.join(FIELDS)}", "dead list"]
)
def test_a_folder_beside_the_log_that_may_not_be_read_is_refused(command: str, others: Path) -> None:
    code, _, said = shell(others, f"cauce {command}", code=NOBODY)
    assert (code, said.count("\n")) == (1, 1), said
    assert f"{others}.d" in said
    others.chmod(0o000)
    code, _, said = shell(others, "cauce verify", code=NOBODY)
    assert (code, "may not be read" in said) == (1, True)


def test_export_says_why_a_file_cannot_be_written(log: Path) -> None:
    for name in ("", ".", "..", "/", "no/where", "bus.db", "bus.db/below"):
        one_line(
            cauce(log, "export", "--output", name if not name.startswith(("no", "bus")) else f"{log.parent}/{name}")
        )
    result = cauce(log, "export", "--output", f"{log.parent}/{'x' * 300}")
    one_line(result)
    assert files(log.parent) == ["bus.db", "bus.db.d"]


def test_a_full_disk_behind_an_export_is_4_and_leaves_nothing(log: Path) -> None:
    fill(log, 2000, size=1000)
    code, _, said = shell(log, "ulimit -f 100; cauce export --output out")
    assert (code, said.count("\n"), "took no more" in said) == (4, 1, True)
    assert files(log.parent) == ["bus.db", "bus.db.d"]


def test_an_export_is_private_like_the_log(log: Path) -> None:
    assert cauce(log, "export", "--output", f"{log.parent}/out.gz").exit_code == 0
    assert log.with_name("out.gz").stat().st_mode & 0o777 == 0o600
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "what SIGTERM did before, it does again"


def test_a_name_that_is_no_text_is_refused_before_anything_is_made(log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    good = tmp_path / "f.jsonl"
    good.write_bytes(line("2010-10-02T07:20:39Z"))
    for command in (("tail",), ("verify",), ("import", str(good), *FIELDS), ("restore", str(log)), ("run", "json")):
        result = cauce(folder / RAW, *command)
        one_line(result, "not UTF-8")
    for name in ("backup", "restore"):
        result = cauce(log, name, f"{folder}/{RAW}", "--json")
        assert (result.exit_code, json.loads(result.stdout)["error"]) == (1, "Refused")
    assert files(folder) == []


def test_a_file_whose_name_is_no_text_is_brought_and_told_as_json(tmp_path: Path) -> None:
    try:
        (tmp_path / f"{RAW}.jsonl").write_bytes(line("2010-10-02T07:20:39Z"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    result = cauce(tmp_path / "bus.db", "import", f"{tmp_path}/{RAW}.jsonl", *FIELDS, "--json")
    assert json.loads(result.stdout)["file"] == f"{tmp_path}/\\udcff.jsonl"
    result = cauce(tmp_path / "bus.db", "import", f"{tmp_path}/{RAW}", *FIELDS, "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]) == (1, "Refused")


def test_addresses_and_numbers_out_of_bounds_are_no_traceback(log: Path) -> None:
    for url in ("sqlite:////", "sqlite:///.", "sqlite:///"):
        one_line(CliRunner().invoke(main, ["tail", "--bus", url]), "bus address")
    assert cauce(log, "tail", "--last", "99999999999999999999").stdout.count("\n") == 3
    loop = log.with_name("loop.db")
    loop.symlink_to(loop)
    for command in ("tail", "verify"):
        one_line(cauce(loop, command))


def test_dead_letters_and_services_of_no_bus_are_refused(tmp_path: Path) -> None:
    for command in (("list",), ("show", "s", "c", "1")):
        result = CliRunner().invoke(main, ["dead", *command, "--bus", f"sqlite:///{tmp_path}/bus.db"])
        one_line(result, "there is no log")
    one_line(cauce(tmp_path / "bus.db", "services"), "there is no log")


# --------------------------------------------------------------------------------------------- what is not finished


def test_a_restore_that_fails_leaves_nothing(log: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing of the kind\n" * 500)
    for source in ("text", "nothing"):
        assert cauce(tmp_path / "deep" / "er" / "new.db", "restore", f"{tmp_path}/{source}").exit_code == 1
    assert files(tmp_path) == ["bus.db", "bus.db.d", "text"]


def interrupt(copied: int, pages: int) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_backup_or_restore_leaves_nothing(log: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        backup(log, tmp_path / "copy.db", told=interrupt)
    with pytest.raises(KeyboardInterrupt):
        restore(log, tmp_path / "deep" / "new.db", SystemClock().id(), told=interrupt)
    assert files(tmp_path) == before


# Says so when a copy is half made, and waits.
HALF = """
import sys
from cauce.backends.sqlite import upkeep
from cauce.cli import export, main

def wait(*_):
    print("half", flush=True)
    sys.stdin.read()

upkeep._whole = export.cloudevent = wait
main()
"""


@pytest.mark.parametrize("command", ["export --output made", "backup made", "restore bus.db --bus sqlite:///made"])
def test_sigterm_ends_a_copy_and_leaves_nothing(command: str, log: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HALF, *command.split()], env=environment(log), cwd=log.parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert (log.parent / "made.part" / "new").exists()
        process.terminate()
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == ""
    assert files(log.parent) == ["bus.db", "bus.db.d"]


def test_what_a_killed_copy_left_is_taken_over(log: Path, tmp_path: Path) -> None:
    for name in ("out", "copy.db", "new.db"):
        (tmp_path / f"{name}.part").mkdir()
        (tmp_path / f"{name}.part" / "new").write_text("half")
    assert cauce(log, "export", "--output", f"{tmp_path}/out").exit_code == 0
    assert cauce(log, "backup", f"{tmp_path}/copy.db").exit_code == 0
    assert cauce(tmp_path / "new.db", "restore", f"{tmp_path}/copy.db").exit_code == 0
    assert [name for name in files(tmp_path) if name.endswith(".part")] == []
    assert verify(tmp_path / "new.db").ok


def test_what_another_copies_just_now_is_left_alone(log: Path, tmp_path: Path) -> None:
    part = tmp_path / "copy.db.part"
    part.mkdir()
    (part / "new").write_text("half")
    lock = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another program"):
            backup(log, tmp_path / "copy.db")
        assert cauce(log, "export", "--output", f"{tmp_path}/copy.db").exit_code == 4
    finally:
        os.close(lock)
    assert (part / "new").read_text() == "half"


def test_what_happens_to_have_the_name_of_an_unfinished_file_is_kept(log: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").write_text("precious")
    one_line(cauce(log, "export", "--output", f"{tmp_path}/out"), "in the way")
    (tmp_path / "copy.db.part").mkdir()
    (tmp_path / "copy.db.part" / "mine").write_text("precious")
    assert cauce(log, "backup", f"{tmp_path}/copy.db").exit_code == 0
    assert (tmp_path / "out.part").read_text() == (tmp_path / "copy.db.part" / "mine").read_text() == "precious"


def test_a_target_that_is_made_meanwhile_is_kept(log: Path, tmp_path: Path) -> None:
    def made(copied: int, pages: int) -> None:
        (tmp_path / "copy.db").write_text("precious")

    with pytest.raises(Refused, match="meanwhile"):
        backup(log, tmp_path / "copy.db", told=made)
    assert (tmp_path / "copy.db").read_text() == "precious"


def test_a_full_disk_behind_a_backup_is_storage_full(log: Path, tmp_path: Path) -> None:
    fill(log, 2000, size=1000)
    code, _, said = shell(log, "ulimit -f 100; cauce backup copy.db")
    assert (code, said.count("\n")) == (4, 1), said
    assert files(tmp_path) == ["bus.db", "bus.db.d"]


# --------------------------------------------------------------------------------------------------------------- run


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("./shopx", "write shopx"),
        (".shopx", "write shopx"),
        ("shopx/", "write shopx"),
        ("shopx/mails.py", "write shopx.mails$"),
        ("shopx/mails.py:mails", "write shopx.mails:mails$"),
        ("shopx.py", "write shopx"),
        ("..x", "write x"),
        ("", "write MODULE"),
        (":", "write MODULE"),
        (":x", "write MODULE"),
        ("shopx:", "write"),
        ("a-b", "write MODULE"),
    ],
)
def test_what_is_no_name_of_a_module_is_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(Refused, match=hint):
        find(name)


def test_a_module_that_cannot_be_imported_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "brackets.py").write_text("\nx = (\n")
    (tmp_path / "missing.py").write_text("\n\nimport nothing_of_the_kind\n")
    (tmp_path / "wrong.py").write_text("from json import nothing_of_the_kind\n")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").touch()
    (tmp_path / "outer" / "inner.py").write_text("import nothing_of_the_kind\n")
    for name, where in (
        ("brackets", "brackets.py line 2"),
        ("missing", "missing.py line 3"),
        ("wrong", "wrong.py line 1"),
        ("outer", "outer/inner.py line 1"),
    ):
        code, _, said = shell(tmp_path / "bus.db", f"cauce run {name}")
        assert (code, said.count("\n")) == (1, 1), said
        assert name in said
        assert f"{tmp_path}/{where}" in said


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_length_of_time_that_is_none_is_wrong_usage(seconds: str) -> None:
    assert CliRunner().invoke(main, ["run", "shop", "--drain", seconds]).exit_code == 2


def test_what_handlers_say_commands_no_terminal_and_forges_no_line() -> None:
    try:
        raise ValueError("\x1b[2J\n2026-01-01 INFO all is well")
    except ValueError:
        record = logging.LogRecord("cauce", 40, "", 1, "failed: %s", ("\x1b[31m\nINFO well",), sys.exc_info())
    first, *more = formatter("text", "%(levelname)s %(message)s").format(record).split("\n")
    assert first == "ERROR failed: \\x1b[31m\\nINFO well"
    assert more
    for told in more:
        assert told.startswith("    ")
        assert told.isprintable()


# -------------------------------------------------------------------------------------------------------------- demo


def test_a_port_that_cannot_be_had_is_told_in_one_line() -> None:
    for port in ("70000", "-1"):
        assert CliRunner().invoke(main, ["demo", "--port", port]).exit_code == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        one_line(CliRunner().invoke(main, ["demo", "--port", port]), f"port {port}", "name another")


def test_a_demo_that_nobody_reads_ends_with_141(tmp_path: Path) -> None:
    code, said, errors = shell(tmp_path / "bus.db", "cauce demo | head -1")
    assert (code, said.count("\n"), errors) == (141, 1, "")
