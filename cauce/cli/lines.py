"""The lines of a file or of standard input, plain or gzip, without keeping the loop waiting for them."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cauce.errors import Refused

__all__ = ["Lines", "opened"]

_CHUNK = 1 << 18


class Lines:
    """What `opened` gives: the lines, once, and how far they are read. A line over the bound comes in pieces."""

    def __init__(self, name: str, source: Any, bound: int, size: int | None) -> None:
        self._name, self._bound, self.size = name, bound, size
        self._source, self._raw = source, io.BufferedReader(source)

    @property
    def done(self) -> int:
        """How many bytes of `size` are read; 0 where the size is not known."""
        return self._raw.tell() if self.size is not None else 0

    async def each(self) -> AsyncIterator[bytes]:
        """One line after the other. Raises `Refused` where the file cannot be read."""
        rest = b""
        async for chunk in self._chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line
            if len(rest) > self._bound:
                yield rest
                rest = b""
        if rest:
            yield rest

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            await self._readable()
            packed = self._raw.peek(2)[:2] == b"\x1f\x8b"
            stream = io.BufferedReader(gzip.GzipFile(fileobj=self._raw), _CHUNK) if packed else self._raw
            while chunk := stream.read1(_CHUNK):
                yield chunk
                await self._readable()
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(
                f"{self._name} cannot be read to its end: {error}: make the file whole and import it again, what was written stays"
            ) from None

    async def _readable(self) -> None:
        """Wait for a pipe or a terminal to have something; a file always has."""
        if self.size is not None:
            return
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        with suppress(OSError, ValueError):
            number = self._source.fileno()
            loop.add_reader(number, _done, ready)
            try:
                await ready
            finally:
                loop.remove_reader(number)

    def close(self) -> None:
        """What is buffered must not close standard input when it goes."""
        self._raw.detach()


def _done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


@contextmanager
def opened(file: str, bound: int) -> Iterator[Lines]:
    """The lines of a file, `-` for standard input. `bound`: how many bytes of a line are kept together."""
    if file == "-":
        if sys.stdin is None:
            raise Refused("standard input is closed: name a file, or write the lines into it")
        # Not its own buffer, which waits until it is full.
        lines = Lines("standard input", getattr(sys.stdin.buffer, "raw", sys.stdin.buffer), bound, None)
        try:
            yield lines
        finally:
            lines.close()
        return
    if not file:
        raise Refused("the name of the file is empty: write one, or - for standard input")
    try:
        source = Path(file).open("rb", buffering=0)  # noqa: SIM115 - what is done with it must not raise the error of opening it
        found = os.fstat(source.fileno())
    except OSError as error:
        raise Refused(
            f"{file} cannot be read: {error.strerror}: name a file that you may read, or - for standard input"
        ) from None
    # A pipe or a terminal has no end that is known, nor a place in it.
    size = found.st_size if stat.S_ISREG(found.st_mode) else None
    with source:
        lines = Lines(file, source, bound, size)
        yield lines
        lines.close()
