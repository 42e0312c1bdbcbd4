"""Wishes and verdicts: what `call`, `send`, `fetch`, `record`, `state` and `settled` promise to whoever uses them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import apsw
import asyncpg
import pytest

from cauce import (
    Command,
    Context,
    Domain,
    Event,
    Gone,
    IdReused,
    NoAnswer,
    NotOwner,
    OutcomeUnknown,
    Overloaded,
    Query,
    Receipt,
    Record,
    Refused,
    Rejected,
    Service,
    StorageFull,
    connect,
    replace,
    running,
)
from cauce.backends.postgres.migrations import lock_number
from cauce.backends.sqlite import writer
from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.table import Table
from cauce.backends.sqlite.turnstile import Turnstile
from cauce.bus import Bus, Cause
from cauce.codec import Entry, Meta, moment, seal
from cauce.fold import Folder
from cauce.folded import Folded
from cauce.log import Appended, Filter, Log
from cauce.records import Records
from cauce.testing import VirtualClock
from shop import users
from shop.users import RegisterUser, User
from tests.kept import forget_places
from tests.servers import Nats

counters = Domain("counters", key="name")
others = Domain("others", key="name")


class Counter(Record, domain=counters):
    name: str
    value: int
    note: str = ""


class Added(Event, domain=counters):
    name: str
    by: int
    value: int  # what the decider took to stand afterwards


class Noted(Event, domain=counters):
    name: str
    note: str


class Removed(Event, domain=counters):
    name: str


class Other(Event, domain=others):
    name: str


class Add(Command, domain=counters):
    name: str
    by: int = 1


class SetTo(Command, domain=counters):
    name: str
    value: int


class Take(Command, domain=counters):
    name: str


class Note(Command, domain=counters):
    name: str
    note: str


class Remove(Command, domain=counters):
    name: str


class Misdecide(Command, domain=counters):
    name: str
    how: str


class Undecided(Command, domain=counters):
    name: str


class TooFew(Rejected):
    """A reason of the service's own."""


service = Service("counters", owns=counters)


@service.decide
def add(counter: Counter | None, command: Add) -> Added:
    return Added(command.name, command.by, (counter.value if counter else 0) + command.by)


@service.decide
def set_to(counter: Counter | None, command: SetTo) -> Added | None:
    value = counter.value if counter else 0
    return None if value == command.value else Added(command.name, command.value - value, command.value)


@service.decide
def take(counter: Counter | None, command: Take) -> Added:
    if counter is None or counter.value < 1:
        raise TooFew("there is nothing to take")
    return Added(command.name, -1, counter.value - 1)


@service.decide
def note(counter: Counter | None, command: Note) -> list[Event]:
    return [Noted(command.name, command.note), Noted(command.name, command.note + "!")]


@service.decide
def remove(counter: Counter | None, command: Remove) -> Removed:
    return Removed(command.name)


@service.decide
def misdecide(counter: Counter | None, command: Misdecide) -> Any:
    cases: dict[str, Callable[[], Any]] = {
        "foreign": lambda: Other(command.name),
        "another thing": lambda: Removed("somebody-else"),
        "no event": lambda: [command],
        "a number": lambda: 7,
        "a text": lambda: "done",
        "a value of another type": lambda: Added(command.name, "one", 1),  # type: ignore[arg-type]
        "a value without end": lambda: Added(command.name, float("nan"), 1),  # type: ignore[arg-type]
        "an endless record": lambda: Noted(command.name, "x" * 400_000),
        "what evolve cannot fold": lambda: Added(command.name, 1, 1_000_000),
        "nothing": list,
        "a generator": lambda: (Added(command.name, 1, n) for n in (1, 2)),
    }
    return cases[command.how]()


@service.evolve
def added(counter: Counter | None, event: Added) -> Counter:
    before = counter or Counter(event.name, 0)
    assert before.value + event.by == event.value, f"decided on another state than {before}: {event}"
    return replace(before, value=event.value)


@service.evolve
def noted(counter: Counter | None, event: Noted) -> Counter:
    before = counter or Counter(event.name, 0)
    return replace(before, note=before.note + event.note)


@service.evolve
def removed(counter: Counter, event: Removed) -> None:
    return None


async def entries(log: Log, domain: str = "counters", key: str | None = None) -> list[Entry]:
    found, looked, head = list[Entry](), 0, await log.head()
    while looked < head:
        page = await log.read(after=looked)
        found += (each for each in page.entries if each.domain == domain and key in (None, each.key))
        looked = page.looked
    return found


Hold = Callable[[], contextlib.AbstractAsyncContextManager[None]]


@pytest.fixture
def nobody_writes(backend: str, each_bus: str, request: pytest.FixtureRequest) -> Hold:
    """Keeps what is appended under way: holds the turn to write, or the whole server where there are no turns."""

    @contextlib.asynccontextmanager
    async def sqlite() -> AsyncIterator[None]:
        turn = Turnstile(folder_of(Path(each_bus.removeprefix("sqlite:///"))))
        turn.enter()
        try:
            yield
        finally:
            turn.leave()
            turn.close()

    @contextlib.asynccontextmanager
    async def postgresql() -> AsyncIterator[None]:
        server, _, schema = each_bus.partition("?schema=")
        session = await asyncpg.connect(server)
        try:
            await session.execute(f"select pg_advisory_lock({lock_number(schema)})")
            yield
        finally:
            await session.close()

    @contextlib.asynccontextmanager
    async def nats() -> AsyncIterator[None]:
        server: Nats = request.getfixturevalue("nats")
        server.pause()
        try:
            yield
        finally:
            server.resume()

    holds: dict[str, Hold] = {"sqlite": sqlite, "postgresql": postgresql, "nats": nats}
    return holds[backend]


on_sqlite = pytest.mark.parametrize("backend", ["sqlite"])
"""Calls of a process are decided in the order in which they were made, so that a test knows what rests on what; and
what the commander alone decides is the same code on every backend."""


@contextlib.contextmanager
def one_commit_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next transaction that writes something finds the disk full."""
    flush, failed = Table.flush, list[bool]()

    def full(self: Table) -> None:
        if self.name == "facts" and self._rows and not failed:
            failed.append(True)
            raise apsw.FullError("database or disk is full")
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "flush", full)
        yield
    assert failed


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - it comes true in another task
            await asyncio.sleep(0.001)


def value_of(entry: Entry) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.json.decode(entry.body or b"{}")
    return found


# --------------------------------------------------------------------------------------------------------- call


async def test_a_call_returns_a_receipt_that_names_the_wish_the_thing_its_version_and_its_place(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        first = await bus.call(Add("a"))
        second = await bus.call(Note("a", "x"))
        (one, two, three) = await entries(bus.facts)
        assert (first.key, first.version, first.position, first.changed) == ("a", 1, one.position, True)
        assert (second.key, second.version, second.position, second.changed) == ("a", 3, three.position, True)
        assert first.id == one.meta.causation
        assert second.id == two.meta.causation == three.meta.causation


async def test_what_a_call_returned_for_is_read_by_whoever_opens_the_file_next(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        receipt = await bus.call(Add("a"))
        async with connect(each_bus) as other:
            (fact,) = await entries(other.facts)
            assert (fact.position, fact.version) == (receipt.position, receipt.version)


async def test_a_rejection_is_raised_with_its_reason_and_records_nothing(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        with pytest.raises(Rejected) as caught:
            await bus.call(Take("a"))
        assert caught.value.reason == "there is nothing to take"
        assert await entries(bus.facts) == []


@on_sqlite
async def test_a_wish_that_changes_nothing_says_so_and_names_what_stands(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        before = await bus.call(Add("a", 5))
        receipt = await bus.call(SetTo("a", 5))
        assert (receipt.changed, receipt.version, receipt.position) == (False, before.version, before.position)
        never = await bus.call(SetTo("b", 0))
        assert (never.changed, never.version, never.position) == (False, 0, 0)
        assert len(await entries(bus.facts)) == 1


@on_sqlite
async def test_a_wish_that_changes_nothing_names_the_place_of_a_fact_that_was_still_under_way(
    each_bus: str, nobody_writes: Hold
) -> None:
    async with running(service, bus=each_bus) as bus:
        async with nobody_writes():
            calls = [asyncio.ensure_future(bus.call(each)) for each in (Add("a", 5), SetTo("a", 5), Add("a"))]
            await asyncio.sleep(0.02)
        changed, unchanged, _ = await asyncio.gather(*calls)
        assert (unchanged.version, unchanged.position) == (changed.version, changed.position)


async def test_nobody_who_serves_is_no_answer_at_once_and_nothing_is_stored(each_bus: str) -> None:
    async with connect(each_bus) as bus:
        for ask in (
            lambda: bus.call(Add("a")),
            lambda: bus.fetch(Counter, "a"),
            lambda: bus.state(Counter, "a"),
            lambda: bus.ask(HowMany()),
        ):
            with pytest.raises(NoAnswer, match="counters"):
                await ask()
        assert [await log.head() for log in (bus.facts, bus.commands, bus.records)] == [0, 0, 0]


@on_sqlite
async def test_a_wish_that_no_function_decides_is_no_answer_and_named(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        with pytest.raises(NoAnswer, match="Undecided"):
            await bus.call(Undecided("a"))


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("foreign", NotOwner, "misdecide.*Other.*others"),
        ("another thing", Refused, "misdecide.*somebody-else"),
        ("no event", Refused, "misdecide"),
        ("a number", Refused, "misdecide.*7"),
        ("a text", Refused, "misdecide.*done"),
        ("a value of another type", Refused, "Added.*type.*by"),
        ("a value without end", Refused, "Added.*type.*by"),
        ("what evolve cannot fold", Exception, "decided on another state"),
    ],
)
async def test_what_a_decider_may_not_return_is_refused_before_anything_is_written(
    bus_url: str, how: str, error: type[Exception], words: str
) -> None:
    async with running(service, bus=bus_url) as bus:
        with pytest.raises(error, match=words):
            await bus.call(Misdecide("a", how))
        assert await entries(bus.facts) == []
        assert (await bus.call(Add("a"))).version == 1


@on_sqlite
async def test_a_decider_may_return_any_number_of_events_in_any_order(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        assert (await bus.call(Misdecide("a", "a generator"))).version == 2
        assert (await bus.call(Misdecide("a", "nothing"))).changed is False


@on_sqlite
async def test_a_fact_whose_record_could_not_be_written_is_refused_and_the_service_goes_on(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Misdecide("a", "an endless record"))
        with pytest.raises(Refused, match="Counter"):
            await bus.call(Misdecide("a", "an endless record"))
        await bus.settled()
        assert (await bus.fetch(Counter, "a")) == await bus.record(Counter, "a")
        assert (await bus.call(Add("a"))).version == 2


@on_sqlite
async def test_what_cannot_be_wished_is_refused_before_it_is_asked(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for wish in (Added("a", 1, 1), HowMany(), Counter("a", 1)):
            with pytest.raises(Refused, match=type(wish).__name__):
                await bus.call(wish)  # type: ignore[arg-type]
            with pytest.raises(Refused, match=type(wish).__name__):
                await bus.send(wish)  # type: ignore[arg-type]
        for command in (Add(""), Add("a\0"), Add(7), Add("a", "one"), Add("a", float("inf"))):  # type: ignore[arg-type]
            with pytest.raises(Refused):
                await bus.call(command)
            with pytest.raises(Refused):
                await bus.send(command)
        for more in ({"by": "joe\n"}, {"by": "\ud800"}, {"id": "\0"}, {"id": ""}, {"id": "x" * 300}):
            with pytest.raises(Refused, match=next(iter(more))):
                await bus.call(Add("a"), **more)  # type: ignore[arg-type]
            with pytest.raises(Refused, match=next(iter(more))):
                await bus.send(Add("a"), **more)  # type: ignore[arg-type]
        with pytest.raises(Refused, match="time zone"):
            await bus.send(Add("a"), expires=datetime(2030, 1, 1))  # noqa: DTZ001 - that is the mistake
        assert [await log.head() for log in (bus.commands, bus.records)] == [0, 0]
        assert await entries(bus.facts) == []


# ------------------------------------------------------------------------------------- outcome unknown, ids


async def test_a_call_whose_time_is_over_tells_the_id_by_which_the_first_acceptance_is_learnt(
    each_bus: str, nobody_writes: Hold
) -> None:
    async with running(service, bus=each_bus) as bus:
        async with nobody_writes():
            with pytest.raises(OutcomeUnknown) as unknown:
                await bus.call(Add("a"), timeout=0.05)
        assert unknown.value.id in str(unknown.value)
        receipt = await bus.call(Add("a"), id=unknown.value.id)
        again = await bus.call(Add("a"), id=unknown.value.id)
        (fact,) = await entries(bus.facts)
        assert receipt == again == Receipt(unknown.value.id, "a", 1, fact.position, True, "counters")


async def test_an_id_asked_again_while_its_append_is_under_way_is_accepted_once(
    each_bus: str, nobody_writes: Hold
) -> None:
    async with running(service, bus=each_bus) as bus:
        async with nobody_writes():
            with pytest.raises(OutcomeUnknown) as unknown:
                await bus.call(Add("a"), timeout=0.05)
            again = asyncio.ensure_future(bus.call(Add("a"), id=unknown.value.id))
            await asyncio.sleep(0.02)
            assert not again.done()
        assert (await again).version == 1
        assert len(await entries(bus.facts)) == 1


async def test_one_id_asked_for_by_many_at_once_is_accepted_once(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        receipts = await asyncio.gather(*(bus.call(Add("a"), id="the-wish") for _ in range(20)))
        assert len(set(receipts)) == 1
        assert len(await entries(bus.facts)) == 1


async def test_a_rejected_id_called_again_is_decided_anew(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        with pytest.raises(Rejected):
            await bus.call(Take("a"), id="the-wish")
        await bus.call(Add("a"))
        assert (await bus.call(Take("a"), id="the-wish")).version == 2
        assert (await bus.call(Take("a"), id="the-wish")).version == 2


async def test_an_id_that_stands_for_another_wish_is_refused(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a", 1), id="the-wish")
        for other in (Add("a", 2), SetTo("a", 1), Note("a", "x")):
            with pytest.raises(IdReused, match="the-wish"):
                await bus.call(other, id="the-wish")
        assert (await bus.call(Add("b", 2), id="the-wish")).version == 1, "the scope of an id is its thing"
        assert len(await entries(bus.facts, key="a")) == 1


async def test_the_first_acceptance_is_found_after_a_restart_and_behind_many_later_facts(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        first = await bus.call(Note("a", "x"), id="the-wish")
        for _ in range(30):
            await bus.call(Add("a"))
    async with running(service, bus=each_bus) as bus:
        assert await bus.call(Note("a", "x"), id="the-wish") == first


@on_sqlite
async def test_after_a_call_was_given_up_the_next_are_decided_on_what_it_made_of_the_thing(
    each_bus: str, nobody_writes: Hold
) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a"))
        async with nobody_writes():
            lost = asyncio.ensure_future(bus.call(Add("a", 10)))
            await asyncio.sleep(0.01)
            lost.cancel()
            more = [asyncio.ensure_future(bus.call(each)) for each in (Add("a"), Add("a"), Add("a"))]
            await asyncio.sleep(0.02)
        receipts = await asyncio.gather(*more)
        assert [receipt.version for receipt in receipts] == [3, 4, 5]
        await bus.settled()
        assert await bus.record(Counter, "a") == await bus.fetch(Counter, "a") == Counter("a", 14)
        assert (await bus.call(SetTo("a", 14))).changed is False


async def test_calls_that_are_given_up_at_any_moment_never_leave_a_thing_decided_on_another_state(
    each_bus: str,
) -> None:
    async with running(service, bus=each_bus) as bus:
        for round in range(30):
            calls = [asyncio.ensure_future(bus.call(Add("a"))) for _ in range(8)]
            for _ in range(round % 5):
                await asyncio.sleep(0)
            for each in calls[::3]:
                each.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await bus.settled()
        facts = await entries(bus.facts)
        assert [fact.version for fact in facts] == list(range(1, len(facts) + 1))
        assert [value_of(fact)["value"] for fact in facts] == list(range(1, len(facts) + 1))
        assert await bus.record(Counter, "a") == Counter("a", len(facts))


# --------------------------------------------------------------------------------------------------------- send


async def test_what_is_sent_is_decided_soon(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        id = await bus.send(Add("a"), by="joe")
        await bus.settled()
        (fact,) = await entries(bus.facts)
        assert (fact.meta.causation, fact.meta.by) == (id, "joe")


async def test_what_is_sent_while_its_owner_is_away_is_decided_in_order_when_it_is_back(each_bus: str) -> None:
    async with running(service, bus=each_bus):
        pass
    async with connect(each_bus) as client:
        ids = [await client.send(Add("a", n)) for n in range(1, 21)]
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        facts = await entries(bus.facts)
        assert [fact.meta.causation for fact in facts] == ids
        assert [value_of(fact)["by"] for fact in facts] == list(range(1, 21))


async def test_what_is_sent_before_its_owner_ever_ran_is_decided(each_bus: str) -> None:
    async with connect(each_bus) as client:
        await client.send(Add("a"))
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        assert await bus.fetch(Counter, "a") == Counter("a", 1)


async def test_the_same_id_sent_many_times_is_decided_once(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        assert set(await asyncio.gather(*(bus.send(Add("a"), id="the-wish") for _ in range(10)))) == {"the-wish"}
        await bus.settled()
        await bus.send(Add("a"), id="the-wish")
        await bus.settled()
        assert len(await entries(bus.facts)) == 1
        with pytest.raises(IdReused):
            await bus.send(Add("a", 2), id="the-wish")


async def test_a_sent_wish_is_not_fulfilled_after_it_expired_and_that_is_kept(each_bus: str) -> None:
    async with connect(each_bus) as client:
        soon = moment(client.clock.now()) + timedelta(milliseconds=20)
        await client.send(Add("a"), expires=soon)
        await client.send(Add("b"), expires=soon + timedelta(hours=1))
        while moment(client.clock.now()) <= soon:
            await client.clock.sleep(0.01)
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        assert [fact.key for fact in await entries(bus.facts)] == ["b"]
        (late,) = [each for each in await entries(bus.commands) if each.meta.verdict]
        assert (late.key, late.type, late.meta.verdict) == ("a", "Add", "expired")


async def test_what_was_rejected_when_it_was_sent_is_not_granted_when_it_is_read_again(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.send(Take("a"))
        await bus.settled()
        assert [each.meta.verdict for each in await entries(bus.commands)] == ["", "rejected: there is nothing to take"]
        await bus.call(Add("a"))
    await forget_places(each_bus, "counters", "decide counters")
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        assert len(await entries(bus.facts)) == 1


def test_what_was_accepted_in_time_is_not_called_expired_when_it_is_read_again(
    virtual: Callable[..., None], clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        async with running(service, bus=bus_url, clock=clock) as bus:
            await bus.send(Add("a"), expires=datetime(2026, 1, 1, 0, 1, tzinfo=UTC))
            await bus.settled()
        await forget_places(bus_url, "counters", "decide counters")
        clock.shift(120)
        async with running(service, bus=bus_url, clock=clock) as bus:
            await bus.settled()
            assert len(await entries(bus.facts)) == 1
            assert [each.meta.verdict for each in await entries(bus.commands)] == [""]

    virtual(main)


async def test_what_was_sent_is_decided_once_though_it_is_read_again_after_a_crash(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for n in range(10):
            await bus.send(Add(f"thing-{n % 3}"))
        await bus.settled()
    await forget_places(each_bus, "counters", "decide counters")
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        assert len(await entries(bus.facts)) == 10


async def test_sending_with_the_id_of_an_accepted_call_changes_nothing(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        receipt = await bus.call(Add("a"))
        await bus.send(Add("a"), id=receipt.id)
        await bus.settled()
        assert len(await entries(bus.facts)) == 1


@on_sqlite
async def test_another_wish_sent_with_the_id_of_an_accepted_call_changes_nothing_and_is_kept(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        receipt = await bus.call(Add("a"))
        await bus.send(Add("a", 7), id=receipt.id)
        await bus.send(Add("a", 3))
        await bus.settled()
        assert await bus.fetch(Counter, "a") == Counter("a", 4)
        (kept,) = [each for each in await entries(bus.commands) if each.meta.verdict]
        assert kept.meta.causation == receipt.id
        assert "refused" in kept.meta.verdict


async def test_a_wish_that_was_sent_and_is_called_with_its_id_is_accepted_once(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for round in range(20):
            id = await bus.send(Add("a"))
            for _ in range(round % 4):
                await asyncio.sleep(0)
            receipt = await bus.call(Add("a"), id=id)
            assert receipt.version == round + 1
        await bus.settled()
        assert len(await entries(bus.facts)) == 20


async def test_a_sent_wish_that_is_rejected_is_kept_with_the_verdict_and_holds_up_nobody(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        id = await bus.send(Take("a"), by="joe")
        await bus.send(Add("a"))
        await bus.settled()
        assert await bus.fetch(Counter, "a") == Counter("a", 1)
        (verdict,) = [each for each in await entries(bus.commands) if each.meta.verdict]
        assert (verdict.meta.verdict, verdict.meta.by) == ("rejected: there is nothing to take", "joe")
        assert verdict.meta.causation == id


async def test_a_damaged_wish_is_not_decided_but_stops_the_service_loudly(bus_url: str) -> None:
    async with connect(bus_url) as client:
        await client.send(Add("a", 5))
    flip(bus_url, "commands", b'"by":5', b'"by":7')
    with pytest.raises(Exception, match="counters/a"):
        async with running(service, bus=bus_url) as bus:
            with pytest.raises(Exception, match="counters/a"):
                await bus.settled()
            assert await entries(bus.facts) == []


# ------------------------------------------------------------------------------------- deciding ahead of the disk


async def test_many_calls_at_once_on_a_thing_that_was_not_read_yet_read_it_once(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a"))
    fold, folds = Folder.fold, list[str]()

    async def counted(self: Folder, facts: Log, key: str, **at: Any) -> Folded:
        folds.append(key)
        found: Folded = await fold(self, facts, key, **at)
        return found

    async with running(service, bus=each_bus) as bus:
        monkeypatch.setattr(Folder, "fold", counted)
        receipts = await asyncio.gather(*(bus.call(Add("a")) for _ in range(300)))
        assert sorted(receipt.version for receipt in receipts) == list(range(2, 302))
        assert folds == ["a"]


async def test_200_concurrent_calls_on_one_thing_end_consistent_and_without_a_gap(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        receipts = await asyncio.gather(*(bus.call(Add("a")) for _ in range(200)))
        assert sorted(receipt.version for receipt in receipts) == list(range(1, 201))
        facts = await entries(bus.facts)
        assert [(fact.version, value_of(fact)["value"]) for fact in facts] == [(n, n) for n in range(1, 201)]
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 200)


@on_sqlite
async def test_a_verdict_that_rests_on_a_fact_under_way_is_not_shown_before_that_is_committed(
    each_bus: str, nobody_writes: Hold
) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a"))
        async with nobody_writes():
            taken = asyncio.ensure_future(bus.call(Take("a")))
            rejected = asyncio.ensure_future(bus.call(Take("a")))
            unchanged = asyncio.ensure_future(bus.call(SetTo("a", 0)))
            elsewhere = asyncio.ensure_future(bus.call(Take("b")))
            await asyncio.sleep(0.05)
            assert [each.done() for each in (taken, rejected, unchanged)] == [False] * 3
            assert elsewhere.done(), "what rests on nothing new is shown at once"
        assert (await taken).version == 2
        assert (await unchanged).changed is False
        for each in (rejected, elsewhere):
            with pytest.raises(Rejected):
                await each


@on_sqlite
async def test_when_a_commit_fails_what_was_decided_ahead_is_decided_again(
    each_bus: str, nobody_writes: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a", 5))
        with one_commit_fails(monkeypatch):
            async with nobody_writes():
                lost = asyncio.ensure_future(bus.call(Add("a", -5)))
                ahead = asyncio.ensure_future(bus.call(Add("a", 1)))
                unchanged = asyncio.ensure_future(bus.call(SetTo("a", 1)))
                rejected = asyncio.ensure_future(bus.call(Take("b")))
                await asyncio.sleep(0.02)
            results = await asyncio.gather(lost, ahead, unchanged, rejected, return_exceptions=True)
        assert [type(each) for each in results] == [StorageFull, StorageFull, Receipt, Rejected]
        assert isinstance(results[2], Receipt)
        assert results[2].changed, "it rested on facts that never were"
        assert await bus.fetch(Counter, "a") == Counter("a", 1)
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 1)
        assert (await bus.call(Take("a"))).version == 3


@on_sqlite
async def test_a_rejection_that_rested_on_a_failed_commit_becomes_an_acceptance(
    each_bus: str, nobody_writes: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a"))
        with one_commit_fails(monkeypatch):
            async with nobody_writes():
                lost = asyncio.ensure_future(bus.call(Take("a")))
                second = asyncio.ensure_future(bus.call(Take("a")))
                unlike = asyncio.ensure_future(bus.call(Take("a")))
                await asyncio.sleep(0.02)
            results = await asyncio.gather(lost, second, unlike, return_exceptions=True)
        assert [type(each) for each in results] == [StorageFull, Receipt, Rejected]


@on_sqlite
async def test_too_many_at_once_are_told_so_and_those_accepted_are_whole(
    each_bus: str, nobody_writes: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MOST_WAITING", 20)
    async with running(service, bus=each_bus) as bus:
        async with nobody_writes():
            calls = [asyncio.ensure_future(bus.call(Add("a"))) for _ in range(60)]
            await asyncio.sleep(0.02)
        results = await asyncio.gather(*calls, return_exceptions=True)
        accepted = [each for each in results if isinstance(each, Receipt)]
        assert {type(each) for each in results} == {Receipt, Overloaded}
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", len(accepted))
        assert len(await entries(bus.facts)) == len(accepted)


def waiting_service(seen: list[int], wait: Callable[[Context], Any]) -> Service:
    """The counters, with an `add` that waits before it decides."""
    slow = Service("counters", owns=counters)
    slow.parts += [part for part in service.parts if part.name != "add"]

    async def add(counter: Counter | None, command: Add, ctx: Context) -> Added:
        value = counter.value if counter else 0
        seen.append(value)
        await wait(ctx)
        return Added(command.name, command.by, value + command.by)

    slow.decide(add)
    return slow


@on_sqlite
async def test_calls_on_one_thing_whose_decider_waits_are_decided_one_after_the_other(each_bus: str) -> None:
    seen, at_once, most = list[int](), 0, 0

    async def wait(ctx: Context) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.005)
        at_once -= 1

    async with running(waiting_service(seen, wait), bus=each_bus) as bus:
        receipts = await asyncio.gather(*(bus.call(Add("a")) for _ in range(40)))
        assert sorted(receipt.version for receipt in receipts) == list(range(1, 41))
        assert (seen, most) == (list(range(40)), 1)
        await asyncio.gather(*(bus.call(Add(f"other{n}")) for n in range(5)))
        assert most > 1, "other things are decided side by side"


@on_sqlite
async def test_a_decider_that_waits_has_its_turn_among_many_that_do_not(each_bus: str) -> None:
    seen, enough = list[int](), False

    async def wait(ctx: Context) -> None:
        await asyncio.sleep(0.02)

    async def keep_busy(bus: Bus) -> None:
        while not enough:
            await bus.call(SetTo("a", len(seen) % 2 + 1))
            await bus.call(SetTo("a", 7))

    async with running(waiting_service(seen, wait), bus=each_bus) as bus:
        others = [asyncio.ensure_future(keep_busy(bus)) for _ in range(3)]
        await asyncio.gather(*(bus.call(Add("a")) for _ in range(3)))
        enough = True
        await asyncio.gather(*others)


@on_sqlite
async def test_a_decider_may_wait_for_another_wish_about_the_same_thing(each_bus: str) -> None:
    seen, inner = list[int](), list[Receipt]()

    async def wait(ctx: Context) -> None:
        if len(seen) == 1:
            inner.append(await ctx.call(Add("a", 10), timeout=5))

    async with running(waiting_service(seen, wait), bus=each_bus) as bus:
        receipt = await bus.call(Add("a", 1))
        assert ([each.version for each in inner], receipt.version) == ([1], 2)
        assert seen == [0, 0, 10]


@on_sqlite
async def test_a_decider_that_waits_is_asked_again_when_the_thing_has_changed_meanwhile(each_bus: str) -> None:
    slow = Service("counters", owns=counters)
    slow.parts += [part for part in service.parts if part.name != "add"]
    seen, gate = list[int](), asyncio.Event()

    async def add(counter: Counter | None, command: Add, ctx: Context) -> Added:
        value = counter.value if counter else 0
        seen.append(value)
        await gate.wait()
        return Added(command.name, command.by, value + command.by)

    slow.decide(add)
    async with running(slow, bus=each_bus) as bus:
        waiting = asyncio.ensure_future(bus.call(Add("a")))
        await until(lambda: seen == [0])
        await bus.call(SetTo("a", 10))
        gate.set()
        assert (await waiting).version == 2
        assert seen == [0, 10]


# ------------------------------------------------------------------------------------------------------ records


async def test_the_record_is_written_behind_and_read_without_the_owner(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a", 3))
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 3)
    async with connect(each_bus) as client:
        assert await client.record(Counter, "a") == Counter("a", 3)
        assert await client.record(Counter, "never") is None


async def test_a_burst_on_one_thing_costs_few_records(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for _ in range(5):
            await asyncio.gather(*(bus.call(Add("a")) for _ in range(100)))
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 500)
        assert await bus.records.head() < 50


async def test_no_mark_passes_a_record_that_another_flush_is_still_writing(clock: VirtualClock) -> None:
    puts = list[tuple[str, asyncio.Future[Any]]]()

    class Slow:
        def put(self, stream: str, version: int, entry: Entry) -> asyncio.Future[Any]:
            puts.append((stream, asyncio.get_running_loop().create_future()))
            return puts[-1][1]

    records = Records(cast("Log", Slow()), "counters", clock)
    records.changed("a", Folded(Counter("a", 1), 1, 1, clock.id()))
    one = asyncio.ensure_future(records.flush())
    await asyncio.sleep(0)
    records.changed("a", Folded(Counter("a", 2), 2, 2, clock.id()))
    two = asyncio.ensure_future(records.flush())
    written = 0
    while not (one.done() and two.done()):
        await asyncio.sleep(0)
        # The newest first: the disk may well take what came later before what came earlier.
        waiting = [(stream, put) for stream, put in puts if not put.done()]
        if waiting:
            stream, put = waiting[-1]
            assert not stream.startswith("_written") or len(waiting) == 1, "a mark passes a record"
            put.set_result(Appended(1, 1))
            written += 1
    assert [stream for stream, _ in puts] == ["counters/a", "_written/counters/3"] * 2
    assert written == 4


async def test_a_thing_left_without_its_record_gets_it_at_the_next_start(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a"))
        await bus.call(Add("b"))
        await bus.settled()
    async with connect(each_bus) as client:
        entry = seal(Added("a", 1, 2), "0190-by-hand", Meta(client.clock.now()))
        await client.facts.append("counters/a", [entry])
    folded = list[str]()
    watched = Service("counters", owns=counters)
    watched.parts += [part for part in service.parts if part.name != "added"]

    @watched.evolve
    def watching(counter: Counter | None, event: Added) -> Counter:
        folded.append(event.name)
        return added(counter, event)

    async with running(watched, bus=each_bus) as bus:
        assert await bus.record(Counter, "a") == Counter("a", 2), "written before anything is answered"
        assert folded == ["a", "a"], "whose record is written is not folded again"
    folded.clear()
    async with running(watched, bus=each_bus):
        assert folded == []


def test_a_kill_between_the_fact_and_its_record_loses_neither(each_bus: str, program: Callable[..., Any]) -> None:
    process = program(
        """
import asyncio, sys
from cauce import running
from cauce.records import Records
from shop.users import RegisterUser, service

async def never(self):
    await asyncio.Event().wait()

Records.run = never

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        for n in range(20):
            receipt = await bus.call(RegisterUser(str(n), "Ana", "ana@example.org"), by="joe")
            print(receipt.id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
""",
        each_bus,
    )
    ids = [process.stdout.readline().strip() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.wait()

    async def main() -> None:
        async with connect(each_bus) as client:
            facts = await entries(client.facts, "users")
            assert [fact.meta.causation for fact in facts] == ids
            assert await client.records.head() == 0
        async with running(users.service, bus=each_bus) as bus:
            for n in range(20):
                assert await bus.record(User, str(n)) == User(str(n), "Ana", "ana@example.org")
            for n, id in enumerate(ids):
                receipt = await bus.call(RegisterUser(str(n), "Ana", "ana@example.org"), id=id)
                assert (receipt.version, receipt.changed) == (1, True)

    asyncio.run(main())


def test_records_wait_out_a_full_disk(
    virtual: Callable[..., None], clock: VirtualClock, bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, full = Table.flush, [True]

    def sometimes(self: Table) -> None:
        if self.name == "records" and self._rows and full[0]:
            raise apsw.FullError("database or disk is full")
        flush(self)

    async def main() -> None:
        async with running(service, bus=bus_url, clock=clock) as bus:
            monkeypatch.setattr(Table, "flush", sometimes)
            await bus.call(Add("a"))
            await clock.sleep(3)
            assert await bus.record(Counter, "a") is None
            assert not bus.failed.done()
            full[0] = False
            await bus.settled()
            assert await bus.record(Counter, "a") == Counter("a", 1)

    virtual(main)


async def test_what_is_gone_is_told_as_gone_and_kept_as_a_tombstone(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        await bus.call(Add("a"))
        await bus.settled()
        await bus.call(Remove("a"))
        await bus.settled()
        with pytest.raises(Gone, match="counters/a"):
            await bus.fetch(Counter, "a")
        with pytest.raises(Gone, match="counters/never"):
            await bus.fetch(Counter, "never")
        assert await bus.record(Counter, "a") is None
        assert await bus.state(Counter, "a") is None
        assert await bus.state(Counter, "a", at=1) == Counter("a", 1)
        (tombstone,) = (await bus.records.read(Filter("counters/a"))).entries
        assert (tombstone.version, tombstone.body) == (2, b"")
        await bus.call(Add("a", 7))
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 7)


# -------------------------------------------------------------------------------------------------------- state


@on_sqlite
async def test_how_a_thing_stood_at_a_version_or_a_moment_is_folded_from_its_facts(each_bus: str) -> None:
    base = 1_700_000_000_000_000
    # Two at the same microsecond, then a clock that was set back, then forward again.
    times = [base, base + 10, base + 10, base + 5, base + 20]
    async with connect(each_bus) as client:
        for n, time in enumerate(times, 1):
            await client.facts.append("counters/a", [seal(Added("a", 1, n), f"id-{n}", Meta(time))])
    async with running(service, bus=each_bus) as bus:

        async def at(when: int | datetime) -> int:
            found = await bus.state(Counter, "a", at=when)
            return 0 if found is None else found.value

        def moment(offset: int) -> datetime:
            return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=base + offset)

        assert [await at(version) for version in (0, 1, 3, 5)] == [0, 1, 3, 5]
        assert [await at(moment(offset)) for offset in (-1, 0, 9, 10, 19, 20, 99)] == [0, 1, 1, 4, 4, 5, 5]
        assert await at(moment(5)) == 1, "the longest beginning before the first fact that is later"
        assert await bus.state(Counter, "a") == Counter("a", 5)
        with pytest.raises(Refused, match="time zone"):
            await bus.state(Counter, "a", at=datetime(2030, 1, 1))  # noqa: DTZ001 - that is the mistake


async def test_fetch_is_at_least_as_new_as_what_was_acknowledged(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for n in range(1, 20):
            await bus.call(Add("a"))
            assert await bus.fetch(Counter, "a") == Counter("a", n)


# ----------------------------------------------------------------------------------------------- what is kept


async def test_a_fact_tells_what_was_wished_by_whom_and_because_of_what(each_bus: str) -> None:
    seen = list[Entry]()
    watching = Service("watching")

    async with running(service, watching, bus=each_bus) as bus:
        cause = Cause("cause-1", "began-1", "", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "vendor=1")
        receipt = await bus.call(Note("a", "x"), by="crm:joe", cause=cause)
        plain = await bus.call(Add("b"))
        first, second, third = await entries(bus.facts)
        for fact in (first, second):
            meta = fact.meta
            assert (meta.causation, fact.correlation, meta.by) == (receipt.id, "began-1", "crm:joe")
            assert (meta.trace, meta.tracestate) == (cause.trace, cause.tracestate)
        assert first.wished is not None
        assert (first.wished.type, bytes(first.wished.body)) == ("Note", b'{"name":"a","note":"x"}')
        assert second.wish is None
        assert (third.meta.causation, third.correlation, third.meta.by) == (plain.id, plain.id, "")
    assert seen == []


async def test_wishes_in_vain_are_kept_with_their_verdict_and_run_never_again(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        with pytest.raises(Rejected):
            await bus.call(Take("a"), by="joe")
        unchanged = await bus.call(SetTo("a", 0), by="eve")
        # Nobody waits for what is kept of them, but the log keeps the order of what it is told.
        await bus.call(Add("a"))
        kept = await entries(bus.commands)
        assert [(each.type, each.meta.by, each.meta.verdict) for each in kept] == [
            ("Take", "joe", "rejected: there is nothing to take"),
            ("SetTo", "eve", "unchanged"),
        ]
        assert kept[1].meta.causation == unchanged.id
        assert value_of(kept[0]) == {"name": "a"}
    await forget_places(each_bus, "counters", "decide counters")
    async with running(service, bus=each_bus) as bus:
        await bus.settled()
        assert len(await entries(bus.facts)) == 1
        assert len(await entries(bus.commands)) == 2


# ---------------------------------------------------------------------------------------------------------- ask


class HowMany(Query[int], domain=counters):
    pass


class Wrong(Query[int], domain=counters):
    pass


class Fails(Query[int], domain=counters):
    how: str


async def test_a_question_is_answered_by_the_owner_and_an_answer_of_another_type_is_told(each_bus: str) -> None:
    answering = Service("counters", owns=counters)
    answering.parts += service.parts

    @answering.answer
    async def how_many(query: HowMany, ctx: Context) -> int:
        return 7 if ctx.position == 0 else 0

    @answering.answer
    def wrong(query: Wrong) -> int:
        return "many"  # type: ignore[return-value]

    @answering.answer
    async def fails(query: Fails) -> int:
        if query.how == "unavailable":
            raise OutcomeUnknown("x", "something asked of another")
        raise ZeroDivisionError(query.how)

    async with running(answering, bus=each_bus) as bus:
        assert await bus.ask(HowMany()) == 7
        with pytest.raises(Exception, match="Wrong"):
            await bus.ask(Wrong())
        with pytest.raises(Exception, match="ZeroDivisionError"):
            await bus.ask(Fails("division"))
        from cauce import Unavailable

        with pytest.raises(Unavailable, match="something asked of another"):
            await bus.ask(Fails("unavailable"))
    async with running(service, bus=each_bus) as bus:
        with pytest.raises(NoAnswer, match="HowMany"):
            await bus.ask(HowMany())


async def test_an_answer_that_never_comes_is_no_answer_when_the_time_is_over(each_bus: str) -> None:
    answering = Service("counters", owns=counters)

    @answering.answer
    async def how_many(query: HowMany) -> int:
        await asyncio.Event().wait()
        return 7

    async with running(answering, bus=each_bus) as bus:
        began = bus.clock.monotonic()
        with pytest.raises(NoAnswer, match="HowMany"):
            await bus.ask(HowMany(), timeout=0.3)
        assert 0.3 <= bus.clock.monotonic() - began < 5


# --------------------------------------------------------------------------------------------------------- tools


def flip(url: str, log: str, before: bytes, after: bytes) -> None:
    """Damage in the file: other bytes than were written."""
    connection = apsw.Connection(url.removeprefix("sqlite:///"))
    rows: list[Any] = connection.execute(f"select position, body from {log}").fetchall()
    for position, body in rows:
        if before in body:
            connection.execute(f"update {log} set body = ? where position = ?", (body.replace(before, after), position))
    connection.close()
