"""`cauce verify` on every backend: what was damaged in the storage itself is found and named, and nothing else is."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from cauce.accept import SLOTS, slot_of
from cauce.backends import Backend, read_all
from cauce.backends.postgres import forgetting as postgres_forgetting
from cauce.bus import keep, own
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Refused, StorageFull, Unreachable
from cauce.log import Filter, Log
from cauce.twice import Twice
from cauce.verify import Report, Walk
from tests.kept import backend_at
from tests.servers import Missing, Nats, Postgres, absent
from tests.storage import Storage, storage

__all__ = ["storage"]

CLOCK = SystemClock()
STREAMS = [f"users/{n}" for n in range(8)]
BODY = b'{"name":"somebody"}'


def fact(stream: str, id: str = "", causation: str = "") -> Entry:
    wish = b'{"type":"Do","body":{}}' if causation else None
    return sealed(stream, "Named", id or CLOCK.id(), Meta(CLOCK.now(), causation=causation), BODY, wish)


async def record(bus: Backend, made_by: Entry, version: int = 0, *, id: str = "", upto: int = 0) -> None:
    meta = Meta(CLOCK.now(), upto=upto or made_by.position)
    entry = sealed(made_by.stream, "User", id or made_by.id, meta, BODY)
    await bus.records.put(made_by.stream, version or made_by.version, entry)


async def mark(bus: Backend, slot: int, position: int) -> None:
    stream = f"_written/users/{slot}"
    entry = sealed(stream, "Written", CLOCK.id(), Meta(CLOCK.now(), upto=position), b"{}")
    await bus.records.put(stream, position, entry)


async def all_of(log: Log) -> list[Entry]:
    found, looked, head = list[Entry](), 0, await log.head()
    while looked < head:
        page = await log.read(after=looked, limit=1000)
        found, looked = found + page.entries, page.looked
    return found


async def filled(bus: Backend) -> None:
    """Facts with wishes, commands of which some are forgotten, records and marks, claims, a catalogue, a tombstone."""
    await own(bus.facts, "users", "users", CLOCK)
    await keep(bus.facts, "users", "a", "here", True, CLOCK)
    await keep(bus.facts, "users", "b", "here", True, CLOCK)
    claims = {slot: await bus.facts.claim(f"users/{slot}", "me") for slot in range(SLOTS)}
    for _ in range(3):
        for stream in STREAMS:
            fence = claims[slot_of(stream.partition("/")[2])]
            await bus.facts.append(stream, [fact(stream, causation=CLOCK.id()), fact(stream)], fence=fence)
            await bus.commands.append(stream, [fact(stream)])
    for stream in STREAMS[:-1]:
        page = await bus.facts.read(Filter(stream))
        # One is written behind, so its record is not of the last fact.
        await record(bus, page.entries[-1 if stream != STREAMS[0] else 2])
    gone = (await bus.facts.read(Filter(STREAMS[-1]))).entries[-1]
    meta = Meta(CLOCK.now(), upto=gone.position)
    await bus.records.put(gone.stream, gone.version, sealed(gone.stream, "Gone", gone.id, meta, b""))
    for slot in range(SLOTS):
        await mark(bus, slot, gone.position)
    await bus.facts.beat(claims[0])
    await bus.facts.release(claims[1])
    position = (await bus.commands.read(Filter(STREAMS[0]))).entries[-1].position
    assert await bus.commands.forget("users", slot_of("0"), position, 2**60) > 0
    await bus.commands.append(STREAMS[0], [fact(STREAMS[0])])


async def test_a_whole_bus_is_ok(each_bus: str) -> None:
    async with backend_at(each_bus) as bus:
        await filled(bus)
        facts, commands, records = [await all_of(log) for log in (bus.facts, bus.commands, bus.records)]
        report = await read_all(each_bus, CLOCK)
    assert (report.ok, report.findings, report.more) == (True, [], 0)
    assert report.entries == {"facts": len(facts), "commands": len(commands), "records": len(records)}
    assert report.streams == len({each.stream for each in (*facts, *commands, *records)})
    assert report.id


async def test_a_bus_without_entries_is_ok_and_where_there_is_none_it_is_refused(each_bus: str) -> None:
    with pytest.raises(Refused, match="there is no"):
        await read_all(each_bus, CLOCK)
    async with backend_at(each_bus):
        pass
    assert (await read_all(each_bus, CLOCK)).ok


# ------------------------------------------------------------------------------------------- by means of the storage


def said(report: Report) -> str:
    return "\n".join(f"{each.kind} {each.log} {each.position}: {each.message}" for each in report.findings)


async def damaged(url: str, hurt: Callable[[Backend], Awaitable[None]]) -> Report:
    async with backend_at(url) as bus:
        await filled(bus)
        await hurt(bus)
    report = await read_all(url, CLOCK)
    assert not report.ok
    return report


async def nth(log: Log, stream: str, n: int) -> Entry:
    return (await log.read(Filter(stream))).entries[n]


@pytest.mark.parametrize("log", ["facts", "commands", "records"])
async def test_a_body_that_is_not_what_was_written_is_named(log: str, each_bus: str, storage: Storage) -> None:
    there = list[tuple[Entry, int]]()

    async def hurt(bus: Backend) -> None:
        entry = await nth(getattr(bus, log), STREAMS[2], 0)
        there.append((entry, await storage.change(log, entry.position)))

    report = await damaged(each_bus, hurt)
    ((entry, position),) = there
    line = f"entry {log} {position}: {log} position {position} ({entry.stream} version {entry.version}) is not what was written"
    assert line in said(report)


async def test_a_fact_that_is_gone_from_the_middle_is_named_by_its_position_and_its_stream(
    each_bus: str, storage: Storage
) -> None:
    there = list[Entry]()

    async def hurt(bus: Backend) -> None:
        there.extend((await bus.facts.read(Filter(STREAMS[2]))).entries)
        await storage.remove("facts", there[2].position)

    found = said(await damaged(each_bus, hurt))
    assert (
        f"order facts {there[2].position}: facts positions {there[2].position} to {there[2].position} are missing"
        in found
    )
    assert f"facts position {there[3].position} is users/2 version 4, after version 2" in found


async def test_facts_that_are_gone_at_the_end_are_missed(each_bus: str, storage: Storage) -> None:
    last = list[int]()

    async def hurt(bus: Backend) -> None:
        await bus.facts.append("notes/1", [fact("notes/1"), fact("notes/1")])
        last.append(await bus.facts.head())
        for back in (0, 1):
            await storage.remove("facts", last[0] - back)

    report = await damaged(each_bus, hurt)
    assert f"ends at position {last[0] - 2}" in said(report) or f"facts end at position {last[0] - 2}" in said(report)
    assert f"{last[0]}" in said(report)


async def test_a_command_that_nobody_forgot_is_missed(each_bus: str, storage: Storage) -> None:
    async def hurt(bus: Backend) -> None:
        await storage.remove("commands", (await nth(bus.commands, STREAMS[2], 1)).position)

    found = said(await damaged(each_bus, hurt))
    assert "is users/2 version 3, after version 1" in found
    assert "lack" in found or "has lost 1 entries" in found


async def test_a_command_that_is_gone_from_the_beginning_is_missed_though_others_were_forgotten(
    each_bus: str, storage: Storage
) -> None:
    async def hurt(bus: Backend) -> None:
        await storage.remove("commands", (await nth(bus.commands, STREAMS[2], 0)).position)

    found = said(await damaged(each_bus, hurt))
    assert "lack" in found or "has lost 1 entries" in found


async def test_a_command_is_missed_where_none_was_ever_forgotten(each_bus: str, storage: Storage) -> None:
    async with backend_at(each_bus) as bus:
        for stream in STREAMS[:3]:
            await bus.commands.append(stream, [fact(stream)])
        position = (await nth(bus.commands, STREAMS[1], 0)).position
    assert (await read_all(each_bus, CLOCK)).ok
    await storage.remove("commands", position)
    found = said(await read_all(each_bus, CLOCK))
    assert any(
        words in found
        for words in ("lack 1 entries", "has lost 1 entries", f"positions {position} to {position} are missing")
    )


async def test_a_record_that_is_gone_is_no_finding_because_they_are_written_behind(
    each_bus: str, storage: Storage
) -> None:
    async with backend_at(each_bus) as bus:
        await filled(bus)
        await storage.remove("records", (await nth(bus.records, STREAMS[2], 0)).position)
    assert [each.kind for each in (await read_all(each_bus, CLOCK)).findings] in ([], ["structure"])


@pytest.mark.parametrize("log", ["facts", "commands"])
async def test_an_id_that_stands_twice_in_a_stream_is_named_with_both_places(log: str, each_bus: str) -> None:
    there = list[tuple[Entry, int]]()

    async def hurt(bus: Backend) -> None:
        first = await nth(getattr(bus, log), STREAMS[3], 1)
        there.append((first, (await getattr(bus, log).append(STREAMS[3], [fact(STREAMS[3], first.id)])).position))

    found = said(await damaged(each_bus, hurt))
    ((first, position),) = there
    assert f"twice {log} {position}: {log} position {position} (users/3 version" in found
    assert f"the id {first.id} stands twice, first at position {first.position} (version {first.version})" in found


async def test_a_command_that_was_accepted_twice_is_named(each_bus: str) -> None:
    async def hurt(bus: Backend) -> None:
        causation = (await nth(bus.facts, STREAMS[3], 0)).meta.causation
        await bus.facts.append(STREAMS[3], [fact(STREAMS[3], causation=causation)])

    (finding,) = (await damaged(each_bus, hurt)).findings
    assert (finding.kind, "was accepted twice, first at position" in finding.message) == ("twice", True)


async def test_records_of_facts_that_are_not_there_and_marks_beyond_them_are_named(each_bus: str) -> None:
    async def hurt(bus: Backend) -> None:
        one, other = await nth(bus.facts, STREAMS[1], -1), await nth(bus.facts, STREAMS[2], -1)
        await record(bus, one, one.version + 1, upto=one.position + 1_000_000)
        await record(bus, other, other.version + 1, upto=one.position)
        await mark(bus, 3, 1_000_000)

    found = said(await damaged(each_bus, hurt))
    assert "(users/1 version 7) was made by the fact at 10000" in found
    assert ", but the facts end at" in found
    assert "(users/2 version 7) was made by the fact at" in found
    assert "where users/1 version 6 stands" in found
    assert (
        "(_written/users/3 version 1000000) says that records are written up to 1000000, but the facts end at" in found
    )
    assert len(found.splitlines()) == 3


async def test_a_catalogue_that_says_nothing_or_gives_an_owner_twice_is_named(each_bus: str) -> None:
    async def hurt(bus: Backend) -> None:
        for stream in ("_catalogue/users", "_catalogue/notes", "_services/notes", "_takes/services"):
            await bus.facts.append(stream, [sealed(stream, "Owned", CLOCK.id(), Meta(CLOCK.now()), b'{"x":1}')])

    report = await damaged(each_bus, hurt)
    assert {each.kind for each in report.findings} == {"catalogue"}
    assert "(_catalogue/users version 2) gives users an owner a second time" in said(report)
    assert said(report).count("is no entry of the catalogue") == 4


async def test_a_claim_that_no_log_gave_is_named(each_bus: str, storage: Storage, backend: str) -> None:
    async def hurt(bus: Backend) -> None:
        if backend != "nats":
            storage.sql("update claims set fence = 0 where name = 'users/3'")
            return
        await storage.publish("facts.users.3.$claim", b"nonsense")
        await storage.publish("facts.users.4.$claim", b'{"id":"1","name":"users/5","owner":"me"}')
        await storage.publish("leases.facts.users/7", b'{"fence":1000000}')

    report = await damaged(each_bus, hurt)
    assert {each.kind for each in report.findings} == {"claims"}
    assert len(report.findings) == (1 if backend != "nats" else 3)


async def test_an_entry_in_the_wrong_slot_is_named(each_bus: str, storage: Storage, backend: str) -> None:
    async def hurt(bus: Backend) -> None:
        entry = await nth(bus.facts, STREAMS[2], -1)
        if backend == "sqlite":
            storage.sql("update streams set name = 'users/x' where name = 'users/2'")
        elif backend == "postgresql":
            storage.sql(f"update facts set slot = (slot + 1) % 16 where position = {entry.position}")
        else:
            await storage.publish(f"facts.users.{(slot_of('2') + 1) % SLOTS}.2", b"{}")

    assert any(each.kind in ("names", "entry") for each in (await damaged(each_bus, hurt)).findings)


async def test_what_a_stranger_wrote_among_facts_is_named(nats: Nats, nats_bus: str, bus_name: str) -> None:
    there = list[int]()

    async def hurt(bus: Backend) -> None:
        storage = Storage(nats_bus, None, nats, bus_name)
        there.append(await storage.publish(f"facts.users.{slot_of('2')}.2", b"hello"))

    report = await damaged(nats_bus, hurt)
    assert [(each.kind, each.position) for each in report.findings] == [("entry", there[0])]
    assert "(users/2) cannot be read" in said(report)


async def test_a_purge_of_commands_that_cauce_did_not_ask_for_is_missed(
    nats: Nats, nats_bus: str, bus_name: str
) -> None:
    async def hurt(bus: Backend) -> None:
        asked = {"filter": f"{bus_name}.commands.users.{slot_of('3')}.3"}
        assert nats.request(f"$JS.API.STREAM.PURGE.{bus_name}_commands", asked)["purged"]

    assert "has lost 3 entries" in said(await damaged(nats_bus, hurt))


# ------------------------------------------------------------------------------------------- beside those who write


async def test_beside_who_writes_and_who_forgets_nothing_is_found(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that lose their beginning, or all, and begin again at version 1, between two pages and within them."""
    monkeypatch.setattr("cauce.backends.nats.verify._PAGE", 7)
    monkeypatch.setattr("cauce.backends.postgres.verify._FEW", 7)
    async with backend_at(each_bus) as bus, backend_at(each_bus) as other:
        await filled(bus)
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                for stream in STREAMS:
                    placed = await bus.facts.append(stream, [made := fact(stream, causation=CLOCK.id())])
                    await record(bus, msgspec.structs.replace(made, position=placed.position, version=placed.version))
                    await bus.commands.append(stream, [fact(stream)])
                await mark(bus, 0, await bus.facts.head())

        async def forget() -> None:
            n = 0
            while not stop.is_set():
                n += 1
                await other.commands.forget("users", n % SLOTS, await other.commands.head(), 2**60)
                await CLOCK.sleep(0)

        tasks = [asyncio.create_task(write()), asyncio.create_task(forget())]
        for _ in range(8):
            report = await read_all(each_bus, CLOCK)
            assert report.findings == []
        stop.set()
        await asyncio.gather(*tasks)
    assert (await read_all(each_bus, CLOCK)).ok


async def test_on_postgresql_commands_forgotten_before_they_were_counted_are_no_loss(
    postgres_bus: str, postgres: Postgres, bus_name: str
) -> None:
    async with backend_at(postgres_bus) as bus:
        await filled(bus)
        # As an older version of Cauce left it.
        postgres.sql(f"delete from {bus_name}.turns where writer = '{postgres_forgetting.FORGOTTEN}'")
        assert (await read_all(postgres_bus, CLOCK)).ok
        await bus.commands.forget("users", slot_of("3"), await bus.commands.head(), 2**60)
    assert (await read_all(postgres_bus, CLOCK)).ok


async def test_a_server_that_goes_away_while_it_is_read_is_no_damage(
    postgres: Postgres, postgres_bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_session() -> None:
        postgres.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'cauce verify%'"
        )

    try:
        own = Nats(name="own")
    except Missing as missing:
        absent(missing)
    try:
        for url, go_away in ((postgres_bus, end_session), (f"{own.url('b')}?files={tmp_path}", own.stop)):
            async with backend_at(url) as bus:
                await filled(bus)
            with monkeypatch.context() as patched:
                patched.setattr("cauce.verify.Walk.see", once(Walk.see, go_away))
                with pytest.raises(Unreachable):
                    await read_all(url, CLOCK)
    finally:
        own.remove()


async def test_a_disk_without_room_for_temporary_files_is_no_damage(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with backend_at(each_bus) as bus:
        await filled(bus)
    monkeypatch.setattr("cauce.twice._MANY", 2)
    monkeypatch.setattr("cauce.backends.sqlite.verify._SOME", 0)
    monkeypatch.setattr("cauce.twice.TemporaryFile", full)
    with pytest.raises(StorageFull, match="No space left on device.*TMPDIR"):
        await read_all(each_bus, CLOCK)


def once(see: Callable[..., None], first: Callable[[], None]) -> Callable[..., None]:
    """Does something else before it sees for the first time."""
    left = [first]

    def seen(walk: Walk, entries: Iterable[Entry]) -> None:
        while left:
            left.pop()()
        see(walk, entries)

    return seen


# ------------------------------------------------------------------------------------------------------ as it is told


def test_the_command_says_the_same_on_every_backend(each_bus: str) -> None:
    async def make() -> None:
        async with backend_at(each_bus) as bus:
            await filled(bus)

    asyncio.run(make())
    well = CliRunner().invoke(main, ["verify", "--bus", each_bus, "--json"])
    told = json.loads(well.stdout)
    assert (well.exit_code, told["ok"], told["findings"]) == (0, True, [])
    assert told.keys() == {"path", "ok", "id", "entries", "heads", "streams", "findings", "more", "seconds"}

    async def hurt() -> None:
        async with backend_at(each_bus) as bus:
            await mark(bus, 3, 1_000_000)

    asyncio.run(hurt())
    badly = CliRunner().invoke(main, ["verify", "--bus", each_bus])
    assert (badly.exit_code, "damaged" in badly.stdout, "_written/users/3" in badly.stdout) == (5, True, True)


def test_what_comes_twice_is_found_among_more_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cauce.twice._MANY", 100)
    many = Twice()
    for n in [*range(-2_000, 2_000), 7, -1_999, 7]:
        many.open.append(n * 2**40)
        many.tidy()
        assert len(many.open) < 100
    assert many.found() == {7 * 2**40, -1_999 * 2**40}
    assert Twice().found() == set()
