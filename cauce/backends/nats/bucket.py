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

from cauce.backends.nats.call import Lost, Reply
from cauce.backends.nats.link import Link
from cauce.backends.nats.many import Many, stored
from cauce.errors import Damaged, NoAnswer, Refused, StorageFull, Unreachable

__all__ = ["MOST", "Bucket", "Message", "Put", "Stale", "Unsure", "buckets"]

MOST = 1000
"""So many messages the server takes in one batch."""

_PAGE = 8 * 1024 * 1024
_AT_ONCE = 256
_LAG = 0.05
_GONE = b"KV-Operation: DEL\r\nNats-TTL: 60s\r\n"

# Codes of errors (`err_code`) as the server's errors.json lists them.
_NOT_FOUND, _NO_MESSAGE, _NO_SUCH_SEQUENCE, _NAME_IN_USE, _WRONG_SEQUENCE = 10059, 10037, 10043, 10058, {10071, 10164}
_FULL = {10002, 10023, 10028, 10047, 10077, 10120, 10122}
_PASSING = {10003, 10008, 10009, 10074, 10118, 10176}


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


class _Error(msgspec.Struct, frozen=True):
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct, frozen=True):
    seq: int = 0
    error: _Error | None = None


class _Config(msgspec.Struct, frozen=True):
    subjects: list[str] = []
    storage: str = "file"
    retention: str = "limits"
    num_replicas: int = 1
    max_msgs: int = -1
    max_bytes: int = -1
    max_age: int = 0
    max_msgs_per_subject: int = -1
    allow_direct: bool = False
    allow_atomic: bool = False
    allow_msg_ttl: bool = False
    deny_delete: bool = False


class _Info(msgspec.Struct, frozen=True):
    config: _Config = _Config()
    error: _Error | None = None


class _Got(msgspec.Struct, frozen=True):
    seq: int


class _Found(msgspec.Struct, frozen=True):
    message: _Got | None = None
    error: _Error | None = None


class _Names(msgspec.Struct, frozen=True):
    streams: list[str] | None = None
    total: int = 0
    error: _Error | None = None


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
        info = await self._api(f"STREAM.INFO.{self.name}", None, _Info)
        if info.error is not None and info.error.err_code == _NOT_FOUND:
            if not make:
                return False
            info = await self._api(f"STREAM.CREATE.{self.name}", self._wanted(), _Info)
            if info.error is not None and info.error.err_code == _NAME_IN_USE:
                info = await self._api(f"STREAM.INFO.{self.name}", None, _Info)
        if info.error is not None:
            raise await self._refusal(info.error)
        wanted = self._wanted()
        for setting in ("subjects", "storage", "retention", "max_msgs", "max_bytes", "max_age", "max_msgs_per_subject",
                        "allow_direct", "allow_atomic", "allow_msg_ttl", "deny_delete"):  # fmt: skip
            stands = getattr(info.config, setting)
            if stands != wanted[setting]:
                raise Refused(
                    f"stream {self.name} has {setting} = {stands!r}, with which it cannot be a store: "
                    f"set it to {wanted[setting]!r} (nats stream edit {self.name}), or give the bus another name"
                )
        self._replicas = info.config.num_replicas
        return True

    def _wanted(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subjects": [self._prefix + ">"],
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
            raise Unsure(f"{link} did not say whether it wrote to {self.name}: it is asked again") from None
        ack = await self._ack(reply)
        self.written += len(puts)
        self.others = ack.seq - self.written
        return ack.seq

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

    async def _ack(self, reply: Reply) -> _Ack:
        if reply.status == 503 and not reply.data:
            raise await self._missing()
        ack = msgspec.json.decode(reply.data, type=_Ack)
        if ack.error is not None:
            if ack.error.err_code in _WRONG_SEQUENCE:
                raise Stale(ack.error.description)
            raise await self._refusal(ack.error)
        return ack

    async def delete(self, sequences: Sequence[int]) -> None:
        """Let messages be gone at once. One that is gone already is none the less."""
        for begin in range(0, len(sequences), _AT_ONCE):
            await asyncio.gather(*(self._delete(each) for each in sequences[begin : begin + _AT_ONCE]))

    async def _delete(self, sequence: int) -> None:
        # Without `no_erase` the server writes over the bytes on the disk first, at a tenth of the speed.
        question = {"seq": sequence, "no_erase": True}
        answer = await self._api(f"STREAM.MSG.DELETE.{self.name}", question, _Found)
        if answer.error is not None and answer.error.err_code not in (_NO_MESSAGE, _NO_SUCH_SEQUENCE):
            raise await self._refusal(answer.error)

    # ------------------------------------------------------------------------------------------------- reading

    async def last(self, pattern: str) -> int:
        """The sequence of the last message on a subject or pattern, as the leader has it; 0 if there is none."""
        question = {"last_by_subj": self._prefix + pattern}
        answer = await self._api(f"STREAM.MSG.GET.{self.name}", question, _Found)
        if answer.error is not None:
            if answer.error.err_code == _NO_MESSAGE:
                return 0
            raise await self._refusal(answer.error)
        return answer.message.seq if answer.message is not None else 0

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
        link, subject = self.link, f"$JS.API.DIRECT.GET.{self.name}"
        for _ in range(3):
            many = Many(subject)
            try:
                await link.connected(link.patience)
                async with asyncio.timeout(link.patience):
                    link.publish(subject, msgspec.json.encode(question), b"", link.expect(many))
                    await link.client.kick()
                    end = await many.future
            except Lost:
                continue
            except TimeoutError:
                break
            if end[9:12] in (b"204", b"404"):
                skip = len(self._prefix)
                more = b"\r\nNats-Num-Pending: " in end and b"\r\nNats-Num-Pending: 0\r\n" not in end
                return [_message(head, payload, skip) for head, payload in many.found], more and bool(many.found)
            raise await self._missing()
        raise self._away()

    # ------------------------------------------------------------------------------------------------- errors

    async def _api(self, name: str, question: object, answer: type[Any]) -> Any:
        return await _api(self.link, name, question, answer)

    async def _missing(self) -> Exception:
        """Nobody took what was sent: the stream is gone, or its server begins or ends."""
        info = await self._api(f"STREAM.INFO.{self.name}", None, _Info)
        if info.error is not None:
            return await self._refusal(info.error)
        return Unreachable(f"stream {self.name} on {self.link} takes nothing now: it is tried again")

    async def _refusal(self, error: _Error) -> Exception:
        if error.err_code == _NOT_FOUND:
            return Damaged(
                f"stream {self.name} on {self.link} is gone, and with it what the service kept: stop it, restore the "
                "stream from a backup (nats stream restore), then start again"
            )
        if error.err_code in _FULL:
            return StorageFull(
                f"{self.link} has no room for more in {self.name} ({error.description}): make room there"
            )
        if error.err_code in _PASSING:
            return Unreachable(f"stream {self.name} on {self.link}: {error.description}; it is tried again")
        return Refused(f"stream {self.name} on {self.link}: {error.description} ({error.err_code})")

    def _away(self) -> Unreachable:
        return Unreachable(f"{self.link} does not answer for {self.name}: it is tried again")


def _message(head: bytes, payload: bytes, skip: int) -> Message:
    subject, sequence, _ = stored(head)
    return Message(tuple(subject[skip:].split(".")), sequence, payload, b"\r\nKV-Operation: DEL\r\n" in head)


async def _api(link: Link, name: str, question: object, answer: type[Any]) -> Any:
    """The answer of JetStream to a question that may be asked twice."""
    payload = b"" if question is None else msgspec.json.encode(question)
    for _ in range(3):
        try:
            reply = await link.request(f"$JS.API.{name}", payload)
        except Lost:
            continue
        except TimeoutError:
            break
        except NoAnswer:
            raise Unreachable(f"{link} has no JetStream now: it is tried again; start the server with -js") from None
        return msgspec.json.decode(reply.data, type=answer)
    raise Unreachable(f"{link} does not answer: it is tried again")


async def buckets(link: Link, *tokens: str) -> list[str]:
    """The names of the streams whose subjects begin so."""
    found: list[str] = []
    while True:
        question = {"subject": f"{link.subject(*tokens)}.>", "offset": len(found)}
        names = await _api(link, "STREAM.NAMES", question, _Names)
        found += names.streams or []
        if not names.streams or len(found) >= names.total:
            return sorted(found)
