"""How `cauce run` ends: nothing more is begun, what is in hand is finished or handed back, and the process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cauce import Service, running
from cauce.cli.signals import LATEST
from tests.counters import Add, owner
from tests.test_instances import seen, until_seen

TESTS = Path(__file__).parent

MODULE = """
import asyncio, threading, time
from tests.counters import SEEN, Added, Context, Service, owner

def say(text):
    print(text, flush=True)

service = Service("draining", schema=SEEN)
"""

HANDLERS = {
    "finishes": """
@service.on
async def handle(event: Added, ctx: Context) -> None:
    say("begins")
    await asyncio.sleep(0.7)
    ctx.store.execute("insert into seen values (?, ?, 'one')", (event.name, event.n))
""",
    "awaits for ever": """
@service.on
async def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, 'lost')", (event.name, event.n))
    say("begins")
    await asyncio.Event().wait()
""",
    "ignores that it is cancelled": """
@service.on
async def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, 'lost')", (event.name, event.n))
    say("begins")
    while True:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass
""",
    "returns though it was cancelled": """
@service.on
async def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, 'lost')", (event.name, event.n))
    say("begins")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        pass
""",
    "hangs in a thread": """
@service.on
def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, 'lost')", (event.name, event.n))
    say("begins")
    threading.Event().wait()
""",
    "blocks the loop": """
@service.on
async def handle(event: Added, ctx: Context) -> None:
    say("begins")
    while True:
        pass
""",
    "never ends its interval": """
@service.every(0.05)
async def tick() -> None:
    say("begins")
    while True:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass
""",
}

OTHER = """
import asyncio, sys
from counters import SEEN, Added, Context, Service, running

service = Service("draining", schema=SEEN)

@service.on
async def handle(event: Added, ctx: Context) -> None:
    ctx.store.execute("insert into seen values (?, ?, 'other')", (event.name, event.n))

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run(bus_url: str, tmp_path: Path) -> Iterator[Run]:
    """Starts `cauce run` on a module with this handler, and waits until it says that it runs."""
    started = list[subprocess.Popen[str]]()
    path = os.pathsep.join((str(TESTS.parent), str(TESTS), str(tmp_path)))

    def start(text: str, *options: str) -> subprocess.Popen[str]:
        (tmp_path / "drained.py").write_text(MODULE + text)
        process = subprocess.Popen(
            [sys.executable, "-c", "from cauce.cli import main; main()", "run", "drained:service", "--bus", bus_url, *options],
            env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path,
        )  # fmt: skip
        started.append(process)
        assert process.stderr is not None
        while "running draining" not in (line := process.stderr.readline()):
            assert line, "it ended"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def begun(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"


def ended(process: subprocess.Popen[str], within: float) -> tuple[str, str]:
    """What it said on its way out. It must be gone within so many seconds, and a little for a busy machine."""
    began = time.monotonic()
    said, errors = process.communicate(timeout=within + 20)
    assert time.monotonic() - began < within + 2
    return said, errors


async def add(url: str, *names: str) -> None:
    async with running(owner, bus=url) as bus:
        for name in names:
            await bus.call(Add(name))


async def test_a_signal_lets_what_is_in_hand_finish_and_begins_nothing_more(run: Run, bus_url: str) -> None:
    process = run(HANDLERS["finishes"])
    await add(bus_url, "a", "a", "a")
    begun(process)
    process.terminate()
    said, errors = await asyncio.to_thread(ended, process, 10 + LATEST)
    assert (process.returncode, said) == (0, ""), errors
    assert await seen(bus_url, "draining") == [("a", 1, "one")]


@pytest.mark.parametrize("handler", [each for each in HANDLERS if each != "finishes"])
async def test_a_process_ends_within_its_drain_whatever_its_handlers_do(handler: str, run: Run, bus_url: str) -> None:
    process = run(HANDLERS[handler], "--drain", "0.5")
    await add(bus_url, "a")
    begun(process)
    process.terminate()
    _, errors = await asyncio.to_thread(ended, process, 0.5 + LATEST)
    assert process.returncode == 0, errors
    assert await seen(bus_url, "draining") == [], "it is handled again, so nothing of it may be there"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("handler", ["awaits for ever", "hangs in a thread", "blocks the loop"])
async def test_a_second_signal_ends_a_process_at_once_as_if_killed_by_it(
    handler: str, number: signal.Signals, run: Run, bus_url: str
) -> None:
    process = run(HANDLERS[handler], "--drain", "600")
    await add(bus_url, "a")
    begun(process)
    process.terminate()
    await asyncio.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert await asyncio.to_thread(process.wait, 20) == 128 + number


@pytest.mark.parametrize("handler", ["ignores that it is cancelled", "hangs in a thread", "blocks the loop"])
async def test_all_children_of_run_each_end_within_their_drain(handler: str, run: Run, bus_url: str) -> None:
    process = run(HANDLERS[handler], "--drain", "0.5", "--each")
    await add(bus_url, "a")
    begun(process)
    process.terminate()
    _, errors = await asyncio.to_thread(ended, process, 0.5 + LATEST)
    assert process.returncode == 0
    assert "is killed" not in errors, "they ended by themselves"


async def test_a_second_signal_ends_run_each_and_all_its_children_at_once(run: Run, bus_url: str) -> None:
    process = run(HANDLERS["hangs in a thread"], "--drain", "600", "--each")
    await add(bus_url, "a")
    begun(process)
    process.terminate()
    await asyncio.sleep(0.2)
    process.terminate()
    # The end of the output comes when the children are gone, too.
    await asyncio.to_thread(process.communicate, timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("handler", ["awaits for ever", "ignores that it is cancelled", "hangs in a thread"])
async def test_what_is_handed_back_is_taken_by_another_instance_at_once(
    handler: str, run: Run, bus_url: str, program: Callable[..., subprocess.Popen[str]]
) -> None:
    process = run(HANDLERS[handler], "--drain", "0.5")
    await add(bus_url, "a")
    begun(process)
    other = program(OTHER, bus_url)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.terminate()
    await until_seen(bus_url, "draining", 1)
    assert time.monotonic() - began < 8, "long before a lease is over"
    await asyncio.to_thread(ended, process, 0.5 + LATEST)
    assert await seen(bus_url, "draining") == [("a", 1, "other")]


async def test_an_interval_that_swallows_that_it_was_cancelled_is_not_run_again(bus_url: str) -> None:
    service, runs, begun = Service("ticking"), 0, asyncio.Event()

    @service.every(0.01)
    async def tick() -> None:
        nonlocal runs
        runs += 1
        begun.set()
        if runs == 1:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)

    async with running(service, bus=bus_url):
        await begun.wait()
    await asyncio.sleep(0.2)
    assert runs == 1
