"""Services that are killed and stopped at random under load: nothing is lost, done twice, out of order, goes back."""

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
from random import Random
from typing import Any

import apsw
import pytest

from cauce import Bus, CauceError, NoAnswer, OutcomeUnknown, Rejected, connect
from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.clock import SystemClock
from cauce.log import Filter, entries_of
from tests.chaos import Add, Rows, Tally
from tests.history import Copy, Effect, Fact, History, Said, Seen, Told, findings

ROOT = Path(__file__).parent.parent
SECONDS = float(os.environ.get("CAUCE_CHAOS_SECONDS", "12"))
SEED = int(os.environ.get("CAUCE_CHAOS_SEED", "1"))
SETTLING = 60.0
KEYS = [f"thing{n}" for n in range(24)]


# ------------------------------------------------------------------------------------------------- the checker


def good() -> History:
    """A short run in which all is well: two wishes for a, one for b, each with its effect and its answer."""
    return History(
        told=[
            Told("w1", "a", "accepted", 1, 1),
            Told("w2", "a", "sent"),
            Told("w3", "b", "unknown"),
            Told("w4", "b", "rejected"),
            Told("w5", "b", "nothing"),
            Told("w6", "b", "unknown"),
        ],
        facts=[
            Fact(1, "a", 1, "Added", "f1", "w1"),
            Fact(2, "a", 2, "Added", "f2", "w2"),
            Fact(4, "b", 1, "Added", "f3", "w3"),
            Fact(5, "a", 3, "Confirmed", "f4", "c1"),
            Fact(6, "b", 2, "Confirmed", "f5", "c3"),
            Fact(7, "a", 4, "Confirmed", "f6", "c2"),
        ],
        effects=[Effect(1, "a", 1), Effect(2, "b", 1), Effect(3, "a", 2)],
        said=[Said("w2", "a", ""), Said("c1", "a", "f1"), Said("c3", "b", "f3"), Said("c2", "a", "f2")],
        seen=[Seen("fetch", "a", 1), Seen("record", "a", 3), Seen("fetch", "a", 1), Seen("fetch", "a", 4)],
        copies={
            "record": {"a": Copy(2, 2, 4), "b": Copy(1, 1, 2)},
            "view": {"a": Copy(2, 2, 4), "b": Copy(1, 1, 2)},
        },
    )


def test_a_run_in_which_all_is_well_has_no_findings() -> None:
    assert findings(good()) == []
    assert findings(History()) == []


def lost(history: History) -> None:
    del history.facts[0]


def lost_though_sent(history: History) -> None:
    history.facts[1] = history.facts[1]._replace(cause="other")


def twice(history: History) -> None:
    history.facts.append(Fact(8, "a", 5, "Added", "f7", "w1"))


def unknown_twice(history: History) -> None:
    history.facts.append(Fact(8, "b", 3, "Added", "f7", "w3"))


def rejected_but_there(history: History) -> None:
    history.facts.append(Fact(8, "b", 3, "Added", "f7", "w4"))


def nothing_but_there(history: History) -> None:
    history.facts.append(Fact(8, "b", 3, "Added", "f7", "w5"))


def elsewhere(history: History) -> None:
    history.told[0] = history.told[0]._replace(position=2)


def of_another_thing(history: History) -> None:
    history.told[2] = history.told[2]._replace(key="a")


def a_gap(history: History) -> None:
    history.facts[2] = history.facts[2]._replace(version=2)


def a_version_twice(history: History) -> None:
    history.facts[1] = history.facts[1]._replace(version=1)


def positions_that_fall(history: History) -> None:
    history.facts[2] = history.facts[2]._replace(position=1)


def one_id_twice(history: History) -> None:
    history.facts[4] = history.facts[4]._replace(id="f4")


def no_effect(history: History) -> None:
    del history.effects[2]


def an_effect_twice(history: History) -> None:
    history.effects.append(Effect(4, "b", 1))


def an_effect_of_nothing(history: History) -> None:
    history.effects.append(Effect(4, "a", 3))


def effects_out_of_order(history: History) -> None:
    history.effects[:] = [Effect(1, "a", 2), Effect(2, "b", 1), Effect(3, "a", 1)]


def never_said(history: History) -> None:
    del history.said[2]


def said_twice(history: History) -> None:
    history.said.append(Said("c4", "a", "f1"))


def said_out_of_order(history: History) -> None:
    history.said[1], history.said[3] = history.said[3], history.said[1]


def never_decided(history: History) -> None:
    del history.facts[5]


def decided_twice(history: History) -> None:
    history.facts.append(Fact(8, "a", 5, "Confirmed", "f7", "c2"))


def decided_out_of_order(history: History) -> None:
    history.facts[3] = history.facts[3]._replace(cause="c2")
    history.facts[5] = history.facts[5]._replace(cause="c1")


def an_answer_to_nothing(history: History) -> None:
    history.facts.append(Fact(8, "a", 5, "Confirmed", "f7", "c9"))


def went_back(history: History) -> None:
    history.seen.append(Seen("record", "a", 2))


def a_copy_that_lags(history: History) -> None:
    history.copies["record"]["a"] = Copy(2, 1, 3)


def a_copy_that_counted_twice(history: History) -> None:
    history.copies["view"]["b"] = Copy(2, 1, 2)


def a_copy_that_is_missing(history: History) -> None:
    del history.copies["view"]["b"]


def a_copy_of_nothing(history: History) -> None:
    history.copies["view"]["c"] = Copy(1, 0, 1)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lost, "wish w1 for a was accepted and is not there"),
        (lost_though_sent, "wish w2 for a was sent and is not there"),
        (twice, "wish w1 for a is there 2 times: versions [1, 5]"),
        (unknown_twice, "wish w3 for b is there 2 times: versions [1, 3]"),
        (rejected_but_there, "wish w4 for b stands at version 3, its client was told rejected"),
        (nothing_but_there, "wish w5 for b stands at version 3, its client was told nothing"),
        (elsewhere, "wish w1 for a was told version 1 at 2, it stands at 1 at 1"),
        (of_another_thing, "wish w3 for a is a fact of b"),
        (a_gap, "b goes from version 0 to 2"),
        (a_version_twice, "a goes from version 1 to 1"),
        (positions_that_fall, "position 1 comes after 2"),
        (one_id_twice, "fact f4 is there 2 times"),
        (no_effect, "a version 2 has no effect"),
        (an_effect_twice, "b version 1 has its effect 2 times"),
        (an_effect_of_nothing, "a version 3 has an effect, and is no such fact"),
        (effects_out_of_order, "a version 1 (by ) has its effect after version 2 (by )"),
        (never_said, "because of b version 1 a command was said 0 times"),
        (said_twice, "because of a version 1 a command was said 2 times"),
        (said_out_of_order, "a: the command of version 1 was said after that of 2"),
        (never_decided, "command c2 for a made 0 facts"),
        (decided_twice, "command c2 for a made 2 facts"),
        (decided_out_of_order, "a version 4 answers a command that was said before the last one"),
        (an_answer_to_nothing, "a version 5 answers a command that nobody said"),
        (went_back, "record showed version 2 of a after 3"),
        (a_copy_that_lags, "record of a is Copy(added=2, confirmed=1, version=3), the facts make Copy(added=2, confirmed=2, version=4)"),
        (a_copy_that_counted_twice, "view of b is Copy(added=2, confirmed=1, version=2), the facts make Copy(added=1, confirmed=1, version=2)"),
        (a_copy_that_is_missing, "view of b is None, the facts make Copy(added=1, confirmed=1, version=2)"),
        (a_copy_of_nothing, "view of c is Copy(added=1, confirmed=0, version=1), the facts make None"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)  # fmt: skip
def test_what_may_not_be_is_found(harm: Callable[[History], None], words: str) -> None:
    history = good()
    harm(history)
    assert words in findings(history)


# ----------------------------------------------------------------------------------------------- the processes


class Instance:
    """One process of one service, started again whenever it was killed. What it logs is kept in a file."""

    def __init__(self, which: str, url: str, name: str, folder: Path) -> None:
        self.which, self.name, self._url = which, name, url
        self.log = folder / f"{name}.log"
        self.process = self._start()
        self.stopped_until = 0.0
        self.ended: list[str] = []

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", "from tests.chaos import main; main()", self.which, self._url, self.name],
                env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                text=True,
            )  # fmt: skip

    def look(self) -> None:
        """Let it go on if it is time to; note if it has ended by itself, and start it again then."""
        if self.stopped_until and time.monotonic() >= self.stopped_until:
            self.process.send_signal(signal.SIGCONT)
            self.stopped_until = 0.0
        if self.process.poll() is not None:
            self.ended.append(f"{self.name} ended by itself with {self.process.returncode}")
            self._again()

    def kill(self) -> None:
        """Kill it, and start it again at once."""
        self.process.kill()
        self._again()

    def _again(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.stopped_until = 0.0
        self.process = self._start()

    def stop(self, seconds: float) -> None:
        """Stop it for so long, which `look` ends."""
        self.process.send_signal(signal.SIGSTOP)
        self.stopped_until = time.monotonic() + seconds

    def close(self, seconds: float) -> None:
        """Let it end in good order. Raises `subprocess.TimeoutExpired`."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(seconds)


@pytest.fixture
def instances(bus_url: str, tmp_path: Path) -> Iterator[list[Instance]]:
    """Two that own, two that react, one with copies. None outlives the test."""
    many = [
        ("tallies", "owner1"),
        ("tallies", "owner2"),
        ("reacting", "one"),
        ("reacting", "two"),
        ("copying", "copies"),
    ]
    started = list[Instance]()
    try:
        for which, name in many:
            started.append(Instance(which, bus_url, name, tmp_path))
        yield started
    finally:
        for instance in started:
            instance.process.kill()
            instance.process.wait()
            if instance.process.stdin is not None:
                with contextlib.suppress(OSError):
                    instance.process.stdin.close()


async def harm(instances: list[Instance], random: Random, seconds: float) -> int:
    """Kill at random moments, and stop some for less than others wait for them; how often it killed."""
    began, kills = time.monotonic(), 0
    due = began
    while time.monotonic() < began + seconds:
        await asyncio.sleep(0.02)
        for instance in instances:
            instance.look()
        if time.monotonic() < due:
            continue
        due = time.monotonic() + random.uniform(0.05, 1.2)
        instance = random.choice(instances)
        if not instance.stopped_until and random.random() < 0.25:
            instance.stop(random.uniform(0.05, 1.0))
        else:
            instance.kill()
            kills += 1
    while any(instance.stopped_until for instance in instances):
        await asyncio.sleep(0.02)
        for instance in instances:
            instance.look()
    return kills


# ------------------------------------------------------------------------------------------------- the clients


async def calling(bus: Bus, history: History, random: Random) -> None:
    """Call without end. What is unknown is called again with the same id, or left so."""
    while True:
        key, amount = random.choice(KEYS), 0 if random.random() < 0.05 else 1
        id = bus.clock.id()
        timeout, again = random.choice((0.05, 0.5, 3.0)), random.random() < 0.7
        told = await called(bus, Add(key, amount), id, timeout)
        while told.outcome == "unknown" and again:
            await asyncio.sleep(0.02)
            told = await called(bus, Add(key, amount), id, 3.0, again=True)
        history.told.append(told)
        await asyncio.sleep(random.uniform(0, 0.03))


async def called(bus: Bus, command: Add, id: str, timeout: float, *, again: bool = False) -> Told:
    try:
        receipt = await bus.call(command, id=id, timeout=timeout)
    except Rejected:
        return Told(id, command.name, "rejected")
    except OutcomeUnknown:
        return Told(id, command.name, "unknown")
    except CauceError:
        # Nothing was written by this call; an earlier one with the same id may have been accepted.
        return Told(id, command.name, "unknown" if again else "nothing")
    return Told(id, command.name, "accepted", receipt.version, receipt.position)


async def sending(bus: Bus, history: History, random: Random) -> None:
    while True:
        key = random.choice(KEYS)
        id = bus.clock.id()
        try:
            await bus.send(Add(key), id=id)
        except CauceError:
            history.told.append(Told(id, key, "nothing"))
        else:
            history.told.append(Told(id, key, "sent"))
        await asyncio.sleep(random.uniform(0, 0.1))


async def looking(bus: Bus, history: History, random: Random) -> None:
    """Ask for what stands, in all the ways there are. What one way showed must not be older the next time.

    Of two that ask at once each has a row of its own: their answers may come in any order.
    """
    me = f"to {random.getrandbits(32):x}"
    while True:
        key = random.choice(KEYS)
        with contextlib.suppress(CauceError):
            tally = await bus.fetch(Tally, key, timeout=1)
            history.seen.append(Seen(f"fetch {me}", key, tally.added + tally.confirmed))
        with contextlib.suppress(CauceError):
            record = await bus.record(Tally, key)
            if record is not None:
                history.seen.append(Seen(f"record {me}", key, record.added + record.confirmed))
        with contextlib.suppress(CauceError):
            for where, rows in (await bus.ask(Rows(), timeout=1)).items():
                history.seen += [Seen(f"{where} {me}", name, added + confirmed) for name, added, confirmed in rows]
        await asyncio.sleep(random.uniform(0, 0.1))


# ------------------------------------------------------------------------------------------- what is there after


async def read(bus: Bus, url: str, history: History) -> None:
    """Add what is stored now to what the clients were told."""
    mine = Filter(domains=frozenset({"tallies"}))
    history.copies["record"] = {}
    async for entry in entries_of(bus.records, mine, bodies=False):
        tally = await bus.record(Tally, entry.key)
        assert tally is not None
        history.copies["record"][entry.key] = Copy(tally.added, tally.confirmed, entry.version)
    history.effects = [Effect(*row) for row in stored(url, "select number, key, version, instance from effects")]
    await read_logs(bus, history)


async def read_logs(bus: Bus, history: History) -> None:
    """What was sent and recorded until now."""
    mine = Filter(domains=frozenset({"tallies"}))
    history.said = [
        Said(entry.id, entry.key, entry.meta.causation)
        async for entry in entries_of(bus.commands, mine, bodies=False)
        if not entry.meta.verdict
    ]
    history.facts = [
        Fact(entry.position, entry.key, entry.version, entry.type, entry.id, entry.meta.causation)
        async for entry in entries_of(bus.facts, mine, bodies=False)
    ]


def stored(url: str, sql: str, service: str = "reacting") -> list[Any]:
    path = folder_of(Path(url.removeprefix("sqlite:///"))) / service / "store.db"
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5000)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


async def quiet(bus: Bus, url: str, history: History) -> list[str]:
    """Wait until there is nothing to be found any more; what there is when the time is over."""
    until, found = time.monotonic() + SETTLING, ["nothing could be read"]
    while found and time.monotonic() < until:
        await asyncio.sleep(0.5)
        with contextlib.suppress(NoAnswer):
            for where, rows in (await bus.ask(Rows(), timeout=5)).items():
                history.copies[where] = {name: Copy(one, two, one + two) for name, one, two in rows}
            await read(bus, url, history)
            found = findings(history)
            # What stands in its log already may still lie in the outbox.
            ((left,),) = stored(url, "select count(*) from cauce_outbox")
            found += [f"{left} lie in the outbox"] * bool(left)
    return found


@pytest.mark.timeout(SECONDS + 2 * SETTLING)
async def test_services_that_are_killed_at_random_lose_nothing_and_do_nothing_twice(
    bus_url: str, instances: list[Instance], tmp_path: Path
) -> None:
    history, random = History(), Random(SEED)
    async with connect(bus_url) as bus:
        clients = [
            asyncio.ensure_future(client(bus, history, Random(f"{SEED} {n}")))
            for n, client in enumerate([calling] * 8 + [sending] * 2 + [looking] * 2)
        ]
        kills = await harm(instances, random, SECONDS)
        for client in clients:
            client.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
        assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []
        found = await quiet(bus, bus_url, history)
        told = "\n".join(f"{each.name}:\n{each.log.read_text()[-2000:]}" for each in instances)
        assert found == [], "\n".join(found) + "\n" + told
        assert [each for instance in instances for each in instance.ended] == [], told
    for instance in instances:
        await asyncio.to_thread(instance.close, 30)
    async with connect(bus_url) as bus:
        await read(bus, bus_url, history)
    assert findings(history) == [], "nor was anything left that came later"
    assert await SQLiteStores(folder_of(Path(bus_url.removeprefix("sqlite:///"))), SystemClock()).letters() == []
    assert stored(bus_url, "select count(*) from cauce_outbox") == [(0,)]
    accepted = sum(told.outcome == "accepted" for told in history.told)
    assert accepted > 2 * SECONDS, "there was load"
    assert kills > SECONDS / 3, "and harm"
