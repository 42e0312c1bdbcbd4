"""Zeroed bytes in the write-ahead log ahead of what is written, which make a commit twice as fast.

A flush of a file that has grown must flush its new size, too: another write to another place of the disk. SQLite takes
zeros behind its last frame for what they are, no frame. They are added at the end of the file in one step of the system
(`O_APPEND`), so that no frame which another process writes meanwhile can be overwritten.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Runway"]

_LEAST = 1024 * 1024
_MOST = 16 * _LEAST
_ROOM = 256 * _LEAST
"""Bytes that the file system must have free beside. On a disk that is filling up, zeros would take the last room, which
the checkpoint needs that gives room back."""


class Runway:
    """Keeps the WAL at `path` longer than it needs to be. Used in the thread that writes."""

    def __init__(self, path: Path, page_size: int) -> None:
        self._path, self._frame = path, page_size + 24
        self._file = -1
        self._size = self._end = 0

    def is_short(self, pages: int) -> bool:
        """Whether, with so many pages in the WAL, it is time to keep it longer."""
        return pages * self._frame + _LEAST // 4 > self._size

    def keep(self, pages: int) -> None:
        """After a commit, with so many pages in the WAL. Where it cannot be done, commits are only slower."""
        end = pages * self._frame
        # As much as some commits like the last one.
        wanted = min(_MOST, max(_LEAST, 4 * (end - self._end)))
        self._end = end
        if end + wanted // 2 <= self._size:
            return
        try:
            if self._file < 0:
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._size = os.fstat(self._file).st_size
            # An empty file means that somebody just cut it off: it must begin with its head.
            if 0 < self._size < end + wanted // 2:
                if _free(self._file) < _ROOM:
                    self._size = end + wanted
                else:
                    self._size += os.write(self._file, bytes(wanted))
        except OSError:
            self._size = end + wanted

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _free(file: int) -> int:
    found = os.fstatvfs(file)
    return found.f_bavail * found.f_frsize
