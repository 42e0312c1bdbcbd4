"""A second opinion on where the logs end: 64 bytes beside the database, written after each commit, never flushed.

One flipped bit in the WAL silently drops every later commit, and SQLite's own check finds nothing. After a crash
between commit and write the witness may be older than the database, never ahead of it; so a database that is behind
lost entries.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from zlib import crc32

from cauce.errors import Damaged, Refused

__all__ = ["Witness"]

_FORM = struct.Struct(">8s16sQQQ12x")
_MAGIC = b"CAUCEwit"


class Witness:
    """The side file of one database: log id, and the heads of facts, commands and records.

    Raises `Refused` where it may not be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refused(
                f"{path} may not be opened: {error.strerror}: change the mode or owner of its folder, or run this as the owner of the log"
            ) from None

    def write(self, id: bytes, heads: tuple[int, int, int]) -> None:
        body = _FORM.pack(_MAGIC, id, *heads)
        os.pwrite(self._file, body + crc32(body).to_bytes(4, "big"), 0)

    def read(self) -> tuple[bytes, tuple[int, int, int]] | None:
        """Log id and heads as last seen; None where nothing was seen yet. Raises `Damaged` for other bytes."""
        data = os.pread(self._file, 65, 0)
        for _ in range(3):
            if _is_whole(data):
                break
            # Another process may have been in the middle of writing it.
            data = os.pread(self._file, 65, 0)
        if not data.strip(b"\0"):
            return None
        if not _is_whole(data):
            raise Damaged(f"the witness {self._path} is damaged: run cauce verify, and remove it if the log is whole")
        _, id, *heads = _FORM.unpack(data[:60])
        return id, (heads[0], heads[1], heads[2])

    def close(self) -> None:
        os.close(self._file)


def _is_whole(data: bytes) -> bool:
    return len(data) == 64 and crc32(data[:60]) == int.from_bytes(data[60:], "big") and data[:8] == _MAGIC
