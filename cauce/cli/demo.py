"""`cauce demo`: from a form to a mail, on a temporary bus."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import click

from cauce.cli.signals import stopped
from cauce.errors import Refused

__all__ = ["demo"]


@click.command()
@click.option("--keep", is_flag=True, help="Leave the form running for a browser, until Ctrl-C.")
@click.option("--port", default=0, help="Port of the form on loopback; 0 takes a free one.")
def demo(keep: bool, port: int) -> None:
    """A user registers on a web form, and a mail arrives over real SMTP.

    Plays itself on a temporary bus, tells who did what because of what, verifies the log and exits with 0.
    """
    try:
        from cauce.demo.play import play
    except ModuleNotFoundError as error:
        raise Refused(f"the demo needs {error.name}: pip install 'cauce[demo]'") from None
    from rich.console import Console

    with tempfile.TemporaryDirectory(prefix="cauce-demo-") as folder:
        well = asyncio.run(play(Console(highlight=False), Path(folder), keep=stopped if keep else None, port=port))
    raise SystemExit(0 if well else 1)
