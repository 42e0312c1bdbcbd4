"""Tasks that are given up: whether this one was, and how long somebody waits for others that were."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

__all__ = ["ended", "given_up"]


def given_up() -> bool:
    """Whether somebody has cancelled the task that runs now, whatever a handler made of that."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def ended(tasks: Collection[asyncio.Task[Any]], within: float) -> set[asyncio.Task[Any]]:
    """Cancel tasks and wait until they have ended, but not for functions of a user that do not: gives those.

    Parameters:
        within: seconds.
    """
    for task in tasks:
        task.cancel()
    return (await asyncio.wait(tasks, timeout=within))[1] if tasks else set()
