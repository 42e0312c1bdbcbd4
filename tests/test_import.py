"""`cauce import` brings each line once, names the line that is wrong, and goes on where it was stopped."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cauce.backends import look, open_backend
from cauce.backends.sqlite.log import SQLiteLog
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, moment, sealed
from cauce.errors import CauceError, Overloaded
from cauce.lease import Leases, identity
from cauce.log import Filter

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real event logs lie outside this repository, in ../shared/data, and are not there"
)

FIELDS = ("--domain", "permits", "--key", "case", "--type", "type", "--time", "time", "--as", "permits")
OPENED, SENT, CLOSED = (
    {"case": "a/1", "type": "Opened", "time": "2010-10-02T09:20:39.266+02:00", "note": "ü"},
    {"case": "b", "type": "T10 Determine necessity to stop", "time": "2010-10-02T07:20:39.266Z"},
    {"case": "a/1", "type": "Closed", "time": "1969-07-20T20:17:40+00:00"},
)


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in objects)


def at(where: Path | str) -> str:
    """The address of a bus: of the file in a folder, where no other is given."""
    return where if isinstance(where, str) else f"sqlite:///{where}/bus.db"


def bring(where: Path | str, file: Path | str, *more: str, content: bytes | None = None) -> Result:
    """Run the command in this process."""
    arguments = ["import", str(file), "--bus", at(where), *(more or FIELDS)]
    return CliRunner().invoke(main, arguments, input=content, catch_exceptions=False)


def summary(result: Result) -> tuple[int, int, int]:
    assert result.exit_code == 0, result.output
    found = re.search(r"(\d+) events?, (\d+) streams?, (\d+) written", result.output)
    assert found is not None, result.output
    return int(found[1]), int(found[2]), int(found[3])


def facts(where: Path | str, domain: str = "permits") -> list[Entry]:
    async def read() -> list[Entry]:
        async with look(at(where), SystemClock()) as logs:
            return (await logs.facts.read(Filter(domains=frozenset({domain})), limit=5000)).entries

    return asyncio.run(read())


# ------------------------------------------------------------------------------------------------------------ lines


def test_each_line_becomes_a_fact_with_the_whole_line_as_its_body(each_bus: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(lines(OPENED, SENT, CLOSED))
    assert summary(bring(each_bus, tmp_path / "f.jsonl")) == (3, 2, 3)
    found = facts(each_bus)
    assert [(each.stream, each.version, each.type) for each in found] == [
        ("permits/a/1", 1, "Opened"),
        ("permits/b", 1, "T10 Determine necessity to stop"),
        ("permits/a/1", 2, "Closed"),
    ]
    assert [each.body for each in found] == lines(OPENED, SENT, CLOSED).splitlines()
    assert [each.meta.by for each in found] == ["permits"] * 3
    assert moment(found[0].meta.time).isoformat() == "2010-10-02T07:20:39.266000+00:00"
    assert moment(found[2].meta.time).year == 1969
    assert int(found[0].id.replace("-", "")[:12], 16) == found[0].meta.time // 1000, (
        "ids are ordered by the event's time"
    )
    assert len({each.id for each in found}) == 3
    assert all(each.checked() for each in found)


def test_a_second_run_writes_nothing_and_a_longer_file_the_rest(each_bus: str, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(lines(OPENED, SENT))
    assert summary(bring(each_bus, file)) == (2, 2, 2)
    before = facts(each_bus)
    assert summary(bring(each_bus, file)) == (2, 2, 0)
    assert facts(each_bus) == before
    file.write_bytes(lines(OPENED, SENT, CLOSED))
    assert summary(bring(each_bus, file)) == (3, 2, 1)
    assert facts(each_bus)[:2] == before


def test_plain_gzip_standard_input_blank_lines_and_no_last_line_break_are_the_same_file(tmp_path: Path) -> None:
    content = lines(OPENED, SENT, CLOSED)
    (tmp_path / "f.jsonl").write_bytes(content)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(content[:-1]))
    (tmp_path / "blank.jsonl").write_bytes(b"\n" + content.replace(b"\n", b"\r\n\n") + b"  \n")
    assert summary(bring(tmp_path, tmp_path / "f.jsonl")) == (3, 2, 3)
    assert summary(bring(tmp_path, tmp_path / "f.jsonl.gz")) == (3, 2, 0)
    assert summary(bring(tmp_path, tmp_path / "blank.jsonl")) == (3, 2, 0)
    assert summary(bring(tmp_path, "-", content=content)) == (3, 2, 0)
    assert summary(bring(tmp_path, "-", content=gzip.compress(content))) == (3, 2, 0)
    assert summary(bring(tmp_path, "-", content=b"")) == (0, 0, 0)


def test_json_prints_one_object(tmp_path: Path) -> None:
    result = bring(tmp_path, "-", *FIELDS, "--json", content=lines(OPENED, SENT, CLOSED))
    found = json.loads(result.stdout)
    assert {name: found[name] for name in ("events", "streams", "written", "repeated")} == {
        "events": 3, "streams": 2, "written": 3, "repeated": 0,
    }  # fmt: skip
    assert result.stdout.count("\n") == 1


NAN = '{"case": "b", "type": "T", "time": "2010-10-02T07:20:39Z", "x": %s}'
DEEP = NAN % ("[" * 70 + "]" * 70)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"case": "b", ', "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('"text"', "text, not an object"),
        ("\ufeff" + NAN % 1, "byte order mark"),
        (NAN % "NaN", "not JSON"),
        (NAN % "-Infinity", "not JSON"),
        (NAN % "1e400", "not JSON"),
        (NAN % '"\\ud800"', "not JSON"),
        (NAN % '"\\u0000"', "NUL"),
        (NAN % '"\udcff"', "not JSON in UTF-8"),
        (DEEP, "nested deeper than 64"),
        (NAN % ("[" * 5000 + "]" * 5000), "nested deeper than 64"),
        (NAN % f'"{"x" * 750_000}"', "longer than 750,000 bytes"),
        (NAN % f'"{"x" * 2_000_000}"', "longer than 750,000 bytes"),
        ('{"type": "T", "time": "2010-10-02T07:20:39Z"}', "field 'case' is missing; it has 'type', 'time'"),
        ('{"case": null, "type": "T", "time": "2010-10-02T07:20:39Z"}', "field 'case' is missing"),
        ('{"case": 42, "type": "T", "time": "2010-10-02T07:20:39Z"}', "field 'case' is a number, not text"),
        ('{"case": "b", "time": "2010-10-02T07:20:39Z"}', "field 'type' is missing"),
        ('{"case": "b", "type": "T"}', "field 'time' is missing"),
        (
            '{"case": "b", "type": "T", "time": "2010-10-02T07:20:39"}',
            "field 'time': '2010-10-02T07:20:39' has no time zone",
        ),
        ('{"case": "b", "type": "T", "time": "2010-10-02"}', "no time zone"),
        ('{"case": "b", "type": "T", "time": "yesterday"}', "field 'time': 'yesterday' is no time"),
        ('{"case": "b", "type": "T", "time": 1286004039}', "field 'time' is a number, not text"),
        ('{"case": "", "type": "T", "time": "2010-10-02T07:20:39Z"}', "field 'case': the key is empty"),
        ('{"case": "a\\u001b[2J", "type": "T", "time": "2010-10-02T07:20:39Z"}', "field 'case': key"),
        ('{"case": "cafe\\u0301", "type": "T", "time": "2010-10-02T07:20:39Z"}', "NFC"),
        ('{"case": "%s", "type": "T", "time": "2010-10-02T07:20:39Z"}' % ("k" * 257), "257 bytes"),
        ('{"case": "b", "type": " T", "time": "2010-10-02T07:20:39Z"}', "field 'type': type name"),
        ('{"case": "b", "type": "", "time": "2010-10-02T07:20:39Z"}', "field 'type'"),
    ],
)
def test_a_bad_line_is_named_and_only_what_stands_before_it_is_written(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(lines(OPENED) + line.encode("utf-8", "surrogateescape") + b"\n" + lines(CLOSED))
    result = bring(tmp_path, file)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {file} line 2: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.removesuffix("\n").isprintable(), "nothing in it commands the terminal"
    assert [each.type for each in facts(tmp_path)] == ["Opened"]

    file.write_bytes(lines(OPENED, SENT, CLOSED))
    assert summary(bring(tmp_path, file)) == (3, 2, 2)


def change_body(content: list[dict[str, Any]]) -> None:
    content[2]["note"] = "changed"


def change_time(content: list[dict[str, Any]]) -> None:
    content[2]["time"] = "2010-10-03T09:20:39.266+02:00"


def change_type(content: list[dict[str, Any]]) -> None:
    content[2]["type"] = "Reopened"


def change_order(content: list[dict[str, Any]]) -> None:
    content[0], content[2] = content[2], content[0]


@pytest.mark.parametrize(("change", "line"), [(change_body, 3), (change_time, 3), (change_type, 3), (change_order, 1)])
def test_a_difference_to_what_is_stored_names_file_and_line(
    change: Callable[[list[dict[str, Any]]], None], line: int, each_bus: str, tmp_path: Path
) -> None:
    file = tmp_path / "f.jsonl"
    content = [OPENED.copy(), SENT.copy(), CLOSED.copy()]
    file.write_bytes(lines(*content))
    assert summary(bring(each_bus, file)) == (3, 2, 3)
    before = facts(each_bus)
    change(content)
    file.write_bytes(lines(*content))
    result = bring(each_bus, file)
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"error: {file} line {line}: permits/a/1 has another version {1 if line == 1 else 2} in the log"
    )
    assert facts(each_bus) == before


def test_what_another_wrote_into_the_stream_is_a_difference(each_bus: str) -> None:
    async def write() -> None:
        bus = await open_backend(each_bus, SystemClock())
        entry = sealed("permits/b", "Else", SystemClock().id(), Meta(1), b"{}")
        await bus.facts.append("permits/b", [entry])
        await bus.close()

    asyncio.run(write())
    result = bring(each_bus, "-", content=lines(OPENED, SENT))
    assert (result.exit_code, "standard input line 2: permits/b has another version 1" in result.stderr) == (1, True)


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for file, says in ((tmp_path / "no.jsonl", "No such file"), (tmp_path, "directory")):
        result = bring(tmp_path, file)
        assert (result.exit_code, says in result.stderr, str(file) in result.stderr) == (1, True, True)
    assert not (tmp_path / "bus.db").exists()
    packed = gzip.compress(lines(OPENED) + lines(SENT) * 3000)
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    result = bring(tmp_path, tmp_path / "cut.gz")
    assert (result.exit_code, "cannot be read to its end" in result.stderr) == (1, True)


# ---------------------------------------------------------------------------------------------------------- ownership


def test_only_the_owner_of_a_domain_brings_its_facts(each_bus: str) -> None:
    assert summary(bring(each_bus, "-", content=lines(OPENED))) == (1, 1, 1)
    result = bring(each_bus, "-", *FIELDS[:-1], "others", content=lines(OPENED, SENT))
    assert result.exit_code == 1
    assert "'permits' is owned by service 'permits'" in result.stderr
    assert len(facts(each_bus)) == 1
    assert summary(bring(each_bus, "-", "--domain", "loans", *FIELDS[2:-1], "others", content=lines(SENT))) == (1, 1, 1)


@pytest.mark.parametrize("domain", ["_catalogue", "Permits", "", "a/b", "a.b"])
def test_a_domain_that_is_none_is_refused(domain: str, tmp_path: Path) -> None:
    result = bring(tmp_path, "-", "--domain", domain, *FIELDS[2:], content=lines(OPENED))
    assert (result.exit_code, "domain name" in result.stderr) == (1, True)


def test_a_domain_that_is_being_served_takes_no_import(each_bus: str) -> None:
    async def served() -> Result:
        clock = SystemClock()
        bus = await open_backend(each_bus, SystemClock())
        leases = Leases(bus.facts, identity("permits", clock), clock)
        await leases.take("permits/3")
        try:
            return await asyncio.to_thread(bring, each_bus, "-", content=lines(OPENED))
        finally:
            await bus.close()

    result = asyncio.run(served())
    assert result.exit_code == 4
    assert f"permits/3 is held by permits (process {os.getpid()})" in result.stderr
    assert facts(each_bus) == []


def test_claims_are_released_at_the_end_also_of_a_failed_import(each_bus: str) -> None:
    assert bring(each_bus, "-", content=lines(OPENED) + b"no").exit_code == 1

    async def claims() -> None:
        bus = await open_backend(each_bus, SystemClock())
        try:
            for slot in range(16):
                await bus.facts.claim(f"permits/{slot}", "next")
        finally:
            await bus.close()

    asyncio.run(claims())


def test_an_overloaded_log_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = SQLiteLog.append
    refused: list[str] = []

    def overloaded(self: SQLiteLog, stream: str, *arguments: Any, **options: Any) -> Any:
        if stream.startswith("permits/") and len(refused) < 5:
            refused.append(stream)
            raise Overloaded("too much")
        return append(self, stream, *arguments, **options)

    monkeypatch.setattr(SQLiteLog, "append", overloaded)
    assert summary(bring(tmp_path, "-", content=lines(OPENED, SENT, CLOSED))) == (3, 2, 3)
    assert len(refused) == 5


def test_an_error_in_an_append_under_way_is_told_after_all_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = SQLiteLog.append

    def failing(self: SQLiteLog, stream: str, *arguments: Any, **options: Any) -> Any:
        if stream == "permits/b":
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(CauceError("no"))
            return future
        return append(self, stream, *arguments, **options)

    monkeypatch.setattr(SQLiteLog, "append", failing)
    result = bring(tmp_path, "-", content=lines(OPENED, SENT, CLOSED))
    assert (result.exit_code, result.stderr) == (1, "error: no\n")
    assert [each.type for each in facts(tmp_path)] == ["Opened", "Closed"]


# ------------------------------------------------------------------------------------------------- in its own process


def start(where: Path | str, file: Path | str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from cauce.cli import main; main()", "import", str(file)]
    return subprocess.Popen(
        [*command, "--bus", at(where), *FIELDS, "--json", *more],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def imported(where: Path | str, file: Path) -> dict[str, Any]:
    out, err = start(where, file).communicate()
    assert err == b""
    found: dict[str, Any] = json.loads(out)
    return found


def export(where: Path | str) -> str:
    """A digest of what `cauce export` prints, positions aside."""
    command = [
        sys.executable,
        "-c",
        "from cauce.cli import main; main()",
        "export",
        "--bus",
        at(where),
    ]
    found = hashlib.sha256()
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.update(re.sub(rb'"position":"\d+",', b"", line))
    assert process.returncode == 0
    return found.hexdigest()


def killed(where: Path | str, file: Path, after: int) -> int:
    """Start an import and end it by SIGKILL when about so many facts are stored; how many there are then."""
    process = start(where, file)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and end(where) < after:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    return head(where)


def end(where: Path | str) -> int:
    """Where the facts end: never less than there are."""

    async def looked() -> int:
        async with look(at(where), SystemClock()) as logs:
            return await logs.facts.head()

    try:
        return asyncio.run(looked())
    except CauceError:
        return 0


def head(where: Path | str) -> int:
    """How many facts there are."""

    async def count() -> int:
        async with look(at(where), SystemClock()) as logs:
            found, looked, end = 0, 0, await logs.facts.head()
            while looked < end:
                page = await logs.facts.read(after=looked, limit=1000, bodies=False)
                found, looked = found + len(page.entries), page.looked
            return found

    try:
        return asyncio.run(count())
    except CauceError:
        return 0


def test_lines_that_come_slowly_are_written_as_they_come_and_ctrl_c_keeps_them(tmp_path: Path) -> None:
    process = start(tmp_path, "-")
    assert process.stdin is not None
    process.stdin.write(lines(OPENED, SENT))
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while head(tmp_path) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert process.communicate()[1].strip() == b""
    assert [each.type for each in facts(tmp_path)] == [OPENED["type"], SENT["type"]]


def test_an_import_killed_in_the_middle_and_repeated_gives_what_an_undisturbed_one_gives(
    backend: str, each_bus: str, tmp_path: Path
) -> None:
    many = 20_000 if backend == "sqlite" else 2_000
    file = tmp_path / "f.jsonl"
    file.write_bytes(lines(*(OPENED | {"case": f"case-{n % 700}", "n": n, "type": f"T{n % 7}"} for n in range(many))))
    (tmp_path / "whole").mkdir()
    assert imported(tmp_path / "whole", file)["written"] == many
    there = [killed(each_bus, file, after) for after in (many // 10, many // 2)]
    again = imported(each_bus, file)
    assert (again["events"], again["streams"]) == (many, 700)
    # One fact is the entry in the catalogue; a server may still have had something in hand when its client was dead.
    assert again["repeated"] == there[-1] - 1 if backend == "sqlite" else again["repeated"] >= there[-1] - 1 > 0
    assert again["written"] == many - again["repeated"]
    assert export(each_bus) == export(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------ the real logs


@real
def test_the_permits_of_a_dutch_municipality_are_brought_once(tmp_path: Path) -> None:
    first = imported(tmp_path, DATA / "receipt.jsonl.gz")
    assert (first["events"], first["streams"], first["written"]) == (8577, 1434, 8577)
    again = imported(tmp_path, DATA / "receipt.jsonl.gz")
    assert (again["events"], again["streams"], again["written"]) == (8577, 1434, 0)


@real
@pytest.mark.timeout(600)
def test_the_loans_of_a_dutch_bank_survive_a_kill_in_the_middle(tmp_path: Path) -> None:
    """The whole takes 8 s on two quiet cores; the bound here only notices when it becomes another kind of slow."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = imported(tmp_path / "whole", DATA / "bpic2012.jsonl.gz")
    assert (whole["events"], whole["streams"], whole["written"]) == (262_200, 13_087, 262_200)
    assert whole["seconds"] < 90
    there = killed(tmp_path / "killed", DATA / "bpic2012.jsonl.gz", 100_000)
    assert 100_000 <= there < 262_200
    again = imported(tmp_path / "killed", DATA / "bpic2012.jsonl.gz")
    assert (again["repeated"], again["written"]) == (there - 1, 262_201 - there)
    assert export(tmp_path / "killed") == export(tmp_path / "whole")
