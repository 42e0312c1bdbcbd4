"""A file that appears under its name when it is whole, and never in the place of another."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cauce.errors import Busy, CauceError, Refused, StorageFull

__all__ = ["flush", "move", "no_room", "unfinished"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ENDINGS = ("", "-journal", "-wal", "-shm")


def no_room(error: OSError, path: Path) -> CauceError:
    """An error of writing as ours: `StorageFull` if the disk took no more, else `Refused`."""
    if error.errno in _NO_ROOM:
        return StorageFull(f"{path}: the disk took no more ({error.strerror}): make room, or name another place")
    return Refused(f"{path} cannot be written: {error.strerror}: mend that, or name another place")


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """The name of a file to make, in the folder `<target>.part`; both are gone at the end.

    What a killed program left there is taken over: who uses the folder holds a lock on it, as long as it lives. A lock
    on the file itself would not do, because SQLite's own go when another descriptor of it is closed.

    Raises `Busy` if another program makes the same target, `Refused` if the folder cannot be made or is none of ours.
    """
    folder = target.with_name(f"{target.name}.part")
    lock = _locked(folder)
    part = folder / "new"
    try:
        _clear(part)
        yield part
    finally:
        with suppress(OSError):
            _clear(part)
            folder.rmdir()
        os.close(lock)


def _locked(folder: Path) -> int:
    while True:
        try:
            folder.mkdir(mode=0o700)
            fresh = True
        except FileExistsError:
            fresh = False
        except OSError as error:
            raise no_room(error, folder) from None
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Refused(f"{folder} is in the way ({error.strerror}): move it, or name another place") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Busy(f"{folder} is in use: another program makes the same file: wait for it, or stop it") from None
        except OSError:
            # A file system without locks: who made the folder may go on, others cannot know.
            if not fresh:
                os.close(lock)
                raise Refused(f"{folder} exists: if no other program makes the same file, remove it") from None
        if _is_still(folder, lock):
            return lock
        os.close(lock)


def _is_still(folder: Path, lock: int) -> bool:
    """Whether the name still means what is locked: who had it may have removed it before letting go."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(lock))


def _clear(part: Path) -> None:
    """Only what we make: a folder of somebody else may happen to have the name."""
    for ending in _ENDINGS:
        part.with_name(part.name + ending).unlink(missing_ok=True)


def move(part: Path, target: Path) -> None:
    """By a link, which fails where another has made the target meanwhile, as a renaming does not."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise Refused(f"{target} was made meanwhile: name another file") from None
    except OSError:
        # A file system without links.
        try:
            part.rename(target)
        except OSError as error:
            raise no_room(error, target) from None
    flush(target.parent)


def flush(file: Path) -> None:
    """Make durable what a file holds, or which names a folder has. Raises as `no_room`, and `StorageFull`."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise no_room(error, file) from None
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise StorageFull(f"{file} could not be flushed: {error.strerror}: make room, or name another place") from error
    finally:
        os.close(descriptor)
