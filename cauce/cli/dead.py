"""`cauce dead`: the messages that failed too often, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.peek import there
from cauce.cli.place import as_json, bus, path_of
from cauce.cli.text import count, one_line, print_json
from cauce.errors import Refused
from cauce.letters import Letter, letters
from cauce.letters import discard as give_up
from cauce.letters import retry as try_again

__all__ = ["dead"]

F = TypeVar("F", bound=Callable[..., Any])


def _one(command: F) -> F:
    """The arguments that name one dead letter, and the options of all."""
    for each in (
        as_json,
        bus,
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
@as_json
def list_(service: str, url: str, as_json: bool) -> None:
    """The dead letters of a service, or of all."""
    found = letters(_stores(url), service)
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
def show(service: str, consumer: str, position: int, url: str, as_json: bool) -> None:
    """One dead letter, with the message as it came, and the traceback."""
    letter = _find(url, service, consumer, position)
    if as_json:
        print_json(msgspec.structs.asdict(letter))
        return
    click.echo(_line(letter))
    click.echo(one_line(bytes(letter.message).decode(errors="replace")))
    for line in letter.trace.splitlines():
        click.echo("  " + one_line(line))


@dead.command()
@_one
def retry(service: str, consumer: str, position: int, url: str, as_json: bool) -> None:
    """Try it again, as if for the first time; then the later ones of its thing."""
    letter = _find(url, service, consumer, position)
    try_again(_stores(url), service, consumer, position)
    _told(letter, "is tried again", as_json)


@dead.command()
@_one
def discard(service: str, consumer: str, position: int, url: str, as_json: bool) -> None:
    """Give it up: this consumer goes on with the later ones of its thing. The message stays in its log."""
    letter = _find(url, service, consumer, position)
    give_up(_stores(url), service, consumer, position)
    _told(letter, "is given up", as_json)


def _stores(url: str) -> Path:
    """The folder where the stores of a bus lie. Raises `Refused` where there is no bus, or it may not be seen."""
    path = path_of(url)
    there(path)
    folder = folder_of(path.resolve())
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise Refused(f"{folder} may not be read: change its mode or owner, or ask as the user whose it is")
    return folder


def _find(url: str, service: str, consumer: str, position: int) -> Letter:
    for letter in letters(_stores(url), service):
        if (letter.consumer, letter.position) == (consumer, position):
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
