"""A program that outlives pytest by a moment: when its standard input ends, it ends servers and removes folders.

It is told, a line each, of what begins (`+pid 17`, `+folder /tmp/x`) and of what has ended (`-pid 17`). However pytest
dies, the kernel closes the pipe. It imports nothing but the standard library, so that it is there at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

__all__ = ["clear", "family", "slay"]


def family(pid: int) -> list[int]:
    """A process and all that descend from it, as far as they live, the eldest first."""
    parents = dict(_parents())
    found = [pid] if pid in parents else []
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of this machine with its parent."""
    if not os.path.exists("/proc/self/stat"):
        told = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        for line in told.splitlines():
            pid, parent = line.split()
            yield int(pid), int(parent)
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                yield int(name), int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended


def is_stopped(pid: int) -> bool:
    """Whether no thread of a process runs any more: all were stopped, or it has ended."""
    if not os.path.exists("/proc/self/stat"):
        told = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True).stdout
        return not told or told[0] in "TZ"
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] not in "TZX":
                    return False
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has just ended, or a thread of it has
    return True


def slay(pid: int) -> None:
    """SIGKILL to a process and its descendants. The eldest stands still first, so that no new ones come."""
    try:
        os.kill(pid, signal.SIGSTOP)
        for each in reversed(family(pid)):
            os.kill(each, signal.SIGKILL)
    except ProcessLookupError:
        pass


def clear(folder: str) -> None:
    """Remove a folder; who was just killed may still be putting something there."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.05)


def main() -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    begun: dict[str, None] = {}
    for line in sys.stdin:
        if line[0] == "+":
            begun[line[1:].strip()] = None
        else:
            begun.pop(line[1:].strip(), None)
    for what, _, which in (each.partition(" ") for each in begun):
        if what == "pid":
            slay(int(which))
    for what, _, which in (each.partition(" ") for each in begun):
        if what == "folder":
            clear(which)


if __name__ == "__main__":
    main()
