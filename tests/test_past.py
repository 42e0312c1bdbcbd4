"""Time travel: how a thing stood, what changed of it by whose wish, and how a whole domain stood."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
import pytest

from cauce import (
    Change,
    Command,
    Domain,
    Event,
    Inconsistent,
    NoAnswer,
    Record,
    Refused,
    Service,
    Unreadable,
    connect,
    field,
    replace,
    running,
    upcast,
)
from cauce.bus import Ask, Bus
from cauce.codec import Meta, seal, sealed
from cauce.messages import declared
from shop import users as shop
from tests.wires import Peer

T = TypeVar("T")

people = Domain("people", key="id")


class Person(Record, domain=people):
    id: str
    name: str
    email: str = ""
    tags: list[str] = field(default_factory=list)


class Joined(Event, domain=people):
    id: str
    name: str


class Confirmed(Event, domain=people):
    id: str
    email: str


class Seen(Event, domain=people):
    id: str


class Tagged(Event, domain=people):
    id: str
    tag: str


class Noted(Event, domain=people, name="N" * 128):
    id: str


class Left(Event, domain=people):
    id: str


class Join(Command, domain=people):
    id: str
    name: str
    email: str


class Tag(Command, domain=people):
    id: str
    tag: str


class Leave(Command, domain=people):
    id: str


service = Service("people", owns=people)


@service.decide
def join(person: Person | None, command: Join) -> list[Event]:
    return [Joined(command.id, command.name), Confirmed(command.id, command.email), Seen(command.id)]


@service.decide
def tag(person: Person | None, command: Tag) -> Tagged:
    return Tagged(command.id, command.tag)


@service.decide
def leave(person: Person | None, command: Leave) -> Left:
    return Left(command.id)


@service.evolve
def joined(person: Person | None, event: Joined) -> Person:
    return Person(event.id, event.name)


@service.evolve
def confirmed(person: Person, event: Confirmed) -> Person:
    return replace(person, email=event.email)


@service.evolve
def tagged(person: Person, event: Tagged) -> Person:
    return replace(person, tags=[*person.tags, event.tag])


@service.evolve
def left(person: Person, event: Left) -> None: ...


async def all_of(them: AsyncIterator[T]) -> list[T]:
    return [each async for each in them]


async def story(bus: Bus, key: str, **options: Any) -> list[tuple[int, str, dict[str, tuple[object, object]]]]:
    changes = await all_of(bus.history(Person, key, **options))
    return [(each.version, each.event, each.fields) for each in changes]


def counted(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every question that is asked from now on."""
    asked, ask = list[bytes](), bus.wire.ask

    async def counting(address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
        asked.append(payload)
        return await ask(address, payload, deadline, safe=safe)

    monkeypatch.setattr(bus.wire, "ask", counting)
    return asked


async def wrote(bus: Bus, *events: Event, times: list[int] | None = None) -> None:
    """Facts as an import leaves them, without a wish, at times of their own."""
    for n, event in enumerate(events):
        meta = Meta(times[n] if times else bus.clock.now(), declared(event).version)
        entry = seal(event, bus.clock.id(), meta)
        await bus.facts.append(entry.stream, [entry])


def asked(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> list[Ask]:
    """What is asked over the wire from now on."""
    found, ask = list[Ask](), bus.wire.ask

    async def counted(address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
        found.append(msgspec.json.decode(payload, type=Ask))
        return await ask(address, payload, deadline, safe=safe)

    monkeypatch.setattr(bus.wire, "ask", counted)
    return found


# ------------------------------------------------------------------------------------------------------- history


async def test_a_history_says_what_each_fact_changed_and_who_wished_it_by_which_command(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        first = await bus.call(Join("ana", "Ana", "a@x.org"), by="web:eva")
        second = await bus.call(Tag("ana", "vip"), by="crm:joe")
        changes = await all_of(bus.history(Person, "ana"))
        stood = [await bus.state(Person, "ana", at=each.version) for each in changes]
        stored = (await bus.facts.read()).entries
    stored = [each for each in stored if each.stream == "people/ana"]
    assert [(each.version, each.event, each.wish, each.by, each.causation) for each in changes] == [
        (1, "Joined", "Join", "web:eva", first.id),
        (2, "Confirmed", "Join", "web:eva", first.id),
        (3, "Seen", "Join", "web:eva", first.id),
        (4, "Tagged", "Tag", "crm:joe", second.id),
    ]
    assert [each.fields for each in changes] == [
        {"id": (None, "ana"), "name": (None, "Ana"), "email": (None, ""), "tags": (None, [])},
        {"email": ("", "a@x.org")},
        {},
        {"tags": ([], ["vip"])},
    ]
    assert [(each.position, each.id, each.correlation) for each in changes] == [
        (each.position, each.id, each.correlation) for each in stored
    ]
    assert changes[3].position == second.position
    for change, entry in zip(changes, stored, strict=True):
        assert change.time == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=entry.meta.time)
    assert changes[0].before is None
    assert [each.after for each in changes[:-1]] == [each.before for each in changes[1:]]
    assert changes[-1].after == Person("ana", "Ana", "a@x.org", ["vip"])
    assert stood == [each.after for each in changes]


async def test_a_history_behind_a_version_knows_what_stood_and_whose_wish_it_was(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("ana", "Ana", "a@x.org"), by="web:eva")
        await bus.settled()
        whole = await all_of(bus.history(Person, "ana"))
        for after in range(5):
            assert await all_of(bus.history(Person, "ana", after=after)) == whole[after:]
        assert (whole[1].wish, whole[1].before) == ("Join", Person("ana", "Ana"))
        assert await all_of(bus.history(Person, "never")) == []


async def test_a_thing_that_left_and_came_again_is_one_history(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("ana", "Ana", ""))
        await bus.call(Leave("ana"))
        await bus.call(Join("ana", "Anna", ""))
        assert (await story(bus, "ana", after=3))[:2] == [
            (4, "Left", {"id": ("ana", None), "name": ("Ana", None), "email": ("", None), "tags": ([], None)}),
            (5, "Joined", {"id": (None, "ana"), "name": (None, "Anna"), "email": (None, ""), "tags": (None, [])}),
        ]
        assert await bus.state(Person, "ana", at=4) is None
        assert await bus.state(Person, "ana", at=3) == Person("ana", "Ana")
        assert await bus.state(Person, "ana", at=5) == Person("ana", "Anna")


@pytest.mark.parametrize("bound", [{"_MOST": 3}, {"_BYTES": 150}, {"_BYTES": 1}, {"_READ": 2, "_MOST": 5}])
async def test_a_long_history_comes_in_pages_and_lacks_nothing(
    bound: dict[str, int], each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("ana", "Ana", "a@x.org"), by="web:eva")
        for n in range(7):
            await bus.call(Tag("ana", f"tag {n}"), by="crm:joe")
        whole = await all_of(bus.history(Person, "ana"))
        assert len(whole) == 10
        for name, number in bound.items():
            monkeypatch.setattr(f"cauce.history.{name}", number)
        asked = counted(bus, monkeypatch)
        assert await all_of(bus.history(Person, "ana")) == whole
        assert 2 <= len(asked) <= 10
        assert await all_of(bus.history(Person, "ana", after=2)) == whole[2:]


async def test_facts_of_an_import_have_no_wish_and_those_of_today_s_names_are_told_by_them(each_bus: str) -> None:
    old = Domain("things", key="id")

    class Was(Event, domain=old, name="Made"):
        id: str
        text: str

    now = Domain("things", key="id")

    class Thing(Record, domain=now):
        id: str
        words: list[str]

    class Written(Event, domain=now, version=2, was=("Made",)):
        id: str
        words: list[str]

    @upcast(Written, from_version=1)
    def split(body: dict[str, Any]) -> dict[str, Any]:
        return {"id": body["id"], "words": body["text"].split()}

    things = Service("things", owns=now)

    @things.evolve
    def written(thing: Thing | None, event: Written) -> Thing:
        return Thing(event.id, event.words)

    async with running(things, bus=each_bus) as bus:
        await wrote(bus, Was("a", "to be"), Written("a", ["or", "not"]))
        changes = await all_of(bus.history(Thing, "a"))
    assert [(each.event, each.wish, each.by, each.fields["words"]) for each in changes] == [
        ("Written", "", "", (None, ["to", "be"])),
        ("Written", "", "", (["to", "be"], ["or", "not"])),
    ]


async def test_what_comes_before_a_fact_that_cannot_be_folded_is_told_before_it_is_raised(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await wrote(bus, Joined("ana", "Ana"), Tagged("ana", "vip"))
        broken = sealed("people/ana", "Tagged", bus.clock.id(), Meta(bus.clock.now()), b'{"id":"ana","tag":7}')
        await bus.facts.append("people/ana", [broken])
        await wrote(bus, Tagged("eva", "vip"))
        found = list[Change[Person]]()
        with pytest.raises(Unreadable, match="people/ana version 3"):
            async for each in bus.history(Person, "ana"):
                found.append(each)
        assert [each.version for each in found] == [1, 2]
        with pytest.raises(Unreadable, match="people/ana version 3"):
            await bus.state(Person, "ana", at=3)
        assert await bus.state(Person, "ana", at=2) == Person("ana", "Ana", tags=["vip"])
        with pytest.raises(Inconsistent, match="people/eva version 1 is Tagged"):
            await all_of(bus.history(Person, "eva"))


# --------------------------------------------------------------------------------------------- versions and moments


async def test_a_version_that_never_was_is_refused_with_the_present_one(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("ana", "Ana", ""))
        await wrote(bus, Joined("eva", "Eva"))
        assert await bus.state(Person, "ana", at=0) is None
        assert await bus.state(Person, "ana", at=3) == Person("ana", "Ana")
        with pytest.raises(Refused, match="people/ana has 3 versions, there was never a 9"):
            await bus.state(Person, "ana", at=9)
        with pytest.raises(Refused, match="people/eva has 1 version, there was never a 2"):
            await bus.state(Person, "eva", at=2)
        with pytest.raises(Refused, match="people/never has no versions"):
            await bus.state(Person, "never", at=1)
        assert await bus.state(Person, "never") is None


async def test_what_is_no_version_and_no_moment_is_refused_with_the_cure(bus_url: str) -> None:
    naive = datetime(2026, 1, 1)  # noqa: DTZ001 - that is the mistake
    wrong: list[Any] = [True, -1, 1.5, "2026-01-01", naive.date(), 2**63]
    async with running(service, bus=bus_url) as bus:
        for at in wrong:
            with pytest.raises(Refused, match="pass a version, 0 or more, or a datetime with a time zone"):
                await bus.state(Person, "ana", at=at)
            with pytest.raises(Refused, match="pass a version, 0 or more"):
                await all_of(bus.history(Person, "ana", after=at))
            with pytest.raises(Refused, match="pass a position, 0 or more"):
                await all_of(bus.states(Person, upto=at))
        for call in (lambda: bus.state(Person, "ana", at=naive), lambda: all_of(bus.states(Person, at=naive))):
            with pytest.raises(Refused, match="add one, for example tzinfo=UTC"):
                await call()
        number: Any = 3
        with pytest.raises(Refused, match="pass upto=position"):
            await all_of(bus.states(Person, at=number))
        with pytest.raises(Refused, match=r"there was never a 1000"):
            await all_of(bus.states(Person, upto=1000))
        with pytest.raises(Refused, match="Joined is a event, not a record"):
            await all_of(bus.history(Joined, "ana"))  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: int) -> datetime:
    return NOON + timedelta(seconds=seconds)


def micro(seconds: int) -> int:
    return int(at(seconds).timestamp()) * 1_000_000


async def test_at_a_moment_all_facts_count_before_the_first_that_is_later(each_bus: str) -> None:
    """Two of one time, then a clock that was set back, then forward again."""
    async with running(service, bus=each_bus) as bus:
        events = [Joined("ana", "1"), Joined("ana", "2"), Joined("ana", "3"), Joined("ana", "4"), Joined("ana", "5")]
        await wrote(bus, *events, times=[micro(0), micro(10), micro(10), micro(5), micro(20)])

        async def stood(seconds: int) -> str:
            found = await bus.state(Person, "ana", at=at(seconds))
            return found.name if found else ""

        assert [await stood(each) for each in (-1, 0, 9, 10, 19, 20, 9999)] == ["", "1", "1", "4", "4", "5", "5"]
        assert await stood(5) == "1", "what came behind a later one is not before it"


# --------------------------------------------------------------------------------------------------------- states


async def test_the_things_of_a_domain_that_stand_are_told_once_each_and_those_that_left_are_not(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for n in range(40):
            await bus.call(Join(f"p{n}", f"Name {n}", ""))
            if n % 3 == 0:
                await bus.call(Leave(f"p{n}"))
        await bus.call(Join("p3", "again", ""))
        await bus.settled()
        found = await all_of(bus.states(Person))
        expected = [n for n in range(40) if n % 3 or n == 3]
        assert [each.id for each in found] == [f"p{n}" for n in expected]
        assert [each for each in found if each.id == "p3"] == [Person("p3", "again")]


@pytest.mark.parametrize(
    ("bound", "least"),
    [
        ({"_MOST": 3}, 7),
        ({"_BYTES": 200}, 7),
        ({"_BYTES": 1}, 19),
        ({"_LOOKED": 10, "_FIRSTS": 5}, 6),
        ({"_AT_ONCE": 1}, 1),
    ],
)
async def test_a_large_domain_comes_in_pages_and_lacks_nothing(
    bound: dict[str, int], least: int, each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in bound.items():
        monkeypatch.setattr(f"cauce.history.{name}", number)
    async with running(service, bus=each_bus) as bus:
        for n in range(20):
            await bus.call(Join(f"p{n}", f"Name {n}", ""))
        await bus.call(Leave("p7"))
        asked = counted(bus, monkeypatch)
        assert [each.id async for each in bus.states(Person)] == [f"p{n}" for n in range(20) if n != 7]
        assert len(asked) >= least


async def test_a_page_of_things_with_long_histories_ends_before_the_asker_has_waited_long(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.history._LOOKED", 100)
    monkeypatch.setattr("cauce.history._AT_ONCE", 2)
    async with running(service, bus=each_bus) as bus:
        for n in range(6):
            await wrote(bus, Joined(f"{n}", "x"), *[Seen(f"{n}")] * 60)
        pages = asked(bus, monkeypatch)
        assert [each.id async for each in bus.states(Person, at=datetime.now(UTC))] == [f"{n}" for n in range(6)]
        assert len(pages) >= 3


async def test_a_page_of_things_that_are_rare_in_the_log_ends_too(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.history._LOOKED", 2_000)
    monkeypatch.setattr("cauce.backends.sqlite.log._WINDOW", 10)
    async with running(service, bus=bus_url) as bus:
        await wrote(bus, Joined("first", "x"))
        await bus.facts.append("others/1", [sealed("others/1", "Noise", f"{n}", Meta(1), b"{}") for n in range(200)])
        await wrote(bus, Joined("last", "x"))
        pages = asked(bus, monkeypatch)
        assert [each.id async for each in bus.states(Person)] == ["first", "last"]
        assert len(pages) > 5


async def test_others_get_their_turn_while_a_long_history_is_folded(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await wrote(bus, Joined("long", "x"))
        for start in range(0, 9_000, 900):
            facts = [seal(Seen("long"), f"{n}", Meta(1)) for n in range(start, start + 900)]
            await bus.facts.append("people/long", facts)
        looks: list[Callable[[], Awaitable[Any]]] = [
            lambda: bus.state(Person, "long", at=datetime.now(UTC)),
            lambda: anext(bus.history(Person, "long", after=9_000)),
            lambda: bus.undo(Person, "long", to=1, dry_run=True),
        ]
        for look in looks:
            task, turns = asyncio.ensure_future(look()), 0
            while not task.done():
                turns += 1
                await asyncio.sleep(0)
            await task
            assert turns > 4


@pytest.mark.parametrize("short", [48, 0])
async def test_a_domain_is_shown_at_one_place_in_the_log_while_others_write(
    short: int, each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of short streams no record is looked for, of longer ones it may be of a later place."""
    monkeypatch.setattr("cauce.fold._SHORT", short)
    monkeypatch.setattr("cauce.history._MOST", 4)
    async with running(service, bus=each_bus) as bus:
        receipts = [await bus.call(Join(f"p{n}", "before", "")) for n in range(12)]
        found = list[Person]()
        async for each in bus.states(Person):
            if not found:
                await bus.call(Join("p11", "after", ""))
                await bus.call(Leave("p10"))
                await bus.call(Join("new", "after", ""))
                await bus.settled()
            found.append(each)
        assert [(each.id, each.name) for each in found] == [(f"p{n}", "before") for n in range(12)]
        assert await all_of(bus.states(Person, upto=receipts[-1].position)) == found
        now = await all_of(bus.states(Person))
        assert [each.id for each in now if each.name == "after"] == ["p11", "new"]
        assert "p10" not in [each.id for each in now]
        assert await all_of(bus.states(Person, upto=0)) == []


async def test_a_domain_as_it_stood_at_a_moment_has_what_had_begun_by_then(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await wrote(bus, Joined("a", "1"), Joined("b", "1"), Left("a"), times=[micro(0), micro(10), micro(20)])
        await wrote(bus, Joined("b", "2"), Joined("c", "early"), times=[micro(30), micro(5)])

        async def names(seconds: int) -> list[tuple[str, str]]:
            return [(each.id, each.name) async for each in bus.states(Person, at=at(seconds))]

        assert await names(-1) == []
        assert await names(5) == [("a", "1"), ("c", "early")], "written late, but it had happened"
        assert await names(10) == [("a", "1"), ("b", "1"), ("c", "early")]
        assert await names(20) == [("b", "1"), ("c", "early")]
        assert await names(30) == [("b", "2"), ("c", "early")]


async def test_of_a_domain_with_several_records_each_is_told_as_what_it_is(each_bus: str) -> None:
    papers = Domain("papers", key="id")

    class Draft(Record, domain=papers):
        id: str
        text: str

    class Article(Record, domain=papers, version=2):
        id: str
        text: str
        by: str = ""

    class Drafted(Event, domain=papers):
        id: str
        text: str

    class Printed(Event, domain=papers):
        id: str
        by: str

    owner = Service("papers", owns=papers)

    @owner.evolve
    def drafted(paper: Draft | Article | None, event: Drafted) -> Draft:
        return Draft(event.id, event.text)

    @owner.evolve
    def printed(paper: Draft, event: Printed) -> Article:
        return Article(event.id, paper.text, event.by)

    async with connect(each_bus) as client:
        await wrote(client, Drafted("a", "1"), Printed("a", "eva"), Drafted("b", "2"))
    async with running(owner, bus=each_bus) as bus:
        draft, article = Draft("a", "1"), Article("a", "1", "eva")
        assert await bus.fetch(Article, "a") == await bus.record(Article, "a") == article
        assert await bus.state(Draft, "a", at=1) == draft
        for ask in (bus.fetch(Draft, "a"), bus.state(Draft, "a"), bus.record(Draft, "a")):
            with pytest.raises(Refused, match="papers/a stands as Article, not as Draft: ask for that"):
                await ask
        for record in (Draft, Article):
            assert [each.after async for each in bus.history(record, "a")] == [draft, article]
            assert [each async for each in bus.states(record)] == [article, Draft("b", "2")]
        there: list[object] = [article, draft]
        undone = await bus.undo(Draft, "a", to=1)
        assert [undone.before, undone.after] == there
        undone = await bus.undo(Draft, "a", to=2)
        assert [undone.after, undone.before] == there


# ------------------------------------------------------------------------------------------------ over the wire

OWNER = """
import asyncio, sys
from importlib import import_module
from cauce import running

async def main():
    async with running(import_module(sys.argv[2]).service, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
def owner(program: Callable[..., subprocess.Popen[str]], each_bus: str) -> Callable[[str], Awaitable[None]]:
    """Serves a module in another process: in one of their own the wire is a call, and carries anything."""

    async def start(module: str) -> None:
        assert await Peer(program(OWNER, each_bus, module)).said() == "ready"

    return start


async def test_pages_of_large_records_fit_the_wire(owner: Callable[[str], Awaitable[None]], each_bus: str) -> None:
    """Each is as large as an entry may nearly be, so no two of them fit one message of NATS."""
    large = 749_000
    async with connect(each_bus) as client:
        await wrote(client, Joined("ana", "a" * large), Joined("ana", "b" * large), Joined("eva", "c" * large))
        await owner("tests.test_past")
        found = [each.after async for each in client.history(Person, "ana")]
        assert [each and each.name[-1] for each in found] == ["a", "b"]
        assert [each.name[-1] async for each in client.states(Person)] == ["b", "c"]


async def test_pages_of_many_small_changes_fit_the_wire_too(
    owner: Callable[[str], Awaitable[None]], each_bus: str
) -> None:
    """What stands around each record counts: of so many it is as much as the records."""
    async with connect(each_bus) as client:
        await wrote(client, Joined("ana", "n" * 100))
        for start in range(0, 2_700, 900):
            facts = [seal(Noted("ana"), f"{n:0>100}", Meta(1)) for n in range(start, start + 900)]
            await client.facts.append("people/ana", facts)
        await owner("tests.test_past")
        assert [each.version async for each in client.history(Person, "ana")] == list(range(1, 2_702))


async def test_a_client_looks_back_through_an_owner_in_another_process(
    owner: Callable[[str], Awaitable[None]], each_bus: str
) -> None:
    await owner("shop.users")
    async with connect(each_bus) as client:
        await client.call(shop.RegisterUser("42", "Ana", "a@x.org"), by="web:eva")
        await client.call(shop.RegisterUser("43", "Eva", "e@x.org"), by="web:eva")
        await client.call(shop.ChangeEmail("42", "b@x.org"), by="crm:joe")
        changes = await all_of(client.history(shop.User, "42"))
        assert [(each.event, each.wish, each.by) for each in changes] == [
            ("UserRegistered", "RegisterUser", "web:eva"),
            ("EmailChanged", "ChangeEmail", "crm:joe"),
        ]
        assert changes[1].fields == {"email": ("a@x.org", "b@x.org")}
        assert await client.state(shop.User, "42", at=changes[0].time) == changes[0].after
        assert [each.email async for each in client.states(shop.User)] == ["b@x.org", "e@x.org"]
        with pytest.raises(Refused, match="users/42 has 2 versions"):
            await client.state(shop.User, "42", at=3)


async def test_nobody_who_serves_is_no_answer(each_bus: str) -> None:
    async with connect(each_bus) as client:
        for ask in (lambda: all_of(client.history(Person, "ana")), lambda: all_of(client.states(Person))):
            with pytest.raises(NoAnswer, match="people"):
                await ask()


async def test_a_question_of_a_kind_that_is_not_known_is_refused(bus_url: str) -> None:
    async with running(service, bus=bus_url) as bus:
        answer = await bus.wire.ask("people", b'{"kind":"prophecy","type":"Person"}', bus.clock.monotonic() + 5)
        assert b'"error":"Refused"' in answer
