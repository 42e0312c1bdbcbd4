"""A second process: it says when it is ready, and works until its standard input ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

__all__ = ["child", "ready", "until_told"]


@contextmanager
def child(module: str, *arguments: str) -> Iterator[IO[bytes]]:
    """Run `python -m module arguments` meanwhile, from when it is ready on. Gives what it writes."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{module} {' '.join(arguments)} did not start")
        yield process.stdout
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def ready() -> None:
    """In the child: say that it is."""
    print("ready", flush=True)


async def until_told() -> None:
    """In the child: work until it is not needed any more."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()
