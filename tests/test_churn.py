"""Instances that come and go under load: nothing is lost, no effect is stored twice, and who stays goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from cauce import Bus, CauceError, OutcomeUnknown, connect
from cauce.accept import slot_of
from tests.chaos import EFFECTS, Add
from tests.history import Effect, History, Told, findings
from tests.kept import rows, store_of
from tests.test_history import read_logs
from tests.test_instances import standing, until, until_shared

ROOT = Path(__file__).parent.parent
SEED = int(os.environ.get("CAUCE_CHAOS_SEED", "1"))
CHURNING = float(os.environ.get("CAUCE_CHURN_SECONDS", "0"))
"""How long instances come and go; 0: half a minute on SQLite, and a fifth of that elsewhere."""

SETTLING = 60.0
MOVING = 5.0
"""Seconds a call takes at most while instances come and go in good order: it is measured at 0.3 to 1.7 here."""

STANDING = 3.0
"""Seconds between two calls for a thing whose slot stays where it is: measured at 0.2 to 1 on two busy cores."""

# Who holds all slots and gives some away keeps the first ones.
STAYING = next(f"stays{n}" for n in range(999) if slot_of(f"stays{n}") == 0)
KEYS = [f"thing{n}" for n in range(32)]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(each_bus: str, tmp_path: Path) -> Iterator[Start]:
    """Starts an instance of the services of the chaos test. None outlives the test; what they log is kept in a file."""
    started = list[subprocess.Popen[str]]()

    def begin(which: str, name: str) -> subprocess.Popen[str]:
        with (tmp_path / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", "from tests.chaos import main; main()", which, each_bus, name],
                env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def schema_of(url: str) -> str:
    return EFFECTS["postgresql" if url.startswith("postgresql") else "sqlite"]


async def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"


async def terminated(process: subprocess.Popen[str]) -> int:
    process.terminate()
    return await asyncio.to_thread(process.wait, 60)


def told_by(folder: Path) -> str:
    """The end of what each instance logged, for whoever looks at a failure."""
    return "\n".join(f"{each.name}:\n{each.read_text()[-2000:]}" for each in sorted(folder.glob("*.log")))


async def calling(bus: Bus, history: History, failed: Counter[str], longest: list[float], random: Random) -> None:
    """Call without end, count what is not accepted, and note how long the longest took, in seconds."""
    while True:
        key, id, began = random.choice(KEYS), bus.clock.id(), time.monotonic()
        try:
            receipt = await bus.call(Add(key), id=id, timeout=20)
        except CauceError as error:
            failed[f"{type(error).__name__}: {error}"] += 1
            history.told.append(Told(id, key, "unknown" if isinstance(error, OutcomeUnknown) else "nothing"))
        else:
            history.told.append(Told(id, key, "accepted", receipt.version, receipt.position))
        longest[0] = max(longest[0], time.monotonic() - began)
        await asyncio.sleep(random.uniform(0, 0.03))


async def read(bus: Bus, url: str, history: History) -> None:
    """Add what is stored now to what the clients were told."""
    stored = await rows(url, "reacting", schema_of(url), "select number, key, version, instance from effects")
    history.effects = [Effect(*row) for row in stored]
    await read_logs(bus, history)


async def quiet(bus: Bus, url: str, history: History) -> list[str]:
    """Wait until there is nothing to be found any more; what there is when the time is over."""
    until, found = time.monotonic() + SETTLING, ["nothing was read"]
    schema = schema_of(url)
    while found and time.monotonic() < until:
        await asyncio.sleep(0.5)
        await read(bus, url, history)
        found = findings(history)
        async with store_of(url, "reacting", [schema]) as store:
            left = await store.inventory()
        found += [f"{left.outbox} lie in the outbox"] * bool(left.outbox)
        found += [f"{len(left.waiting)} wait"] * bool(left.waiting)
    return found


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each for each in results if not isinstance(each, asyncio.CancelledError)] == []


async def test_a_rolling_restart_under_load_loses_nothing_and_no_caller_notices(
    each_bus: str, start: Start, tmp_path: Path
) -> None:
    history, failed, longest = History(), Counter[str](), [0.0]
    instances = [start("both", f"first{n}") for n in range(3)]
    for instance in instances:
        await ready(instance)
    async with standing(each_bus, "reacting", schema_of(each_bus)) as holders:
        await until_shared(holders, 5, 5, 6)
    async with connect(each_bus) as bus:
        clients = [
            asyncio.ensure_future(calling(bus, history, failed, longest, Random(f"{SEED} {n}"))) for n in range(8)
        ]
        for n in range(3):
            many = len(history.told)
            await until(lambda many=many: len(history.told) > many + 200)  # type: ignore[misc]
            assert await terminated(instances[n]) == 0, told_by(tmp_path)
            instances[n] = start("both", f"second{n}")
            await ready(instances[n])
        await ended(clients)
        assert await quiet(bus, each_bus, history) == [], told_by(tmp_path)
    assert dict(failed) == {}, told_by(tmp_path)
    assert longest[0] < MOVING, "a call waits for a slot that moves, not for a lease"
    assert sum(told.outcome == "accepted" for told in history.told) > 600
    by = {effect.instance for effect in history.effects}
    assert len({name for name in by if name.startswith("first")}) == 3, "all of them were at it"
    for instance in instances:
        assert await terminated(instance) == 0


# ------------------------------------------------------------------------------ joining and leaving, 5 times a second


async def steady(bus: Bus, key: str, gaps: list[float]) -> None:
    """Call for one thing without end; the longest time between two that were accepted, in seconds."""
    last = time.monotonic()
    while True:
        with contextlib.suppress(CauceError):
            await bus.call(Add(key), timeout=20)
            now = time.monotonic()
            gaps.append(now - last)
            last = now
        await asyncio.sleep(0.005)


async def churning(start: Start, random: Random, seconds: float) -> tuple[int, int]:
    """Let instances join and leave every 200 ms, some in good order and some killed; how many did each."""
    there, leaving, began = list[subprocess.Popen[str]](), list[subprocess.Popen[str]](), time.monotonic()
    killed = left = 0
    due = began
    while (now := time.monotonic()) < began + seconds:
        if len(there) < 5 and (len(there) < 2 or random.random() < 0.5):
            there.append(start("both", f"churn{killed + left + len(there)}"))
        else:
            process = there.pop(random.randrange(len(there)))
            if random.random() < 0.5:
                process.kill()
                killed += 1
            else:
                process.terminate()
                left += 1
            leaving.append(process)
        due = max(due + 0.2, now)
        await asyncio.sleep(due - now)
    for process in there:
        process.terminate()
    for process in (*there, *leaving):
        await asyncio.to_thread(process.wait, 60)
    return killed, left


@pytest.mark.timeout((CHURNING or 30) + 3 * SETTLING)
async def test_instances_that_join_and_leave_all_the_time_lose_nothing_and_do_not_stop_the_others(
    each_bus: str, start: Start, tmp_path: Path
) -> None:
    history, failed, longest, gaps = History(), Counter[str](), [0.0], list[float]()
    stays = start("both", "stays")
    await ready(stays)
    async with connect(each_bus) as bus:
        clients = [
            asyncio.ensure_future(calling(bus, history, failed, longest, Random(f"{SEED} {n}"))) for n in range(8)
        ]
        clients.append(asyncio.ensure_future(steady(bus, STAYING, gaps)))
        killed, left = await churning(start, Random(SEED), CHURNING or (30 if each_bus.startswith("sqlite") else 6))
        await ended(clients)
        assert await quiet(bus, each_bus, history) == [], told_by(tmp_path)
    assert stays.poll() is None
    assert await terminated(stays) == 0
    told = f"{killed} killed, {left} left, longest call {longest[0]:.2f} s, longest gap {max(gaps):.2f} s"
    sys.stderr.write(told + "\n")
    assert {effect.instance for effect in history.effects if effect.key == STAYING} == {"stays"}
    assert max(gaps) < STANDING, "a slot that does not move does not wait for those that do"
    assert min(killed, left) > 0
    assert {each.partition(":")[0] for each in failed} <= {"NoAnswer", "OutcomeUnknown"}, "what may be repeated"
