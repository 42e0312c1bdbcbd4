"""The demo, as one runs it: what it tells, that each mail goes out once, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from cauce import connect
from cauce.clock import SystemClock
from cauce.demo.story import Story
from cauce.demo.web import app

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


def test_the_demo_plays_in_one_process_and_ends_with_zero(run: Run, tmp_path: Path) -> None:
    began = time.monotonic()
    output, errors = run().communicate(timeout=60)
    assert errors == ""
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
        r"EmailChanged users/42 version 2 +← ChangeEmail by crm:joe",
        r"verified: every entry is what was written",
    )
    assert output.count("took a mail for") == 2
    assert time.monotonic() - began < 15
    assert (left(tmp_path), list(tmp_path.iterdir())) == ([], [])


def test_a_card_is_issued_while_its_owner_is_dead_and_the_mail_that_waited_goes_out_once(
    run: Run, tmp_path: Path
) -> None:
    began = time.monotonic()
    process = run("--each")
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
        r"verified: every entry is what was written",
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
