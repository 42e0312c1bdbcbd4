"""The envelope: what travels and is stored around a body, its digest, and its one-to-one CloudEvents form."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Annotated, Any
from zlib import crc32

import msgspec

from cauce.accept import ENTRY_BYTES, check_name, check_stream, check_value, decode_value
from cauce.errors import Damaged, Refused
from cauce.messages import Message, declared
from cauce.schema import encode, key_of

__all__ = [
    "Entry",
    "Meta",
    "Wish",
    "check",
    "derive_id",
    "digest",
    "from_cloudevent",
    "is_moment",
    "micros",
    "moment",
    "schema_in",
    "schema_of",
    "seal",
    "sealed",
    "time_in",
    "time_of",
    "to_cloudevent",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")


class Meta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The part of the envelope that logs carry without looking at it.

    `time` and `expires` are microseconds since 1970 in UTC. `correlation` is empty where it is the entry's own id.
    `trace` and `tracestate` are the W3C trace context. `verdict` marks an audit entry among the commands, `again` a
    command whose sender may have wished it before, `upto` is the facts position a written record includes,
    `fold` says by which code it was made.
    """

    time: int
    schema: int = 1
    correlation: str = ""
    causation: str = ""
    by: str = ""
    trace: str = ""
    tracestate: str = ""
    expires: int = 0
    verdict: str = ""
    upto: int = 0
    again: bool = False
    fold: str = ""


class Wish(msgspec.Struct, frozen=True, omit_defaults=True):
    """The command that caused an append, kept with its first fact. Its id is the fact's causation."""

    type: str
    body: msgspec.Raw
    schema: int = 1
    time: int = 0


_encode_meta = msgspec.json.Encoder().encode
_decode_meta = msgspec.json.Decoder(Meta).decode
_decode_wish = msgspec.json.Decoder(Wish).decode


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a log: an envelope and a body.

    Before it is appended `position`, `version` and `digest` are 0. `raw` is the encoded `Meta`. `body` is JSON; empty
    it is a tombstone, and None when it was read without bodies (then `wish` is None, too).
    """

    position: int
    stream: str
    version: int
    type: str
    id: str
    raw: bytes
    wish: bytes | None
    body: bytes | None
    digest: int

    @property
    def meta(self) -> Meta:
        """The rest of the envelope."""
        try:
            return _decode_meta(self.raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            raise Damaged(
                f"the envelope of position {self.position} ({self.stream}) cannot be read: run cauce verify"
            ) from None

    @property
    def domain(self) -> str:
        return self.stream.partition("/")[0]

    @property
    def key(self) -> str:
        return self.stream.partition("/")[2]

    @property
    def correlation(self) -> str:
        """The id of the message with which it all began."""
        return self.meta.correlation or self.id

    @property
    def wished(self) -> Wish | None:
        """The command that caused this append, on its first fact."""
        return None if self.wish is None else _decode_wish(self.wish)

    def checked(self) -> Entry:
        """Itself, if the digest is right; else raises `Damaged`."""
        try:
            same = digest(self, self.version) == self.digest
        except (TypeError, UnicodeError):
            # Damage can change what kind of value a column holds, too.
            same = False
        if not same:
            raise Damaged(
                f"position {self.position} ({self.stream} version {self.version}) is not what was written: run cauce verify"
            )
        return self


def digest(entry: Entry, version: int) -> int:
    """crc32 over the whole envelope and body but the position: it finds damage, it does not stop a forger."""
    head = f"{entry.stream}\0{version}\0{entry.type}\0{entry.id}\0".encode()
    if entry.wish is None:
        return crc32(b"".join((head, entry.raw, b"\0\0", entry.body or b"")))
    return crc32(b"".join((head, entry.raw, b"\0", entry.wish, b"\0", entry.body or b"")))


def check(entries: Sequence[Entry]) -> None:
    """Raises `Damaged` for the first whose digest is not right: `Entry.checked` for many, in half the time."""
    try:
        for entry in entries:
            wish = entry.wish
            head = f"{entry.stream}\0{entry.version}\0{entry.type}\0{entry.id}\0".encode()
            middle = b"\0\0" if wish is None else b"\0" + wish + b"\0"
            if crc32(b"".join((head, entry.raw, middle, entry.body or b""))) != entry.digest:
                entry.checked()
    except (TypeError, UnicodeError):
        # Damage can change what kind of value a column holds, too.
        for entry in entries:
            entry.checked()


def time_of(id: str) -> int:
    """When an id was made, in microseconds since 1970, or the one that it was derived from; 0 where no id tells."""
    first, middle = id[:8], id[9:13]
    if len(id) != 36 or id[8] != "-" or not (first + middle).isalnum() or id[14] not in "78":
        return 0
    try:
        return int(first + middle, 16) * 1000
    except ValueError:
        return 0


class _OnlyTime(msgspec.Struct):
    time: int


_decode_time = msgspec.json.Decoder(_OnlyTime).decode


def time_in(raw: bytes) -> int:
    """The time in an encoded envelope, when that is all that is asked. Raises `Damaged`."""
    try:
        return _decode_time(raw).time
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Damaged("an envelope whose age is asked for cannot be read: run cauce verify") from None


class _OnlySchema(msgspec.Struct):
    schema: int = 1


_decode_schema = msgspec.json.Decoder(_OnlySchema).decode


def schema_in(raw: bytes) -> int:
    """The schema in an encoded envelope that is compared with that of a repeat. Raises `Damaged`."""
    try:
        return _decode_schema(raw).schema
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Damaged("an envelope that stands in the way of a repeat cannot be read: run cauce verify") from None


def schema_of(entry: Entry) -> int:
    """The schema version of a body. Most envelopes do not name it, and need not be decoded for it."""
    return entry.meta.schema if b'"schema":' in entry.raw else 1


def sealed(stream: str, type: str, id: str, meta: Meta, body: bytes, wish: bytes | None = None) -> Entry:
    """An entry ready to be appended, from parts that passed the acceptance rule. Raises `Refused` if too large."""
    raw = _encode_meta(meta)
    if len(body) + len(raw) + (0 if wish is None else len(wish)) > ENTRY_BYTES:
        raise Refused(
            f"{type} for {stream} with its envelope and wish is over {ENTRY_BYTES:,} bytes: keep large things elsewhere and send their name"
        )
    return Entry(0, stream, 0, type, id, raw, wish, body, 0)


def seal(message: Message, id: str, meta: Meta, wish: bytes | None = None) -> Entry:
    """An entry ready to be appended, from a message. Raises `Refused` by the one acceptance rule."""
    kind = declared(message)
    return sealed(f"{kind.domain.name}/{key_of(message)}", kind.name, id, meta, encode(message), wish)


def derive_id(cause: str, *parts: str) -> str:
    """The id that this cause always gives for these parts: its 48-bit time and a hash, as a UUIDv8 (RFC 9562, 5.8)."""
    h = blake2b("\0".join((cause, *parts)).encode(), digest_size=9).hexdigest()
    return f"{cause[:14]}8{h[:3]}-8{h[3:6]}-{h[6:]}"


def moment(time: int) -> datetime:
    """Microseconds since 1970 as an aware datetime in UTC; what lies outside of the years 1 to 9999 as their edge.

    A log that holds such a time must stay readable, and `verify` says what is not as it was written.
    """
    return _EPOCH + timedelta(microseconds=min(max(time, _FIRST), _LAST))


def is_moment(time: int) -> bool:
    """Whether microseconds since 1970 lie in the years 1 to 9999, so that `moment` is exact."""
    return _FIRST <= time <= _LAST


def micros(when: datetime) -> int:
    """An aware datetime as microseconds since 1970.

    Raises `Refused` for a naive one, and for one that lies outside of the years 1 to 9999 in UTC.
    """
    if when.tzinfo is None:
        raise Refused(f"{when.isoformat()} has no time zone: add one, for example tzinfo=UTC")
    time = (when - _EPOCH) // _MICROSECOND
    if not _FIRST <= time <= _LAST:
        raise Refused(f"{when.isoformat()} lies outside of the years 1 to 9999 in UTC: write a time within them")
    return time


def to_cloudevent(entry: Entry) -> dict[str, Any]:
    """The entry as a CloudEvents 1.0 object in JSON's structured mode. Encode it with `msgspec.json.encode`.

    64-bit numbers are text, because integer attributes have 32 bits there.
    """
    meta = entry.meta
    event: dict[str, Any] = {
        "specversion": "1.0", "id": entry.id, "source": f"/{entry.domain}", "type": entry.type, "subject": entry.key,
        "time": moment(meta.time).isoformat().replace("+00:00", "Z"), "schemaversion": meta.schema,
        "streamversion": str(entry.version), "position": str(entry.position), "correlation": entry.correlation,
        "digest": f"{entry.digest:08x}",
    }  # fmt: skip
    optional = {
        "causation": meta.causation, "by": meta.by, "traceparent": meta.trace, "tracestate": meta.tracestate,
        "verdict": meta.verdict, "expires": str(meta.expires or ""), "upto": str(meta.upto or ""),
        "again": meta.again, "fold": meta.fold,
        "wish": b64encode(entry.wish).decode() if entry.wish is not None else "",
    }  # fmt: skip
    event.update({name: value for name, value in optional.items() if value})
    if entry.body:
        event["datacontenttype"] = "application/json"
        event["data"] = msgspec.Raw(entry.body)
    return event


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _CloudEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: datetime
    schemaversion: _Count = 1
    streamversion: _Count = 0
    position: _Count = 0
    correlation: str = ""
    digest: str = "0"
    causation: str = ""
    by: str = ""
    traceparent: str = ""
    tracestate: str = ""
    verdict: str = ""
    expires: _Count = 0
    upto: _Count = 0
    again: bool = False
    fold: str = ""
    wish: str = ""
    datacontenttype: str = "application/json"
    data: msgspec.Raw = msgspec.Raw(b"")


def from_cloudevent(text: bytes | str) -> Entry:
    """The entry in a CloudEvents object in JSON's structured mode. Raises `Refused` for anything else."""
    try:
        event = msgspec.json.decode(text, type=_CloudEvent, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"not a CloudEvents 1.0 object as Cauce writes them: {error}") from None
    if event.specversion != "1.0" or not event.source.startswith("/"):
        raise Refused(
            f"CloudEvents {event.specversion!r} from {event.source!r}: version 1.0 and source /domain are known here"
        )
    if event.traceparent and not _TRACEPARENT.match(event.traceparent):
        raise Refused(f"traceparent {event.traceparent!r} is not of the W3C form")
    meta = Meta(
        micros(event.time), event.schemaversion, "" if event.correlation == event.id else event.correlation,
        event.causation, event.by, event.traceparent, event.tracestate, event.expires, event.verdict, event.upto, event.again,
        event.fold,
    )  # fmt: skip
    body = bytes(event.data)
    if body:
        check_value(decode_value(body, event.type), event.type)
    try:
        wish, digest = b64decode(event.wish, validate=True) if event.wish else None, int(event.digest, 16)
    except ValueError as error:
        raise Refused(f"the wish or digest of {event.id} is not as Cauce writes it: {error}") from None
    return Entry(
        event.position, check_stream(f"{event.source[1:]}/{event.subject}"), event.streamversion, check_name(event.type),
        event.id, _encode_meta(meta), wish, body, digest,
    )  # fmt: skip
