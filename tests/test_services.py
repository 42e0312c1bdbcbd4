"""Services: what is found wrong before anything runs, who may run, and how a run ends."""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cauce import (
    Command,
    Context,
    Domain,
    Event,
    Fenced,
    Held,
    NoAnswer,
    Notice,
    NotOwner,
    Query,
    Record,
    Refused,
    Service,
    connect,
    running,
)
from cauce.accept import SLOTS, slot_of
from cauce.backends.postgres import log as postgres_log
from cauce.backends.sqlite import log as sqlite_log
from cauce.codec import Entry
from cauce.lease import TTL, identity, is_dead
from cauce.log import Log
from cauce.service import bind
from cauce.testing import VirtualClock
from shop import users
from shop.users import RegisterUser, User
from tests.kept import stores_of

Run = Callable[[Callable[[], Any]], None]

tasks = Domain("tasks", key="name")
lists = Domain("lists", key="name")
talk = Domain("talk")


class Task(Record, domain=tasks):
    name: str
    done: int = 0


class Done(Event, domain=tasks):
    name: str


class Do(Command, domain=tasks):
    name: str


class HowMany(Query[int], domain=tasks):
    pass


class Listed(Event, domain=lists):
    name: str


class List(Record, domain=lists):
    name: str


class Enlist(Command, domain=lists):
    name: str


class Mute(Query, domain=talk):  # type: ignore[type-arg]
    pass


class Bare(Event):
    name: str


class Nobody(Record):
    name: str


def owner() -> Service:
    service = Service("tasks", owns=tasks)

    @service.decide
    def do(task: Task | None, command: Do) -> Done:
        return Done(command.name)

    @service.evolve
    def done(task: Task | None, event: Done) -> Task:
        return Task(event.name, (task.done if task else 0) + 1)

    return service


async def entries(log: Log, domain: str = "") -> list[Entry]:
    found, looked, head = list[Entry](), 0, await log.head()
    while looked < head:
        page = await log.read(after=looked)
        found += (each for each in page.entries if domain in ("", each.domain))
        looked = page.looked
    return found


async def ids(log: Log) -> list[str]:
    return [each.id for each in await entries(log)]


# --------------------------------------------------------------------------- what is found wrong before it runs


def one_parameter(command: Do) -> Done: ...
def three_parameters(task: Task | None, command: Do, more: int) -> Done: ...
def no_annotation(task, command):  # type: ignore[no-untyped-def]
    ...
def half_annotated(task, command: Do) -> Done:  # type: ignore[no-untyped-def]
    ...
def unresolved(task: Task | None, command: Nowhere) -> Done:  # type: ignore[name-defined] # noqa: F821
    ...
def an_event(task: Task | None, event: Done) -> Done: ...
def a_text(task: Task | None, command: str) -> Done: ...
def a_command(task: Task | None, command: Do) -> Task: ...
def foreign_record(task: List | None, command: Do) -> Done: ...
def half_foreign(task: Task | List | None, command: Do) -> Done: ...
def two_domains(task: Task | None, command: Do | Enlist) -> Done: ...
def no_record(task: dict[str, str], command: Do) -> Done: ...
def homeless_record(task: Nobody | None, command: Do) -> Done: ...
def keyword_only(task: Task | None, *, command: Do) -> Done: ...
def all_positional(task: Task | None, *command: Do) -> Done: ...
def all_named(task: Task | None, **command: Do) -> Done: ...
def context_in_slash(task: Task | None, command: Do, ctx: Context, /) -> Done: ...
async def async_evolve(task: Task | None, event: Done) -> Task: ...
def evolve_with_context(task: Task | None, event: Done, ctx: Context) -> Task: ...
def homeless_event(event: Bare) -> None: ...
def any_event(event: Event) -> None: ...
def bare_notice(notice: Notice) -> None: ...  # type: ignore[type-arg]
def notice_of_a_command(notice: Notice[Do]) -> None: ...  # type: ignore[type-var]
def mixed(message: Notice[Done] | Listed) -> None: ...
def two_messages(event: Done, other: Listed) -> None: ...
def nothing() -> None: ...
def a_query(query: HowMany) -> int: ...
async def generator(event: Done) -> AsyncIterator[Do]:
    yield Do("a")


async def mute(query: Mute) -> int: ...
async def foreign_answer(query: Mute) -> int: ...
def foreign_decider(thing: List | None, command: Enlist) -> Listed: ...
def foreign_evolve(thing: List | None, event: Listed) -> List: ...


@pytest.mark.parametrize(
    ("kind", "function", "words"),
    [
        ("decide", one_parameter, "tasks.one_parameter has parameters.*command.*what stands"),
        ("decide", three_parameters, "tasks.three_parameters has parameters.*task, command, more"),
        ("decide", no_annotation, "tasks.no_annotation: parameter task has no annotation"),
        ("decide", half_annotated, "tasks.half_annotated: parameter task has no annotation"),
        ("decide", unresolved, "tasks.unresolved: .*Nowhere"),
        ("decide", an_event, "tasks.an_event: parameter event is Done: .*a command"),
        ("decide", a_text, "tasks.a_text: parameter command is str: .*a command"),
        ("evolve", a_command, "tasks.a_command: parameter command is Do: .*an event"),
        ("decide", foreign_record, "tasks.foreign_record: parameter task is a record of 'lists'.*'tasks'"),
        ("decide", half_foreign, "tasks.half_foreign: parameter task is a record of 'lists'.*'tasks'"),
        ("decide", two_domains, "tasks.two_domains: parameter task is a record of 'tasks'.*'lists'"),
        ("decide", no_record, "tasks.no_record: parameter task is dict.*record"),
        ("decide", homeless_record, "tasks.homeless_record: parameter task: Nobody belongs to no domain"),
        ("decide", keyword_only, "tasks.keyword_only: parameter command is keyword-only"),
        ("decide", all_positional, "tasks.all_positional: parameter command is variadic"),
        ("decide", all_named, "tasks.all_named: parameter command is variadic"),
        ("decide", context_in_slash, "tasks.context_in_slash: parameter ctx is positional-only"),
        ("evolve", async_evolve, "tasks.async_evolve: evolve is a plain function"),
        ("evolve", evolve_with_context, "tasks.evolve_with_context: evolve is a plain function"),
        ("on", homeless_event, "tasks.homeless_event: parameter event: Bare belongs to no domain"),
        ("on", any_event, "tasks.any_event: parameter event: Event belongs to no domain"),
        ("on", one_parameter, "tasks.one_parameter: parameter command is Do: .*an event or Notice"),
        ("on", bare_notice, "tasks.bare_notice: parameter notice is Notice: .*an event or Notice"),
        ("on", notice_of_a_command, "tasks.notice_of_a_command: parameter notice is Do"),
        ("on", mixed, "tasks.mixed: parameter message mixes notices and events"),
        ("on", two_messages, "tasks.two_messages has parameters.*event, other"),
        ("on", nothing, "tasks.nothing has parameters"),
        ("on", a_query, "tasks.a_query: parameter query is HowMany: .*an event"),
        ("on", generator, "tasks.generator is an async generator"),
        ("answer", homeless_event, "tasks.homeless_event: parameter event is Bare: .*a query"),
        ("answer", mute, "tasks.mute: .*Mute does not say what answers it"),
        ("decide", foreign_decider, "tasks.foreign_decider would decide Enlist of domain 'lists'.*not own"),
        ("evolve", foreign_evolve, "tasks.foreign_evolve would evolve Listed of domain 'lists'.*not own"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_function_that_cannot_be_right_is_refused_by_its_name_and_parameter_before_anything_is_made(
    bus_url: str, kind: str, function: Callable[..., Any], words: str
) -> None:
    service = Service("tasks", owns=tasks)
    getattr(service, kind)(function)
    with pytest.raises(Refused, match=words):
        bind(service)
    with pytest.raises(Refused, match=words):
        async with running(service, bus=bus_url):
            pass
    assert not Path(bus_url.removeprefix("sqlite:///")).exists()


@pytest.mark.parametrize(
    "thing",
    [functools.partial(one_parameter), lambda: None, User, 7, Service("x")],
    ids=["partial", "lambda", "class", "number", "service"],
)
def test_what_is_no_function_is_refused_where_it_is_decorated_or_bound(thing: Any) -> None:
    with pytest.raises(Refused, match="tasks"):
        service = Service("tasks", owns=tasks)
        service.decide(thing)
        bind(service)


@pytest.mark.parametrize("kind", ["decide", "evolve", "answer"])
def test_two_functions_for_one_message_are_refused_by_both_their_names(kind: str) -> None:
    service = Service("tasks", owns=tasks)

    def first(task: Task | None, message: Any) -> Any: ...
    def second(task: Task | None, message: Any) -> Any: ...
    def third(message: HowMany) -> int: ...
    def fourth(message: HowMany) -> int: ...

    first.__annotations__["message"] = second.__annotations__["message"] = Do if kind == "decide" else Done
    for each in (third, fourth) if kind == "answer" else (first, second):
        getattr(service, kind)(each)
    with pytest.raises(Refused, match="third and fourth" if kind == "answer" else "first and second"):
        bind(service)


def test_two_reactions_of_one_name_are_refused_because_places_hang_on_it() -> None:
    service = Service("mails")
    for hint in (Done, Listed):

        def told(event: Any) -> None: ...

        told.__annotations__["event"] = hint
        service.on(told)
    with pytest.raises(Refused, match="two `on` functions named told"):
        bind(service)


def test_messages_and_records_local_to_a_function_are_found() -> None:
    here = Domain("here", key="name")
    service = Service("here", owns=here)

    class Here(Record, domain=here):
        name: str

    class Came(Event, domain=here):
        name: str

    class Come(Command, domain=here):
        name: str

    @service.decide
    def come(thing: Here | None, command: Come) -> Came:
        return Came(command.name)

    @service.evolve
    def came(thing: Here | None, event: Came) -> Here:
        return Here(event.name)

    @service.on(start="now")
    def told(notice: Notice[Came], ctx: Context) -> None: ...

    assert [bound.messages for bound in bind(service)] == [(Come,), (Came,), (Came,)]
    assert [bound.notice for bound in bind(service)] == [False, False, True]
    assert bind(service)[2].context == "ctx"


def test_the_parts_of_a_service_are_data_that_can_be_read() -> None:
    service = owner()
    assert [(part.kind, part.name) for part in service.parts] == [("decide", "do"), ("evolve", "done")]
    assert repr(service) == "Service('tasks', owns=['tasks'], parts=['do', 'done'])"


@pytest.mark.parametrize("name", ["", "Mails", "../mails", "ma ils", "_mails", "mails\n", "9", "x" * 64, "é", None])
def test_a_service_whose_name_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(Refused, match="name"):
        Service(name)


async def test_two_services_of_one_name_or_for_one_domain_are_refused_before_anything_is_made(bus_url: str) -> None:
    with pytest.raises(Refused, match="two services are named 'tasks'"):
        async with running(owner(), owner(), bus=bus_url):
            pass
    with pytest.raises(Refused, match="'tasks' is owned by 'tasks' and 'thieves'"):
        async with running(owner(), Service("thieves", owns=tasks), bus=bus_url):
            pass
    assert not Path(bus_url.removeprefix("sqlite:///")).exists()


# --------------------------------------------------------------------------------------------------- one owner


async def test_a_domain_that_another_service_owns_is_refused_before_anything_is_written(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        await bus.call(Do("a"))
        await bus.settled()
    async with connect(each_bus) as client:
        before = [await ids(log) for log in (client.facts, client.commands, client.records)]
    ran = list[str]()
    innocent = Service("innocent", owns=Domain("innocent", key="name"))

    @innocent.on
    async def told(event: Done) -> None:
        ran.append(event.name)

    thieves = Service("thieves", owns=[Domain("booty", key="name"), tasks])
    with pytest.raises(NotOwner, match="'tasks' is owned by service 'tasks', not by 'thieves'"):
        async with running(innocent, thieves, bus=each_bus):
            pass
    async with connect(each_bus) as client:
        assert [await ids(log) for log in (client.facts, client.commands, client.records)] == before
    assert ran == []
    async with stores_of(each_bus) as stores:
        for name in ("innocent", "thieves"):
            with pytest.raises(Refused, match=f"'{name}' has no store here"):
                await stores.letters(name)
    async with running(owner(), bus=each_bus) as bus:
        assert (await bus.call(Do("a"))).version == 2


async def test_who_owns_what_is_entered_once(each_bus: str) -> None:
    for _ in range(3):
        async with running(owner(), bus=each_bus) as bus:
            assert len(await entries(bus.facts, "_catalogue")) == 1


async def test_a_second_run_in_the_same_process_is_refused(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        with pytest.raises(Refused, match="tasks is served already: run a service once in a process"):
            async with running(owner(), bus=each_bus):
                pass
        assert (await bus.call(Do("a"))).version == 1


_RUNNER = """
import asyncio, sys
from cauce import running
from shop.users import service

async def main():
    async with running(service, bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_an_instance_takes_over_at_once_from_one_that_was_killed(each_bus: str, program: Callable[..., Any]) -> None:
    process = program(_RUNNER, each_bus)
    assert process.stdout.readline() == "ready\n"

    async def run() -> float:
        began = time.monotonic()
        async with running(users.service, bus=each_bus) as bus:
            took = time.monotonic() - began
            await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
            return took

    process.send_signal(signal.SIGKILL)
    process.wait()
    assert asyncio.run(run()) < TTL / 2


def test_a_runner_that_ends_in_good_order_leaves_its_names_free(each_bus: str) -> None:
    async def main() -> None:
        async with running(owner(), bus=each_bus):
            pass
        async with connect(each_bus) as client:
            for name in (f"tasks/{slot}" for slot in range(SLOTS)):
                await client.facts.claim(name, "somebody")

    asyncio.run(main())


async def test_a_client_in_another_process_may_send_and_its_wish_is_decided_promptly_because_the_owner_is_woken(
    each_bus: str, program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody looks by himself for an hour, where anybody would; NATS pushes.
    for log in (sqlite_log, postgres_log):
        monkeypatch.setattr(log, "_POLL", 3600.0)
    decided = asyncio.Event()
    watching = Service("watching")

    @watching.on
    async def told(event: users.UserRegistered) -> None:
        if event.user_id == "last":
            decided.set()

    async with running(users.service, watching, bus=each_bus) as bus:
        process = program(
            """
import asyncio, sys
from cauce import connect
from shop.users import RegisterUser

async def main():
    async with connect(sys.argv[1]) as bus:
        for n in range(20):
            await bus.send(RegisterUser(str(n), "Ana", "ana@example.org"), by="elsewhere")
        await bus.send(RegisterUser("last", "Ana", "ana@example.org"))
asyncio.run(main())
""",
            each_bus,
        )
        async with asyncio.timeout(20):
            await decided.wait()
        assert (await bus.fetch(User, "7")).name == "Ana"
        assert await asyncio.to_thread(process.wait) == 0


# ----------------------------------------------------------------------------------------------- start and end


async def test_a_start_that_fails_lets_go_of_everything(bus_url: str) -> None:
    before = asyncio.all_tasks()
    broken = Service("broken")

    @broken.on
    async def told(event: Done) -> None: ...

    path = Path(bus_url.removeprefix("sqlite:///") + ".d") / "broken"
    for _ in range(3):
        path.parent.mkdir(exist_ok=True)
        path.touch()  # a file where the store's folder should be
        with pytest.raises(OSError, match="broken"):
            async with running(owner(), broken, bus=bus_url):
                pass
        assert asyncio.all_tasks() == before
        path.unlink()
        async with running(owner(), broken, bus=bus_url) as bus:
            await bus.call(Do("a"))
        path.joinpath("store.db").unlink()
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


async def test_a_start_that_is_refused_in_the_middle_lets_go_of_everything(each_bus: str) -> None:
    before = asyncio.all_tasks()

    def keeper(*schema: str) -> Service:
        return Service("keeper", schema=schema)

    async with running(owner(), keeper("create table one (n integer)"), bus=each_bus):
        pass
    for _ in range(2):
        with pytest.raises(Refused, match="made by other SQL"):
            async with running(owner(), keeper("create table two (n integer)"), bus=each_bus):
                pass
        assert asyncio.all_tasks() == before
    async with running(owner(), keeper("create table one (n integer)"), bus=each_bus) as bus:
        assert (await bus.call(Do("a"))).version == 1


async def test_after_the_end_nobody_answers_and_nothing_goes_on(each_bus: str) -> None:
    before = asyncio.all_tasks()
    async with connect(each_bus) as client:
        async with running(owner(), bus=each_bus):
            assert (await client.call(Do("a"))).version == 1
            (instance,) = await client.wire.instances()
            assert (instance.service, instance.state, instance.pid) == ("tasks", "running", os.getpid())
            assert instance.addresses == ("tasks", *(f"tasks/{slot}" for slot in range(SLOTS)))
        assert await client.wire.instances() == []
        with pytest.raises(NoAnswer):
            await client.call(Do("a"))
    assert asyncio.all_tasks() == before


async def test_an_error_inside_the_block_is_raised_after_all_is_stopped(each_bus: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with running(owner(), bus=each_bus) as bus:
            await bus.call(Do("a"))
            raise ZeroDivisionError
    async with running(owner(), bus=each_bus) as bus:
        assert await bus.record(Task, "a") == Task("a", 1)


def reacting(handle: Callable[..., Any]) -> Service:
    service = Service("reacting")
    handle.__name__ = "handle"
    service.on(handle)
    return service


async def test_a_slow_handler_finishes_before_the_end_and_is_not_handled_again(each_bus: str) -> None:
    began, ended = list[str](), list[str]()

    async def handle(event: Done, ctx: Context) -> None:
        began.append(event.name)
        await ctx.bus.clock.sleep(0.2)
        # All still answer while what is in hand is finished.
        await ctx.fetch(Task, event.name)
        ended.append(event.name)

    async with running(owner(), reacting(handle), bus=each_bus) as bus:
        for name in "abc":
            await bus.call(Do(name))
        while len(began) < 3:
            await bus.clock.sleep(0.001)
    assert sorted(ended) == ["a", "b", "c"]
    async with running(owner(), reacting(handle), bus=each_bus) as bus:
        await bus.settled()
    assert len(ended) == 3


def test_a_slow_handler_that_is_tried_again_finishes_before_the_end_too(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    began, ended = list[str](), list[str]()

    async def handle(event: Done) -> None:
        began.append(event.name)
        if len(began) == 1:
            raise ValueError
        await clock.sleep(5)
        ended.append(event.name)

    async def main() -> None:
        async with running(owner(), reacting(handle), bus=bus_url, clock=clock) as bus:
            await bus.call(Do("a"))
            await bus.call(Do("a"))
            while len(began) < 2:
                await clock.sleep(0.01)
        assert (len(began), ended) == (2, ["a"])
        async with running(owner(), reacting(handle), bus=bus_url, clock=clock) as bus:
            await bus.settled()
        assert (len(began), ended) == (3, ["a", "a"])

    virtual(main)


async def test_a_handler_that_is_too_slow_is_handed_back_and_handled_again_after_the_next_start(each_bus: str) -> None:
    began, ended = list[str](), list[str]()

    async def handle(event: Done) -> None:
        began.append(event.name)
        if len(began) == 1:
            await asyncio.Event().wait()
        ended.append(event.name)

    async with running(owner(), reacting(handle), bus=each_bus, drain=0.2) as bus:
        await bus.call(Do("a"))
        while not began:
            await bus.clock.sleep(0.001)
        at = time.monotonic()
    assert 0.19 <= time.monotonic() - at < 8
    assert (began, ended) == (["a"], [])
    async with running(owner(), reacting(handle), bus=each_bus) as bus:
        await bus.settled()
    assert (began, ended) == (["a", "a"], ["a"])


def test_the_end_does_not_wait_for_what_waits(virtual: Run, clock: VirtualClock, bus_url: str) -> None:
    tries = list[str]()

    async def handle(event: Done) -> None:
        tries.append(event.name)
        raise ValueError

    async def main() -> None:
        async with running(owner(), reacting(handle), bus=bus_url, clock=clock) as bus:
            await bus.call(Do("a"))
            while len(tries) < 6:
                await clock.sleep(0.1)
            at = clock.monotonic()
        assert clock.monotonic() - at < 1

    virtual(main)


async def test_calls_in_hand_are_answered_before_the_end(each_bus: str) -> None:
    async with running(owner(), bus=each_bus) as bus:
        calls = [asyncio.ensure_future(bus.call(Do("a"))) for _ in range(50)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*calls, return_exceptions=True)
    versions = [each.version for each in results if not isinstance(each, BaseException)]
    assert sorted(versions) == list(range(1, 51))


# ------------------------------------------------------------------------------------------------------- leases


def test_who_lost_a_name_to_another_joins_again_and_has_it_back_when_that_shows_no_beat(
    virtual: Run, clock: VirtualClock, bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(owner(), bus=bus_url, clock=clock) as bus:
            key = next(f"task{n}" for n in range(100) if slot_of(f"task{n}") == 7)
            await bus.call(Do(key))
            with pytest.raises(Held) as held:
                await bus.facts.claim("tasks/7", "thief")
            await bus.facts.claim("tasks/7", "thief", over=held.value.claim)  # type: ignore[arg-type]
            with pytest.raises(NoAnswer):
                await bus.call(Do(key))
            await clock.sleep(3 * TTL)
            await bus.call(Do(key))
            assert not bus.failed.done()
            assert [entry.version for entry in await entries(bus.facts, "tasks")] == [1, 2]

    virtual(main)
    assert "all that it has in hand is dropped, and it joins again: tasks/7 has another holder" in caplog.text


async def test_who_lost_a_slot_to_another_cannot_write_there(each_bus: str) -> None:
    with pytest.raises(Fenced):
        async with running(owner(), bus=each_bus) as bus:
            await bus.call(Do("a"))
            with pytest.raises(Held) as held:
                await bus.facts.claim(f"tasks/{slot_of('a')}", "thief")
            await bus.facts.claim(f"tasks/{slot_of('a')}", "thief", over=held.value.claim)  # type: ignore[arg-type]
            with pytest.raises(NoAnswer, match="not held here any more"):
                await bus.call(Do("a"))
            assert len(await entries(bus.facts, "tasks")) == 1
            # What the beat would find in some seconds.
            await bus.facts.beat(held.value.claim)  # type: ignore[arg-type]


def test_a_holder_elsewhere_is_replaced_only_after_its_beat_was_watched_in_vain(
    virtual: Run, clock: VirtualClock, bus_url: str
) -> None:
    async def main() -> None:
        async with connect(bus_url, clock=clock) as client:
            elsewhere = await client.facts.claim("tasks/7", "tasks another-boot:4026531836:77:12345:abc")

            async def beats() -> None:
                claim = elsewhere
                while True:
                    await clock.sleep(TTL / 5)
                    claim = await client.facts.beat(claim)

            alive = asyncio.ensure_future(beats())
            with pytest.raises(Held, match=r"held by tasks \(process 77\)"):
                async with running(owner(), bus=bus_url, clock=clock):
                    pass
            alive.cancel()
            began = clock.monotonic()
            async with running(owner(), bus=bus_url, clock=clock) as bus:
                assert TTL <= clock.monotonic() - began < 2 * TTL
                assert (await bus.call(Do("a"))).version == 1

    virtual(main)


def test_whether_an_owner_is_dead_is_proved_or_not_told(clock: VirtualClock, program: Callable[..., Any]) -> None:
    mine = identity("tasks", clock)
    assert is_dead(mine) is False
    service, _, where = mine.partition(" ")
    boot, namespace, pid, started, chance = where.split(":")
    assert is_dead(f"{service} {boot}:{namespace}:{pid}:1:{chance}") is True, "the number of a process is used again"
    assert is_dead(f"{service} other:{namespace}:{pid}:{started}:{chance}") is None
    assert is_dead(f"{service} {boot}:other:{pid}:{started}:{chance}") is None
    for strange in ("", "tasks", "a b c", "x:y:z", f"{boot}:{namespace}:pid:{started}:x"):
        assert is_dead(strange) is None
    process = program("import sys; sys.stdin.read()")
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    there = f"tasks {boot}:{namespace}:{process.pid}:{started}:x"
    assert is_dead(there) is False
    process.kill()
    process.wait()
    assert is_dead(there) is True
