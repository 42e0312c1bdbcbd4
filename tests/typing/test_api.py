"""What type checkers infer of the public API: checked by mypy and pyright, and run like any test."""

from typing import Any, Literal, assert_type

import pytest

from cauce import (
    Bus,
    Change,
    Context,
    Domain,
    Guards,
    Limits,
    Query,
    Receipt,
    Service,
    Store,
    connect,
    replace,
    running,
)
from shop.cards import Holder
from shop.crm import WhoHas as InDirectory
from shop.users import ChangeEmail, RegisterUser, User, service

directory = Domain("directory")


class WhoHas(Query[list[str]], domain=directory):
    mail_domain: str


async def asks(bus: Bus) -> None:
    """Never run: only checked."""
    assert_type(await bus.call(ChangeEmail("42", "ana@example.org"), by="crm:joe"), Receipt)
    assert_type(await bus.send(ChangeEmail("42", "ana@example.org")), str)
    assert_type(await bus.ask(WhoHas("example.org")), list[str])
    assert_type(await bus.fetch(User, "42"), User)
    assert_type(await bus.record(User, "42"), User | None)
    assert_type(await bus.state(User, "42", at=3), User | None)
    async for change in bus.history(User, "42"):
        assert_type(change, Change[User])
        assert_type(change.before, User | None)
        assert_type(change.fields, dict[str, tuple[object, object]])
        async for user in bus.states(User, at=change.time):
            assert_type(user, User)


async def falls_back(bus: Bus, ctx: Context) -> None:
    """Never run: only checked."""
    assert_type(await bus.ask(WhoHas("example.org"), fallback=known), list[str])
    assert_type(await bus.ask(WhoHas("example.org"), fallback=plain), list[str])
    assert_type(await ctx.ask(InDirectory("example.org"), fallback=lambda: None), list[str] | None)
    assert_type(await bus.fetch(User, "42", fallback=lambda: None), User | None)
    assert_type(await bus.fetch(User, "42", fallback=nobody), User | None)
    assert_type(await ctx.fetch(User, "42"), User)
    assert_type(await ctx.fetch(User, "42", fallback=Holder), User | Holder)
    assert_type(await ctx.fetch(User, "42", fallback=nobody), User | None)
    assert_type(ctx.left, float | None)
    shown: object = await bus.ask(WhoHas("example.org"))
    assert_type(str(await ctx.ask(WhoHas("example.org"))), str)
    assert shown


async def known() -> list[str]:
    return []


def plain() -> list[str]:
    return []


async def nobody() -> None:
    return None


async def guarded(bus: Bus) -> None:
    """Never run: only checked."""
    async with running(service, guards=Guards(breaker=Limits(slow=0.5), at_once=None)):
        pass
    assert_type(bus.guards["users"].state, Literal["closed", "open", "half-open"])
    assert_type(bus.guards["users"].under_way, int)
    bus.guards["users"].open("they are being moved")
    bus.guards["users"].close()
    assert_type({name: each.shed for name, each in bus.bulkheads.items()}, dict[str, int])


@Service("x", owns=directory).answer(at_once=10)
async def who_has(query: WhoHas) -> list[str]:
    return []


async def reads(bus: Bus, ctx: Context, db: Store) -> None:
    """Never run: only checked."""
    receipt = await bus.call(ChangeEmail("42", "ana@example.org"))
    assert_type(await bus.ask(InDirectory("example.org"), after=receipt), list[str])
    assert_type(await ctx.ask(InDirectory("example.org"), after=receipt), list[str])
    assert_type(await ctx.get(Holder, "42"), Holder | None)
    assert_type(await ctx.find(Holder, name="Ana", limit=10), list[Holder])
    assert_type(await ctx.count(Holder, name="Ana"), int)
    assert_type(await ctx.view("directory").fetch("select 1 where 1 = ?", (1,)), list[tuple[Any, ...]])
    await ctx.view("directory").wait(receipt)
    assert_type(ctx.key, str)
    assert_type(await db.fetch("select 1"), list[tuple[Any, ...]])
    db.execute("delete from directory where user_id = ?", ("42",))


def test_a_copy_is_frozen_and_its_constructor_is_checked() -> None:
    holder = Holder("42", "Ana", "here")
    assert_type(holder.name, str)
    assert_type(Service("x").replica(Holder), type[Holder])
    with pytest.raises(AttributeError):
        holder.name = "Eve"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Holder("42", "Ana")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Holder("42", "Ana", email="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def opens() -> None:
    """Never run: only checked."""
    async with running(service, bus="sqlite:///shop.db") as bus:
        assert_type(bus, Bus)
    async with connect("sqlite:///shop.db") as client:
        assert_type(client, Bus)


def test_a_message_is_frozen_and_replace_keeps_its_type() -> None:
    user = User("42", "Ana", "ana@example.org")
    assert_type(replace(user, email="x@example.org"), User)
    assert_type(user.address, str)
    with pytest.raises(AttributeError):
        user.name = "Eve"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_constructors_are_checked() -> None:
    with pytest.raises(TypeError):
        RegisterUser("42", "Ana")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        RegisterUser("42", "Ana", "ana@example.org", age=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
