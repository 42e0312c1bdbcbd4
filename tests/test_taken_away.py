"""Slots that go while something is in hand there: given away twice at once, lost meanwhile, or full."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from cauce.accept import slot_of
from cauce.backends.sqlite.store import SQLiteStore
from cauce.clock import SystemClock
from cauce.codec import Entry
from cauce.consumer import Consumer, Tail
from cauce.errors import Busy, Fenced
from cauce.log import Log
from cauce.retry import NEVER, Retry
from cauce.shares import NAMES, Shares
from cauce.store import Share, Unit, Waiting
from tests.test_backlog import Heavy
from tests.test_instances import until


class Reading:
    """A consumer of a log of so many entries, and its store."""

    def __init__(self, store: SQLiteStore, many: int) -> None:
        self.store, self.clock = store, SystemClock()
        self.log = Heavy(many, 10)
        self.went_on = asyncio.Event()
        self.handled = list[Entry]()

    async def begin(self, handle: Any = None, **settings: Any) -> Consumer:
        shares: dict[int, Share | None] = {}
        await self.store.tick("me", (), join=True)
        for share in await self.store.take("me", [f"slot/{slot}" for slot in range(16)]):
            assert share.slot is not None
            shares[share.slot] = share
        log = cast("Log", self.log)
        consumer = Consumer(
            "reads", {"things": frozenset()}, handle or self.handle, log, self.store, self.clock, **settings
        )
        tail = Tail(log, self.clock)
        await tail.start()
        await consumer.hold(tail, shares)
        return consumer

    async def handle(self, entry: Entry, unit: Unit) -> None:
        await self.went_on.wait()
        self.handled.append(entry)

    async def passed_over(self) -> list[int]:
        """The entries at or below the places as stored that nobody has handled."""
        await self.store.flush()
        places = await self.store.places("reads", self.log.id, await self.log.head())
        done = {entry.position for entry in self.handled}
        return [
            position
            for position, entry in enumerate(self.log.entries, 1)
            if position <= places.get(("things", slot_of(entry.key)), 0) and position not in done
        ]


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    store = await SQLiteStore.open(tmp_path / "s", "s", SystemClock())
    yield store
    await store.close()


@pytest.mark.parametrize("concurrency", [0, 20])
@pytest.mark.parametrize("how", ["given away twice", "abandoned"])
async def test_what_waits_in_a_slot_that_is_given_away_is_not_passed_over_whatever_else_ends_it(
    store: SQLiteStore, concurrency: int, how: str
) -> None:
    reading = Reading(store, 200)
    consumer = await reading.begin(concurrency=concurrency)
    await until(lambda: consumer.held == 200)
    ways = [asyncio.ensure_future(consumer.drop(range(16), 5))]
    await asyncio.sleep(0)
    ways.append(
        asyncio.ensure_future(consumer.drop(range(16), 5) if how == "given away twice" else consumer.abandon(5))
    )
    await asyncio.sleep(0.05)
    reading.went_on.set()
    await asyncio.gather(*ways)
    assert await reading.passed_over() == []
    assert consumer._load.bytes == 0


async def test_a_slot_in_which_too_much_waits_does_not_keep_the_others_from_going_on(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.consumer._MOST_WAITING", 3)
    handled = Counter[str]()

    async def handle(entry: Entry, unit: Unit) -> None:
        if entry.key == "thing0":
            raise ValueError("poison")
        handled[entry.id] += 1

    reading = Reading(store, 1920)
    consumer = await reading.begin(handle, concurrency=4, retry=NEVER)
    slot = slot_of("thing0")
    others = [each for each in reading.log.entries if slot_of(each.key) != slot]
    await until(lambda: len([each for each in others if handled[each.id]]) == len(others))
    await consumer.drop(range(16), 5)


async def test_a_message_that_three_processes_fell_to_is_set_aside_though_its_log_is_away_for_a_while(
    store: SQLiteStore,
) -> None:
    reading = Reading(store, 1)
    key = reading.log.entries[0].stream
    slot = slot_of(reading.log.entries[0].key)
    unit = Unit(None)
    unit.parked = "reads", Waiting(1, key, slot, due=-3)
    unit.place = "reads", "things", slot, reading.log.id, 1
    await store.tick("dead", (), join=True)
    await store.take("dead", [f"slot/{slot}"])
    await store.commit(unit)
    standing = await store.tick("dead", ())
    await store.tick("me", [("dead", standing.instances["dead"])], join=True)
    read, fails = reading.log.read, [2]

    async def away(*args: Any, **named: Any) -> Any:
        if named.get("limit") == 1 and fails[0]:
            fails[0] -= 1
            raise Busy("not now")
        return await read(*args, **named)

    reading.log.read = away  # type: ignore[method-assign]
    consumer = await reading.begin(retry=Retry(first=0.01))
    async with asyncio.timeout(20):
        while not (consumer.failed.done() or (await store.waiting("reads"))[0].dead):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not consumer.failed.done()
    assert fails == [0]
    assert reading.handled == []
    await consumer.drop(range(16), 5)


async def test_a_retry_that_ends_long_after_its_slot_was_given_away_does_not_let_two_others_begin(
    store: SQLiteStore,
) -> None:
    reading, deaf, tries = Reading(store, 65), asyncio.Event(), 0
    at_once = most = 0
    again = asyncio.Event()

    async def handle(entry: Entry, unit: Unit) -> None:
        nonlocal tries, at_once, most
        if entry.key != "thing0":
            return
        tries += 1
        if tries == 1:
            raise ValueError("tried again")
        if tries == 2:
            while not deaf.is_set():
                try:
                    await deaf.wait()
                except asyncio.CancelledError:
                    continue
            return
        at_once += 1
        most = max(most, at_once)
        await again.wait()
        at_once -= 1

    consumer = await reading.begin(handle, retry=Retry(attempts=0, first=0.01))
    await until(lambda: tries == 2)
    shares = {lane.slot[1]: lane.share for lane in consumer._lanes.values()}
    assert consumer._tail is not None
    await consumer.drop(range(16), 0)
    await consumer.hold(consumer._tail, shares)
    await until(lambda: tries == 3)
    deaf.set()
    await asyncio.sleep(0.05)
    await consumer.reload()
    await asyncio.sleep(0.05)
    assert (tries, most) == (3, 1), "one of it is in hand already"
    again.set()
    await consumer.settled()
    await consumer.drop(range(16), 5)


async def test_who_is_struck_off_while_handing_over_ends_at_once_and_does_not_count_as_one_who_takes(
    store: SQLiteStore,
) -> None:
    clock, losing, lost, forgotten = SystemClock(), asyncio.Event(), list[Share](), list[str]()

    async def gain(shares: Sequence[Share]) -> None: ...

    async def lose(shares: Sequence[Share]) -> None:
        losing.set()
        await asyncio.Event().wait()
        lost.extend(shares)

    async def forget(owner: str) -> None:
        forgotten.append(owner)

    one = Shares(store, "one", clock, gain, lose, forget)
    await one.start()
    one.go()
    runs = asyncio.ensure_future(one.run())
    leaves = asyncio.ensure_future(one.hand_over(0))
    await losing.wait()
    standing = await store.tick("two", (), join=True)
    # As if this one had stood still.
    await store.tick("two", [("one", standing.instances["one"])])
    one.fenced(Fenced("stood still"))
    with pytest.raises(Fenced, match="others have taken over"):
        async with asyncio.timeout(20):
            await leaves
    await until(lambda: one.owner in forgotten)
    assert not runs.done()
    assert (list((await store.tick("two", ())).instances), one.held, lost) == (["two"], {}, [])
    runs.cancel()
    await asyncio.gather(runs, return_exceptions=True)
    await one.stop()


async def test_who_leaves_while_it_takes_over_gives_that_up_when_its_time_is_over(store: SQLiteStore) -> None:
    clock, gaining = SystemClock(), asyncio.Event()

    async def gain(shares: Sequence[Share]) -> None:
        if any(share.before for share in shares):
            gaining.set()
            await asyncio.Event().wait()

    async def lose(shares: Sequence[Share]) -> None: ...

    await store.tick("dead", (), join=True)
    await store.take("dead", ["slot/3"])
    standing = await store.tick("dead", ())
    one = Shares(store, "one", clock, gain, lose)
    one.go()
    await one._step()
    await one._finished()
    await store.tick("x", [("dead", standing.instances["dead"])])
    await one._step()
    await gaining.wait()
    async with asyncio.timeout(20):
        await one.hand_over(0.1)
    await one.stop()
    await store.tick("two", (), join=True)
    taken = await store.take("two", list(NAMES))
    # It held its half already. What it never worked on must look as it was left: by one who died.
    unclean = {share.name: share.before for share in taken if not share.clean}
    assert (len(taken), len(unclean), unclean["slot/3"]) == (17, 8, "one")
