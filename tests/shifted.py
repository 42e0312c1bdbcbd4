"""A wall clock that tests set, in this process and in others at the same moment."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from cauce.clock import SystemClock, uuid7

__all__ = ["Shifted", "hours"]

_MICROS = struct.Struct("q")


def hours(many: float) -> int:
    """In microseconds."""
    return round(many * 3_600_000_000)


class Shifted(SystemClock):
    """The real clock, with its wall set forward or back by as much as a file says; ids follow the wall.

    Parameters:
        path: is made if it is not there; all who are given it have one wall clock.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        with open(path, "a+b") as file:
            file.truncate(_MICROS.size)
            self._memory = mmap.mmap(file.fileno(), _MICROS.size)

    def set(self, by: int) -> None:
        """Set the wall clock, to so many microseconds after the real one."""
        _MICROS.pack_into(self._memory, 0, by)

    def now(self) -> int:
        return super().now() + int(_MICROS.unpack_from(self._memory)[0])

    def id(self) -> str:
        return uuid7(self.now() * 4096 // 1000, round(self.random() * 2**61))
