"""A full replay runs `evolve` and `view`: no command is decided again, nobody reacts, nothing is sent."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path

import apsw
from click.testing import CliRunner

from cauce import (
    Command,
    Context,
    Copy,
    Domain,
    Event,
    Query,
    Record,
    Rejected,
    Service,
    Store,
    connect,
    folding,
    replace,
    running,
)
from cauce.backends.sqlite.file import folder_of
from cauce.cli import main
from cauce.log import Filter
from cauce.service import bind

accounts = Domain("accounts", key="name")


class Account(Record, domain=accounts):
    name: str
    amount: int


class Paid(Event, domain=accounts):
    name: str
    amount: int


class Warned(Event, domain=accounts):
    name: str


class Pay(Command, domain=accounts):
    name: str
    amount: int


class Warn(Command, domain=accounts):
    name: str


class HowMuch(Query[int], domain=accounts):
    name: str


class Kept(Copy, of=Account):
    name: str
    amount: int


service = Service("accounts", owns=accounts, schema="create table told (name text)")
ran = Counter[str]()


@service.decide
def pay(account: Account | None, command: Pay) -> Paid:
    ran["decide"] += 1
    if command.amount < 0:
        raise Rejected("nothing is paid back")
    return Paid(command.name, command.amount)


@service.decide
def warn(account: Account | None, command: Warn) -> Warned:
    ran["decide"] += 1
    return Warned(command.name)


@service.evolve
def paid(account: Account | None, event: Paid) -> Account:
    ran["evolve"] += 1
    return Account(event.name, (account.amount if account else 0) + event.amount)


@service.evolve
def warned(account: Account, event: Warned) -> Account:
    ran["evolve"] += 1
    return replace(account, amount=account.amount)


@service.on
async def much(event: Paid, ctx: Context) -> list[Command]:
    ran["on"] += 1
    ctx.store.execute("insert into told values (?)", (event.name,))
    return [Warn(event.name)] if event.amount > 2 else []


@service.every(3600)
async def hourly() -> None:
    ran["every"] += 1


@service.view("sums", schema="create table sums (name text primary key, amount integer)")
def summed(event: Paid, db: Store) -> None:
    ran["view"] += 1
    db.execute(
        "insert into sums values (?, ?) on conflict (name) do update set amount = sums.amount + excluded.amount",
        (event.name, event.amount),
    )


@service.answer
async def how_much(query: HowMuch, ctx: Context) -> int:
    ran["answer"] += 1
    ((amount,),) = await ctx.view("sums").fetch("select amount from sums where name = ?", (query.name,))
    return int(amount)


service.replica(Kept)

THINGS, TIMES = 4, 5
FACTS = THINGS * TIMES


async def lived_through(url: str) -> None:
    async with running(service, bus=url) as bus:
        for number in range(THINGS):
            for amount in range(TIMES):
                await bus.call(Pay(f"a{number}", amount))
        await bus.send(Pay("a0", -1))
        await bus.settled()
    assert ran["decide"] > FACTS
    assert ran["on"] >= FACTS
    ran.clear()


async def test_a_rebuild_runs_view_functions_only(bus_url: str, tmp_path: Path) -> None:
    await lived_through(bus_url)
    for name in ("sums", "Kept"):
        result = await asyncio.to_thread(
            CliRunner().invoke, main, ["rebuild", "tests.test_replay", name, "--bus", bus_url]
        )
        assert result.exit_code == 0, result.output
    assert ran == {"view": FACTS}


async def test_a_fold_of_all_that_ever_was_runs_evolve_functions_only(each_bus: str) -> None:
    await lived_through(each_bus)
    async with connect(each_bus) as bus:
        folds = folding.fold_of(bind(service), accounts)
        stands = [await folds.fold(bus.facts, f"a{number}") for number in range(THINGS)]
    assert [each.state for each in stands] == [Account(f"a{number}", sum(range(TIMES))) for number in range(THINGS)]
    assert ran == {"evolve": sum(each.version for each in stands)}


async def test_an_owner_that_makes_all_records_anew_runs_evolve_functions_only(bus_url: str) -> None:
    await lived_through(bus_url)
    path = Path(bus_url.removeprefix("sqlite:///"))
    file = apsw.Connection(str(path))
    file.execute("delete from records")
    file.close()
    (folder_of(path) / "witness").unlink()
    shutil.rmtree(folder_of(path) / "accounts" / "views" / "Kept")
    async with running(service, bus=bus_url) as bus:
        await bus.settled()
        for number in range(THINGS):
            assert await bus.record(Account, f"a{number}") == Account(f"a{number}", sum(range(TIMES)))
        facts = await bus.facts.read(Filter(domains=frozenset({"accounts"})))
    assert ran == {"evolve": len(facts.entries)}
