"""A stream is found by its chain: whole, from anywhere, however long it is, and never with a hole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import apsw
import pytest

from cauce.backends import sqlite
from cauce.backends.sqlite import chain, table
from cauce.backends.sqlite.upkeep import verify
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Damaged
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


async def test_the_beginning_of_the_commands_may_be_gone(tmp_path: Path) -> None:
    bus = await sqlite.open(tmp_path / "bus.db")
    await fill(bus.commands, 400)
    await bus.close()
    with apsw.Connection(str(tmp_path / "bus.db")) as connection:
        connection.execute("delete from commands where position <= 300")
    connection.close()
    bus = await sqlite.open(tmp_path / "bus.db")
    found = await versions(bus.commands, LONG)
    assert found == list(range(found[0], 401))
    assert found[0] > 1
    await bus.close()
    assert verify(tmp_path / "bus.db").ok
