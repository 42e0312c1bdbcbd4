"""Which bus a command is about, and how it is opened by those that only read."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from cauce.backends import Look, look, scheme_of, stores_at, without_password
from cauce.clock import SystemClock
from cauce.errors import Refused
from cauce.store import Stores

__all__ = ["DEFAULT", "Seconds", "as_json", "bus", "log_option", "path_of", "reading", "store", "stores_of"]

DEFAULT = "sqlite:///.cauce/bus.db"
F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """A length of time within bounds. Unlike of its base, "nan" and "inf" are none."""

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, parameter, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no length of time: write seconds", parameter, ctx)
        return found


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


def store(command: F) -> F:
    """`--store`: where services keep what is their own, given as `store`; None: at the bus."""
    return click.option(
        "--store",
        envvar="CAUCE_STORE",
        show_envvar=True,
        help="Where services keep what is their own, if not at the bus: sqlite:///folder or postgresql://…",
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


def path_of(url: str, instead: str = "use the tools of its server") -> Path:
    """The file of a bus on SQLite. Raises `Refused` for other addresses.

    Parameters:
        instead: what to do on another backend.
    """
    if scheme_of(url) != "sqlite":
        raise Refused(f"this works on a bus in a SQLite file, not on {without_password(url)}: {instead}")
    return Path(url.partition("://")[2][1:])


def reading(url: str, *, follow: bool = False) -> AbstractAsyncContextManager[Look]:
    """A bus that is there already; see `cauce.backends.look`."""
    return look(url, SystemClock(), follow=follow)


@asynccontextmanager
async def stores_of(url: str, store: str | None) -> AsyncIterator[Stores]:
    """What the services of a bus keep, there or at an address of their own."""
    if store is not None:
        async with stores_at(store, SystemClock()) as found:
            yield found
        return
    async with reading(url) as bus:
        yield bus.stores
