"""Messages that were stored by older code are read as what they are called and look like today."""

# mypy: disable-error-code="valid-type, attr-defined"
# The classes of each version are made in a function, so that two of one name can live in one test.

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cauce import (
    Bus,
    Command,
    Context,
    Copy,
    Domain,
    Event,
    Notice,
    Record,
    Refused,
    Retry,
    Service,
    Unavailable,
    Unreadable,
    upcast,
)
from cauce.backends import look
from cauce.bus import Ask
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.log import Filter
from cauce.messages import Message
from cauce.runtime import connect, running
from cauce.schema import Schema, encode
from cauce.sql import Store
from cauce.testing import VirtualClock

Body = dict[str, Any]


def first() -> SimpleNamespace:
    """The users as they were in the beginning: one field for the name."""
    users = Domain("users", key="user_id")

    class Person(Record, domain=users):
        user_id: str
        name: str

    class UserSignedUp(Event, domain=users):
        user_id: str
        name: str

    class SignUp(Command, domain=users):
        user_id: str
        name: str

    service = Service("users", owns=users)

    @service.decide
    def sign_up(person: Person | None, command: SignUp) -> UserSignedUp:
        return UserSignedUp(command.user_id, command.name)

    @service.evolve
    def signed_up(person: Person | None, event: UserSignedUp) -> Person:
        return Person(event.user_id, event.name)

    return SimpleNamespace(users=users, Person=Person, UserSignedUp=UserSignedUp, SignUp=SignUp, service=service)


def split(body: Body) -> Body:
    """The name in two."""
    body["first"], body["last"] = body.pop("name").split(" ", 1)
    return body


def today(lift: Callable[[Body], Any] = split) -> SimpleNamespace:
    """The users of today: event, record and command renamed, their name in two, and a language."""
    users = Domain("users", key="user_id")

    class User(Record, domain=users, version=2, was=("Person",)):
        user_id: str
        first: str
        last: str

    class UserRegistered(Event, domain=users, version=3, was=("UserSignedUp",)):
        user_id: str
        first: str
        last: str
        language: str

    class Register(Command, domain=users, version=2, was=("SignUp",)):
        user_id: str
        first: str
        last: str

    @upcast(UserRegistered, from_version=2)
    def in_spanish(body: Body) -> Body:
        return body | {"language": "es"}

    for message in (User, UserRegistered, Register):
        upcast(message, from_version=1)(lift)
    service = Service("users", owns=users)

    @service.decide
    def register(user: User | None, command: Register) -> UserRegistered:
        return UserRegistered(command.user_id, command.first, command.last, "en")

    @service.evolve
    def registered(user: User | None, event: UserRegistered) -> User:
        return User(event.user_id, event.first, event.last)

    return SimpleNamespace(users=users, User=User, UserRegistered=UserRegistered, Register=Register, service=service)


def mails(now: SimpleNamespace, seen: list[Any], attempts: int = 12) -> Service:
    """Who hears of each user, in full and by notice."""
    service, registered = Service("mails"), now.UserRegistered

    @service.on(retry=Retry(attempts=attempts))
    async def greet(event: registered) -> None:
        seen.append(event)

    @service.on(retry=Retry(attempts=attempts))
    async def count(notice: Notice[registered]) -> None:
        seen.append(notice)

    return service


async def until(condition: Callable[[], bool], bus: Bus) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await bus.clock.sleep(0.01)


# ------------------------------------------------------------------------------------------------ one body


def schema_of(lift: Callable[[Body], Any] = split) -> tuple[Schema, SimpleNamespace]:
    now = today(lift)
    return Schema(now.users.messages.values()), now


def test_an_old_body_is_lifted_step_by_step_under_its_old_name() -> None:
    schema, now = schema_of()
    body = b'{"user_id":"42","name":"Ana Alvarez Gil"}'
    assert schema.decode("users", "UserSignedUp", 1, body) == now.UserRegistered("42", "Ana", "Alvarez Gil", "es")
    # It may have been renamed before or after its version was raised.
    assert schema.decode("users", "UserRegistered", 1, body) == now.UserRegistered("42", "Ana", "Alvarez Gil", "es")
    two = b'{"user_id":"42","first":"Ana","last":"Gil"}'
    assert schema.decode("users", "UserRegistered", 2, two) == now.UserRegistered("42", "Ana", "Gil", "es")
    message = now.UserRegistered("42", "Ana", "Gil", "en")
    assert schema.decode("users", "UserRegistered", 3, encode(message)) == message
    assert schema.today("users", "UserSignedUp") == "UserRegistered"


def test_fields_are_joined_and_changed_in_type_as_plain_python_does() -> None:
    users = Domain("users", key="user_id")

    class Paid(Event, domain=users, version=2):
        user_id: str
        at: datetime
        cents: int
        by_month: dict[int, int]

    @upcast(Paid, from_version=1)
    def joined(body: Body) -> Body:
        body["at"] = datetime.fromisoformat(f"{body.pop('day')}T{body.pop('time')}+00:00")
        body["cents"] = round(body.pop("euros") * 100)
        body["by_month"] = {1: body["cents"]}
        return body

    found = Schema([Paid]).decode(
        "users", "Paid", 1, b'{"user_id":"a","day":"2017-01-02","time":"03:04:05","euros":1.5}'
    )
    assert found == Paid("a", datetime(2017, 1, 2, 3, 4, 5, tzinfo=UTC), 150, {1: 150})


def test_without_any_upcaster_an_old_body_is_read_as_it_is() -> None:
    users = Domain("users", key="user_id")

    class Moved(Event, domain=users, version=4):
        user_id: str
        city: str = "unknown"

    schema = Schema([Moved])
    assert schema.decode("users", "Moved", 1, b'{"user_id":"a"}') == Moved("a")
    assert schema.decode("users", "Moved", 3, b'{"user_id":"a","city":"Soria"}') == Moved("a", "Soria")


def test_a_gap_in_the_chain_is_refused_at_the_start_naming_what_is_missing() -> None:
    users = Domain("users", key="user_id")

    class Moved(Event, domain=users, version=4):
        user_id: str

    @upcast(Moved, from_version=2)
    def second(body: Body) -> Body:
        return body

    with pytest.raises(Refused, match=r"Moved of users is version 4 and has upcasters from 2, but none from 1, 3"):
        Schema([Moved])


async def test_a_service_whose_chain_has_a_gap_does_not_start(bus_url: str) -> None:
    now = today()
    now.UserRegistered.__upcasts__.pop(1)
    with pytest.raises(Refused, match="none from 1: add @upcast"):
        async with running(now.service, bus=bus_url):
            pass


def test_upcasters_that_cannot_be_right_are_refused_at_import() -> None:
    users = Domain("users", key="user_id")

    class Moved(Event, domain=users, version=3):
        user_id: str

    def same(body: Body) -> Body:
        return body

    def other(body: Body) -> Body:
        return body

    async def waits(body: Body) -> Body:
        return body

    def several(body: Body) -> Any:
        yield body

    for version in (0, 3, 4, True, "1"):
        with pytest.raises(Refused, match=r"from version .*: Moved of users is version 3"):
            upcast(Moved, from_version=version)  # type: ignore[arg-type]
    upcast(Moved, from_version=1)(same)
    upcast(Moved, from_version=1)(same)
    with pytest.raises(Refused, match=r"two upcasters from version 1, .*same and .*other"):
        upcast(Moved, from_version=1)(other)
    with pytest.raises(Refused, match="is async"):
        upcast(Moved, from_version=2)(waits)  # type: ignore[type-var]
    with pytest.raises(Refused, match="one stored entry stays one message"):
        upcast(Moved, from_version=2)(several)
    with pytest.raises(Refused, match="write a function"):
        upcast(Moved, from_version=2)(dict)


def _raises(body: Body) -> Any:
    return body["nmae"]


def _nothing(body: Body) -> Any:
    body["first"] = "lost"


def _two(body: Body) -> Any:
    return [body, body]


def _text(body: Body) -> Any:
    return "Ana"


def _misfit(body: Body) -> Any:
    return body | {"first": 1, "last": None}


def _set(body: Body) -> Any:
    return body | {"first": object()}


def _deep(body: Body) -> Any:
    return _deep(body)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (_raises, r"_raises fail: KeyError\('nmae'\): mend it"),
        (_nothing, "_nothing returned None: return the body"),
        (_two, "returned list: one stored entry stays one message, because its position and version name one fact"),
        (_text, "_text returned str: return the body, a dict"),
        (_misfit, "lifted by .*_misfit, .*does not fit its class: Expected `str`, got `int`"),
        (_set, "lifted by .*_set, .*does not fit its class"),
        (_deep, "_deep fail: RecursionError"),
    ],
)
def test_a_broken_upcaster_is_named_with_the_type_and_version_it_was_given(broken: Any, why: str) -> None:
    schema, _ = schema_of(broken)
    with pytest.raises(Unreadable, match=why) as found:
        schema.decode("users", "UserSignedUp", 1, b'{"user_id":"42","name":"Ana Gil"}')
    assert "UserSignedUp of users" in str(found.value)
    assert "version 1" in str(found.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 20_000])
def test_broken_bytes_of_an_old_version_are_unreadable(body: bytes) -> None:
    schema, _ = schema_of()
    with pytest.raises(Unreadable, match="UserSignedUp of users"):
        schema.decode("users", "UserSignedUp", 1, body)


def test_a_newer_version_is_unreadable_under_the_old_name_too() -> None:
    schema, _ = schema_of()
    with pytest.raises(Unreadable, match="came in schema version 4, this program knows 3"):
        schema.decode("users", "UserSignedUp", 4, b"{}")


# ------------------------------------------------------------------------------------------------ names


def test_an_old_name_that_collides_with_a_living_one_is_refused_at_import() -> None:
    users = Domain("users", key="user_id")

    class Living(Event, domain=users):
        user_id: str

    class Renamed(Event, domain=users, was=("Gone",)):
        user_id: str

    with pytest.raises(Refused, match=r"'Living' means .*Living.*cannot mean .*Other"):

        class Other(Event, domain=users, was=("Living",)):
            user_id: str

    with pytest.raises(Refused, match=r"'Gone' means .*Renamed.*cannot mean .*Gone"):

        class Gone(Event, domain=users):
            user_id: str

    with pytest.raises(Refused, match=r"'Gone' means .*Renamed"):

        class Third(Event, domain=users, was=("Gone",)):
            user_id: str

    wrong: list[Any] = ["Gone", ("Fourth",)]
    for was in wrong:
        with pytest.raises(Refused, match="write its earlier names"):

            class Fourth(Event, domain=users, was=was):
                user_id: str

    assert sorted(users.messages) == ["Living", "Renamed"]


def test_a_class_whose_module_is_read_again_may_give_up_an_old_name() -> None:
    users = Domain("users", key="user_id")

    def declare(**options: Any) -> type[Message]:
        class Moved(Event, domain=users, **options):
            user_id: str

        return Moved

    declare(was=("Gone",))
    again = declare()
    assert users.renamed == {}
    assert Schema([again]).knows("users", "Gone") is False


# ------------------------------------------------------------------------------------------------ on a bus


async def test_today_s_code_reads_what_the_first_one_wrote(each_bus: str) -> None:
    old, now, seen = first(), today(), list[Any]()
    async with running(old.service, bus=each_bus) as bus:
        await bus.call(old.SignUp("42", "Ana Gil"))
        await bus.settled()
    async with connect(each_bus) as bus:
        # A wish that waits for its owner over a deployment.
        await bus.send(old.SignUp("43", "Eva Paz Rey"))
        assert await bus.record(now.User, "42") == now.User("42", "Ana", "Gil")
        (before,) = (await bus.facts.read(Filter("users/42"))).entries
    async with running(now.service, mails(now, seen), bus=each_bus) as bus:
        await bus.settled()
        assert await bus.fetch(now.User, "42") == now.User("42", "Ana", "Gil")
        assert await bus.state(now.User, "42", at=1) == now.User("42", "Ana", "Gil")
        assert await bus.record(now.User, "43") == now.User("43", "Eva", "Paz Rey")
        await bus.call(now.Register("42", "Ana", "Vega"))
        await bus.settled()
        entries = (await bus.facts.read(Filter("users/42"))).entries
    # Stored bytes never change.
    assert entries[0] == before
    assert (before.type, before.body) == ("UserSignedUp", b'{"user_id":"42","name":"Ana Gil"}')
    assert [(each.type, each.meta.schema) for each in entries] == [("UserSignedUp", 1), ("UserRegistered", 3)]
    events = [each for each in seen if isinstance(each, now.UserRegistered) and each.user_id == "42"]
    assert events == [now.UserRegistered("42", "Ana", "Gil", "es"), now.UserRegistered("42", "Ana", "Vega", "en")]
    notices = [each for each in seen if isinstance(each, Notice) and each.key == "42"]
    assert notices == [Notice("UserRegistered", "42", 1), Notice("UserRegistered", "42", 2)]


def test_the_command_line_shows_and_verifies_what_is_stored(bus_url: str) -> None:
    old = first()

    async def fill() -> None:
        async with running(old.service, bus=bus_url) as bus:
            await bus.call(old.SignUp("42", "Ana Gil"))

    asyncio.run(fill())
    today()
    for command in (["tail"], ["show", "users/42"], ["export"]):
        told = CliRunner().invoke(main, [*command, "--bus", bus_url, "--json"], catch_exceptions=False)
        events = [json.loads(line) for line in told.stdout.splitlines()]
        (event,) = [each for each in events if each["source"] == "/users"]
        assert (event["type"], event["schemaversion"], event["data"]) == (
            "UserSignedUp", 1, {"user_id": "42", "name": "Ana Gil"},
        )  # fmt: skip
    assert CliRunner().invoke(main, ["verify", "--bus", bus_url]).exit_code == 0


async def test_views_replicas_and_reactions_to_records_know_old_names(bus_url: str) -> None:
    old, now, stood = first(), today(), list[Any]()
    async with running(old.service, bus=bus_url) as bus:
        await bus.call(old.SignUp("42", "Ana Gil"))
    crm, registered, user = Service("crm"), now.UserRegistered, now.User

    class Holder(Copy, of=user):
        user_id: str
        last: str

    crm.replica(Holder)

    @crm.view("names", schema="create table names (user_id text primary key, first text)")
    def named(event: registered, db: Store) -> None:
        db.execute("insert or replace into names values (?, ?)", (event.user_id, event.first))

    @crm.on
    async def look_at(record: user, ctx: Context) -> None:
        stood.append((record, await ctx.get(Holder, "42")))

    async with running(crm, bus=bus_url) as bus:
        await bus.settled()
        copies = bus.copies["crm"]
        assert await copies.view("names").fetch("select * from names") == [("42", "Ana")]
    assert stood == [(now.User("42", "Ana", "Gil"), Holder("42", "Gil"))]


async def test_what_a_broken_upcaster_cannot_lift_is_parked_and_read_after_it_was_mended(each_bus: str) -> None:
    old, seen = first(), list[Any]()
    async with running(old.service, bus=each_bus) as bus:
        await bus.call(old.SignUp("42", "Ana"))
        await bus.call(old.SignUp("43", "Eva Paz"))
    broken = today()
    async with running(mails(broken, seen, attempts=1), bus=each_bus) as bus:
        await bus.settled()
    # It delays its own thing only.
    assert [each.user_id for each in seen if not isinstance(each, Notice)] == ["43"]
    async with look(each_bus, SystemClock()) as looked:
        (letter,) = await looked.stores.letters()
    assert (letter.consumer, letter.stream) == ("greet", "users/42")
    assert (
        "Unreadable: UserSignedUp of users (now UserRegistered), version 1, made split fail: ValueError" in letter.error
    )
    assert "line" in letter.trace
    assert b'"name":"Ana"' in bytes(letter.message)
    mended = today(lambda body: {"user_id": body["user_id"], "first": body["name"].partition(" ")[0], "last": ""})
    async with look(each_bus, SystemClock()) as looked:
        await looked.stores.retry("mails", "greet", letter.position)
    seen.clear()
    async with running(mails(mended, seen, attempts=1), bus=each_bus) as bus:
        await until(lambda: bool(seen), bus)
    assert seen == [mended.UserRegistered("42", "Ana", "", "es")]


async def test_a_call_on_what_cannot_be_lifted_fails_with_the_reason_and_writes_nothing(bus_url: str) -> None:
    old, now = first(), today()
    async with running(old.service, bus=bus_url) as bus:
        await bus.call(old.SignUp("42", "Ana"))
    async with running(now.service, bus=bus_url) as bus:
        head = await bus.facts.head()
        for _ in range(2):
            with pytest.raises(
                Unreadable, match=r"position \d+ \(users/42 version 1\): UserSignedUp of users.*split fail"
            ):
                await bus.call(now.Register("42", "Ana", "Gil"))
        with pytest.raises(Unreadable, match="split fail"):
            await bus.fetch(now.User, "42")
        assert await bus.facts.head() == head
        assert (await bus.call(now.Register("43", "Eva", "Paz"))).version == 1


def _as_the_name_says(body: Body) -> Any:
    match body["name"]:
        case "raises":
            raise LookupError("no such name")
        case "nothing":
            return None
        case "loops":
            return _as_the_name_says(body)
    return split(body)


async def test_a_thing_that_cannot_be_lifted_is_named_to_whoever_asks_and_no_other_suffers(each_bus: str) -> None:
    old, now = first(), today(_as_the_name_says)
    broken = {"raises": "fail: LookupError", "nothing": "returned None", "loops": "fail: RecursionError"}
    async with running(old.service, bus=each_bus) as bus:
        for key in broken:
            await bus.call(old.SignUp(key, key))
        await bus.call(old.SignUp("42", "Ana Gil"))
    async with running(now.service, bus=each_bus) as bus:
        for key, why in broken.items():
            named = rf"position \d+ \(users/{key} version 1\): UserSignedUp of users \(now UserRegistered\), version 1(, made|:) _as_the_name_says {why}"
            with pytest.raises(Unreadable, match=named):
                await bus.call(now.Register(key, "Eva", "Paz"))
            with pytest.raises(Unreadable, match=named):
                await bus.fetch(now.User, key)
            for at in (1, datetime(2100, 1, 1, tzinfo=UTC)):
                with pytest.raises(Unreadable, match=named):
                    await bus.state(now.User, key, at=at)
            with pytest.raises(Unreadable, match=f"Person of users .*version 1.* _as_the_name_says {why}"):
                await bus.record(now.User, key)
            assert [each.version for each in (await bus.facts.read(Filter(f"users/{key}"))).entries] == [1]
        assert await bus.fetch(now.User, "42") == now.User("42", "Ana", "Gil")
        assert (await bus.call(now.Register("42", "Eva", "Paz"))).version == 2


def test_a_call_whose_own_process_an_upcaster_keeps_is_answered_when_that_goes_on_and_its_id_gives_the_same(
    virtual: Callable[[Callable[[], Awaitable[None]]], None], clock: VirtualClock, bus_url: str
) -> None:
    lifted = list[str]()

    def slow(body: Body) -> Body:
        clock.advance(20.0)
        lifted.append(body["user_id"])
        return split(body)

    async def main() -> None:
        old, now = first(), today(slow)
        async with running(old.service, bus=bus_url, clock=clock) as bus:
            for name in ("Ana Gil", "Eva Paz"):
                await bus.call(old.SignUp("42", name))
        async with running(now.service, bus=bus_url, clock=clock) as bus:
            # The time was over, but it was this process that stood still: what came meanwhile is heard first.
            receipt = await bus.call(now.Register("42", "Pia", "Roa"), timeout=30)
            assert await bus.call(now.Register("42", "Pia", "Roa"), id=receipt.id) == receipt
            await bus.settled(timeout=600)
            assert receipt.version == 3
            assert lifted[:2] == ["42", "42"]
            # Once it is in memory, who wishes does not wait for it again.
            assert (await bus.call(now.Register("42", "Sol", "Paz"), timeout=100)).version == 4
            much = len(lifted)
            assert (await bus.call(now.Register("42", "Luz", "Paz"), timeout=1)).version == 5
            assert len(lifted) == much

    virtual(main)


async def test_a_wish_that_is_repeated_in_its_new_form_is_the_same_wish(bus_url: str) -> None:
    old, now = first(), today()
    async with running(old.service, bus=bus_url) as bus:
        receipt = await bus.call(old.SignUp("42", "Ana Gil"), id="wish-1")
    async with running(now.service, bus=bus_url) as bus:
        assert (await bus.call(now.Register("42", "Ana", "Gil"), id="wish-1")).position == receipt.position
        assert (await bus.call(old.SignUp("42", "Ana Gil"), id="wish-1")).position == receipt.position


async def test_a_fact_that_older_code_said_is_recorded_once_as_it_was_said(bus_url: str) -> None:
    old, now = first(), today()

    def said(key: str) -> Ask:
        body = encode(old.UserSignedUp(key, "Ana Gil"))
        return Ask("publish", "UserSignedUp", f"said-{key}", key, 1, msgspec.Raw(body))

    async with running(old.service, bus=bus_url) as bus:
        await bus.publish("users", said("42"))
    async with running(now.service, bus=bus_url) as bus:
        # It was killed before it knew that this stood in the log; the other one it never came to.
        await bus.publish("users", said("42"))
        await bus.publish("users", said("43"))
        entries = (await bus.facts.read(Filter(domains=frozenset({"users"})))).entries
        assert await bus.fetch(now.User, "43") == now.User("43", "Ana", "Gil")
    assert [(each.stream, each.type, each.meta.schema) for each in entries] == [
        ("users/42", "UserSignedUp", 1),
        ("users/43", "UserSignedUp", 1),
    ]


def test_a_wish_that_cannot_be_lifted_is_a_dead_letter_and_is_decided_after_it_was_mended(
    virtual: Callable[[Callable[[], Awaitable[None]]], None], clock: VirtualClock, bus_url: str
) -> None:
    old, broken = first(), today()
    mended = today(lambda body: {"user_id": body["user_id"], "first": body["name"], "last": ""})

    async def main() -> None:
        async with connect(bus_url, clock=clock) as bus:
            for key, name in (("42", "Ana"), ("42", "Ana Gil"), ("43", "Eva Paz")):
                await bus.send(old.SignUp(key, name))
        async with running(broken.service, bus=bus_url, clock=clock) as bus:
            await bus.settled(timeout=3_600)
            assert [each.stream for each in (await bus.facts.read(Filter(domains=frozenset({"users"})))).entries] == [
                "users/43"
            ]
        async with look(bus_url, clock) as looked:
            (letter,) = await looked.stores.letters()
            assert (letter.consumer, letter.stream, letter.behind) == ("decide users", "users/42", 1)
            assert "SignUp of users (now Register), version 1, made split fail" in letter.error
            await looked.stores.retry("users", "decide users", letter.position)
        async with running(mended.service, bus=bus_url, clock=clock) as bus:
            await bus.settled(timeout=3_600)
            assert await bus.state(mended.User, "42", at=1) == mended.User("42", "Ana", "")

    virtual(main)


async def test_an_owner_of_older_code_is_understood(bus_url: str) -> None:
    old = first()
    async with running(old.service, bus=bus_url) as bus:
        await bus.call(old.SignUp("42", "Ana Gil"))

        class User(Record, domain=Domain("users", key="user_id"), name="Person", version=2):
            user_id: str
            first: str
            last: str

        upcast(User, from_version=1)(split)
        assert await bus.fetch(User, "42") == User("42", "Ana", "Gil")


async def test_a_view_that_meets_what_cannot_be_lifted_stands_still_and_says_where(bus_url: str) -> None:
    old, now = first(), today()
    async with running(old.service, bus=bus_url) as bus:
        await bus.call(old.SignUp("42", "Ana"))
    crm, registered = Service("crm"), now.UserRegistered

    @crm.view("names", schema="create table names (first text)")
    def named(event: registered, db: Store) -> None:
        db.execute("insert into names values (?)", (event.first,))

    async with running(crm, bus=bus_url) as bus:
        with pytest.raises(Unavailable, match=r"position \d+ \(users/42\).*split fail"):
            await bus.settled()
