"""Direct gets: many messages of a stream for one question, without a consumer, and so without a state on the server."""

from __future__ import annotations

import asyncio

import msgspec

from cauce.backends.nats.api import away
from cauce.backends.nats.link import Link, Lost, Reply
from cauce.backends.nats.many import Many, stored
from cauce.backends.nats.stream import Stream

__all__ = ["Message", "fetch"]

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
    link, subject = stream.link, f"$JS.API.DIRECT.GET.{stream.name}"
    found: list[Message] = []
    while len(found) < limit:
        question = {"seq": after + 1, "next_by_subj": pattern, "batch": limit - len(found), "max_bytes": _BYTES}
        some, more = await _ask(link, stream, subject, msgspec.json.encode(question))
        found += some
        if not more:
            break
        after = some[-1].position
    return found


async def _ask(link: Link, stream: Stream, subject: str, question: bytes) -> tuple[list[Message], bool]:
    loop = asyncio.get_running_loop()
    until = loop.time() + link.patience
    while (left := until - loop.time()) > 0:
        await link.connected(left)
        many = Many(subject)
        link.publish(subject, question, b"", link.expect(many))
        await link.client.kick()
        try:
            async with asyncio.timeout(min(left, link.turn)):
                end = Reply(b"", await many.future)
        except (Lost, TimeoutError):
            continue
        if end.status in (204, 404):
            skip = len(stream.everything) - 1
            some = [_message(head, payload, skip) for head, payload in many.found]
            return some, bool(some) and end.headers.get("Nats-Num-Pending", "0") != "0"
        if end.status == 503:
            # Nobody answers for the stream: it is gone, or its servers are.
            await stream.state()
        break
    raise away(link)


def _message(head: bytes, payload: bytes, skip: int) -> Message:
    subject, position, end = stored(head)
    return Message(subject[skip:], position, head[:end], payload)
