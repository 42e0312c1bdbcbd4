"""A bucket of NATS as the store of a service: its fences, its order, what it keeps when the server is killed."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cauce.backends.nats.call import Lost
from cauce.backends.nats.link import connect
from cauce.backends.nats.store import NatsStore
from cauce.backends.nats.stores import NatsStores
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.clock import SystemClock
from cauce.errors import Damaged, Fenced, Refused, Unavailable
from cauce.store import BadStatement, Share, Unit, Waiting
from tests.kept import backend_at
from tests.late import Late
from tests.servers import Nats, NatsCluster

LOG = "log"


@asynccontextmanager
async def opened(url: str, *, patience: float = 5.0) -> AsyncIterator[NatsStore]:
    """A handle of its own, with a connection of its own: what another process would have."""
    link = await connect(url, SystemClock(), patience)
    try:
        store = await NatsStore.open(link, "mails")
        yield store
        await store.close()
    finally:
        await link.close()


@asynccontextmanager
async def stores_of(url: str, folder: Path) -> AsyncIterator[NatsStores]:
    clock = SystemClock()
    link = await connect(url, clock)
    try:
        yield NatsStores(link, clock, SQLiteStores(folder, clock))
    finally:
        await link.close()


async def held(store: NatsStore, owner: str = "one", *names: str) -> list[Share]:
    await store.tick(owner, (), join=True)
    return await store.take(owner, names or ("slot/0",))


def unit(
    share: Share | None,
    position: int,
    *said: bytes,
    parked: Waiting | None = None,
    unparked: int | None = None,
    slot: int = 0,
) -> Unit:
    made = Unit(share)
    made.said = [("c", slot, each) for each in said]
    made.place = ("c", "users", slot, LOG, position)
    made.parked = None if parked is None else ("c", parked)
    made.unparked = None if unparked is None else ("c", unparked)
    return made


async def said(store: NatsStore) -> list[bytes]:
    return [each for *_, each in await store.outbox(0, 100_000)]


async def place(store: NatsStore, slot: int = 0) -> int:
    return (await store.places("c", LOG, 10_000_000)).get(("users", slot), 0)


def state(nats: Nats, url: str) -> dict[str, int]:
    found: dict[str, int] = nats.request(f"$JS.API.STREAM.INFO.{url.rpartition('/')[2]}_store_mails")["state"]
    return found


# ------------------------------------------------------------------------------------------------ units and fences


async def test_what_a_unit_says_parks_and_passes_is_written_together(nats_bus: str) -> None:
    async with opened(nats_bus) as store, opened(nats_bus) as other:
        (share,) = await held(store)
        await store.commit(unit(share, 7, b"a", b"b", parked=Waiting(7, "users/x", 0, 1, 5, False, "why")))
        for handle in (store, other):
            assert await said(handle) == [b"a", b"b"]
            assert await handle.waiting("c") == [Waiting(7, "users/x", 0, 1, 5, False, "why")]
            assert await place(handle) == 7
        await store.commit(unit(share, 8, unparked=7))
        assert await other.waiting("c") == []
        assert await place(other) == 8


async def test_a_holder_that_was_replaced_writes_nothing_and_the_others_of_its_batch_do(nats_bus: str) -> None:
    async with opened(nats_bus) as store, opened(nats_bus) as rival:
        lost, kept = await held(store, "one", "slot/0", "slot/1")
        standing = await rival.tick("two", (), join=True)
        await rival.tick("two", [("one", standing.instances["one"])])
        (taken,) = await rival.take("two", ["slot/0"])
        assert (taken.clean, taken.before) == (False, "one")
        assert taken.fence > lost.fence
        store.move(lost, "noted alone", "users", 0, LOG, 3)
        results = await asyncio.gather(
            store.commit(unit(lost, 1, b"stale", parked=Waiting(1, "users/x", 0))),
            store.commit(unit(kept, 2, b"right", slot=1)),
            return_exceptions=True,
        )
        assert isinstance(results[0], Fenced)
        assert results[1] is None
        assert await said(rival) == [b"right"]
        assert await rival.waiting("c") == []
        assert (await place(rival), await place(rival, 1)) == (0, 2)
        assert await rival.places("noted alone", LOG, 10) == {}
        await rival.commit(unit(taken, 5))
        assert await place(store) == 5


async def test_a_unit_that_is_too_big_takes_no_other_with_it(nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        results = await asyncio.gather(
            store.commit(unit(share, 1, b"first")),
            store.commit(unit(share, 2, b"small", b"x" * 1_100_000)),
            store.commit(unit(share, 3, b"last")),
            return_exceptions=True,
        )
        assert [type(each) for each in results] == [type(None), Refused, type(None)]
        assert await said(store) == [b"first", b"last"]
        assert await place(store) == 3


async def test_many_units_at_once_keep_their_order_and_numbers_rise(nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        await asyncio.gather(*(store.commit(unit(share, n, b"%d" % n)) for n in range(1, 3001)))
        assert await said(store) == [b"%d" % n for n in range(1, 3001)]
        assert await place(store) == 3000
        rows = await store.outbox(0, 100)
        assert len(rows) == 100
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)
        await store.relayed([row[0] for row in rows])
        await store.commit(unit(share, 3001, b"new"))
        again = await store.outbox(0, 100_000)
        assert len(again) == 2901
        assert again[-1][0] > max(row[0] for row in rows)
        assert (await store.outbox(again[-2][0], 10)) == [again[-1]]


async def test_more_than_a_batch_takes_is_refused_before_anything_is_written(nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        with pytest.raises(Refused, match="say fewer"):
            await store.commit(unit(share, 1, *[b"x"] * 1000))
        await store.commit(unit(share, 1, *[b"x"] * 999))
        assert len(await said(store)) == 999


async def test_a_dead_letter_as_big_as_messages_may_be_is_kept_byte_for_byte(nats_bus: str) -> None:
    raw = bytes(range(256)) * 3000
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        letter = Waiting(5, "users/ü 1", 3, 2, 9, True, "no\nwhy", "trace\n" * 2000, raw)
        await store.commit(unit(share, 5, parked=letter))
        assert await store.waiting("c") == [letter]


async def test_sql_is_refused_with_the_cure(nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        one = unit(share, 1, b"said")
        one.statements = [("insert into t values (?)", (1,))]
        with pytest.raises(BadStatement, match=r"no SQL.*--store postgresql://"):
            await store.commit(one)
        with pytest.raises(BadStatement, match="no SQL"):
            await store.fetch("select 1")
        assert await said(store) == []


# ------------------------------------------------------------------------------------------------ places and timers


async def test_places_alone_are_written_behind_and_never_go_back(nats_bus: str) -> None:
    async with opened(nats_bus) as store, opened(nats_bus) as other:
        shares = await held(store, "one", *(f"slot/{n}" for n in range(16)))
        for share in shares:
            assert share.slot is not None
            store.move(share, "c", "users", share.slot, LOG, 4)
        store.move(shares[0], "c", "users", 0, LOG, 9)
        assert await other.places("c", LOG, 100) == {}
        await store.flush()
        assert await other.places("c", LOG, 100) == {("users", n): 9 if n == 0 else 4 for n in range(16)}
        store.move(shares[0], "c", "users", 0, LOG, 10)
        await store.commit(unit(shares[0], 11, b"x"))
        await store.flush()
        assert await place(other) == 11
        running = asyncio.ensure_future(store.run())
        store.move(shares[1], "c", "users", 1, LOG, 20)
        while await place(other, 1) != 20:
            pass
        running.cancel()
        with pytest.raises(Damaged, match="another log|read log log"):
            await other.places("c", "a restored log", 100)
        with pytest.raises(Damaged, match="entries are lost"):
            await other.places("c", LOG, 5)


async def test_what_a_timer_was_set_to_is_kept(nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        assert await store.timer("every day") == 0
        one = Unit(None)
        one.timer = ("every day", 1_700_000_000_000_000)
        await store.commit(one)
    async with opened(nats_bus) as store:
        assert await store.timer("every day") == 1_700_000_000_000_000


# ------------------------------------------------------------------------------------------------ instances and claims


async def test_a_share_has_one_holder_until_it_lets_go_or_is_struck_off(nats_bus: str) -> None:
    async with opened(nats_bus) as one, opened(nats_bus) as two:
        (share,) = await held(one, "one a:b:c")
        await two.tick("two", (), join=True)
        assert await two.take("two", ["slot/0"]) == []
        assert await two.take("a stranger", ["slot/1"]) == []
        await one.release([share])
        (again,) = await two.take("two", ["slot/0"])
        assert (again.clean, again.before) == (True, "")
        assert again.fence > share.fence
        await one.release([share])
        standing = await one.tick("one a:b:c", ())
        assert standing.holders == {"slot/0": "two"}
        assert set(standing.instances) == {"one a:b:c", "two"}
        await two.release([again], owner="two")
        standing = await one.tick("one a:b:c", ())
        assert (standing.alive, standing.holders, set(standing.instances)) == (True, {}, {"one a:b:c"})


async def test_a_share_that_two_want_at_once_gets_one_of_them(nats_bus: str) -> None:
    async with opened(nats_bus) as one, opened(nats_bus) as two:
        names = [f"slot/{n}" for n in range(16)]
        await asyncio.gather(one.tick("one", (), join=True), two.tick("two", (), join=True))
        for _ in range(5):
            mine, theirs = await asyncio.gather(one.take("one", names), two.take("two", names))
            assert sorted(each.name for each in (*mine, *theirs)) == sorted(names)
            await asyncio.gather(one.release(mine), two.release(theirs))


async def test_who_was_struck_off_learns_it_and_one_that_beat_meanwhile_is_not(nats_bus: str) -> None:
    async with opened(nats_bus) as one, opened(nats_bus) as two:
        await one.tick("one", (), join=True)
        seen = (await two.tick("two", (), join=True)).instances["one"]
        assert (await one.tick("one", ())).alive
        standing = await two.tick("two", [("one", seen)])
        assert "one" in standing.instances
        assert standing.instances["one"] != seen
        standing = await two.tick("two", [("one", standing.instances["one"])])
        assert set(standing.instances) == {"two"}
        assert not (await one.tick("one", ())).alive
        assert not (await one.tick("one", ())).alive
        assert await one.take("one", ["slot/0"]) == []


async def test_a_tick_says_whether_another_process_wrote_meanwhile(nats_bus: str, tmp_path: Path) -> None:
    async with opened(nats_bus) as one, stores_of(nats_bus, tmp_path) as stores:
        (share,) = await held(one)
        await one.commit(unit(share, 1, b"x", parked=Waiting(1, "users/x", 0, 1, 0, True, "why", "", b"{}")))
        await one.tick("one", ())
        await one.commit(unit(share, 2, b"x"))
        assert not (await one.tick("one", ())).touched
        await stores.retry("mails", "c", 1)
        assert (await one.tick("one", ())).touched
        assert not (await one.tick("one", ())).touched


async def test_a_bucket_keeps_its_id_and_knows_whether_it_was_ever_used(nats_bus: str) -> None:
    async with opened(nats_bus) as one, opened(nats_bus) as two:
        assert one.id == two.id != ""
        assert one.place == two.place
        assert one.is_fresh
        assert two.is_fresh
        await held(one)
    async with opened(nats_bus) as three:
        assert three.id == one.id
        assert not three.is_fresh


async def test_a_bucket_that_is_no_store_is_refused(nats: Nats, nats_bus: str) -> None:
    name = nats_bus.rpartition("/")[2]
    wrong = {"name": f"{name}_store_mails", "subjects": [f"{name}.store.mails.>"], "max_msgs_per_subject": 5}
    assert "error" not in nats.request(f"$JS.API.STREAM.CREATE.{name}_store_mails", wrong)
    with pytest.raises(Refused, match="max_msgs_per_subject = 5.*set it to 1"):
        async with opened(nats_bus):
            pass


async def test_a_bucket_that_was_taken_away_stops_loudly(nats: Nats, nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        nats.drop(nats_bus.rpartition("/")[2])
        with pytest.raises(Damaged, match="is gone"):
            await store.commit(unit(share, 1, b"x"))
        with pytest.raises(Damaged, match="is gone"):
            await store.waiting("c")


# ------------------------------------------------------------------------------------------------ letters


async def test_a_person_sees_dead_letters_and_decides(nats_bus: str, tmp_path: Path) -> None:
    async with opened(nats_bus) as store, stores_of(nats_bus, tmp_path) as stores:
        (share,) = await held(store)
        dead = Waiting(5, "users/x", 0, 3, 0, True, "why", "trace", b'{"id":1}')
        for n, each in enumerate((dead, Waiting(6, "users/x", 0), Waiting(7, "users/y", 0)), 5):
            await store.commit(unit(share, n, parked=each))
        (letter,) = await stores.letters("mails")
        assert (letter.service, letter.consumer, letter.position, letter.behind) == ("mails", "c", 5, 1)
        assert bytes(letter.message) == b'{"id":1}'
        assert await stores.letters() == [letter]
        await stores.retry("mails", "c", 5)
        assert await stores.letters() == []
        assert (await store.waiting("c"))[0] == Waiting(5, "users/x", 0, 0, 0, False, "why", "trace", b'{"id":1}')
        for wrong in (5, 6, 99):
            with pytest.raises(Refused, match="no dead letter"):
                await stores.discard("mails", "c", wrong)
        await store.commit(unit(share, 8, parked=dead))
        await stores.discard("mails", "c", 5)
        assert [each.position for each in await store.waiting("c")] == [6, 7]
        with pytest.raises(Refused, match=r"no store here.*mails"):
            await stores.letters("nobody")
        with pytest.raises(Refused, match="no store here"):
            await stores.retry("nobody", "c", 1)


async def test_a_service_that_keeps_data_gets_files_that_say_on_which_machine_they_lie(
    nats_bus: str, tmp_path: Path
) -> None:
    async with stores_of(nats_bus, tmp_path) as stores:
        bucket = await stores.open("mails", keeps=False)
        files = await stores.open("cards", ["create table t (x)"])
        assert bucket.place.startswith("bucket ")
        assert files.place == f"{tmp_path / 'cards'} on {platform.node()}"
        assert await files.fetch("select count(*) from t") == [(0,)]
        assert await stores.letters("cards") == []
        assert await stores.letters() == []
        await bucket.close()
        await files.close()


# ------------------------------------------------------------------------------------------------ faults


async def persist(store: NatsStore, one: Unit) -> None:
    """As a consumer does: what the store does not take now is tried again."""
    while True:
        try:
            return await store.commit(one)
        except Unavailable:
            await asyncio.sleep(0.01)


@pytest.fixture
def own_nats() -> Iterator[Nats]:
    """A server that may be killed."""
    server = Nats(name="killed")
    yield server
    server.remove()


async def test_nothing_acknowledged_is_lost_when_the_server_is_killed_under_load(own_nats: Nats) -> None:
    acknowledged: set[bytes] = set()
    async with opened(own_nats.url("b"), patience=20.0) as store:
        shares = await held(store, "one", *(f"slot/{n}" for n in range(16)))
        stop = asyncio.Event()

        async def lane(share: Share) -> int:
            position = 0
            while not stop.is_set():
                position += 1
                assert share.slot is not None
                body = b"%s:%d" % (share.name.encode(), position)
                await persist(store, unit(share, position, body, slot=share.slot))
                acknowledged.add(body)
            return position

        lanes = [asyncio.ensure_future(lane(share)) for share in shares]
        for n in range(1, 4):
            while len(acknowledged) < 600 * n:  # noqa: ASYNC110 - what counts grows in many tasks
                await asyncio.sleep(0.001)
            own_nats.kill()
            await asyncio.to_thread(own_nats.start)
        stop.set()
        ends = await asyncio.gather(*lanes)
    async with opened(own_nats.url("b")) as after:
        found = await said(after)
        assert acknowledged <= set(found)
        assert len(found) == len(set(found))
        assert await after.places("c", LOG, 10_000_000) == {("users", n): end for n, end in enumerate(ends)}
        by_lane = [
            [int(each.partition(b":")[2]) for each in found if each.startswith(b"slot/%d:" % n)] for n in range(16)
        ]
        assert by_lane == [list(range(1, end + 1)) for end in ends]
        assert (await after.tick("one", ())).alive


async def test_a_batch_whose_answer_gets_lost_stands_once(nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        link = store._bucket.link
        call = link.call

        def deaf(*arguments: object, **named: object) -> object:
            """The server has answered, and the connection breaks before that is heard."""
            link.call = call  # type: ignore[method-assign]
            heard: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            answered = call(*arguments, **named)  # type: ignore[arg-type]
            answered.add_done_callback(lambda _: heard.set_exception(Lost("the connection broke")))
            return heard

        link.call = deaf  # type: ignore[method-assign,assignment]
        await store.commit(unit(share, 1, b"a", b"b"))
        assert [row[3] for row in await store.outbox(0, 10)] == [b"a", b"b"]
        await store.commit(unit(share, 2, b"c"))
        assert await said(store) == [b"a", b"b", b"c"]
        link.call = deaf  # type: ignore[method-assign,assignment]
        assert [each.name for each in await store.take("one", ["slot/1", "slot/2"])] == ["slot/1", "slot/2"]


@pytest.mark.parametrize("batch", [True, False])
async def test_a_write_that_arrives_after_a_later_one_changes_nothing(nats: Nats, nats_bus: str, batch: bool) -> None:
    late = Late(nats.port)
    async with late.open() as address, opened(f"nats://{address}/{nats_bus.rpartition('/')[2]}", patience=2.0) as store:
        (share,) = await held(store)
        await store.commit(unit(share, 1))
        late.hold()
        writing = asyncio.ensure_future(store.commit(unit(share, 5, *[b"late"] * batch)))
        await late.break_after(b'"position":5')
        await writing
        assert await place(store) == 5
        await store.commit(unit(share, 9, b"newer"))
        before = state(nats, nats_bus)["last_seq"]
        await late.arrive()
        assert b'"err_code":10071' in late.answers
        assert state(nats, nats_bus)["last_seq"] == before
        assert await place(store) == 9
        assert await said(store) == [b"late"] * batch + [b"newer"]
        await store.release([share])
        await store.tick("two", (), join=True)
        assert len(await store.take("two", ["slot/0"])) == 1


async def test_while_the_server_is_away_a_unit_is_refused_as_unavailable_and_goes_when_it_is_back(
    own_nats: Nats,
) -> None:
    async with opened(own_nats.url("b"), patience=0.5) as store:
        (share,) = await held(store)
        own_nats.kill()
        store.move(share, "noted", "users", 0, LOG, 5)
        with pytest.raises(Unavailable):
            await store.commit(unit(share, 1, b"x"))
        with pytest.raises(Unavailable):
            await store.flush()
        await asyncio.to_thread(own_nats.start)
        await store._bucket.link.connected(10.0)
        await store.commit(unit(share, 1, b"x"))
        assert await said(store) == [b"x"]
        assert await store.places("noted", LOG, 10) == {("users", 0): 5}


async def test_ten_thousand_messages_said_and_relayed_leave_a_small_bucket(nats: Nats, nats_bus: str) -> None:
    async with opened(nats_bus) as store:
        (share,) = await held(store)
        await asyncio.gather(*(store.commit(unit(share, n, b"x" * 300)) for n in range(1, 10_001)))
        numbers = [row[0] for row in await store.outbox(0, 20_000)]
        assert len(numbers) == 10_000
        await store.relayed(numbers)
        await store.relayed(numbers[:10])
        assert await store.outbox(0, 10) == []
        left = state(nats, nats_bus)
        assert left["messages"] < 10
        assert left["bytes"] < 5_000


async def test_on_three_servers_what_was_acknowledged_is_read_at_once_by_every_handle(
    nats_cluster: NatsCluster, bus_name: str
) -> None:
    async with opened(nats_cluster.url(bus_name)) as one, opened(nats_cluster.url(bus_name)) as two:
        (share,) = await held(one)
        for n in range(1, 101):
            await one.commit(unit(share, n, b"%d" % n, parked=Waiting(n, "users/x", 0)))
            for handle in (two, one):
                assert (await said(handle))[-1] == b"%d" % n
                assert (await handle.waiting("c"))[-1].position == n
                assert await place(handle) == n
    nats_cluster.drop(bus_name)


async def test_subjects_that_come_in_pages_are_all_found_though_some_are_taken_away_meanwhile(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend_at(nats_bus) as backend:
        store = await backend.stores.open("s", (), keeps=False)
        assert isinstance(store, NatsStore)
        bucket = store._bucket
        prefix, asked = bucket._prefix, list[int]()
        stand = [f"{prefix}due.lead.{n}.x" for n in range(7)]

        async def pages(link: object, name: str, question: dict[str, Any], kind: type[Any]) -> object:
            asked.append(question["offset"])
            page = stand[question["offset"] : question["offset"] + 3]
            told = msgspec.convert({"state": {"subjects": dict.fromkeys(page, 1)}, "total": len(stand)}, kind)
            if len(asked) == 1:
                # All that come behind move to the front.
                del stand[0]
            return told

        monkeypatch.setattr("cauce.backends.nats.bucket.ask", pages)
        found = await bucket.subjects("due.lead.>")
        assert {int(tokens[2]) for tokens in found} >= set(range(1, 7))
        assert asked == [0, 3, 0, 3]
        monkeypatch.undo()
        await store.close()
