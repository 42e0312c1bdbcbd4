"""The wire of SQLite: sockets, files, strangers, and services behind it. Its promises: `test_wire_promises.py`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cauce import Domain, NoAnswer, OutcomeUnknown, Query, Refused, Rejected, Service, connect, running
from cauce.accept import SLOTS
from cauce.backends import sqlite
from cauce.backends.sqlite import line as line_module
from cauce.backends.sqlite.frames import ALL, MOST, NOT_SERVED, Answer, Broken, Frames, answer, question, read_answer
from cauce.backends.sqlite.registry import Present, Registry
from cauce.cli import main
from cauce.cli.services import summary
from cauce.wire import Instance
from shop import users
from shop.users import ChangeEmail, RegisterUser, User
from tests.wired import CLOCK
from tests.wires import Peer, Start, starter, until

Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: pytest's own are longer than a socket's address may be where several processes run tests."""
    with tempfile.TemporaryDirectory(prefix="cauce-wire-") as folder:
        yield Path(folder)


@pytest.fixture
def peer(program: Program, bus_url: str) -> Start:
    return starter(program, bus_url)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[sqlite.SQLiteBus]:
    bus = await sqlite.open(path)
    try:
        yield bus
    finally:
        await bus.close()


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[sqlite.SQLiteBus]:
    async with opened(tmp_path / "bus.db") as bus:
        yield bus


async def ask(bus: sqlite.SQLiteBus, address: str, payload: bytes, seconds: float = 20.0) -> bytes:
    return await bus.wire.ask(address, payload, CLOCK.monotonic() + seconds)


def files(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "bus.db.d" / "wire"))


# ------------------------------------------------------------------------------------------- questions and answers


async def test_a_thousand_questions_are_in_flight_on_one_connection(bus: sqlite.SQLiteBus, peer: Start) -> None:
    there = await peer("users")
    hanging = [asyncio.ensure_future(ask(bus, "users", b"hang", 30)) for _ in range(3)]
    for _ in hanging:
        assert await there.said() == "began"
    asked = [b"question %d" % n for n in range(1000)]
    assert await asyncio.gather(*(ask(bus, "users", each) for each in asked)) == asked
    sockets = [each for each in os.listdir(f"/proc/{there.process.pid}/fd") if _is_socket(there.process.pid, each)]
    # One listens; the others are this connection, the hint for readers, and what the loop wakes itself by.
    assert len(sockets) <= 6
    for each in hanging:
        each.cancel()


def _is_socket(pid: int, number: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:")
    except OSError:
        return False


async def test_what_is_too_long_is_refused_before_it_is_sent_and_an_answer_that_is_so_is_a_failure(
    bus: sqlite.SQLiteBus, peer: Start
) -> None:
    await peer("users")
    with pytest.raises(Refused, match="at most 4194304"):
        await ask(bus, "users", b"x" * (MOST + 1))
    with pytest.raises(ConnectionError, match="at most 4194304"):
        await ask(bus, "users", b"huge")
    assert await ask(bus, "users", b"still there") == b"still there"


# ------------------------------------------------------------------------------------------------- nobody answers


async def test_an_answer_that_it_is_not_served_any_more_leads_to_the_next(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path
) -> None:
    """What a process says in the folder may be older than what it knows."""
    stale, right = await peer("users/1"), await peer("users/3")
    folder = Registry(tmp_path / "bus.db.d" / "wire", CLOCK)
    folder.look()
    (token,) = (token for token in folder.present if token.startswith(f"{stale.process.pid}-"))
    said = folder.present[token]
    folder.publish(token, Present(said.owner, ("users/1", "users/3"), said.instances))
    folder.close()
    for _ in range(4):
        assert int(await ask(bus, "users/3", b"pid")) == right.process.pid


# ------------------------------------------------------------------------------------------------------ deadlines


# ---------------------------------------------------------------------------------------------------------- death


async def test_what_the_dead_left_is_removed_by_who_comes_next(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path
) -> None:
    dead = await peer("users")
    await dead.does("announce users")
    (instance,) = await bus.wire.instances()
    assert (instance.service, instance.pid, instance.state) == ("users", dead.process.pid, "starting")
    assert len(files(tmp_path)) == 2
    await dead.killed()
    folder = tmp_path / "bus.db.d" / "wire"
    half = folder / "77-abc.sock-new"
    half.touch()
    fresh = folder / "78-abc.json-new"
    fresh.touch()
    alive = await peer("others")
    left = {name.partition("-")[0] for name in files(tmp_path)}
    assert left == {str(alive.process.pid), "77", "78"}, "what may be in the making stays for a while"
    assert await bus.wire.instances() == []


async def test_half_made_files_are_removed_when_they_are_old(
    bus: sqlite.SQLiteBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.backends.sqlite.registry._OLD", -(10**9))
    (tmp_path / "bus.db.d" / "wire" / "77-abc.sock-new").touch()

    async def handler(payload: bytes) -> bytes:
        return payload

    await bus.wire.serve("users", handler)
    assert {name.partition("-")[0] for name in files(tmp_path)} == {str(os.getpid())}


async def test_files_that_somebody_removed_are_made_again_with_the_next_beat(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.backends.sqlite.wire._BEAT", 0.02)

    async def handler(payload: bytes) -> bytes:
        return b"here"

    await bus.wire.serve("users", handler)
    folder = tmp_path / "bus.db.d" / "wire"
    for name in files(tmp_path):
        (folder / name).unlink()
    folder.rmdir()
    await until(lambda: folder.exists() and len(files(tmp_path)) == 2)
    client = """
import asyncio, sys
from cauce.backends import sqlite
from cauce.clock import SystemClock

async def main():
    bus = await sqlite.open(sys.argv[1])
    print((await bus.wire.ask("users", b"", SystemClock().monotonic() + 10)).decode())
    await bus.close()

asyncio.run(main())
"""
    assert await _output(client, tmp_path / "bus.db") == "here\n"


async def _output(text: str, path: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", text, str(path), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_a_sign_of_life_is_given_as_long_as_something_is_served(
    bus: sqlite.SQLiteBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.backends.sqlite.wire._BEAT", 0.02)
    leave = await bus.wire.announce(Instance("users", "a", ("users",), os.getpid()))
    (file,) = (tmp_path / "bus.db.d" / "wire").glob("*.json")
    first = file.stat().st_mtime_ns
    await until(lambda: file.stat().st_mtime_ns != first)
    await bus.wire.announce(Instance("users", "a", ("users",), os.getpid(), "draining"))
    assert [each.state for each in await bus.wire.instances()] == ["draining"]
    leave()
    assert await bus.wire.instances() == []


# --------------------------------------------------------------------------------------------------- bad company


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("!I", MOST + 1),
        struct.pack("!I", 0xFFFFFFFF),
        struct.pack("!I", 0),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack("!IBQ", 9, 1, 7),
        struct.pack("!IBQ", 9, 99, 7),
        struct.pack("!IBQdqH", 27, 1, 7, 1.0, 1, 9999),
        struct.pack("!IBQdqH", 29, 1, 7, 1.0, 1, 2) + b"\xff\xff",
        answer(2, 7, b"no question at all"),
    ],
)
async def test_a_broken_frame_closes_its_connection_and_no_other(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path, garbage: bytes
) -> None:
    there = await peer("users")
    assert await ask(bus, "users", b"before") == b"before"
    reader, writer = await asyncio.open_unix_connection(_socket_of(tmp_path))
    writer.write(garbage)
    async with asyncio.timeout(10):
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
    assert await ask(bus, "users", b"after") == b"after"
    assert there.process.poll() is None


def _socket_of(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "bus.db.d" / "wire").glob("*.sock")
    return found


async def test_a_question_whose_time_is_over_or_is_no_number_is_never_begun(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path
) -> None:
    await peer("users")
    reader, writer = await asyncio.open_unix_connection(_socket_of(tmp_path))
    now = round(CLOCK.monotonic() * 1_000_000)
    writer.write(question(1, 5.0, now - 6_000_000, "users", b"old"))
    writer.write(question(2, float("nan"), now, "users", b"nan"))
    writer.write(question(3, -1.0, now, "users", b"negative"))
    writer.write(question(4, float("inf"), now, "users", b"fresh"))
    async with asyncio.timeout(10):
        assert await reader.readexactly(4 + 9 + 5) == answer(2, 4, b"fresh")
    writer.close()


def test_frames_come_out_as_they_went_in_however_they_are_cut() -> None:
    whole = [answer(2, n, b"x" * n) for n in (0, 1, 100, 70_000)]
    for size in (1, 2, 3, 5, 4096, 1 << 20):
        frames, found, data = Frames(), list[bytes](), b"".join(whole)
        for at in range(0, len(data), size):
            found += frames.feed(data[at : at + size])
        assert found == [frame[4:] for frame in whole]


def test_nothing_is_kept_for_a_length_that_lies() -> None:
    tracemalloc.start()
    try:
        frames = [Frames() for _ in range(100)]
        for each in frames:
            assert each.feed(struct.pack("!IB", MOST, 1)) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000
    with pytest.raises(Broken, match="a frame of 4194305 bytes"):
        Frames().feed(struct.pack("!I", MOST + 1))


async def test_another_user_is_not_talked_to_at_either_end(
    bus: sqlite.SQLiteBus,
    peer: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    there = await peer("users")

    async def handler(payload: bytes) -> bytes:
        return payload

    leave = await bus.wire.serve("others", handler)
    ours = next(each for each in (tmp_path / "bus.db.d" / "wire").glob(f"{os.getpid()}-*.sock"))
    # As if all the others ran as user 12345, not as this one, and not as root.
    monkeypatch.setattr(line_module, "_CREDENTIALS", _Stranger)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(NoAnswer):
            await ask(bus, "users", b"pid", 0.2)
        reader, writer = await asyncio.open_unix_connection(ours)
        writer.write(question(1, 5.0, round(CLOCK.monotonic() * 1_000_000), "others", b"a"))
        async with asyncio.timeout(10):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
    assert f"process {there.process.pid} of user 12345 is at the wire" in caplog.text
    assert f"process {os.getpid()} of user 12345" in caplog.text
    monkeypatch.undo()
    assert int(await ask(bus, "users", b"pid")) == there.process.pid
    leave()


class _Stranger:
    size = struct.calcsize("3i")

    @staticmethod
    def unpack(data: bytes) -> tuple[int, int, int]:
        pid, _, _ = struct.unpack("3i", data)
        return pid, 12345, 12345


async def test_files_that_say_nothing_readable_are_passed_over(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path
) -> None:
    there = await peer("users")
    folder = tmp_path / "bus.db.d" / "wire"
    (folder / "1-a.json").write_text("{")
    (folder / "2-a.json").write_text('{"owner": 7}')
    (folder / "3-a.json").symlink_to(tmp_path / "bus.db")
    (folder / "4-a.json").mkdir()
    assert int(await ask(bus, "users", b"pid")) == there.process.pid


async def test_the_folder_is_for_its_owner_only_and_a_deep_one_works_too(peer: Start, tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    there = await peer("users", url=f"sqlite:///{deep / 'bus.db'}")
    async with opened(deep / "bus.db") as bus:
        assert int(await ask(bus, "users", b"pid")) == there.process.pid
    folder = deep / "bus.db.d" / "wire"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(each.stat().st_mode & 0o077 == 0 for each in folder.glob("*.json"))


async def test_a_process_that_takes_no_connections_now_is_no_answer_and_stays_in_the_registry(
    bus: sqlite.SQLiteBus, peer: Start, tmp_path: Path
) -> None:
    there = await peer("users")
    await there.stops()
    waiting = list[socket.socket]()
    try:
        while True:
            each = socket.socket(socket.AF_UNIX)
            each.setblocking(False)
            waiting.append(each)
            each.connect(str(_socket_of(tmp_path)))
    except BlockingIOError:
        pass
    with pytest.raises(NoAnswer):
        await ask(bus, "users", b"pid")
    there.goes_on()
    for each in waiting:
        each.close()
    assert int(await ask(bus, "users", b"pid")) == there.process.pid


async def test_what_was_asked_and_not_read_by_who_leaves_is_known_not_to_have_run(tmp_path: Path) -> None:
    asked = list[bytes]()

    async def handler(payload: bytes) -> bytes:
        asked.append(payload)
        return payload

    bus = await sqlite.open(tmp_path / "bus.db")
    await bus.wire.serve("users", handler)
    reader, writer = await asyncio.open_unix_connection(_socket_of(tmp_path))
    frames, told = Frames(), list[Answer]()

    async def read() -> None:
        while data := await reader.read(1 << 16):
            told.extend(read_answer(each) for each in frames.feed(data))
            if told[-1].id == ALL:
                return

    def ask(id: int) -> bytes:
        return question(id, 5.0, round(CLOCK.monotonic() * 1_000_000), "users", b"%d" % id)

    writer.write(ask(1))
    reading = asyncio.create_task(read())
    await until(lambda: len(told) == 1)
    writer.write(ask(2))
    closing = asyncio.create_task(bus.close())
    await asyncio.wait_for(reading, 5)
    # Whoever does not listen to that may still ask.
    assert {(each.kind, each.id) for each in told[1:]} <= {(NOT_SERVED, 2), (NOT_SERVED, ALL)}
    assert asked == [b"1"]
    writer.close()
    await asyncio.wait_for(closing, 0.9)


# ------------------------------------------------------------------------------------------------------- services

SHOP = """
import asyncio, sys
from cauce import running
from shop import users

async def main():
    async with running(users.service, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
def shop(program: Program, bus_url: str) -> Callable[[], Coroutine[Any, Any, Peer]]:
    async def start() -> Peer:
        there = Peer(program(SHOP, bus_url))
        assert await there.said() == "ready"
        return there

    return start


async def test_a_client_calls_fetches_and_asks_a_service_in_another_process(
    shop: Callable[[], Coroutine[Any, Any, Peer]], bus_url: str, tmp_path: Path
) -> None:
    await shop()
    async with connect(bus_url) as client:
        receipts = await asyncio.gather(
            *(client.call(RegisterUser(str(n), "Ana", f"{n}@example.org"), by="web:eva") for n in range(50))
        )
        assert [each.version for each in receipts] == [1] * 50
        with pytest.raises(Rejected, match="already registered"):
            await client.call(RegisterUser("7", "Ana", "ana@example.org"))
        assert await client.fetch(User, "7") == User("7", "Ana", "7@example.org")
        changed = await client.call(ChangeEmail("7", "new@example.org"))
        assert await client.call(ChangeEmail("7", "new@example.org"), id=changed.id) == changed
        assert await client.state(User, "7", at=1) == User("7", "Ana", "7@example.org")
        assert len(files(tmp_path)) == 2, "a client leaves no files"
        (instance,) = await client.wire.instances()
        assert instance.addresses == ("users", *(f"users/{slot}" for slot in range(SLOTS)))


async def test_an_owner_killed_in_the_middle_is_outcome_unknown_for_a_call_and_no_answer_for_the_rest(
    program: Program, bus_url: str
) -> None:
    there = Peer(program(SLOW, bus_url))
    assert await there.said() == "ready"
    async with connect(bus_url) as client:
        call = asyncio.ensure_future(client.call(RegisterUser("1", "Ana", "a@example.org"), id="mine"))
        question = asyncio.ensure_future(client.ask(Ping()))
        assert {await there.said(), await there.said()} == {"deciding", "answering"}
        await there.killed()
        with pytest.raises(OutcomeUnknown, match="RegisterUser for users/1 .*went away.*id='mine'") as unknown:
            await call
        assert unknown.value.id == "mine"
        with pytest.raises(NoAnswer, match="pings did not answer Ping: .*went away"):
            await question
        with pytest.raises(NoAnswer):
            await client.call(RegisterUser("1", "Ana", "a@example.org"))
        async with running(users.service, bus=bus_url):
            assert (await client.call(RegisterUser("1", "Ana", "a@example.org"), id="mine")).version == 1


pings = Domain("pings")


class Ping(Query[int], domain=pings):
    pass


SLOW = """
import asyncio, sys
from cauce import Domain, Query, Service, running
from shop.users import RegisterUser, User, UserRegistered, users

service = Service("users", owns=users)
pings = Domain("pings")

class Ping(Query[int], domain=pings):
    pass

pinged = Service("pinged", owns=pings)

@service.decide
async def register(user: User | None, command: RegisterUser) -> UserRegistered:
    print("deciding", flush=True)
    await asyncio.Event().wait()
    raise AssertionError

@pinged.answer
async def ping(query: Ping) -> int:
    print("answering", flush=True)
    await asyncio.Event().wait()
    return 1

@service.evolve
def registered(user: User | None, event: UserRegistered) -> User:
    return User(event.user_id, event.name, event.email)

async def main():
    async with running(service, pinged, bus=sys.argv[1]):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_is_asked_when_the_owner_ends_in_good_order_is_answered_or_known_not_to_have_run(
    shop: Callable[[], Coroutine[Any, Any, Peer]], bus_url: str
) -> None:
    there = await shop()
    async with connect(bus_url) as client:
        await client.call(RegisterUser("first", "Ana", "a@example.org"))
        calls = [asyncio.ensure_future(client.call(RegisterUser(str(n), "Ana", "a@example.org"))) for n in range(300)]
        await asyncio.sleep(0)
        assert there.process.stdin is not None
        there.process.stdin.close()
        there.process.stdin = None
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(not isinstance(each, BaseException) or isinstance(each, NoAnswer) for each in results), results
        assert await asyncio.to_thread(there.process.wait) == 0
        accepted = sum(not isinstance(each, BaseException) for each in results)
        assert len([each for each in (await client.facts.read()).entries if each.domain == "users"]) == 1 + accepted


# ---------------------------------------------------------------------------------------------------- command line


async def told(url: str, *arguments: str) -> str:
    command = ["services", "--bus", url, *arguments]
    # The command has a loop of its own.
    result = await asyncio.to_thread(CliRunner().invoke, main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_services_says_who_runs_in_all_processes(
    shop: Callable[[], Coroutine[Any, Any, Peer]], bus_url: str
) -> None:
    there = await shop()
    name, line = (await told(bus_url)).splitlines()
    assert name == "users"
    assert line.split()[:7] == ["running", "-", str(there.process.pid), "0", "asked", "0", "waiting"]
    assert re.search(r"  up +\d+\.\ds  beat +\d+\.\ds ago  users 0-15$", line)
    assert len(line) <= 100
    (found,) = json.loads(await told(bus_url, "--json"))["services"]
    assert (found["service"], found["state"], found["pid"]) == ("users", "running", there.process.pid)
    assert found["addresses"] == ["users", *(f"users/{slot}" for slot in range(SLOTS))]
    assert 0 <= found["quiet"] < 30
    assert found["since"].endswith("+00:00")
    await there.killed()
    assert await told(bus_url) == "nothing runs here\n"
    assert json.loads(await told(bus_url, "--json")) == {"services": []}


async def test_services_shows_no_character_that_a_terminal_would_obey(bus: sqlite.SQLiteBus, tmp_path: Path) -> None:
    await bus.wire.announce(Instance("evil\x1b[31m", "a", ("users", "\u202eabc/1"), 1, "draining", 1))
    said = await told(f"sqlite:///{tmp_path / 'bus.db'}")
    assert "evil\\x1b[31m" in said
    assert "draining" in said
    assert "\x1b" not in said
    assert "\u202e" not in said


def test_services_on_a_bus_that_is_not_there_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["services", "--bus", f"sqlite:///{tmp_path / 'bus.db'}"])
    assert result.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_slots_are_told_in_few_words() -> None:
    assert summary(["users", *(f"users/{slot}" for slot in range(16))]) == "users 0-15"
    assert summary(["users/7", "users/0", "users/1", "users/2", "talk", "cards/3"]) == "users 0-2,7, talk, cards 3"
    assert summary([]) == ""


async def test_a_service_that_serves_no_domain_is_announced_too(bus_url: str) -> None:
    async with running(Service("quiet"), bus=bus_url):
        assert (await told(bus_url)).split()[:4] == ["quiet", "running", "-", str(os.getpid())]
    assert await told(bus_url) == "nothing runs here\n"


async def test_of_two_who_serve_an_address_the_one_without_a_sign_of_life_is_asked_last(
    bus: sqlite.SQLiteBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = bus.wire._board.registry
    quiet = {"1-a"}
    monkeypatch.setattr(registry, "look", lambda: None)
    monkeypatch.setattr(registry, "is_quiet", lambda token: token in quiet)
    registry._serving["users/3"] = ["1-a", "2-b"]
    registry.present = {
        "1-a": Present("", ("users/3",)),
        "2-b": Present("", ("users/3",)),
        "3-c": Present("", ("users/4",)),
    }
    board = bus.wire._board
    assert [list(board._candidates("users/3", late=False)) for _ in range(3)] == [["2-b"]] * 3
    quiet.add("2-b")
    assert list(board._candidates("users/3", late=False)) == [], "3-c may be taking over"
    assert sorted(board._candidates("users/3", late=True)) == ["1-a", "2-b"]
    quiet.add("3-c")
    assert sorted(board._candidates("users/3", late=False)) == ["1-a", "2-b"], "nobody else will"
