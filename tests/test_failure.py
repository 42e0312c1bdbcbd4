"""Failure: when a message is tried again, and what the dependency that died, or the poison, does to all others."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from cauce import (
    ALWAYS,
    NEVER,
    BreakerOpen,
    Bus,
    Busy,
    Command,
    Context,
    Domain,
    Event,
    NoAnswer,
    Notice,
    OutcomeUnknown,
    Overloaded,
    Query,
    Record,
    Refused,
    Retry,
    Service,
    StorageFull,
    Unreachable,
    letters,
    outbox,
    running,
)
from cauce.accept import slot_of
from cauce.backends.nats.store import NatsStore
from cauce.backends.postgres.store import PostgresStore
from cauce.backends.sqlite.store import SQLiteStore
from cauce.codec import Meta, sealed, to_cloudevent
from cauce.letter import Envelope, envelope_of, letter_of, mended, with_mended
from cauce.log import Filter, entries_of
from cauce.retry import retry_for
from cauce.store import SAID, Letter, Unit
from cauce.testing import VirtualClock
from tests.kept import hurry, rows, store_of, stores_of, waiting

Run = Callable[[Callable[[], Any]], None]
Program = Callable[..., subprocess.Popen[str]]

jobs = Domain("jobs", key="name")
prices = Domain("prices")
results = Domain("results", key="name")


class Job(Record, domain=jobs):
    name: str
    n: int


class Begun(Event, domain=jobs):
    name: str
    n: int


class Begin(Command, domain=jobs):
    name: str


class Result(Record, domain=results):
    name: str
    n: int


class Done(Event, domain=results):
    name: str
    n: int


class Finish(Command, domain=results):
    name: str
    n: int


class PriceOf(Query[int], domain=prices):
    name: str


STORES: dict[str, Any] = {"sqlite": SQLiteStore, "postgresql": PostgresStore, "nats": NatsStore}

owner = Service("jobs", owns=jobs)


@owner.decide
def begin(job: Job | None, command: Begin) -> Begun:
    return Begun(command.name, (job.n if job else 0) + 1)


@owner.evolve
def begun(job: Job | None, event: Begun) -> Job:
    return Job(event.name, event.n)


def reacting(function: Callable[..., Any], retry: Retry | Mapping[type[Exception], Retry] | None = None) -> Service:
    """A service with one reaction, called `handle`."""
    service = Service("reacting")
    function.__name__ = "handle"
    service.on(retry=Retry() if retry is None else retry)(function)
    return service


async def letters_of(url: str, service: str = "reacting") -> list[Letter]:
    async with stores_of(url) as stores:
        return await stores.letters(service)


async def until(condition: Callable[[], bool], bus: Bus, within: float = 60.0) -> None:
    end = bus.clock.monotonic() + within
    while not condition():
        assert bus.clock.monotonic() < end, "it never came"
        await bus.clock.sleep(0.01)


# -------------------------------------------------------------------------------------------------- when it is tried


def test_a_delay_lies_between_half_and_all_of_what_grows_up_to_the_longest() -> None:
    retry = Retry(first=0.5, longest=20.0, factor=3)
    most = [0.5, 1.5, 4.5, 13.5, 20.0, 20.0]
    assert [retry.delay(tries, 1.0) for tries in range(1, 7)] == most
    assert [retry.delay(tries, 0.0) for tries in range(1, 7)] == [each / 2 for each in most]
    assert retry.delay(10**9, 1.0) == 20.0
    assert Retry(factor=1).delay(50, 1.0) == 0.1


def test_of_several_policies_that_of_the_nearest_class_counts() -> None:
    some, other = Retry(attempts=3), Retry(attempts=4)
    policies = {OSError: some, ValueError: NEVER, ConnectionError: ALWAYS}
    assert retry_for(policies, ConnectionResetError()) is ALWAYS
    assert retry_for(policies, FileNotFoundError()) is some
    assert retry_for(policies, UnicodeError()) is NEVER
    assert retry_for(policies, KeyError()) == Retry()
    assert retry_for({Exception: other, ValueError: NEVER}, KeyError()) is other
    assert retry_for(some, KeyError()) is some


# The checkers find most of these, too.
anything: Any = Retry
service: Any = Service("s")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: anything(attempts=-1), lambda: anything(attempts=1.5), lambda: anything(first=0),
        lambda: anything(first=9, longest=1), lambda: anything(longest=float("nan")),
        lambda: anything(longest=float("inf")), lambda: anything(factor=0.5), lambda: service.on(retry=3),
        lambda: service.on(retry={"ValueError": NEVER}), lambda: service.on(retry={ValueError: 3}),
        lambda: service.on(retry={KeyboardInterrupt: NEVER}),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_right_is_refused_when_it_is_said(wrong: Callable[[], Any]) -> None:
    with pytest.raises(Refused, match=r"say|pass a Retry|name a class of exceptions"):
        wrong()


async def test_what_is_never_to_be_tried_again_is_a_dead_letter_at_once_and_all_else_is_tried_as_its_kind_says(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    tries, kinds = Counter[str](), {"bad": ValueError, "odd": KeyError, "slow": TimeoutError, "other": RuntimeError}

    async def handle(event: Begun) -> None:
        tries[event.name] += 1
        if event.name != "slow" or tries["slow"] < 20:
            raise kinds[event.name](event.name)

    policies = {
        ValueError: NEVER, LookupError: Retry(attempts=3), TimeoutError: Retry(attempts=0, longest=0.1),
        Exception: Retry(attempts=2),
    }  # fmt: skip
    async with running(owner, reacting(handle, policies), bus=each_bus) as bus:
        for name in kinds:
            await bus.call(Begin(name))
        await bus.settled(timeout=60)
    assert tries == {"bad": 1, "odd": 3, "slow": 20, "other": 2}
    found = {each.stream: (each.attempts, each.error) for each in await letters_of(each_bus)}
    assert found == {
        "jobs/bad": (1, "ValueError: bad"), "jobs/odd": (3, "KeyError: 'odd'"), "jobs/other": (2, "RuntimeError: other"),
    }  # fmt: skip


def test_five_hundred_that_fail_together_do_not_come_back_together(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    """Their dependency dies while they are in flight: their next tries are spread over half of the delay."""
    at, back = defaultdict[str, list[float]](list), list[bool]()

    async def handle(event: Begun, ctx: Context) -> None:
        at[event.name].append(clock.monotonic())
        if not back:
            raise ConnectionError("the dependency is away")

    async def main() -> None:
        async with running(owner, reacting(handle, Retry(first=10.0, longest=160.0)), bus=bus_url, clock=clock) as bus:
            await asyncio.gather(*(bus.call(Begin(f"job{n}")) for n in range(500)))
            await until(lambda: len(at) == 500 and min(map(len, at.values())) >= 2, bus, 1000.0)
            back.append(True)
            await bus.settled(timeout=1000.0)
        assert len(at) == 500
        delays = [times[1] - times[0] for times in at.values()]
        assert min(delays) >= 5.0
        tenths = Counter(int((delay - 5.0) / 0.5) for delay in delays)
        assert max(tenths.values()) < 100, f"of 500 in a tenth of the time: {tenths}"
        assert len(tenths) >= 10
        assert await letters_of(bus_url) == []

    virtual(main)


def test_what_is_not_the_messages_fault_waits_with_growing_delay_and_never_parks(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    at = defaultdict[str, list[float]](list)
    errors: dict[str, Exception] = {
        type(each).__name__: each
        for each in (
            NoAnswer("x"), OutcomeUnknown("x", "x"), Busy("x"), Overloaded("x"), StorageFull("x"), BreakerOpen("x"),
            Unreachable("x"),
        )
    }  # fmt: skip

    async def handle(event: Begun) -> None:
        at[event.name].append(clock.monotonic())
        if clock.monotonic() - at[event.name][0] < 300:
            raise errors[event.name]

    async def main() -> None:
        async with running(owner, reacting(handle, Retry(attempts=2)), bus=bus_url, clock=clock) as bus:
            for name in errors:
                await bus.call(Begin(name))
            await bus.settled(timeout=1000)
        for name in errors:
            delays = [after - before for before, after in pairwise(at[name])]
            assert 12 < len(delays) < 30, name
            assert all(after > before for before, after in pairwise(delays[:8:2])), "they grow"
            assert max(delays) <= 60.1
        assert await waiting(bus_url, "reacting", "handle") == []

    virtual(main)


def test_errors_of_a_clients_own_connections_count_unless_the_policy_says_otherwise(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def handle(event: Begun) -> None:
        raise ConnectionRefusedError("no smtp") if event.name == "mail" else TimeoutError("no smtp in time")

    async def main() -> None:
        service = reacting(handle, {Exception: Retry(attempts=2), ConnectionError: ALWAYS})
        async with running(owner, service, bus=bus_url, clock=clock) as bus:
            for name in ("mail", "late"):
                await bus.call(Begin(name))
            await clock.sleep(200)
            assert [each.stream for each in await letters_of(bus_url)] == ["jobs/late"]
            (mail,) = [each for each in await waiting(bus_url, "reacting", "handle") if each.stream == "jobs/mail"]
            assert mail.attempts > 9

    virtual(main)


def test_while_a_callee_is_down_for_ten_minutes_nothing_is_parked_and_then_all_is_handled_in_order(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    told = list[tuple[str, int]]()

    async def handle(event: Begun, ctx: Context) -> None:
        assert await ctx.ask(PriceOf(event.name)) == 1
        told.append((event.name, event.n))

    callee = Service("callee", owns=prices)

    @callee.answer
    async def price(query: PriceOf) -> int:
        return 1

    async def main() -> None:
        async with running(owner, reacting(handle), bus=bus_url, clock=clock) as bus:
            for n in range(60):
                await bus.call(Begin(f"job{n % 20}"))
                await clock.sleep(10 if n % 10 else 15)
            assert told == []
            assert await letters_of(bus_url) == []
            async with running(callee, bus=bus_url, clock=clock):
                await bus.settled(timeout=1000)
        assert sorted(told) == sorted((f"job{n}", each) for n in range(20) for each in (1, 2, 3))
        assert all([n for name, n in told if name == each] == [1, 2, 3] for each in {name for name, _ in told}), (
            "in order per thing"
        )

    virtual(main)


# ------------------------------------------------------------------------------------------------------- the poison


async def test_one_poison_among_a_hundred_delays_only_its_own_thing(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    handled = list[tuple[str, int]]()

    async def handle(event: Begun) -> None:
        if (event.name, event.n) == ("job7", 3):
            raise ValueError("poison")
        handled.append((event.name, event.n))

    async with running(owner, reacting(handle, Retry(attempts=3)), bus=each_bus) as bus:
        for n in range(100):
            await bus.call(Begin(f"job{n % 10}"))
        await bus.settled(timeout=60)
    expected = [(f"job{n}", each) for n in range(10) for each in range(1, 11) if n != 7 or each < 3]
    assert sorted(handled) == sorted(expected)
    assert all(
        [n for name, n in handled if name == each] == sorted(n for name, n in handled if name == each)
        for each, _ in expected
    )
    (letter,) = await letters_of(each_bus)
    assert (letter.stream, letter.attempts, letter.behind) == ("jobs/job7", 3, 7)


# --------------------------------------------------------------------------------------------- what handlers said


def sayers(broken: set[str]) -> Service:
    """A service that records a job as done because another was begun, and cannot fold some of them."""
    service = Service("sayers", owns=results)

    @service.evolve
    def done(result: Result | None, event: Done) -> Result:
        if event.name in broken or event.n < 0:
            raise ValueError(f"cannot fold {event.name}")
        return Result(event.name, event.n)

    @service.on
    async def note(event: Begun) -> Done:
        return Done(event.name, event.n)

    return service


async def test_an_event_that_its_log_refuses_for_good_is_a_dead_letter_with_the_later_ones_behind_it(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(outbox, "_RETRY", Retry(attempts=3, first=0.5))
    monkeypatch.setattr("cauce.shares.BEAT", 0.1)
    broken = {"a", "b"}
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        for _ in range(3):
            for name in ("a", "b", "c"):
                await bus.call(Begin(name))
        await bus.settled(timeout=60)
        assert await bus.record(Result, "c") == Result("c", 3)
        found = {each.stream: each for each in await letters_of(each_bus, "sayers")}
        assert {stream: (each.consumer, each.attempts, each.behind) for stream, each in found.items()} == {
            "results/a": (SAID, 3, 2), "results/b": (SAID, 3, 2),
        }  # fmt: skip
        message = json.loads(bytes(found["results/a"].message))
        assert (message["type"], message["data"], message["said"]) == (
            "Done", {"name": "a", "n": 1}, {"kind": "event", "handler": "note"},
        )  # fmt: skip
    # They wait through a restart, and are not tried again by it.
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.call(Begin("a"))
        await bus.settled(timeout=60)
        found = {each.stream: each for each in await letters_of(each_bus, "sayers")}
        assert {stream: each.behind for stream, each in found.items()} == {"results/a": 3, "results/b": 2}
        broken.clear()
        async with stores_of(each_bus) as stores:
            await stores.retry("sayers", SAID, found["results/a"].position)
            await stores.discard("sayers", SAID, found["results/b"].position)
        async with asyncio.timeout(60):
            while [await bus.record(Result, name) for name in ("a", "b")] != [Result("a", 4), Result("b", 3)]:
                await bus.clock.sleep(0.02)
        await bus.settled(timeout=60)
        facts = [each async for each in entries_of(bus.facts, Filter(domains=frozenset({"results"})))]
        assert [json.loads(each.body or b"")["n"] for each in facts if each.key == "a"] == [1, 2, 3, 4]
        assert [json.loads(each.body or b"")["n"] for each in facts if each.key == "b"] == [2, 3]
    assert await letters_of(each_bus, "sayers") == []
    assert await waiting(each_bus, "sayers", SAID) == []


async def test_what_was_set_aside_and_not_struck_out_before_a_crash_is_relayed_by_nobody_else(
    each_bus: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two writings the process dies: the same number stands in the outbox and among what waits."""
    hurry(monkeypatch)
    monkeypatch.setattr(outbox, "_RETRY", Retry(attempts=2, first=0.1))
    store = STORES[backend]
    relayed, lost = store.relayed, list[Any]()

    async def dies(self: Any, numbers: Any) -> None:
        lost.append(numbers)

    broken = {"a"}
    with monkeypatch.context() as patch:
        patch.setattr(store, "relayed", dies)
        async with running(owner, sayers(broken), bus=each_bus) as bus:
            await bus.call(Begin("a"))
            await until(lambda: bool(lost), bus)
            await bus.call(Begin("a"))
            await until(lambda: len(lost) > 1, bus)
    assert store.relayed is relayed
    assert [(each.dead, each.stream) for each in await waiting(each_bus, "sayers", SAID)] == [
        (True, "results/a"), (False, "results/a"),
    ]  # fmt: skip
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.settled(timeout=60)
        assert len(await waiting(each_bus, "sayers", SAID)) == 2
        async with store_of(each_bus, "sayers") as kept:
            assert await kept.outbox(0, 9) == []
        (letter,) = await letters_of(each_bus, "sayers")
        broken.clear()
    async with stores_of(each_bus) as stores:
        await stores.retry("sayers", SAID, letter.position)
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.settled(timeout=60)
        assert await bus.record(Result, "a") == Result("a", 2)


OTHER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_failure import running, sayers

async def main():
    async with running(sayers(set()), bus=sys.argv[1]):
        print("runs", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


async def test_what_was_said_and_is_dead_goes_with_its_slot_to_another_instance(
    each_bus: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(outbox, "_RETRY", Retry(attempts=2, first=0.1))
    monkeypatch.setattr("cauce.shares.BEAT", 0.1)
    names = [f"job{n}" for n in range(16)]
    broken = set(names)
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Begin(name)) for name in names))
        await bus.settled(timeout=60)
        found = await letters_of(each_bus, "sayers")
        assert len(found) == 16
        other = program(OTHER.format(tests=str(Path(__file__).parent)), each_bus)
        async with store_of(each_bus, "sayers") as store, asyncio.timeout(60):
            # Until each has half of the slots.
            while len(holders := (await store.tick("nobody", ())).holders) < 17 or len(set(holders.values())) < 2:
                await bus.clock.sleep(0.05)
        broken.clear()
        async with stores_of(each_bus) as stores:
            assert len((await letters.retry(stores, found)).letters) == 16
        async with asyncio.timeout(60):
            while [await bus.record(Result, name) for name in names] != [Result(name, 1) for name in names]:
                await bus.clock.sleep(0.05)
        assert other.poll() is None
    assert await waiting(each_bus, "sayers", SAID) == []


async def test_what_was_discarded_of_what_was_said_while_nothing_ran_does_not_come_back(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(outbox, "_RETRY", Retry(attempts=2, first=0.1))
    broken = {"a"}
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.call(Begin("a"))
        await bus.settled(timeout=60)
    (letter,) = await letters_of(each_bus, "sayers")
    broken.clear()
    async with stores_of(each_bus) as stores:
        await stores.discard("sayers", SAID, letter.position)
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.settled(timeout=60)
        assert await bus.record(Result, "a") is None


# ------------------------------------------------------------------------------------------------- what is mended


@pytest.mark.usefixtures("impatient")
async def test_a_mended_body_is_given_to_the_handler_and_log_and_original_stay_as_they_were(each_bus: str) -> None:
    handled = list[tuple[str, int]]()

    async def handle(event: Begun) -> None:
        if event.n == 1:
            raise ValueError("poison")
        handled.append((event.name, event.n))

    async with running(owner, reacting(handle, NEVER), bus=each_bus) as bus:
        for _ in range(2):
            await bus.call(Begin("a"))
        await bus.settled(timeout=60)
        (letter,) = await letters_of(each_bus)
        async with stores_of(each_bus) as stores:
            edited = await letters.edit(stores, letter, b'{"name": "a", "n": 70}', "ana", bus.clock)
            with pytest.raises(Refused, match="or it has changed meanwhile"):
                await letters.edit(stores, letter, b'{"name": "a", "n": 71}', "joe", bus.clock)
            (kept,) = await letters.found(stores, letters.Choice("reacting"))
            assert kept == edited
            message = json.loads(bytes(kept.message))
            assert (message["data"], message["mended"]["data"]) == ({"name": "a", "n": 1}, {"name": "a", "n": 70})
            assert (await letters.retry(stores, [kept])).letters == [kept]
            assert (await letters.retry(stores, [kept])).gone == [kept]
        await until(lambda: handled == [("a", 70), ("a", 2)], bus)
        await bus.settled(timeout=60)
        facts = [each async for each in entries_of(bus.facts, Filter("jobs/a"))]
        assert [json.loads(each.body or b"")["n"] for each in facts] == [1, 2]
    assert await waiting(each_bus, "reacting", "handle") == []


async def test_what_was_said_is_recorded_as_it_was_mended(each_bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(outbox, "_RETRY", Retry(attempts=2, first=0.1))
    broken = {"a"}
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.call(Begin("a"))
        await bus.settled(timeout=60)
        (letter,) = await letters_of(each_bus, "sayers")
        async with stores_of(each_bus) as stores:
            letter = await letters.edit(stores, letter, b'{"name": "a", "n": 7}', "ana", bus.clock)
            await letters.retry(stores, [letter])
    broken.clear()
    async with running(owner, sayers(broken), bus=each_bus) as bus:
        await bus.settled(timeout=60)
        assert await bus.record(Result, "a") == Result("a", 7)


async def test_a_command_that_was_sent_is_decided_as_it_was_mended_and_never_about_another_thing(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retry, "delay", lambda self, tries, chance: 0.01)
    strict = Service("strict", owns=results)

    @strict.decide
    def finish(result: Result | None, command: Finish) -> Done:
        if command.n < 0:
            raise ValueError("not below zero")
        return Done(command.name, command.n)

    @strict.evolve
    def done(result: Result | None, event: Done) -> Result:
        return Result(event.name, event.n)

    async with running(strict, bus=each_bus) as bus:
        for name in ("a", "b"):
            await bus.send(Finish(name, -1))
        await bus.settled(timeout=120)
        async with stores_of(each_bus) as stores:
            for letter in await letters.found(stores, letters.Choice("strict", "decide results")):
                # One of them is to be about another thing.
                letter = await letters.edit(stores, letter, b'{"name": "a", "n": 7}', "ana", bus.clock)
                await letters.retry(stores, [letter])
    async with running(strict, bus=each_bus) as bus:
        await bus.settled(timeout=120)
        assert await bus.record(Result, "a") == Result("a", 7)
        (fact,) = [each async for each in entries_of(bus.facts, Filter(domains=frozenset({"results"})))]
        assert fact.wished is not None
        assert json.loads(bytes(fact.wished.body)) == {"name": "a", "n": 7}
    (letter,) = await letters_of(each_bus, "strict")
    assert (letter.stream, letter.error[:44]) == ("results/b", "Refused: Finish is about another thing than ")


@pytest.mark.usefixtures("impatient")
async def test_a_message_that_cannot_be_decoded_is_a_dead_letter_with_its_raw_bytes_that_can_be_mended(
    each_bus: str,
) -> None:
    handled = list[tuple[str, int]]()

    async def handle(event: Begun) -> None:
        handled.append((event.name, event.n))

    async with running(reacting(handle, Retry(attempts=2)), bus=each_bus) as bus:
        for key, body in (("text", b"no json"), ("bytes", b"\xff\xfe\x00"), ("shape", b'{"name": 7}')):
            entry = sealed(f"jobs/{key}", "Begun", bus.clock.id(), Meta(bus.clock.now()), body)
            await bus.facts.append(entry.stream, [entry])
        await bus.settled(timeout=60)
        async with stores_of(each_bus) as stores:
            found = {each.stream: each for each in await letters.found(stores, letters.Choice("reacting"))}
            kept = {stream: json.loads(bytes(each.message)) for stream, each in found.items()}
            assert b64decode(kept["jobs/text"]["data_base64"]) == b"no json"
            assert b64decode(kept["jobs/bytes"]["data_base64"]) == b"\xff\xfe\x00"
            assert kept["jobs/shape"]["data"] == {"name": 7}
            assert all(each.error.startswith("Unreadable: Begun of jobs") for each in found.values())
            edited = await letters.edit(stores, found["jobs/bytes"], b'{"name": "bytes", "n": 3}', "ana", bus.clock)
            assert json.loads(bytes(edited.message))["data_base64"] == kept["jobs/bytes"]["data_base64"]
            await letters.retry(stores, [edited])
            await letters.discard(stores, [found["jobs/text"], found["jobs/shape"]])
        await until(lambda: handled == [("bytes", 3)], bus)
        await bus.settled(timeout=60)
    assert await waiting(each_bus, "reacting", "handle") == []


@pytest.mark.usefixtures("impatient")
async def test_settled_waits_until_a_dead_letter_is_stored(
    each_bus: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, burying = STORES[backend], asyncio.Event()
    commit = store.commit

    async def slow(self: Any, unit: Unit) -> None:
        if unit.parked is not None and unit.parked[1].dead:
            burying.set()
            await asyncio.sleep(0.2)
        await commit(self, unit)

    async def handle(event: Begun) -> None:
        raise ValueError(event.name)

    monkeypatch.setattr(store, "commit", slow)
    async with running(owner, reacting(handle, Retry(attempts=2)), bus=each_bus) as bus:
        await bus.call(Begin("a"))
        await burying.wait()
        await bus.settled(timeout=60)
        assert [each.stream for each in await letters_of(each_bus)] == ["jobs/a"]


def test_what_older_code_kept_of_a_message_is_shown_as_far_as_it_goes() -> None:
    """It kept nothing of a notice, and the bytes of a broken body as they were, which made no JSON of the whole."""
    entry = sealed("jobs/a", "Begun", "id", Meta(1_000_000, schema=3, by="eva"), b'{"name": "a"}')
    whole = msgspec.json.encode(to_cloudevent(entry))
    assert letter_of(entry) == whole
    told = envelope_of(whole)
    assert (told.type, told.subject, told.schemaversion, bytes(told.data)) == ("Begun", "a", 3, b'{"name": "a"}')
    for kept in (b"", b"null", whole.replace(b'{"name": "a"}', b"\xff"), b"[]"):
        assert envelope_of(kept) == Envelope()
        assert mended(entry, kept) is entry
        with pytest.raises(Refused, match="nothing to mend"):
            with_mended(kept, b"{}", "ana", 0)
    again = with_mended(with_mended(whole, b"{}", "ana", 0), b'{ "n": 1 }', "joe", 1_000_000)
    assert json.loads(again) == json.loads(whole) | {
        "mended": {"data": {"n": 1}, "by": "joe", "time": "1970-01-01T00:00:01+00:00"}
    }
    made = mended(entry, again)
    assert (made.body, made.raw, made.id, made.checked()) == (b'{"n":1}', entry.raw, entry.id, made)


async def test_a_reaction_that_is_told_no_body_has_nothing_to_mend(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)

    async def handle(notice: Notice[Begun]) -> None:
        raise ValueError("poison")

    async with running(owner, reacting(handle, NEVER), bus=each_bus) as bus:
        await bus.call(Begin("a"))
        await bus.settled(timeout=60)
        (letter,) = await letters_of(each_bus)
        assert json.loads(bytes(letter.message))["type"] == "Begun"
        async with stores_of(each_bus) as stores:
            with pytest.raises(Refused, match="nothing to mend"):
                await letters.edit(stores, letter, b'{"name": "a", "n": 70}', "ana", bus.clock)


# ------------------------------------------------------------------------------------------------- two who decide

WORKER = """
import asyncio, sys, time
sys.path.insert(0, {tests!r})
from test_failure import Begun, Retry, Service, running
service = Service("reacting")

@service.on(retry=Retry(attempts=1))
async def handle(event: Begun) -> None:
    await asyncio.sleep(0.002)
    print("handled", time.monotonic_ns(), event.name, event.n, flush=True)

async def main():
    async with running(service, bus=sys.argv[1]):
        print("runs", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def test_a_bulk_retry_by_two_terminals_at_once_drains_each_thing_once_and_in_order_over_two_instances(
    each_bus: str, program: Program
) -> None:
    async def fill() -> None:
        async def handle(event: Begun) -> None:
            raise ValueError("broken")

        async with running(owner, reacting(handle, NEVER), bus=each_bus) as bus:
            for _ in range(4):
                await asyncio.gather(*(bus.call(Begin(f"job{n}")) for n in range(20)))
            await bus.settled(timeout=60)
        assert len(await letters_of(each_bus)) == 20

    asyncio.run(fill())
    workers = [program(WORKER.format(tests=str(Path(__file__).parent)), each_bus) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "runs\n"
    command = [str(Path(sys.executable).with_name("cauce")), "dead", "retry", "reacting", "--yes", "--bus", each_bus]
    terminals = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [terminal.communicate(timeout=60) for terminal in terminals]
    done = [int(found[1]) for out, _ in told if (found := re.search(r"(\d+) dead letters? tried again", out))]
    assert sum(done) == 20, told
    asyncio.run(drained(each_bus))
    handled = list[list[str]]()
    for worker in workers:
        out, _ = worker.communicate("\n", timeout=60)
        handled += [line.split()[1:] for line in out.splitlines() if line.startswith("handled")]
    assert sorted(each[1:] for each in handled) == sorted([f"job{n}", str(m)] for n in range(20) for m in range(1, 5))
    # A slot may go from one to the other meanwhile.
    handled.sort(key=lambda each: int(each[0]))
    for n in range(20):
        assert [each for _, name, each in handled if name == f"job{n}"] == ["1", "2", "3", "4"]


async def drained(url: str) -> None:
    async with asyncio.timeout(60):
        while await waiting(url, "reacting", "handle"):  # noqa: ASYNC110 - others drain it
            await asyncio.sleep(0.05)


# ------------------------------------------------------------------------------------- the store, and what it knows


async def test_while_the_store_takes_no_dead_letter_its_lane_waits_and_says_so_and_then_goes_on(
    each_bus: str, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hurry(monkeypatch)
    store = STORES[backend]
    full, commit, handled = [True], store.commit, list[str]()

    async def refusing(self: Any, unit: Unit) -> None:
        if full and unit.parked is not None:
            raise StorageFull("the disk took no more: make room, then try again")
        await commit(self, unit)

    async def handle(event: Begun) -> None:
        if event.name == "bad":
            raise ValueError("poison")
        handled.append(event.name)

    monkeypatch.setattr(store, "commit", refusing)
    same, other = (
        next(f"job{n}" for n in range(99) if (slot_of(f"job{n}") == slot_of("bad")) is here) for here in (True, False)
    )
    async with running(owner, reacting(handle, NEVER), bus=each_bus) as bus:
        for name in ("bad", same, other, "bad"):
            await bus.call(Begin(name))
        await until(
            lambda: other in handled and "its store takes nothing now, so it waits: the disk" in caplog.text, bus
        )
        assert handled == [other], "what stands behind it in its lane waits"
        assert await letters_of(each_bus) == []
        full.clear()
        await bus.settled(timeout=60)
        assert handled == [other, same]
        (letter,) = await letters_of(each_bus)
        assert (letter.stream, letter.error, letter.behind) == ("jobs/bad", "ValueError: poison", 1)


async def test_a_store_whose_file_may_not_grow_loses_no_message_and_goes_on_when_there_is_room(
    bus_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hurry(monkeypatch)
    opened = list[Any]()
    make = SQLiteStore.open

    async def noted(*how: Any) -> SQLiteStore:
        opened.append(await make(*how))
        return cast("SQLiteStore", opened[-1])

    def may_grow(pages: int) -> None:
        # In the thread of its writer, whose connection it is.
        opened[-1]._journal.connection.execute(f"pragma max_page_count = {pages}").fetchall()

    monkeypatch.setattr(SQLiteStore, "open", noted)

    async def handle(event: Begun) -> None:
        raise ValueError("poison " * 1000)

    async with running(owner, reacting(handle, NEVER), bus=bus_url) as bus:
        await opened[-1]._writer.submit(may_grow, 1)
        for n in range(40):
            await bus.call(Begin(f"job{n}"))
        await until(lambda: "StorageFull" in caplog.text or "its store takes nothing now" in caplog.text, bus)
        before = len(await letters_of(bus_url))
        assert before < 40
        await opened[-1]._writer.submit(may_grow, 1_000_000)
        await bus.settled(timeout=60)
        assert len(await letters_of(bus_url)) == 40


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
async def test_a_place_that_was_put_back_by_hand_has_each_message_handled_again_with_its_key_and_says_nothing_twice(
    each_bus: str,
) -> None:
    """The place is the inbox: who puts it back delivers twice. What is stored by the key, or said, stands once."""
    keys = Counter[str]()

    schema = "create table effects (key text primary key, n integer)"
    service = Service("reacting", schema=schema)

    @service.on
    async def handle(event: Begun, ctx: Context) -> Begin | None:
        keys[ctx.idempotency_key] += 1
        ctx.store.execute("insert into effects values (?, ?) on conflict do nothing", (ctx.idempotency_key, event.n))
        return Begin(f"{event.name}'") if "'" not in event.name else None

    async with running(owner, service, bus=each_bus) as bus:
        for n in range(10):
            await bus.call(Begin(f"job{n}"))
        await until(lambda: len(keys) == 20, bus)
    async with store_of(each_bus, "reacting", [schema]) as store:
        facts_log = (await store.inventory()).places[0].log
        for each in (await store.inventory()).places:
            store.move(None, each.consumer, each.domain, each.slot, facts_log, 0)
        await store.flush()
    async with running(owner, service, bus=each_bus) as bus:
        await until(lambda: sum(keys.values()) == 40, bus)
        await bus.settled(timeout=60)
        facts = [each async for each in entries_of(bus.facts, Filter(domains=frozenset({"jobs"})))]
        assert len(facts) == 20, "each was said once"
    assert sorted(keys.values()) == [2] * 20
    assert await rows(each_bus, "reacting", schema, "select count(*) from effects") == [(20,)]
