"""Which bus a command is about, and how it is opened by those that only read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from cauce.backends import open_backend
from cauce.backends.sqlite.peek import peek
from cauce.clock import SystemClock
from cauce.errors import Refused
from cauce.log import Log

__all__ = ["DEFAULT", "Logs", "as_json", "bus", "check_address", "log_option", "path_of", "reading"]

DEFAULT = "sqlite:///.cauce/bus.db"
F = TypeVar("F", bound=Callable[..., Any])


def bus(command: F) -> F:
    """`--bus`: the address, given to the command as `url`."""
    return click.option(
        "--bus",
        "url",
        envvar="CAUCE_BUS",
        default=DEFAULT,
        show_default=True,
        show_envvar=True,
        help="Address of the bus.",
    )(command)


def as_json(command: F) -> F:
    """`--json`, given as `as_json`; errors are told as JSON, too."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
        ctx.meta["cauce.json"] = value
        return value

    return click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=remember, help="Print JSON instead of text."
    )(command)


def log_option(command: F) -> F:
    """`--log`: one of the three, given as `log`."""
    return click.option(
        "--log",
        type=click.Choice(["facts", "commands", "records"]),
        default="facts",
        show_default=True,
        help="Which log.",
    )(command)


class Logs(Protocol):
    """The three logs of a bus, to be read."""

    @property
    def id(self) -> str: ...
    @property
    def facts(self) -> Log: ...
    @property
    def commands(self) -> Log: ...
    @property
    def records(self) -> Log: ...


def check_address(url: str) -> str:
    """The address itself. Raises `Refused` for one that is not UTF-8, which no backend takes."""
    if any("\ud800" <= character <= "\udfff" for character in url):
        raise Refused(f"bus address {url!r} is not UTF-8: name a file or a host in UTF-8")
    return url


def path_of(url: str) -> Path:
    """The file of a bus on SQLite. Raises `Refused` for other addresses."""
    scheme, mark, rest = check_address(url).partition("://")
    if scheme != "sqlite" or not mark or not rest.startswith("/") or not Path(rest[1:]).name:
        raise Refused(f"bus address {url!r}: this works on sqlite:///relative.db and sqlite:////absolute.db")
    return Path(rest[1:])


@asynccontextmanager
async def reading(url: str, *, follow: bool = False) -> AsyncIterator[Logs]:
    """The logs of a bus that is there already. Nothing is made where there is none: that is `Refused`.

    Without `follow` the file is opened only to look, so it works beside any writer, on a file of somebody else, on a
    backup and on a damaged log. With it the bus is opened like any other, because only then others wake us.
    """
    with peek(path_of(url)) as logs:
        if not follow:
            yield logs
            return
    backend = await open_backend(url, SystemClock())
    try:
        yield backend
    finally:
        await backend.close()
