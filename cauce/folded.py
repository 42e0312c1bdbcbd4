"""How a thing stands, and which fact made it so."""

from __future__ import annotations

import msgspec

from cauce.messages import Record

__all__ = ["EMPTY", "Folded"]


class Folded(msgspec.Struct, frozen=True, gc=False):
    """How a thing stands: its record (None: it does not stand), version, and the position and id of its last fact."""

    state: Record | None
    version: int
    position: int
    id: str


EMPTY = Folded(None, 0, 0, "")
"""Before its first fact."""
