"""`cauce consumers` and `cauce top` tell how far all are, whether services run or not."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cauce import running
from cauce.cli import main
from cauce.cli.sight import age, rate
from cauce.meter import Meter
from tests.test_lag import Read, bills, copies, owner, say

MAIN = "from cauce.cli import main; main()"


async def cli(*arguments: str) -> str:
    """What a command prints, run beside the services of this process."""
    result = await asyncio.to_thread(CliRunner().invoke, main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


async def told(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await cli(*arguments, "--json"))
    return found


def one(found: dict[str, Any], service: str, name: str) -> dict[str, Any]:
    (row,) = (each for each in found["consumers"] if (each["service"], each["name"]) == (service, name))
    return dict(row)


async def test_consumers_tells_lag_age_and_what_is_in_flight_while_a_handler_is_at_work(each_bus: str) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def work(event: Read) -> None:
        started.set()
        await go.wait()

    async with running(bills(work), bus=each_bus, meter=Meter()) as bus:
        await say(each_bus, *(Read("m1", n) for n in range(5)))
        await asyncio.wait_for(started.wait(), 60)
        row = one(await told("consumers", "bills", "--bus", each_bus, "--window", "0"), "bills", "bill")
        assert (row["lag"], row["in_flight"], row["at_least"], row["rate"]) == (5, 1, False, None)
        assert row["seconds"] > 0
        go.set()
        await bus.settled()
    row = one(await told("consumers", "--bus", each_bus, "--window", "0.1"), "bills", "bill")
    assert (row["lag"], row["in_flight"], row["rate"]) == (0, None, 0), "nobody runs who knows what is in flight"


async def test_who_has_no_meter_leaves_in_flight_blank(bus_url: str) -> None:
    async with running(bills(), bus=bus_url):
        text = await cli("consumers", "--bus", bus_url, "--window", "0")
    head, *rows = text.splitlines()
    assert head.split()[:4] == ["SERVICE", "CONSUMER", "KIND", "LAG"]
    assert [row.split() for row in rows] == [
        ["bills", "bill", "on", "0", "0", "s", "-", "0", "0", "0", "-"],
        ["bills", "close", "on", "0", "0", "s", "-", "0", "0", "0", "-"],
    ]


async def test_top_once_tells_instances_and_consumers_as_one_line_of_json(each_bus: str) -> None:
    async with running(owner(), copies(), bus=each_bus, meter=Meter()):
        lines = (await cli("top", "--once", "--json", "--interval", "0.1", "--bus", each_bus)).splitlines()
        text = await cli("top", "--once", "--interval", "0.1", "--bus", each_bus)
    (line,) = lines
    found = json.loads(line)
    assert [(each["service"], each["state"]) for each in found["instances"]] == [
        ("copies", "running"), ("meters", "running"),
    ]  # fmt: skip
    assert one(found, "meters", "decide meters")["in_flight"] == 0
    assert one(found, "copies", "sums")["kind"] == "view"
    assert "decide meters" in text
    assert "running" in text


async def test_an_unknown_service_is_refused_in_one_line(bus_url: str) -> None:
    async with running(bills(), bus=bus_url):
        pass
    for command in (["consumers", "nobody"], ["top", "nobody", "--once"]):
        result = await asyncio.to_thread(CliRunner().invoke, main, [*command, "--bus", bus_url])
        assert result.exit_code == 1
        assert "nobody" in result.output
        assert result.output.count("\n") == 1


def test_where_there_is_no_bus_nothing_is_made(tmp_path: Path) -> None:
    for command in ("consumers", "top"):
        result = CliRunner().invoke(main, [command, "--bus", f"sqlite:///{tmp_path}/none.db"])
        assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_store_elsewhere_is_looked_at_when_it_is_named(bus_url: str, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/elsewhere"
    async with running(bills(), bus=bus_url, store=store):
        pass
    await say(bus_url, Read("m", 1))
    there = one(await told("consumers", "--bus", bus_url, "--store", store, "--window", "0"), "bills", "bill")
    assert there["lag"] == 1
    away = one(await told("consumers", "--bus", bus_url, "--window", "0"), "bills", "bill")
    assert away["lag"] is None
    assert "--store" in away["note"]


@pytest.mark.parametrize("key", [b"q", b"\x03"])
async def test_top_is_live_on_a_terminal_until_q_or_ctrl_c(bus_url: str, key: bytes) -> None:
    async with running(bills(), bus=bus_url):
        await asyncio.to_thread(_live, bus_url, key)


def _live(url: str, key: bytes) -> None:
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "top", "--bus", url, "--interval", "0.2"],
        stdin=there, stdout=there, stderr=there, start_new_session=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        preexec_fn=_control,
    )  # fmt: skip
    os.close(there)
    shown, deadline = b"", time.monotonic() + 60
    while b"bills" not in shown or shown.count(b"bill") < 4:
        assert time.monotonic() < deadline, shown
        if select.select([here], [], [], 1.0)[0]:
            shown += os.read(here, 65_536)
    os.write(here, key)
    drain = threading.Thread(target=_read_on, args=(here,), daemon=True)
    drain.start()
    assert process.wait(60) == 0
    os.close(here)


def _control() -> None:
    """Ctrl-C is a signal only on the terminal that controls."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_on(number: int) -> None:
    try:
        while os.read(number, 65_536):
            pass
    except OSError:
        return


@pytest.mark.parametrize("words", [("consumers", "--window"), ("top", "--once", "--interval")])
def test_what_is_no_length_of_time_is_wrong_usage(words: tuple[str, ...]) -> None:
    found = CliRunner().invoke(main, [*words, "nan"])
    assert found.exit_code == 2
    assert "nan is no length of time: write seconds" in found.output


def test_ages_and_rates_are_told_in_few_letters() -> None:
    cases: list[tuple[Callable[[float | None], str], float | None, str]] = [
        (age, None, "-"), (age, 0, "0 s"), (age, 1.25, "1.2 s"), (age, 90, "1.5 min"), (age, 7200, "2.0 h"),
        (age, 172_800, "2.0 d"), (rate, None, "-"), (rate, 0, "0"), (rate, 0.25, "0.2"), (rate, 1234.5, "1234"),
    ]  # fmt: skip
    for tell, number, text in cases:
        assert tell(number) == text
