"""Every promise of the log seam holds on PostgreSQL, and nothing acknowledged is lost, whatever fails on the way."""

from __future__ import annotations

import asyncio
import glob
import itertools
import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cauce import conformance
from cauce.backends import postgres
from cauce.backends.postgres import PostgresBus, migrations
from cauce.backends.postgres.schema import STEPS
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.conformance import Keeps, Promise
from cauce.errors import Busy, CauceError, NotPermitted, OutcomeUnknown, Refused, Unreachable
from cauce.log import Appended, Filter, Log

CLOCK = SystemClock()
SECONDS = float(os.environ.get("CAUCE_POSTGRES_SECONDS", "5"))
_schemas = itertools.count()


class Server:
    """A PostgreSQL of our own, on a free port of the loopback interface, in a temporary folder."""

    def __init__(self, folder: Path, bin: Path) -> None:
        self._bin, self.folder = bin, folder
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._call("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=200"
        self._options = options
        self.start()

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._bin / program), "-D", str(self.folder / "data"), *arguments],
            check=True, stdout=subprocess.DEVNULL, cwd=self.folder,
            user=self._user.pw_uid if self._user else None, group=self._user.pw_gid if self._user else None,
            extra_groups=[] if self._user else None,
        )  # fmt: skip

    def start(self) -> None:
        self._call("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", self._options, "start")

    def stop(self) -> None:
        self._call("pg_ctl", "-m", "immediate", "stop")

    def url(self, schema: str = "", *, port: int = 0, user: str = "postgres") -> str:
        where = f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres"
        return f"{where}?schema={schema}" if schema else where

    async def connect(self, **settings: str) -> Any:
        return await asyncpg.connect(self.url(), server_settings=settings)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = shutil.which("initdb") or max(glob.glob("/usr/lib/postgresql/*/bin/initdb"), default=None)
    if found is None and os.environ.get("CI"):
        pytest.fail("PostgreSQL's initdb is missing: install it")
    if found is None:
        pytest.skip("PostgreSQL's initdb is missing: install the package postgresql")
    folder = Path(tempfile.mkdtemp(prefix="cauce-postgres-"))
    running = Server(folder, Path(found).resolve().parent)
    yield running
    with suppress(subprocess.CalledProcessError):
        running.stop()
    shutil.rmtree(folder)


@pytest.fixture
def schema() -> str:
    return f"s{next(_schemas)}"


@asynccontextmanager
async def opened(url: str, patience: float = 5.0) -> AsyncIterator[PostgresBus]:
    bus = await postgres.open(url, patience=patience)
    try:
        yield bus
    finally:
        await bus.close()


def fact(stream: str, body: bytes = b"{}") -> Entry:
    return sealed(stream, "Counted", CLOCK.id(), Meta(CLOCK.now()), body)


async def add(log: Log, stream: str, body: bytes = b"{}") -> Appended:
    return await log.append(stream, [fact(stream, body)])


async def everything(log: Log) -> list[Entry]:
    found, looked, head = list[Entry](), 0, await log.head()
    while looked < head:
        page = await log.read(after=looked)
        found, looked = found + page.entries, page.looked
    return [entry.checked() for entry in found]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await CLOCK.sleep(0.01)


async def lock(session: Any, schema: str) -> None:
    """Hold the lock of the writers, until the transaction ends."""
    await session.execute("begin")
    await session.execute(f"select pg_advisory_xact_lock({migrations.lock_number(schema)})")


async def waiting_writer(session: Any) -> int:
    """The pid of a writer that waits for the lock."""
    async with asyncio.timeout(20):
        while True:
            pid = await session.fetchval(
                "select pid from pg_stat_activity where application_name like 'cauce writer%' and wait_event = 'advisory'"
            )
            if pid:
                return int(pid)
            await CLOCK.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("promise", conformance.PROMISES, ids=str)
async def test_postgres_keeps_the_promise_that(promise: Promise, server: Server, schema: str) -> None:
    @asynccontextmanager
    async def open(keeps: Keeps) -> AsyncIterator[Log]:
        async with opened(server.url(schema)) as bus:
            yield {"all": bus.facts, "undecided": bus.commands, "last": bus.records}[keeps]

    await promise(open)


async def test_a_log_is_named_by_its_bus(server: Server, schema: str) -> None:
    async with opened(server.url(schema)) as bus, opened(server.url(schema)) as other:
        assert [log.id for log in (bus.facts, bus.commands, bus.records)] == [
            f"{other.id}:{name}" for name in ("facts", "commands", "records")
        ]


async def test_a_long_stream_is_read_page_by_page(server: Server, schema: str) -> None:
    async with opened(server.url(schema)) as bus:
        await asyncio.gather(*(add(bus.facts, f"things/{n % 2}") for n in range(400)))
        versions, looked = list[int](), 0
        while looked < await bus.facts.head():
            page = await bus.facts.read(Filter("things/1"), after=looked, limit=30)
            versions, looked = versions + [entry.version for entry in page.entries], page.looked
        assert versions == list(range(1, 201))


# ------------------------------------------------------------------------------------------------------ schema


async def test_an_ordinary_role_is_told_what_to_do_and_then_works(server: Server, schema: str) -> None:
    owner = await server.connect()
    await owner.execute(f"create role r{schema} login")
    url = server.url(schema, user=f"r{schema}")
    with pytest.raises(Refused, match=r"cauce migrate --sql"):
        await postgres.open(url)
    for _ in range(2):
        await owner.execute(migrations.sql(schema))
    with pytest.raises(NotPermitted, match=r"grant usage on schema"):
        await postgres.open(url)
    grants = [line.strip("- ") for line in migrations.sql(schema).splitlines() if line.startswith("--   grant")]
    await owner.execute("\n".join(grants).replace("the_role", f"r{schema}"))
    async with opened(url) as bus:
        assert await add(bus.facts, "things/1") == Appended(1, 1)
        await owner.execute(f'revoke insert on "{schema}".facts from r{schema}')
        with pytest.raises(NotPermitted, match="facts"):
            await add(bus.facts, "things/1")
        await owner.execute(f'grant insert on "{schema}".facts to r{schema}')
        assert await add(bus.facts, "things/1") == Appended(2, 2)
    await owner.close()


async def test_a_schema_of_another_format_is_refused_with_the_cure(server: Server, schema: str) -> None:
    url, owner = server.url(schema), await server.connect()
    assert await migrations.migrate(url, CLOCK) == [step.name for step in STEPS]
    assert await migrations.migrate(url, CLOCK) == []
    await owner.execute(f'update "{schema}".steps set number = number + 1000')
    with pytest.raises(Refused, match="deploy newer code"):
        await postgres.open(url)
    await owner.execute(f'delete from "{schema}".steps')
    with pytest.raises(Refused, match="cauce migrate"):
        await postgres.open(url)
    await owner.close()


async def test_many_that_open_a_new_bus_at_once_make_one(server: Server, schema: str) -> None:
    buses = await asyncio.gather(*(postgres.open(server.url(schema)) for _ in range(8)))
    assert len({bus.id for bus in buses}) == 1
    await asyncio.gather(*(bus.close() for bus in buses))


@pytest.mark.parametrize("url", ["?schema=pg_x", "?schema=A", "?schema=a%22b", "?schema=a&schema=b", "?schema="])
async def test_a_schema_is_named_by_a_plain_name(server: Server, url: str) -> None:
    with pytest.raises(Refused, match="schema"):
        await postgres.open(server.url() + url)


# ------------------------------------------------------------------------------------------------ transactions


async def test_a_slow_transaction_delays_and_loses_nothing(server: Server, schema: str) -> None:
    async with opened(server.url(schema)) as bus, opened(server.url(schema)) as other:
        await add(bus.facts, "things/1")
        session, watcher = await server.connect(), await server.connect()
        await lock(session, schema)
        writes = [asyncio.ensure_future(add((bus, other)[n % 2].facts, f"things/{n}")) for n in range(20)]
        await waiting_writer(watcher)
        assert len(await everything(bus.facts)) == 1, "readers wait for nobody"
        await session.execute("commit")
        positions = sorted(done.position for done in await asyncio.gather(*writes))
        assert [entry.position for entry in await everything(bus.facts)] == [1, *positions]
        await session.close()
        await watcher.close()


async def test_a_hundred_rollbacks_leave_no_trace(server: Server, schema: str) -> None:
    async with opened(server.url(schema)) as bus:
        session = await server.connect(search_path=schema)
        for n in range(100):
            await session.execute("begin")
            await session.execute(f"select settle_turn('another', {n})")
            write = asyncio.ensure_future(add(bus.facts, "things/1"))
            await session.execute("rollback")
            await write
        assert [entry.version for entry in await everything(bus.facts)] == list(range(1, 101))
        await session.close()


async def test_a_foreign_idle_transaction_holds_nobody_up(server: Server, schema: str) -> None:
    async with opened(server.url(schema)) as bus:
        session = await server.connect()
        await session.execute("begin isolation level repeatable read; select txid_current()")
        reader = asyncio.ensure_future(bus.facts.read(wait=10))
        await asyncio.gather(*(add(bus.facts, f"things/{n}") for n in range(200)))
        assert (await reader).entries
        assert len(await everything(bus.facts)) == 200
        await session.close()


async def test_whoever_holds_the_lock_is_named_when_patience_is_over(server: Server, schema: str) -> None:
    async with opened(server.url(schema), patience=1.0) as bus:
        session = await server.connect(application_name="a DBA at lunch")
        await lock(session, schema)
        with pytest.raises(Busy, match=rf"pid {session.get_server_pid()} \(a DBA at lunch, idle in transaction\)"):
            await add(bus.facts, "things/1")
        await session.execute("rollback")
        assert await add(bus.facts, "things/1") == Appended(1, 1)
        await session.close()


async def test_a_connection_killed_in_its_transaction_is_settled_and_made_anew(server: Server, schema: str) -> None:
    async with opened(server.url(schema)) as bus:
        session, killer = await server.connect(), await server.connect()
        for n in range(5):
            await lock(session, schema)
            write = asyncio.ensure_future(add(bus.facts, "things/1"))
            await killer.execute(f"select pg_terminate_backend({await waiting_writer(killer)})")
            await session.execute("rollback")
            assert await write == Appended(n + 1, n + 1)
        assert len(await everything(bus.facts)) == 5
        await session.close()
        await killer.close()


# ----------------------------------------------------------------------------------------------------- network


class Proxy:
    """Stands between us and the server, and drops what it is told to."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.before: bytes | None = None
        self.after: bytes | None = None
        self.swallow: bytes | None = None
        self.dropped = 0
        self.refuses = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refuses:
            writer.transport.abort()
            return
        there = await asyncio.open_connection("127.0.0.1", self._to)
        state = {"role": b"", "lose": b""}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pipe(reader, there[1], state, True))
                group.create_task(self._pipe(there[0], writer, state, False))
        except* OSError:
            pass
        finally:
            writer.transport.abort()
            there[1].transport.abort()

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bytes], ours: bool
    ) -> None:
        while data := await reader.read(65536):
            if ours and len(state["role"]) < 1000:
                # The first message may only ask for TLS.
                state["role"] += data
            if ours and self.before is not None and self.before in data:
                self.before, self.dropped = None, self.dropped + 1
                break
            if ours and self.after is not None and self.after in data:
                self.after, state["lose"] = None, b"yes"
            elif not ours and state["lose"]:
                self.dropped += 1
                break
            if self.swallow is not None and self.swallow in state["role"]:
                continue
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


async def test_a_lost_reply_to_a_commit_is_settled_each_entry_once(server: Server, schema: str) -> None:
    async with Proxy(server.port) as proxy, opened(server.url(schema, port=proxy.port)) as bus:
        for n in range(20):
            marker = b"marker%d" % n
            if n % 2:
                proxy.after = marker
            else:
                proxy.before = marker
            writes = [add(bus.facts, f"things/{m}", b'"%s"' % marker) for m in range(3)]
            assert [done.version for done in await asyncio.gather(*writes)] == [n + 1] * 3
        assert proxy.dropped == 20
        entries = await everything(bus.facts)
        assert [entry.body for entry in entries] == [b'"marker%d"' % n for n in range(20) for _ in range(3)]


async def test_what_was_sent_to_a_server_that_stays_away_is_unknown_and_what_was_not_is_unreachable(
    server: Server, schema: str
) -> None:
    async with Proxy(server.port) as proxy, opened(server.url(schema, port=proxy.port), patience=1.0) as bus:
        await add(bus.facts, "things/1")
        proxy.after, proxy.refuses = b"marker", True
        entry = fact("things/1", b'"marker"')
        with pytest.raises(OutcomeUnknown) as unknown:
            await bus.facts.append("things/1", [entry])
        assert unknown.value.id == entry.id
        with pytest.raises(Unreachable):
            await add(bus.facts, "things/1")
        proxy.refuses = False
        assert (await bus.facts.append("things/1", [entry], repeat=True)) == Appended(2, 2, True)
        assert (await add(bus.facts, "things/1")).version == 3


async def test_a_dead_listener_costs_no_more_than_the_poll_interval(server: Server, schema: str) -> None:
    async with (
        Proxy(server.port) as proxy,
        opened(server.url(schema, port=proxy.port)) as reader,
        opened(server.url(schema)) as writer,
    ):
        with suppress(TimeoutError):
            await reader.facts.read(wait=0.3)
        proxy.swallow = b"cauce listen"
        for n in range(3):
            waiting = asyncio.ensure_future(reader.facts.read(after=n, wait=20))
            await CLOCK.sleep(0.1)
            await add(writer.facts, "things/1")
            began = CLOCK.monotonic()
            assert len((await waiting).entries) == 1
            assert CLOCK.monotonic() - began < 2.0


async def test_an_immediate_restart_under_load_loses_nothing_acknowledged(server: Server, schema: str) -> None:
    acknowledged, unknown = set[str](), set[str]()
    async with opened(server.url(schema), patience=20.0) as bus:
        stop = asyncio.Event()

        async def write(n: int) -> None:
            while not stop.is_set():
                entry = fact(f"things/{n}")
                try:
                    await bus.facts.append(entry.stream, [entry])
                    acknowledged.add(entry.id)
                except OutcomeUnknown:
                    unknown.add(entry.id)

        writers = [asyncio.ensure_future(write(n)) for n in range(16)]
        for _ in range(2):
            before = len(acknowledged)
            await until(lambda before=before: len(acknowledged) > before + 200)  # type: ignore[misc]
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
        before = len(acknowledged)
        await until(lambda: len(acknowledged) > before + 200)
        stop.set()
        await asyncio.gather(*writers)
        stand = [entry.id for entry in await everything(bus.facts)]
    assert len(stand) == len(set(stand))
    assert acknowledged <= set(stand) <= acknowledged | unknown


# ------------------------------------------------------------------------------------------------------- order

WRITER = """
import asyncio, random, sys
import test_postgres
from cauce.backends import postgres

async def main():
    bus = await postgres.open(sys.argv[1])
    count = await test_postgres.write_with_pauses(bus, int(sys.argv[2]), float(sys.argv[3]))
    await bus.close()
    print(count)

asyncio.run(main())
"""


async def write_with_pauses(bus: PostgresBus, seed: int, seconds: float) -> int:
    """Ten writers that pause at random."""
    chance, end, count = random.Random(seed), CLOCK.monotonic() + seconds, 0

    async def write(n: int) -> None:
        nonlocal count
        while CLOCK.monotonic() < end:
            await add(bus.facts, f"things/{(seed * 10 + n) % 25}")
            count += 1
            await CLOCK.sleep(chance.random() ** 4 * 0.2)

    await asyncio.gather(*(write(n) for n in range(10)))
    return count


async def test_no_reader_sees_a_position_appear_below_one_it_passed(
    server: Server, schema: str, program: Callable[..., subprocess.Popen[str]]
) -> None:
    """Fifty writers in three handles and two processes, three readers."""
    url = server.url(schema)
    async with opened(url) as one, opened(url) as two, opened(url) as three:
        others = [program(WRITER, url, str(seed), str(SECONDS)) for seed in (3, 4)]
        done = asyncio.Event()

        async def follow(bus: PostgresBus) -> list[int]:
            seen, looked = list[int](), 0
            while not done.is_set() or looked < await bus.facts.head():
                page = await bus.facts.read(after=looked, limit=50, wait=0.2)
                seen += [entry.position for entry in page.entries]
                looked = page.looked
            return seen

        readers = [asyncio.ensure_future(follow(bus)) for bus in (one, two, three)]
        counts = await asyncio.gather(
            *(write_with_pauses(bus, seed, SECONDS) for seed, bus in enumerate((one, two, three)))
        )
        told = [await asyncio.to_thread(other.communicate) for other in others]
        done.set()
        whole = [entry.position for entry in await everything(one.facts)]
        for seen in await asyncio.gather(*readers):
            assert seen == whole
        assert len(whole) == sum(counts) + sum(int(out) for out, _ in told)


async def test_a_writer_of_the_same_stream_is_never_starved(server: Server, schema: str) -> None:
    async with (
        opened(server.url(schema)) as one,
        opened(server.url(schema)) as two,
        opened(server.url(schema)) as three,
    ):

        async def write(bus: PostgresBus) -> list[Appended]:
            return [await add(bus.facts, "things/1") for _ in range(100)]

        results = await asyncio.gather(*(write(bus) for bus in (one, two, three)))
        assert sorted(done.version for each in results for done in each) == list(range(1, 301))


async def test_what_waits_is_written_before_it_is_closed(server: Server, schema: str) -> None:
    bus = await postgres.open(server.url(schema))
    writes = [bus.facts.append("things/1", [fact("things/1")]) for _ in range(100)]
    await bus.close()
    assert [write.result().version for write in writes] == list(range(1, 101))
    with pytest.raises(CauceError):
        await add(bus.facts, "things/1")
