"""Tokens of subjects: any legal key as one token that people can read, and back."""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["text", "token"]

# Written out, not asked of Python's Unicode tables: those grow with each version, and two programs would give one key
# two subjects. What has no width or is white is encoded, too, so that what people see is what there is.
_ENCODED = re.compile(
    r"^\$|[\x00-\x20.*>%\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ud800-\uf8ff"
    r"\ufdd0-\ufdef\ufeff\ufff0-\uffff\U000e0000-\U0010ffff]"
)


def token(text: str) -> str:
    """The text as one token of a subject: readable characters as they are, the rest percent-encoded as UTF-8.

    Injective: `.`, `*`, `>`, `%`, a `$` in front and everything white or invisible are encoded, nothing else is.
    """
    return _ENCODED.sub(_encode, text) if _ENCODED.search(text) else text


def text(token: str) -> str:
    """What a token stands for."""
    return unquote(token, errors="strict") if "%" in token else token


def _encode(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode())
