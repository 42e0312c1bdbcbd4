"""Whose turn it is to write, among all processes on one file: a fair turnstile of two `flock`s.

One lock alone lets the same process barge in again and again; with two (`next`, then `main`, then let go of `next`) the
one that waited is already inside when the writer comes round again.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from weakref import WeakSet

__all__ = ["Turnstile", "describe", "who_locks"]


class Turnstile:
    """Entered by the writer thread before each transaction, left after its commit."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._next = os.open(folder / "turn.next", flags, 0o600)
        self._main = os.open(folder / "turn.main", flags, 0o600)
        self._inodes = os.fstat(self._main).st_ino, os.fstat(self._next).st_ino
        self._closed = False
        _turnstiles.add(self)

    def enter(self) -> None:
        """Wait for the turn, however long it takes."""
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._main, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    def try_enter(self) -> bool:
        """Take the turn if nobody has it or waits for it."""
        try:
            fcntl.flock(self._next, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._main, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            # Also where a signal handler raised as soon as it was taken.
            fcntl.flock(self._next, fcntl.LOCK_UN)
        return True

    def leave(self) -> None:
        fcntl.flock(self._main, fcntl.LOCK_UN)

    def close(self) -> None:
        """In the thread that enters: a number that is closed elsewhere may soon mean another file."""
        if not self._closed:
            self._closed = True
            os.close(self._next)
            os.close(self._main)

    def holders(self) -> set[int]:
        """The pids of those inside, as far as the system tells."""
        return who_locks(*self._inodes)


_turnstiles: WeakSet[Turnstile] = WeakSet()


def _let_go() -> None:
    """A forked child shares its parent's flocks: if the parent died in its turn, the child would keep it."""
    for turnstile in _turnstiles:
        turnstile.close()


os.register_at_fork(after_in_child=_let_go)


def who_locks(*inodes: int) -> set[int]:
    """The pids that hold a lock on one of the inodes. Linux says it in /proc/locks; elsewhere it stays empty."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    found = set()
    for line in lines:
        words = line.split()
        # 1: FLOCK ADVISORY WRITE 708 00:19:12345 0 EOF; a second word "->" marks one that only waits.
        if len(words) > 5 and words[1] != "->" and words[3] == "WRITE" and int(words[5].rpartition(":")[2]) in inodes:
            found.add(int(words[4]))
    return found


def describe(pids: set[int]) -> str:
    """Processes in words for an error: pid, command, and whether it is stopped."""
    return ", ".join(_describe(pid) for pid in sorted(pids)) or "another process"


def _describe(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, IndexError):
        return f"process {pid}"
    return f"process {pid} ({command}{', stopped' if state in 'Tt' else ''})"
