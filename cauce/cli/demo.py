"""`cauce demo`: what a form sets in motion, on a temporary bus."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import IO, Any, TextIO, cast

import click

from cauce.bus import Bus
from cauce.cli.signals import stopped
from cauce.errors import Refused

__all__ = ["demo"]


@click.command()
@click.option("--bus", metavar="URL", help="A server to play on, on a bus of its own: postgresql://… or nats://…")
@click.option(
    "--store", metavar="URL", help="Where its services keep what is their own: sqlite:///folder or postgresql://…"
)
@click.option("--each", is_flag=True, help="Every service in a process of its own, of which one is killed.")
@click.option("--keep", is_flag=True, help="Leave the form running for a browser, until Ctrl-C.")
@click.option(
    "--port", default=0, type=click.IntRange(0, 65535), help="Port of the form on loopback; 0 takes a free one."
)
def demo(bus: str | None, store: str | None, each: bool, keep: bool, port: int) -> None:
    """A user registers on a web form, mail arrives over real SMTP, a CRM joins in, and cards are issued from a copy.

    Plays itself on a temporary bus, tells who did what because of what, compares the copy with its owner, verifies the
    log, leaves nothing behind and exits with 0.
    """
    try:
        from cauce.demo.play import play
    except ModuleNotFoundError as error:
        raise Refused(f"the demo needs {error.name}: pip install 'cauce[demo]'") from None
    from rich.console import Console

    out = _Output(sys.stdout)

    async def stay(bus: Bus) -> None:
        # Who cannot read where the form is cannot use it.
        if out.failed is None:
            await stopped(bus)

    console = Console(highlight=False, file=cast(IO[str], out))
    well = asyncio.run(play(console, keep=stay if keep else None, port=port, each=each, bus=bus, store=store))
    if out.failed is not None:
        raise out.failed
    raise SystemExit(0 if well else 1)


class _Output:
    """Standard output, told to by handlers that have other work: the first error of writing is kept for the end."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self._file.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _try(self, act: Callable[..., Any], *arguments: str) -> None:
        if self.failed is None:
            try:
                act(*arguments)
            except OSError as error:
                self.failed = error
