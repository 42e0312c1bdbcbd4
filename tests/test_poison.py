"""One poison among a hundred messages, over processes that share the work, on every backend: only its thing waits."""

from __future__ import annotations

import asyncio
import subprocess
from collections import defaultdict
from collections.abc import Callable

import pytest

from cauce import Bus, connect, running
from cauce.codec import Entry
from cauce.log import Filter, entries_of
from tests.counters import Add, owner
from tests.noting import POISON
from tests.test_instances import letters_of

Program = Callable[..., subprocess.Popen[str]]

RUN = "import asyncio; from tests.noting import main; asyncio.run(main())"
JOBS = [f"job{n}" for n in range(10)]


async def noted(bus: Bus) -> dict[str, list[int]]:
    """For each thing what was noted of it, in the order of the log."""
    found = defaultdict[str, list[int]](list)
    async for entry in entries_of(bus.facts, Filter(domains=frozenset({"notes"}))):
        found[entry.key].append(number_of(entry))
    return dict(found)


def number_of(entry: Entry) -> int:
    assert entry.body is not None
    return int(entry.body.partition(b'"n":')[2].partition(b",")[0])


# What a process leaves that dies is kept by the store: on SQLite and PostgreSQL other tests see to it.
@pytest.mark.parametrize(
    ("backend", "how"), [("sqlite", "raises"), ("postgresql", "raises"), ("nats", "raises"), ("nats", "dies")]
)
async def test_one_poison_among_a_hundred_delays_only_its_own_thing_though_it_kills_processes_or_they_are_killed(
    how: str, each_bus: str, program: Program
) -> None:
    processes = list[subprocess.Popen[str]]()

    async def start() -> None:
        process = program(RUN, each_bus, how)
        assert process.stdout is not None
        processes.append(process)
        await asyncio.to_thread(process.stdout.readline)

    async with running(owner, bus=each_bus) as bus:
        for _ in range(10):
            await asyncio.gather(*(bus.call(Add(job)) for job in JOBS))
    expected = {job: list(range(1, POISON[1] if job == POISON[0] else 11)) for job in JOBS}
    await asyncio.gather(start(), start())
    async with connect(each_bus) as bus:
        if how == "raises":
            processes[0].kill()
        async with asyncio.timeout(60):
            while not (letters := await letters_of(each_bus, "noting")) or await noted(bus) != expected:
                if sum(each.poll() is None for each in processes) < 2:
                    # What looks after them does so.
                    await start()
                await asyncio.sleep(0.05)
    if how == "raises":
        await asyncio.to_thread(processes[0].wait)
    (letter,) = letters
    assert (letter.stream, letter.behind) == ("counters/job7", 7)
    # An attempt counts before it begins: who was killed in the third leaves one to whoever goes on.
    assert letter.attempts == 3 or (how == "raises" and letter.attempts == 4)
    died = [each.returncode for each in processes if each.poll() is not None]
    if how == "dies":
        # Where it is given away in between, that process is not counted.
        assert set(died) == {7}
        assert 3 <= len(died) <= 4
    else:
        assert letter.error == "ValueError: poison"
        assert died == [-9]
