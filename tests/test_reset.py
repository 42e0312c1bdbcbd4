"""After an older log was put back: each service stops loudly and names the cure, `cauce reset`, which lets it go on."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from click.testing import CliRunner, Result

from cauce import Bus, Command, Context, Copy, Damaged, Domain, Event, Record, Retry, Service, Store, running
from cauce.accept import slot_of
from cauce.cli import main
from cauce.clock import SystemClock
from cauce.codec import Meta, sealed
from cauce.errors import Busy
from cauce.log import Filter
from cauce.reset import planned, reset
from cauce.store import Waiting
from tests.kept import backend_at, move_places, rows, store_of
from tests.servers import Missing, Nats, Postgres, absent
from tests.storage import Storage, storage

__all__ = ["storage"]

CLOCK = SystemClock()
EFFECTS = "create table effects (name text, n integer)"
TABLES = ("facts", "commands", "records", "turns", "claims")

things = Domain("things", key="name")


class Thing(Record, domain=things):
    name: str
    n: int


class Small(Copy, of=Thing):
    name: str
    n: int


class Grown(Event, domain=things):
    name: str
    n: int


class Grow(Command, domain=things):
    name: str


owner = Service("things", owns=things)


@owner.decide
def grow(thing: Thing | None, command: Grow) -> Grown:
    return Grown(command.name, thing.n + 1 if thing else 1)


@owner.evolve
def grown(thing: Thing | None, event: Grown) -> Thing:
    return Thing(event.name, event.n)


def keeper(*broken: str) -> Service:
    """Reacts, and keeps a view and a replica. For some things its reaction fails."""
    service = Service("keeper", schema=[EFFECTS])

    @service.on(retry=Retry(attempts=1))
    def react(event: Grown, ctx: Context) -> None:
        if event.name in broken:
            raise ZeroDivisionError(event.name)
        ctx.store.execute("insert into effects values (?, ?)", (event.name, event.n))

    @service.view("sums", schema="create table sums (name text primary key, n integer)")
    def add(event: Grown, db: Store) -> None:
        db.execute(
            "insert into sums values (?, 1) on conflict (name) do update set n = sums.n + excluded.n", (event.name,)
        )

    service.replica(Small)
    return service


def reacting(told: list[tuple[str, int]]) -> Service:
    """Keeps nothing of its own: on NATS its store is a bucket of the bus."""
    service = Service("reacting")

    @service.on
    async def react(event: Grown) -> None:
        told.append((event.name, event.n))

    return service


# ------------------------------------------------------------------------------------------- what is put back


class Backup:
    """A bus at one moment, and how it becomes that again, as its administrator would have it."""

    def __init__(self, url: str, folder: Path, postgres: Postgres | None, nats: Nats | None) -> None:
        self.url, self._folder, self._postgres, self._nats = url, folder, postgres, nats
        self._schema = url.rpartition("schema=")[2]

    def make(self) -> None:
        if self._postgres is not None:
            copy = (f"create table {self._schema}_copy.{each} as table {self._schema}.{each}" for each in TABLES)
            self._postgres.sql(f"create schema {self._schema}_copy", *copy)
        elif self._nats is not None:
            self._nats.stop()
            shutil.copytree(self._nats.process.folder / "data", self._folder / "data")
            self._nats.start()
        else:
            assert cli("backup", str(self._folder / "copy.db"), "--bus", self.url).exit_code == 0

    def put_back(self) -> None:
        if self._postgres is not None:
            for each in TABLES:
                table = f"{self._schema}.{each}"
                self._postgres.sql(f"truncate {table}", f"insert into {table} table {self._schema}_copy.{each}")
        elif self._nats is not None:
            self._nats.stop()
            shutil.rmtree(self._nats.process.folder / "data")
            shutil.copytree(self._folder / "data", self._nats.process.folder / "data")
            self._nats.start()
        else:
            assert cli("restore", str(self._folder / "copy.db"), "--force", "--bus", self.url).exit_code == 0


@pytest.fixture
def backup(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backup]:
    """A bus on each backend in turn, of which a backup can be made."""
    if backend == "sqlite":
        yield Backup(request.getfixturevalue("bus_url"), tmp_path, None, None)
    elif backend == "postgresql":
        url = request.getfixturevalue("postgres_bus")
        yield Backup(url, tmp_path, request.getfixturevalue("postgres"), None)
    else:
        try:
            own = Nats(name="own")
        except Missing as missing:
            absent(missing)
        yield Backup(f"{own.url('b')}?files={tmp_path}/files", tmp_path, None, own)
        own.remove()


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


async def told(*arguments: str) -> Result:
    """A command, beside this loop."""
    return await asyncio.to_thread(cli, *arguments)


async def grow_all(bus: Bus, *names: str) -> None:
    for name in names:
        await bus.call(Grow(name))
    await bus.settled()
    await bus.settled()


async def effects(url: str) -> list[tuple[Any, ...]]:
    return sorted(await rows(url, "keeper", EFFECTS, "select name, n from effects"))


async def sums(bus: Bus) -> dict[str, int]:
    return dict(await bus.copies["keeper"].view("sums").fetch("select name, n from sums"))


async def small(bus: Bus, name: str) -> int | None:
    found = await bus.copies["keeper"].get(Small, name)
    return found.n if found is not None else None


async def gone_back(backup: Backup) -> None:
    """Two things before the backup, and two after it, all handled; then the backup is put back."""
    async with running(owner, keeper(), bus=backup.url) as bus:
        await grow_all(bus, "a", "b")
    await asyncio.to_thread(backup.make)
    async with running(owner, keeper(), bus=backup.url) as bus:
        await grow_all(bus, "a", "c")
    await asyncio.to_thread(backup.put_back)


async def test_after_an_older_log_was_put_back_all_stops_until_it_is_reset_and_nothing_happens_twice(
    backup: Backup,
) -> None:
    await gone_back(backup)
    url = backup.url
    # Where the log keeps its id, who has nothing beyond its end goes on as it is.
    stopped = [owner, keeper()] if url.startswith("sqlite") else [keeper()]
    for service in stopped:
        with pytest.raises(Damaged, match=f"cauce reset {service.name}"):
            async with running(service, bus=url):
                pass
    for name in [service.name for service in stopped]:
        unasked = await told("reset", name, "--bus", url)
        assert (unasked.exit_code, "say --yes" in unasked.stderr, "place" in unasked.stdout) == (1, True, True)
        done = await told("reset", name, "--bus", url, "--yes")
        assert (done.exit_code, f"Done: start {name} now." in done.stdout) == (0, True), done.output
        again = await told("reset", name, "--bus", url, "--yes", "--json")
        assert (again.exit_code, json.loads(again.stdout)["places"], json.loads(again.stdout)["builds"]) == (0, [], [])
    assert await effects(url) == [("a", 1), ("a", 2), ("b", 1), ("c", 1)]
    async with running(owner, keeper(), bus=url) as bus:
        await bus.settled()
        await bus.settled()
        assert await effects(url) == [("a", 1), ("a", 2), ("b", 1), ("c", 1)]
        assert (await sums(bus), await small(bus, "a"), await small(bus, "c")) == ({"a": 1, "b": 1}, 1, None)
        await grow_all(bus, "d", "a")
        assert (await sums(bus), await small(bus, "a"), await small(bus, "d")) == ({"a": 2, "b": 1, "d": 1}, 2, 1)
    assert await effects(url) == [("a", 1), ("a", 2), ("a", 2), ("b", 1), ("c", 1), ("d", 1)]
    assert (await told("verify", "--bus", url)).exit_code == 0


async def test_from_the_first_all_that_is_there_is_handled_again(backup: Backup) -> None:
    await gone_back(backup)
    assert (await told("reset", "things", "--bus", backup.url, "--yes")).exit_code == 0
    done = await told("reset", "keeper", "--bus", backup.url, "--yes", "--from-first")
    assert (done.exit_code, "to the first entry" in done.stdout) == (0, True)
    async with running(owner, keeper(), bus=backup.url) as bus:
        await bus.settled()
        await bus.settled()
        assert await sums(bus) == {"a": 1, "b": 1}
    assert await effects(backup.url) == [("a", 1), ("a", 1), ("a", 2), ("b", 1), ("b", 1), ("c", 1)]


async def test_what_waits_goes_on_waiting_unless_its_entry_is_lost(
    backup: Backup,
) -> None:
    async with running(owner, keeper("b"), bus=backup.url) as bus:
        await grow_all(bus, "a", "b")
    await asyncio.to_thread(backup.make)
    async with running(owner, keeper("b", "c"), bus=backup.url) as bus:
        await grow_all(bus, "a", "c")
    await asyncio.to_thread(backup.put_back)
    done = json.loads((await told("reset", "keeper", "--bus", backup.url, "--yes", "--json")).stdout)
    assert ([each["stream"] for each in done["dropped"]], done["kept"]["waiting"]) == (["things/c"], 1)
    assert sorted(done["builds"]) == ["Small", "sums"]
    assert [each.stream for each in await waiting_of_keeper(backup.url)] == ["things/b"]


async def waiting_of_keeper(url: str) -> list[Waiting]:
    async with store_of(url, "keeper", [EFFECTS]) as store:
        return await store.waiting("react")


# ---------------------------------------------------------------------------------------------- a log that lost its end


async def test_a_log_whose_end_was_removed_from_its_storage_stops_loudly(each_bus: str, storage: Storage) -> None:
    said = list[tuple[str, int]]()
    async with running(owner, reacting(said), bus=each_bus) as bus:
        await grow_all(bus, "a", "b")
        (last,) = (await bus.facts.read(Filter("things/b"))).entries
        head = await bus.facts.head()
    for position in range(last.position, max(head, last.position + 1)):
        await storage.remove("facts", position)
    with pytest.raises(Damaged, match=r"entries are lost|has lost \d+ entries"):
        async with running(owner, reacting(said), bus=each_bus) as bus:
            await bus.facts.read(after=0)


async def test_a_place_beyond_the_end_goes_to_the_end(each_bus: str) -> None:
    said = list[tuple[str, int]]()
    async with running(owner, reacting(said), bus=each_bus) as bus:
        await grow_all(bus, "a", "b")
    async with backend_at(each_bus) as backend:
        log, head = backend.facts.id, await backend.facts.head()
    await move_places(each_bus, "reacting", "react", to=head + 2)
    with pytest.raises(
        Damaged, match=r"react of reacting has read .* up to .*, the log ends at .*cauce reset reacting"
    ):
        async with running(reacting(said), bus=each_bus):
            pass
    done = json.loads((await told("reset", "reacting", "--bus", each_bus, "--yes", "--json")).stdout)
    assert {(each["was"], each["read"], each["to"]) for each in done["places"]} == {(log, head + 2, head)}
    async with running(owner, reacting(said), bus=each_bus) as bus:
        await grow_all(bus, "a")
    assert sorted(said) == sorted([("a", 1), ("b", 1), ("a", 2)])


async def test_a_place_in_another_log_stays_where_it_was_so_that_what_was_not_handled_is(each_bus: str) -> None:
    said = list[tuple[str, int]]()
    async with running(owner, reacting(said), bus=each_bus) as bus:
        await grow_all(bus, "a", "b")
        (last,) = (await bus.facts.read(Filter("things/b"))).entries
    await move_places(each_bus, "reacting", "react", to=last.position - 1, log="another:facts")
    assert (await told("reset", "reacting", "--bus", each_bus, "--yes")).exit_code == 0
    async with running(owner, reacting(said), bus=each_bus) as bus:
        await bus.settled()
    assert sorted(said) == sorted([("a", 1), ("b", 1), ("b", 1)])


async def test_a_stream_that_was_made_anew_is_another_log(nats: Nats, nats_bus: str, bus_name: str) -> None:
    said = list[tuple[str, int]]()
    async with running(owner, reacting(said), bus=nats_bus) as bus:
        await grow_all(bus, "a", "b")
    for name in ("facts", "commands", "records"):
        config = nats.request(f"$JS.API.STREAM.INFO.{bus_name}_{name}")["config"]
        nats.request(f"$JS.API.STREAM.DELETE.{bus_name}_{name}")
        nats.request(f"$JS.API.STREAM.CREATE.{bus_name}_{name}", config)
    for service in (owner, reacting(said)):
        with pytest.raises(Damaged, match=f"restored.*cauce reset {service.name}"):
            async with running(service, bus=nats_bus):
                pass
        assert (await told("reset", service.name, "--bus", nats_bus, "--yes")).exit_code == 0
    async with running(owner, reacting(said), bus=nats_bus) as bus:
        await grow_all(bus, "a")
    assert sorted(said) == sorted([("a", 1), ("b", 1), ("a", 1)])


async def test_on_postgresql_a_log_that_goes_back_while_it_is_read_stops_who_reads(
    postgres: Postgres, postgres_bus: str, bus_name: str
) -> None:
    with pytest.raises(Damaged, match="put back to an older state"):
        async with running(owner, reacting([]), bus=postgres_bus, drain=0.5) as bus:
            await grow_all(bus, "a", "b")
            for each in ("facts", "commands", "records"):
                postgres.sql(f"update {bus_name}.turns set {each} = {each} / 2")
            with pytest.raises(Damaged, match=r"put back to an older state.*cauce reset"):
                await bus.facts.head()
            with pytest.raises(Damaged, match="put back"):
                await bus.facts.read(after=0)
            await asyncio.wait([bus.failed], timeout=10)
            assert bus.failed.done()


# ---------------------------------------------------------------------------------------- records ahead of their facts


async def test_marks_beyond_the_facts_stop_who_takes_over_so_that_no_stream_is_skipped(each_bus: str) -> None:
    async with running(owner, bus=each_bus) as bus:
        await grow_all(bus, "a")
        head = await bus.facts.head()
    async with backend_at(each_bus) as backend:
        stream, position = f"_written/things/{slot_of('a')}", head + 100
        entry = sealed(stream, "Written", CLOCK.id(), Meta(CLOCK.now(), upto=position), b"{}")
        await backend.records.put(stream, position, entry)
    with pytest.raises(
        Damaged, match=rf"things slot {slot_of('a')} are written up to position {position}, but the facts end"
    ):
        async with running(owner, bus=each_bus):
            pass


async def test_a_record_of_facts_that_are_not_there_is_not_gone_on_from_and_is_told_of(
    each_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(owner, bus=each_bus) as bus:
        await grow_all(bus, *"a" * 60)
    async with backend_at(each_bus) as backend:
        page = await backend.records.read(Filter("things/a"))
        meta = msgspec.structs.replace(page.entries[0].meta, upto=await backend.facts.head() + 50)
        body = b'{"name":"a","n":1000}'
        await backend.records.put("things/a", 70, sealed("things/a", "Thing", CLOCK.id(), meta, body))
    async with running(owner, bus=each_bus) as bus:
        assert (await bus.call(Grow("a"))).version == 61, "decided on what the facts say"
        assert await bus.fetch(Thing, "a") == Thing("a", 61)
        await bus.settled()
    assert "records are ahead of their facts: things/a has one of version 70, but the facts have 61" in caplog.text
    verified = await told("verify", "--bus", each_bus)
    assert (verified.exit_code, "(things/a version 70) was made by the fact at" in verified.stdout) == (5, True)


async def test_a_snapshot_whose_bits_flipped_is_ignored(bus_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running(owner, bus=bus_url) as bus:
        await grow_all(bus, *"a" * 60)
    connection = apsw.Connection(bus_url.partition(":///")[2])
    connection.execute("update records set body = cast(replace(cast(body as text), '60', '61') as blob)")
    connection.close()
    async with running(owner, bus=bus_url) as bus:
        await bus.call(Grow("a"))
        state = await bus.state(Thing, "a")
        assert state is not None
        assert state.n == 61
    assert "the record of things/a is ignored" in caplog.text


# --------------------------------------------------------------------------------------------------- who may reset


async def test_a_service_that_runs_is_not_reset(each_bus: str) -> None:
    said = list[tuple[str, int]]()
    async with running(owner, reacting(said), bus=each_bus) as bus:
        await grow_all(bus, "a")
        refused = await told("reset", "reacting", "--bus", each_bus, "--yes", "--from-first")
        assert (refused.exit_code, "stop it first" in refused.stderr) == (4, True), refused.output
    assert (await told("reset", "reacting", "--bus", each_bus, "--yes", "--from-first")).exit_code == 0


async def test_a_service_without_a_store_is_told_which_there_are(each_bus: str) -> None:
    async with running(owner, bus=each_bus):
        pass
    refused = await told("reset", "nobody", "--bus", each_bus, "--yes")
    assert (refused.exit_code, "service 'nobody' has no store here" in refused.stderr) == (1, True)


async def test_an_instance_that_another_machine_shows_alive_by_its_beat_is_not_run_over(
    each_bus: str,
) -> None:
    async with backend_at(each_bus) as backend:
        store = await backend.stores.open("reacting", keeps=False)
        other = await backend.stores.open("reacting", keeps=False)
        logs = {"facts": backend.facts, "commands": backend.commands, "records": backend.records}
        shelf = backend.stores.shelf("reacting")
        await other.tick("elsewhere", (), join=True)
        beating = asyncio.create_task(beat(other))
        with pytest.raises(Busy, match=r"service 'reacting' runs \(elsewhere\)"):
            await reset("reacting", logs, store, shelf, CLOCK)
        beating.cancel()
        await other.tick("elsewhere", ())
        assert (await planned("reacting", logs, store, shelf)).is_needed is False
        await store.close()
        await other.close()


class Hasty(SystemClock):
    """Whose sleep is over at once, and has taken its time."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        self.ahead += seconds
        await asyncio.sleep(0)


async def test_those_who_died_are_struck_off_at_once_if_that_is_proved_else_when_no_beat_has_come(
    each_bus: str,
) -> None:
    code = "from cauce.clock import SystemClock as C; from cauce.identity import identity; print(identity('reacting', C()))"
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    killed = (await ended.communicate())[0].decode().strip()
    async with backend_at(each_bus) as backend:
        store = await backend.stores.open("reacting", keeps=False)
        logs = {"facts": backend.facts, "commands": backend.commands, "records": backend.records}
        shelf, clock = backend.stores.shelf("reacting"), Hasty()
        for who, least, most in ((killed, 0, 1), ("on another machine", 9, 15)):
            await store.tick(who, (), join=True)
            assert len(await store.take(who, ["slot/1", "slot/2"])) == 2
            store.move(None, "react", "things", 1, "another:facts", 7)
            await store.flush()
            began = clock.monotonic()
            (move,) = (await reset("reacting", logs, store, shelf, clock)).moves
            assert (move.place.position, move.to) == (7, 0)
            assert least <= clock.monotonic() - began <= most + 5
            standing = await store.tick("me", ())
            assert (standing.instances, standing.holders) == ({}, {})
        await store.close()


async def beat(store: Any) -> None:
    while True:
        await asyncio.sleep(0.2)
        await store.tick("elsewhere", ())
