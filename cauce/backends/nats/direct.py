"""Direct gets: many messages of a stream for one question, without a consumer, and so without a state on the server."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from cauce.backends.nats.api import away
from cauce.backends.nats.call import Lost, Reply
from cauce.backends.nats.link import Link
from cauce.backends.nats.many import Many, stored
from cauce.backends.nats.stream import Stream
from cauce.codec import moment

__all__ = ["Message", "fetch", "first_since", "pages"]

_BYTES = 8 * 1024 * 1024


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message as it is stored: `name` is its subject behind the log's own tokens."""

    name: str
    position: int
    head: bytes
    payload: bytes


async def fetch(stream: Stream, pattern: str, after: int, limit: int) -> list[Message]:
    """Up to so many messages on a subject or pattern behind a position; fewer only where there are no more.

    What a follower of a cluster answers may end before what the leader has. Raises `Unreachable` and `NotPermitted`.
    """
    found: list[Message] = []
    while len(found) < limit:
        question = {"seq": after + 1, "next_by_subj": pattern, "batch": limit - len(found), "max_bytes": _BYTES}
        some, more = await _ask(stream, question)
        found += some
        if not more:
            break
        after = some[-1].position
    return found


async def first_since(stream: Stream, pattern: str, time: int) -> int:
    """The position of the first message on a pattern stored at or after a time, in microseconds since 1970; 0: none."""
    question = {"start_time": moment(time), "next_by_subj": pattern, "batch": 1}
    some, _ = await _ask(stream, question)
    return some[0].position if some else 0


async def pages(link: Link, stream: str, question: dict[str, Any]) -> tuple[list[tuple[bytes, bytes]], Reply]:
    """What one server sends for one question about a stream, as header blocks and payloads, and the end of it.

    Raises `Unreachable` and `NotPermitted`.
    """
    loop, subject, asked = asyncio.get_running_loop(), f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(question)
    until = loop.time() + link.patience
    while (left := until - loop.time()) > 0:
        await link.connected(left)
        many = Many(subject)
        link.publish(subject, asked, b"", link.expect(many))
        await link.client.kick()
        try:
            async with asyncio.timeout(min(left, link.turn)):
                return many.found, Reply(b"", await many.future)
        except TimeoutError:
            link.doubt()
        except Lost:
            pass
    raise away(link)


async def _ask(stream: Stream, question: dict[str, Any]) -> tuple[list[Message], bool]:
    found, end = await pages(stream.link, stream.name, question)
    if end.status in (204, 404):
        skip = len(stream.everything) - 1
        some = [_message(head, payload, skip) for head, payload in found]
        return some, bool(some) and end.headers.get("Nats-Num-Pending", "0") != "0"
    if end.status == 503:
        # Nobody answers for the stream: it is gone, or its servers are.
        await stream.state()
    raise away(stream.link)


def _message(head: bytes, payload: bytes, skip: int) -> Message:
    subject, position, end = stored(head)
    return Message(subject[skip:], position, head[:end], payload)
