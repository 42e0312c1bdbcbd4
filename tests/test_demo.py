"""The demo, as one runs it: what it tells, that each mail goes out once, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from cauce import Refused, connect, running
from cauce.backends.nats.temporary import beside as beside_nats
from cauce.backends.postgres.temporary import beside as beside_postgres
from cauce.clock import SystemClock
from cauce.demo.ground import ground
from cauce.demo.shop import mails
from cauce.demo.story import Story
from cauce.demo.web import app
from tests.servers import Nats, Postgres

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Starts the demo; all that it starts can be told by the folder for its temporary files."""

    def start(*options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "from cauce.cli import main; main()", "demo", *options],
            env=os.environ | {"TMPDIR": str(tmp_path), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def left(tmp_path: Path) -> list[str]:
    """The processes that have the folder in their environment, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={tmp_path}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def said(output: str, *lines: str) -> None:
    """These stand in the output, in this order."""
    at = 0
    for line in lines:
        found = re.compile(line).search(output, at)
        assert found is not None, f"{line!r} is not there, or not at its place:\n{output}"
        at = found.end()


@pytest.fixture
def where(backend: str, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The options that name each backend in turn. Nothing that belongs to the demo may be left on its server."""
    if backend == "sqlite":
        yield []
    elif backend == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        yield ["--bus", postgres.url(schema="shared")]
        assert postgres.sql("select nspname from pg_namespace where nspname like 'shared%'") == []
    else:
        nats: Nats = request.getfixturevalue("nats")
        # It does flush, but cannot say so.
        yield ["--bus", f"{nats.url('shared')}?sync=always"]
        assert [stream for stream in nats.streams() if "shared" in stream] == []


def test_the_demo_tells_the_same_story_on_every_backend_and_ends_with_zero(
    run: Run, tmp_path: Path, backend: str, where: list[str]
) -> None:
    began = time.monotonic()
    process = run(*where)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), output
    said(
        output,
        r"users +recorded UserRegistered, users/42 version 1",
        r"mails +asked users for users/42: Ana Álvarez, ana@example.org",
        r"Subject: Welcome, Ana Álvarez",
        r"users +says no: user 42 is already registered",
        r"users +recorded EmailChanged, users/42 version 2 +← ChangeEmail by crm:joe",
        r"crm +its view says who has example.net: 42",
        r"cards +its copy of users/42: Ana Álvarez, ana@example.net",
        r"took a mail for ana@example.net: Your card A-1",
        r"demo +equal\n",
        r"2 mails, each once",
        r"facts \d+: EmailChanged users/42 version 2 +← ChangeEmail by crm:joe",
        r"commands \d+: RegisterUser users/42 version 1 +← rejected: user 42 is already registered",
        r"records \d+: Card cards/A-1 version 1",
        r"log .* verified: every entry is what was written",
    )
    assert output.count("took a mail for") == 2
    assert time.monotonic() - began < 15
    assert (left(tmp_path), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"], indirect=True)
def test_a_card_is_issued_while_its_owner_is_dead_and_the_mail_that_waited_goes_out_once(
    run: Run, tmp_path: Path, backend: str, where: list[str]
) -> None:
    began = time.monotonic()
    process = run("--each", *where)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), output
    said(
        output,
        r"took a mail for ana@example.net: Your card A-1",
        r"kill -9 \d+",
        r"demo +\d+ +users does not run",
        r"cards +\d+ +recorded CardIssued, cards/A-2 version 1 +← its own copy",
        r"users +\d+ +runs again, in process \d+",
        r"demo +\d+ +equal\n",
        r"3 mails, each once",
        r"log .* verified: every entry is what was written",
    )
    said(
        output,
        r"run +\d+ +users ended by signal 9",
        r"run +\d+ +started users",
        r"took a mail for ana@example.net: Your card A-2",
    )
    said(output, r"kill -9", r"mails +\d+ +the mail for cards/A-2 waits, and that is no failed attempt +← NoAnswer")
    assert output.count("took a mail for") == 3
    who = dict(re.findall(r"(\w+) +(\d+) +(?:recorded|told only|its view)", output))
    assert len({*who.values(), str(process.pid)}) == 5, "each service in a process of its own"
    assert time.monotonic() - began < 20
    assert (left(tmp_path), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
@pytest.mark.parametrize("until", ["started users", "recorded CardIssued, cards/A-1"])
def test_nothing_goes_on_when_the_demo_is_ended_in_the_middle(
    run: Run, tmp_path: Path, number: signal.Signals, until: str
) -> None:
    process = run("--each")
    assert process.stdout is not None
    while until not in (line := process.stdout.readline()):
        assert line, "it ended before"
    assert len(left(tmp_path)) >= 3
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    deadline = time.monotonic() + 30
    while left(tmp_path):
        assert time.monotonic() < deadline, left(tmp_path)
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["postgresql", "nats"], indirect=True)
def test_nothing_stays_on_a_server_when_the_demo_is_ended_in_the_middle(
    run: Run, tmp_path: Path, where: list[str]
) -> None:
    process = run(*where)
    assert process.stdout is not None
    while "recorded UserRegistered" not in (line := process.stdout.readline()):
        assert line, "it ended before"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, "")
    assert (left(tmp_path), list(tmp_path.iterdir())) == ([], [])


async def test_services_of_the_demo_keep_what_is_theirs_where_they_are_told(postgres: Postgres, tmp_path: Path) -> None:
    schemas = "select nspname from pg_namespace where nspname like 'mine%'"
    async with ground(None, postgres.url(schema="mine"), SystemClock()) as place:
        assert place.file is not None
        assert place.store is not None
        async with running(mails.service, bus=place.url, store=place.store):
            assert [name for (name,) in postgres.sql(schemas)] == [f"{place.store.partition('schema=')[2]}_mails"]
    assert postgres.sql(schemas) == []
    async with ground(None, f"sqlite:///{tmp_path}", SystemClock()) as place:
        assert place.store is not None
        async with running(mails.service, bus=place.url, store=place.store):
            assert len(list(tmp_path.glob("cauce-demo-*/mails/store.db"))) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bus", "store", "cure"),
    [
        ("sqlite:///shop.db", None, "leave --bus out"),
        ("amqp://host", None, "postgresql://host/database or nats://host:4222"),
        (None, "sqlite:///nowhere/at-all", "no folder: make it"),
        (None, "nats://host", "write sqlite:///folder or postgresql://host/database"),
    ],
)
async def test_the_demo_says_where_it_cannot_play(bus: str | None, store: str | None, cure: str) -> None:
    with pytest.raises(Refused, match=cure):
        async with ground(bus, store, SystemClock()):
            pass


def test_the_bus_of_the_demo_is_another_one_on_the_same_server() -> None:
    assert beside_postgres("postgresql:///db?host=/run/pg&schema=shop&sslmode=disable", "demo_1") == (
        "postgresql:///db?host=%2Frun%2Fpg&sslmode=disable&schema=shop_demo_1"
    )
    assert beside_postgres("postgresql://u:p%40@host/db", "demo_1") == "postgresql://u:p%40@host/db?schema=cauce_demo_1"
    assert beside_nats("nats://u:p%40@a:4222,b/shop?replicas=3", "demo_1", "/f") == (
        "nats://u:p%40@a:4222,b/shop_demo_1?replicas=3&files=%2Ff"
    )
    assert beside_nats("tls://host", "demo_1", "/f") == "tls://host/demo_1?files=%2Ff"


@pytest.mark.parametrize("options", [(), ("--each",)], ids=["together", "each"])
def test_the_demo_can_be_left_open_for_a_browser(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    process = run("--keep", *options)
    assert process.stdout is not None
    while (found := re.search(r"The form is at (http://\S+), ", line := process.stdout.readline())) is None:
        assert line, "it ended before"
    page = httpx.get(f"{found[1]}/users/42", trust_env=False, timeout=10)
    assert "ana@example.net" in page.text
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    said(output, "mails, each once", "verified")
    assert left(tmp_path) == []


def test_the_form_says_so_when_nobody_decides(bus_url: str) -> None:
    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with connect(bus_url) as bus:
            story = Story(Console(quiet=True), SystemClock().monotonic)
            transport = httpx.ASGITransport(app(bus, story, "token"))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as browser:
                fields = {"token": "token", "user_id": "42", "name": "Ana", "email": "ana@example.org"}
                return await browser.post("/users", data=fields), await browser.get("/users/42")

    posted, shown = asyncio.run(ask())
    assert (posted.status_code, shown.status_code) == (503, 503)
    assert "nobody serves users" in posted.text
    assert "ana@example.org" in posted.text, "what was filled in is still there"
