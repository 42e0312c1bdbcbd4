"""How a command ends: which exit code an error has, and how it is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from cauce.cli.text import one_line, print_json
from cauce.errors import CauceError, Damaged, Rejected, Unavailable

__all__ = ["DAMAGED", "INTERRUPTED", "UNREAD", "ending", "exit_code", "quietly"]

REFUSED, REJECTED, UNAVAILABLE, DAMAGED = 1, 3, 4, 5
"""2 is click's, for wrong usage; 6 belongs to `cauce doctor`."""

INTERRUPTED = 130
UNREAD = 141
"""Nobody read what was printed: what a shell says of a program that SIGPIPE ended."""


def exit_code(error: CauceError) -> int:
    """By what the caller can do about it: ask differently, live with it, wait, or restore a backup."""
    if isinstance(error, Rejected):
        return REJECTED
    if isinstance(error, Unavailable):
        return UNAVAILABLE
    return DAMAGED if isinstance(error, Damaged) else REFUSED


@contextmanager
def ending(ctx: click.Context) -> Iterator[None]:
    """Tell an error of Cauce in one line, or as a JSON object where `--json` was asked for, and end with its code."""
    try:
        yield
        sys.stdout.flush()
    except CauceError as error:
        if ctx.meta.get("cauce.json"):
            print_json({"error": type(error).__name__, "message": str(error)})
        else:
            click.echo(f"error: {one_line(str(error))}", err=True)
        ctx.exit(exit_code(error))
    except BrokenPipeError:
        with quietly():
            raise
        ctx.exit(UNREAD)


@contextmanager
def quietly() -> Iterator[None]:
    """Where nobody reads any more, what is left to print goes nowhere, also when the interpreter ends."""
    try:
        yield
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
