"""The one acceptance rule: which names, keys and bodies any log takes, whatever backend lies below."""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from zlib import crc32

import msgspec

from cauce.errors import Refused

__all__ = [
    "APPEND_BYTES",
    "APPEND_ENTRIES",
    "BODY_DEPTH",
    "ENTRY_BYTES",
    "ID_BYTES",
    "KEY_BYTES",
    "NAME_BYTES",
    "SLOTS",
    "check_body",
    "check_domain",
    "check_id",
    "check_key",
    "check_name",
    "check_stream",
    "check_value",
    "decode_value",
    "slot_of",
]

SLOTS = 16
"""Into how many parts the things of a domain fall; fixed for good, because stored slots depend on it."""

KEY_BYTES = 256
NAME_BYTES = 128
ID_BYTES = 1024
"""The 256 characters that a caller may give, in UTF-8: three times as long it still fits the headers of NATS."""

BODY_DEPTH = 64
ENTRY_BYTES = 750_000
"""Body, wish and envelope of one entry together: with the wish in base64 it still fits a NATS message of 1 MiB."""

APPEND_ENTRIES = 900
"""Entries of one append: it still fits an atomic batch of JetStream, which takes 1,000 messages."""

APPEND_BYTES = 16 * 1024 * 1024
"""Bodies, wishes and envelopes of one append together, so that no backend stands still for one of them."""

_DOMAIN = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")
_RESERVED = re.compile(r"_[a-z]{1,62}\Z")
_USUAL = re.compile(r"(?:[a-z][a-z0-9_-]{0,62}|_[a-z]{1,62})/[ -~]{1,256}\Z")
"""Nearly every stream, looked at in one step: each append asks."""


def slot_of(key: str) -> int:
    """The slot of a key, `crc32(utf-8) % 16`, the same in every version and on every backend."""
    return crc32(key.encode()) % SLOTS


def check_domain(name: str) -> str:
    """The name of a domain: lower-case ASCII letters, digits, `-` and `_`, at most 63 characters, a letter first."""
    if not isinstance(name, str) or not _DOMAIN.match(name):
        raise Refused(f"domain name {name!r}: use a lower-case letter, then letters, digits, - or _ (at most 63)")
    return name


def check_key(key: str) -> str:
    """A key: NFC text of 1 to 256 bytes of UTF-8 without control characters."""
    if type(key) is not str:
        raise Refused(f"key {key!r} is {type(key).__name__}: a key is text (str)")
    return _check_text(key, "key", KEY_BYTES)


def check_name(name: str) -> str:
    """The name of a message type: NFC text of 1 to 128 bytes of UTF-8 without control characters or outer spaces."""
    if type(name) is not str or name != name.strip():
        raise Refused(f"type name {name!r}: a name is text without spaces around it")
    return _check_text(name, "type name", NAME_BYTES)


def check_stream(stream: str) -> str:
    """The name of a stream, `domain/key`; domains that begin with `_` are the bus's own."""
    if type(stream) is str and _USUAL.match(stream):
        return stream
    domain, slash, key = stream.partition("/")
    if not slash or not (_DOMAIN.match(domain) or _RESERVED.match(domain)):
        raise Refused(f"stream {stream!r}: write it as domain/key")
    check_key(key)
    return stream


def check_id(id: str) -> str:
    """The id of a message: text of 1 to 1,024 bytes of UTF-8 without NUL and lone surrogates."""
    try:
        if type(id) is str and "\0" not in id and 0 < (len(id) if id.isascii() else len(id.encode())) <= ID_BYTES:
            return id
    except UnicodeEncodeError:
        pass
    raise Refused(
        f"id {ascii(id)[:40]} is no text of 1 to {ID_BYTES:,} bytes of UTF-8 without NUL: use one of the clock, or a derived one"
    )


def _check_text(text: str, what: str, limit: int) -> str:
    if text.isascii():
        if text.isprintable() and 0 < len(text) <= limit:
            return text
    elif not unicodedata.is_normalized("NFC", text):
        raise Refused(f"{what} {text!r} is not in Unicode's NFC form: pass unicodedata.normalize('NFC', …)")
    if not text:
        raise Refused(f"the {what} is empty")
    for character in text:
        if unicodedata.category(character) in {"Cc", "Cs"}:
            raise Refused(f"{what} {text!r} holds the control character or lone surrogate {character!r}")
    size = len(text.encode())
    if size > limit:
        raise Refused(f"{what} {text[:40]!r}… is {size} bytes of UTF-8: at most {limit}")
    return text


def check_body(body: bytes, what: str, *, bound: int = ENTRY_BYTES) -> bytes:
    """Encoded JSON: size, depth and NUL. `what` names the message in the error."""
    if len(body) > bound:
        raise Refused(
            f"{what} is {len(body):,} bytes: at most {bound:,}; keep large things elsewhere and send their name"
        )
    if b"\\u0000" in body or body.count(b"{") + body.count(b"[") > BODY_DEPTH:
        check_value(decode_value(body, what), what)
    return body


def decode_value(body: bytes | str, what: str) -> Any:
    """Plain values from JSON that comes from outside. Raises `Refused`, saying what is wrong with it and where."""
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise Refused(f"{what} is nested deeper than {BODY_DEPTH}: flatten it") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{what} is not JSON in UTF-8: {error}") from None


def check_value(value: Any, what: str, depth: int = 0) -> None:
    """Plain values: depth, NUL, NaN and infinities, which some backends or readers would not take back."""
    kind = type(value)
    if kind is str:
        if "\0" in value:
            raise Refused(f"{what} holds a NUL character, which not every backend can store: remove it")
    elif kind is float:
        if value - value != 0:
            raise Refused(f"{what} holds {value}, which JSON has no word for: leave it out or send None")
    elif kind in (dict, list, tuple, set, frozenset):
        if depth >= BODY_DEPTH:
            raise Refused(f"{what} is nested deeper than {BODY_DEPTH}: flatten it")
        if kind is dict:
            for name in value:
                check_value(name, what, depth + 1)
            value = value.values()
        for part in value:
            check_value(part, what, depth + 1)
