"""How the message of a dead letter is kept: as it came, and beside that as a person mended it.

It is a CloudEvents object in JSON. A body that is no JSON stands in it as base64. What was mended stands under
`mended`, with who did it and when, and the rest never changes: so both can be shown, and the handler is given the
mended body.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import msgspec

from cauce.accept import check_body, check_value, decode_value
from cauce.codec import Entry, digest, moment, to_cloudevent
from cauce.errors import Refused

__all__ = ["Mended", "Mending", "envelope_of", "letter_of", "mended", "mending_of", "with_mended"]


class Mended(Entry, frozen=True, gc=False):
    """An entry with the body that a person gave it; what is in its log is as it was."""


class Mending(msgspec.Struct, frozen=True):
    """What a person made of a body, who, and when (RFC 3339)."""

    data: msgspec.Raw
    by: str = ""
    time: str = ""


class Envelope(msgspec.Struct, frozen=True):
    """What is asked of a kept message without the code that knows its type."""

    source: str = ""
    subject: str = ""
    type: str = ""
    schemaversion: int = 1
    time: str = ""
    data: msgspec.Raw = msgspec.Raw(b"")
    data_base64: str = ""
    mended: Mending | None = None

    @property
    def has_body(self) -> bool:
        return bool(bytes(self.data) or self.data_base64)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Envelope).decode


def letter_of(entry: Entry, **more: Any) -> bytes:
    """An entry as it is kept.

    Parameters:
        more: what else is to be known of it.
    """
    event = to_cloudevent(entry) | more
    if entry.body and not _is_json(entry.body):
        del event["data"], event["datacontenttype"]
        event["data_base64"] = b64encode(entry.body).decode()
    return _encode(event)


def envelope_of(kept: bytes) -> Envelope:
    """What a kept message tells; nothing, where nothing was kept."""
    try:
        return _decode(kept)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Envelope()


def mending_of(kept: bytes) -> Mending | None:
    """What a person made of it, if anybody did."""
    # Most were never mended, and need not be decoded for that.
    return envelope_of(kept).mended if b'"mended":' in kept else None


def mended(entry: Entry, kept: bytes) -> Entry:
    """The entry with the body that a person gave it; itself, if nobody did."""
    found = mending_of(kept)
    if found is None or entry.body is None:
        return entry
    made = Mended(*msgspec.structs.astuple(msgspec.structs.replace(entry, body=bytes(found.data))))
    return msgspec.structs.replace(made, digest=digest(made, made.version))


def with_mended(kept: bytes, body: bytes, by: str, time: int) -> bytes:
    """A kept message with another body beside its own, in the place of what was mended before.

    Parameters:
        time: microseconds since 1970.

    Raises `Refused` for a message without a body, and for a body that the one acceptance rule forbids.
    """
    before = envelope_of(kept)
    if not before.has_body:
        raise Refused("there is nothing to mend: this consumer is told no body; try it again, or discard it")
    what = f"the body of {before.type}"
    if not isinstance(value := decode_value(check_body(body, what), what), dict):
        raise Refused(f"{what} is no JSON object: write one, with its fields")
    check_value(value, what)
    whole: dict[str, msgspec.Raw] = msgspec.json.decode(kept, type=dict[str, msgspec.Raw])
    made = Mending(msgspec.Raw(msgspec.json.format(body, indent=-1)), by, moment(time).isoformat())
    return _encode(whole | {"mended": msgspec.Raw(_encode(made))})


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True
