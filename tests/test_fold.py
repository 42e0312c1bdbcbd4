"""Folding: what stands is what `evolve` makes of the facts. A written record saves work, and never decides."""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import asyncpg
import nats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cauce import (
    Command,
    Context,
    Damaged,
    Domain,
    Event,
    Inconsistent,
    Overloaded,
    Record,
    Refused,
    Service,
    Unreadable,
    connect,
    replace,
    running,
)
from cauce.accept import slot_of
from cauce.backends.sqlite.file import folder_of
from cauce.bus import Bus
from cauce.codec import Meta, seal, sealed
from cauce.commander import Commander
from cauce.fold import Folder
from cauce.folded import Folded
from cauce.folding import fold_of
from cauce.log import Filter
from cauce.records import Records
from cauce.schema import encode
from cauce.service import bind
from cauce.testing import given as given_facts

counters = Domain("counters", key="name")


class Counter(Record, domain=counters):
    name: str
    value: int


class Added(Event, domain=counters):
    name: str
    by: int


class Doubled(Event, domain=counters):
    name: str


class Removed(Event, domain=counters):
    name: str


class Seen(Event, domain=counters):
    name: str


class Add(Command, domain=counters):
    name: str
    by: int


class Double(Command, domain=counters):
    name: str


service = Service("counters", owns=counters)
evolved = list[str]()


@service.evolve
def added(counter: Counter | None, event: Added) -> Counter:
    evolved.append(event.name)
    return Counter(event.name, (counter.value if counter else 0) + event.by)


@service.evolve
def doubled(counter: Counter, event: Doubled) -> Counter:
    evolved.append(event.name)
    return replace(counter, value=counter.value * 2 % 1_000_003)


@service.evolve
def removed(counter: Counter | None, event: Removed) -> None:
    evolved.append(event.name)


@service.decide
def add(counter: Counter | None, command: Add) -> Added:
    return Added(command.name, command.by)


@service.decide
def double(counter: Counter | None, command: Double) -> Doubled:
    return Doubled(command.name)


@pytest.fixture(autouse=True)
def records_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a domain of long streams; short ones are read before their record is looked for."""
    monkeypatch.setattr("cauce.fold._SHORT", 0)
    evolved.clear()


class Things(NamedTuple):
    """A bus, and what folds on it."""

    bus: Bus
    folder: Folder
    records: Records

    async def happened(self, *events: Event) -> None:
        for event in events:
            entry = seal(event, self.bus.clock.id(), Meta(self.bus.clock.now()))
            await self.bus.facts.append(entry.stream, [entry])

    async def fold(self, key: str, **at: Any) -> Folded:
        return await self.folder.fold(self.bus.facts, key, records=self.bus.records, **at)

    async def from_the_first(self, key: str, **at: Any) -> Folded:
        return await self.folder.fold(self.bus.facts, key, **at)

    async def kept(self, key: str) -> Folded:
        """Write the record of a thing as it stands."""
        folded = await self.from_the_first(key)
        self.records.changed(key, folded)
        await self.records.flush()
        return folded

    async def put(self, key: str, version: int, state: Record | None, id: str, meta: Meta) -> None:
        """Write a record by hand."""
        body = b"" if state is None else encode(state)
        stream = f"counters/{key}"
        await self.bus.records.put(stream, version, sealed(stream, "Counter" if state else "Gone", id, meta, body))


@asynccontextmanager
async def things(url: str) -> AsyncIterator[Things]:
    async with connect(url) as bus:
        folder = fold_of(bind(service), counters)
        yield Things(bus, folder, Records(bus.records, "counters", bus.clock, folder.fingerprint))


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def sql(url: str, statement: str, *values: Any) -> list[Any]:
    """Do something to a file that nobody has open."""
    found = apsw.Connection(str(path_of(url)))
    rows = found.execute(statement, values).fetchall()
    found.close()
    return rows


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if each.name == "cauce" and each.levelno >= logging.WARNING]


# ------------------------------------------------------------------------------------------------ records as snapshots


async def test_a_fold_goes_on_from_the_record_and_reads_only_what_came_after(each_bus: str) -> None:
    async with things(each_bus) as on:
        await on.happened(*(Added("a", 1) for _ in range(5)))
        await on.kept("a")
        await on.happened(Added("a", 10), Added("b", 1))
        evolved.clear()
        folded = await on.fold("a")
        assert evolved == ["a"]
        assert folded == await on.from_the_first("a")
        assert (folded.state, folded.version) == (Counter("a", 15), 6)


async def test_what_was_deleted_is_a_snapshot_too(each_bus: str) -> None:
    async with things(each_bus) as on:
        await on.happened(Added("a", 1), Removed("a"))
        await on.kept("a")
        evolved.clear()
        gone = await on.fold("a")
        assert (gone.state, gone.version, evolved) == (None, 2, [])
        await on.happened(Added("a", 7))
        assert (await on.fold("a")).state == Counter("a", 7)
        assert evolved == ["a"]


async def test_whoever_decides_fetches_or_looks_back_goes_on_from_the_record(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        for _ in range(3):
            await bus.call(Add("a", 1))
        await bus.settled()
    async with running(service, bus=each_bus) as bus:
        evolved.clear()
        assert await bus.fetch(Counter, "a") == Counter("a", 3)
        assert await bus.state(Counter, "a", at=3) == Counter("a", 3)
        assert evolved == []
        assert (await bus.call(Add("a", 1))).version == 4
        assert evolved == ["a"]
        assert await bus.state(Counter, "a", at=2) == Counter("a", 2)


async def test_of_short_streams_no_record_is_read_and_of_long_ones_not_their_beginning(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.fold._SHORT", 4)
    async with things(each_bus) as on:
        for key, length in (("short", 3), ("long", 40)):
            await on.happened(*(Added(key, 1) for _ in range(length)))
            await on.kept(key)
        # A new one, which has seen nothing yet.
        fresh = on._replace(folder=fold_of(bind(service), counters))
        evolved.clear()
        assert (await fresh.fold("short")).version == 3
        assert evolved == ["short"] * 3
        evolved.clear()
        assert (await fresh.fold("long")).state == Counter("long", 40)
        assert evolved == []
        # It is now taken for a domain of long ones.
        assert (await fresh.fold("short")).state == Counter("short", 3)
        assert evolved == []


async def test_a_look_back_before_the_record_folds_from_the_first_fact(bus_url: str) -> None:
    async with things(bus_url) as on:
        await on.happened(*(Added("a", 1) for _ in range(5)))
        await on.kept("a")
        for version in range(7):
            assert await on.fold("a", at_version=version) == await on.from_the_first("a", at_version=version)
        evolved.clear()
        assert (await on.fold("a", at_version=4)).version == 4
        assert len(evolved) == 4


async def test_at_a_moment_positions_rule_whatever_the_clock_said(bus_url: str) -> None:
    """Set back by two hours, it gives the second fact an earlier time than the first one."""
    async with things(bus_url) as on:
        noon, hour = int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp() * 1e6), 3_600_000_000
        for id, time in (("one", noon), ("two", noon - 2 * hour), ("three", noon + hour)):
            entry = seal(Added("a", 1), id, Meta(time))
            await on.bus.facts.append(entry.stream, [entry])
        await on.kept("a")
        assert [
            (await on.fold("a", at_time=noon + more)).version for more in (-3 * hour, -hour, 0, 1, hour - 1, hour)
        ] == [0, 0, 2, 2, 2, 3]
    async with running(service, bus=bus_url) as bus:
        assert await bus.state(Counter, "a", at=datetime(2026, 1, 1, 11, tzinfo=UTC)) is None
        assert await bus.state(Counter, "a", at=datetime(2026, 1, 1, 12, 30, tzinfo=UTC)) == Counter("a", 2)


# ------------------------------------------------------------------------------------------------------ unsound ones

UNSOUND = {
    "ahead of its stream": "was made by version 9 at position",
    "of another fact of the same version": "was made by version 3 at position",
    "of another position": "was made by version 3 at position",
    "made by other code": "records of counters were made by other evolve functions",
    "made before records said by what": "records of counters were made by other evolve functions",
}


@pytest.mark.parametrize("what", UNSOUND)
async def test_a_record_is_ignored_with_one_warning_that_is(
    what: str, each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with things(each_bus) as on:
        await on.happened(*(Added("a", 1) for _ in range(3)), Added("b", 1))
        true = await on.from_the_first("a")
        fold, wrong = on.folder.fingerprint, Counter("a", 666)
        version, id, meta = {
            "ahead of its stream": (9, "none", Meta(1, upto=true.position + 100, fold=fold)),
            "of another fact of the same version": (3, "none", Meta(1, upto=true.position, fold=fold)),
            "of another position": (3, true.id, Meta(1, upto=true.position - 1, fold=fold)),
            "made by other code": (3, true.id, Meta(1, upto=true.position, fold="0" * 16)),
            "made before records said by what": (3, true.id, Meta(1, upto=true.position)),
        }[what]
        await on.put("a", version, wrong, id, meta)
        for _ in range(3):
            assert await on.fold("a") == true
        (warning,) = warnings(caplog)
        assert UNSOUND[what] in warning
        assert "counters/a" in warning


async def test_a_flipped_bit_anywhere_in_a_record_never_reaches_what_stands(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with things(bus_url) as on:
        await on.happened(*(Added("a", 1) for _ in range(3)))
        await on.kept("a")
    ((position, meta, body),) = sql(
        bus_url,
        "select r.position, r.meta, r.body from records r join streams s on s.id = r.stream where s.name = 'counters/a'",
    )
    chance = random.Random(5)
    for _ in range(30):
        column, value = chance.choice([("body", body), ("meta", meta)])
        at = chance.randrange(len(value) * 8)
        flipped = bytearray(value)
        flipped[at // 8] ^= 1 << at % 8
        sql(bus_url, f"update records set {column} = ? where position = ?", bytes(flipped), position)
        async with things(bus_url) as on:
            caplog.clear()
            assert (await on.fold("a")).state == Counter("a", 3)
            (warning,) = warnings(caplog)
            assert "the record of counters/a is ignored" in warning, (column, at)
        sql(bus_url, f"update records set {column} = ? where position = ?", value, position)


async def flip(url: str, bit: int) -> None:
    """Flip a bit of the body of the record of counters/a, where its backend keeps it."""

    def flipped(body: bytes) -> bytes:
        changed = bytearray(body)
        changed[bit // 8 % len(body)] ^= 1 << bit % 8
        return bytes(changed)

    if url.startswith("sqlite"):
        what = "from records r join streams s on s.id = r.stream where s.name = 'counters/a'"
        ((position, body),) = sql(url, f"select r.position, r.body {what}")
        sql(url, "update records set body = ? where position = ?", flipped(body), position)
    elif url.startswith("postgresql"):
        server, _, schema = url.partition("?schema=")
        connection = await asyncpg.connect(server)
        where = f"{schema}.records where domain = 'counters' and key = 'a'"
        body = await connection.fetchval(f"select body from {where}")
        await connection.execute(f"update {where.replace(' where', ' set body = $1 where')}", flipped(body))
        await connection.close()
    else:
        server, _, name = url.partition("?")[0].rpartition("/")
        client = await nats.connect(server)
        js = client.jetstream()
        message = await js.get_last_msg(f"{name}_records", f"{name}.records.counters.*.a")
        headers = {name: value for name, value in (message.headers or {}).items() if not name.startswith("Nats-")}
        await js.publish(message.subject or "", flipped(message.data or b""), headers=headers)
        await client.close()


async def test_a_record_with_a_flipped_bit_is_no_snapshot_and_is_not_given_out(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(service, bus=each_bus) as bus:
        for _ in range(3):
            await bus.call(Add("a", 1))
        await bus.settled()
    await flip(each_bus, bit=random.Random(5).randrange(100))
    async with running(service, bus=each_bus) as bus:
        with pytest.raises(Damaged, match="counters/a version 3.* is not what was written"):
            await bus.record(Counter, "a")
        evolved.clear()
        assert await bus.state(Counter, "a", at=3) == Counter("a", 3)
        assert evolved == ["a"] * 3
        assert any("the record of counters/a is ignored" in each for each in warnings(caplog))
        # The next one takes its place.
        assert (await bus.call(Double("a"))).version == 4
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 6)


async def test_a_log_that_lost_its_end_is_folded_as_far_as_it_goes(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with things(bus_url) as on:
        await on.happened(*(Added("a", 1) for _ in range(5)))
        await on.kept("a")
    sql(bus_url, "delete from facts where position > 3")
    (folder_of(path_of(bus_url)) / "witness").unlink()
    async with things(bus_url) as on:
        assert await on.fold("a") == await on.from_the_first("a")
        assert (await on.fold("a")).version == 3
        assert "which is not there" in warnings(caplog)[-1]
        # Other facts come to stand where those were that the record speaks of.
        await on.happened(Added("a", 100), Added("a", 100))
        assert (await on.fold("a")).state == Counter("a", 203)


async def test_a_commander_decides_on_what_the_facts_say_whatever_its_record_says(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with things(each_bus) as on:
        await on.happened(*(Added("a", 1) for _ in range(3)))
        await on.put("a", 9, Counter("a", 666), "none", Meta(1, upto=9_000, fold=on.folder.fingerprint))
    async with running(service, bus=each_bus) as bus:
        assert (await bus.call(Double("a"))).version == 4
        assert await bus.fetch(Counter, "a") == Counter("a", 6)
    assert any("counters/a is ignored" in each for each in warnings(caplog))


# -------------------------------------------------------------------------------------- any history, on each backend


async def folds_the_same(on: Things, key: str, steps: str) -> None:
    """One step after the other: "+*-?" are facts, "." writes the record, and "x" one that is unsound."""
    version, stands = 0, False
    for number, step in enumerate(steps):
        if step == "+":
            await on.happened(Added(key, number))
        elif step == "*" and stands:
            await on.happened(Doubled(key))
        elif step == "-":
            await on.happened(Removed(key))
        elif step == "?":
            await on.happened(Seen(key))
        elif step == ".":
            await on.kept(key)
            continue
        elif step == "x" and version:
            await on.put(key, version, Counter(key, -1), "none", Meta(1, upto=number, fold=on.folder.fingerprint))
            continue
        else:
            continue
        version, stands = version + 1, stands or step == "+" if step != "-" else False
        assert await on.fold(key) == await on.from_the_first(key)
    for at in range(version + 2):
        assert await on.fold(key, at_version=at) == await on.from_the_first(key, at_version=at)


@pytest.mark.parametrize("short", [0, 3])
def test_with_records_at_any_place_a_fold_is_what_it_is_from_the_first_fact(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.fold._SHORT", short)
    numbers = iter(range(1_000_000))
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        context = things(f"sqlite:///{folder}/bus.db")
        on = runner.run(context.__aenter__())

        @settings(max_examples=50, deadline=None, database=None, derandomize=True)
        @given(st.text("+++*-?.x", max_size=14))
        def check(steps: str) -> None:
            runner.run(folds_the_same(on, f"k{next(numbers)}", steps))

        try:
            check()
        finally:
            runner.run(context.__aexit__(None, None, None))


async def test_so_it_is_on_each_backend(each_bus: str) -> None:
    async with things(each_bus) as on:
        for number, steps in enumerate(("+.+*.-.+", "x+x+.x*", ".?+.-?.", "+-.-+.++*.*", "++x-x.+?")):
            await folds_the_same(on, f"k{number}", steps)


# ------------------------------------------------------------------------------------------- what adds to nothing


async def test_a_fact_that_adds_to_a_record_where_none_stands_is_inconsistent(bus_url: str) -> None:
    async with things(bus_url) as on:
        await on.happened(Seen("a"), Doubled("a"))
        with pytest.raises(Inconsistent, match="counters/a version 2 is Doubled, which doubled adds to a record"):
            await on.fold("a")
        await on.happened(Added("b", 1), Removed("b"), Doubled("b"))
        with pytest.raises(Inconsistent, match="counters/b version 3 is Doubled"):
            await on.fold("b")
        assert evolved == ["b", "b"], "what cannot be is not called"
        assert (await on.fold("b", at_version=2)).version == 2


async def test_a_thing_that_began_with_what_adds_to_nothing_is_named_to_whoever_asks_and_no_other_suffers(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with things(each_bus) as on:
        await on.happened(Doubled("a"), Added("b", 1), Removed("b"), Doubled("b"), Added("c", 1))
    async with running(service, bus=each_bus) as bus:
        for key, version in (("a", 1), ("b", 3)):
            named = f"counters/{key} version {version} is Doubled, which doubled adds to a record, but none stands"
            with pytest.raises(Inconsistent, match=named):
                await bus.call(Add(key, 1))
            with pytest.raises(Inconsistent, match=named):
                await bus.fetch(Counter, key)
            for at in (version, datetime(2100, 1, 1, tzinfo=UTC)):
                with pytest.raises(Inconsistent, match=named):
                    await bus.state(Counter, key, at=at)
            assert len((await bus.facts.read(Filter(f"counters/{key}"))).entries) == version
        assert await bus.state(Counter, "b", at=1) == Counter("b", 1)
        assert await bus.state(Counter, "b", at=2) is None
        assert (await bus.call(Double("c"))).version == 2
        await bus.settled()
        assert await bus.record(Counter, "c") == Counter("c", 2)
        assert await bus.record(Counter, "a") is None
    (error,) = (each.message for each in caplog.records if each.levelno == logging.ERROR)
    assert error.startswith("counters: 2 things have no record of their last facts until a start that can fold them")
    assert "counters/a version 1 is Doubled" in error
    mended = Service("counters", owns=counters)
    mended.parts += [part for part in service.parts if part.name != "doubled"]

    @mended.evolve
    def doubled(counter: Counter | None, event: Doubled) -> Counter:
        return Counter(event.name, 2 * counter.value if counter else 0)

    async with running(mended, bus=each_bus) as bus:
        assert await bus.record(Counter, "a") == Counter("a", 0)
        assert await bus.record(Counter, "c") == Counter("c", 2)


async def test_a_decider_cannot_record_what_adds_to_nothing(each_bus: str) -> None:
    async with running(service, bus=each_bus) as bus:
        before = await bus.facts.head()
        with pytest.raises(Inconsistent, match="counters/a version 1 is Doubled"):
            await bus.call(Double("a"))
        assert not (await bus.facts.read(Filter("counters/a"), after=0)).entries
        assert before <= await bus.facts.head()
        assert (await bus.call(Add("a", 2))).version == 1
        assert (await bus.call(Double("a"))).version == 2
    with pytest.raises(Inconsistent, match="counters/a version 1 is Doubled"):
        given_facts(service, Doubled("a"))
    given_facts(service, Added("a", 1)).when(Double("a")).then(Doubled("a"))


async def test_what_evolve_may_not_return_and_what_cannot_be_read_is_said_with_its_place(bus_url: str) -> None:
    wrong = Service("counters", owns=counters)

    @wrong.evolve
    def added(counter: Counter | None, event: Added) -> Any:
        if event.by == 13:
            raise RuntimeError("of all numbers")
        return event if event.by else Counter(event.name, 0)

    folder = fold_of(bind(wrong), counters)
    async with things(bus_url) as on:
        await on.happened(Added("a", 0), Added("a", 1), Added("b", 0), Added("b", 13))
        await on.bus.facts.append("counters/c", [sealed("counters/c", "Added", "c", Meta(1), b'{"name":"c","by":"x"}')])
        await on.bus.facts.append("counters/d", [sealed("counters/d", "Lost", "d", Meta(1), b"{}")])
        with pytest.raises(Refused, match="evolve for Added returned Added"):
            await folder.fold(on.bus.facts, "a")
        with pytest.raises(RuntimeError) as raised:
            await folder.fold(on.bus.facts, "b")
        assert raised.value.__notes__ == ["while folding position 4: counters/b version 2, Added"]
        with pytest.raises(Unreadable, match=r"position 5 \(counters/c version 1\): Added of counters .* does not fit"):
            await folder.fold(on.bus.facts, "c")
        with pytest.raises(Unreadable, match=r"position 6 \(counters/d version 1\): .*'Lost', which this program"):
            await folder.fold(on.bus.facts, "d")


async def test_damage_is_found_before_it_reaches_evolve(bus_url: str) -> None:
    async with things(bus_url) as on:
        await on.happened(*(Added("a", 1) for _ in range(5)))
    sql(bus_url, "update facts set body = cast(replace(body, '1', '2') as blob) where position = 4")
    async with things(bus_url) as on:
        with pytest.raises(Damaged, match="position 4 .*is not what was written"):
            await on.fold("a")
        assert evolved == []


async def test_an_owner_does_not_start_on_damaged_facts_that_have_no_record_yet(bus_url: str) -> None:
    async with things(bus_url) as on:
        await on.happened(Added("a", 1), Added("b", 1))
    sql(bus_url, "update facts set body = cast(replace(body, '1', '2') as blob) where position = 2")
    with pytest.raises(Damaged, match=r"position 2 \(counters/b version 1\) is not what was written"):
        async with running(service, bus=bus_url):
            pass


async def test_who_takes_over_after_one_that_died_while_it_made_records_makes_the_rest(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in batches, and the last fact of the first thing lies behind those of the second."""
    one, other = "a", next(f"b{n}" for n in range(1_000) if slot_of(f"b{n}") == slot_of("a"))
    async with things(each_bus) as on:
        await on.happened(Added(one, 1), Added(other, 1), Added(one, 1))
    remember = Commander._remember

    async def mortal(self: Commander, key: str) -> None:
        await remember(self, key)
        await self.records.flush()
        raise Damaged("the end")

    monkeypatch.setattr(Commander, "_remember", mortal)
    with pytest.raises(Damaged, match="the end"):
        async with running(service, bus=each_bus):
            pass
    monkeypatch.setattr(Commander, "_remember", remember)
    async with running(service, bus=each_bus) as bus:
        assert await bus.record(Counter, one) == Counter(one, 2)
        assert await bus.record(Counter, other) == Counter(other, 1)


# ------------------------------------------------------------------------------------------ what is kept in memory


async def slipped_in(bus: Bus, by: int) -> None:
    """What a writer without a fence may do: it appends behind the owner's back."""
    await bus.facts.append("counters/a", [seal(Added("a", by), bus.clock.id(), Meta(bus.clock.now()))])


async def test_what_another_has_written_meanwhile_is_read_and_decided_upon(each_bus: str) -> None:
    decided = list[int]()
    watched = Service("counters", owns=counters)
    watched.parts += [part for part in service.parts if part.name != "add"]

    @watched.decide
    def add(counter: Counter | None, command: Add) -> Added:
        decided.append(counter.value if counter else 0)
        return Added(command.name, command.by)

    async with running(watched, bus=each_bus) as bus, connect(each_bus) as other:
        await bus.call(Add("a", 1))
        await slipped_in(other, 10)
        receipt = await bus.call(Add("a", 100))
        assert (receipt.version, decided) == (3, [0, 1, 11])
        assert await bus.fetch(Counter, "a") == Counter("a", 111)
        await bus.settled()
        assert await bus.record(Counter, "a") == Counter("a", 111)


async def test_a_thing_that_always_changes_while_it_is_decided_is_given_up_after_ten_times(each_bus: str) -> None:
    beset = Service("counters", owns=counters)
    beset.parts += [part for part in service.parts if part.name != "add"]

    @beset.decide
    async def add(counter: Counter | None, command: Add, ctx: Context) -> Added:
        await slipped_in(ctx.bus, 1)
        return Added(command.name, command.by)

    async with running(beset, bus=each_bus) as bus:
        with pytest.raises(Overloaded, match="counters/a changed 10 times while it was decided"):
            await bus.call(Add("a", 100))
        assert await bus.fetch(Counter, "a") == Counter("a", 10)
        # Nothing of it stays: the next is decided on what stands.
        assert (await bus.call(Double("a"))).version == 11
