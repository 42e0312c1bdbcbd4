"""How many entries are read at once: as many as weigh about so much, by what the last ones weighed."""

from __future__ import annotations

from collections.abc import Sequence

from cauce.codec import Entry

__all__ = ["Load", "Portion", "weight"]

_FIRST = 16
_GROWS = 4
_BYTES = 1024 * 1024


class Portion:
    """The limit of the next read. It begins small: the first entries may be as heavy as entries can be.

    Parameters:
        most: the most entries, however light.
    """

    def __init__(self, most: int) -> None:
        self._most, self.limit = most, min(most, _FIRST)

    def met(self, entries: Sequence[Entry]) -> None:
        """So heavy were those that were read."""
        if entries:
            each = sum([weight(entry) for entry in entries]) // len(entries)
            self.limit = max(1, min(self._most, _BYTES // (each + 1), self.limit * _GROWS))


def weight(entry: Entry) -> int:
    """The bytes of its body. A damaged one may be anything, and is found where it is handled."""
    body = entry.body
    return len(body) if type(body) is bytes else 0


class Load:
    """The bytes of all bodies that wait for one consumer in this process."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0
