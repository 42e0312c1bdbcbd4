"""How a Unix socket in a deep folder is addressed."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["short"]


def short(directory: int, folder: Path, name: str) -> str:
    """A socket's path may have 107 bytes only; through the open folder a deep one fits (on Linux)."""
    through = f"/proc/self/fd/{directory}"
    return f"{through}/{name}" if os.path.exists(through) else str(folder / name)
