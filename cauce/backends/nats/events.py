"""An entry as a CloudEvent in binary mode: attributes in headers, the body plain, so that any client of NATS reads it.

See the NATS and HTTP protocol bindings of CloudEvents 1.0.2 for the names and how values are percent-encoded. The
envelope that a log carries unseen is rebuilt from the attributes where that gives the same bytes, else it has a header
of its own. What is too long for headers, which JetStream bounds at 64 KiB, lies behind the body: such a message says
that it is no plain JSON.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from datetime import datetime
from functools import lru_cache
from urllib.parse import unquote_to_bytes

import msgspec

from cauce.backends.nats.names import text
from cauce.codec import Entry, Meta, is_moment, micros, moment
from cauce.errors import CauceError, Damaged

__all__ = ["decode", "encode", "id_of", "time_of", "type_of", "version_of"]

_LONG = 24 * 1024
"""So many bytes of wish or envelope go into headers at most, and, encoded, twice as many of all there is."""

_PLAIN = re.compile(rb"[\x21\x23\x24\x26-\x7e]*\Z")
_OTHERS = re.compile(rb"[^\x21\x23\x24\x26-\x7e]")
_USUAL = re.compile(
    rb"ce-specversion: 1\.0\r\nce-id: ([^\r]*)\r\nce-source: [^\r]*\r\nce-type: ([^\r]*)\r\nce-subject: [^\r]*\r\n"
    rb"ce-time: ([^\r]*)\r\nce-schemaversion: (\d+)\r\nce-streamversion: (\d+)\r\nce-digest: ([0-9a-f]{8})\r\n"
    rb"ce-correlation: ([^\r]*)\r\n(?:ce-causation: ([^\r]*)\r\n)?(?:ce-by: ([^\r]*)\r\n)?"
    rb"(?:ce-wish: ([^\r]*)\r\n)?(?:content-type: application/json\r\n)?(?:Nats-|\r\n|\Z)"
)
"""The header lines of nearly every entry, in the order in which they are written: quicker than to part them by name."""

_encode_meta = msgspec.json.Encoder().encode
_decode_meta = msgspec.json.Decoder(Meta).decode
_NOTHING = Meta(0)


def encode(entry: Entry, version: int, digest: int) -> tuple[bytes, bytes]:
    """Header lines, without first line and end, and payload. Raises `UnicodeEncodeError` for a lone surrogate."""
    meta, rebuilt = _meta_of(entry)
    domain, _, key = entry.stream.partition("/")
    id = _value(entry.id)
    lines = [
        b"ce-specversion: 1.0\r\nce-id: %b\r\nce-source: /%b\r\nce-type: %b\r\nce-subject: %b\r\nce-time: %b\r\n"
        b"ce-schemaversion: %d\r\nce-streamversion: %d\r\nce-digest: %08x\r\n"
        % (id, domain.encode(), _name(entry.type), _value(key), _time(meta.time), meta.schema, version, digest),
        b"ce-correlation: %b\r\n" % (_value(meta.correlation) if meta.correlation else id),
    ]
    _optional(meta, lines)
    body, wish = entry.body or b"", entry.wish
    if len(entry.raw) > _LONG or (wish is not None and len(wish) > _LONG):
        return _apart(entry, lines)
    if not rebuilt:
        lines.append(b"cauce-envelope: %b\r\n" % _bytes(entry.raw))
    if wish is not None:
        lines.append(b"ce-wish: %b\r\n" % b64encode(wish))
    if body:
        lines.append(b"content-type: application/json\r\n")
    head = b"".join(lines)
    return (head, body) if len(head) <= 2 * _LONG else _apart(entry, lines[:1])


def _apart(entry: Entry, lines: list[bytes]) -> tuple[bytes, bytes]:
    """With wish and envelope behind the body; of the attributes those that fit."""
    body, wish = entry.body or b"", entry.wish
    tail = b"" if wish is None else wish
    lines = lines[:1] if sum(map(len, lines)) > _LONG else lines
    lines.append(
        b"content-type: application/octet-stream\r\ncauce-parts: %d %d %d\r\n"
        % (len(body), -1 if wish is None else len(tail), len(entry.raw))
    )
    return b"".join(lines), b"".join((body, tail, entry.raw))


def _meta_of(entry: Entry) -> tuple[Meta, bool]:
    """The envelope, and whether the attributes that are made of it give the same bytes again."""
    try:
        meta = _decode_meta(entry.raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _NOTHING, False
    if meta.correlation == entry.id or _encode_meta(meta) != entry.raw:
        return meta, False
    return meta, is_moment(meta.time)


def _time(time: int) -> bytes:
    """As `datetime.isoformat` writes it."""
    seconds, rest = divmod(time, 1_000_000)
    if not is_moment(time):
        seconds, rest = divmod(micros(moment(time)), 1_000_000)
    return b"%b.%06dZ" % (_second(seconds), rest) if rest else b"%bZ" % _second(seconds)


@lru_cache(16)
def _second(seconds: int) -> bytes:
    return moment(seconds * 1_000_000).isoformat().replace("+00:00", "").encode()


@lru_cache(1000)
def _name(type: str) -> bytes:
    return _value(type)


def _optional(meta: Meta, lines: list[bytes]) -> None:
    if meta.causation:
        lines.append(b"ce-causation: %b\r\n" % _value(meta.causation))
    if meta.by:
        lines.append(b"ce-by: %b\r\n" % _value(meta.by))
    if meta.trace:
        lines.append(b"ce-traceparent: %b\r\n" % _value(meta.trace))
    if meta.tracestate:
        lines.append(b"ce-tracestate: %b\r\n" % _value(meta.tracestate))
    if meta.verdict:
        lines.append(b"ce-verdict: %b\r\n" % _value(meta.verdict))
    if meta.expires:
        lines.append(b"ce-expires: %d\r\n" % meta.expires)
    if meta.upto:
        lines.append(b"ce-upto: %d\r\n" % meta.upto)
    if meta.again:
        lines.append(b"ce-again: true\r\n")
    if meta.fold:
        lines.append(b"ce-fold: %b\r\n" % _value(meta.fold))


def decode(name: str, position: int, head: bytes, payload: bytes, bodies: bool = True) -> Entry:
    """The entry in a message. `name` is the end of its subject, `domain.slot.key`. Raises `Damaged` if it is none."""
    try:
        domain, _, key = name.split(".")
        usual = _USUAL.search(head)
        if usual is not None:
            one, type, time, schema, version, digest, correlation, causation, by, wished = usual.groups()
            id = _text(one)
            raw = _encode_meta(
                Meta(
                    micros(datetime.fromisoformat(time.decode())), int(schema),
                    "" if correlation == one else _text(correlation), _text(causation or b""), _text(by or b""),
                )
            )  # fmt: skip
            return Entry(
                position, f"{domain}/{text(key)}", int(version), _text(type), id, raw,
                b64decode(wished) if bodies and wished is not None else None, payload if bodies else None,
                int(digest, 16),
            )  # fmt: skip
        found = dict([line.split(b": ", 1) for line in head.split(b"\r\n") if b": " in line])
        id = _text(found[b"ce-id"])
        wish: bytes | None = None
        if b"cauce-parts" in found:
            body, wish, raw = _parts(found[b"cauce-parts"], payload)
            wish = wish if bodies else None
        else:
            body = payload
            raw = _raw(found, id)
            if bodies and b"ce-wish" in found:
                wish = b64decode(found[b"ce-wish"])
        return Entry(
            position, f"{domain}/{text(key)}", int(found[b"ce-streamversion"]), _text(found[b"ce-type"]), id, raw,
            wish, body if bodies else None, int(found[b"ce-digest"], 16),
        )  # fmt: skip
    except (KeyError, ValueError, CauceError) as error:
        raise Damaged(
            f"position {position} ({name}) is no entry as Cauce writes them ({error!r}): run cauce verify"
        ) from None


def _raw(found: dict[bytes, bytes], id: str) -> bytes:
    carried = found.get(b"cauce-envelope")
    if carried is not None:
        return unquote_to_bytes(carried)
    get = found.get
    correlation = _text(found[b"ce-correlation"])
    return _encode_meta(
        Meta(
            micros(datetime.fromisoformat(found[b"ce-time"].decode())), int(found[b"ce-schemaversion"]),
            "" if correlation == id else correlation, _text(get(b"ce-causation", b"")), _text(get(b"ce-by", b"")),
            _text(get(b"ce-traceparent", b"")), _text(get(b"ce-tracestate", b"")), int(get(b"ce-expires", 0)),
            _text(get(b"ce-verdict", b"")), int(get(b"ce-upto", 0)), b"ce-again" in found,
            _text(get(b"ce-fold", b"")),
        )
    )  # fmt: skip


def _parts(lengths: bytes, payload: bytes) -> tuple[bytes, bytes | None, bytes]:
    body, wish, raw = (int(each) for each in lengths.split())
    middle = body + max(wish, 0)
    if middle + raw != len(payload):
        raise ValueError("its parts do not fit")
    return payload[:body], None if wish < 0 else payload[body:middle], payload[middle:]


def version_of(head: bytes) -> int:
    """The version of a message of a log, without reading the rest; 0 where there is none."""
    begin = head.find(b"\r\nce-streamversion: ")
    return int(head[begin + 20 : head.find(b"\r\n", begin + 20)]) if begin >= 0 else 0


def id_of(head: bytes) -> str:
    begin = head.find(b"\r\nce-id: ")
    return _text(head[begin + 9 : head.find(b"\r\n", begin + 9)]) if begin >= 0 else ""


def type_of(head: bytes) -> str:
    begin = head.find(b"\r\nce-type: ")
    return _text(head[begin + 11 : head.find(b"\r\n", begin + 11)]) if begin >= 0 else ""


def time_of(head: bytes) -> int:
    """When it was said, in microseconds since 1970; never, where that is not told."""
    begin = head.find(b"\r\nce-time: ")
    if begin < 0:
        return 2**63
    return micros(datetime.fromisoformat(head[begin + 11 : head.find(b"\r\n", begin + 11)].decode()))


def _value(text: str) -> bytes:
    value = text.encode()
    return value if _PLAIN.match(value) else _bytes(value)


def _bytes(value: bytes) -> bytes:
    return _OTHERS.sub(lambda found: b"%%%02X" % found[0][0], value)


def _text(value: bytes) -> str:
    return unquote_to_bytes(value).decode() if b"%" in value else value.decode()
