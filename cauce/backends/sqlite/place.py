"""The place of a log while it is replaced: in use by nobody, with folders that go again if it fails."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cauce.backends.sqlite.part import no_room
from cauce.backends.sqlite.turnstile import describe
from cauce.errors import Busy, Refused

__all__ = ["made", "open_here", "undisturbed", "unused"]

_LOCK_BYTES = 0x40000000, 512
"""Where SQLite locks a database file: every connection holds a part of it, in all versions of SQLite."""


@contextmanager
def unused(path: Path) -> Iterator[None]:
    """Nobody has the file open, nor can open it until the end. Raises `Busy` and names who has."""
    if not path.exists():
        yield
        return
    if open_here(path):
        raise Busy(f"{path} is open in this process: close it first")
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(
            f"{path} may not be written: {error.strerror}: change its mode or owner, or name another place"
        ) from None
    try:
        start, length = _LOCK_BYTES
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError:
            raise Busy(f"{path} is open in {describe(_users(path))}: stop that first") from None
        yield
    finally:
        os.close(file)


def open_here(path: Path) -> bool:
    wanted = path.stat()
    for number in os.listdir("/dev/fd"):
        with suppress(OSError, ValueError):
            found = os.fstat(int(number))
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _users(path: Path) -> set[int]:
    """The pids that hold any lock on the file, as far as the system tells."""
    inode = str(path.stat().st_ino)
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return set()
    return {
        int(words[4]) for words in lines if len(words) > 5 and words[1] != "->" and words[5].rpartition(":")[2] == inode
    }


@contextmanager
def made(path: Path) -> Iterator[None]:
    """Makes a folder and those above it; what was made is gone again if that for which it was made fails."""
    new: list[Path] = []
    try:
        for each in (*reversed(path.parents), path):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
                new.append(each)
        yield
    except BaseException as error:
        with suppress(OSError):
            for each in reversed(new):
                each.rmdir()
        if isinstance(error, OSError):
            raise no_room(error, path) from None
        raise


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end: between two renamings there would be no log under the name."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
