"""How a command ends: which exit code an error has, and how it is told."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from cauce.cli.text import one_line, print_json
from cauce.errors import CauceError, Damaged, Fenced, Rejected, Unavailable

__all__ = ["DAMAGED", "FOUND", "INTERRUPTED", "NO_ROOM", "UNREAD", "ending", "exit_code", "no_room", "quietly"]

REFUSED, REJECTED, UNAVAILABLE, DAMAGED, FOUND = 1, 3, 4, 5, 6
"""2 is click's, for wrong usage; 6 says that what was to be checked is not as it should be."""

INTERRUPTED = 130
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says where a disk, a quota or a limit is exhausted."""

UNREAD = 141
"""Nobody read what was printed: what a shell says of a program that SIGPIPE ended."""


def exit_code(error: CauceError) -> int:
    """By what the caller can do about it: ask differently, live with it, wait, or restore a backup."""
    if isinstance(error, Rejected):
        return REJECTED
    if isinstance(error, (Unavailable, Fenced)):
        # Who was fenced has only to start again: then it claims anew.
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


def no_room(error: OSError) -> int:
    """Tell in one line that what is printed finds no room, and give the exit code. Raises any other error again."""
    if error.errno not in NO_ROOM:
        raise error
    _drop_output()
    click.echo(f"error: what is printed found no room: {error.strerror}: make room, or print it elsewhere", err=True)
    return UNAVAILABLE


@contextmanager
def quietly() -> Iterator[None]:
    """Where nobody reads any more, what is left to print goes nowhere, also when the interpreter ends."""
    try:
        yield
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
