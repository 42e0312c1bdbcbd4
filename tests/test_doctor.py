"""`cauce doctor` finds each thing by which a backend would not keep a promise, and a start warns of the same."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import pytest
from click.testing import CliRunner, Result

from cauce import Refused, Service, running
from cauce.backends import examine, open_backend, without_password
from cauce.backends.health import Finding, Health, warn
from cauce.backends.nats import health as nats_health
from cauce.backends.nats import link as nats_link
from cauce.backends.nats.client import Client
from cauce.backends.postgres import health as postgres_health
from cauce.backends.postgres import link as postgres_link
from cauce.backends.sqlite import file as sqlite_file
from cauce.backends.sqlite import health as sqlite_health
from cauce.backends.sqlite.health import file_system
from cauce.cli import main
from cauce.clock import SystemClock
from tests.servers import Missing, Nats, NatsCluster, Postgres, absent
from tests.servers.process import until

CLOCK = SystemClock()


def doctor(url: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--bus", url, *options], catch_exceptions=False)


def told(url: str, code: int = 6) -> dict[str, Any]:
    """What doctor says as JSON."""
    result = doctor(url, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["ok"] == (code == 0)
    return found


def findings(url: str) -> dict[str, tuple[str, str]]:
    """What is found, as {what: (how it is, how it has to be)}."""
    found = told(url)["findings"]
    assert all(each["promise"] and each["cure"] for each in found)
    return {each["what"]: (each["found"], each["needed"]) for each in found}


def make(url: str, *services: str) -> None:
    """A bus, with the stores of services."""

    async def opened() -> None:
        backend = await open_backend(url, CLOCK)
        for each in services:
            store = await backend.stores.open(each, keeps=False)
            await store.close()
        await backend.close()

    asyncio.run(opened())


async def warnings(url: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a start of services warns of."""
    with caplog.at_level(logging.WARNING, "cauce"):
        async with running(Service("idle"), bus=url):
            pass
    return [record.getMessage() for record in caplog.records if "At stake" in record.getMessage()]


def started(start: Callable[[], Any]) -> Any:
    try:
        return start()
    except Missing as missing:
        absent(missing)


# ------------------------------------------------------------------------------------------------ what all have alike


def test_a_bus_that_is_set_up_well_is_ok_and_its_settings_are_told(each_bus: str, backend: str) -> None:
    url = f"{each_bus}&sync=always" if backend == "nats" else each_bus
    make(url, "idle")
    found = told(url, 0)
    assert (found["backend"], found["findings"]) == (backend, [])
    settings: dict[str, dict[str, object]] = {
        "sqlite": {"journal_mode": "wal", "synchronous": "full", "mode of bus.db": "0600", "mode of bus.db.d": "0700"},
        "postgresql": {"full_page_writes": "on (default)", "synchronous_commit": "on (said by Cauce)", "format": 2},
        "nats": {"replicas": "1", "storage": "file", "sync_interval": "always, as the address says", "cluster": "none"},
    }
    assert settings[backend].items() <= found["seen"].items()
    text = doctor(url)
    assert text.exit_code == 0
    assert text.stdout.endswith("ok: as the promises need it\n")


async def test_a_start_on_a_bus_that_is_set_up_well_warns_of_nothing(
    each_bus: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert await warnings(f"{each_bus}&sync=always" if backend == "nats" else each_bus, caplog) == []


@pytest.mark.parametrize("backend", ["postgresql", "nats"])
def test_where_there_is_no_bus_none_is_made(each_bus: str) -> None:
    for _ in range(2):
        result = doctor(each_bus)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "there is no bus at" in result.stderr


@pytest.mark.parametrize("url", ["postgresql://joe:secret@127.0.0.1:9/x", "nats://joe:secret@127.0.0.1:9/x"])
def test_a_server_that_is_away_ends_with_4_and_tells_no_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_health, "connect", partial(nats_link.connect, patience=0.3))
    result = doctor(url, "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]) == (4, "Unreachable")
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://joe:secret@h/d", "postgresql://joe:…@h/d"),
        ("postgresql://h/d?user=joe&password=secret&schema=x", "postgresql://h/d?user=joe&password=…&schema=x"),
        ("nats://token@h/b", "nats://…@h/b"),
        ("postgresql://joe@h/d", "postgresql://joe@h/d"),
        ("nats://h/b?replicas=3", "nats://h/b?replicas=3"),
    ],
)
def test_an_address_is_shown_without_what_lets_somebody_in(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("error", [Refused("may not be seen"), OSError("may not be seen")])
async def test_a_backend_that_cannot_be_examined_is_no_reason_not_to_start(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent:
        async def health(self) -> Health:
            raise error

    await warn(Silent())
    assert "could not be seen (may not be seen): run cauce doctor" in caplog.text


def test_what_is_told_fits_a_terminal_and_commands_none(bus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(bus_url)
    wrong = Finding("a\x1b[31m", "b\n", "c", "word " * 40, "word " * 40)
    monkeypatch.setattr(sqlite_health, "_library", lambda version: iter([wrong]))
    lines = doctor(bus_url).stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "  a\\x1b[31m: b\\n, needed: c" in lines
    assert lines[-1] == "1 finding"
    assert "\x1b" not in doctor(bus_url).stdout


# -------------------------------------------------------------------------------------------------------------- SQLite


def _chmod(name: str, mode: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, _: os.chmod(folder / name, mode)


def _set(module: Any, name: str, value: Any) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setattr(module, name, value)


def _mounted(kind: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = str(folder).replace(" ", "\\040")
        (folder / "mounts").write_text(
            f"/dev/a / ext4 rw 0 0\nsrv:/b {place} {kind} rw 0 0\n/dev/c {place}x xfs rw 0 0\n"
        )
        monkeypatch.setattr(sqlite_health, "_MOUNTS", folder / "mounts")
        monkeypatch.setattr(tempfile, "gettempdir", lambda: "/nowhere")

    return mount


def _unwal(folder: Path, _: pytest.MonkeyPatch) -> None:
    connection = apsw.Connection(str(folder / "bus.db"))
    assert connection.pragma("journal_mode", "delete") == "delete"
    connection.close()


_NORMAL = tuple(each.replace("synchronous = full", "synchronous = normal") for each in sqlite_file._PRAGMAS)


@pytest.mark.parametrize(
    ("harm", "what", "found"),
    [
        (_chmod("bus.db", 0o644), "mode of {}/bus.db", "0644"),
        (_chmod("bus.db.d", 0o755), "mode of {}/bus.db.d", "0755"),
        (_chmod("", 0o777), "mode of {}", "0777"),
        (_unwal, "journal_mode", "delete"),
        (_set(sqlite_file, "_PRAGMAS", _NORMAL), "synchronous", "normal"),
        (_set(apsw, "sqlitelibversion", lambda: "3.40.1"), "SQLite", "3.40.1"),
        (_mounted("nfs4"), "file system of {}/bus.db", "nfs4"),
        (_mounted("fuse.sshfs"), "file system of {}/bus.db", "fuse.sshfs"),
        (_mounted("tmpfs"), "file system of {}/bus.db", "tmpfs, which is memory"),
        (_set(sqlite_health, "_ROOM", 2**60), "room at {}", None),
    ],
)
def test_what_weakens_a_promise_of_a_file_is_found(
    harm: Callable[[Path, pytest.MonkeyPatch], None], what: str, found: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "a folder"
    url = f"sqlite:///{folder}/bus.db"
    make(url)
    told(url, 0)
    harm(folder, monkeypatch)
    (first, (how, _)), *more = findings(url).items()
    assert first == what.format(folder)
    assert found in (None, how)
    # SQLite gives the files beside a database the mode of the database.
    assert [each for each, _ in more if not each.startswith(f"{first}-")] == []


def test_the_next_start_sets_the_journal_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    make(url)
    _unwal(tmp_path, monkeypatch)
    told(url)
    make(url)
    told(url, 0)


def test_a_file_in_the_folder_for_temporary_files_may_lie_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(f"sqlite:///{tmp_path}/bus.db")
    _mounted("tmpfs")(tmp_path, monkeypatch)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert told(f"sqlite:///{tmp_path}/bus.db", 0)["seen"]["file system"] == "tmpfs"


def test_where_the_system_does_not_tell_its_mounts_the_file_system_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_health, "_MOUNTS", tmp_path / "none")
    assert file_system(tmp_path) == ""


async def test_a_start_warns_of_a_file_that_others_may_read(
    bus_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(bus=bus_url):
        pass
    (tmp_path / "bus.db").chmod(0o644)
    first, *_ = await warnings(bus_url, caplog)
    assert first.startswith(f"mode of {tmp_path}/bus.db is 0644, needed is 0600. At stake: ")
    assert first.endswith(f"Cure: chmod 600 {tmp_path}/bus.db")


def test_doctor_runs_beside_a_service_that_writes(bus_url: str) -> None:
    async def both() -> Health:
        async with running(Service("idle"), bus=bus_url):
            return await examine(bus_url, CLOCK)

    assert asyncio.run(both()).ok


# ---------------------------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def careless() -> Iterator[Postgres]:
    """A server that does not flush."""
    server: Postgres = started(lambda: Postgres(fsync="off", full_page_writes="off"))
    yield server
    server.remove()


async def test_a_server_that_does_not_flush_is_found_and_warned_of_and_still_taken(
    careless: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    told_at_start = await warnings(careless.url(), caplog)
    assert [each.partition(",")[0] for each in told_at_start] == ["fsync is off", "full_page_writes is off"]
    health = await examine(careless.url(), CLOCK)
    assert [(each.what, each.found, each.needed) for each in health.findings] == [
        ("fsync", "off", "on"),
        ("full_page_writes", "off", "on"),
    ]
    assert (await asyncio.to_thread(doctor, careless.url())).exit_code == 6


def test_what_a_role_says_of_synchronous_commit_is_overruled(
    postgres: Postgres, postgres_bus: str, bus_name: str
) -> None:
    make(postgres_bus)
    postgres.sql(f"create role {bus_name} superuser login", f"alter role {bus_name} set synchronous_commit = off")
    try:
        seen = told(postgres.url(schema=bus_name, user=bus_name), 0)["seen"]
        assert seen["synchronous_commit"] == "on (said by Cauce)"
    finally:
        postgres.sql(f"drop role {bus_name}")


def test_synchronous_commit_that_something_between_turned_off_is_found(
    postgres_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(postgres_bus)
    monkeypatch.setitem(postgres_link._SETTINGS, "synchronous_commit", "off")
    assert findings(postgres_bus) == {"synchronous_commit": ("off", "on")}


def test_tables_that_a_crash_empties_are_found(postgres: Postgres, postgres_bus: str, bus_name: str) -> None:
    make(postgres_bus, "idle")
    tables = [f"{bus_name}.facts", f"{bus_name}_idle.cauce_waiting"]
    postgres.sql(*(f"alter table {each} set unlogged" for each in tables))
    try:
        assert findings(postgres_bus) == {f"table {each}": ("unlogged", "logged") for each in tables}
    finally:
        postgres.drop(f"{bus_name}_idle")


def test_rights_that_a_role_lacks_are_found(postgres: Postgres, postgres_bus: str, bus_name: str) -> None:
    make(postgres_bus)
    ((function,),) = postgres.sql(
        f"select oid::regprocedure from pg_proc where pronamespace = '{bus_name}'::regnamespace and proname = 'take_turn'"
    )
    postgres.sql(
        f"create role {bus_name} login",
        f"grant usage on schema {bus_name} to {bus_name}",
        f"grant select, insert, update, delete on all tables in schema {bus_name} to {bus_name}",
        f"revoke insert, update on {bus_name}.facts from {bus_name}",
        f"revoke execute on function {function} from public",
    )
    try:
        assert findings(postgres.url(schema=bus_name, user=bus_name)) == {
            f"role {bus_name} on {bus_name}.facts": ("without insert, update", "with insert, update"),
            f"role {bus_name} on {bus_name}.take_turn": ("without execute", "with execute"),
        }
    finally:
        postgres.sql(f"drop owned by {bus_name}", f"drop role {bus_name}")


def test_a_schema_of_older_code_is_found_and_of_newer_code_is_refused(
    postgres: Postgres, postgres_bus: str, bus_name: str
) -> None:
    make(postgres_bus)
    postgres.sql(f"delete from {bus_name}.steps where number = 2")
    assert findings(postgres_bus) == {f"format of schema {bus_name}": ("1", "2")}
    postgres.sql(f"insert into {bus_name}.steps (number, name) values (99, 'later')")
    result = doctor(postgres_bus)
    assert result.exit_code == 1
    assert "deploy newer code" in result.stderr


async def test_a_pooler_that_deals_out_sessions_is_found(postgres_bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = await open_backend(postgres_bus, CLOCK)
    await backend.close()
    session = await asyncpg.connect(without_schema(postgres_bus))

    class Dealt:
        """What a pooler gives to two that ask one after the other: the same session of the server."""

        async def fetchval(self, query: str) -> Any:
            return await session.fetchval(query)

        async def close(self) -> None:
            pass

    async def dealt(link: Any, role: str) -> Dealt:
        return Dealt()

    monkeypatch.setattr(postgres_link.Link, "dedicated", dealt)
    health = await examine(postgres_bus, CLOCK)
    await session.close()
    assert [each.what for each in health.findings] == ["sessions"]


async def test_transactions_that_stay_open_are_told_of(postgres_bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = await open_backend(postgres_bus, CLOCK)
    await backend.close()
    monkeypatch.setattr(postgres_health, "_LONG", postgres_health._LONG.replace("10 seconds", "0 seconds"))
    session = await asyncpg.connect(without_schema(postgres_bus), server_settings={"application_name": "idler"})
    await session.execute("begin")
    pid = await session.fetchval("select pg_backend_pid()")
    health = await examine(postgres_bus, CLOCK)
    await session.close()
    assert f"process {pid} (idler, idle in transaction) for 0 s" in str(health.seen["open transactions"])
    assert health.ok


def without_schema(url: str) -> str:
    return url.partition("?")[0]


# ---------------------------------------------------------------------------------------------------------------- NATS


TOLD = """
system_account: SYS
accounts {
  SYS { exports: [{service: "$SYS.REQ.SERVER.PING.JSZ", response_type: stream}] }
  APP { jetstream: enabled, users: [{user: app, password: app}]
        imports: [{service: {account: SYS, subject: "$SYS.REQ.SERVER.PING.JSZ"}}] }
}
"""
LOGIN = ("app", "app")


async def test_when_a_server_flushes_is_asked_for_until_the_address_says_it(
    nats_bus: str, caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = await warnings(nats_bus, caplog)
    assert warning.startswith("sync_interval of server nats is unknown (a client is not told), needed is always")
    assert "?sync=always" in warning
    assert [each.what for each in (await examine(nats_bus, CLOCK)).findings] == ["sync_interval of server nats"]
    assert (await examine(f"{nats_bus}?sync=always", CLOCK)).ok


@pytest.mark.parametrize("word", ["2m", "yes"])
def test_a_server_that_flushes_later_cannot_be_talked_right(word: str, nats_bus: str) -> None:
    result = doctor(f"{nats_bus}?sync={word}")
    assert result.exit_code == 1
    assert "say sync=always where all servers have sync_interval: always, else nothing" in result.stderr


@pytest.mark.parametrize("sync", ["always", None])
def test_where_the_account_may_see_it_the_server_itself_says_when_it_flushes(sync: str | None) -> None:
    server: Nats = started(lambda: Nats(name="told", sync=sync, config=TOLD, login=LOGIN))
    try:
        url = server.url("b", login=LOGIN)
        make(url)
        if sync:
            assert told(url, 0)["seen"]["sync_interval"] == "always"
        else:
            # Whatever the address says.
            for each in (url, f"{url}?sync=always"):
                assert findings(each) == {"sync_interval of server told": ("every 120 s", "always")}
    finally:
        server.remove()


def changed(nats: Nats, stream: str, **settings: object) -> None:
    """A stream that was made by somebody else, with other settings."""
    config = nats.request(f"$JS.API.STREAM.INFO.{stream}")["config"]
    nats.request(f"$JS.API.STREAM.DELETE.{stream}")
    assert "error" not in nats.request(f"$JS.API.STREAM.CREATE.{stream}", config | settings)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"storage": "memory"}, {"storage": ("'memory'", "'file'")}),
        ({"max_age": 3600 * 10**9, "max_msgs": 9}, {"max_age": (str(3600 * 10**9), "0"), "max_msgs": ("9", "-1")}),
        ({"max_msg_size": 1000}, {"max_msg_size": ("1000", "-1")}),
    ],
)
async def test_a_stream_that_would_break_a_promise_silently_is_found_and_no_service_starts(
    settings: dict[str, object], wrong: dict[str, tuple[str, str]], nats: Nats, nats_bus: str, bus_name: str
) -> None:
    url = f"{nats_bus}?sync=always"
    await (await open_backend(url, CLOCK)).close()
    changed(nats, f"{bus_name}_facts", **settings)
    health = await examine(url, CLOCK)
    assert {each.what: (each.found, each.needed) for each in health.findings} == {
        f"{name} of stream {bus_name}_facts": each for name, each in wrong.items()
    }
    with pytest.raises(Refused, match="which would break what facts promise without a word"):
        await open_backend(url, CLOCK)


def test_facts_that_somebody_could_delete_are_found(nats: Nats, nats_bus: str, bus_name: str) -> None:
    make(f"{nats_bus}?sync=always")
    changed(nats, f"{bus_name}_facts", deny_delete=False, deny_purge=False)
    assert findings(f"{nats_bus}?sync=always") == {
        f"{name} of stream {bus_name}_facts": ("False", "True") for name in ("deny_delete", "deny_purge")
    }


def test_fewer_replicas_than_the_address_asks_for_are_found(nats_bus: str, bus_name: str) -> None:
    make(f"{nats_bus}?sync=always", "idle")
    streams = ("facts", "commands", "records", "leases", "store_idle")
    names = ", ".join(f"{bus_name}_{each}" for each in streams)
    assert findings(f"{nats_bus}?sync=always&replicas=3") == {f"replicas of {names}": ("1", "3")}


def test_one_replica_in_a_cluster_is_found(nats_cluster: NatsCluster, bus_name: str) -> None:
    few, enough = (f"{nats_cluster.url(f'{bus_name}{n}', replicas=n)}&sync=always" for n in (1, 3))
    for url in (few, enough):
        make(url)
    try:
        ((what, how),) = findings(few).items()
        assert (what.partition(",")[0], how) == (f"replicas of {bus_name}1_facts", ("1", "3"))
        assert told(enough, 0)["seen"]["servers"] == "n0, n1, n2"
    finally:
        nats_cluster.drop(bus_name)


def test_a_server_of_a_cluster_that_is_away_is_found(nats_cluster: NatsCluster, bus_name: str) -> None:
    url = f"{nats_cluster.url(bus_name)}&sync=always"
    make(url)
    nats_cluster.whole(f"{bus_name}_facts")
    leader = nats_cluster.leader_of(f"{bus_name}_facts")
    victim = next(n for n in range(3) if n != leader)
    nats_cluster.servers[victim].stop()
    try:
        until(lambda: doctor(url).exit_code == 6, "doctor to find it", nats_cluster.log)
        assert (f"server n{victim}", ("away", "there")) in findings(url).items()
    finally:
        nats_cluster.whole()
        nats_cluster.drop(bus_name)


def test_a_server_that_anybody_may_write_to_from_elsewhere_is_found(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(nats_bus)
    monkeypatch.setattr(Client, "peer", "192.0.2.7")
    assert findings(f"{nats_bus}?sync=always") == {
        "authorization": ("none", "a user for each service"),
        "encryption of the connection to 192.0.2.7": ("none", "TLS"),
    }


def test_a_server_that_takes_too_little_is_found() -> None:
    server: Nats = started(lambda: Nats(name="small"))
    try:
        url = f"{server.url('b')}?sync=always"
        make(url)
        server.config = "max_payload: 512KB"
        server.restart()
        assert findings(url) == {"max_payload": ("524,288", "848,304 or more")}
    finally:
        server.remove()
