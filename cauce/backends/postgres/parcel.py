"""How short answers travel inside a notification, which is text and of limited length."""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator

__all__ = ["ASKED", "LOOK", "Answer", "packed", "unpacked"]

Answer = tuple[int, int, bytes]
"""The number of the question; what kind of answer; its payload."""

LOOK = "?"
"""A notification for who asked, that there is an answer in the table."""

ASKED = "!"
"""A notification for who is asked, that there is a question in the table."""

_HEAD = struct.Struct("!QBH")
_MOST = 5900
"""Bytes of a parcel, of which base64 makes a third more: a notification holds less than 8000 bytes."""


def packed(answers: Iterable[Answer]) -> list[str]:
    """As few notifications as hold these answers; for those that are too long for any, that one should look."""
    found, part, look = list[str](), bytearray(), False
    for number, kind, payload in answers:
        size = _HEAD.size + len(payload)
        if size > _MOST:
            look = True
            continue
        if len(part) + size > _MOST:
            found.append(b64encode(part).decode())
            part = bytearray()
        part += _HEAD.pack(number, kind, len(payload)) + payload
    if part:
        found.append(b64encode(part).decode())
    return [*found, LOOK] if look else found


def unpacked(text: str) -> Iterator[Answer]:
    """The answers in a notification. Raises `ValueError` for what is none of ours."""
    data, at = b64decode(text, validate=True), 0
    while at < len(data):
        try:
            number, kind, size = _HEAD.unpack_from(data, at)
        except struct.error as error:
            raise ValueError(str(error)) from None
        at += _HEAD.size
        if at + size > len(data):
            raise ValueError(f"an answer of {size} bytes, and only {len(data) - at} are there")
        yield number, kind, data[at : at + size]
        at += size
