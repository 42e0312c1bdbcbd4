"""A bus on NATS whose server is killed, denies something, or lets strangers ask: what is told, and what stands."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import nats as plain
import pytest

from cauce import (
    Bus,
    Command,
    Context,
    Domain,
    Event,
    OutcomeUnknown,
    Receipt,
    Record,
    Service,
    Unavailable,
    connect,
    running,
)
from cauce.accept import slot_of
from cauce.errors import Fenced, Held, NotPermitted
from cauce.lease import Leases
from cauce.log import Filter
from shop import users
from tests.cluster_load import CLOCK, all_of, fact, opened
from tests.servers import Missing, Nats, absent

Program = Callable[..., subprocess.Popen[str]]

tallies = Domain("tallies", key="user_id")


class Tally(Record, domain=tallies):
    user_id: str
    count: int


class Counted(Event, domain=tallies):
    user_id: str


class Count(Command, domain=tallies):
    user_id: str


def counting() -> Service:
    """Owns the tallies, and counts each registration of a user because of its fact."""
    service = Service("counting", owns=tallies)

    @service.on
    def count_it(event: users.UserRegistered, ctx: Context) -> Count:
        return Count(event.user_id)

    @service.decide
    def count(tally: Tally | None, command: Count) -> Counted:
        return Counted(command.user_id)

    @service.evolve
    def counted(tally: Tally | None, event: Counted) -> Tally:
        return Tally(event.user_id, (tally.count if tally else 0) + 1)

    return service


def server(config: str = "", **more: Any) -> Nats:
    try:
        return Nats(name="own", config=config, **more)
    except Missing as missing:
        absent(missing)


@pytest.fixture
def own_nats() -> Iterator[Nats]:
    """A server that a test may hurt."""
    own = server()
    yield own
    own.remove()


# ------------------------------------------------------------------------------------------------------- killed


class Calls:
    """Those who call under load: each call is repeated under its id until it has its receipt."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []
        self.stop = asyncio.Event()

    async def register(self, bus: Bus, name: str) -> None:
        made = 0
        while not self.stop.is_set():
            made += 1
            wish, id = users.RegisterUser(f"{name}-{made}", "x", "x@example.org"), None
            while True:
                try:
                    self.receipts.append(await bus.call(wish, id=id, timeout=5.0))
                    break
                except OutcomeUnknown as error:
                    id = error.id
                except Unavailable:
                    await CLOCK.sleep(0.05)

    async def fetch(self, bus: Bus) -> None:
        while not self.stop.is_set():
            if self.receipts:
                with suppress(Unavailable):
                    await bus.fetch(users.User, self.receipts[-1].key, timeout=5.0)
            await CLOCK.sleep(0.01)

    async def more(self, count: int) -> None:
        before = len(self.receipts)
        async with asyncio.timeout(30.0):
            while len(self.receipts) < before + count:
                await CLOCK.sleep(0.01)


async def test_a_bus_goes_on_by_itself_when_its_server_is_killed_and_every_receipt_has_its_fact_and_reaction(
    own_nats: Nats,
) -> None:
    url, calls = own_nats.url("b"), Calls()
    async with running(users.service, counting(), bus=url) as bus, connect(url) as client:
        callers = [asyncio.create_task(calls.register(each, str(n))) for n, each in enumerate([bus, client] * 4)]
        callers.append(asyncio.create_task(calls.fetch(client)))
        for _ in range(2):
            await calls.more(100)
            await asyncio.to_thread(own_nats.kill)
            await asyncio.to_thread(own_nats.start)
        await calls.more(100)
        calls.stop.set()
        async with asyncio.timeout(30.0):
            await asyncio.gather(*callers)
        async with asyncio.timeout(30.0):
            # What a reaction says is decided after all have settled that stood at the call.
            while len((await bus.facts.read(Filter(domains=frozenset({"tallies"})), limit=5000)).entries) < len(
                calls.receipts
            ):
                await bus.settled()
        assert not bus.failed.done()
    async with opened(url) as there:
        facts = await all_of(there)
    where = {entry.position: entry for entry in facts}
    for receipt in calls.receipts:
        entry = where[receipt.position]
        assert (entry.meta.causation, entry.key, entry.version) == (receipt.id, receipt.key, receipt.version)
    keys = sorted(receipt.key for receipt in calls.receipts)
    assert sorted(entry.key for entry in facts if entry.domain == "users") == keys
    assert sorted(entry.key for entry in facts if entry.domain == "tallies") == keys


async def test_who_asks_while_the_server_is_away_is_told_within_the_deadline(own_nats: Nats) -> None:
    url = own_nats.url("b")
    async with running(users.service, bus=url), connect(url) as client:
        await client.call(users.RegisterUser("1", "x", "x@example.org"))
        await asyncio.to_thread(own_nats.kill)
        try:
            began = CLOCK.monotonic()
            told = await asyncio.gather(
                client.fetch(users.User, "1", timeout=1.0),
                client.call(users.ChangeEmail("1", "y@example.org"), timeout=1.0),
                return_exceptions=True,
            )
            assert CLOCK.monotonic() - began < 3.0
            assert [isinstance(each, Unavailable) for each in told] == [True, True], told
        finally:
            await asyncio.to_thread(own_nats.start)
        async with asyncio.timeout(20.0):
            while True:
                with suppress(Unavailable):
                    assert (await client.fetch(users.User, "1")).user_id == "1"
                    break


# ------------------------------------------------------------------------------------------------------- permissions

DENIED = """
authorization { users = [
  { user: admin, password: secret }
  { user: mute, password: secret, permissions: { publish: { deny: "b.ask.>" } } }
  { user: deaf, password: secret, permissions: { subscribe: { deny: "_INBOX.>" } } }
  { user: idle, password: secret, permissions: { subscribe: { deny: "b.ask.>" } } }
] }
"""


async def test_who_may_not_ask_hear_or_serve_is_told_so_at_once() -> None:
    own = server(DENIED, login=("admin", "secret"))
    try:
        async with running(users.service, bus=own.url("b", login=("admin", "secret"))):
            async with opened(own.url("b", login=("mute", "secret"))) as mute:
                began = CLOCK.monotonic()
                with pytest.raises(NotPermitted, match=r"b\.ask\.users"):
                    await mute.wire.ask("users", b"{}", CLOCK.monotonic() + 10.0)
                assert CLOCK.monotonic() - began < 2.0
            began = CLOCK.monotonic()
            with pytest.raises(NotPermitted, match="_inbox"):
                async with opened(own.url("b", login=("deaf", "secret"))):
                    pass
            async with opened(own.url("b", login=("idle", "secret"))) as idle:
                with pytest.raises(NotPermitted, match=r"b\.ask\.cards"):
                    await idle.wire.serve("cards", _never)
            assert CLOCK.monotonic() - began < 2.0
    finally:
        own.remove()


async def _never(payload: bytes) -> bytes:
    raise AssertionError("nobody may ask")


# ------------------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b'"ask"',
        b'{"kind":1}',
        b'{"kind":"call"}',
        b'{"kind":"call","type":"Nothing","id":"1","key":"1"}',
        b'{"kind":"call","type":"RegisterUser","id":"1","key":"1","body":{"user_id":5}}',
        b'{"kind":"publish","type":"Nothing","id":"1","key":"1"}',
        b'{"kind":"ask","type":"Nothing","id":"1"}',
        b'{"kind":"call","type":"\xff","id":"1"}',
        b"[" * 1_000_000,
    ],
    ids=lambda payload: payload[:40].decode(errors="replace"),
)
async def test_a_stranger_who_asks_nonsense_gets_an_error_as_the_services_api_has_it(
    nats: Nats, nats_bus: str, payload: bytes
) -> None:
    async with running(users.service, bus=nats_bus) as bus:
        prefix = nats_bus.rpartition("/")[2]
        client = await plain.connect(nats.url())
        try:
            subjects = [f"{prefix}.ask.users", f"{prefix}.ask.users.{slot_of('1')}"]
            for subject in subjects:
                answer = await client.request(subject, payload, timeout=5.0)
                assert int((answer.headers or {})["Nats-Service-Error-Code"]) in range(400, 504)
                assert (answer.headers or {})["Nats-Service-Error"]
                await client.publish(subject, payload)
        finally:
            await client.close()
        assert (await bus.call(users.RegisterUser("1", "x", "x@example.org"))).version == 1
        assert not bus.failed.done()


async def test_headers_that_make_no_sense_stop_nothing(nats: Nats, nats_bus: str) -> None:
    async with running(users.service, bus=nats_bus) as bus:
        prefix = nats_bus.rpartition("/")[2]
        client = await plain.connect(nats.url())
        try:
            for headers in (
                {"Cauce-Seconds": "soon"},
                {"Cauce-Seconds": "nan"},
                {"Cauce-Seconds": "-1"},
                {"X": "\u4e2d"},
            ):
                with suppress(TimeoutError):
                    await client.request(f"{prefix}.ask.users", b"{}", timeout=0.1, headers=headers)
        finally:
            await client.close()
        assert (await bus.call(users.RegisterUser("1", "x", "x@example.org"))).version == 1


# ------------------------------------------------------------------------------------------------------- fences

HOLDER = """
import asyncio, sys
from cauce.errors import CauceError
from tests.cluster_load import fact, opened

async def main():
    async with opened(sys.argv[1]) as bus:
        claim = await bus.facts.claim("things/%s" % sys.argv[2], "holder")
        while True:
            try:
                await bus.facts.append(sys.argv[3], [fact(sys.argv[3])], fence=claim)
            except CauceError as error:
                print(type(error).__name__, flush=True)
                return
            print(claim.fence, flush=True)

asyncio.run(main())
"""


async def test_a_holder_that_was_stopped_and_goes_on_when_another_has_taken_over_writes_nothing(
    nats_bus: str, program: Program
) -> None:
    stream, slot = "things/1", slot_of("1")
    there = program(HOLDER, nats_bus, str(slot), stream)
    assert there.stdout is not None
    assert int(await asyncio.to_thread(there.stdout.readline)) > 0
    os.kill(there.pid, signal.SIGSTOP)
    async with opened(nats_bus) as bus:
        with pytest.raises(Held) as held:
            await bus.facts.claim(f"things/{slot}", "another")
        claim = await bus.facts.claim(f"things/{slot}", "another", over=held.value.claim)  # type: ignore[arg-type]
        done = await bus.facts.append(stream, [fact(stream)], fence=claim)
        os.kill(there.pid, signal.SIGCONT)
        said = await asyncio.to_thread(there.stdout.read)
        assert said.split()[-1] == "Fenced"
        assert await bus.facts.head() == done.position
        assert [entry.version for entry in await all_of(bus)] == list(range(1, done.version + 1))


async def test_a_beat_whose_turn_comes_after_its_name_was_let_go_of_is_no_loss(nats_bus: str) -> None:
    async with opened(nats_bus) as bus:
        leases = Leases(bus.facts, "holder", CLOCK)
        await leases.take("things/1", "things/2")
        lost = leases.claims["things/2"]
        releasing = asyncio.ensure_future(leases.release("things/1"))
        await asyncio.sleep(0)
        await asyncio.gather(*(leases._beat(claim) for claim in list(leases.claims.values())))
        await releasing
        await bus.facts.claim("things/2", "rival", over=lost)
        with pytest.raises(Fenced):
            await leases._beat(lost)
