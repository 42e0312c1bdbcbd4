"""nats-py by itself: events awaited by their publishers with `js.publish`, and request and reply without a stream.

The stream is made as its documentation makes one, on files. A message is the JSON of the event, without any header.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
import nats
from nats.aio.msg import Msg

from benchmarks._load import NAME, Load, email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from benchmarks.contenders.child import child, ready, until_told

__all__ = ["append", "ask"]

_encode = msgspec.json.Encoder().encode


class EmailChanged(msgspec.Struct, frozen=True):
    """The same event without a domain."""

    user_id: str
    name: str
    email: str


def append(url: str, load: Load, callers: int, seconds: float) -> Sample:
    """So many tasks, each awaiting the acknowledgement of its message, in a stream of a bus's name."""
    return asyncio.run(_append(url, load, callers, seconds))


async def _append(url: str, load: Load, callers: int, seconds: float) -> Sample:
    turns, (address, _, bus) = load.turns(callers), url.rpartition("/")
    client = await nats.connect(address)
    stream = client.jetstream()
    await stream.add_stream(name=f"{bus}_facts", subjects=[f"{bus}.users.*"])

    async def work() -> None:
        number, key = next(turns)
        await stream.publish(f"{bus}.users.{key}", _encode(EmailChanged(str(key), NAME, email(number))))

    try:
        await drive(work, callers, seconds * WARM)
        return await drive(work, callers, seconds)
    finally:
        await client.close()


def ask(address: str, seconds: float) -> Sample:
    """Ask another process, again and again."""
    with child("benchmarks.contenders.nats_py", address):
        return asyncio.run(_ask(address, seconds))


async def _ask(address: str, seconds: float) -> Sample:
    client = await nats.connect(address)

    async def work() -> None:
        answer = await client.request("who_is", b'{"user_id":"42"}')
        assert answer.data == b"user42@example.org"

    try:
        await drive(work, 1, seconds * WARM)
        return await drive(work, 1, seconds)
    finally:
        await client.close()


async def _answer(address: str) -> None:
    """The other process."""
    client = await nats.connect(address)

    async def answer(message: Msg) -> None:
        question = msgspec.json.decode(message.data)
        await message.respond(email(int(question["user_id"])).encode())

    await client.subscribe("who_is", cb=answer)
    await client.flush()
    ready()
    await until_told()
    await client.close()


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1]))
