"""Runs each service of the demo in a process of its own, and tells what these processes say."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cauce.bus import Bus
from cauce.demo.ground import Ground
from cauce.demo.story import Story
from cauce.errors import Unavailable
from cauce.runtime import connect

__all__ = ["SERVICES", "apart", "until_runs"]

SERVICES = ("users", "mails", "cards", "crm")

_RUN = ("run", "cauce.demo.shop", "--each", "--drain", "2", "--with-parent")
_PATIENCE = 30.0
_RUNS = re.compile(r"cauce\.demo\.shop\.(\w+):service runs in process (\d+)")
_ENDED = re.compile(r"cauce\.demo\.shop\.(\w+):service (ended .*)")
_SAID = re.compile(r"\S+ \S+ INFO +(?:\[\S+\] )?(\w+: .* ← .*)")
_WAITS = re.compile(
    r"\S+ \S+ WARNING +(?:\[\S+\] )?\w+: position \d+ \((\S+)\) failed 0 times and waits \S+ s: (\w+): (.*)"
)


@asynccontextmanager
async def apart(ground: Ground, story: Story) -> AsyncIterator[Bus]:
    """What `cauce run cauce.demo.shop --each` starts, and a client to talk to it. All has ended when the block is left.

    Raises `Unavailable` if they do not start.
    """
    where = "--bus", ground.url, *(() if ground.store is None else ("--store", ground.store))
    async with connect(ground.url) as bus:
        # A session of its own: Ctrl-C reaches us only, and we end them in good order.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from cauce.cli import main; main()", *_RUN, *where,
            # What others are told by it is not about this bus.
            env={name: value for name, value in os.environ.items() if name != "CAUCE_STORE"},
            stdin=PIPE, stderr=PIPE, start_new_session=True,
        )  # fmt: skip
        last = deque[str](maxlen=40)
        story.processes["run"] = process.pid
        listening = asyncio.get_running_loop().create_task(_listen(process, story, last))
        try:
            for service in SERVICES:
                await until_runs(bus, service)
            yield bus
        except Exception:
            sys.stderr.write("".join(last))
            raise
        finally:
            await _end(process)
            # Who still holds the pipe does not keep us.
            await asyncio.wait({listening}, timeout=1.0)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def until_runs(bus: Bus, service: str, *, but: int = 0) -> int:
    """Wait until a service runs, in another process than one that is known; gives its process."""
    until = bus.clock.monotonic() + _PATIENCE
    while bus.clock.monotonic() < until:
        for instance in await bus.wire.instances():
            if (instance.service, instance.state) == (service, "running") and instance.pid != but:
                return instance.pid
        await bus.clock.sleep(0.02)
    raise Unavailable(f"{service} does not run after {_PATIENCE:g} s: start it with cauce run, and see what it says")


async def _end(process: Process) -> None:
    """The supervisor ends its children; were it killed itself, they would notice and end."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_PATIENCE):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _listen(process: Process, story: Story, last: deque[str]) -> None:
    """Tell what is part of the story, each thing once: what waits is tried again and again."""
    assert process.stderr is not None
    told = set[str]()
    async for line in process.stderr:
        text = line.decode("utf-8", "replace")
        last.append(text)
        if found := _RUNS.match(text):
            story.processes[found[1]] = int(found[2])
            story.tell("run", f"started {found[1]} in process {found[2]}")
        elif found := _ENDED.match(text):
            story.tell("run", f"{found[1]} {found[2].strip()}")
        elif (said := _said(text)) and said not in told:
            told.add(said)
            story.repeat(said)


def _said(text: str) -> str:
    """What a service tells, or that a mail waits."""
    if found := _SAID.match(text):
        return found[1]
    if found := _WAITS.match(text):
        return f"mails: the mail for {found[1]} waits, and that is no failed attempt ← {found[2]}: {found[3].strip()}"
    return ""
