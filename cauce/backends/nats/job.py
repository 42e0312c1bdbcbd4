"""One append or put on its way, and how long it may be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cauce.codec import Entry
from cauce.log import Also, Appended, Claim

__all__ = ["Job"]


class Job:
    """`version` is the one that a put sets, 0 for an append.

    `tried` is where its stream ended before it was first sent, if it was: from then on it may stand, whatever the
    answer was. `others`: what it also writes, each with its subject. `until` is when it is given up, on the loop's
    clock. `over`: it has its verdict, whoever still waits.
    """

    __slots__ = (
        "entries",
        "expect",
        "fence",
        "future",
        "others",
        "over",
        "repeat",
        "size",
        "stream",
        "subject",
        "tried",
        "until",
        "version",
    )

    def __init__(
        self,
        stream: str,
        subject: str,
        entries: Sequence[Entry],
        *,
        expect: int | None = None,
        fence: Claim | None = None,
        repeat: bool = False,
        version: int = 0,
        others: Sequence[tuple[str, Also]] = (),
        size: int = 0,
    ) -> None:
        self.stream, self.subject, self.entries = stream, subject, entries
        self.expect, self.fence, self.repeat, self.version, self.size = expect, fence, repeat, version, size
        self.others = others
        self.future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self.until = 0.0
        self.tried: int | None = None
        self.over = False

    @property
    def subjects(self) -> list[str]:
        """All that it writes to."""
        return [self.subject, *(subject for subject, _ in self.others)]

    @property
    def messages(self) -> int:
        """How many entries it has."""
        return len(self.entries) + sum(len(also.entries) for _, also in self.others)
