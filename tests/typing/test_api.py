"""What type checkers infer of the public API: checked by mypy and pyright, and run like any test."""

from typing import assert_type

import pytest

from cauce import Bus, Domain, Query, Receipt, connect, replace, running
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
