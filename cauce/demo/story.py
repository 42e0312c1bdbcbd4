"""The timeline that the demo prints: who did what, because of what, in which process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["Story", "listening"]

_COLOURS = {
    "browser": "cyan",
    "web": "blue",
    "users": "green",
    "mails": "magenta",
    "smtp": "yellow",
    "joe": "cyan",
    "crm": "bright_blue",
    "desk": "cyan",
    "cards": "bright_green",
    "run": "red",
    "demo": "red",
    "log": "white",
}


class Story:
    """Lines of who, what and because of what, printed as they are told.

    Parameters:
        apart: whether not all runs in this process, so that each line says in which it happened.
    """

    def __init__(self, console: Console, monotonic: Callable[[], float], *, apart: bool = False) -> None:
        self._console, self._monotonic, self._apart = console, monotonic, apart
        self._began = monotonic()
        self.processes: dict[str, int] = {}

    def tell(self, who: str, what: str, because: str = "") -> None:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=9, justify="right", no_wrap=True)
        line.add_column(width=8, no_wrap=True)
        cells = [Text(f"{(self._monotonic() - self._began) * 1000:.1f} ms", style="dim")]
        cells.append(Text(who, style=f"bold {_COLOURS.get(who, 'white')}"))
        if self._apart:
            line.add_column(width=7, no_wrap=True)
            cells.append(Text(str(self.processes.get(who, os.getpid())), style="dim"))
        line.add_column(ratio=1)
        told = Text(what)
        if because:
            told.append(f"  ← {because}", style="dim")
        line.add_row(*cells, told)
        self._console.print(line)

    def repeat(self, said: str) -> None:
        """Tell what a service wrote to its log, as `who: what ← because`."""
        who, _, rest = said.partition(": ")
        what, _, because = rest.partition(" ← ")
        self.tell(who, what, because)

    def headline(self, text: str) -> None:
        self._console.rule(f"[bold]{escape(text)}", align="left", style="dim")

    def show(self, what: object) -> None:
        self._console.print(what)


@contextmanager
def listening(story: Story) -> Iterator[None]:
    """Tell what services of this process write to their logs."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            story.repeat(record.getMessage())

    log, handler = logging.getLogger("cauce.demo.shop"), Told(logging.INFO)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
