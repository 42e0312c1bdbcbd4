"""What a handler said, a command to send or an event to record: as it lies in the outbox, and as it waits beside it."""

from __future__ import annotations

import msgspec

from cauce.codec import Entry, from_cloudevent
from cauce.letter import letter_of, mended

__all__ = ["Said", "Spoken", "kept", "packed", "read_said", "spoken", "spoken_again"]


class Said(msgspec.Struct, frozen=True, array_like=True):
    """What a handler said, as it lies in the outbox."""

    kind: str
    stream: str
    type: str
    id: str
    raw: bytes
    body: bytes


class Spoken(Entry, frozen=True, gc=False):
    """The same, ready for its log. `kind` is command or event."""

    kind: str = ""


class _How(msgspec.Struct):
    kind: str


class _Kept(msgspec.Struct):
    said: _How


_pack = msgspec.msgpack.Encoder().encode
read_said = msgspec.msgpack.Decoder(Said).decode
_decode = msgspec.json.Decoder(_Kept).decode


def packed(kind: str, entry: Entry) -> bytes:
    """What a handler said, as it is stored."""
    return _pack(Said(kind, entry.stream, entry.type, entry.id, entry.raw, entry.body or b""))


def spoken(said: Said) -> Spoken:
    """Ready for its log."""
    return Spoken(0, said.stream, 0, said.type, said.id, said.raw, None, said.body, 0, kind=said.kind)


def kept(said: Said, handler: str) -> bytes:
    """As it waits, and as a dead letter is shown: what was said, and by which handler."""
    return letter_of(spoken(said), said={"kind": said.kind, "handler": handler})


def spoken_again(raw: bytes) -> Spoken:
    """What waits, ready for its log, with the body that a person gave it if one did."""
    entry = mended(from_cloudevent(raw), raw)
    kind = _decode(raw).said.kind
    return spoken(Said(kind, entry.stream, entry.type, entry.id, entry.raw, entry.body or b""))
