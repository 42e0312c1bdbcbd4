"""Who waits for what comes to an inbox, and what comes: an answer, or that there will be none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Protocol

import msgspec

__all__ = ["Call", "Lost", "Once", "Reply"]


class Lost(ConnectionError):
    """What was asked went out, and the connection broke before the answer: it may have been done."""


class Reply(msgspec.Struct, frozen=True, gc=False):
    """An answer: its payload, and its header block as it came, parsed only when asked for."""

    data: bytes
    block: bytes = b""

    @property
    def status(self) -> int:
        """The status of a message of the server's own, such as 404, else 0."""
        return int(self.block[9:12]) if self.block[8:9] == b" " and self.block[9:12].isdigit() else 0

    @property
    def headers(self) -> dict[str, str]:
        lines = self.block.decode("utf-8", "surrogateescape").split("\r\n")[1:]
        return {name: value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}


class Call(Protocol):
    """Somebody who waits for what comes to an inbox."""

    def subjects(self) -> Collection[str]:
        """Whose denial is its own."""
        ...

    def done(self, end: Callable[[], Any]) -> None:
        """Be told what to do in the end."""
        ...

    def take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        """Have a message: its subject, reply subject, payload and header block."""
        ...

    def fail(self, error: Exception) -> None:
        """Learn that there will be no more, and why."""
        ...


class Once:
    """Waits for one answer. See `Call`."""

    def __init__(self, subject: str, also: Collection[str] = ()) -> None:
        self._subject, self._also = subject, also
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def subjects(self) -> Collection[str]:
        return (self._subject, *self._also)

    def done(self, end: Callable[[], Any]) -> None:
        self.future.add_done_callback(lambda _: end())

    def take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        if not self.future.done():
            self.future.set_result(Reply(data, head))

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
