"""The timeline that the demo prints: who did what, because of what."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["Story"]

_COLOURS = {"browser": "cyan", "web": "blue", "users": "green", "mails": "magenta", "smtp": "yellow", "log": "white"}


class Story:
    """Lines of who, what and because of what, printed as they are told."""

    def __init__(self, console: Console, monotonic: Callable[[], float]) -> None:
        self._console, self._monotonic = console, monotonic
        self._began = monotonic()

    def tell(self, who: str, what: str, because: str = "") -> None:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=9, justify="right", no_wrap=True)
        line.add_column(width=8, no_wrap=True)
        line.add_column(ratio=1)
        told = Text(what)
        if because:
            told.append(f"  ← {because}", style="dim")
        since = (self._monotonic() - self._began) * 1000
        line.add_row(Text(f"{since:.1f} ms", style="dim"), Text(who, style=f"bold {_COLOURS.get(who, 'white')}"), told)
        self._console.print(line)

    def headline(self, text: str) -> None:
        self._console.rule(f"[bold]{escape(text)}", align="left", style="dim")
