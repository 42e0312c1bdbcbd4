"""A bus on three NATS servers, one of which is killed, paused or cut off under load: see `tests.cluster_load`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from cauce import Bus, Receipt, connect, running
from cauce.backends.nats import NatsBus
from cauce.errors import OutcomeUnknown, Unavailable
from shop import users
from tests.cluster_load import CLOCK, Load, all_of, fact, opened, under_load
from tests.servers import NatsCluster

ROUNDS = int(os.environ.get("CAUCE_CLUSTER_ROUNDS", "1"))
"""How often each hurt is done."""

PATIENCE = 3.0

Hurt = Callable[[NatsCluster, int], Callable[[], None]]


def killed(cluster: NatsCluster, server: int) -> Callable[[], None]:
    cluster.servers[server].kill()
    return cluster.servers[server].start


def paused(cluster: NatsCluster, server: int) -> Callable[[], None]:
    cluster.servers[server].pause()
    return cluster.servers[server].resume


def only(cluster: NatsCluster, server: int, bus: str) -> str:
    """The address of a bus on one of the servers."""
    return f"{cluster.servers[server].url(bus)}?replicas=3"


async def leader_of(cluster: NatsCluster, stream: str) -> int:
    async with asyncio.timeout(30.0):
        while (found := await asyncio.to_thread(cluster.leader_of, stream)) is None:
            await CLOCK.sleep(0.05)
        return found


@asynccontextmanager
async def hurting(cluster: NatsCluster, stream: str, hurt: Hurt) -> AsyncIterator[int]:
    """Hurt who leads a stream, and heal it at the end. Inside, the others have another leader."""
    leader = await leader_of(cluster, stream)
    heal = await asyncio.to_thread(hurt, cluster, leader)
    try:
        await asyncio.to_thread(cluster.other_leader, stream, leader)
        yield leader
    finally:
        await asyncio.to_thread(heal)


async def checked(load: Load, cluster: NatsCluster, bus: str) -> None:
    """What was told is what stands, seen through two servers; and again, when all that is unknown was repeated."""
    await asyncio.to_thread(cluster.whole, f"{bus}_facts")
    async with opened(only(cluster, 0, bus)) as one, opened(only(cluster, 1, bus)) as two:
        await load.check(one, two)
        await load.repeat(one)
        await load.check(two, one)


@pytest.mark.parametrize("hurt", [killed, paused])
async def test_what_was_acknowledged_stands_once_when_the_leader_is(
    hurt: Hurt, nats_cluster: NatsCluster, bus_name: str
) -> None:
    url, stream = nats_cluster.url(bus_name), f"{bus_name}_facts"
    async with under_load([url] * 3, patience=PATIENCE) as load:
        for _ in range(ROUNDS):
            await load.goes_on()
            async with hurting(nats_cluster, stream, hurt):
                await load.goes_on()
            await load.goes_on()
    await checked(load, nats_cluster, bus_name)
    nats_cluster.drop(bus_name)


async def test_a_leader_that_is_cut_off_acknowledges_nothing_and_the_others_go_on(
    nats_cluster: NatsCluster, bus_name: str
) -> None:
    stream = f"{bus_name}_facts"
    async with under_load([nats_cluster.url(bus_name)] * 2, patience=PATIENCE) as load:
        await load.goes_on()
        leader = await leader_of(nats_cluster, stream)
        async with (
            opened(only(nats_cluster, leader, bus_name), patience=PATIENCE) as alone,
            connected_to(nats_cluster, leader, bus_name) as leaving,
        ):
            await load.append(alone, [fact("alone/1")])
            before = set(load.done)
            nats_cluster.cut_off(leader)
            try:
                tries = [asyncio.create_task(isolated(load, alone, n)) for n in range(1, 5)]
                tries.append(asyncio.create_task(goes_over(load, leaving)))
                await asyncio.to_thread(nats_cluster.other_leader, stream, leader)
                await load.goes_on()
                await asyncio.gather(*tries)
                assert not [id for id in load.done.keys() - before if load.done[id][0][0].domain == "alone"]
            finally:
                nats_cluster.heal(leader)
            async with asyncio.timeout(30.0):
                while await load.append(alone, [fact("alone/1")]) is None:
                    await CLOCK.sleep(0.05)
        await load.goes_on()
    await checked(load, nats_cluster, bus_name)
    nats_cluster.drop(bus_name)


@asynccontextmanager
async def connected_to(cluster: NatsCluster, server: int, bus: str) -> AsyncIterator[NatsBus]:
    """A handle that knows all servers and is connected to this one; which that is, is chance."""
    while True:
        async with opened(cluster.url(bus), patience=PATIENCE) as found:
            url = found.link.client.connected_url
            if url is not None and url.port == cluster.servers[server].port:
                yield found
                return


async def goes_over(load: Load, bus: NatsBus) -> None:
    """Write, though the server that it is connected to takes nothing: another one does."""
    async with asyncio.timeout(30.0):
        while await load.append(bus, [fact("leaving/1")]) is None:
            await CLOCK.sleep(0.05)


async def isolated(load: Load, bus: NatsBus, n: int) -> None:
    """Write one or several at once where there is no majority: that fails, in words that say what to do."""
    entries = [fact(f"alone/{n}", k) for k in range(n)]
    assert await load.append(bus, entries) is None
    assert isinstance(load.refused.get(entries[0].id, OutcomeUnknown("", "")), Unavailable)


async def test_every_receipt_has_its_fact_when_the_leader_of_the_facts_is_killed(
    nats_cluster: NatsCluster, bus_name: str
) -> None:
    url, stop = nats_cluster.url(bus_name), asyncio.Event()
    receipts: list[Receipt] = []

    async def register(bus: Bus, n: int) -> None:
        made = 0
        while not stop.is_set():
            made += 1
            wish, id = users.RegisterUser(f"{n}-{made}", "x", "x@example.org"), None
            while True:
                try:
                    receipts.append(await bus.call(wish, id=id, timeout=5.0))
                    break
                except OutcomeUnknown as error:
                    id = error.id
                except Unavailable:
                    await CLOCK.sleep(0.05)

    async with running(users.service, bus=url) as bus, connect(url) as client:
        callers = [asyncio.create_task(register(each, n)) for n, each in enumerate([bus, client] * 4)]
        await more(receipts, 100)
        async with hurting(nats_cluster, f"{bus_name}_facts", killed):
            await more(receipts, 100)
        stop.set()
        async with asyncio.timeout(30.0):
            await asyncio.gather(*callers)
        await bus.settled()
    async with opened(only(nats_cluster, 0, bus_name)) as there:
        facts = {entry.position: entry for entry in await all_of(there)}
        for receipt in receipts:
            fact = facts[receipt.position]
            assert (fact.meta.causation, fact.key, fact.version) == (receipt.id, receipt.key, receipt.version)
        mine = [entry for entry in facts.values() if entry.domain == "users"]
        assert len(mine) == len(receipts) == len({entry.key for entry in mine})
        records = await there.records.read(limit=5000)
        assert {entry.key for entry in records.entries if entry.domain == "users"} == {each.key for each in receipts}
    nats_cluster.drop(bus_name)


async def more(done: Sequence[object], count: int) -> None:
    before = len(done)
    async with asyncio.timeout(30.0):
        while len(done) < before + count:
            await CLOCK.sleep(0.01)
