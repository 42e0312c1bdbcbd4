"""How far something is, for whoever sits at a terminal; silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar", "pages"]


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[float, float | None, int], None]]:
    """Gives a function that is told: how much is done, of how much (None: nobody knows), and how many units that is."""
    if not sys.stderr.isatty():
        yield lambda done, total, units: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[units]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, units="")

        def told(done: float, total: float | None, units: int) -> None:
            elapsed = progress.tasks[0].elapsed or 0
            rate = f"  {units / elapsed:,.0f} {unit}/s" if elapsed > 0 else ""
            progress.update(task, completed=done, total=total, units=f"{units:,} {unit}{rate}")

        yield told


@contextmanager
def pages(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told how many pages of how many are done."""
    with bar(what, "pages") as told:
        yield lambda done, total: told(done, total, done)
