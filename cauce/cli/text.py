"""What is printed: text without characters that command a terminal, JSON that is one object a line."""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import Any

__all__ = ["count", "cut", "json_line", "one_line", "print_json", "width", "write"]

# C0 and C1 controls, DEL, line separators, lone surrogates, and the marks that turn the direction of writing around.
_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def one_line(text: str) -> str:
    """The text with every character that a terminal would obey written out, as \\x1b."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def width(text: str) -> int:
    """How many columns a terminal needs for a text on one line: two for wide letters, none for marks upon others."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def cut(text: str, columns: int) -> str:
    """The beginning of a text that fits so many columns, with … where something is left out."""
    if width(text) <= columns:
        return text
    kept, left = "", columns - 1
    for character in text:
        left -= _columns(character)
        if left < 0:
            break
        kept += character
    return f"{kept}…" if columns > 0 else ""


def _columns(character: str) -> int:
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 0 if unicodedata.category(character) in {"Mn", "Me", "Cf"} else 1


def count(number: int, what: str) -> str:
    """A number with its noun: 1 event, 2 events."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output."""
    write(_encoded(value))
    sys.stdout.flush()


def json_line(value: Any) -> str:
    """One JSON object on one line, in which nothing commands a terminal."""
    return _harmless(_encoded(value))


def _encoded(value: Any) -> bytes:
    import msgspec

    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        # The name of a file may be any bytes; JSON is text.
        return msgspec.json.encode(_as_text(msgspec.to_builtins(value)))


def _as_text(value: Any) -> Any:
    """The same with lone surrogates written out, as \\udcff."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_as_text(name): _as_text(each) for name, each in value.items()}
        case list() | tuple():
            return [_as_text(each) for each in value]
    return value


def write(line: bytes) -> None:
    """A line of JSON to standard output: as it is to files and programs, harmless to terminals."""
    if sys.stdout.isatty():
        line = _harmless(line).encode()
    sys.stdout.buffer.write(line + b"\n")


def _harmless(line: bytes) -> str:
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", line.decode(errors="replace"))
