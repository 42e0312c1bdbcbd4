"""What came twice among any number of things, in bounded memory: their hashes, spread over files when they are many."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from tempfile import TemporaryFile, gettempdir
from typing import IO

from cauce.errors import StorageFull

__all__ = ["Twice"]

_MANY = 2**19
_PARTS = 64


class Twice:
    """Hashes of things, appended to `open` by who sees them. Who does so calls `tidy` now and then."""

    def __init__(self) -> None:
        self.open = array("q")
        self._files: list[IO[bytes]] = []

    def tidy(self) -> None:
        """Put away what is open, if that is much. Raises `StorageFull`."""
        if len(self.open) >= _MANY:
            with _room():
                self._spread()

    def found(self) -> set[int]:
        """The hashes that came more than once. Nothing is kept after that. Raises `StorageFull`."""
        if not self._files:
            return _doubles(self.open)
        with _room():
            return self._gathered()

    def _gathered(self) -> set[int]:
        self._spread()
        found = set[int]()
        for file in self._files:
            part = array("q")
            file.seek(0)
            part.frombytes(file.read())
            file.close()
            found |= _doubles(part)
        self._files = []
        return found

    def _spread(self) -> None:
        if not self._files:
            self._files = [TemporaryFile() for _ in range(_PARTS)]  # noqa: SIM115 - they are open until `found`
        parts = [array("q") for _ in range(_PARTS)]
        for each in self.open:
            parts[each % _PARTS].append(each)
        for file, part in zip(self._files, parts, strict=True):
            file.write(part.tobytes())
        # In place: who appends has hold of this very array.
        del self.open[:]


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFull(
            f"no temporary file can be written in {gettempdir()} ({error}): make room there, or name another folder by TMPDIR"
        ) from error


def _doubles(hashes: array[int]) -> set[int]:
    # Mostly there are none, and a set says so in a third of the time.
    if len(set(hashes)) == len(hashes):
        return set()
    ordered = sorted(hashes)
    return {one for one, two in pairwise(ordered) if one == two}
