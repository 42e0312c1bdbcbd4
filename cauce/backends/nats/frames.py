"""A question and its answer as NATS carries them: commands and header blocks, written and read without detours."""

from __future__ import annotations

from cauce.backends.spread import NotServed

__all__ = [
    "QUEUE",
    "TAKEN",
    "WENT_AWAY",
    "Failed",
    "WentAway",
    "not_served",
    "outcome",
    "publication",
    "question",
    "seconds_of",
]

TAKEN = b".taken"
"""Under the inbox of a question that takes long: who has it in hand. A plain client does not see it."""

QUEUE = "q"
"""The queue group of those who answer at one address, as the services API calls it."""

_SECONDS = b"\r\nCauce-Seconds: "
_ERROR, _CODE = b"\r\nNats-Service-Error: ", b"\r\nNats-Service-Error-Code: "
WENT_AWAY = 503
"""The code of the error that says that the process which had a question in hand has ended."""

_NOT_SERVED = b"NATS/1.0\r\nStatus: 503\r\n\r\n"
HEADERS = 2048
"""Bytes of a message that are left for its headers; the server counts them, too."""


class Failed(Exception):
    """Who was asked could not answer, and says why."""


class WentAway(Failed):
    """Who was asked ended while it had the question in hand."""


def question(subject: bytes, reply: bytes, seconds: float, payload: bytes) -> bytes:
    """`seconds` is how long the asker will wait: a duration, because two machines' clocks do not agree."""
    return publication(subject, reply, payload, b"NATS/1.0%b%.3f\r\n\r\n" % (_SECONDS, seconds))


def publication(subject: bytes, reply: bytes, payload: bytes, headers: bytes = b"") -> bytes:
    """The command that publishes a message."""
    if headers:
        return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
            subject, reply, len(headers), len(headers) + len(payload), headers, payload,
        )  # fmt: skip
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(payload), payload)


def seconds_of(headers: bytes) -> float | None:
    """How long the asker waits, by the headers of a question; None if it does not say, 0 if that is no number."""
    text = _value(headers, _SECONDS)
    try:
        return None if text is None else float(text)
    except ValueError:
        return 0.0


def not_served(reply: bytes) -> bytes:
    """What the server itself answers where nobody has subscribed, as clients of all languages know it."""
    return publication(reply, b"", b"", _NOT_SERVED)


def outcome(headers: bytes, payload: bytes) -> bytes | Exception:
    """The answer, or why there is none."""
    if not headers or payload:
        return payload
    if headers.startswith(b"NATS/1.0 503") or headers == _NOT_SERVED:
        return NotServed()
    error = _value(headers, _ERROR)
    if error is None:
        return payload
    cls = WentAway if _value(headers, _CODE) == b"%d" % WENT_AWAY else Failed
    return cls(error.decode(errors="replace"))


def error_headers(text: str, code: int) -> bytes:
    """An error as the services API (ADR-32) tells it, on one line and not too long."""
    line = "".join(each if each.isprintable() else " " for each in text[:500])
    return b"NATS/1.0%b%b%b%d\r\n\r\n" % (_ERROR, line.encode(errors="replace"), _CODE, code)


def _value(headers: bytes, name: bytes) -> bytes | None:
    at = headers.find(name)
    return None if at < 0 else headers[at + len(name) : headers.find(b"\r\n", at + len(name))].strip()
