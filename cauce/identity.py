"""Who a process is, so that another one of the same machine can prove that it is dead."""

from __future__ import annotations

import os
from pathlib import Path

from cauce.clock import Clock

__all__ = ["identity", "is_dead"]


def identity(service: str, clock: Clock) -> str:
    """The owner's name in a claim: service, then boot, pid namespace, pid and start time of this process, and chance.

    With these another process of the same machine can prove that this one is dead.
    """
    pid = os.getpid()
    return f"{service} {_boot()}:{_namespace()}:{pid}:{_started(pid)}:{clock.id()[-12:]}"


def is_dead(owner: str) -> bool | None:
    """True: proved dead. False: proved alive. None: cannot be told from here, so watch its beat."""
    parts = owner.rpartition(" ")[2].split(":")
    if len(parts) != 5 or parts[0] != _boot() or parts[1] != _namespace() or not parts[2].isdigit():
        return None
    return _started(int(parts[2])) != parts[3]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "?"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return "?"


def _started(pid: int) -> str:
    """When a process began, in ticks since boot; empty if it is gone or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
