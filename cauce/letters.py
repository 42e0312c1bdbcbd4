"""Dead letters, for the person who decides about them: what failed too often, and how to go on.

The message itself stays in its log for ever; what lies here is that this consumer has not handled it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec

from cauce.backends.sqlite.file import connect, translate
from cauce.errors import Refused

__all__ = ["Letter", "discard", "letters", "retry"]

_DEAD = """select consumer, position, stream, attempts, error, trace, raw, (
    select count(*) from cauce_waiting b where b.consumer = a.consumer and b.stream = a.stream and b.position > a.position)
    from cauce_waiting a where dead order by position"""


class Letter(msgspec.Struct, frozen=True):
    """One dead letter: whose it is, where the message stands, how often it was tried, why it failed, and how it came.

    `behind` counts the later messages of the same thing that wait for the decision.
    """

    service: str
    consumer: str
    position: int
    stream: str
    attempts: int
    error: str
    trace: str
    message: msgspec.Raw
    behind: int


def letters(folder: Path, service: str = "") -> list[Letter]:
    """The dead letters of one service, or of all, oldest first.

    Parameters:
        folder: where the stores of a bus lie.

    Raises `Refused` for a service that has no store here.
    """
    found = []
    for path in _stores(folder, service):
        with _opened(path, apsw.SQLITE_OPEN_READONLY) as connection:
            rows: list[Any] = connection.execute(_DEAD).fetchall()
            found += [
                Letter(
                    path.parent.name,
                    consumer,
                    position,
                    stream,
                    tries,
                    error,
                    trace,
                    msgspec.Raw(raw or b"null"),
                    behind,
                )
                for consumer, position, stream, tries, error, trace, raw, behind in rows
            ]
    return found


def retry(folder: Path, service: str, consumer: str, position: int) -> None:
    """Let a dead letter be tried again, as if for the first time. A running service does so within seconds.

    Raises `Refused` if there is none.
    """
    _decide(
        folder, service, consumer, position,
        "update cauce_waiting set dead = 0, attempts = 0, due = 0 where consumer = ? and position = ? and dead",
    )  # fmt: skip


def discard(folder: Path, service: str, consumer: str, position: int) -> None:
    """Give a dead letter up: this consumer never handles the message, and goes on with the later ones of its thing.

    Raises `Refused` if there is none.
    """
    _decide(
        folder, service, consumer, position, "delete from cauce_waiting where consumer = ? and position = ? and dead"
    )


def _decide(folder: Path, service: str, consumer: str, position: int, statement: str) -> None:
    (path,) = _stores(folder, service)
    with _opened(path, apsw.SQLITE_OPEN_READWRITE) as connection:
        connection.execute("begin immediate")
        connection.execute(statement, (consumer, position))
        changed = connection.changes()
        connection.execute("commit")
    if not changed:
        raise Refused(f"{service} has no dead letter {position} of {consumer}: see cauce dead list")


def _stores(folder: Path, service: str) -> list[Path]:
    found = sorted(folder.glob("*/store.db"))
    if not service:
        return found
    mine = [path for path in found if path.parent.name == service]
    if not mine:
        names = ", ".join(path.parent.name for path in found) or "none"
        raise Refused(f"service {service!r} has no store here: there are {names}")
    return mine


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[apsw.Connection]:
    try:
        connection = connect(path, flags=flags, busy=5.0)
        try:
            yield connection
        finally:
            connection.close()
    except apsw.Error as error:
        raise translate(error, path) from error
