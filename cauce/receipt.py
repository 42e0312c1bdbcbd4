"""What a caller is told of a wish that was accepted."""

from __future__ import annotations

import msgspec

__all__ = ["Receipt"]


class Receipt(msgspec.Struct, frozen=True):
    """What `call` returns: the command's id, the thing, its version, the position of its last fact, whether the
    command made any, and the domain."""

    id: str
    key: str
    version: int
    position: int
    changed: bool
    domain: str = ""
