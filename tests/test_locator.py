"""The service locator: who is found, in which order, what is known when nobody can look, and who answers then."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import msgspec
import pytest

from cauce import Domain, OutcomeUnknown, Query, Refused, Service, connect, running
from cauce.backends.present import Present, instances_of, read
from cauce.backends.spread import Lost, NotServed, Spread
from cauce.backends.sqlite.wire import present
from cauce.clock import SystemClock
from cauce.errors import Unavailable
from cauce.testing import VirtualClock, VirtualLoop
from cauce.wire import Instance, Load, healthy_first, is_well, located
from shop.users import RegisterUser, User
from tests.servers import Missing, Nats, Postgres, absent
from tests.wired import CLOCK, wire_at
from tests.wires import Peer, SQLitePlace, ask, starter, until

Program = Callable[..., Popen[str]]

pings = Domain("pings")


class Ping(Query[int], domain=pings):
    last: str = ""


SERVICES = """
import asyncio, os, sys
from cauce import Domain, Query, Service, running
from cauce.commander import Commander
from shop.users import RegisterUser, User, UserRegistered, users

service = Service("users", owns=users, version="1.4.2")
pings = Domain("pings")

class Ping(Query[int], domain=pings):
    last: str = ""

pinged = Service("pinged", owns=pings, version="2026-11")

@service.decide
def register(user: User | None, command: RegisterUser) -> UserRegistered:
    return UserRegistered(command.user_id, command.name, command.email)

@service.evolve
def registered(user: User | None, event: UserRegistered) -> User:
    return User(event.user_id, event.name, event.email)

def once(flag):
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os._exit(1)

@pinged.answer
async def ping(query: Ping) -> int:
    if query.last:
        once(query.last)
    return os.getpid()

called = Commander.call

async def call(self, ask):
    receipt = await called(self, ask)
    if len(sys.argv) > 2:
        once(sys.argv[2])
    return receipt

Commander.call = call

async def main():
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with running(service, pinged, bus=sys.argv[1]):
        print("ready", flush=True)
        await lines.readline()
    print("ended", flush=True)
    await lines.readline()

asyncio.run(main())
"""


async def begun(program: Program, url: str, *arguments: str) -> Peer:
    there = Peer(program(SERVICES, url, *arguments))
    assert await there.said() == "ready"
    return there


# ---------------------------------------------------------------------------------------------------------- locate


async def test_a_service_is_located_by_its_name_or_its_domain_with_all_that_it_tells(
    program: Program, each_bus: str
) -> None:
    there = await begun(program, each_bus)
    async with connect(each_bus) as client:
        (found,) = await client.locate("pinged")
        assert (found.service, found.version, found.state, found.pid) == (
            "pinged",
            "2026-11",
            "running",
            there.process.pid,
        )
        assert (found.addresses, found.answers, found.decides) == (("pings",), ("Ping",), ())
        assert found.host
        assert not found.stale
        assert is_well(found, CLOCK.now())
        assert [each.id for each in await client.locate("pings")] == [found.id]
        (users,) = await client.locate("users")
        assert (users.version, users.answers, users.decides) == ("1.4.2", (), ("RegisterUser",))
        assert {each.service for each in await client.locate()} == {"users", "pinged"}
        assert await client.locate("nobody") == []


async def test_a_graceful_stop_is_seen_from_another_process_at_once(program: Program, each_bus: str) -> None:
    there = await begun(program, each_bus)
    async with connect(each_bus) as client:
        assert len(await client.locate()) == 2
        assert there.process.stdin is not None
        there.process.stdin.write("\n")
        there.process.stdin.flush()
        assert await there.said() == "ended"
        assert there.process.poll() is None, "what was listed would be dead, and not have left"
        assert await client.locate() == []


def test_the_healthy_come_first_and_of_these_the_one_with_the_least_to_do() -> None:
    now = 100_000_000
    each = {
        name: Instance("users", name, ("users", "users/1"), state=state, beat=beat, load=Load(*load))  # type: ignore[arg-type]
        for name, state, beat, load in (
            ("draining", "draining", now, (0, 0)),
            ("quiet", "running", now - 6_000_001, (0, 0)),
            ("busy", "running", now - 6_000_000, (3, 4)),
            ("idle", "running", now, (0, 1)),
        )
    }
    assert [found.id for found in healthy_first(each.values(), now)] == ["idle", "busy", "quiet", "draining"]
    assert located(each.values(), "users") == located(each.values(), "") == list(each.values())
    assert located(each.values(), "users/1") == list(each.values())
    assert located(each.values(), "user") == []


def test_a_version_that_no_terminal_should_print_is_refused() -> None:
    assert Service("users", version="1.4.2").version == "1.4.2"
    with pytest.raises(Refused, match="version="):
        Service("users", version="1\x1b[31m")


# ---------------------------------------------------------------------------------- older and newer code on one bus


def test_what_older_code_says_of_itself_has_defaults_for_what_it_did_not_know() -> None:
    old = b'{"owner":"wire a:b:1:2:c","addresses":["users"],"instances":[{"service":"users","id":"a","addresses":["users"],"pid":7,"state":"running","since":1,"beat":0}]}'
    assert read(old) == Present("wire a:b:1:2:c", ("users",), (Instance("users", "a", ("users",), 7, "running", 1),))


def test_what_newer_code_says_of_itself_is_read_as_far_as_it_is_known() -> None:
    said = msgspec.to_builtins(Instance("users", "a", ("users",), version="9"))
    newer = {**said, "id": "b", "state": "dreaming", "mood": "good", "load": {"asked": 3, "waiting": 1, "memory": 9}}
    other = {**said, "id": "c", "pid": "a name by now"}
    body = msgspec.json.encode({"owner": "x", "addresses": ["users"], "instances": [said, newer, other], "more": 1})
    found = read(body)
    assert found.addresses == ("users",), "it can be asked"
    assert [(each.id, each.state, each.load.asked) for each in found.instances] == [
        ("a", "running", 0),
        ("b", "unknown", 3),
    ]
    assert instances_of(msgspec.json.encode([said, newer, other])) == found.instances
    assert not found.is_running("users")
    assert instances_of(b"nonsense") == instances_of(b"7") == ()


# ------------------------------------------------------------------------------------------- asked beside and after


async def test_who_answers_others_meanwhile_is_not_silent_however_long_one_question_takes(clock: VirtualClock) -> None:
    asked = list[str]()

    async def main() -> None:
        spread = Spread(clock)

        async def long(token: str) -> bytes:
            asked.append(token)
            await clock.sleep(5.0)
            return token.encode()

        async def short(token: str) -> bytes:
            await clock.sleep(0.1)
            return token.encode()

        question = asyncio.ensure_future(spread.ask(["a", "b"], long, 30.0, safe=True))
        for _ in range(60):
            await spread.ask(["a"], short, 30.0, safe=True)
        assert await question == b"a"
        assert asked == ["a"]
        assert await spread.ask(["a", "b"], long, 30.0, safe=True) == b"a", "the first to answer"
        assert asked == ["a", "a", "b"], "nothing came from it for a second, so another is asked beside it, and no more"

    await asyncio.to_thread(_virtually, clock, main)


def _virtually(clock: VirtualClock, main: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        runner.run(main())


async def test_who_was_silent_is_asked_last_for_two_seconds_and_who_answers_again_is_not(clock: VirtualClock) -> None:
    async def main() -> None:
        spread, stopped = Spread(clock), {"a"}

        async def one(token: str) -> bytes:
            await clock.sleep(1000.0 if token in stopped else 0.01)
            return token.encode()

        began = clock.monotonic()
        assert await spread.ask(["a", "b"], one, 2.0, safe=True) == b"b"
        assert 0.5 <= clock.monotonic() - began < 0.6, "a quarter of its time"
        for _ in range(10):
            assert spread.order(["a", "b"]) == ["b", "a"]
        await clock.sleep(2.0)
        stopped.clear()
        firsts = {spread.order(["a", "b"])[0] for _ in range(10)}
        assert firsts == {"a", "b"}

    await asyncio.to_thread(_virtually, clock, main)


async def test_nobody_was_silent_while_it_was_the_asker_that_stood_still(clock: VirtualClock) -> None:
    async def main() -> None:
        spread, asked = Spread(clock), list[str]()

        async def one(token: str) -> bytes:
            asked.append(token)
            await clock.sleep(0.6)
            return token.encode()

        asyncio.get_running_loop().call_later(0.1, clock.advance, 9.0)
        assert await spread.ask(["a", "b"], one, 2.0, safe=True) == b"a"
        assert asked == ["a"], "no second one is burdened"
        assert {spread.order(["a", "b"])[0] for _ in range(10)} == {"a", "b"}

    await asyncio.to_thread(_virtually, clock, main)


async def test_where_all_are_silent_few_are_asked_twice_and_when_one_answers_again_it_is_asked_beside(
    clock: VirtualClock,
) -> None:
    asked = Counter[str]()

    async def main() -> None:
        spread, stopped = Spread(clock), {"a"}

        async def one(token: str) -> bytes:
            asked[token] += 1
            await clock.sleep(1000.0 if token in stopped else 3.0)
            return token.encode()

        questions = [spread.ask(order, one, 30.0, safe=True) for order in 50 * (["a", "b"], ["b", "a"])]
        began = clock.monotonic()
        whole = asyncio.ensure_future(asyncio.gather(*questions))
        await clock.sleep(2.9)
        assert 102 <= asked.total() <= 111, "who is overloaded is not given the double"
        assert set(await whole) == {b"b"}, "but who is stopped is passed by as soon as the other is heard of"
        assert asked["b"] == 100
        assert clock.monotonic() - began < 8.0

    await asyncio.to_thread(_virtually, clock, main)


async def test_one_that_is_lost_is_followed_by_one_more_and_what_failed_by_none() -> None:
    spread, asked = Spread(CLOCK), list[str]()

    async def one(token: str) -> bytes:
        asked.append(token)
        if token == "moved":
            raise NotServed
        if token.startswith("dies"):
            raise Lost(token)
        if token == "fails":
            raise ConnectionError(token)
        return token.encode()

    assert await spread.ask(["moved", "dies", "well"], one, 9.0, safe=True) == b"well"
    with pytest.raises(ConnectionError, match="dies too"):
        await spread.ask(["dies", "dies too", "well"], one, 9.0, safe=True)
    with pytest.raises(ConnectionError, match="fails"):
        await spread.ask(["fails", "well"], one, 9.0, safe=True)
    with pytest.raises(Lost, match="dies"):
        await spread.ask(["moved", "dies", "well"], one, 9.0, safe=False)
    with pytest.raises(NotServed):
        await spread.ask(["moved", "moved"], one, 9.0, safe=False)
    assert asked.count("well") == 1


async def test_of_several_the_idle_are_asked_by_turns() -> None:
    spread = Spread(CLOCK)
    assert sorted(spread.order(["a", "b", "c"])[0] for _ in range(9)) == sorted("abc" * 3)


# ------------------------------------------------------------------------------- dead after the work, before the reply


async def test_who_dies_between_the_work_and_the_reply_leaves_a_call_unknown_and_its_id_gives_the_receipt(
    program: Program, each_bus: str, tmp_path: Path
) -> None:
    several = [await begun(program, each_bus, str(tmp_path / "died")) for _ in range(2)]
    async with connect(each_bus) as client:
        with pytest.raises(OutcomeUnknown) as unknown:
            await client.call(RegisterUser("1", "Ana", "a@example.org"), timeout=5.0)
        async with asyncio.timeout(10):
            while all(each.process.poll() is None for each in several):  # noqa: ASYNC110 - it happens elsewhere
                await asyncio.sleep(0.01)
        receipt = None
        async with asyncio.timeout(60):
            while receipt is None:
                with suppress(Unavailable):  # its slots are being taken over
                    receipt = await client.call(RegisterUser("1", "Ana", "a@example.org"), id=unknown.value.id)
        assert (receipt.id, receipt.version) == (unknown.value.id, 1)
        assert await client.fetch(User, "1") == User("1", "Ana", "a@example.org")


async def test_a_query_whose_process_dies_before_the_reply_is_answered_by_another_instance(
    program: Program, each_bus: str, tmp_path: Path
) -> None:
    several = {each.process.pid: each for each in [await begun(program, each_bus) for _ in range(2)]}
    async with connect(each_bus) as client:
        answered = await client.ask(Ping(str(tmp_path / "died")))
    assert (tmp_path / "died").exists()
    dead = [pid for pid, each in several.items() if pid != answered and await asyncio.to_thread(each.process.wait) == 1]
    assert len(dead) == 1


# ------------------------------------------------------------------------------------- when the registry cannot be read


class Later(SystemClock):
    """The real clock, so many seconds later."""

    by = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.by

    def now(self) -> int:
        return super().now() + round(self.by * 1_000_000)


def _stale(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "as last known" in each.getMessage()]


async def test_while_the_registry_cannot_be_read_the_last_known_list_serves_marked_stale_and_asking_goes_on(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = SQLitePlace(tmp_path)
    there = await starter(program, place.url)("users")
    await there.does("runs users")
    clock = Later()
    async with wire_at(place.url, clock) as wire, place.opened() as fresh:
        (known,) = await wire.instances()
        assert not known.stale
        broken = Broken(monkeypatch)
        broken.begin()
        for seconds in (0.0, 1.0, 10.0, 30.0):
            clock.by = seconds
            (found,) = await wire.instances()
            assert found.stale
            assert (found.id, found.version, found.beat) == (known.id, known.version, known.beat)
            assert int(await wire.ask("users", b"pid", clock.monotonic() + 20)) == there.process.pid
            assert int(await ask(fresh, "users", b"pid", safe=True)) == there.process.pid
            await asyncio.sleep(0.02)
        assert len(_stale(caplog)) == 1, caplog.text
        await there.killed()
        assert await wire.instances() == [], "that it is dead is proved without the registry"
        broken.end()
        assert await wire.instances() == []
        again = await starter(program, place.url)("users")
        await again.does("runs users")
        (found,) = await wire.instances()
        assert (found.pid, found.stale) == (again.process.pid, False)


class Broken:
    """A disk that gives an error for whatever is looked up in a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self._open, self._stat = monkeypatch, os.open, os.stat

    def begin(self) -> None:
        def open_(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> int:
            if dir_fd is not None:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return self._open(path, *rest, **more)

        def stat(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> os.stat_result:
            if dir_fd is not None:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return self._stat(path, *rest, **more)

        self._patch.setattr(os, "open", open_)
        self._patch.setattr(os, "stat", stat)

    def end(self) -> None:
        self._patch.setattr(os, "open", self._open)
        self._patch.setattr(os, "stat", self._stat)


async def test_who_cannot_look_at_its_own_files_stays_where_it_is_and_is_found_when_that_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.backends.sqlite.wire._BEAT", 0.02)
    place = SQLitePlace(tmp_path)
    async with running(Service("pinged", owns=pings, version="3"), bus=place.url) as bus:
        (file,) = (tmp_path / "bus.db.d" / "wire").glob("*.json")
        broken = Broken(monkeypatch)
        broken.begin()
        await asyncio.sleep(0.2)
        broken.end()
        first = file.stat().st_mtime_ns
        await until(lambda: file.stat().st_mtime_ns != first)
        assert [each.version for each in present(tmp_path / "bus.db", CLOCK)] == ["3"]
        assert [each.version for each in await bus.locate("pinged")] == ["3"]


async def test_a_registry_that_was_removed_and_made_again_is_found_by_those_who_had_it_open(
    program: Program, tmp_path: Path
) -> None:
    place = SQLitePlace(tmp_path)
    there = await starter(program, place.url)("users")
    await there.does("runs users")
    async with place.opened() as wire:
        assert len(await wire.instances()) == 1
        assert int(await ask(wire, "users", b"pid")) == there.process.pid
        await asyncio.to_thread(shutil.rmtree, tmp_path / "bus.db.d" / "wire")
        async with asyncio.timeout(20):
            while True:
                (found,) = await wire.instances()
                assert found.pid == there.process.pid
                assert int(await ask(wire, "users", b"pid")) == there.process.pid
                if not found.stale and (tmp_path / "bus.db.d" / "wire").exists():
                    break
                await asyncio.sleep(0.05)


async def test_a_registry_that_never_could_be_read_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SQLitePlace(tmp_path)
    async with place.opened() as wire:
        await wire.announce(Instance("users", "a", ("users",), os.getpid()))
        async with connect(place.url) as client:
            monkeypatch.setattr(client.wire._board.registry, "_known", False)  # type: ignore[attr-defined]
            broken = Broken(monkeypatch)
            broken.begin()
            with pytest.raises(Unavailable, match="registry .* cannot be read: .*mend the folder"):
                await client.locate()
            broken.end()
            assert len(await client.locate()) == 1


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except Missing as missing:
        absent(missing)
    yield server
    server.remove()


@pytest.fixture
def own_nats() -> Iterator[Nats]:
    try:
        server = Nats()
    except Missing as missing:
        absent(missing)
    yield server
    server.remove()


async def _down_and_up(server: Postgres | Nats, url: str, program: Program, caplog: pytest.LogCaptureFixture) -> None:
    there = await starter(program, url)("users")
    await there.does("runs users")
    clock = Later()
    async with connect(url, clock=clock) as client:
        (known,) = await client.locate("users")
        await asyncio.to_thread(server.kill)
        with caplog.at_level(logging.WARNING, "cauce"):
            for seconds in (0.0, 30.0):
                clock.by = seconds
                async with asyncio.timeout(30):
                    (found,) = await client.locate("users")
                assert found.stale
                assert (found.id, found.version, found.load) == (known.id, "1.4.2", known.load)
        assert len(_stale(caplog)) == 1, caplog.text
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(60):
            while True:
                found_again = await client.locate("users")
                if found_again and not found_again[0].stale:
                    break
                await asyncio.sleep(0.1)
        assert int(await ask(client.wire, "users", b"pid", 60, safe=True)) == there.process.pid


async def test_while_postgresql_is_down_the_last_known_list_serves_marked_stale(
    own_postgres: Postgres, bus_name: str, program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    await _down_and_up(own_postgres, own_postgres.url(schema=bus_name), program, caplog)


async def test_while_nats_is_down_the_last_known_list_serves_marked_stale(
    own_nats: Nats, bus_name: str, program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    await _down_and_up(own_nats, own_nats.url(bus_name), program, caplog)
