"""A stream of JetStream used as a bucket: one message stands for each subject, and many change at once or not at all.

What is written together is an atomic batch. Each message may say what must stand for it to be written: the sequence of
its own subject (`expected`), or that of another (`fence`). The server adds 2 ms for a batch, however small, so that one
message alone goes without. What is taken away is overwritten by an empty message that the server removes after a while,
as deletions in its key-value buckets are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from cauce.backends.nats.api import CHANGED, NAME_IN_USE, NO_MESSAGE, NOT_FOUND, ApiError, ask, refusal, told
from cauce.backends.nats.call import Lost, Reply
from cauce.backends.nats.direct import pages
from cauce.backends.nats.link import Link
from cauce.backends.nats.many import stored
from cauce.backends.nats.stream import Info, cure_of
from cauce.errors import Damaged, Refused, Unreachable

__all__ = ["MOST", "Bucket", "Message", "Put", "Stale", "Unsure", "buckets"]

MOST = 1000
"""So many messages the server takes in one batch."""

_PAGE = 8 * 1024 * 1024
_AT_ONCE = 256
_LAG = 0.05
_GONE = b"KV-Operation: DEL\r\nNats-TTL: 60s\r\n"

_GONE_ALREADY = {NO_MESSAGE, 10043}
"""Codes of errors: no message has that sequence any more, or yet."""


class Stale(Exception):
    """Something else stands than was expected, and nothing was written."""


class Unsure(Unreachable):
    """The server was asked to write and did not answer: it may have been done."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """What stands on a subject: `tokens` are those behind the bucket's own, as they are written there."""

    tokens: tuple[str, ...]
    sequence: int
    payload: bytes
    gone: bool


class Put(msgspec.Struct, gc=False):
    """One message to be written. `expected` is the sequence of its subject, `fence` a subject and its sequence."""

    name: str
    payload: bytes = b""
    gone: bool = False
    expected: int | None = None
    fence: tuple[str, int] | None = None


class _Ack(msgspec.Struct, frozen=True):
    seq: int


class _Got(msgspec.Struct, frozen=True):
    message: _Ack


class _Names(msgspec.Struct, frozen=True):
    streams: list[str] | None = None
    total: int = 0


class _Stored(msgspec.Struct, frozen=True):
    """A message in JSON, its payload and headers in base64."""

    seq: int
    data: bytes = b""
    hdrs: bytes = b""


class _Whole(msgspec.Struct, frozen=True):
    message: _Stored


class _State(msgspec.Struct, frozen=True):
    subjects: dict[str, int] | None = None


class _Subjects(msgspec.Struct, frozen=True):
    """A page of the subjects of a stream, and how many there are in all."""

    state: _State
    total: int = 0


class _Done(msgspec.Struct, frozen=True):
    success: bool = False


class Bucket:
    """`name` is the stream's on the server. `written` counts what was written here, `others` what others wrote."""

    def __init__(self, link: Link, name: str, *tokens: str) -> None:
        self.link, self.name = link, link.stream(name)
        self._prefix = link.subject(*tokens) + "."
        self._replicas = 1
        self.written, self.others = 0, -1

    # ------------------------------------------------------------------------------------------------- opening

    async def open(self, *, make: bool = True) -> bool:
        """Make it, or take the one that stands; False if there is none, and none is to be made.

        Raises `Refused` for a stream that would not keep what is written, with the setting and the cure.
        """
        try:
            info = await self._info(make)
        except ApiError as error:
            raise self._refusal(error) from None
        if info is None:
            return False
        wanted = self._wanted()
        for setting in ("subjects", "storage", "retention", "max_msgs", "max_bytes", "max_age", "max_msgs_per_subject",
                        "allow_direct", "allow_atomic", "allow_msg_ttl", "deny_delete"):  # fmt: skip
            stands = getattr(info.config, setting)
            if stands != wanted[setting]:
                raise Refused(
                    f"stream {self.name} has {setting} = {stands!r}, with which it cannot be a store: "
                    f"{cure_of(self.name, setting, wanted[setting])}"
                )
        self._replicas = info.config.num_replicas
        return True

    async def _info(self, make: bool) -> Info | None:
        question = f"STREAM.INFO.{self.name}"
        try:
            return await ask(self.link, question, None, Info)
        except ApiError as error:
            if error.code != NOT_FOUND:
                raise
        if not make:
            return None
        try:
            return await ask(self.link, f"STREAM.CREATE.{self.name}", self._wanted(), Info)
        except ApiError as error:
            if error.code != NAME_IN_USE:
                raise
        # Another process made it meanwhile.
        return await ask(self.link, question, None, Info)

    def _wanted(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subjects": (self._prefix + ">",),
            "storage": "file",
            "retention": "limits",
            "discard": "new",
            "num_replicas": self.link.address.replicas,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_atomic": True,
            "allow_msg_ttl": True,
            "deny_delete": False,
        }

    # ------------------------------------------------------------------------------------------------- writing

    async def write(self, puts: Sequence[Put]) -> int:
        """Write all or none, in this order; the sequence of the last one. Those before have the ones before it.

        Raises `Stale`, `Unsure`; `Refused`, `StorageFull`, `NotPermitted` and `Unreachable` if nothing was written.
        """
        link, limit = self.link, self.link.client.max_payload
        heads = [self._head(put, number, len(puts)) for number, put in enumerate(puts, 1)]
        for put, head in zip(puts, heads, strict=True):
            if len(head) + len(put.payload) + 128 > limit:
                raise Refused(
                    f"{put.name} in {self.name} takes {len(put.payload):,} bytes, the server {limit:,}: raise its max_payload"
                )
        await link.connected(link.patience)
        # An id is needed once all is ready to go: a batch whose messages are not all sent would stay open.
        batch = b"Nats-Batch-Id: %b\r\n" % link.clock.id().encode() if len(puts) > 1 else b""
        *others, last = [
            (self._prefix + put.name, put.payload, b"NATS/1.0\r\n%b%b\r\n" % (batch, head) if batch or head else b"")
            for put, head in zip(puts, heads, strict=True)
        ]
        try:
            async with asyncio.timeout(link.patience):
                for each in others:
                    link.publish(*each)
                future = link.call(*last, also={subject for subject, *_ in others})
                await link.client.kick()
                reply = await future
        except (Lost, TimeoutError):
            link.doubt()
            raise Unsure(f"{link} did not say whether it wrote to {self.name}: it is asked again") from None
        at = await self._position(reply)
        link.trust()
        self.written += len(puts)
        self.others = at - self.written
        return at

    def _head(self, put: Put, number: int, many: int) -> bytes:
        lines = b""
        if many > 1:
            lines = b"Nats-Batch-Sequence: %d\r\n" % number
            if number == many:
                lines += b"Nats-Batch-Commit: 1\r\n"
        if put.expected is not None:
            lines += b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % put.expected
        elif put.fence is not None:
            name, sequence = put.fence
            lines += (
                b"Nats-Expected-Last-Subject-Sequence: %d\r\nNats-Expected-Last-Subject-Sequence-Subject: %b\r\n"
                % (sequence, (self._prefix + name).encode())
            )
        return lines + _GONE if put.gone else lines

    async def _position(self, reply: Reply) -> int:
        if reply.status == 503 and not reply.data:
            raise await self._missing()
        try:
            return told(reply, _Ack).seq
        except ApiError as error:
            if error.code in CHANGED:
                raise Stale(str(error)) from None
            raise self._refusal(error) from None

    async def delete(self, sequences: Sequence[int]) -> None:
        """Let messages be gone at once. One that is gone already is none the less."""
        for begin in range(0, len(sequences), _AT_ONCE):
            await asyncio.gather(*(self._delete(each) for each in sequences[begin : begin + _AT_ONCE]))

    async def _delete(self, sequence: int) -> None:
        # Without `no_erase` the server writes over the bytes on the disk first, at a tenth of the speed.
        question = {"seq": sequence, "no_erase": True}
        try:
            await ask(self.link, f"STREAM.MSG.DELETE.{self.name}", question, _Done)
        except ApiError as error:
            if error.code not in _GONE_ALREADY:
                raise self._refusal(error) from None

    # ------------------------------------------------------------------------------------------------- reading

    async def last(self, pattern: str) -> int:
        """The sequence of the last message on a subject or pattern, as the leader has it; 0 if there is none."""
        question = {"last_by_subj": self._prefix + pattern}
        try:
            return (await ask(self.link, f"STREAM.MSG.GET.{self.name}", question, _Got)).message.seq
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return 0
            raise self._refusal(error) from None

    async def read(self, pattern: str, after: int = 0, limit: int = 1_000_000) -> list[Message]:
        """Up to so many messages on a subject or pattern, by sequence, with all that was acknowledged before.

        What is written again meanwhile may be found twice, the later one behind; nothing is missed.
        """
        until, found = self.link.patience, list[Message]()
        while True:
            # Several servers may answer, and one that follows may not have yet what the leader has acknowledged.
            last = await self.last(pattern) if self._replicas > 1 else 0
            seen = found[-1].sequence if found else after
            while len(found) < limit:
                page, more = await self._page(pattern, seen, limit - len(found))
                found += page
                seen = page[-1].sequence if page else seen
                if not more:
                    break
            if seen >= last or len(found) >= limit:
                return [each for each in found[:limit] if not each.gone]
            if until <= 0:
                raise Unreachable(
                    f"the servers of {self.name} at {self.link} lag behind their leader: it is tried again"
                )
            until -= _LAG
            await self.link.clock.sleep(_LAG)

    async def subjects(self, pattern: str) -> list[tuple[str, ...]]:
        """The subjects on a pattern, each as its tokens, without what stands there; some may be gone already."""
        skip, question, found = len(self._prefix), f"STREAM.INFO.{self.name}", dict[str, int]()
        offset, total = 0, -1
        while True:
            wanted = {"subjects_filter": self._prefix + pattern, "offset": offset}
            try:
                told = await ask(self.link, question, wanted, _Subjects)
            except ApiError as error:
                raise self._refusal(error) from None
            names = told.state.subjects or {}
            found |= names
            if offset and told.total != total:
                # A page begins at a number: what was taken away before it has moved others to an earlier page.
                offset = 0
                continue
            offset, total = offset + len(names), told.total
            if not names or offset >= total:
                return [tuple(name[skip:].split(".")) for name in found]

    async def stand(self, names: Sequence[str]) -> list[Message]:
        """What stands on each of these subjects, as the leader has it; those are left out on which nothing does.

        It needs no more time in a large bucket: a pattern is searched for among all that is there.
        """
        found: list[Message] = []
        for begin in range(0, len(names), _AT_ONCE):
            some = await asyncio.gather(*(self._stands(name) for name in names[begin : begin + _AT_ONCE]))
            found += [each for each in some if each is not None]
        return found

    async def _stands(self, name: str) -> Message | None:
        question = {"last_by_subj": self._prefix + name}
        try:
            stored = (await ask(self.link, f"STREAM.MSG.GET.{self.name}", question, _Whole)).message
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return None
            raise self._refusal(error) from None
        gone = b"\r\nKV-Operation: DEL\r\n" in stored.hdrs
        return None if gone else Message(tuple(name.split(".")), stored.seq, stored.data, gone)

    async def one(self, name: str) -> Message | None:
        """What stands on one subject."""
        found = await self.read(name)
        return found[-1] if found else None

    async def _page(self, pattern: str, after: int, limit: int) -> tuple[list[Message], bool]:
        """What one server sends for one question, and whether there is more."""
        # For a single message there is no end of the batch.
        question = {
            "seq": after + 1,
            "next_by_subj": self._prefix + pattern,
            "batch": max(2, limit),
            "max_bytes": _PAGE,
        }
        found, end = await pages(self.link, self.name, question)
        if end.status in (204, 404):
            skip = len(self._prefix)
            more = end.headers.get("Nats-Num-Pending", "0") != "0"
            return [_message(head, payload, skip) for head, payload in found], more and bool(found)
        raise await self._missing()

    # ------------------------------------------------------------------------------------------------- errors

    async def _missing(self) -> Exception:
        """Nobody took what was sent: the stream is gone, or its server begins or ends."""
        try:
            await ask(self.link, f"STREAM.INFO.{self.name}", None, Info)
        except ApiError as error:
            return self._refusal(error)
        return Unreachable(f"stream {self.name} on {self.link} takes nothing now: it is tried again")

    def _refusal(self, error: ApiError) -> Exception:
        if error.code == NOT_FOUND:
            return Damaged(
                f"stream {self.name} on {self.link} is gone, and with it what the service kept: stop it, restore the "
                "stream from a backup (nats stream restore), then start again"
            )
        return refusal(error, self.link, f"stream {self.name}")


def _message(head: bytes, payload: bytes, skip: int) -> Message:
    subject, sequence, _ = stored(head)
    return Message(tuple(subject[skip:].split(".")), sequence, payload, b"\r\nKV-Operation: DEL\r\n" in head)


async def buckets(link: Link, *tokens: str) -> list[str]:
    """The names of the streams whose subjects begin so."""
    found: list[str] = []
    while True:
        question = {"subject": f"{link.subject(*tokens)}.>", "offset": len(found)}
        names = await ask(link, "STREAM.NAMES", question, _Names)
        found += names.streams or []
        if not names.streams or len(found) >= names.total:
            return sorted(found)
