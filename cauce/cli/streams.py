"""The standard streams, where whoever started this closed them.

Python then has None in their place, and the next file that is opened gets their number: a log could become the standard
output of a child.
"""

from __future__ import annotations

import os
import sys

__all__ = ["present"]


def present() -> None:
    """Put something in the place of what is closed: who prints finds that nobody reads, messages go nowhere."""
    if sys.stdin is None:
        _put(os.open(os.devnull, os.O_RDONLY), 0)
    if sys.stdout is None:
        read, write = os.pipe()
        os.close(read)
        _put(write, 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        _put(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process


def _put(descriptor: int, number: int) -> None:
    if descriptor == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(descriptor, number)
        os.close(descriptor)
