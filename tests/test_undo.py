"""Undo: facts that take a thing back, by inverses or by what stood; refused where it would be told to nobody."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cauce import (
    Command,
    Context,
    Copy,
    Domain,
    Event,
    Fact,
    NoAnswer,
    Notice,
    OutcomeUnknown,
    Record,
    Refused,
    Rejected,
    Restored,
    Service,
    Store,
    Undone,
    Unreadable,
    connect,
    replace,
    running,
    upcast,
)
from cauce.bus import Bus, Cause
from cauce.codec import Entry, Meta, seal, sealed
from cauce.folding import fold_of
from cauce.log import Filter
from cauce.restored import restored
from cauce.schema import encode
from cauce.service import bind
from shop import crm, users
from tests.wires import Peer

people = Domain("people", key="id")


class Person(Record, domain=people):
    id: str
    email: str
    points: int = 0


class Joined(Event, domain=people):
    id: str
    email: str


class EmailChanged(Event, domain=people):
    id: str
    email: str


class Earned(Event, domain=people):
    id: str
    points: int


class CardSent(Event, domain=people, irreversible=True):
    id: str


class Left(Event, domain=people):
    id: str


class Join(Command, domain=people):
    id: str
    email: str


class ChangeEmail(Command, domain=people):
    id: str
    email: str


class Earn(Command, domain=people):
    id: str
    points: int


class SendCard(Command, domain=people):
    id: str


class Leave(Command, domain=people):
    id: str


def owner() -> Service:
    service = Service("people", owns=people)

    @service.decide
    def join(person: Person | None, command: Join) -> Joined:
        if person is not None:
            raise Rejected("already here")
        return Joined(command.id, command.email)

    @service.decide
    def change(person: Person | None, command: ChangeEmail) -> EmailChanged:
        if person is None:
            raise Rejected("not here")
        return EmailChanged(command.id, command.email)

    @service.decide
    def earn(person: Person | None, command: Earn) -> list[Earned]:
        return [Earned(command.id, 1) for _ in range(command.points)]

    @service.decide
    def send_card(person: Person | None, command: SendCard) -> CardSent:
        return CardSent(command.id)

    @service.decide
    def leave(person: Person | None, command: Leave) -> Left:
        return Left(command.id)

    @service.evolve
    def joined(person: Person | None, event: Joined) -> Person:
        return Person(event.id, event.email)

    @service.evolve
    def changed(person: Person, event: EmailChanged) -> Person:
        return replace(person, email=event.email)

    @service.evolve
    def earned(person: Person, event: Earned) -> Person:
        return replace(person, points=person.points + event.points)

    @service.evolve
    def left(person: Person | None, event: Left) -> None:
        return None

    @service.invert
    def unearned(person: Person, event: Earned) -> Earned:
        return Earned(event.id, -event.points)

    return service


async def begun(bus: Bus, key: str = "a") -> None:
    """Three facts: joined, changed, changed."""
    await bus.call(Join(key, "1@x"))
    await bus.call(ChangeEmail(key, "2@x"))
    await bus.call(ChangeEmail(key, "3@x"))


async def entries(bus: Bus, key: str = "a") -> list[Entry]:
    return [each.checked() for each in (await bus.facts.read(Filter(f"people/{key}"))).entries]


async def test_a_thing_goes_back_to_a_version_by_a_fact_that_carries_what_stood(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await begun(bus)
        undone = await bus.undo(Person, "a", to=1, by="ana")
        assert undone == Undone(
            undone.receipt,
            (Fact("RestoredPerson", {"id": "a", "record": {"id": "a", "email": "1@x", "points": 0}, "to": 1}),),
            Person("a", "3@x"),
            Person("a", "1@x"),
        )
        assert (undone.receipt.version, undone.receipt.changed) == (4, True)
        assert await bus.fetch(Person, "a") == Person("a", "1@x")
        *before, last = await entries(bus)
        assert [each.type for each in before] == ["Joined", "EmailChanged", "EmailChanged"], "nothing is deleted"
        assert last.position == undone.receipt.position
        assert last.meta.by == "ana"
        assert last.wished is not None
        assert (last.wished.type, bytes(last.wished.body)) == ("Undo", b'{"to":1}')
        changes = [change async for change in bus.history(Person, "a", after=3)]
        assert [(each.event, each.wish, each.by, each.fields) for each in changes] == [
            ("RestoredPerson", "Undo", "ana", {"email": ("3@x", "1@x")})
        ]
        # What is hot is right: the next is decided upon it.
        await bus.call(ChangeEmail("a", "4@x"))
        assert await bus.state(Person, "a") == Person("a", "4@x")
    async with running(owner(), bus=each_bus) as bus:
        assert await bus.state(Person, "a", at=4) == Person("a", "1@x")
        assert await bus.record(Person, "a") == Person("a", "4@x")


async def test_steps_go_back_so_many_facts_and_an_undo_can_be_undone(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await begun(bus)
        assert (await bus.undo(Person, "a", steps=1)).after == Person("a", "2@x")
        assert (await bus.undo(Person, "a", steps=1)).after == Person("a", "3@x"), "back over the undo"
        assert (await bus.undo(Person, "a", steps=5)).after is None
        assert await bus.state(Person, "a") is None
        assert (await bus.undo(Person, "a", to=3)).after == Person("a", "3@x")
        await bus.call(Leave("a"))
        assert (await bus.undo(Person, "a", steps=1)).after == Person("a", "3@x"), "what was deleted stands again"
        assert [each.version for each in await entries(bus)] == list(range(1, 10))


async def test_where_each_fact_has_an_inverse_these_are_recorded_the_newest_first(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await bus.call(Join("a", "1@x"))
        await bus.call(Earn("a", 2))
        await bus.call(Earn("a", 1))
        undone = await bus.undo(Person, "a", to=1)
        assert [each.body["points"] for each in undone.facts] == [-1, -1, -1]
        assert undone.after == Person("a", "1@x", 0)
        assert [each.type for each in await entries(bus)] == ["Joined", *["Earned"] * 6]
        assert (await bus.undo(Person, "a", to=4)).after == Person("a", "1@x", 3), "inverses have inverses"
        await bus.call(ChangeEmail("a", "2@x"))
        assert [each.type for each in (await bus.undo(Person, "a", to=1)).facts] == ["RestoredPerson"], (
            "not all have one"
        )


async def test_inverses_come_in_the_order_of_undoing_and_see_what_stood_before_each_fact(each_bus: str) -> None:
    service = owner()

    @service.invert
    def back(person: Person, event: EmailChanged) -> EmailChanged:
        return EmailChanged(event.id, person.email)

    async with running(service, bus=each_bus) as bus:
        await begun(bus)
        undone = await bus.undo(Person, "a", to=1)
        assert [each.body["email"] for each in undone.facts] == ["2@x", "1@x"]


async def test_the_facts_of_one_correlation_are_undone_where_others_came_after_by_inverses_only(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await bus.call(Join("a", "1@x"))
        first = await bus.call(Earn("a", 2), id="gift")
        await bus.call(Earn("a", 5))
        undone = await bus.undo(Person, "a", correlation="gift")
        assert [each.body["points"] for each in undone.facts] == [-1, -1]
        assert undone.after == Person("a", "1@x", 5)
        await bus.call(ChangeEmail("a", "2@x"), id="wrong")
        await bus.call(Earn("a", 1))
        with pytest.raises(Refused, match=r"people/a went on with people/a version 12 Earned.*EmailChanged.*to=10"):
            await bus.undo(Person, "a", correlation="wrong")
        await bus.undo(Person, "a", steps=1)
        await bus.call(ChangeEmail("a", "3@x"), id="last")
        assert (await bus.undo(Person, "a", correlation="last")).after == Person("a", "2@x", 5), (
            "the last may be restored"
        )
        with pytest.raises(Refused, match="no facts with correlation never"):
            await bus.undo(Person, "a", correlation="never")
        assert first.changed


async def test_the_facts_of_a_correlation_are_taken_back_once_by_whichever_undo(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await bus.call(Join("a", "1@x"))
        await bus.call(Earn("a", 2), id="gift")
        await bus.call(Earn("a", 5))
        first = await bus.undo(Person, "a", correlation="gift")
        with pytest.raises(Refused, match="correlation gift taken back by version 9 already"):
            await bus.undo(Person, "a", correlation="gift")
        # What came with it later is another matter.
        await bus.call(Earn("a", 1), cause=Cause(correlation="gift"))
        assert (await bus.undo(Person, "a", correlation="gift")).facts == (Fact("Earned", {"id": "a", "points": -1}),)
        back = await bus.undo(Person, "a", correlation=first.receipt.id)
        assert back.after == Person("a", "1@x", 7), "an undo is undone by its own"
        await bus.call(Earn("a", 1), cause=Cause(correlation="more"))
        await bus.undo(Person, "a", to=1)
        await bus.call(Earn("a", 1), cause=Cause(correlation="more"))
        await bus.undo(Person, "a", steps=1)
        with pytest.raises(Refused, match="correlation more taken back by version"):
            await bus.undo(Person, "a", correlation="more")
        assert await bus.fetch(Person, "a") == Person("a", "1@x", 0)


async def test_nothing_goes_back_over_an_irreversible_fact(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await begun(bus)
        await bus.call(SendCard("a"))
        await bus.call(ChangeEmail("a", "4@x"))
        wishes: list[dict[str, Any]] = [{"to": 1}, {"steps": 2}, {"to": 0}]
        for asked in wishes:
            with pytest.raises(Refused, match=r"people/a version 4 CardSent, of 20.*irreversible"):
                await bus.undo(Person, "a", **asked)
        assert (await bus.undo(Person, "a", to=4)).after == Person("a", "3@x"), "what came after it is undone"
        assert len(await entries(bus)) == 6


async def test_what_cannot_be_undone_is_refused_before_anything_is_written(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await begun(bus)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"to": 3}, "people/a is at version 3, so there is nothing to undo"),
            ({"steps": 0}, "nothing to undo"),
            ({"to": 4}, "people/a has 3 versions, there was never a 4"),
            ({"steps": 4}, "people/a has 3 facts: 4 steps back there was nothing"),
            ({"to": -1}, "to=-1: pass a version"),
            ({"to": True}, "to=True: pass a version"),
            ({"steps": 1.0}, "steps=1.0"),
            ({"correlation": ""}, "correlation=''"),
            ({}, "one of to=version, steps=number and correlation=id"),
            ({"to": 1, "steps": 1}, "one of to=version"),
            ({"to": 1, "expect": 2}, "went on from version 2 to 3 meanwhile"),
            ({"to": 1, "by": "a\nb"}, "by="),
            ({"to": 1, "without": "crm"}, r"pass the names of services, without=\['crm'\]"),
        ]
        for asked, why in wrong:
            with pytest.raises(Refused, match=why):
                await bus.undo(Person, "a", **asked)
        with pytest.raises(Refused, match="people/nobody is at version 0, so there is nothing to undo"):
            await bus.undo(Person, "nobody", to=0)
        with pytest.raises(Refused, match="is a event, not a record|pass a record"):
            await bus.undo(Joined, "a", to=1)  # type: ignore[type-var]
        assert len(await entries(bus)) == 3
    async with connect(each_bus) as client:
        with pytest.raises(NoAnswer):
            await client.undo(Person, "a", to=1)


async def test_a_dry_run_tells_the_same_and_records_nothing(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await begun(bus)
        dry = await bus.undo(Person, "a", to=1, dry_run=True)
        assert not dry.receipt.changed
        assert dry.receipt.version == 3
        assert len(await entries(bus)) == 3
        wet = await bus.undo(Person, "a", to=1, expect=dry.receipt.version)
        assert (wet.facts, wet.before, wet.after) == (dry.facts, dry.before, dry.after)


async def test_an_undo_said_twice_at_once_is_done_once(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus, connect(each_bus) as client:
        await begun(bus)
        both = await asyncio.gather(bus.undo(Person, "a", to=1), client.undo(Person, "a", to=1))
        assert sorted(each.receipt.changed for each in both) == [False, True]
        assert {each.receipt.version for each in both} == {4}
        await begun(bus, "b")
        results = await asyncio.gather(
            bus.undo(Person, "b", steps=1, expect=3),
            client.undo(Person, "b", steps=1, expect=3),
            return_exceptions=True,
        )
        refused = [each for each in results if isinstance(each, Refused)]
        assert len(refused) == 1
        assert "from version 3 to 4 meanwhile" in str(refused[0])
        assert await bus.fetch(Person, "b") == Person("b", "2@x")
        once = await bus.undo(Person, "b", to=1, id="said")
        again = await client.undo(Person, "b", to=1, id="said")
        assert again == once
        assert len(await entries(bus, "b")) == 5


async def test_steps_go_back_over_what_was_there_when_they_were_said_with_an_id_too(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(owner(), bus=each_bus) as bus, connect(each_bus) as client:
        await begun(bus)
        ask = client.wire.ask

        async def overtaken(address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
            answer = await ask(address, payload, deadline, safe=safe)
            if b'"dry' in payload:
                await bus.call(ChangeEmail("a", "4@x"))
            return answer

        monkeypatch.setattr(client.wire, "ask", overtaken)
        with pytest.raises(Refused, match="went on from version 3 to 4 meanwhile"):
            await client.undo(Person, "a", steps=1, id="step")
        monkeypatch.setattr(client.wire, "ask", ask)
        first = await client.undo(Person, "a", steps=1, id="step")
        assert first.after == Person("a", "3@x")
        await bus.call(ChangeEmail("a", "5@x"))
        assert await client.undo(Person, "a", steps=1, id="step") == first
        assert await bus.fetch(Person, "a") == Person("a", "5@x")


async def test_only_an_undo_that_may_have_been_recorded_has_an_unknown_outcome(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(owner(), bus=bus_url) as bus:
        await begun(bus)

        async def silent(address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
            raise TimeoutError

        monkeypatch.setattr(bus.wire, "ask", silent)
        with pytest.raises(OutcomeUnknown, match="call again with id='me'"):
            await bus.undo(Person, "a", to=1, id="me")
        for asked in ({"to": 1, "dry_run": True}, {"steps": 1}):
            with pytest.raises(NoAnswer, match=r"people/\d+ did not answer within 30 s"):
                await bus.undo(Person, "a", **asked)  # type: ignore[arg-type]


async def test_wishes_that_race_with_an_undo_are_decided_before_or_after_it(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus, connect(each_bus) as client:
        await begun(bus)
        calls = [asyncio.ensure_future(client.call(Earn("a", 1))) for _ in range(60)]
        undone = await bus.undo(Person, "a", to=1)
        await asyncio.gather(*calls)
        facts = await entries(bus)
        assert [each.version for each in facts] == list(range(1, len(facts) + 1))
        assert len(facts) == 64
        before = undone.receipt.version - 4
        assert await bus.fetch(Person, "a") == Person("a", "1@x", 60 - before)


# ------------------------------------------------------------------------------------------------- who hears of it


LISTED = "create table listed (id text primary key, email text not null)"


def lists(*, restored: bool) -> Service:
    service = Service("lists", schema="create table heard (id text, email text)")

    @service.view("listed", schema=LISTED)
    def listed(event: Joined | EmailChanged, db: Store) -> None:
        db.execute(
            "insert into listed values (?, ?) on conflict (id) do update set email = excluded.email",
            (event.id, event.email),
        )

    if restored:

        @service.view("listed")
        def relisted(event: Restored[Person], db: Store) -> None:
            if event.record is None:
                db.execute("delete from listed where id = ?", (event.key,))
            else:
                db.execute("update listed set email = ? where id = ?", (event.record.email, event.record.id))

    @service.on
    async def hears(notice: Notice[Joined], ctx: Context) -> None: ...

    @service.on
    async def counts(event: Earned, ctx: Context) -> None: ...

    if restored:

        @service.on
        async def mends(event: Restored[Person], ctx: Context) -> None:
            email = "" if event.record is None else event.record.email
            ctx.store.execute("insert into heard values (?, ?)", (ctx.key, email))

    return service


class Pal(Copy, of=Person):
    id: str
    email: str


async def test_a_restoring_fact_is_refused_while_a_view_or_reaction_that_took_the_facts_does_not_take_it(
    each_bus: str,
) -> None:
    copies = Service("copies")
    copies.replica(Pal)

    @copies.on
    async def follow(person: Person | None) -> None: ...

    async with running(owner(), lists(restored=False), copies, bus=each_bus) as bus:
        await begun(bus)
        await bus.call(Earn("a", 1))
        await begun(bus, "b")
    # What they take is known of those that do not run, too.
    async with running(owner(), bus=each_bus) as bus:
        with pytest.raises(Refused) as refused:
            await bus.undo(Person, "a", to=0)
        assert str(refused.value).startswith(
            "the reactions of lists, taking Earned and Joined; view listed of lists, taking EmailChanged and Joined: "
            "would not be told. Let each take Restored[Person], too"
        )
        with pytest.raises(Refused, match="^view listed of lists, taking EmailChanged: would not be told"):
            await bus.undo(Person, "b", to=1)
        assert (await bus.undo(Person, "a", to=3)).facts == (Fact("Earned", {"id": "a", "points": -1}),), (
            "an inverse is"
        )
        assert (await bus.undo(Person, "a", to=2, without=["lists"])).after == Person("a", "2@x")
        assert len(await entries(bus)) == 6


async def test_who_takes_a_fact_by_an_earlier_or_later_name_counts_too(each_bus: str) -> None:
    def code(event: str, record: str, *was: str) -> tuple[Domain, type[Event], type[Record]]:
        domain = Domain("things", key="id")

        class Moved(Event, domain=domain, name=event, was=was[:1]):
            id: str
            n: int

        class Thing(Record, domain=domain, name=record, was=was[1:]):
            id: str
            n: int

        return domain, Moved, Thing

    def owner(event: str, record: str, *was: str) -> tuple[Service, type[Event], type[Record]]:
        domain, moved, thing = code(event, record, *was)
        service = Service("things", owns=domain)

        def stands(before: Any, event: Any) -> Any:
            return thing(event.id, event.n)  # type: ignore[call-arg]

        stands.__annotations__ = {"before": thing | None, "event": moved}
        service.evolve(stands)
        return service, moved, thing

    def follower(event: str, record: str, *was: str) -> Service:
        _, moved, thing = code(event, record, *was)
        service = Service("follower")

        def follow(event: Any, db: Store) -> None: ...

        follow.__annotations__ = {"event": moved, "db": Store}
        service.view("followed", schema="create table followed (id text)")(follow)
        if was:

            def restore(event: Any, db: Store) -> None: ...

            restore.__annotations__ = {"event": Restored[thing], "db": Store}  # type: ignore[valid-type]
            service.view("followed")(restore)
        return service

    old, new = ("Shifted", "Item"), ("Moved", "Thing", "Shifted", "Item")
    async with running(follower(*old), bus=each_bus):
        pass
    for key, names in (("a", old), ("b", new)):
        service, moved, thing = owner(*names)
        async with running(service, bus=each_bus) as bus:
            for n in range(3):
                event = moved(key, n)  # type: ignore[call-arg]
                await bus.facts.append(f"things/{key}", [seal(event, bus.clock.id(), Meta(n))])
            with pytest.raises(Refused, match=f"view followed of follower, taking {names[0]}: would not be told"):
                await bus.undo(thing, key, to=1)
    async with running(follower(*new), bus=each_bus):
        pass
    for key, names in (("a", old), ("b", new)):
        service, _, thing = owner(*names)
        async with running(service, bus=each_bus) as bus:
            assert (await bus.undo(thing, key, to=1)).receipt.changed


async def test_an_entry_of_what_a_service_takes_that_cannot_be_read_is_named_with_its_place(bus_url: str) -> None:
    stream = "_takes/services"
    async with connect(bus_url) as bus:
        await bus.facts.append(stream, [sealed(stream, "Takes", "1", Meta(1), b'{"service":"later","takes":7}')])
    with pytest.raises(Unreadable, match=r"position 1 \(_takes/services version 1\) does not say what a service takes"):
        async with running(owner(), bus=bus_url):
            pass


async def test_views_reactions_records_and_replicas_follow_an_undo_and_a_rebuild_does_too(each_bus: str) -> None:
    copies = Service("copies", owns=(asked := Domain("asked")))
    copies.replica(Pal)
    from cauce import Query

    class Email(Query[str], domain=asked):
        id: str

    @copies.answer
    async def email(query: Email, ctx: Context) -> str:
        found = await ctx.get(Pal, query.id)
        return "" if found is None else found.email

    async def listed(bus: Bus) -> list[tuple[Any, ...]]:
        return await bus.copies["lists"].view("listed").fetch("select id, email from listed order by id")

    async with running(owner(), lists(restored=False), bus=each_bus) as bus:
        await begun(bus)
        await begun(bus, "b")
        await bus.settled()
    async with running(owner(), lists(restored=True), copies, bus=each_bus) as bus:
        await bus.settled()
        await bus.undo(Person, "a", to=1)
        undone = await bus.undo(Person, "b", to=0)
        await bus.settled()
        assert await listed(bus) == [("a", "1@x")]
        assert await bus.ask(Email("a"), after=undone.receipt) == "1@x"
        assert await bus.ask(Email("b")) == ""
        assert await bus.record(Person, "b") is None


async def test_old_restoring_facts_are_lifted_by_the_upcasters_of_their_record() -> None:
    things = Domain("things", key="id")

    class Thing(Record, domain=things, version=2, was=("Item",)):
        id: str
        name: str

    @upcast(Thing, from_version=1)
    def named(body: dict[str, Any]) -> dict[str, Any]:
        return {"id": body["id"], "name": body["title"]}

    service = Service("things", owns=things)
    decode = fold_of(bind(service), things).schema.decode
    old = decode("things", "RestoredItem", 1, b'{"id":"1","record":{"id":"1","title":"old"},"to":4}')
    assert isinstance(old, Restored)
    assert (old.record, old.to) == (Thing("1", "old"), 4)
    gone = decode("things", "RestoredThing", 1, b'{"id":"1","record":null,"to":0}')
    assert isinstance(gone, Restored)
    assert gone.record is None
    assert encode(old) == b'{"id":"1","record":{"id":"1","name":"old"},"to":4}'
    assert "RestoredThing" not in things.messages, "nobody declared, locks or reviews it"
    with pytest.raises(Refused, match=r"lifted by those of the record in it: write @upcast\(Thing, …\)"):
        upcast(Restored[Thing], from_version=1)
    with pytest.raises(Refused, match="'RestoredThing' means"):

        class RestoredThing(Event, domain=things):
            id: str


async def test_who_could_not_read_what_an_undo_would_tell_is_refused_before_anything_is_written(each_bus: str) -> None:
    class Older(Record, domain=Domain("people", key="id"), name="Person"):
        id: str

    domain = Domain("people", key="id")

    class Now(Record, domain=domain, name="Person", version=2):
        id: str
        email: str

    class Came(Event, domain=domain, name="Joined"):
        id: str
        email: str

    service = Service("people", owns=domain)

    @service.evolve
    def came(person: Now | None, event: Came) -> Now:
        return Now(event.id, event.email)

    async with running(service, bus=each_bus) as bus, connect(each_bus) as client:
        for n in "12":
            await bus.facts.append("people/a", [seal(Came("a", n), bus.clock.id(), Meta(0))])
        with pytest.raises(Unreadable, match="Person of people is version 2, who asks knows 1: deploy the newer code"):
            await client.undo(Older, "a", to=1)
        assert len(await entries(bus)) == 2


async def test_an_event_named_as_what_restores_a_record_is_refused_before_anything_is_written(each_bus: str) -> None:
    domain = Domain("seats", key="id")

    class Seat(Record, domain=domain):
        id: str

    class RestoredSeat(Event, domain=domain):
        id: str

    with pytest.raises(Refused, match="two messages named 'RestoredSeat'"):
        async with running(Service("seats", owns=domain), bus=each_bus):
            pass
    async with connect(each_bus) as bus:
        assert await bus.facts.head() == 0


@pytest.mark.parametrize("key", ["record", "to", "key"])
async def test_a_key_that_is_named_as_a_field_of_what_restores_is_told_or_kept(key: str, bus_url: str) -> None:
    tracks = Domain("tracks", key=key)
    made: Any = type(Event)
    record = made("Track", (Record,), {"__module__": __name__, "__annotations__": {key: str, "n": int}}, domain=tracks)
    played = made("Played", (Event,), {"__module__": __name__, "__annotations__": {key: str, "n": int}}, domain=tracks)
    service = Service("tracks", owns=tracks)

    def stands(before: Any, event: Any) -> Any:
        return record(getattr(event, key), event.n)

    stands.__annotations__ = {"before": record | None, "event": played}
    service.evolve(stands)
    async with running(service, bus=bus_url) as bus:
        for n in (1, 2):
            await bus.facts.append("tracks/a", [seal(played("a", n), bus.clock.id(), Meta(n))])
        if key == "key":
            assert (await bus.undo(record, "a", to=1)).after == record("a", 1)
        else:
            with pytest.raises(Refused, match=f"the key of tracks is named {key}, as a field of Restored"):
                await bus.undo(record, "a", to=1)


def test_an_inverse_that_cannot_be_right_is_refused_by_its_name() -> None:
    def bound(function: Callable[..., Any], match: str) -> None:
        service = Service("people", owns=people)
        service.invert(function)
        with pytest.raises(Refused, match=match):
            bind(service)

    async def waits(person: Person, event: Earned) -> None: ...

    def lone(event: Earned) -> None: ...

    def wished(person: Person, command: Earn) -> None: ...

    bound(waits, "people.waits: invert is a plain function")
    bound(lone, r"invert takes \(what stands, message\)")
    bound(wished, "annotate it with an event")
    service = owner()

    @service.invert
    def second(person: Person, event: Earned) -> None: ...

    with pytest.raises(Refused, match="both unearned and second invert Earned"):
        bind(service)
    with pytest.raises(Refused, match="only an event is irreversible"):

        class Never(Command, domain=Domain("never", key="id"), irreversible=True):
            id: str

    with pytest.raises(Refused, match="name a record"):
        Restored[Earned]  # type: ignore[type-var]


@pytest.mark.parametrize("result", ["text", Joined("other", "x")])
async def test_an_inverse_that_makes_no_fact_of_the_thing_is_refused_and_nothing_is_written(
    result: Any, bus_url: str
) -> None:
    service = owner()

    @service.invert
    def wrong(person: Person, event: EmailChanged) -> Any:
        return result

    async with running(service, bus=bus_url) as bus:
        await begun(bus)
        with pytest.raises(Refused, match="wrong returned|other"):
            await bus.undo(Person, "a", steps=1)
        assert len(await entries(bus)) == 3


async def test_a_history_of_any_length_is_undone_by_one_fact_or_refused_where_inverses_are_too_many(
    bus_url: str,
) -> None:
    async with running(owner(), bus=bus_url) as bus:
        await bus.call(Join("a", "1@x"))
        for _ in range(3):
            await bus.call(Earn("a", 400))
        with pytest.raises(Refused, match="1200 facts would undo that, and at most 900"):
            await bus.undo(Person, "a", to=1)
        await bus.call(ChangeEmail("a", "2@x"))
        assert (await bus.undo(Person, "a", to=1)).after == Person("a", "1@x")


OWNER = """
import asyncio, sys
from cauce import running
from tests.test_undo import inverting

async def main():
    async with running(inverting(), bus=sys.argv[1]):
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


def inverting() -> Service:
    service = owner()

    @service.invert
    def back(person: Person, event: EmailChanged) -> EmailChanged:
        return EmailChanged(event.id, person.email)

    return service


async def test_an_undo_of_large_facts_is_told_whole_to_another_process(
    each_bus: str, program: Callable[..., subprocess.Popen[str]]
) -> None:
    """In one process the wire is a call, and carries anything; a message of NATS holds one of these and no more."""
    assert await Peer(program(OWNER, each_bus)).said() == "ready"
    large = 370_000
    async with connect(each_bus) as client:
        await client.call(Join("a", "1" * large))
        await client.call(Earn("a", 1))
        await client.call(ChangeEmail("a", "2" * large))
        await client.call(Leave("a"))
        undone = await client.undo(Person, "a", to=1)
        assert (undone.before, undone.after) == (None, Person("a", "1" * large))
        assert [each.body["record"]["email"] for each in undone.facts] == ["1" * large]
        await client.call(ChangeEmail("a", "2" * large))
        await client.call(ChangeEmail("a", "3" * large))
        dry = await client.undo(Person, "a", to=5, dry_run=True)
        wet = await client.undo(Person, "a", to=5, id="large")
        again = await client.undo(Person, "a", to=5, id="large")
        assert [each.body["email"][0] for each in wet.facts] == ["2", "1"]
        assert wet == again
        assert (wet.facts, wet.before, wet.after) == (dry.facts, dry.before, dry.after)
        assert (wet.receipt.version, wet.receipt.changed, dry.receipt.changed) == (9, True, False)


def test_the_how_to_runs() -> None:
    """Its functions are those of the shop, where they are declared as it says."""
    page = (Path(__file__).parent.parent / "docs/how-to/undo.md").read_text(encoding="utf-8")
    inverse, view = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    cards, names = Domain("giftcards", key="card_id"), dict[str, Any]()

    class GiftCard(Record, domain=cards):
        card_id: str
        left: int

    class Redeemed(Event, domain=cards):
        card_id: str
        amount: int

    class Refilled(Event, domain=cards):
        card_id: str
        amount: int

    service = Service("giftcards", owns=cards)
    names |= {"service": service, "GiftCard": GiftCard, "Redeemed": Redeemed, "Refilled": Refilled}
    exec(inverse, names)  # noqa: S102 - it is our own text
    assert names["unredeem"](GiftCard("7", 10), Redeemed("7", 5)) == Refilled("7", 5)
    assert [bound.name for bound in bind(service)] == ["unredeem"]

    queued = list[Any]()

    class Db:
        def execute(self, sql: str, values: Any) -> None:
            queued.append((sql.split()[0], values))

    names |= vars(crm) | vars(users) | {"Restored": Restored, "Store": Store, "service": Service("more")}
    names["service"].views["directory"] = crm.service.views["directory"]
    exec(view, names)  # noqa: S102 - it is our own text
    names["restored"](restored(users.User, "42", None, 0), Db())
    names["restored"](restored(users.User, "42", users.User("42", "Ana", "ana@x"), 1), Db())
    assert queued == [("delete", ("42",)), ("insert", ("42", "x"))]
    assert [bound.name for bound in bind(names["service"])] == ["restored"]


async def test_an_undo_keeps_the_rules_over_several_things_and_frees_what_it_takes_back(each_bus: str) -> None:
    service = owner()

    @service.unique
    def address(person: Person) -> str:
        return person.email

    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("a", "1@x"))
        await bus.call(ChangeEmail("a", "2@x"))
        await bus.call(Join("b", "1@x"))
        with pytest.raises(Rejected, match="'1@x' is borne by people/b already"):
            await bus.undo(Person, "a", to=1)
        await bus.undo(Person, "b", to=0)
        assert (await bus.undo(Person, "a", to=1)).after == Person("a", "1@x")
        await bus.call(Join("c", "2@x"))
