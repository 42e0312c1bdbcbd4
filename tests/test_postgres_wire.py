"""The wire on PostgreSQL when its server, its connections or its notifications fail, and who counts as dead there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from subprocess import Popen
from typing import Any

import msgspec
import pytest

from cauce import NoAnswer
from cauce.backends.postgres.parcel import LOOK, packed, unpacked
from cauce.backends.postgres.registry import LEASE, Present, Registry
from cauce.backends.postgres.wire import PostgresWire
from cauce.errors import Unreachable
from cauce.testing import VirtualClock
from cauce.wire import Wire
from tests.servers import Missing, Postgres, absent
from tests.wired import CLOCK
from tests.wires import PostgresPlace, Start, ask, starter


@pytest.fixture(scope="module")
def own() -> Iterator[Postgres]:
    """A server that the tests here may crash."""
    try:
        server = Postgres()
    except Missing as missing:
        absent(missing)
    yield server
    server.remove()


@pytest.fixture
def place(own: Postgres, bus_name: str) -> Iterator[PostgresPlace]:
    yield PostgresPlace(own, own.url(schema=bus_name), bus_name)
    own.drop(bus_name)


@pytest.fixture
async def wire(place: PostgresPlace) -> AsyncIterator[Wire]:
    async with place.opened() as wire:
        yield wire


@pytest.fixture
def peer(program: Callable[..., Popen[str]], place: PostgresPlace) -> Start:
    return starter(program, place.url)


async def sql(place: PostgresPlace, statement: str) -> list[list[str]]:
    return await asyncio.to_thread(place.server.sql, statement)


# ------------------------------------------------------------------------------------------ lost connections and hints


async def test_a_connection_that_listens_and_is_terminated_costs_no_answer(
    wire: Wire, peer: Start, place: PostgresPlace
) -> None:
    await peer("users")
    for n in range(5):
        asked = [asyncio.ensure_future(ask(wire, "users", b"%d" % each)) for each in range(20)]
        await asyncio.sleep(0.002 * n)
        await sql(
            place, "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'cauce listen%'"
        )
        assert await asyncio.gather(*asked) == [b"%d" % each for each in range(20)]


async def test_without_any_notification_answers_come_by_looking(
    wire: PostgresWire, peer: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    await peer("users")
    assert await ask(wire, "users", b"first") == b"first"
    monkeypatch.setattr(wire._board._asking, "told", lambda text: None)
    began = CLOCK.monotonic()
    for n in range(3):
        assert await ask(wire, "users", b"%d" % n) == b"%d" % n
    assert 0.5 < CLOCK.monotonic() - began < 10


async def test_a_lost_connection_is_a_lost_question_or_none_and_the_next_is_answered(
    wire: Wire, peer: Start, place: PostgresPlace
) -> None:
    await peer("users")
    assert await ask(wire, "users", b"first") == b"first"
    await sql(
        place,
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like 'cauce%' and application_name not like 'cauce listen%'",
    )
    async with asyncio.timeout(20):
        while True:
            try:
                assert await ask(wire, "users", b"next") == b"next"
                break
            except (ConnectionError, Unreachable):
                await asyncio.sleep(0.05)


async def test_a_crash_of_the_server_is_a_lost_connection_and_then_all_is_served_again(
    wire: Wire, peer: Start, place: PostgresPlace
) -> None:
    there = await peer("users")
    await there.does("announce users")

    async def here(payload: bytes) -> bytes:
        return payload

    await wire.serve("others", here)
    asked = asyncio.ensure_future(ask(wire, "users", b"hang", 60))
    assert await there.said() == "began"
    await asyncio.to_thread(place.server.restart, "immediate")
    with pytest.raises(ConnectionError, match="lost what was asked"):
        async with asyncio.timeout(20):
            await asked
    async with asyncio.timeout(20):
        while True:
            try:
                assert int(await ask(wire, "users", b"pid")) == there.process.pid
                break
            except (ConnectionError, Unreachable, NoAnswer):
                await asyncio.sleep(0.05)
        while await place.known() != 2:  # noqa: ASYNC110 - what is waited for happens in the database
            await asyncio.sleep(0.05)
    assert [each.pid for each in await wire.instances()] == [there.process.pid]


async def test_where_the_server_is_away_who_asks_is_told_so_and_never_later_than_its_deadline(
    wire: Wire, peer: Start, place: PostgresPlace
) -> None:
    await peer("users")
    assert await ask(wire, "users", b"first") == b"first"
    await asyncio.to_thread(place.server.stop, "fast")
    try:
        for _ in range(3):
            began = CLOCK.monotonic()
            with pytest.raises((Unreachable, ConnectionError)):
                await ask(wire, "users", b"pid", 2)
            assert CLOCK.monotonic() - began < 3
    finally:
        await asyncio.to_thread(place.server.start)
    async with asyncio.timeout(20):
        while True:
            try:
                assert await ask(wire, "users", b"again") == b"again"
                break
            except (ConnectionError, Unreachable, NoAnswer):
                await asyncio.sleep(0.05)


async def test_a_deadline_passes_while_the_server_hangs_and_the_question_is_never_begun(
    wire: Wire, peer: Start, place: PostgresPlace
) -> None:
    there = await peer("users", "users/1")
    assert await ask(wire, "users", b"first") == b"first"
    place.server.pause()
    try:
        began = CLOCK.monotonic()
        asked = [asyncio.ensure_future(ask(wire, "users", b"hang", 0.5)) for _ in range(3)]
        await asyncio.sleep(0.01)
        asked.append(asyncio.ensure_future(ask(wire, "users", b"hang", 0.5)))
        for each in asked:
            with pytest.raises(TimeoutError):
                await each
        assert CLOCK.monotonic() - began < 2
    finally:
        await asyncio.sleep(0.3)
        place.server.resume()
    async with asyncio.timeout(20):
        assert await ask(wire, "users", b"next") == b"next"
    assert await there.does("leave users/1") == "done", "hang never said that it began"


# ------------------------------------------------------------------------------------------------------------ death


async def test_a_question_that_the_dead_never_took_is_asked_elsewhere(
    wire: Wire, peer: Start, place: PostgresPlace
) -> None:
    stopped = await peer("users")
    await ask(wire, "users", b"first")
    await stopped.stops()
    asked = asyncio.ensure_future(ask(wire, "users", b"pid"))
    async with asyncio.timeout(10):
        while not await place.count("wire_questions"):  # noqa: ASYNC110 - what is waited for is in the database
            await asyncio.sleep(0.01)
    other = await peer("users")
    await stopped.killed()
    assert int(await asked) == other.process.pid


async def test_nothing_is_left_of_what_was_asked_and_answered(wire: Wire, peer: Start, place: PostgresPlace) -> None:
    there = await peer("users")
    await asyncio.gather(*(ask(wire, "users", b"x" * 100 * n) for n in range(200)))
    with pytest.raises(TimeoutError):
        await ask(wire, "users", b"late", 0.2)
    await there.stops()
    with pytest.raises(TimeoutError):
        await ask(wire, "users", b"pid", 0.1)
    async with asyncio.timeout(10):
        while await place.count("wire_questions") + await place.count("wire_answers"):  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.05)
    there.goes_on()


class _Table:
    """What the registry's statements find: rows of a database that a test sets."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.buried: list[str] = []

    def say(self, token: str, beat: int, age: float) -> None:
        present = msgspec.json.encode(Present("wire another:machine:1:1:a", ("users",)))
        self.rows = [{"epoch": "1", "token": token, "beat": beat, "present": present, "age": age, "at": 1}]

    async def fetch(self, statement: str, *values: Any) -> Any:
        if "left join" in statement:
            return self.rows
        self.buried.append(values[0])
        return []


def test_of_another_machine_who_is_silent_for_the_lease_is_dead_and_who_beats_is_not(
    clock: VirtualClock, virtual: Callable[[Callable[[], Any]], None]
) -> None:
    async def main() -> None:
        table = _Table()
        registry = Registry(table.fetch, clock, "c")

        async def looked(beat: int, age: float = 0.0) -> list[str]:
            table.say("1-a", beat, age)
            registry.doubt()
            await registry.look()
            return list(registry.serving("users"))

        for beat in range(20):
            assert await looked(beat) == ["1-a"]
            assert not registry.is_quiet("1-a")
            await clock.sleep(2)
        began = clock.monotonic()
        while await looked(20):
            await clock.sleep(1)
        assert LEASE <= clock.monotonic() - began <= LEASE + 2
        assert table.buried == ["1-a"]

    virtual(main)


def test_silence_counts_only_as_long_as_it_was_watched(
    clock: VirtualClock, virtual: Callable[[Callable[[], Any]], None]
) -> None:
    """The server may have been away, so that nobody could beat."""

    async def main() -> None:
        table = _Table()
        for age in (0.0, 3600.0):
            registry = Registry(table.fetch, clock, "c")
            table.say("1-a", 7, age)
            await registry.look()
            assert registry.serving("users") == ["1-a"]
            await clock.sleep(60)
            registry.doubt()
            await registry.look()
            assert registry.serving("users") == ["1-a"], "it has a little time to beat again"
            assert registry.is_quiet("1-a"), "but others are asked first"
            for _ in range(4):
                await clock.sleep(1)
                registry.doubt()
                await registry.look()
            assert registry.serving("users") == ()

    virtual(main)


# ---------------------------------------------------------------------------------------------------------- parcels


def test_answers_come_out_of_notifications_as_they_went_in_and_none_is_too_long() -> None:
    answers = [(n, n % 3, bytes([n % 256]) * (n * 37 % 6500)) for n in range(300)]
    texts = packed(answers)
    assert all(len(each) < 8000 for each in texts)
    assert texts[-1] == LOOK
    found = [each for text in texts[:-1] for each in unpacked(text)]
    short = [each for each in answers if len(each[2]) < 5800]
    assert [each for each in found if len(each[2]) < 5800] == short


@pytest.mark.parametrize("text", ["x", "é", "AAAA", "AAAAAAAAAAABAAk="])
def test_a_notification_that_is_none_of_ours_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(unpacked(text))


@pytest.mark.timeout(20)
async def test_who_looks_at_the_registry_in_the_moment_it_was_read_does_not_stop_the_loop() -> None:
    gate = asyncio.get_running_loop().create_future()

    async def fetch(sql: str, *values: Any) -> list[Any]:
        await gate
        return [{"epoch": "e", "token": None}]

    async def look_later() -> None:
        await gate
        await registry.look()

    registry = Registry(fetch, CLOCK, "channel")
    first = asyncio.ensure_future(registry.look())
    for _ in range(3):
        await asyncio.sleep(0)
    assert registry._looking is not None
    later = [asyncio.ensure_future(look_later()) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set_result(None)
    await asyncio.gather(first, *later)
    assert registry._looking is None
