"""A store on PostgreSQL whose connections and server fail: what was committed stands, once; the rest comes later."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from cauce.backends.postgres import home as home_module
from cauce.backends.postgres.home import home_of
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.store import PostgresStore
from cauce.backends.postgres.stores import PostgresStores
from cauce.backends.postgres.units import Units
from cauce.clock import SystemClock
from cauce.errors import Busy, Refused, Unavailable
from cauce.store import BadStatement
from tests.servers import Postgres
from tests.test_store_promises import ADD, EFFECTS, share_of, unit


@pytest.fixture
async def link(postgres: Postgres, bus_name: str) -> AsyncIterator[Link]:
    made = Link(postgres.url(schema=bus_name), SystemClock(), patience=1.0)
    await made.open()
    yield made
    await made.close()
    postgres.drop(home_of(bus_name, "s").schema)


@pytest.fixture
async def store(link: Link) -> AsyncIterator[PostgresStore]:
    made = await PostgresStores(link, link.clock).open("s", [EFFECTS])
    yield made
    await made.close()


async def names(store: PostgresStore) -> list[Any]:
    return sorted(name for (name,) in await store.fetch("select name from effects"))


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_commit_whose_reply_is_lost_is_found_out_and_nothing_is_done_twice(
    when: str, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    say, lost = Units._say, list[str]()

    async def loses(self: Units, sql: str) -> None:
        if sql.endswith("commit") and not lost:
            lost.append(sql)
            if when == "after":
                await say(self, sql)
            assert self._session is not None
            self._session.terminate()
            raise ConnectionResetError("the reply is lost")
        await say(self, sql)

    share = await share_of(store)
    monkeypatch.setattr(Units, "_say", loses)
    store.move(share, "react", "things", 1, "log", 6)
    mine = unit(share, (ADD, ("a", 1)), position=7)
    mine.said = [("react", 1, b"once")]
    bad = unit(share, ("insert into nowhere values (1)", ()))
    told = await asyncio.gather(store.commit(mine), store.commit(bad), return_exceptions=True)
    assert lost
    assert [type(each) for each in told] == [type(None), BadStatement]
    assert await names(store) == ["a"]
    assert [row[3] for row in await store.outbox(0, 9)] == [b"once"]
    await store.flush()
    assert await store.places("react", "log", 100) == {("things", 1): 7}, "a place went back behind its unit"


async def commit_all(store: PostgresStore, share: Any, many: int, width: int) -> None:
    """As a consumer does: what is unavailable is committed again."""
    numbers = iter(range(many))

    async def some() -> None:
        for n in numbers:
            mine = unit(share, (ADD, (f"{n:05}", n)), position=n + 1)
            mine.said = [("react", 1, b"%05d" % n)]
            while True:
                try:
                    await store.commit(mine)
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(some() for _ in range(width)))


async def once(store: PostgresStore, many: int) -> None:
    assert await names(store) == [f"{n:05}" for n in range(many)]
    rows = await store.outbox(0, 2 * many)
    assert sorted(said for _, _, _, said in rows) == [b"%05d" % n for n in range(many)]


async def test_connections_that_are_killed_again_and_again_take_nothing_and_double_nothing(
    store: PostgresStore, postgres: Postgres
) -> None:
    share = await share_of(store)
    done = asyncio.ensure_future(commit_all(store, share, 4000, 16))
    kills = 0
    while not done.done():
        kill = (
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like 'cauce store%'"
        )
        ((count,),) = await asyncio.to_thread(postgres.sql, kill)
        kills += int(count)
        await asyncio.sleep(0.01)
    await done
    assert kills > 3
    await once(store, 4000)


async def test_a_server_that_crashes_under_load_and_comes_back_lost_nothing_and_doubled_nothing(bus_name: str) -> None:
    server = Postgres()
    try:
        link = Link(server.url(schema=bus_name), SystemClock(), patience=1.0)
        await link.open()
        store = await PostgresStores(link, link.clock).open("s", [EFFECTS])
        share = await share_of(store)
        done = asyncio.ensure_future(commit_all(store, share, 6000, 16))
        crashes = 0
        while not done.done() and crashes < 3:
            await asyncio.sleep(0.15)
            await asyncio.to_thread(server.restart, "immediate")
            crashes += 1
        await done
        assert crashes == 3
        await once(store, 6000)
        await store.close()
        await link.close()
    finally:
        server.remove()


async def test_while_the_server_is_away_a_store_says_so_and_goes_on_by_itself(bus_name: str) -> None:
    server = Postgres(fsync="off")
    try:
        link = Link(server.url(schema=bus_name), SystemClock(), patience=0.5)
        await link.open()
        store = await PostgresStores(link, link.clock).open("s", [EFFECTS])
        share = await share_of(store)
        server.stop("immediate")
        for away in (store.commit(unit(share, (ADD, ("a", 1)))), store.tick("me", ()), store.fetch("select 1")):
            with pytest.raises(Unavailable):
                await away
        store.move(share, "react", "things", 1, "log", 6)
        with pytest.raises(Unavailable):
            await store.flush()
        server.start()
        async with asyncio.timeout(30):
            await commit_all(store, share, 3, 1)
        await once(store, 3)
        await store.close()
        await link.close()
    finally:
        server.remove()


async def test_who_holds_the_turn_too_long_is_named(store: PostgresStore, link: Link) -> None:
    session = await link.dedicated("in the way")
    await session.execute(f"begin; select pg_advisory_xact_lock({home_of(link.schema, 's').lock})")
    with pytest.raises(Busy, match=r"pid \d+ \(cauce in the way"):
        await store.commit(unit(None, (ADD, ("a", 1))))
    await session.close()
    await store.commit(unit(None, (ADD, ("a", 1))))
    assert await names(store) == ["a"]


async def test_a_check_that_a_table_makes_at_the_end_fails_its_own_unit_only(link: Link) -> None:
    tables = "create table a (id text primary key); create table b (a text references a deferrable initially deferred)"
    store = await PostgresStores(link, link.clock).open("s", [tables])
    whole = unit(None, ("insert into b values (?)", ("x",)), ("insert into a values (?)", ("x",)))
    half = unit(None, ("insert into b values (?)", ("y",)))
    again = unit(None, ("insert into b values (?)", ("z",)), ("insert into a values (?)", ("z",)))
    told = await asyncio.gather(*(store.commit(each) for each in (whole, half, again)), return_exceptions=True)
    assert [type(each) for each in told] == [type(None), BadStatement, type(None)]
    assert await store.fetch("select a from b order by a") == [("x",), ("z",)]
    await store.close()


async def test_a_value_of_another_type_is_named_with_what_to_pass(store: PostgresStore) -> None:
    with pytest.raises(BadStatement, match=r"\(expected str, got int\)"):
        await store.commit(unit(None, (ADD, (1, 1))))
    with pytest.raises(BadStatement, match=r"\(expected str, got int\)"):
        await store.fetch("select * from effects where name = ?", (1,))


async def test_a_role_that_may_not_make_a_schema_is_told_what_must_be_run(
    postgres: Postgres, bus_name: str, link: Link
) -> None:
    postgres.sql(f"create role {bus_name} login")
    poor = Link(postgres.url(schema=bus_name, user=bus_name), SystemClock())
    await poor.open()
    home = home_of(bus_name, "s")
    with pytest.raises(Refused, match=f"create schema if not exists {home.quoted} authorization"):
        await PostgresStores(poor, poor.clock).open("s", [EFFECTS])
    postgres.sql(f"create schema if not exists {home.quoted} authorization {bus_name}")
    store = await PostgresStores(poor, poor.clock).open("s", [EFFECTS])
    await store.commit(unit(await share_of(store), (ADD, ("a", 1))))
    assert await names(store) == ["a"]
    await store.close()
    await poor.close()
    postgres.drop(home.schema)
    postgres.sql(f"drop role {bus_name}")


async def test_old_turns_are_tidied_away_but_the_last_of_each_writer_is_kept(
    store: PostgresStore, postgres: Postgres, link: Link
) -> None:
    share = await share_of(store)
    for n in range(5):
        await store.commit(unit(share, (ADD, (str(n), n))))
    turns = f"{home_of(link.schema, 's').quoted}.cauce_turns"
    postgres.sql(f"update {turns} set at = at - interval '6 minutes'")
    postgres.sql(f"insert into {turns} (writer, number, loud) values ('other', 1, true)")
    assert (await store.tick("me", ())).touched
    assert postgres.sql(f"select number from {turns} order by change") == [["5"], ["1"]]


def test_each_service_of_each_bus_has_a_schema_of_its_own() -> None:
    pairs = [
        (bus, service) for bus in ("a", "a_b", "a_", "a__b", "x" * 63) for service in ("b", "b_c", "c", "b-c", "y" * 63)
    ]
    pairs += [("a_b", "c_b"), ("a", "b_c_b"), ("x" * 63, "y" * 62 + "z")]
    made = {home_of(*pair).schema for pair in pairs}
    assert len(made) == len(pairs)
    assert all(len(name) <= 63 for name in made)
    assert home_of("cauce", "users").schema == "cauce_users"


async def test_a_store_of_a_newer_format_is_refused(
    store: PostgresStore, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "FORMAT", 0)
    with pytest.raises(Refused, match="has format 1, this code knows 0: deploy newer code"):
        await PostgresStores(link, link.clock).open("s", [EFFECTS])


INSTANCE = """
import asyncio, sys
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.stores import PostgresStores
from cauce.clock import SystemClock
from cauce.store import Unit

async def main(url, owner, schema):
    link = Link(url, SystemClock())
    await link.open()
    store = await PostgresStores(link, link.clock).open("s", [schema])
    await store.tick(owner, (), join=True)
    (share,) = await store.take(owner, ["slot/1"])
    place = (await store.places("react", "log", 10**9)).get(("things", 1), 0)
    print("ready", flush=True)
    while True:
        place += 1
        unit = Unit(share)
        unit.statements.append(("insert into effects values (?, ?)", (owner, place)))
        unit.place = "react", "things", 1, "log", place
        await store.commit(unit)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_who_takes_over_from_an_instance_that_was_killed_goes_on_right_behind_its_last_unit(
    store: PostgresStore, postgres: Postgres, link: Link, program: Callable[..., subprocess.Popen[str]]
) -> None:
    url = postgres.url(schema=link.schema)
    for n in range(3):
        process = program(INSTANCE, url, f"i{n}", EFFECTS)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        async with asyncio.timeout(30):
            while await store.fetch("select count(*) > 50 from effects where name = ?", (f"i{n}",)) == [(False,)]:
                pass
        process.kill()
        process.wait()
        standing = await store.tick("me", (), join=True)
        await store.tick("me", [(f"i{n}", standing.instances[f"i{n}"])])
    rows = await store.fetch("select n from effects order by n")
    assert rows == [(n,) for n in range(1, len(rows) + 1)], "a unit was done twice, or none was"
    assert await store.places("react", "log", 10**9) == {("things", 1): len(rows)}
