"""What lies in SQLite's write-ahead log behind the point up to which SQLite reads it.

SQLite takes the first frame whose checksum is wrong for the end, and says nothing about what comes after it. The format
is described in https://sqlite.org/fileformat2.html#walformat.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import msgspec

__all__ = ["Rest", "rest"]

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">4I")
_FRAME_HEADER = 24
_MAGIC = 0x377F0682


class Rest(msgspec.Struct, frozen=True):
    """What SQLite does not read: how many frames of the present generation, and whether the head of the file is whole.

    Without a whole head SQLite reads nothing at all. Frames are left behind also by a writer that was killed.
    """

    frames: int = 0
    header: bool = True


def rest(wal: Path, read: int) -> Rest:
    """What follows the first `read` frames."""
    try:
        with wal.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size:
                return Rest()
            if not _is_whole(head):
                # Nothing but zeros was never a head: they were put there ahead of the first frame.
                return Rest(header=not any(head) and not any(file.read(_FRAME.size)))
            return _rest(file, _HEADER.unpack(head), read)
    except FileNotFoundError:
        return Rest()


def _rest(file: BinaryIO, head: tuple[int, ...], read: int) -> Rest:
    size, salt = head[2], head[4] << 32 | head[5]
    frames, number = 0, read
    while True:
        file.seek(_HEADER.size + number * (_FRAME_HEADER + size))
        found = file.read(_FRAME.size)
        if len(found) < _FRAME.size:
            return Rest(frames)
        salts = _FRAME.unpack(found)[2:]
        # Frames of an older generation differ in half of the bits; one that differs in a single bit is damaged.
        if ((salts[0] << 32 | salts[1]) ^ salt).bit_count() <= 1:
            frames += 1
        number += 1


def _is_whole(head: bytes) -> bool:
    words = _HEADER.unpack(head)
    first = second = 0
    order = ">" if words[0] & 1 else "<"
    numbers = struct.unpack(f"{order}6I", head[:24])
    for even, odd in zip(numbers[::2], numbers[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return words[0] & ~1 == _MAGIC and (first, second) == (words[6], words[7])
