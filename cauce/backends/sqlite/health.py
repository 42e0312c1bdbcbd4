"""Whether the file of a bus, its place and the SQLite in use keep the promises."""

from __future__ import annotations

import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import apsw

from cauce.backends.health import DURABLE, ONE_ORDER, PRIVATE, Finding, Health
from cauce.backends.sqlite.file import connect, folder_of, translate
from cauce.backends.sqlite.peek import looking, own_name, peek, wal_of
from cauce.clock import Clock
from cauce.errors import Refused

__all__ = ["examine", "health_of"]

_OLDEST = (3, 51, 3)
"""The first SQLite in which connections that write and checkpoint at the same time cannot corrupt a WAL."""

_ROOM = 256 * 1024 * 1024
_MOUNTS = Path("/proc/self/mounts")
_SYNCHRONOUS = ("off", "normal", "full", "extra")
_NETWORK = re.compile(r"(nfs|cifs|smb|9p|afs|ceph|gluster|lustre|gpfs|ocfs|vboxsf|fuse(?!blk))")
_MEMORY = {"tmpfs", "ramfs"}


async def examine(path: Path, clock: Clock) -> Health:
    """The health of a bus that is there already. Nothing is written.

    Raises `Refused` where there is no log, `Damaged` where SQLite cannot make sense of the file.
    """
    own = own_name(path)
    with peek(own, clock), looking(own) as open:
        looked = open()
        if looked.pragma("journal_mode") != "wal" or not os.access(own, os.W_OK) or not os.access(own.parent, os.W_OK):
            return health_of(own, looked, writes=False)
        # As those have it who write. One that looks is open beside it, so its end moves nothing out of the WAL.
        connection = connect(own, busy=1.0)
        try:
            return health_of(own, connection)
        finally:
            connection.close()


def health_of(path: Path, connection: apsw.Connection, *, writes: bool = True) -> Health:
    """The health of the bus in a file, by what a connection to it says.

    Parameters:
        writes: whether the connection is set up as those that write.
    """
    seen: dict[str, str | int] = {"SQLite": apsw.sqlitelibversion()}
    findings = list(_library(apsw.sqlitelibversion()))
    try:
        for setting, is_, found in _settings(connection, path, writes):
            seen[setting] = is_
            findings += found
        for place, mode in _modes(path):
            seen[f"mode of {place.name}"] = f"{mode:04o}"
            findings += _mode(place, mode)
        findings += _parent(path.parent)
        seen["file system"] = (kind := file_system(path)) or "unknown"
        findings += _file_system(path, kind)
        disk = os.statvfs(path)
        seen["free bytes"] = free = disk.f_bavail * disk.f_frsize
        findings += _room(path, free)
    except apsw.Error as error:
        raise translate(error, path) from error
    except OSError as error:
        raise Refused(f"{path} cannot be looked at: {error.strerror}: change the mode or owner of its folder") from None
    return Health(f"sqlite:///{path}", "sqlite", seen, tuple(findings))


def _library(version: str) -> Iterator[Finding]:
    if tuple(map(int, version.split("."))) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        yield Finding(
            "SQLite", version, f"{needed} or newer", ONE_ORDER,
            "install apsw from its wheel, which brings its own SQLite (pip install --force-reinstall --only-binary apsw apsw)",
        )  # fmt: skip


def _settings(connection: apsw.Connection, path: Path, writes: bool) -> Iterator[tuple[str, str, tuple[Finding, ...]]]:
    journal = str(connection.pragma("journal_mode"))
    if not writes and not os.access(path.parent, os.W_OK):
        # Opened as a file that stands still, SQLite says nothing of its WAL.
        yield "journal_mode", "cannot be seen: this user may not write in the folder", ()
        return
    cure = "stop who has the file open, and start a service on it, which sets it"
    wrong = Finding("journal_mode", journal, "wal", DURABLE, cure)
    yield "journal_mode", journal, () if journal == "wal" else (wrong,)
    if writes:
        synchronous = _SYNCHRONOUS[connection.pragma("synchronous")]
        cure = "install apsw from its wheel: this SQLite does not do what it is told"
        wrong = Finding("synchronous", synchronous, "full", DURABLE, cure)
        yield "synchronous", synchronous, () if synchronous in ("full", "extra") else (wrong,)


def _modes(path: Path) -> Iterator[tuple[Path, int]]:
    for place in (path, wal_of(path), path.with_name(path.name + "-shm"), folder_of(path)):
        try:
            yield place, stat.S_IMODE(place.stat().st_mode)
        except FileNotFoundError:
            continue


def _mode(place: Path, mode: int) -> Iterator[Finding]:
    if mode & 0o077:
        needed = "0700" if place.is_dir() else "0600"
        yield Finding(
            f"mode of {place}", f"{mode:04o}", needed, PRIVATE, f"chmod {needed[1:]} {shlex.quote(str(place))}"
        )


def _parent(folder: Path) -> Iterator[Finding]:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield Finding(
            f"mode of {folder}",
            f"{mode:04o}",
            "writable only for its user",
            PRIVATE,
            f"chmod o-w {shlex.quote(str(folder))}",
        )


def file_system(path: Path) -> str:
    """The kind of file system that a file lies on, as `ext4`; empty where the system does not tell."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        _, mounted, is_, *_ = line.split(" ")
        mounted = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), mounted)
        # What is mounted later at the same place lies over it.
        if len(mounted) >= len(best) and path.is_relative_to(mounted):
            best, kind = mounted, is_
    return kind


def _file_system(path: Path, kind: str) -> Iterator[Finding]:
    where = f"file system of {path}"
    if _NETWORK.match(kind):
        yield Finding(
            where, kind, "a disk of this machine", ONE_ORDER,
            "move the bus there (locks and WAL of SQLite do not hold over a network), or use one at postgresql://…",
        )  # fmt: skip
    # What lies in the folder for temporary files is not meant to last.
    if kind in _MEMORY and not path.is_relative_to(Path(tempfile.gettempdir()).resolve()):
        yield Finding(where, f"{kind}, which is memory", "a disk", DURABLE, "move the bus to a disk")


def _room(path: Path, free: int) -> Iterator[Finding]:
    if free < _ROOM:
        yield Finding(
            f"room at {path.parent}", f"{free / 2**20:.0f} MiB", f"{_ROOM / 2**20:.0f} MiB or more",
            "what is sent is taken (else it is refused: StorageFull)", "make room there",
        )  # fmt: skip
