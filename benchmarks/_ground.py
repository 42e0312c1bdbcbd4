"""Where the files of a run lie: on a real disk, made in advance once, copied for each round, gone afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["Ground", "disk_of"]


class Ground:
    """A folder for the files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._copies: dict[str, tuple[int, Path]] = {}

    def fresh(self, name: str) -> Path:
        """The path of a file that is not there (any more)."""
        path = self.folder / name
        remove(path)
        return path

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file made once for the whole run."""
        path = self.folder / f"{name}.base"
        if not path.exists():
            growing = self.fresh(f"{name}.growing")
            make(growing)
            growing.rename(path)
            remove(growing)
            flush(path)
        return path

    def copy(self, base: Path, round: int) -> Path:
        """A copy of a file that all turns of one round share, so that no round finds a larger file than the first."""
        held = self._copies.get(base.name)
        if held is not None and held[0] == round:
            return held[1]
        if held is not None:
            remove(held[1])
        path = self.fresh(f"{base.stem}.{round}")
        shutil.copyfile(base, path)
        flush(path)
        self._copies[base.name] = round, path
        return path


def remove(path: Path) -> None:
    """A database with all that lies beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.rmtree(path.with_name(path.name + ".d"), ignore_errors=True)


def flush(path: Path) -> None:
    """Let no earlier writing slow down what is measured next."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def disk_of(folder: Path) -> str:
    """The kind of file system a folder lies on, as far as the system tells."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    device = folder.stat().st_dev
    kinds = [words[2] for words in map(str.split, mounts) if _device(words[1]) == device]
    return kinds[-1] if kinds else "unknown"


def _device(mount: str) -> int | None:
    try:
        return os.stat(mount.replace("\\040", " ")).st_dev
    except OSError:
        return None
