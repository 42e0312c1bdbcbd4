"""A bus for a while: beside another one on its server, and taken away with all that belongs to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from cauce.backends.nats.address import parse, renamed
from cauce.backends.nats.api import NOT_FOUND, ApiError, ask, refusal
from cauce.backends.nats.bucket import buckets
from cauce.backends.nats.link import Link, connect
from cauce.clock import Clock
from cauce.errors import CauceError, Refused, Unavailable

__all__ = ["beside", "temporary"]


class _Deleted(msgspec.Struct, frozen=True):
    success: bool = False


def beside(url: str, name: str, files: str) -> str:
    """The address of another bus on the same servers, called as this one with the name behind it.

    Parameters:
        files: the folder for those of its stores that are files.
    """
    bus = parse(url).bus
    return renamed(url, f"{bus[:24]}_{name}" if bus else name, files)


@asynccontextmanager
async def temporary(url: str, clock: Clock) -> AsyncIterator[None]:
    """When the block is left, all streams and buckets of the bus at an address are deleted.

    Raises `Unreachable` or `NotPermitted` before the block, and behind it `Unavailable`, naming what is left.
    """
    link = await connect(url, clock)
    try:
        if not link.address.bus:
            raise Refused(f"{link} names no bus: without a name it would be all that the server keeps")
        try:
            yield
        finally:
            await _remove(link)
    finally:
        await link.close()


async def _remove(link: Link) -> None:
    try:
        for name in await buckets(link):
            try:
                await ask(link, f"STREAM.DELETE.{name}", None, _Deleted)
            except ApiError as error:
                if error.code != NOT_FOUND:
                    raise refusal(error, link, f"stream {name}") from error
    except CauceError as error:
        raise Unavailable(
            f"streams of {link} are left behind: {error}; delete those named {link.stream('*')} (nats stream rm)"
        ) from error
