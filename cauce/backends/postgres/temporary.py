"""A bus for a while: beside another one in its database, and taken away with all that belongs to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl, urlencode

from cauce.backends.postgres.link import Link, split, translate
from cauce.clock import Clock
from cauce.errors import Unavailable

__all__ = ["beside", "temporary"]

_HOMES = "select quote_ident(nspname) from pg_namespace where nspname = $1 or starts_with(nspname, $1 || '_')"


def beside(url: str, name: str) -> str:
    """The address of another bus in the same database: its schema is called as this one, with the name behind it."""
    _, schema = split(url)
    place, _, query = url.partition("?")
    options = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != "schema"]
    return f"{place}?{urlencode([*options, ('schema', f'{schema[:24]}_{name}')])}"


@asynccontextmanager
async def temporary(url: str, clock: Clock) -> AsyncIterator[None]:
    """When the block is left, the schema in an address is dropped, and those of services that are named after it.

    Raises `Unreachable`, `NotPermitted` or `Refused` before the block; behind it `Unavailable`, naming what is left.
    """
    link = Link(url, clock)
    await link.open()
    try:
        yield
    finally:
        try:
            await _remove(link)
        finally:
            await link.close()


async def _remove(link: Link) -> None:
    try:
        session = await link.dedicated("removal")
        try:
            for (home,) in await session.fetch(_HOMES, link.schema):
                await session.execute(f"drop schema if exists {home} cascade")
        finally:
            session.terminate()
    except Exception as error:
        raise Unavailable(
            f"schemas {link.schema} and {link.schema}_… are left behind: {translate(error, link.url)}; drop schema … cascade"
        ) from error
