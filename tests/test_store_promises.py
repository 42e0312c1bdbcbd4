"""What every store of a service promises, on every backend that is built."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import pytest

from cauce.errors import Damaged, Fenced, Refused
from cauce.store import BadStatement, Place, Share, Store, Stores, Timer, Unit, Waiting, mark_of
from tests.kept import stores_of

WITH_TABLES = ("sqlite", "postgresql")
"""Those in which a service may keep tables of its own; on NATS one that does is given files."""

EFFECTS = "create table effects (name text, n integer)"
ADD = "insert into effects values (?, ?)"

Fresh = Callable[[], Awaitable[Stores]]


@pytest.fixture
async def fresh(each_bus: str) -> AsyncIterator[Fresh]:
    """Makes the stores of one bus, each time as another process would."""
    async with AsyncExitStack() as undo:

        async def stores() -> Stores:
            return await undo.enter_async_context(stores_of(each_bus))

        yield stores


@pytest.fixture
async def opened(fresh: Fresh) -> AsyncIterator[Callable[..., Awaitable[Store]]]:
    """Opens the store of service `s`, each time as another instance would."""
    async with AsyncExitStack() as undo:

        async def one(*migrations: str, service: str = "s") -> Store:
            store = await (await fresh()).open(service, migrations, keeps=bool(migrations))
            undo.push_async_callback(store.close)
            return store

        yield one


Opened = Callable[..., Awaitable[Store]]


async def share_of(store: Store, name: str = "slot/1", owner: str = "me") -> Share:
    await store.tick(owner, (), join=True)
    (share,) = await store.take(owner, [name])
    return share


def unit(share: Share | None, *statements: tuple[str, Sequence[Any]], position: int = 0) -> Unit:
    made = Unit(share)
    made.statements += statements
    if position:
        made.place = "react", "things", 1, "log", position
    return made


# -------------------------------------------------------------------------------------------------- who holds what


async def test_a_store_is_fresh_until_something_was_ever_held_and_keeps_its_id(opened: Opened) -> None:
    store = await opened()
    assert store.is_fresh
    await share_of(store)
    again = await opened()
    assert (again.id, again.place, again.is_fresh) == (store.id, store.place, False)
    other = await opened(service="t")
    assert other.id != store.id
    assert other.is_fresh


async def test_a_beat_counts_and_who_never_joined_is_not_alive(opened: Opened) -> None:
    store = await opened()
    for _ in range(2):
        standing = await store.tick("me", ())
        assert (standing.alive, standing.instances) == (False, {})
    beats = [(await store.tick("me", (), join=True)).instances["me"] for _ in range(3)]
    assert beats[1] - beats[0] == beats[2] - beats[1] == 1


async def test_what_is_free_is_taken_in_the_order_asked_and_what_is_held_is_not(opened: Opened) -> None:
    one, two = await opened(), await opened()
    await one.tick("one", (), join=True)
    await two.tick("two", (), join=True)
    assert await two.take("stranger", ["slot/1"]) == []
    taken = await one.take("one", ["slot/7", "slot/1", "lead"])
    assert [(each.name, each.clean, each.before) for each in taken] == [
        ("slot/7", True, ""), ("slot/1", True, ""), ("lead", True, ""),
    ]  # fmt: skip
    assert [each.name for each in await two.take("two", ["slot/1", "slot/2"])] == ["slot/2"]
    assert (await two.tick("two", ())).holders == {
        "slot/7": "one", "slot/1": "one", "lead": "one", "slot/2": "two",
    }  # fmt: skip
    await one.release(taken[:2], owner="one")
    (share,) = await two.take("two", ["slot/1"])
    assert (share.fence > taken[1].fence, share.clean, share.before) == (True, True, "")
    (lead,) = await two.take("two", ["lead"])
    assert (lead.fence > taken[2].fence, lead.clean, lead.before) == (True, False, "one")
    assert (await two.tick("two", ())).instances.keys() == {"two"}


async def test_who_lets_go_of_what_was_taken_over_lets_go_of_nothing(opened: Opened) -> None:
    one, two = await opened(), await opened()
    old = await share_of(one, owner="one")
    beat = (await two.tick("two", (), join=True)).instances["one"]
    await two.tick("two", [("one", beat)])
    await two.take("two", [old.name])
    await one.release([old])
    assert (await two.tick("two", ())).holders == {old.name: "two"}


async def test_a_beat_that_came_meanwhile_keeps_an_instance_alive(opened: Opened) -> None:
    one, two = await opened(), await opened()
    await share_of(one, owner="one")
    beat = (await two.tick("two", (), join=True)).instances["one"]
    await one.tick("one", ())
    assert "one" in (await two.tick("two", [("one", beat)])).instances


async def test_of_many_who_take_at_once_each_name_has_one_holder(opened: Opened) -> None:
    stores = [await opened() for _ in range(4)]
    names = [f"slot/{n}" for n in range(16)]
    for n, store in enumerate(stores):
        await store.tick(f"i{n}", (), join=True)
    taken = await asyncio.gather(*(store.take(f"i{n}", names) for n, store in enumerate(stores)))
    assert sorted(share.name for shares in taken for share in shares) == sorted(names)


async def test_who_was_struck_off_cannot_store_anything(opened: Opened) -> None:
    one, two = await opened(), await opened()
    share = await share_of(one, "slot/3", "one")
    standing = await two.tick("two", [], join=True)
    assert await two.take("two", ["slot/3"]) == []
    await two.tick("two", [("one", standing.instances["one"])])
    (later,) = await two.take("two", ["slot/3"])
    assert (later.fence > share.fence, later.clean, later.before) == (True, False, "one")
    stale = unit(share)
    stale.timer = "stale", 1
    with pytest.raises(Fenced, match="slot/3"):
        await one.commit(stale)
    one.move(share, "handle", "counters", 3, "log", 99)
    await one.flush()
    two.move(later, "handle", "counters", 3, "log", 7)
    await two.flush()
    one.move(share, "handle", "counters", 3, "log", 98)
    await one.flush()
    assert await two.places("handle", "log", 100) == {("counters", 3): 7}
    assert await two.timer("stale") == 0
    assert not (await one.tick("one", ())).alive


# ---------------------------------------------------------------------------------------------------------- places


async def test_a_place_in_another_log_or_beyond_its_end_is_damage_that_names_the_cure(opened: Opened) -> None:
    store = await opened()
    store.move(None, "react", "things", 1, "log", 7)
    await store.flush()
    assert await store.places("react", "log", 7) == {("things", 1): 7}
    assert await store.places("other", "log", 7) == {}
    with pytest.raises(Damaged, match=r"restored.*cauce reset s "):
        await store.places("react", "another", 7)
    with pytest.raises(Damaged, match=r"entries are lost.*cauce reset s "):
        await store.places("react", "log", 6)


async def test_a_unit_takes_the_places_along_that_wait_and_its_own_is_the_last_word(opened: Opened) -> None:
    store = await opened()
    share = await share_of(store)
    store.move(share, "react", "things", 1, "log", 6)
    store.move(None, "react", "others", 2, "log", 5)
    mine = unit(share, position=7)
    mine.timer = "soon", 8
    await store.commit(mine)
    assert await store.places("react", "log", 100) == {("things", 1): 7, ("others", 2): 5}


async def test_places_that_wait_are_written_by_and_by(opened: Opened) -> None:
    store, other = await opened(), await opened()
    task = asyncio.ensure_future(store.run())
    store.move(None, "react", "things", 1, "log", 6)
    async with asyncio.timeout(30):
        while not await other.places("react", "log", 100):  # noqa: ASYNC110 - it is written by another task
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ------------------------------------------------------------------------------------------------ waiting, outbox


async def test_what_waits_is_kept_as_it_is_in_order_until_it_is_taken_out(opened: Opened) -> None:
    store = await opened()
    share = await share_of(store)
    first = Waiting(3, "things/é ü", 1, 2, 1_700_000_000_000_000, True, "why: 'é'", "trace\nback", b'{"a": "\xc3"}')
    second = Waiting(12, "things/b", 1)
    for waiting in (second, first):
        mine = unit(share, position=waiting.position)
        mine.parked = "react", waiting
        await store.commit(mine)
    assert await store.waiting("react") == [first, second]
    assert await store.waiting("other") == []
    again = unit(share)
    first.attempts, again.parked = 3, ("react", first)
    gone = unit(share)
    gone.unparked = "react", 12
    await asyncio.gather(store.commit(again), store.commit(gone))
    assert await store.waiting("react") == [first]


async def test_a_mark_of_what_was_handled_ahead_is_one_with_its_unit_and_goes_with_the_place(
    opened: Opened, fresh: Fresh
) -> None:
    store = await opened()
    share = await share_of(store)
    for position in (9, 12, 14):
        ahead = unit(share)
        ahead.said = [("react", 1, b"%d" % position)]
        ahead.parked = "react", mark_of(position, "things/é ü", 1, f"id-{position}")
        await store.commit(ahead)
    other = await opened()
    assert [(each.position, each.mark) for each in await other.waiting("react")] == [
        (9, "id-9"), (12, "id-12"), (14, "id-14"),
    ]  # fmt: skip
    assert [said for *_, said in await other.outbox(0, 9)] == [b"9", b"12", b"14"]
    assert await (await fresh()).letters() == []
    assert (await (await fresh()).outline("s", 0)).pending == [], "it does not wait"
    passing = unit(share, position=12)
    passing.passed = [("react", 9), ("react", 12)]
    await store.commit(passing)
    assert [each.mark for each in await other.waiting("react")] == ["id-14"]
    assert await other.places("react", "log", 100) == {("things", 1): 12}
    stale = unit(Share(share.name, share.fence - 1, True, ""))
    stale.passed = [("react", 14)]
    with pytest.raises(Fenced):
        await store.commit(stale)
    assert [each.mark for each in await other.waiting("react")] == ["id-14"]


async def test_an_error_of_any_text_is_kept(opened: Opened) -> None:
    store = await opened()
    mine = unit(None)
    mine.parked = "react", Waiting(3, "things/a", 1, error="nul \0 and 'quotes' \\ \U0001f600")
    await store.commit(mine)
    (found,) = await store.waiting("react")
    assert "and 'quotes' \\ \U0001f600" in found.error


async def test_a_number_of_the_outbox_is_never_used_again(opened: Opened) -> None:
    store = await opened()
    share = await share_of(store)
    numbers = []
    for _ in range(3):
        mine = unit(share)
        mine.said = [("react", 1, b"first"), ("react", 1, b"second")]
        await store.commit(mine)
        rows = await store.outbox(0, 10)
        assert [row[1:] for row in rows] == mine.said
        assert await store.outbox(rows[0][0], 10) == rows[1:]
        assert await store.outbox(0, 1) == rows[:1]
        numbers += [number for number, _, _, _ in rows]
        await store.relayed([number for number, _, _, _ in rows])
        assert await store.outbox(0, 10) == []
    assert numbers == sorted(set(numbers)), "a relay under way would take a later one for an earlier one"


SAID = 40


async def test_who_reads_the_outbox_never_passes_over_a_smaller_number(opened: Opened) -> None:
    stores = [await opened() for _ in range(3)]
    reader = await opened()
    said, read = 0, list[bytes]()

    async def says(store: Store, who: int) -> None:
        nonlocal said
        for n in range(SAID):
            mine = unit(None)
            mine.said = [("react", 1, b"%d/%d" % (who, n))]
            await store.commit(mine)
            said += 1

    async def reads() -> None:
        after = 0
        async with asyncio.timeout(60):
            while len(read) < 3 * 2 * SAID:
                for number, _, _, text in await reader.outbox(after, 7):
                    assert number > after
                    after = number
                    read.append(text)
                await asyncio.sleep(0)

    await asyncio.gather(reads(), *(says(store, 2 * n + m) for n, store in enumerate(stores) for m in (0, 1)))
    assert len(set(read)) == len(read) == said
    for who in range(6):
        assert [text for text in read if text.startswith(b"%d/" % who)] == [b"%d/%d" % (who, n) for n in range(SAID)]


async def test_an_instance_is_told_when_another_said_something_or_a_person_decided(
    opened: Opened, fresh: Fresh
) -> None:
    one, two = await opened(), await opened()
    await share_of(one, owner="one")
    share = await share_of(two, "slot/2", "two")
    for _ in range(2):
        await one.tick("one", ())
    assert not (await one.tick("one", ())).touched
    mine = unit(share)
    mine.said = [("react", 2, b"to whom it may concern")]
    await two.commit(mine)
    assert (await one.tick("one", ())).touched
    assert not (await one.tick("one", ())).touched
    mine = unit(share)
    mine.parked = "react", Waiting(3, "things/a", 2, 5, 6, True, "why")
    await two.commit(mine)
    await one.tick("one", ())
    await (await fresh()).retry("s", "react", 3)
    assert (await one.tick("one", ())).touched


async def test_a_timer_is_remembered(opened: Opened) -> None:
    store = await opened()
    assert await store.timer("often") == 0
    for due in (5, 1_700_000_000_000_000):
        mine = unit(None)
        mine.timer = "often", due
        await store.commit(mine)
        assert await store.timer("often") == due


# -------------------------------------------------------------------------------------------------------- timers


def timer(id: str, due: int, share: str = "slot/1") -> Timer:
    return Timer(id, share, "react", due, f"said {id}".encode())


async def set_timers(store: Store, share: Share | None, *timers: Timer, cancel: Sequence[str] = ()) -> None:
    mine = unit(share)
    mine.later += timers
    mine.cancelled += cancel
    await store.commit(mine)


async def said(store: Store) -> list[tuple[str, int, bytes]]:
    return [row[1:] for row in await store.outbox(0, 1_000)]


async def test_what_is_due_is_let_go_in_order_and_what_is_not_waits(opened: Opened) -> None:
    store = await opened()
    share, other = await share_of(store), await share_of(store, "slot/2")
    lead = await share_of(store, "lead")
    a, b, c, d = timer("a", 5_000_003), timer("b", 5_000_001), timer("c", 5_000_001), timer("d", 9_000_000)
    await set_timers(store, share, a, b)
    await set_timers(store, share, c, d)
    await set_timers(store, other, timer("e", 4_000_000, "slot/2"))
    await set_timers(store, lead, timer("f", 7_000_000, "lead"))
    shares = [share, lead]
    fired, due = await store.fire(shares, 4_000_000, 10)
    assert (fired, await said(store)) == (0, [])
    assert 4_000_000 < due <= 5_000_001, "it is never looked too late"
    assert await store.fire(shares, 5_000_002, 10) == (2, 5_000_003)
    assert await said(store) == [("react", 1, b"said b"), ("react", 1, b"said c")]
    assert [await store.due(id) for id in "abcd"] == [5_000_003, 0, 0, 9_000_000]
    # Of the share that this instance does not name nothing was let go.
    assert await store.fire([share, lead], 8_000_000, 10) == (2, 9_000_000)
    assert await store.fire([share, lead, other], 8_000_000, 10) == (1, 9_000_000)
    assert (await said(store))[2:] == [("react", 1, b"said a"), ("react", 0, b"said f"), ("react", 2, b"said e")]
    assert await store.fire(shares, 2**60, 10) == (1, 0)
    assert await store.fire([], 2**60, 10) == (0, 0)


async def test_at_most_so_many_are_let_go_at_once_and_none_is_passed_over(opened: Opened) -> None:
    store = await opened()
    share = await share_of(store)
    for n in range(4):
        await set_timers(store, share, *(timer(f"{n}/{m}", 1_000_000 * (m % 3) + 10 * n + m + 1) for m in range(20)))
    fired = []
    while (last := await store.fire([share], 2_000_010, 7))[0]:
        fired.append(last[0])
    assert last[1] > 2_000_010
    assert fired[:-1] == [7] * (len(fired) - 1)
    names = [row[2].decode().removeprefix("said ") for row in await said(store)]
    dues = [1_000_000 * (int(m) % 3) + 10 * int(n) + int(m) + 1 for n, _, m in (name.partition("/") for name in names)]
    assert dues == sorted(dues)
    assert len(set(names)) == len(names) == sum(fired)
    left = [name for n in range(4) for m in range(20) if (name := f"{n}/{m}") not in names]
    assert left
    assert all([await store.due(name) > 2_000_010 for name in left])


async def test_what_is_set_for_a_time_before_that_of_what_was_looked_at_is_let_go_first(opened: Opened) -> None:
    store = await opened()
    share = await share_of(store)
    await set_timers(store, share, timer("a", 5_000_000), timer("d", 5_900_000))
    assert await store.fire([share], 5_000_500, 10) == (1, 5_900_000)
    await set_timers(store, share, timer("c", 5_800_000))
    await set_timers(store, share, timer("b", 4_000_000))
    assert (await store.fire([share], 5_800_000, 10))[0] == 2
    assert (await store.fire([share], 5_900_000, 10)) == (1, 0)
    assert [row[2] for row in await said(store)] == [b"said a", b"said b", b"said c", b"said d"]


async def test_a_timer_that_is_set_again_is_moved_and_one_that_is_cancelled_never_fires(opened: Opened) -> None:
    store = await opened()
    share, other = await share_of(store), await share_of(store, "slot/2")
    await set_timers(store, share, timer("moved", 5), timer("gone", 6), timer("left", 7))
    # In one transaction, too.
    await asyncio.gather(
        set_timers(store, other, timer("moved", 9, "slot/2")),
        set_timers(store, share, cancel=["gone", "nobody"]),
        set_timers(store, share, timer("both", 8)),
        set_timers(store, share, cancel=["both"]),
    )
    assert [await store.due(id) for id in ("moved", "gone", "left", "both", "nobody")] == [9, 0, 7, 0, 0]
    await store.fire([share], 100, 10)
    assert await said(store) == [("react", 1, b"said left")]
    await store.fire([share, other], 100, 10)
    assert (await said(store))[1:] == [("react", 2, b"said moved")]
    await set_timers(store, share, cancel=["left", "moved"])
    assert len(await said(store)) == 2, "what has fired is not taken back"
    await set_timers(store, share, timer("left", 20))
    assert await store.fire([share], 20, 10) == (1, 0)


async def test_what_was_cancelled_by_another_while_it_was_known_here_does_not_fire(
    opened: Opened, fresh: Fresh
) -> None:
    store, other, stores = await opened(), await opened(), await fresh()
    share, theirs = await share_of(store), await share_of(other, "slot/2")
    await set_timers(store, share, *(timer(f"{n}", 5_000_000 + n) for n in range(6)))
    assert (await store.fire([share], 5_000_000, 1))[0] == 1
    await set_timers(other, theirs, cancel=["2", "0"])
    await stores.cancel("s", "4")
    assert await store.fire([share], 5_000_010, 10) == (3, 0)
    assert [row[2] for row in await said(store)] == [b"said 0", b"said 1", b"said 3", b"said 5"]
    for id in ("0", "4", "never"):
        with pytest.raises(Refused, match=f"s has no timer {id}: it has fired, or was cancelled, or never was"):
            await stores.cancel("s", id)


async def test_who_lost_a_share_lets_nothing_of_it_go_and_who_took_it_does(opened: Opened) -> None:
    one, two = await opened(), await opened()
    share = await share_of(one, owner="one")
    both = await share_of(one, "slot/2", "one")
    await set_timers(one, share, timer("a", 5), timer("b", 6))
    await set_timers(one, both, timer("c", 7, "slot/2"))
    assert (await one.fire([share, both], 4, 10))[0] == 0
    standing = await two.tick("two", (), join=True)
    await two.tick("two", [("one", standing.instances["one"])])
    (later,) = await two.take("two", ["slot/1"])
    assert (await one.fire([share, both], 100, 10))[0] == 1
    with pytest.raises(Fenced):
        await set_timers(one, share, timer("late", 8))
    assert await two.fire([later], 100, 10) == (2, 0)
    assert await one.fire([share, both], 100, 10) == (0, 0)
    assert sorted(row[2] for row in await said(two)) == [b"said a", b"said b", b"said c"]


async def test_of_two_who_let_go_at_once_each_timer_is_let_go_by_one(opened: Opened) -> None:
    store, again = await opened(), await opened()
    share = await share_of(store)
    await set_timers(store, share, *(timer(f"{n}", n + 1) for n in range(40)))

    async def fire(one: Store) -> int:
        fired = 0
        while (many := (await one.fire([share], 100, 3))[0]) or await one.due("39"):
            fired += many
        return fired

    assert sum(await asyncio.gather(fire(store), fire(again))) >= 40
    assert sorted(row[2] for row in await said(store)) == sorted(f"said {n}".encode() for n in range(40))


async def test_timers_of_all_services_are_listed_with_intervals_the_next_one_first(
    opened: Opened, fresh: Fresh
) -> None:
    stores = await fresh()
    assert await stores.timers() == []
    one, two = await opened(), await opened(service="t")
    share, other = await share_of(one), await share_of(two)
    often = unit(None)
    often.timer = "often", 8
    await one.commit(often)
    a, b, c = timer("a", 7_000_000), timer("b é/ü.*", 6_000_000), timer("c", 1_000_000)
    await set_timers(one, share, a, b)
    await set_timers(two, other, c)
    interval = Timer("often", "lead", "often", 8)
    assert await stores.timers() == [("s", interval), ("s", b), ("s", a), ("t", c)]
    assert await stores.timers("s", 1) == [("s", interval), ("s", b)]
    assert (await one.inventory()).timers == 3
    await stores.cancel("s", "b é/ü.*")
    assert await stores.timers("s") == [("s", interval), ("s", a)]
    for ask in (stores.timers("nobody"), stores.cancel("nobody", "a")):
        with pytest.raises(Refused, match="'nobody' has no store here"):
            await ask


# ------------------------------------------------------------------------------------------- all that hangs on logs


async def test_an_inventory_has_all_that_hangs_on_logs_whoever_it_is_for(opened: Opened, fresh: Fresh) -> None:
    store = await opened()
    share = await share_of(store)
    store.move(share, "decide things", "things", 1, "commands", 3)
    parked = unit(share, position=7)
    parked.parked = "react", Waiting(5, "things/a", 1, error="no")
    parked.said = [("react", 1, b"one"), ("react", 1, b"two")]
    parked.timer = "tick", 9
    await store.commit(parked)
    await store.flush()
    # As who knows neither its consumers nor its tables opens it.
    other = await (await fresh()).open("s", None)
    found = await other.inventory()
    assert found.places == [
        Place("decide things", "things", 1, "commands", 3), Place("react", "things", 1, "log", 7),
    ]  # fmt: skip
    assert [(consumer, each.position, each.stream) for consumer, each in found.waiting] == [("react", 5, "things/a")]
    assert (found.outbox, found.timers) == (2, 1)
    gone = unit(share)
    gone.unparked = "react", 5
    await store.commit(gone)
    assert (await other.inventory()).waiting == []
    await other.close()


async def test_a_store_that_is_not_there_is_not_opened_as_it_is(fresh: Fresh) -> None:
    with pytest.raises(Refused, match="'nobody' has no store here"):
        await (await fresh()).open("nobody", None)


# ------------------------------------------------------------------------------------------------- dead letters


async def test_dead_letters_of_all_services_are_listed_and_decided(opened: Opened, fresh: Fresh) -> None:
    stores = await fresh()
    assert await stores.letters() == []
    for service in ("a_b", "a-b", "a__b"):
        store = await opened(service=service)
        for position, dead in ((3, True), (4, False), (5, True)):
            mine = unit(None)
            mine.parked = "react", Waiting(position, "things/x", 1, 7, 8, dead, "why", "trace", b'{"n": 1}')
            await store.commit(mine)
    assert [(each.service, each.position, each.behind) for each in await stores.letters()] == [
        (service, *each) for service in ("a-b", "a__b", "a_b") for each in ((3, 2), (5, 0))
    ]
    (letter, _) = await stores.letters("a_b")
    assert (letter.consumer, letter.stream, letter.attempts, letter.error, letter.trace, bytes(letter.message)) == (
        "react", "things/x", 7, "why", "trace", b'{"n": 1}',
    )  # fmt: skip
    assert letter.died == 8
    await stores.retry("a_b", "react", 3)
    await stores.discard("a_b", "react", 5)
    store = await opened(service="a_b")
    assert [(each.position, each.attempts, each.due, each.dead) for each in await store.waiting("react")] == [
        (3, 0, 0, False), (4, 7, 8, False),
    ]  # fmt: skip
    for decide in (stores.retry, stores.discard):
        with pytest.raises(Refused, match="no dead letter 3 of react"):
            await decide("a_b", "react", 3)
    with pytest.raises(Refused, match="'nobody' has no store here: .*there are a-b, a__b, a_b"):
        await stores.letters("nobody")


async def test_a_dead_letter_is_edited_if_it_is_as_it_was_seen_and_nothing_else_of_it_changes(
    opened: Opened, fresh: Fresh
) -> None:
    stores, store = await fresh(), await opened()
    for position, dead in ((3, True), (4, False)):
        mine = unit(None)
        mine.parked = "react", Waiting(position, "things/x", 1, 7, 8, dead, "why", "trace", b'{"n": 1}')
        await store.commit(mine)
    await stores.edit("s", "react", 3, b'{"n": 1}', b'{"n": 2}')
    with pytest.raises(Refused, match="no dead letter 3 of react, or it has changed meanwhile"):
        await stores.edit("s", "react", 3, b'{"n": 1}', b'{"n": 3}')
    with pytest.raises(Refused, match="no dead letter 4 of react"):
        await stores.edit("s", "react", 4, b'{"n": 1}', b'{"n": 3}')
    (letter,) = await stores.letters("s")
    assert (bytes(letter.message), letter.attempts, letter.died, letter.behind) == (b'{"n": 2}', 7, 8, 1)
    await stores.retry("s", "react", 3)
    assert [(each.position, each.raw, each.dead) for each in await store.waiting("react")] == [
        (3, b'{"n": 2}', False), (4, b'{"n": 1}', False),
    ]  # fmt: skip
    with pytest.raises(Refused, match="no dead letter 3 of react"):
        await stores.edit("s", "react", 3, b'{"n": 2}', b'{"n": 3}')


async def test_of_many_who_decide_about_a_dead_letter_at_once_one_does(opened: Opened, fresh: Fresh) -> None:
    store = await opened()
    for position in range(1, 6):
        mine = unit(None)
        mine.parked = "react", Waiting(position, f"things/{position}", 1, 7, 8, True, "why", "trace", b"{}")
        await store.commit(mine)
    deciders = [await fresh() for _ in range(4)]
    decisions = [
        decide("s", "react", position)
        for position in range(1, 6)
        for each in deciders
        for decide in (each.retry, each.discard)
    ]
    told = await asyncio.gather(*decisions, return_exceptions=True)
    assert [type(each) for each in told].count(type(None)) == 5
    assert all(isinstance(each, Refused) for each in told if each is not None)


# -------------------------------------------------------------------------------------------------- tables of its own


tables = pytest.mark.parametrize("backend", WITH_TABLES)


@tables
async def test_what_a_handler_stores_its_place_and_what_it_said_are_one(opened: Opened) -> None:
    store = await opened(EFFECTS)
    share = await share_of(store)
    good, bad = (
        unit(share, (ADD, ("a", 1)), position=7),
        unit(share, (ADD, ("b", 2)), ("insert into nowhere values (1)", ())),
    )
    bad.place, bad.said = ("react", "others", 2, "log", 8), [("react", 1, b"lie")]
    bad.parked, bad.timer = ("react", Waiting(3, "things/a", 1)), ("lie", 1)
    after = unit(share, (ADD, ("c", 3)))
    told = await asyncio.gather(*(store.commit(each) for each in (good, bad, after)), return_exceptions=True)
    assert [type(each) for each in told] == [type(None), BadStatement, type(None)]
    assert "'insert into nowhere values (1)' cannot be run on s's store" in str(told[1])
    assert await store.fetch("select name, n from effects order by n") == [("a", 1), ("c", 3)]
    assert await store.places("react", "log", 100) == {("things", 1): 7}
    assert (await store.outbox(0, 9), await store.waiting("react"), await store.timer("lie")) == ([], [], 0)


@tables
async def test_statements_run_in_the_order_of_their_units_and_see_what_ran_before(opened: Opened) -> None:
    store = await opened(EFFECTS)
    count = "insert into effects select 'a', count(*) from effects"
    await asyncio.gather(*(store.commit(unit(None, (count, ()), (count, ()))) for _ in range(20)))
    assert await store.fetch("select n from effects order by n") == [(n,) for n in range(40)]


@tables
async def test_who_was_struck_off_executes_nothing_while_others_do(opened: Opened) -> None:
    one = await opened(EFFECTS)
    share, stale = await share_of(one), Share("slot/9", 5, True, "")
    told = await asyncio.gather(
        *(one.commit(unit(each, (ADD, ("a", n)))) for n, each in enumerate((share, stale, share))),
        return_exceptions=True,
    )
    assert [type(each) for each in told] == [type(None), Fenced, type(None)]
    assert await one.fetch("select n from effects order by n") == [(0,), (2,)]


@tables
@pytest.mark.parametrize(
    "sql",
    [
        "begin", "commit", "rollback", "savepoint x", "delete from cauce_outbox", 'update "cauce_claims" set fence = 0',
        "drop table cauce_store", "create table cauce_x (a integer)", "insert into effects values (?, ?, ?)",
        "insert into effects values (?)", "creat table x",
    ],
)  # fmt: skip
async def test_a_handler_may_not_touch_the_transaction_nor_what_is_kept_of_it(sql: str, opened: Opened) -> None:
    store = await opened(EFFECTS)
    share = await share_of(store)
    with pytest.raises(BadStatement, match="cannot be run on s's store"):
        await store.commit(unit(share, (ADD, ("lost", 0)), (sql, ())))
    await store.commit(unit(share, (ADD, ("kept", 1))))
    assert await store.fetch("select name from effects") == [("kept",)]


@tables
@pytest.mark.parametrize(
    "sql",
    [
        "begin", "savepoint x", "select * from cauce_outbox", "create temp table x (a int)",
        "insert into effects values ('a', 1)", "select 1; begin", "select * from nowhere", "selct",
        "with x as (select 1) delete from effects",
    ],
)  # fmt: skip
async def test_a_query_of_a_handler_reads_and_does_nothing_else(sql: str, opened: Opened) -> None:
    store = await opened(EFFECTS)
    with pytest.raises(BadStatement, match="cannot be run on s's store"):
        await store.fetch(sql)
    # What is committed later is read: no snapshot is held.
    mine = unit(None, (ADD, ("b", 2)))
    await store.commit(mine)
    assert await store.fetch("select name, upper(name), n from effects where n = ?", (2,)) == [("b", "B", 2)]
    count = "with recursive c (n) as (select 1 union all select n + 1 from c where n < 3) select * from c"
    assert await store.fetch(count) == [(1,), (2,), (3,)]


@tables
async def test_the_schema_grows_by_parts_and_is_never_changed_behind_its_back(opened: Opened) -> None:
    more = "alter table effects add column at integer; create index by_name on effects (name)"
    first = await opened(EFFECTS)
    await first.commit(unit(None, (ADD, ("a", 1))))
    assert await first.fetch("select * from effects") == [("a", 1)]
    second = await opened(EFFECTS, more)
    for store in (first, second, await opened(EFFECTS, more)):
        assert await store.fetch("select * from effects") == [("a", 1, None)]
    for wrong in (["create table other (a integer)"], [EFFECTS + " "], []):
        with pytest.raises(Refused, match="made by other SQL than service 's' has now"):
            await opened(*wrong)
    with pytest.raises(Refused, match="part 4 of the schema of service 's' cannot be run: "):
        await opened(EFFECTS, more, "create table third (a integer)", "creat table x")
    # Nothing of what failed remains.
    last = await opened(EFFECTS, more, "create table third (a integer)")
    assert await last.fetch("select * from third") == []


@tables
async def test_instances_that_open_a_store_at_once_make_it_once(opened: Opened) -> None:
    stores = await asyncio.gather(*(opened(EFFECTS, "insert into effects values ('once', 1)") for _ in range(5)))
    assert len({store.id for store in stores}) == 1
    assert await stores[0].fetch("select name from effects") == [("once",)]


async def test_a_store_that_older_code_made_has_no_timers_and_takes_some_when_it_is_opened(
    each_bus: str, fresh: Fresh, tmp_path: Path
) -> None:
    stores = await fresh()
    store = await stores.open("s", ())
    await store.close()
    await _as_older_code_made_it(each_bus, tmp_path)
    assert await stores.timers("s") == []
    with pytest.raises(Refused, match="has no timer a"):
        await stores.cancel("s", "a")
    store = await stores.open("s", ())
    await set_timers(store, None, timer("a", 5))
    assert await stores.timers("s") == [("s", timer("a", 5))]
    await store.close()


async def _as_older_code_made_it(bus: str, folder: Path) -> None:
    if bus.startswith("postgresql"):
        session = await asyncpg.connect(bus.partition("?")[0])
        name = bus.partition("schema=")[2]
        await session.execute(f'drop table "{name}_s".cauce_later; drop function "{name}_s".cauce_fire')
        await session.close()
    elif bus.startswith("sqlite"):
        (path,) = folder.glob("**/s/store.db")
        connection = apsw.Connection(str(path))
        connection.execute("drop table cauce_later")
        connection.close()
