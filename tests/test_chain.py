"""A stream is found by its chain: whole, from anywhere, however long it is, and never with a hole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import apsw
import pytest

from cauce.accept import SLOTS, slot_of
from cauce.backends import sqlite
from cauce.backends.sqlite import chain, table
from cauce.backends.sqlite.file import SCHEMA
from cauce.backends.sqlite.upkeep import verify
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Damaged, Refused
from cauce.log import Filter, Log

LONG = "users/long"


@pytest.fixture(params=[(1, 2), (50, 3), (300, 8), (chain.TAIL, 8)], ids=lambda each: f"tail-{each[0]}-bits-{each[1]}")
def chapters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tail, bits = request.param
    monkeypatch.setattr(table, "TAIL", tail)
    monkeypatch.setattr(chain, "CHAPTER_BITS", bits)


def entry(stream: str, n: int) -> Entry:
    return sealed(stream, f"T{n % 3}", f"{stream}-{n}", Meta(1), b'{"n":%d}' % n)


async def fill(log: Log, count: int, first: int = 1) -> None:
    """A long stream among short ones."""
    told = []
    for n in range(first, first + count):
        told.append(log.append(LONG, [entry(LONG, n)]))
        if n % 2:
            told.append(log.append(f"users/{n}", [entry(f"users/{n}", 1), entry(f"users/{n}", 2)]))
    await asyncio.gather(*told)


async def versions(log: Log, stream: str, after: int = 0, limit: int = 1000) -> list[int]:
    found: list[int] = []
    while True:
        page = await log.read(Filter(stream), after=after, limit=limit)
        if page.looked == after:
            return found
        assert all(each.checked().stream == stream for each in page.entries)
        found, after = found + [each.version for each in page.entries], page.looked


@pytest.mark.usefixtures("chapters")
async def test_a_long_stream_is_read_whole_with_pages_of_any_size(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await fill(bus.facts, 1200)
    for limit in (1, 7, 256, 257, 1000, 5000):
        assert await versions(bus.facts, LONG, limit=limit) == list(range(1, 1201))
    assert await versions(bus.facts, "users/7") == [1, 2]
    await bus.close()
    assert verify(tmp_path / "bus.db").ok


@pytest.mark.usefixtures("chapters")
async def test_a_stream_is_read_from_any_position(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await fill(bus.facts, 700)
    page = await bus.facts.read(Filter(LONG), limit=1000)
    positions = [each.position for each in page.entries]
    for version in (1, 2, 3, 255, 256, 257, 511, 512, 513, 699, 700):
        for limit in (1, 2, 600):
            page = await bus.facts.read(Filter(LONG), after=positions[version - 1] - 1, limit=limit)
            assert [each.version for each in page.entries] == list(range(version, min(701, version + limit)))
    await bus.close()


@pytest.mark.usefixtures("chapters")
async def test_two_writers_and_a_reader_who_slept_see_the_same_stream(tmp_path: Path) -> None:
    one, two, reader = [await sqlite.open(tmp_path / "bus.db") for _ in range(3)]
    for turn in range(6):
        writer = (one, two)[turn % 2]
        await fill(writer.facts, 100, 1 + turn * 100)
        if turn % 3 == 2:
            assert await versions(reader.facts, LONG) == list(range(1, 101 + turn * 100))
    for bus in (one, two, reader):
        await bus.close()
    assert verify(tmp_path / "bus.db").ok


@pytest.mark.usefixtures("chapters")
async def test_filters_narrow_a_stream_and_still_say_how_far_it_was_looked(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await fill(bus.facts, 500)
    found, after = list[int](), 0
    while (page := await bus.facts.read(Filter(LONG, types=frozenset({"T1"})), after=after, limit=40)).looked > after:
        found, after = found + [each.version for each in page.entries], page.looked
    assert found == [n for n in range(1, 501) if n % 3 == 1]
    assert after == await bus.facts.head()
    assert not (await bus.facts.read(Filter(LONG, domains=frozenset({"cards"})))).entries
    await bus.close()


@pytest.mark.parametrize(
    "damage",
    [
        "update facts set previous = 1 where position = 300",
        "update facts set previous = 0 where position = 300",
        "update facts set previous = 299 where position = 300",
        "update facts set previous = 900 where position = 300",
        "delete from facts where position = 300",
    ],
)
async def test_a_broken_chain_is_found_and_not_read(damage: str, tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    for n in range(1, 501):
        await bus.facts.append(stream := f"users/{n % 2}", [entry(stream, n)])
    await bus.close()
    with apsw.Connection(str(tmp_path / "bus.db")) as connection:
        connection.execute(damage)
    connection.close()
    bus = await sqlite.open(tmp_path / "bus.db")
    with pytest.raises(Damaged, match="users/0"):
        await bus.facts.read(Filter("users/0"))
    await bus.close()
    assert not verify(tmp_path / "bus.db").ok


@pytest.mark.parametrize(
    "damage",
    [
        "update facts_chapters set position = position - 2 where stream > 0 and chapter = 0",
        "delete from facts_chapters where stream > 0 and chapter = 1",
        "update facts_chapters set position = position + 4 where stream = 0",
        "update facts_chapters set position = position - 4 where stream = 0",
    ],
)
async def test_a_wrong_end_of_a_chapter_is_found(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TAIL", 300)
    bus = await sqlite.open(tmp_path / "bus.db")
    await fill(bus.facts, 700)
    await bus.close()
    assert verify(tmp_path / "bus.db").ok
    with apsw.Connection(str(tmp_path / "bus.db")) as connection:
        connection.execute(damage)
        assert connection.changes()
    connection.close()
    assert not verify(tmp_path / "bus.db").ok


async def forget(bus: sqlite.SQLiteBus, upto: int) -> None:
    """Of all slots, so that it is the beginning that goes."""
    for slot in range(SLOTS):
        await bus.commands.forget("users", slot, upto, 2)


def steps_to_compare(many: int) -> int:
    """What SQLite does to compare the chapters of a log of so many streams, in hundreds of its instructions."""
    taken = 0

    def step() -> bool:
        nonlocal taken
        taken += 1
        return False

    with apsw.Connection(":memory:") as connection:
        for statement in SCHEMA:
            connection.execute(statement)
        connection.executemany(
            "insert into facts values (?1, ?1, 1, 0, 1, ?1, x'', null, x'', 0)", [(n,) for n in range(1, many + 1)]
        )
        chain.write_chapters(connection, "facts", many)
        connection.set_progress_handler(step, 100)
        assert list(chain.wrong_chapters(connection, "facts", many)) == []
    return taken


def test_with_twice_the_streams_it_takes_about_twice_as_long_to_compare_their_chapters() -> None:
    assert 0 < steps_to_compare(4_000) < 3 * steps_to_compare(2_000)


async def test_the_beginning_of_the_commands_may_be_gone(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await fill(bus.commands, 400)
    await forget(bus, 300)
    await bus.close()
    bus = await sqlite.open(tmp_path / "bus.db")
    found = await versions(bus.commands, LONG)
    assert found == list(range(found[0], 401))
    assert found[0] > 1
    await bus.close()
    assert verify(tmp_path / "bus.db").ok


def change(path: Path, *statements: str) -> None:
    """What happens to a file behind our back."""
    with apsw.Connection(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
            assert connection.changes(), statement
    connection.close()


@pytest.mark.parametrize("log", ["facts", "commands"])
@pytest.mark.parametrize("previous", [0, 50, 150, 298, 300, 301, 900])
async def test_a_pointer_that_skips_a_part_of_a_stream_is_found_wherever_one_reads_from(
    previous: int, log: str, tmp_path: Path
) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await asyncio.gather(*(getattr(bus, log).append(LONG, [entry(LONG, n)]) for n in range(1, 601)))
    await bus.close()
    change(tmp_path / "bus.db", f"update {log} set previous = {previous} where position = 300")
    bus = await sqlite.open(tmp_path / "bus.db")
    for after, limit in ((0, 1000), (100, 1000), (100, 300), (298, 1), (299, 1000)):
        with pytest.raises(Damaged, match=LONG):
            await getattr(bus, log).read(Filter(LONG), after=after, limit=limit)
    page = await getattr(bus, log).read(Filter(LONG), after=300, limit=1000)
    assert [each.version for each in page.entries] == list(range(301, 601)), "what lies behind is still read"
    await bus.close()


async def test_a_chapter_that_is_said_to_end_too_early_cuts_nothing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TAIL", 100)
    monkeypatch.setattr(chain, "CHAPTER_BITS", 3)
    bus = await sqlite.open(tmp_path / "bus.db")
    await asyncio.gather(*(bus.facts.append(LONG, [entry(LONG, n)]) for n in range(1, 601)))
    await bus.close()
    change(tmp_path / "bus.db", "update facts_chapters set position = 10 where stream > 0 and chapter = 2")
    bus = await sqlite.open(tmp_path / "bus.db")
    for after in (6, 7):
        with pytest.raises(Damaged, match=LONG):
            await bus.facts.read(Filter(LONG), after=after, limit=15)
    await bus.close()


@pytest.mark.parametrize(
    "change_", ["delete from facts where position = 600", "update facts set stream = 1000 where position = 600"]
)
async def test_a_stream_whose_end_is_not_where_its_chapter_says_takes_no_more(
    change_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TAIL", 100)
    bus = await sqlite.open(tmp_path / "bus.db")
    await bus.facts.append(LONG, [entry(LONG, n) for n in range(1, 601)])
    await bus.facts.append("users/1", [entry("users/1", n) for n in range(1, 201)])
    await bus.close()
    change(tmp_path / "bus.db", change_)
    bus = await sqlite.open(tmp_path / "bus.db")
    with pytest.raises(Damaged, match="position 600"):
        await bus.facts.append(LONG, [entry(LONG, 601)])
    await bus.close()


# ---------------------------------------------------------------------------------- commands that lost their beginning


@pytest.mark.usefixtures("chapters")
@pytest.mark.parametrize("gone", [1, 255, 299, 300, 399])
async def test_what_is_left_of_the_commands_is_read_whole_with_pages_of_any_size(gone: int, tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await asyncio.gather(*(bus.commands.append(LONG, [entry(LONG, n)]) for n in range(1, 401)))
    assert await versions(bus.commands, LONG) == list(range(1, 401))
    await forget(bus, gone)
    for limit in (1, 2, 10, 1000):
        assert await versions(bus.commands, LONG, limit=limit) == list(range(gone + 1, 401))
        assert await versions(bus.commands, LONG, after=gone - 1, limit=limit) == list(range(gone + 1, 401))
    assert (await bus.commands.append(LONG, [entry(LONG, 401)])).version == 401
    await bus.close()
    assert verify(tmp_path / "bus.db").findings == []


@pytest.mark.parametrize("bits", [2, 8])
async def test_a_stream_of_which_nothing_is_left_begins_again(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "CHAPTER_BITS", bits)
    monkeypatch.setattr(table, "TAIL", 20)
    one, two = [await sqlite.open(tmp_path / "bus.db") for _ in range(2)]
    for n in range(1, 21):
        await one.commands.append(LONG, [entry(LONG, n)])
    for n in range(1, 41):
        await two.commands.append("users/2", [entry("users/2", n)])
    assert await versions(two.commands, LONG) == list(range(1, 21))
    await forget(one, 30)
    assert verify(tmp_path / "bus.db").findings == []
    assert await versions(two.commands, LONG) == []
    # Who knew the stream, and who did not, are of one mind.
    for version in range(1, 7):
        bus = one if version % 2 else two
        assert (await bus.commands.append(LONG, [entry(LONG, 100 + version)])).version == version
    for n in range(41, 81):
        await one.commands.append("users/2", [entry("users/2", n)])
    for bus in (one, two):
        for limit in (1, 3, 100):
            assert await versions(bus.commands, LONG, limit=limit) == list(range(1, 7))
            assert await versions(bus.commands, "users/2", limit=limit) == list(range(11, 81))
        await bus.close()
    bus = await sqlite.open(tmp_path / "bus.db")
    assert (await bus.commands.append(LONG, [entry(LONG, 200)])).version == 7, "the new end, not that of an old chapter"
    await bus.close()
    assert verify(tmp_path / "bus.db").findings == []


@pytest.mark.usefixtures("chapters")
async def test_what_goes_of_one_slot_leaves_holes_that_nobody_minds(tmp_path: Path) -> None:
    bus, other = [await sqlite.open(tmp_path / "bus.db") for _ in range(2)]
    await fill(bus.commands, 700)
    streams = [LONG, "users/7", "users/8", "users/699"]
    before = {stream: await versions(other.commands, stream) for stream in streams}
    assert len(before[LONG]) == 700
    slot, upto = slot_of("long"), (await bus.commands.read(Filter(LONG), limit=400)).entries[-1].position
    mine = [each for each in (await bus.commands.read(limit=5000)).entries if slot_of(each.key) == slot]
    assert await bus.commands.forget("users", slot, upto, 2) == sum(each.position <= upto for each in mine)
    assert await bus.commands.forget("users", slot, upto, 2) == 0
    for each in (bus, other):
        for limit in (1, 7, 256, 1000):
            assert await versions(each.commands, LONG, limit=limit) == list(range(401, 701 + (each is other)))
        more = entry(LONG, 998 + (each is other))
        assert (await each.commands.append(LONG, [more])).version == 701 + (each is other)
        assert {stream: await versions(each.commands, stream) for stream in streams[1:]} == {
            stream: [] if slot_of(stream.partition("/")[2]) == slot else before[stream] for stream in streams[1:]
        }
        await each.close()
    assert verify(tmp_path / "bus.db").findings == []


@pytest.mark.parametrize(
    "damage",
    [
        "delete from commands where position = 300",
        "delete from commands where position = 100",
        "update commands set previous = 0 where position = 300",
        "update commands set previous = 250 where position = 300",
        "update commands set previous = 298 where position = 300",
        "update commands_chapters set position = 98 where stream = 0 and chapter = 1",
        "update commands_chapters set position = 'x' where stream = 0 and chapter = 1",
    ],
)
async def test_what_goes_by_another_hand_is_found_where_some_has_gone_on_purpose(damage: str, tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await asyncio.gather(*(bus.commands.append(LONG, [entry(LONG, n)]) for n in range(1, 601)))
    await forget(bus, 99)
    await bus.close()
    assert verify(tmp_path / "bus.db").ok
    change(tmp_path / "bus.db", damage)
    assert not verify(tmp_path / "bus.db").ok


# ------------------------------------------------------------------------------------------------ what is remembered


async def test_no_more_streams_are_remembered_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_CACHED", 100)
    monkeypatch.setattr(table, "TAIL", 20)
    bus = await sqlite.open(tmp_path / "bus.db")
    for turn in range(20):
        await asyncio.gather(
            *(bus.facts.append(f"users/{turn}-{n}", [entry(f"users/{turn}-{n}", 1)]) for n in range(50))
        )
        for kept in bus._writer._journal.tables:  # type: ignore[attr-defined]
            assert len(kept._heads) <= 150
    for turn in range(20):
        assert (await bus.facts.append(f"users/{turn}-7", [entry(f"users/{turn}-7", 2)])).version == 2
    await bus.close()
    assert verify(tmp_path / "bus.db").ok


async def test_what_was_refused_leaves_no_name_behind(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    good = entry("users/1", 1)
    for bad in (
        sealed("users/1", "Other", "\ud800", Meta(1), b"{}"),
        sealed("users/1", "No Type!\n", "id", Meta(1), b"{}"),
    ):
        for entries in ([bad], [good, bad]):
            with pytest.raises(Refused):
                await bus.facts.append("users/1", entries)
        with pytest.raises(Refused):
            await bus.records.put("users/1", 1, bad)
    await bus.close()
    with apsw.Connection(str(tmp_path / "bus.db")) as connection:
        assert connection.execute("select name from streams union all select name from types").fetchall() == []
    connection.close()
