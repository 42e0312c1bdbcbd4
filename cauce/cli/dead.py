"""`cauce dead`: the messages that failed too often, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click
import msgspec

from cauce.cli.place import as_json, bus, store, stores_of
from cauce.cli.text import count, one_line, print_json
from cauce.errors import Refused
from cauce.store import Letter

__all__ = ["dead"]

F = TypeVar("F", bound=Callable[..., Any])


def _one(command: F) -> F:
    """The arguments that name one dead letter, and the options of all."""
    for each in (
        as_json,
        bus,
        store,
        click.argument("position", type=int),
        click.argument("consumer"),
        click.argument("service"),
    ):
        command = each(command)
    return command


@click.group()
def dead() -> None:
    """Messages that a consumer has tried too often. Later ones of the same thing wait until a person decides."""


@dead.command("list")
@click.argument("service", default="")
@bus
@store
@as_json
def list_(service: str, url: str, store: str | None, as_json: bool) -> None:
    """The dead letters of a service, or of all."""
    found = asyncio.run(_letters(url, store, service))
    if as_json:
        for letter in found:
            print_json(msgspec.structs.asdict(letter))
        return
    for letter in found:
        click.echo(_line(letter))
    if not found:
        click.echo("No dead letters.")


@dead.command()
@_one
def show(service: str, consumer: str, position: int, url: str, store: str | None, as_json: bool) -> None:
    """One dead letter, with the message as it came, and the traceback."""
    letter = asyncio.run(_decide(url, store, service, consumer, position))
    if as_json:
        print_json(msgspec.structs.asdict(letter))
        return
    click.echo(_line(letter))
    click.echo(one_line(bytes(letter.message).decode(errors="replace")))
    for line in letter.trace.splitlines():
        click.echo("  " + one_line(line))


@dead.command()
@_one
def retry(service: str, consumer: str, position: int, url: str, store: str | None, as_json: bool) -> None:
    """Try it again, as if for the first time; then the later ones of its thing."""
    _told(asyncio.run(_decide(url, store, service, consumer, position, "retry")), "is tried again", as_json)


@dead.command()
@_one
def discard(service: str, consumer: str, position: int, url: str, store: str | None, as_json: bool) -> None:
    """Give it up: this consumer goes on with the later ones of its thing. The message stays in its log."""
    _told(asyncio.run(_decide(url, store, service, consumer, position, "discard")), "is given up", as_json)


async def _letters(url: str, store: str | None, service: str) -> list[Letter]:
    async with stores_of(url, store) as stores:
        return await stores.letters(service)


async def _decide(
    url: str, store: str | None, service: str, consumer: str, position: int, what: Literal["", "retry", "discard"] = ""
) -> Letter:
    """The dead letter of this position, decided about. Raises `Refused` if there is none."""
    async with stores_of(url, store) as stores:
        for letter in await stores.letters(service):
            if (letter.consumer, letter.position) == (consumer, position):
                if what == "retry":
                    await stores.retry(service, consumer, position)
                elif what == "discard":
                    await stores.discard(service, consumer, position)
                return letter
    raise Refused(f"{service} has no dead letter {position} of {consumer}: see cauce dead list")


def _line(letter: Letter) -> str:
    behind = f", {count(letter.behind, 'later message')} behind it" if letter.behind else ""
    return one_line(
        f"{letter.service} {letter.consumer} {letter.position}: {letter.stream}, {count(letter.attempts, 'attempt')}{behind}: {letter.error}"
    )


def _told(letter: Letter, what: str, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.structs.asdict(letter))
    else:
        click.echo(one_line(f"{letter.service} {letter.consumer} {letter.position} ({letter.stream}) {what}"))
