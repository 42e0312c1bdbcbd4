"""Services on a bus in PostgreSQL: the same code as on a file, in one process and in several."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from cauce import (
    Context,
    Domain,
    Event,
    NoAnswer,
    NotOwner,
    OutcomeUnknown,
    Rejected,
    Retry,
    Service,
    connect,
    running,
)
from cauce.backends import look
from cauce.clock import SystemClock
from cauce.store import Letter
from shop import cards, crm, users

Program = Callable[..., Popen[str]]

SEEN = "create table seen (user_id text not null, what text not null, number integer not null)"

RUNS = """
import asyncio, sys
from cauce import running
from shop import users

async def main():
    async with running(users.service, bus=sys.argv[1]):
        print("runs", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def noting(broken: set[str], attempts: int = 5) -> Service:
    """A service that notes what it hears, and fails on what is broken."""
    service = Service("noting", schema=SEEN)

    @service.on(retry=Retry(attempts=attempts))
    async def note(event: users.UserRegistered | users.EmailChanged, ctx: Context) -> None:
        if event.user_id in broken:
            raise ValueError(f"cannot do {event.user_id}")
        ctx.store.execute("insert into seen values (?, ?, ?)", (event.user_id, type(event).__name__, ctx.version))

    return service


async def seen(bus_url: str) -> list[tuple[Any, ...]]:
    async with look(bus_url, SystemClock()) as bus:
        store = await bus.stores.open("noting", (SEEN,))
        try:
            return await store.fetch("select user_id, what, number from seen order by user_id, number")
        finally:
            await store.close()


async def letters(bus_url: str) -> list[Letter]:
    async with look(bus_url, SystemClock()) as bus:
        return await bus.stores.letters()


async def test_a_command_becomes_a_fact_a_record_and_an_effect_stored_once(postgres_bus: str) -> None:
    async with running(users.service, noting(set()), bus=postgres_bus) as bus:
        receipt = await bus.call(users.RegisterUser("42", "Ana", "ana@example.org"), by="web")
        assert (receipt.key, receipt.version, receipt.changed) == ("42", 1, True)
        with pytest.raises(Rejected, match="already registered"):
            await bus.call(users.RegisterUser("42", "Ana", "ana@example.org"))
        await bus.send(users.ChangeEmail("42", "ana@example.net"))
        await bus.settled()
        assert (await bus.fetch(users.User, "42")).email == "ana@example.net"
        record = await bus.record(users.User, "42")
        assert record is not None
        assert record.email == "ana@example.net"
    assert await seen(postgres_bus) == [("42", "UserRegistered", 1), ("42", "EmailChanged", 2)]
    async with running(users.service, noting(set()), bus=postgres_bus) as bus:
        await bus.settled()
        assert (await bus.fetch(users.User, "42")).name == "Ana"
    assert len(await seen(postgres_bus)) == 2, "a restart handles nothing again"


async def test_another_service_may_not_own_the_same_domain(postgres_bus: str) -> None:
    async with running(users.service, bus=postgres_bus):
        pass
    with pytest.raises(NotOwner):
        async with running(Service("thief", owns=users.users), bus=postgres_bus):
            pass


async def test_what_failed_too_often_is_a_dead_letter_until_somebody_decides(postgres_bus: str) -> None:
    broken = {"bad"}
    async with running(users.service, noting(broken, attempts=1), bus=postgres_bus) as bus:
        for key in ("good", "bad"):
            await bus.call(users.RegisterUser(key, "x", "x@example.org"))
            await bus.call(users.ChangeEmail(key, "y@example.org"))
        await bus.settled()
        (letter,) = await letters(postgres_bus)
        assert (letter.service, letter.stream, letter.behind) == ("noting", "users/bad", 1)
        assert "cannot do bad" in letter.error
        broken.clear()
        async with look(postgres_bus, SystemClock()) as looked:
            await looked.stores.retry("noting", letter.consumer, letter.position)
        async with asyncio.timeout(30):
            while len(await seen(postgres_bus)) < 4:  # noqa: ASYNC110 - what is waited for happens in the store
                await asyncio.sleep(0.05)
    assert [number for key, _, number in await seen(postgres_bus) if key == "bad"] == [1, 2]
    assert await letters(postgres_bus) == []


async def test_an_owner_in_another_process_is_killed_and_another_one_goes_on(
    postgres_bus: str, program: Program
) -> None:
    there = program(RUNS, postgres_bus)
    assert there.stdout is not None
    assert await asyncio.to_thread(there.stdout.readline) == "runs\n"
    async with connect(postgres_bus) as bus:
        await bus.call(users.RegisterUser("42", "Ana", "ana@example.org"))
        os.kill(there.pid, signal.SIGKILL)
        there.wait()
        await bus.send(users.ChangeEmail("42", "ana@example.net"))
        async with running(users.service, bus=postgres_bus) as here:
            await here.settled()
            assert (await bus.fetch(users.User, "42")).email == "ana@example.net"
        with pytest.raises(NoAnswer):
            await bus.call(users.ChangeEmail("42", "x@example.org"))


async def test_copies_and_views_lie_in_a_folder_where_one_is_named(postgres_bus: str, tmp_path: Path) -> None:
    folder = f"sqlite:///{tmp_path}"
    async with (
        running(users.service, bus=postgres_bus) as bus,
        running(cards.service, crm.service, bus=postgres_bus, store=folder) as there,
    ):
        receipt = await bus.call(users.RegisterUser("42", "Ana", "ana@example.org"))
        assert await there.ask(crm.WhoHas("example.org"), after=receipt) == ["42"]
        await there.settled()
        assert (await there.call(cards.IssueCard("A-1", "42"))).version == 1


async def test_an_event_said_by_a_handler_is_recorded_by_its_owner(postgres_bus: str) -> None:
    tallies = Domain("tallies", key="user_id")

    class Counted(Event, domain=tallies):
        user_id: str

    service = Service("tallies", owns=tallies)

    @service.on
    def count(event: users.UserRegistered) -> Counted:
        return Counted(event.user_id)

    async with running(users.service, service, bus=postgres_bus) as bus:
        await asyncio.gather(*(bus.call(users.RegisterUser(f"u{n}", "x", "x@example.org")) for n in range(50)))
        await bus.settled()
        page = await bus.facts.read()
        assert sorted(entry.key for entry in page.entries if entry.domain == "tallies") == sorted(
            f"u{n}" for n in range(50)
        )


async def test_a_call_whose_commit_got_no_reply_is_unknown_and_learnt_by_its_id(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server that went away leaves behind; here on a file, whose log is made to say so."""
    async with running(users.service, bus=bus_url) as bus:
        append = bus.facts.append

        def lost(*arguments: Any, **named: Any) -> asyncio.Future[Any]:
            monkeypatch.undo()

            async def written() -> Any:
                await append(*arguments, **named)
                raise OutcomeUnknown("another id", "an append")

            return asyncio.ensure_future(written())

        monkeypatch.setattr(bus.facts, "append", lost)
        with pytest.raises(OutcomeUnknown) as raised:
            await bus.call(users.RegisterUser("42", "Ana", "ana@example.org"))
        receipt = await bus.call(users.RegisterUser("42", "Ana", "ana@example.org"), id=raised.value.id)
        assert (receipt.id, receipt.version, receipt.changed) == (raised.value.id, 1, True)
        assert len([entry for entry in (await bus.facts.read()).entries if entry.domain == "users"]) == 1
