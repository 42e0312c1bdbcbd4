"""One writer for each thing, whatever befalls the instances of its owner: stopped, cut off, killed, deployed anew."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cauce import Command, Domain, Event, Record, Service, connect, running
from cauce.accept import SLOTS, slot_of
from cauce.backends.sqlite.file import folder_of
from cauce.bus import Bus, Receipt
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Fenced, NoAnswer, NotOwner, OutcomeUnknown, Unavailable, Unreachable, Unreadable
from cauce.log import Filter, entries_of
from tests.servers import Nats, Postgres
from tests.servers.link import Links
from tests.servers.process import free_port
from tests.test_instances import close, standing, until_shared

Program = Callable[..., subprocess.Popen[str]]

accounts = Domain("accounts", key="number")


class Account(Record, domain=accounts):
    number: str
    balance: int
    owner: str = ""


class Paid(Event, domain=accounts):
    number: str
    amount: int
    balance: int
    by: str


class Pay(Command, domain=accounts):
    number: str
    amount: int


def owner(name: str) -> Service:
    """The owner, as the instance of this name: each fact says which instance decided it."""
    service = Service("accounts", owns=accounts)

    @service.decide
    def pay(account: Account | None, command: Pay) -> Paid:
        before = account.balance if account else 0
        return Paid(command.number, command.amount, before + command.amount, name)

    @service.evolve
    def paid(account: Account | None, event: Paid) -> Account:
        assert event.balance == (account.balance if account else 0) + event.amount, "decided on what stood"
        return Account(event.number, event.balance)

    return service


INSTANCE = """
import asyncio, logging, sys
import cauce.shares
sys.path.insert(0, {tests!r})
import test_owner
logging.basicConfig(level=logging.ERROR)
# Slots are shared out sooner than in life; nobody is given up sooner.
cauce.shares.BEAT = 0.2

async def main():
    service = getattr(test_owner, sys.argv[2])(sys.argv[3])
    async with test_owner.running(service, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait({{asyncio.ensure_future(stop), bus.failed}}, return_when=asyncio.FIRST_COMPLETED)
        if bus.failed.done():
            print("failed", type(bus.failed.exception()).__name__, flush=True)

asyncio.run(main())
"""


def instance(program: Program, url: str, name: str, make: str = "owner") -> subprocess.Popen[str]:
    process = program(INSTANCE.format(tests=str(Path(__file__).parent)), url, make, name)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


async def facts_of(bus: Bus, domain: str = "accounts") -> list[Entry]:
    found = entries_of(bus.facts, Filter(domains=frozenset({domain})))
    return [entry.checked() async for entry in found]


async def persist(bus: Bus, command: Command, id: str) -> Receipt:
    """Call until there is a verdict, as the errors say: with the same id."""
    async with asyncio.timeout(40.0):
        while True:
            with suppress(Unavailable):
                return await bus.call(command, id=id, timeout=1.5)
            await asyncio.sleep(0.05)


async def all_once(bus: Bus, ids: Sequence[str]) -> None:
    """Each command made one fact; each thing's facts follow each other, and stand as its record says."""
    facts = await facts_of(bus)
    assert Counter(entry.meta.causation for entry in facts) == Counter(ids)
    by_thing = dict[str, list[int]]()
    for entry in facts:
        by_thing.setdefault(entry.key, []).append(entry.version)
    assert all(versions == list(range(1, len(versions) + 1)) for versions in by_thing.values())
    for key, versions in by_thing.items():
        found = await bus.fetch(Account, key)
        assert found.balance == len(versions)


async def stop(process: subprocess.Popen[str], url: str) -> None:
    """Stop a process, but not while it writes a SQLite file: nobody else could, and would be told."""
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        if nobody_writes(url):
            return
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(0.01)


def nobody_writes(url: str) -> bool:
    """Whether all turns at the files of a bus on SQLite, and of stores beside a bus, are free."""
    kind, _, path = url.partition(":///")
    folder = folder_of(Path(path)) if kind == "sqlite" else Path(url.partition("files=")[2] or "nowhere")
    for turn in folder.rglob("turn.*"):
        with turn.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who shows no beat is given up soon, by this process."""
    monkeypatch.setattr("cauce.shares.TTL", 1.5)
    monkeypatch.setattr("cauce.shares.BEAT", 0.3)
    monkeypatch.setattr("cauce.lease.TTL", 1.5)
    monkeypatch.setattr("cauce.lease.BEAT", 0.3)


KEYS = [f"account{number}" for number in range(24)]


@pytest.mark.usefixtures("hasty")
async def test_an_owner_that_was_stopped_writes_nothing_stale_when_it_wakes_up_and_decides_again_when_it_has_joined(
    each_bus: str, program: Program
) -> None:
    stale = instance(program, each_bus, "stale")
    async with connect(each_bus) as client, standing(each_bus, "accounts") as holders:
        ids = [client.clock.id() for _ in range(3 * len(KEYS))]
        stopped = await until_shared(holders, SLOTS)
        await asyncio.gather(*(client.call(Pay(key, 1), id=id) for key, id in zip(KEYS, ids, strict=False)))
        # It is stopped with calls on their way to it: whether each of them was decided, only the log can tell.
        late = [
            asyncio.ensure_future(persist(client, Pay(key, 1), id)) for key, id in zip(KEYS, ids[24:], strict=False)
        ]
        await asyncio.sleep(0.01)
        await stop(stale, each_bus)
        async with running(owner("fresh"), bus=each_bus) as bus:
            await until_shared(holders, SLOTS, but=stopped)
            await asyncio.gather(*late)
            os.kill(stale.pid, signal.SIGCONT)
            await until_shared(holders, 8, 8)
            await asyncio.gather(*(bus.call(Pay(key, 1), id=id) for key, id in zip(KEYS, ids[48:], strict=False)))
            await all_once(bus, ids)
            last = {entry.key: entry for entry in await facts_of(bus)}
            by = {b'"by":"fresh"' in (entry.body or b"") for entry in last.values()}
            assert by == {True, False}, "both decide"


@pytest.fixture
def links() -> Iterator[Links]:
    made = Links()
    yield made
    made.close()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", ["postgresql", "nats"])
async def test_an_owner_that_is_cut_off_from_the_bus_is_replaced_and_decides_again_when_it_is_back(
    kind: str, request: pytest.FixtureRequest, links: Links, program: Program
) -> None:
    server: Postgres | Nats = request.getfixturevalue("postgres" if kind == "postgresql" else "nats")
    url = str(request.getfixturevalue("postgres_bus" if kind == "postgresql" else "nats_bus"))
    port = free_port()
    let = links.add(server.port, port)
    instance(program, url.replace(f":{server.port}", f":{port}"), "cut off")
    async with connect(url) as client, standing(url, "accounts") as holders:
        ids = [client.clock.id() for _ in range(3 * len(KEYS))]
        before = await until_shared(holders, SLOTS)
        await asyncio.gather(*(client.call(Pay(key, 1), id=id) for key, id in zip(KEYS, ids, strict=False)))
        late = [
            asyncio.ensure_future(persist(client, Pay(key, 1), id)) for key, id in zip(KEYS, ids[24:], strict=False)
        ]
        await asyncio.sleep(0.01)
        let(False)
        async with running(owner("fresh"), bus=url) as bus:
            await until_shared(holders, SLOTS, but=before)
            await asyncio.gather(*late)
            let(True)
            await until_shared(holders, 8, 8)
            await asyncio.gather(*(bus.call(Pay(key, 1), id=id) for key, id in zip(KEYS, ids[48:], strict=False)))
            await all_once(bus, ids)


async def test_an_owner_that_was_killed_is_started_again_and_goes_on_with_what_was_sent_meanwhile(
    each_bus: str, program: Program
) -> None:
    async with connect(each_bus) as client:
        ids = list[str]()
        for turn in range(2):
            process = instance(program, each_bus, f"turn {turn}")
            called = [client.clock.id() for _ in KEYS]
            calls = [
                asyncio.ensure_future(client.call(Pay(key, 1), id=id)) for key, id in zip(KEYS, called, strict=True)
            ]
            sent = [await client.send(Pay(key, 1)) for key in KEYS]
            process.kill()
            process.wait()
            results = await asyncio.gather(*calls, return_exceptions=True)
            unsure = [id for id, each in zip(called, results, strict=True) if isinstance(each, BaseException)]
            assert all(isinstance(each, (Receipt, OutcomeUnknown, NoAnswer, Unreachable)) for each in results), results
            ids += called + sent
            async with running(owner("between"), bus=each_bus) as bus:
                for key, id in zip(KEYS, called, strict=True):
                    if id in unsure:
                        await persist(bus, Pay(key, 1), id)
                await bus.settled()
                await all_once(bus, ids)


class Refunded(Event, domain=accounts):
    number: str
    amount: int


class Refund(Command, domain=accounts):
    number: str
    amount: int


def newer(name: str) -> Service:
    """The owner's next version: it says who pays in the record, and decides what the one before does not know."""
    service = Service("accounts", owns=accounts)

    @service.decide
    def pay(account: Account | None, command: Pay) -> Paid:
        before = account.balance if account else 0
        return Paid(command.number, command.amount, before + command.amount, name)

    @service.decide
    def refund(account: Account, command: Refund) -> Refunded:
        return Refunded(command.number, command.amount)

    @service.evolve
    def paid(account: Account | None, event: Paid) -> Account:
        return Account(event.number, event.balance, event.by)

    @service.evolve
    def refunded(account: Account, event: Refunded) -> Account:
        return Account(account.number, account.balance - event.amount, account.owner)

    return service


async def test_two_versions_of_an_owner_run_side_by_side_while_the_newer_is_deployed(
    each_bus: str, program: Program
) -> None:
    first, second = instance(program, each_bus, "old 1"), instance(program, each_bus, "old 2")
    async with connect(each_bus) as client, standing(each_bus, "accounts") as holders:
        await until_shared(holders, 8, 8)
        ids, paying = list[str](), True

        async def load(key: str) -> None:
            while paying:
                ids.append(id := client.clock.id())
                await persist(client, Pay(key, 1), id)
                await asyncio.sleep(0.02)

        loads = [asyncio.ensure_future(load(key)) for key in KEYS]
        third = instance(program, each_bus, "new 1", "newer")
        await until_shared(holders, 5, 5, 6)
        await asyncio.to_thread(close, first)
        fourth = instance(program, each_bus, "new 2", "newer")
        await until_shared(holders, 5, 5, 6)
        await asyncio.to_thread(close, second)
        await until_shared(holders, 8, 8)
        paying = False
        await asyncio.gather(*loads)
        # Only now all know it: as long as an older one may hold the slot, nobody decides it there.
        receipts = [await client.call(Refund(key, 0)) for key in KEYS]
        assert all(receipt.changed for receipt in receipts)
        facts = [entry for entry in await facts_of(client) if entry.type == "Paid"]
        assert Counter(entry.meta.causation for entry in facts) == Counter(ids)
        deciders = {
            name
            for name in ("old 1", "old 2", "new 1", "new 2")
            for entry in facts
            if f'"{name}"'.encode() in (entry.body or b"")
        }
        assert deciders == {"old 1", "old 2", "new 1", "new 2"}
        for key in KEYS:
            found = await client.fetch(Account, key)
            assert found.balance == sum(entry.key == key for entry in facts)
            assert found.owner in deciders, "no record of the older fold is gone on with"
        for process in (third, fourth):
            await asyncio.to_thread(close, process)


async def test_an_older_version_of_an_owner_decides_nothing_upon_facts_that_it_does_not_know(each_bus: str) -> None:
    async with running(newer("new"), bus=each_bus) as bus:
        await bus.call(Pay("a", 5))
        await bus.call(Refund("a", 2))
        await bus.call(Pay("b", 1))

    async with running(older(), bus=each_bus) as bus:
        with pytest.raises(Unreadable, match="'Refunded', which this program does not know"):
            await bus.call(OldPay("a", 1))
        assert (await bus.call(OldPay("b", 1))).version == 2
        sent = await bus.send(OldPay("a", 7))
    async with running(newer("new"), bus=each_bus) as bus:
        await bus.settled()
        assert (await bus.fetch(Account, "a")).balance == 10
        assert [entry.meta.causation for entry in await facts_of(bus) if entry.key == "a"][-1] == sent


old_accounts = Domain("accounts", key="number")


class OldAccount(Record, domain=old_accounts, name="Account"):
    number: str
    balance: int


class OldPaid(Event, domain=old_accounts, name="Paid"):
    number: str
    amount: int
    balance: int
    by: str


class OldPay(Command, domain=old_accounts, name="Pay"):
    number: str
    amount: int


def older() -> Service:
    """The owner as it was before `Refunded` was declared at all."""
    service = Service("accounts", owns=old_accounts)

    @service.decide
    def pay(account: OldAccount | None, command: OldPay) -> OldPaid:
        return OldPaid(command.number, command.amount, (account.balance if account else 0) + command.amount, "old")

    @service.evolve
    def paid(account: OldAccount | None, event: OldPaid) -> OldAccount:
        return OldAccount(event.number, event.balance)

    return service


async def test_another_service_neither_starts_with_the_domain_nor_records_its_facts_while_the_owner_is_down(
    each_bus: str, program: Program
) -> None:
    process = instance(program, each_bus, "owner")
    process.kill()
    process.wait()

    thieves = Service("thieves", owns=accounts)

    @thieves.evolve
    def paid(account: Account | None, event: Paid) -> Account:
        return Account(event.number, event.balance)

    shops = Domain("shops", key="shop")

    class Sold(Event, domain=shops):
        shop: str

    class Sell(Command, domain=shops):
        shop: str

    shop = Service("shop", owns=shops)

    @shop.decide
    def sell(standing: None, command: Sell) -> Any:
        return Paid(command.shop, 1, 1, "shop")

    with pytest.raises(NotOwner, match="'accounts' is owned by service 'accounts', not by 'thieves'"):
        async with running(thieves, bus=each_bus):
            pass
    async with running(shop, bus=each_bus) as bus:
        with pytest.raises(NotOwner, match="only its owner records it"):
            await bus.call(Sell("a"))
        assert await facts_of(bus) == []
        stands = [entry.type for entry in (await bus.facts.read(Filter("_catalogue/accounts"))).entries]
        assert stands == ["Owned"]


async def test_a_fence_is_kept_by_the_log_itself_whoever_writes(each_bus: str) -> None:
    async with connect(each_bus) as one, connect(each_bus) as two:

        def fact(n: int) -> Entry:
            return sealed("accounts/a", "Paid", one.clock.id(), Meta(n), b'{"number":"a"}')

        name = f"accounts/{slot_of('a')}"
        held = await one.facts.claim(name, "one")
        await one.facts.append("accounts/a", [fact(1)], fence=held)
        taken = await two.facts.claim(name, "two", over=held)
        await two.facts.append("accounts/a", [fact(2)], fence=taken)
        with pytest.raises(Fenced):
            await one.facts.append("accounts/a", [fact(3)], fence=held)
        with pytest.raises(Fenced):
            await one.facts.append("accounts/a", [fact(3)], fence=held, expect=2)
        assert [entry.version for entry in await facts_of(one)] == [1, 2]
