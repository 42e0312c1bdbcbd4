"""What a view or replica promises wherever it lies: in files, and in schemas of PostgreSQL."""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cauce import Bus, Damaged, NotPermitted, Refused, Service, Store, Unavailable, running
from cauce.backends import open_backend, stores_at
from cauce.backends.postgres.builds import SchemaBuilds
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, digest, sealed
from cauce.copying import views_of
from cauce.derived import Derived, feed
from cauce.log import Filter
from cauce.replica import Replica
from cauce.schema import encode
from cauce.service import bind
from cauce.shelf import Moved, Shelf
from cauce.store import Stores
from shop import cards, crm, users
from shop.cards import Card, IssueCard
from shop.crm import WhoHas
from shop.users import ChangeEmail, RegisterUser
from tests import test_replicas
from tests.servers import Postgres
from tests.test_postgres import Proxy, opened
from tests.test_replicas import FIELDS, THINGS, All
from tests.test_views import ADD, SUMS, Grow, Grown, Rows, owner, sums

KEPT = ("sqlite", "postgresql")


@pytest.fixture(params=KEPT)
def kept_bus(request: pytest.FixtureRequest) -> str:
    """The address of an empty bus of each kind whose stores keep views."""
    return str(request.getfixturevalue({"sqlite": "bus_url", "postgresql": "postgres_bus"}[request.param]))


@asynccontextmanager
async def stores_of(url: str) -> AsyncIterator[Stores]:
    backend = await open_backend(url, SystemClock())
    try:
        yield backend.stores
    finally:
        await backend.close()


def view_on(bus: Bus, shelf: Shelf, service: Service) -> Derived:
    (view,) = views_of(service, bind(service), shelf)
    return Derived(view, service.name, bus.facts, shelf, bus.clock)


async def rows_of(derived: Derived) -> list[tuple[Any, ...]]:
    return await derived.reading.fetch("select name, n from sums order by name")


# -------------------------------------------------------------------------------------------------- the same everywhere


async def test_a_view_holds_each_event_once_however_often_its_service_stops(each_bus: str) -> None:
    for turn in range(3):
        async with running(owner, sums(), bus=each_bus) as bus:
            await asyncio.gather(*(bus.call(Grow(f"t{n % 7}", n)) for n in range(100)))
            receipt = await bus.call(Grow("last", 1))
            rows = await bus.ask(Rows(), after=receipt)
            found = dict(rows)
            assert sum(found.values()) - found["last"] == (turn + 1) * sum(range(100))
            assert found["last"] == turn + 1


async def test_the_shop_runs_the_same(each_bus: str) -> None:
    async with running(users.service, cards.service, crm.service, bus=each_bus) as bus:
        await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
        receipt = await bus.call(ChangeEmail("42", "ana@corp.example"))
        assert await bus.ask(WhoHas("corp.example"), after=receipt) == ["42"]
        await bus.settled()
        await bus.call(IssueCard("c1", "42"))
        assert await bus.state(Card, "c1") == Card("c1", "42", "Ana")
    # The owner is not there, and its users are known all the same.
    async with running(cards.service, bus=each_bus) as bus:
        await bus.call(IssueCard("c2", "42"))


async def test_a_view_that_wants_other_tables_is_built_beside_the_old_one(kept_bus: str) -> None:
    async with running(owner, sums(), bus=kept_bus) as bus:
        await asyncio.gather(*(bus.call(Grow(f"t{n % 5}", n)) for n in range(50)))
        await bus.settled()
        before = await bus.ask(Rows())

    def double(event: Grown, db: Store) -> None:
        db.execute(ADD, (event.name, 2 * event.n))

    changed = sums(double, SUMS.replace("n integer", "n bigint"))
    async with running(owner, changed, bus=kept_bus) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == [(name, 2 * n) for name, n in before]
        async with stores_of(kept_bus) as stores:
            builds = stores.shelf("viewer").builds("sums", "view sums")
            assert await builds.numbers() == [await builds.live()] == [2]


async def test_a_rebuild_beside_a_running_service_loses_and_doubles_nothing(kept_bus: str, tmp_path: Path) -> None:
    (tmp_path / "viewing.py").write_text("from tests.test_views import sums\nservice = sums()\n")
    done = asyncio.Event()

    async def writes(bus: Bus) -> int:
        total = 0
        while not done.is_set():
            receipts = await asyncio.gather(*(bus.call(Grow(f"t{n}", 1)) for n in range(10)))
            total += 10
            assert sum(n for _, n in await bus.ask(Rows(), after=receipts[-1])) >= total - 9
        return total

    async with running(owner, sums(), bus=kept_bus) as bus:
        await asyncio.gather(*(bus.call(Grow(f"t{n % 5}", 1)) for n in range(500)))
        writing = asyncio.create_task(writes(bus))
        result = await asyncio.to_thread(invoked, "rebuild", "viewing", "sums", "--bus", kept_bus, path=tmp_path)
        done.set()
        total = await writing + 500
        await bus.settled()
        assert (result["name"], result["kind"]) == ("sums", "view")
        assert result["entries"] >= 500
        assert sum(n for _, n in await bus.ask(Rows())) == total
        async with stores_of(kept_bus) as stores:
            assert await stores.shelf("viewer").builds("sums", "view sums").live() == 2


def invoked(*arguments: str, path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output.splitlines()[-1])


async def test_a_build_of_another_log_or_ahead_of_it_stops_loudly(kept_bus: str) -> None:
    async with running(owner, sums(), bus=kept_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
        head = await bus.facts.head()
        async with AsyncExitStack() as stack:
            stores = await stack.enter_async_context(stores_of(kept_bus))
            shelf = stores.shelf("other")
            (view,) = views_of(sums(), bind(sums()), shelf)
            for log, position in (("another", 0), (bus.facts.id, head + 1)):
                builds = shelf.builds("sums", "view sums of other")
                number = await builds.live() + 1
                build = await builds.create(number, SUMS, log, view.fingerprint)
                await build.write([(position, ())])
                await builds.switch(build)
                await build.close()
                derived = Derived(view, "other", bus.facts, shelf, bus.clock)
                with pytest.raises(Damaged, match="cauce reset other"):
                    await derived.open()
                await derived.close()
                await builds.remove([number])


async def test_what_lies_on_a_shelf_is_known_by_name_and_when_it_is_taken_away_it_is_built_anew(kept_bus: str) -> None:
    async with running(owner, sums(), bus=kept_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
        before = await bus.copies["viewer"].view("sums").fetch("select * from sums")
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(stores_of(kept_bus))
        shelf = stores.shelf("viewer")
        assert await shelf.names() == ["sums"]
        assert await stores.shelf("view").names() == []
        builds = shelf.builds("sums", "view sums of viewer")
        await (await builds.create(await builds.live() + 1, SUMS, "unfinished", "x")).close()
        await builds.clear()
        assert (await builds.live(), await builds.numbers(), await shelf.names()) == (0, [], [])
        await builds.clear()
    async with running(owner, sums(), bus=kept_bus) as bus:
        await bus.settled()
        assert await bus.copies["viewer"].view("sums").fetch("select * from sums") == before


@pytest.mark.parametrize("many", [1, 5])
async def test_a_statement_that_fails_is_named_and_what_stands_before_it_is_kept(kept_bus: str, many: int) -> None:
    def bad(event: Grown, db: Store) -> None:
        db.execute(
            "insert into sums values (?, ?)" if event.n else "insert into nowhere values (?, ?)", (event.name, 1)
        )

    async with running(owner, bus=kept_bus) as bus:
        for n in range(many):
            await bus.call(Grow(f"t{n}"))
        receipt = await bus.call(Grow("bad", 0))
    async with running(owner, sums(bad), bus=kept_bus) as bus:
        with pytest.raises(Unavailable, match=r"bad failed at position \d+ .things/bad, Grown.: .*nowhere"):
            await bus.ask(Rows(), after=receipt)
        async with stores_of(kept_bus) as stores:
            reading = stores.shelf("viewer").builds("sums", "view sums").reading
            assert await reading.fetch("select count(*) from sums") == [(many,)]
            await reading.close()


@pytest.mark.parametrize("sql", ["commit", "begin", "savepoint a", "rollback"])
async def test_a_view_may_not_end_its_transaction(kept_bus: str, sql: str) -> None:
    def ends(event: Grown, db: Store) -> None:
        db.execute(ADD, (event.name, event.n))
        db.execute(sql)

    async with running(owner, sums(ends), bus=kept_bus) as bus:
        receipt = await bus.call(Grow("a"))
        with pytest.raises(Unavailable, match="ends failed at position"):
            await bus.ask(Rows(), after=receipt)


async def test_a_view_that_raises_a_lost_connection_of_its_own_is_told_so(kept_bus: str) -> None:
    def raises(event: Grown, db: Store) -> None:
        raise ConnectionResetError("mine")

    async with running(owner, sums(raises), bus=kept_bus) as bus:
        receipt = await bus.call(Grow("a"))
        with pytest.raises(Unavailable, match="raises failed at position .*mine"):
            await bus.ask(Rows(), after=receipt)


async def test_a_query_that_does_more_than_read_is_refused(kept_bus: str) -> None:
    async with running(owner, sums(), bus=kept_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
        async with stores_of(kept_bus) as stores:
            reading = stores.shelf("viewer").builds("sums", "view sums").reading
            for sql in ("delete from sums", "select nothing from sums", "select ? from sums"):
                with pytest.raises(Refused, match="view sums: "):
                    await reading.fetch(sql)
            assert await reading.fetch("select n from sums where name = ?", ("a",)) == [(1,)]
            await reading.close()


async def test_only_one_builds_at_a_time_and_only_one_feeds(kept_bus: str) -> None:
    async with stores_of(kept_bus) as one, stores_of(kept_bus) as two:
        shelves = one.shelf("s"), two.shelf("s")
        building = [each.builds("v", "view v").building for each in shelves]
        for first, second in ((shelves[0].lead, shelves[1].lead), (building[0], building[1])):
            assert await first.take()
            assert first.held
            assert not await second.take()
            await first.release()
            assert await second.take()
            await second.release()


async def grown(bus: Bus, many: int) -> None:
    await asyncio.gather(*(bus.call(Grow(f"t{n}")) for n in range(many)))


CHANGED = SUMS.replace("n integer", "n bigint")


async def test_code_of_another_version_writes_nothing_into_a_build(
    kept_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(owner, sums(), bus=kept_bus) as bus, stores_of(kept_bus) as stores:
        await grown(bus, 5)
        await bus.settled()
        newer = view_on(bus, stores.shelf("viewer"), sums(schema=CHANGED))
        await newer.rebuild(lambda *_: None)
        before = await newer.reading.position()
        with caplog.at_level(logging.WARNING, "cauce"):
            await grown(bus, 5)
            async with asyncio.timeout(10):
                while "was built by other code: start this process anew" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert await rows_of(newer) == [(f"t{n}", 1) for n in range(5)]
        assert await newer.reading.position() == before
        await newer.close()
    async with running(owner, sums(schema=CHANGED), bus=kept_bus) as bus:
        await bus.settled()
        assert await bus.ask(Rows()) == [(f"t{n}", 2) for n in range(5)]


async def test_who_feeds_no_more_lets_another_build(kept_bus: str) -> None:
    async with running(owner, bus=kept_bus) as bus, stores_of(kept_bus) as stores:
        await grown(bus, 5)
        shelf = stores.shelf("viewer")
        old = view_on(bus, shelf, sums())
        await old.open()
        await old.close()
        one, two = (view_on(bus, shelf, sums(schema=CHANGED)) for _ in range(2))
        await one.open()
        await one.stop()
        async with asyncio.timeout(5):
            await two.open()
        await two.close()
        await one.close()


async def test_functions_that_ask_their_view_are_answered_while_it_lacks_what_was_promised(kept_bus: str) -> None:
    async def asks(event: Grown, db: Store) -> None:
        await db.fetch("select n from sums")
        db.execute(ADD, (event.name, event.n))

    async with running(owner, bus=kept_bus) as bus, stores_of(kept_bus) as stores:
        await grown(bus, 5)
        head = await bus.facts.head()
        view = view_on(bus, stores.shelf("viewer"), sums(asks))
        await view.open()
        view.reading.reached(head)
        await feed(bus.facts, [view], bus.clock)
        async with asyncio.timeout(10):
            await view.wait(head)
        assert await rows_of(view) == [(f"t{n}", 1) for n in range(5)]
        await view.close()


async def test_a_start_does_not_wait_for_a_view_that_who_feeds_does_not_know(
    kept_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.copies._WAIT", 0.2)
    async with stores_of(kept_bus) as stores:
        lead = stores.shelf("viewer").lead
        assert await lead.take()
        async with asyncio.timeout(10), running(owner, sums(), bus=kept_bus) as bus:
            receipt = await bus.call(Grow("a"))
            with pytest.raises(Unavailable, match="view sums of viewer is not built yet"):
                await bus.ask(Rows(), after=receipt)
            await lead.release()
            assert await again(lambda: bus.ask(Rows(), after=receipt)) == [("a", 1)]


async def test_a_new_build_is_live_only_with_all_that_was_read_of_the_old_one(kept_bus: str) -> None:
    async with running(owner, bus=kept_bus) as bus, stores_of(kept_bus) as stores:
        shelf = stores.shelf("viewer")
        old, new = view_on(bus, shelf, sums()), view_on(bus, shelf, sums(schema=CHANGED))
        await grown(bus, 5)
        await old.open()
        await new.open()
        seen = await bus.facts.head()
        # Who fed the old one does not know yet that another feeds.
        await grown(bus, 5)
        await feed(bus.facts, [old], bus.clock)
        head = await bus.facts.head()
        await old.wait(head)
        new.start()
        page = await bus.facts.read(Filter(domains=frozenset({"things"})), after=0, limit=1000)
        await new.take_all([entry for entry in page.entries if entry.position <= seen])
        new.looked(seen)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await new.wait(seen)
        assert await old.reading.position() == head
        await feed(bus.facts, [new], bus.clock)
        await new.wait(head)
        assert await rows_of(new) == [(f"t{n}", 2) for n in range(5)]
        await new.close()
        await old.close()


# --------------------------------------------------------------------------------------------------- replicas by value


@asynccontextmanager
async def replica_on(url: str) -> AsyncIterator[tuple[Replica[All], Derived]]:
    """A replica that holds `THINGS`."""
    async with running(test_replicas.owner, bus=url) as bus, stores_of(url) as stores:
        shelf = stores.shelf("keeper")
        replica = Replica("keeper", All, shelf.dialect)
        derived = Derived(replica, "keeper", bus.records, shelf, bus.clock)
        await derived.open()
        derived.start()
        entries = [record(n, thing) for n, thing in enumerate(THINGS, start=1)]
        await derived.take_all(entries)
        await derived.wait(len(THINGS))
        yield replica, derived
        await derived.close()


def record(position: int, thing: test_replicas.Thing) -> Entry:
    entry = sealed(f"things/{thing.name}", "Thing", SystemClock().id(), Meta(1), encode(thing))
    return msgspec.structs.replace(entry, position=position, version=1, digest=digest(entry, 1))


async def test_every_kind_of_field_comes_back_as_it_was(kept_bus: str) -> None:
    async with replica_on(kept_bus) as (replica, derived):
        for thing in THINGS:
            (row,) = await derived.reading.rows(*replica.by_key(thing.name))
            copy = replica.made(row)
            assert copy == All(*(getattr(thing, name) for name in FIELDS))
            assert [type(getattr(copy, name)) for name in FIELDS] == [type(getattr(thing, name)) for name in FIELDS]


async def test_find_and_count_compare_by_value(kept_bus: str) -> None:
    found = test_replicas.FOUND
    async with replica_on(kept_bus) as (replica, derived):
        for equals, names in found:
            rows = await derived.reading.fetch(*replica.equal(equals, 100))
            assert "".join(replica.made(row).name for row in rows) == names, equals
            assert await derived.reading.fetch(*replica.number(equals)) == [(len(names),)], equals


async def test_an_older_record_does_not_bring_a_copy_back(kept_bus: str) -> None:
    async with replica_on(kept_bus) as (replica, derived):
        await derived.take_all([record(10, test_replicas.Thing("a", 99))])
        await derived.wait(10)
        (row,) = await derived.reading.rows(*replica.by_key("a"))
        assert replica.made(row).n == 1


# ------------------------------------------------------------------------------------------------------ in two dialects


async def test_tables_may_be_given_for_each_database(kept_bus: str) -> None:
    tables = {
        "sqlite": "create table sums (name text primary key, n integer not null) without rowid",
        "postgresql": "create table sums (name text primary key, n bigint not null) with (fillfactor = 50)",
    }
    own = {"sqlite": "create table t (a any) strict", "postgresql": "create table t (a jsonb)"}
    service = sums(schema=tables)
    service.schema = (own,)
    async with running(owner, service, bus=kept_bus) as bus:
        assert await bus.ask(Rows(), after=await bus.call(Grow("a"))) == [("a", 1)]


async def test_tables_that_are_not_given_for_this_database_are_refused_before_anything_is_written(
    kept_bus: str,
) -> None:
    mine = "postgresql" if kept_bus.startswith("postgres") else "sqlite"
    other = ({*KEPT} - {mine}).pop()
    for service in (sums(schema={other: SUMS}), Service("viewer", schema={other: SUMS})):
        with pytest.raises(Refused, match=f"viewer: its schema is not given for {mine}"):
            async with running(service, bus=kept_bus):
                pass
    with pytest.raises(Refused, match="its schema is given for mysql: name sqlite or postgresql"):
        async with running(sums(schema={"mysql": SUMS, mine: SUMS}), bus=kept_bus):
            pass


# --------------------------------------------------------------------------------------------------------- PostgreSQL


async def test_of_two_who_feed_one_view_at_once_none_counts_an_event_twice(postgres_bus: str) -> None:
    async with running(owner, bus=postgres_bus) as bus, stores_of(postgres_bus) as stores:
        await asyncio.gather(*(bus.call(Grow(f"t{n % 5}", n)) for n in range(500)))
        shelf = stores.shelf("viewer")
        one, two = view_on(bus, shelf, sums()), view_on(bus, shelf, sums())
        await one.open()
        await two.open()
        await asyncio.gather(feed(bus.facts, [one], bus.clock), feed(bus.facts, [two], bus.clock))
        head = await bus.facts.head()
        for each in (one, two):
            await each.wait(head)
        assert sum(n for _, n in await rows_of(one)) == sum(range(500))
        for each in (one, two):
            await each.close()


async def test_who_reads_goes_on_in_the_build_that_becomes_live(postgres_bus: str) -> None:
    async with stores_of(postgres_bus) as stores:
        builds = stores.shelf("viewer").builds("sums", "view sums")
        for number, kind in enumerate(("integer", "text", "double precision"), start=1):
            build = await builds.create(number, f"create table t (a {kind})", "log", "")
            await build.write([(number, [("insert into t values (1::int::" + kind + ")", [()])])])
            await builds.switch(build)
            # The text is the same, so that the server and the driver remember what it meant before.
            for _ in range(3):
                assert [str(a) for (a,) in await builds.reading.fetch("select a from t")] == [
                    "1.0" if number == 3 else "1"
                ]
            assert await builds.reading.position() == number
            await builds.remove([each for each in await builds.numbers() if each < number])
            assert await builds.numbers() == [number]
        await builds.reading.close()


async def test_who_wrote_the_build_that_was_live_is_told_that_it_is_not(postgres_bus: str) -> None:
    async with stores_of(postgres_bus) as stores:
        builds = stores.shelf("viewer").builds("sums", "view sums")
        old = await builds.create(1, "create table t (a int)", "log", "")
        await builds.switch(old)
        new = await builds.create(2, "create table t (a int)", "log", "")
        await builds.switch(new)
        with pytest.raises(Moved):
            await old.write([(0, [("insert into t values (1)", [()])])])
        assert await builds.reading.fetch("select count(*) from t") == [(0,)]
        # To let it be live again, because the reply was lost, changes nothing.
        await builds.switch(new)
        assert await builds.live() == 2
        await builds.reading.close()


async def test_while_the_live_build_is_held_nobody_writes_it(postgres_bus: str) -> None:
    async with stores_of(postgres_bus) as stores:
        builds = stores.shelf("viewer").builds("sums", "view sums")
        build = await builds.create(1, "create table t (a int)", "log", "")
        await builds.switch(build)
        hold = await builds.hold()
        writing = asyncio.create_task(build.write([(7, ())]))
        await asyncio.sleep(0.2)
        assert not writing.done()
        assert await builds.reading.position() == 0
        await hold.close()
        assert await writing == 7


async def test_a_session_that_feeds_and_is_ended_is_followed_by_another(
    postgres_bus: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cauce"):
        async with running(owner, sums(), bus=postgres_bus) as bus:
            await bus.call(Grow("a"))
            await bus.settled()
            for n in range(2, 5):
                ended = postgres.sql(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'cauce lead%'"
                )
                assert ended or n > 2
                receipt = await bus.call(Grow("a"))
                assert await bus.ask(Rows(), after=receipt) == [("a", n)]
            async with asyncio.timeout(20):
                while "may be fed by another process" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            receipt = await bus.call(Grow("a"))
            assert await bus.ask(Rows(), after=receipt, timeout=20) == [("a", 5)]


async def test_tables_that_somebody_took_away_are_made_anew(
    postgres_bus: str, bus_name: str, postgres: Postgres
) -> None:
    async with running(owner, sums(), bus=postgres_bus) as bus:
        await bus.call(Grow("a"))
        await bus.settled()
        postgres.sql(f'drop schema "{bus_name}_viewer:sums" cascade')
        receipt = await bus.call(Grow("a"))
        assert await bus.ask(Rows(), after=receipt, timeout=20) == [("a", 2)]


async def test_a_server_that_restarts_at_once_costs_no_event_and_doubles_none(postgres_bus: str) -> None:
    server = Postgres()
    try:
        async with running(owner, sums(), bus=server.url()) as bus:
            await asyncio.gather(*(bus.call(Grow("a")) for _ in range(50)))
            await bus.settled()
            await asyncio.to_thread(server.restart, "immediate")
            receipt = await again(lambda: bus.call(Grow("a"), id=bus.clock.id()))
            assert (await again(lambda: bus.ask(Rows(), after=receipt, timeout=20)))[0][1] >= 51
            await bus.settled()
            page = await bus.facts.read(Filter(domains=frozenset({"things"})), after=0, limit=1000)
            assert await bus.ask(Rows()) == [("a", len(page.entries))]
    finally:
        server.remove()


async def again(work: Callable[[], Any]) -> Any:
    async with asyncio.timeout(30):
        while True:
            try:
                return await work()
            except Unavailable:
                await asyncio.sleep(0.1)


async def test_a_commit_whose_reply_is_lost_is_not_said_twice(postgres: Postgres, postgres_bus: str) -> None:
    async with Proxy(postgres.port) as proxy, running(owner, bus=postgres_bus) as bus:
        url = postgres_bus.replace(str(postgres.port), str(proxy.port))
        async with stores_at(url, SystemClock()) as stores:
            derived = view_on(bus, stores.shelf("viewer"), sums())
            await derived.open()
            for n in range(10):
                await asyncio.gather(*(bus.call(Grow(f"t{each}")) for each in range(5)))
                if n % 2:
                    proxy.after = b"COMMIT;"
                else:
                    proxy.before = b"COMMIT;"
                await feed(bus.facts, [derived], bus.clock)
                async with asyncio.timeout(20):
                    await derived.wait(await bus.facts.head())
                assert await rows_of(derived) == [(f"t{each}", n + 1) for each in range(5)]
            assert proxy.dropped == 10
            await derived.close()


async def test_a_role_that_may_not_make_schemas_is_told_what_to_grant(postgres: Postgres, bus_name: str) -> None:
    url = postgres.url(schema=bus_name)
    async with running(owner, bus=url) as bus:
        await bus.call(Grow("a"))
    postgres.sql(f'create role "{bus_name}" login')
    try:
        async with stores_at(postgres.url(schema=bus_name, user=bus_name), SystemClock()) as stores:
            builds = stores.shelf("viewer").builds("sums", "view sums of viewer")
            with pytest.raises(
                NotPermitted, match="view sums of viewer cannot be made at .*: grant create on the database"
            ):
                await builds.create(1, SUMS, "log", "")
    finally:
        postgres.sql(f'drop owned by "{bus_name}"', f'drop role "{bus_name}"')
        postgres.drop(bus_name)


async def test_names_that_are_long_or_strange_are_told_apart(postgres_bus: str) -> None:
    async with stores_of(postgres_bus) as stores:
        names = ["v" * 60, "v" * 59, "directory", "a-b", "a_b"]
        for n, name in enumerate(names):
            builds = stores.shelf("a_service").builds(name, f"view {name}")
            build = await builds.create(1, f"create table t as select {n} as a", "log", "")
            await builds.switch(build)
        for n, name in enumerate(names):
            builds = stores.shelf("a_service").builds(name, f"view {name}")
            assert await builds.numbers() == [1]
            assert await builds.reading.fetch("select a from t") == [(n,)]
            await builds.reading.close()


@pytest.mark.usefixtures("postgres")
async def test_a_bus_on_nats_keeps_its_views_in_postgresql(nats_bus: str, postgres_bus: str) -> None:
    async with running(owner, sums(), bus=nats_bus, store=postgres_bus) as bus:
        receipt = await bus.call(Grow("a"))
        assert await bus.ask(Rows(), after=receipt) == [("a", 1)]


async def test_a_build_that_is_taken_away_unfinished_is_begun_again_beside_the_live_one(
    postgres_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched = list[int]()
    switch = SchemaBuilds.switch

    async def noted(builds: SchemaBuilds, build: Any) -> None:
        switched.append(build.position)
        await switch(builds, build)

    async with running(owner, bus=postgres_bus) as bus, stores_of(postgres_bus) as stores:
        await grown(bus, 50)
        shelf = stores.shelf("viewer")
        old, new = view_on(bus, shelf, sums()), view_on(bus, shelf, sums(schema=CHANGED))
        await old.open()
        await feed(bus.facts, [old], bus.clock)
        head = await bus.facts.head()
        await old.wait(head)
        await old.close()
        await new.open()
        builds = shelf.builds("sums", "view sums")
        assert await builds.numbers() == [1, 2]
        await builds.remove([2])
        monkeypatch.setattr(SchemaBuilds, "switch", noted)
        await feed(bus.facts, [new], bus.clock)
        await new.wait(head)
        assert len(switched) == 1
        assert switched[0] >= head
        assert len(await rows_of(new)) == 50
        await new.close()


async def test_what_was_promised_of_a_view_is_not_gone_after_a_crash_of_the_server() -> None:
    # Nothing else flushes what is committed without waiting for the disk.
    server = Postgres(wal_writer_delay="10s")
    try:
        async with stores_at(server.url(), SystemClock()) as stores:
            builds = stores.shelf("viewer").builds("sums", "view sums")
            await builds.switch(build := await builds.create(1, "create table t (a int)", "log", ""))
            await build.write([(1, [("insert into t values (1)", [()])])])
            server.sql("checkpoint")
            await build.write([(2, [("insert into t values (2)", [()])])])
            assert await builds.reading.fetch("select count(*) from t") == [(2,)]
            builds.reading.reached(2)
            await asyncio.to_thread(server.restart, "immediate")
            assert await builds.reading.position() == 1
            with pytest.raises(Unavailable, match="view sums: the server has lost the end of it"):
                await builds.reading.fetch("select count(*) from t")
            build = await builds.open(1)
            await build.write([(2, [("insert into t values (2)", [()])])])
            assert await builds.reading.fetch("select count(*) from t") == [(2,)]
            await builds.reading.close()
    finally:
        server.remove()


async def test_who_feeds_knows_at_once_that_its_session_is_gone(postgres_bus: str, postgres: Postgres) -> None:
    async with stores_of(postgres_bus) as stores:
        lead = stores.shelf("viewer").lead
        assert await lead.take()
        lost = asyncio.create_task(lead.lost())
        await asyncio.sleep(0.2)
        postgres.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'cauce lead%'")
        async with asyncio.timeout(1):
            await lost
        assert not lead.held


async def test_types_are_those_of_the_build_that_is_written_and_read(postgres_bus: str) -> None:
    tables = "create type mood as enum ('sad', 'glad'); create table sums (name text primary key, n int, m mood)"

    def moody(event: Grown, db: Store) -> None:
        db.execute(
            "insert into sums values (?, ?, ?) on conflict (name) do update set n = sums.n + 1, m = excluded.m",
            (event.name, event.n, "glad"),
        )

    async with running(owner, bus=postgres_bus) as bus, stores_of(postgres_bus) as stores:
        shelf = stores.shelf("viewer")
        view = view_on(bus, shelf, sums(moody, tables))
        await view.open()
        for turn in range(1, 4):
            for each in range(2):
                await grown(bus, 5)
                await feed(bus.facts, [view], bus.clock)
                await view.wait(await bus.facts.head())
                glad = await view.reading.fetch("select n, m from sums where m = ? and name = 't1'", ("glad",))
                assert glad == [(2 * turn - 1 + each, "glad")]
            again = view_on(bus, shelf, sums(moody, tables))
            await again.rebuild(lambda *_: None)
            await again.close()
        await view.close()


async def test_what_tables_check_at_the_commit_is_told_of_the_event(postgres_bus: str) -> None:
    tables = """create table sums (name text primary key, n integer not null);
        create function looks() returns trigger language plpgsql as $$ begin
            if new.n > 2 then perform from nowhere; end if; return null;
        end $$;
        create constraint trigger late after insert or update on sums deferrable initially deferred
            for each row execute function looks()"""
    async with running(owner, sums(schema=tables), bus=postgres_bus) as bus:
        await bus.call(Grow("a", 2))
        receipt = await bus.call(Grow("a"))
        with pytest.raises(Unavailable, match=r"add failed at position \d+ .things/a, Grown.: .*nowhere"):
            await bus.ask(Rows(), after=receipt)


async def test_what_others_made_on_a_build_is_not_dropped_with_it(
    postgres_bus: str, bus_name: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    async with stores_of(postgres_bus) as stores:
        builds = stores.shelf("viewer").builds("sums", "view sums")
        for number in (1, 2):
            await builds.switch(await builds.create(number, "create table t (a int primary key)", "log", ""))
            if number == 1:
                postgres.sql(
                    f'create schema "{bus_name}_others"',
                    f'create view "{bus_name}_others".report as select * from "{bus_name}_viewer:sums".t',
                    f'create table "{bus_name}_others".more (a int references "{bus_name}_viewer:sums".t)',
                )
        await builds.remove([1])
        assert await builds.numbers() == [1, 2]
        assert f"because others rest on it: {bus_name}_others.more, {bus_name}_others.report: make them" in caplog.text
        postgres.sql(f'drop schema "{bus_name}_others" cascade')
        await builds.remove([1])
        assert await builds.numbers() == [2]


async def test_a_role_that_lost_its_rights_is_told_so(postgres: Postgres, postgres_bus: str, bus_name: str) -> None:
    postgres.sql(f'create role "{bus_name}" login', f'grant create on database cauce to "{bus_name}"')
    try:
        async with running(owner, bus=postgres_bus) as bus:
            await bus.call(Grow("a"))
            async with stores_at(postgres.url(schema=bus_name, user=bus_name), SystemClock()) as stores:
                view = view_on(bus, stores.shelf("viewer"), sums())
                await view.open()
                postgres.sql(f'alter schema "{bus_name}_viewer:sums" owner to postgres')
                await feed(bus.facts, [view], bus.clock)
                with pytest.raises(Unavailable, match="has stopped: build 1 .*permission denied"):
                    await view.wait(await bus.facts.head())
                await view.close()
    finally:
        postgres.sql(f'drop owned by "{bus_name}"', f'drop role "{bus_name}"')


async def test_a_server_that_says_nothing_any_more_does_not_hang_who_writes(
    postgres: Postgres, postgres_bus: str
) -> None:
    url = postgres_bus.replace(str(postgres.port), "{port}")
    async with Proxy(postgres.port) as proxy, opened(url.format(port=proxy.port), patience=0.5) as backend:
        builds = backend.stores.shelf("viewer").builds("sums", "view sums")
        await builds.switch(build := await builds.create(1, "create table t (a int)", "log", ""))
        await build.write([(1, ())])
        proxy.swallow = b"cauce"
        for stops in (False, True):
            writing = asyncio.create_task(build.write([(2, ())]))
            if stops:
                await asyncio.sleep(0.2)
                writing.cancel()
            async with asyncio.timeout(10):
                await asyncio.wait([writing])
            assert writing.cancelled() if stops else isinstance(writing.exception(), Unavailable)
        proxy.swallow = None
        build = await builds.open(1)
        assert await build.write([(2, ())]) == 2


async def test_statements_that_are_slow_only_together_come_through(
    postgres_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.backends.postgres.builds.SLOWEST", 0.5)
    monkeypatch.setattr("cauce.backends.postgres.builds.GRACE", 0.0)

    def slow(event: Grown, db: Store) -> None:
        db.execute("insert into sums select ?, ? from pg_sleep(0.1)", (event.name, event.n))

    async with running(owner, bus=postgres_bus) as bus, stores_of(postgres_bus) as stores:
        await grown(bus, 10)
        view = view_on(bus, stores.shelf("viewer"), sums(slow))
        await view.open()
        await feed(bus.facts, [view], bus.clock)
        async with asyncio.timeout(15):
            await view.wait(await bus.facts.head())
        assert len(await rows_of(view)) == 10
        await view.close()
