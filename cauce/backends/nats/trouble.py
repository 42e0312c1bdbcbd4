"""What an answer says that went wrong, told once more as the services API has it: for askers in other languages."""

from __future__ import annotations

import msgspec

__all__ = ["trouble"]

_CODES = {
    "BreakerOpen": 503,
    "Busy": 503,
    "Gone": 404,
    "IdReused": 409,
    "NoAnswer": 503,
    "NotOwner": 403,
    "NotPermitted": 403,
    "Overloaded": 503,
    "Refused": 400,
    "Rejected": 409,
    "StorageFull": 503,
    "Unavailable": 503,
    "Unreachable": 503,
    "Unreadable": 400,
}
"""By the name of an error of ours the number that HTTP has for such; any other is 500."""


class _Said(msgspec.Struct, frozen=True):
    """As much of an answer as says what went wrong; `cauce.bus.Reply` is the whole."""

    error: str = ""
    message: str = ""


_decode = msgspec.json.Decoder(_Said).decode


def trouble(answer: bytes) -> tuple[str, int] | None:
    """What went wrong, in words and as a number; None if nothing did. Costs next to nothing then."""
    if not answer.startswith(b'{"error":'):
        return None
    try:
        said = _decode(answer)
    except msgspec.MsgspecError:
        return None
    return (f"{said.error}: {said.message}", _CODES.get(said.error, 500)) if said.error else None
