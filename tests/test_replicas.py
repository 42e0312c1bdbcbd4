"""Replicas and reactions to records: complete before anything is handled, by version, never going back."""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from hypothesis import given as given_that
from hypothesis import strategies as st

from cauce import (
    Command,
    Context,
    Copy,
    Damaged,
    Domain,
    Event,
    NoAnswer,
    Query,
    Record,
    Refused,
    Rejected,
    Service,
    Store,
    connect,
    field,
    running,
)
from cauce.backends.sqlite.builds import FileLock, SQLiteShelf
from cauce.backends.sqlite.file import folder_of
from cauce.bus import After
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, digest, sealed
from cauce.copies import Copies
from cauce.derived import Derived
from cauce.messages import check_copy
from cauce.replica import Replica
from cauce.schema import encode
from cauce.service import bind
from shop import cards, users
from shop.cards import Card, IssueCard
from shop.users import ChangeEmail, RegisterUser

things = Domain("things", key="name")
asked = Domain("asked")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Thing(Record, domain=things):
    name: str
    n: int
    price: float = 0.0
    sold: bool = False
    colour: Colour = Colour.RED
    tags: list[str] = field(default_factory=list)
    note: str | None = None
    version: int = 0


class Other(Record, domain=things):
    name: str


class Set(Event, domain=things):
    name: str
    n: int


class Dropped(Event, domain=things):
    name: str


class Turned(Event, domain=things):
    name: str


class SetTo(Command, domain=things):
    name: str
    n: int


class Drop(Command, domain=things):
    name: str


class Turn(Command, domain=things):
    name: str


class HowMany(Query[int], domain=asked):
    pass


class Get(Query[int | None], domain=asked):
    name: str


class Small(Copy, of=Thing):
    name: str
    n: int


class All(Copy, of=Thing):
    name: str
    n: int
    price: float
    sold: bool
    colour: Colour
    tags: list[str]
    note: str | None
    version: int


def makers() -> Service:
    service = Service("things", owns=things)

    @service.decide
    def set_to(thing: Thing | None, command: SetTo) -> Set:
        return Set(command.name, command.n)

    @service.decide
    def drop(thing: Thing | None, command: Drop) -> Dropped:
        return Dropped(command.name)

    @service.decide
    def turn(thing: Thing | None, command: Turn) -> Turned:
        return Turned(command.name)

    @service.evolve
    def set(thing: Thing | None, event: Set) -> Thing:
        return Thing(event.name, event.n)

    @service.evolve
    def dropped(thing: Thing | None, event: Dropped) -> None:
        return None

    @service.evolve
    def turned(thing: Thing | None, event: Turned) -> Other:
        return Other(event.name)

    return service


owner = makers()


def keeper(copy: type[Copy] = Small) -> Service:
    service = Service("keeper", owns=asked)
    service.replica(copy)

    @service.answer
    async def how_many(query: HowMany, ctx: Context) -> int:
        return await ctx.count(copy)

    @service.answer
    async def get(query: Get, ctx: Context) -> int | None:
        found: Any = await ctx.get(copy, query.name)
        return None if found is None else int(found.n)

    return service


def folder(url: str, name: str = "Small") -> Path:
    return folder_of(Path(url.removeprefix("sqlite:///"))) / "keeper" / "views" / name


async def filled(url: str, many: int) -> None:
    async with running(owner, bus=url) as bus:
        await asyncio.gather(*(bus.call(SetTo(f"t{n}", n)) for n in range(many)))
        await bus.settled()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------ what is refused


class Stranger(Copy, of=Thing):
    name: str
    weight: int


class WrongType(Copy, of=Thing):
    name: str
    n: str


class Optionally(Copy, of=Thing):
    name: str
    n: int | None


class Keyless(Copy, of=Thing):
    n: int


@pytest.mark.parametrize(
    ("copy", "words"),
    [
        (Stranger, "Stranger.weight: Thing has no such field, only name, n, "),
        (WrongType, "WrongType.n is str, in Thing it is int: give it the same type"),
        (Optionally, r"Optionally.n is .*None.*, in Thing it is int"),
        (Keyless, "Keyless lacks the field 'name', the key of domain 'things'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_copy_that_does_not_fit_its_record_is_refused_before_anything_is_made(
    bus_url: str, copy: type[Copy], words: str
) -> None:
    with pytest.raises(Refused, match=words):
        async with running(keeper(copy), bus=bus_url):
            pass
    assert not Path(bus_url.removeprefix("sqlite:///")).exists()


def test_a_copy_says_of_what_it_is_one() -> None:
    with pytest.raises(Refused, match="Nothing does not say of what it is a copy"):

        class Nothing(Copy):  # type: ignore[call-arg]
            name: str

    with pytest.raises(Refused, match="Event does not say of what"):

        class Event(Copy, of=Set):  # type: ignore[type-var,arg-type,unused-ignore]
            name: str

    with pytest.raises(Refused, match="no copy: declare it with"):
        Service("x").replica(Thing)  # type: ignore[type-var]


def test_a_copy_may_be_declared_in_a_function_and_by_a_decorator() -> None:
    service = Service("x")

    @service.replica
    class Local(Copy, of=Thing):
        name: str
        colour: Colour
        note: str | None

    check_copy(Local)
    assert [bound.name for bound in bind(service)] == ["Local"]
    assert replace_is_frozen(Local("a", Colour.RED, None))


def replace_is_frozen(copy: Any) -> bool:
    with pytest.raises(AttributeError):
        copy.name = "b"
    return True


def test_two_that_would_share_a_file_are_refused() -> None:
    service = keeper()

    @service.view("small", schema="create table x (y)")
    def small(event: Set, db: Store) -> None:
        pass

    with pytest.raises(Refused, match="keeper has a replica Small beside view 'small'"):
        bind(service)
    service = keeper()
    service.replica(Small)
    with pytest.raises(Refused, match="keeper has a replica Small beside replica Small"):
        bind(service)


async def test_a_copy_that_the_service_does_not_keep_is_refused(bus_url: str) -> None:
    service, said = keeper(), list[str]()

    @service.on
    async def look(event: Set, ctx: Context) -> None:
        for wrong in (
            ctx.get(All, "a"),
            ctx.find(Small, weight=3),
            ctx.count(Small, tags=[]),
            ctx.find(Small, limit=-1),
        ):
            try:
                await wrong
            except Refused as error:
                said.append(str(error))

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(SetTo("a", 1))
        await bus.settled()
    assert said == [
        "service 'keeper' keeps no replica All: say so with service.replica(All)",
        "replica Small of keeper has no field 'weight', only name, n",
        "replica Small of keeper has no field 'tags', only name, n",
        "limit=-1: pass a whole number from 0",
    ]


async def test_a_service_without_copies_says_so(bus_url: str) -> None:
    service, said = Service("bare"), list[str]()

    @service.on
    async def look(event: Set, ctx: Context) -> None:
        try:
            await ctx.get(Small, "a")
        except Refused as error:
            said.append(str(error))

    async with running(owner, service, bus=bus_url) as bus:
        await bus.call(SetTo("a", 1))
        await bus.settled()
    assert said == ["service 'bare' has no views and no replicas: give it some, with view or replica"]


# ------------------------------------------------------------------------------------------------------- the shop


async def test_the_cards_of_the_shop_are_issued_while_users_is_down(each_bus: str) -> None:
    async with running(users.service, cards.service, bus=each_bus) as bus:
        await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
        await bus.settled()
        with pytest.raises(Rejected, match="unknown user"):
            await bus.call(IssueCard("c0", "43"))
    async with running(cards.service, bus=each_bus) as bus:
        with pytest.raises(NoAnswer):
            await bus.call(ChangeEmail("42", "ana@corp.example"))
        await bus.call(IssueCard("c1", "42"))
        assert await bus.state(Card, "c1") == Card("c1", "42", "Ana")


async def test_a_late_joiner_becomes_complete_while_the_owner_is_down(each_bus: str) -> None:
    async with running(users.service, bus=each_bus) as bus:
        for n in range(50):
            await bus.call(RegisterUser(str(n), f"Name {n}", f"{n}@example.org"))
    async with running(cards.service, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(IssueCard(f"c{n}", str(n))) for n in range(50)))
        assert await bus.state(Card, "c49") == Card("c49", "49", "Name 49")


# --------------------------------------------------------------------------------------------- complete before served


async def test_a_service_answers_only_when_its_replica_is_complete(bus_url: str) -> None:
    await filled(bus_url, 3000)
    lock = FileLock(folder(bus_url) / "build.lock")
    assert await lock.take()
    seen, started, stop = list[int](), asyncio.Event(), asyncio.Event()
    service = keeper()

    @service.on
    async def first(event: Set, ctx: Context) -> None:
        if not seen:
            seen.append(await ctx.count(Small))

    async def serve() -> None:
        async with running(service, bus=bus_url) as bus:
            started.set()
            assert await bus.ask(HowMany()) == 3000
            await bus.settled()
            await stop.wait()

    async with connect(bus_url) as client:
        task = asyncio.create_task(serve())
        for _ in range(20):
            with pytest.raises(NoAnswer):
                await client.ask(HowMany())
            await asyncio.sleep(0.01)
        await lock.release()
        await asyncio.wait({task, asyncio.ensure_future(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert await client.ask(HowMany()) == 3000
        stop.set()
        await task
    assert set(seen) == {3000}


async def test_a_copy_with_other_fields_is_complete_before_it_is_asked(bus_url: str) -> None:
    await filled(bus_url, 500)
    async with running(keeper(), bus=bus_url) as bus:
        assert await bus.ask(HowMany()) == 500

    class Small2(Copy, of=Thing):
        name: str
        n: int
        price: float

    Small2.__name__ = "Small"
    async with running(keeper(Small2), bus=bus_url) as bus:
        assert await bus.ask(HowMany()) == 500
        assert await bus.ask(Get("t77")) == 77
    assert [path.name for path in folder(bus_url).glob("*.db")] == ["2.db"]


@pytest.mark.parametrize("harm", ["remove", "truncate", "garbage"])
async def test_a_missing_or_broken_replica_is_built_anew_before_it_is_asked(
    bus_url: str, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    await filled(bus_url, 300)
    async with running(keeper(), bus=bus_url) as bus:
        assert await bus.ask(HowMany()) == 300
    path = folder(bus_url) / "1.db"
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000] if harm == "truncate" else b"no database" * 1000)
    async with running(keeper(), bus=bus_url) as bus:
        assert await bus.ask(HowMany()) == 300
    assert "built anew" in caplog.text


async def test_a_replica_ahead_of_its_log_stops_the_service_loudly(bus_url: str) -> None:
    await filled(bus_url, 3)
    async with running(keeper(), bus=bus_url):
        pass
    connection = apsw.Connection(str(folder(bus_url) / "1.db"))
    connection.execute("update cauce_place set position = position + 1000")
    connection.close()
    with pytest.raises(Damaged, match=r"1\.db was built up to position .*cauce reset keeper"):
        async with running(keeper(), bus=bus_url):
            pass


async def test_a_replica_from_another_bus_stops_the_service_loudly(bus_url: str, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    for url in (bus_url, other):
        await filled(url, 3)
        async with running(keeper(), bus=url):
            pass
    (folder(other) / "1.db").replace(folder(bus_url) / "1.db")
    with pytest.raises(Damaged, match=r"1\.db was built from log .*cauce reset keeper"):
        async with running(keeper(), bus=bus_url):
            pass


# --------------------------------------------------------------------------------------------------------- by version


def put(name: str, version: int, n: int | None, position: int = 1) -> Entry:
    """An entry of the records, as it is read; without a number it is a tombstone."""
    stream, body = f"things/{name}", b"" if n is None else encode(Thing(name, n))
    entry = sealed(stream, "Gone" if n is None else "Thing", SystemClock().id(), Meta(1), body)
    return msgspec.structs.replace(entry, position=position, version=version, digest=digest(entry, version))


def made(replica: Replica[Small]) -> apsw.Connection:
    connection = apsw.Connection(":memory:")
    connection.execute(replica.schema)
    return connection


def standing(connection: apsw.Connection, replica: Replica[Small]) -> dict[str, int]:
    return {each.name: each.n for each in map(replica.made, connection.execute(*replica.equal({}, 1000)).fetchall())}


histories = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.booleans()), max_size=40)


@given_that(histories, st.integers(1, 7), st.integers(0, 3))
def test_whatever_the_order_and_however_often_the_newest_version_stands(
    history: list[tuple[str, int, bool]], batch: int, again: int
) -> None:
    replica = Replica("keeper", Small)
    connection = made(replica)
    model = dict[str, tuple[int, int | None]]()
    # What a thing is at a version is one thing, as it is in a log.
    fed = [
        (name, version, None if (version * 7 + ord(name)) % 3 == 0 else version * 100) for name, version, _ in history
    ]
    fed += fed[: again * 5]
    entries = list[Entry]()
    for name, version, n in fed:
        entries.append(put(name, version, n))
        if version > model.get(name, (0, None))[0]:
            model[name] = version, n
    for first in range(0, len(entries), batch):
        apply(connection, replica, entries[first : first + batch])
    assert standing(connection, replica) == {name: n for name, (_, n) in model.items() if n is not None}
    for name, (version, _) in model.items():
        assert connection.execute(*replica.version_of(name)).fetchall() == [(version,)]


def test_an_older_record_does_not_revive_what_was_deleted() -> None:
    replica = Replica("keeper", Small)
    connection = made(replica)
    apply(connection, replica, [put("a", 3, 3), put("a", 5, None), put("a", 4, 4), put("a", 5, 5)])
    assert standing(connection, replica) == {}
    apply(connection, replica, [put("a", 6, 6)])
    assert standing(connection, replica) == {"a": 6}


def test_a_damaged_record_is_found_before_it_is_kept() -> None:
    replica = Replica("keeper", Small)
    entry = msgspec.structs.replace(put("a", 1, 1), body=encode(Thing("a", 2)))
    with pytest.raises(Damaged, match="position 1 .things/a version 1. is not what was written"):
        apply(made(replica), replica, [entry])


async def test_what_is_deleted_or_becomes_another_record_is_not_there_until_it_is_again(each_bus: str) -> None:
    async with running(owner, keeper(), bus=each_bus) as bus:
        await bus.call(SetTo("a", 1))
        assert await bus.ask(Get("a"), after=await bus.call(SetTo("a", 2))) == 2
        assert await bus.ask(Get("a"), after=await bus.call(Drop("a"))) is None
        assert await bus.ask(HowMany()) == 0
        assert await bus.ask(Get("a"), after=await bus.call(SetTo("a", 3))) == 3
        assert await bus.ask(Get("a"), after=await bus.call(Turn("a"))) is None
        assert await bus.ask(Get("a"), after=await bus.call(SetTo("a", 4))) == 4


async def test_a_wait_for_what_never_comes_ends_with_the_deadline(bus_url: str) -> None:
    async with running(owner, keeper(), bus=bus_url) as bus:
        receipt = await bus.call(SetTo("a", 1))
        with pytest.raises(NoAnswer, match="did not answer HowMany within 0.3 s"):
            await bus.ask(HowMany(), after=replace_receipt(receipt, version=99), timeout=0.3)
        # Of another domain this service keeps nothing, so there is nothing to wait for.
        assert await bus.ask(HowMany(), after=replace_receipt(receipt, version=99, domain="others")) == 1


def replace_receipt(receipt: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(receipt, **changes)


async def test_a_burst_of_writes_ends_in_the_same_copies(each_bus: str) -> None:
    async with running(owner, keeper(), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(SetTo(f"t{n % 20}", n)) for n in range(2000)))
        await bus.settled()
        for n in range(20):
            record = await bus.record(Thing, f"t{n}")
            assert record is not None
            assert await bus.ask(Get(f"t{n}")) == record.n


# ------------------------------------------------------------------------------------------------------ find and count


@pytest.fixture
def found() -> tuple[Replica[All], apsw.Connection]:
    replica = Replica("keeper", All)
    connection = apsw.Connection(":memory:")
    connection.execute(replica.schema)
    return replica, connection


def apply(connection: apsw.Connection, replica: Replica[Any], entries: list[Entry]) -> None:
    for sql, rows in replica.runs(entries):
        connection.executemany(sql, rows)


def keep(connection: apsw.Connection, replica: Replica[Any], *things: Thing) -> None:
    for n, thing in enumerate(things, start=1):
        entry = sealed(f"things/{thing.name}", "Thing", SystemClock().id(), Meta(1), encode(thing))
        apply(connection, replica, [msgspec.structs.replace(entry, position=n, version=1, digest=digest(entry, 1))])


FIELDS = ("name", "n", "price", "sold", "colour", "tags", "note", "version")
THINGS = (
    Thing("a", 1, 1.5, True, Colour.BLUE, ["x", "y"], None, 7),
    Thing("b", 2**70, 3.0, False, Colour.RED, [], "note", 7),
    Thing("c", -(2**63), 1e300, True, Colour.RED, ["ü", '"'], "", 0),
    Thing("d", 2**63 - 1, 0.1, False, Colour.BLUE, ["x", "y"], "42", 1),
)


def test_every_kind_of_field_comes_back_as_it_was(found: tuple[Replica[All], apsw.Connection]) -> None:
    replica, connection = found
    keep(connection, replica, *THINGS)
    for thing in THINGS:
        (row,) = connection.execute(*replica.by_key(thing.name)).fetchall()
        copy = replica.made(row)
        assert copy == All(*(getattr(thing, name) for name in FIELDS))
        assert [type(getattr(copy, name)) for name in FIELDS] == [type(getattr(thing, name)) for name in FIELDS]


FOUND: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "abcd"),
    ({"name": "c"}, "c"),
    ({"n": 2**70}, "b"),
    ({"n": 2**63 - 1}, "d"),
    ({"price": 3}, "b"),
    ({"price": 0.1}, "d"),
    ({"sold": True}, "ac"),
    ({"sold": True, "colour": Colour.RED}, "c"),
    ({"tags": ["x", "y"]}, "ad"),
    ({"tags": []}, "b"),
    ({"note": None}, "a"),
    ({"note": ""}, "c"),
    ({"note": "42"}, "d"),
    ({"version": 7}, "ab"),
    ({"n": "nothing"}, ""),
)


@pytest.mark.parametrize(("equals", "names"), FOUND)
def test_find_and_count_compare_by_value(
    found: tuple[Replica[All], apsw.Connection], equals: dict[str, Any], names: str
) -> None:
    replica, connection = found
    keep(connection, replica, *THINGS)
    rows = connection.execute(*replica.equal(equals, 100)).fetchall()
    assert "".join(replica.made(row).name for row in rows) == names
    assert connection.execute(*replica.number(equals)).fetchall() == [(len(names),)]
    assert len(connection.execute(*replica.equal(equals, 1)).fetchall()) == min(1, len(names))


async def test_handlers_find_and_count_their_copies(each_bus: str) -> None:
    service, seen = keeper(), list[Any]()

    @service.on
    async def look(event: Dropped, ctx: Context) -> None:
        seen.append(await ctx.find(Small, n=7))
        seen.append(await ctx.find(Small, limit=2))
        seen.append(await ctx.count(Small, n=7))
        seen.append(await ctx.get(Small, "t3"))

    async with running(owner, service, bus=each_bus) as bus:
        for n in range(4):
            await bus.call(SetTo(f"t{n}", 7 if n % 2 else n))
        await bus.settled()
        await bus.call(Drop("none"))
        await bus.settled()
    assert seen == [[Small("t1", 7), Small("t3", 7)], [Small("t0", 0), Small("t1", 7)], 2, Small("t3", 7)]


# ---------------------------------------------------------------------------------------------- reactions to records


async def test_a_reaction_to_a_record_gets_it_whole_and_is_told_when_it_is_gone(each_bus: str) -> None:
    service, seen, plain = Service("keeper"), list[Any](), list[Any]()

    @service.on
    async def changed(thing: Thing | None, ctx: Context) -> None:
        seen.append((ctx.key, thing and thing.n))

    @service.on
    async def stands(thing: Thing, ctx: Context) -> None:
        plain.append((ctx.key, thing.n, ctx.version))

    async with running(owner, service, bus=each_bus) as bus:
        for command in (SetTo("a", 1), SetTo("b", 2), Drop("a"), SetTo("a", 3), Turn("b")):
            await bus.call(command)
            await bus.settled()
    assert seen == [("a", 1), ("b", 2), ("a", None), ("a", 3), ("b", None)]
    assert plain == [("a", 1, 1), ("b", 2, 1), ("a", 3, 3)]


async def test_a_burst_is_told_coalesced_and_ends_with_what_stands(each_bus: str) -> None:
    service, seen = Service("keeper"), dict[str, list[int]]()

    @service.on
    async def stands(thing: Thing) -> None:
        seen.setdefault(thing.name, []).append(thing.n)

    async with running(owner, service, bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(SetTo(f"t{n % 5}", n)) for n in range(1000)))
        await bus.settled()
    assert {name: numbers[-1] for name, numbers in seen.items()} == {f"t{n}": 995 + n for n in range(5)}
    assert all(numbers == sorted(numbers) for numbers in seen.values())


async def test_a_reaction_that_failed_gets_what_stands_when_it_is_tried_again(each_bus: str) -> None:
    service, seen, fails = Service("keeper"), list[int](), [True]

    @service.on
    async def stands(thing: Thing) -> None:
        if fails[0]:
            raise ValueError("not yet")
        seen.append(thing.n)

    async with running(owner, service, bus=each_bus) as bus:
        await bus.call(SetTo("a", 1))
        with pytest.raises(TimeoutError):
            await bus.settled(0.3)
        await bus.call(SetTo("a", 2))
        with pytest.raises(TimeoutError):
            await bus.settled(0.3)
        fails[0] = False
        await bus.settled()
        assert not bus.failed.done()
    assert seen == [2]


async def test_a_reaction_that_failed_while_its_record_changed_stores_the_last_change_once(bus_url: str) -> None:
    service, fails = Service("keeper", schema="create table seen (n integer, version integer, id text)"), [True]
    path, tried = folder_of(Path(bus_url.removeprefix("sqlite:///"))) / "keeper" / "store.db", set[int]()

    @service.on
    async def stands(thing: Thing | None, ctx: Context) -> None:
        tried.add(ctx.version)
        if fails[0]:
            raise ValueError("not yet")
        row = (thing.n if thing else None, ctx.version, ctx.idempotency_key)
        ctx.store.execute("insert into seen values (?, ?, ?)", row)

    def rows(sql: str) -> list[Any]:
        return apsw.Connection(str(path)).execute(sql).fetchall()

    async with running(owner, service, bus=bus_url) as bus:
        for n in range(4):
            await bus.call(SetTo("a", n))
            async with asyncio.timeout(60):
                while n + 1 not in tried:  # noqa: ASYNC110 - it is tried when its time has come
                    await asyncio.sleep(0.01)
        fails[0] = False
        await bus.settled()
        await bus.call(SetTo("a", 9))
        await bus.call(Drop("a"))
        await bus.settled()
        found = rows("select n, version, id from seen")
        assert not bus.failed.done()
    # The two later ones may be told as one.
    assert [(n, version) for n, version, _ in found] in ([(3, 4), (9, 5), (None, 6)], [(3, 4), (None, 6)])
    assert len({id for _, _, id in found}) == len(found)


async def test_a_reaction_to_records_goes_on_where_it_was(each_bus: str) -> None:
    def service(seen: list[int], start: Any = "first") -> Service:
        found = Service("keeper")

        @found.on(start=start)
        async def stands(thing: Thing) -> None:
            seen.append(thing.n)

        return found

    first, second, now = list[int](), list[int](), list[int]()
    async with running(owner, service(first), bus=each_bus) as bus:
        await bus.call(SetTo("a", 1))
        await bus.settled()
    async with running(owner, service(second), bus=each_bus) as bus:
        await bus.call(SetTo("b", 2))
        await bus.settled()
    assert (first, second) == ([1], [2])
    late = Service("late")

    @late.on(start="now")
    async def stands(thing: Thing) -> None:
        now.append(thing.n)

    async with running(owner, late, bus=each_bus) as bus:
        await bus.call(SetTo("c", 3))
        await bus.settled()
    assert now == [3]


def mixed(thing: Thing | Set) -> None: ...
def two(thing: Thing | Other) -> None: ...


@pytest.mark.parametrize("function", [mixed, two], ids=lambda each: each.__name__)
def test_a_record_is_not_mixed_with_anything_else(function: Callable[..., Any]) -> None:
    service = Service("keeper")
    service.on(function)
    with pytest.raises(
        Refused, match=rf"keeper.{function.__name__}: parameter thing mixes a record and something else"
    ):
        bind(service)


# ------------------------------------------------------------------------------------------------------------ rebuild


async def test_a_replica_is_rebuilt_to_the_same_copies(bus_url: str) -> None:
    async with running(owner, keeper(), bus=bus_url) as bus:
        await asyncio.gather(*(bus.call(SetTo(f"t{n}", n)) for n in range(200)))
        await bus.call(Drop("t7"))
        await bus.settled()
        replica = Replica("keeper", Small)
        told = list[tuple[int, int, int]]()
        derived = Derived(replica, "keeper", bus.records, SQLiteShelf(folder(bus_url).parent), bus.clock)
        await derived.rebuild(lambda *numbers: told.append(numbers))
        await derived.close()
        assert told[-1][0] == told[-1][1] == await bus.records.head()
        assert await bus.ask(HowMany()) == 199
        assert await bus.ask(Get("t100"), after=await bus.call(SetTo("t100", 5))) == 5
        assert (folder(bus_url) / "live").read_text() == "2\n"


# ------------------------------------------------------------------------------------------------- leader and others


async def test_a_process_that_only_reads_waits_until_the_one_that_feeds_is_complete(bus_url: str) -> None:
    await filled(bus_url, 200)

    def fail(error: BaseException) -> None:
        raise error

    async with running(owner, bus=bus_url) as bus:

        def copies() -> Copies:
            shelf, replica = SQLiteShelf(folder(bus_url).parent), Replica("keeper", Small)
            return Copies("keeper", shelf, [], [replica], bus.facts, bus.records, bus.clock)

        one, two = copies(), copies()
        lead = FileLock(folder(bus_url).parent / "leader.lock")
        assert await lead.take()
        second = asyncio.create_task(two.start(fail))
        await asyncio.sleep(0.1)
        assert not second.done()
        await lead.release()
        await asyncio.gather(one.start(fail), second)
        tasks = [asyncio.create_task(each.run()) for each in (one, two)]
        try:
            receipt = await bus.call(SetTo("t7", 70))
            after = After(receipt.position, receipt.domain, receipt.key, receipt.version)
            for each in (one, two):
                await each.passed(after)
                assert await each.get(Small, "t7") == Small("t7", 70)
                assert await each.count(Small, {}) == 200
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await one.close()
            await two.close()
