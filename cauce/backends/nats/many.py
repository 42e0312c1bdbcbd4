"""The many messages with which a server answers one question, up to the one that ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

__all__ = ["Many", "stored"]


class Many:
    """Takes them; see `cauce.backends.nats.call.Call`. `future` is done with the header block of the last one.

    Parameters:
        subject: to which the question goes.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.found: list[tuple[bytes, bytes]] = []

    def subjects(self) -> Collection[str]:
        return (self.subject,)

    def done(self, end: Callable[[], Any]) -> None:
        self.future.add_done_callback(lambda _: end())

    def take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        if head[8:9] != b" ":
            self.found.append((head, data))
        elif not self.future.done():
            self.future.set_result(head)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def stored(head: bytes) -> tuple[str, int, int]:
    """Subject and sequence of a message of a stream, and where in its header block the server's own lines begin."""
    line = head.rindex(b"\r\nNats-Subject: ")
    end = head.index(b"\r\n", line + 16)
    place = head.index(b"Nats-Sequence: ", end) + 15
    return head[line + 16 : end].decode(), int(head[place : head.index(b"\r\n", place)]), line
