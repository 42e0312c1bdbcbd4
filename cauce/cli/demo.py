"""`cauce demo`: what a form sets in motion, on a temporary bus."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import click

from cauce.cli.signals import stopped
from cauce.errors import Refused

__all__ = ["demo"]


@click.command()
@click.option("--each", is_flag=True, help="Every service in a process of its own, of which one is killed.")
@click.option("--keep", is_flag=True, help="Leave the form running for a browser, until Ctrl-C.")
@click.option("--port", default=0, help="Port of the form on loopback; 0 takes a free one.")
def demo(each: bool, keep: bool, port: int) -> None:
    """A user registers on a web form, mail arrives over real SMTP, a CRM joins in, and cards are issued from a copy.

    Plays itself on a temporary bus, tells who did what because of what, compares the copy with its owner, verifies the
    log and exits with 0.
    """
    try:
        from cauce.demo.play import play
    except ModuleNotFoundError as error:
        raise Refused(f"the demo needs {error.name}: pip install 'cauce[demo]'") from None
    from rich.console import Console

    with tempfile.TemporaryDirectory(prefix="cauce-demo-") as folder:
        console, kept = Console(highlight=False), stopped if keep else None
        well = asyncio.run(play(console, Path(folder), keep=kept, port=port, each=each))
    raise SystemExit(0 if well else 1)
