"""One slot of one domain, as a consumer works on it: what waits there, in the order of the log, and the place."""

from __future__ import annotations

import asyncio
from collections import deque

from cauce.codec import Entry
from cauce.portion import Load, weight
from cauce.store import Share, Waiting

__all__ = ["Lane", "Slot"]

Slot = tuple[str, int]


class Lane:
    """What waits to be handled in a slot: `queue` begins with the first that is not handled yet.

    `handed` is the position up to which it was given all that it wants, `place` that of the last one handled. While it
    is not `joined` it reads for itself, with the others of its `group`. `careful`: so many of its first messages may be
    what killed the process. `full`: too much waits. `marks` are the ids of what was handled ahead of the place, by
    position; `gone`: it was given away.

    Where several things are handled at once: `things` are the entries of each that are not handled, `done` the
    positions handled ahead of the place, with whether the store has a mark of it, `failed` what is set aside when it is
    the first, and `held` the things that wait for their turn to be the first; `moves`: the place is being moved on.
    """

    __slots__ = (
        "careful",
        "done",
        "failed",
        "full",
        "gone",
        "group",
        "handed",
        "held",
        "joined",
        "load",
        "marks",
        "moves",
        "place",
        "queue",
        "room",
        "share",
        "slot",
        "task",
        "tasks",
        "things",
        "written",
    )

    def __init__(
        self, slot: Slot, share: Share | None, place: int, load: Load, marks: dict[int, str], careful: int = 1
    ) -> None:
        self.slot, self.share = slot, share
        self.handed = self.place = self.written = place
        self.joined = self.full = self.gone = False
        self.careful = careful if share is not None and not share.clean else 0
        self.marks, self.load = marks, load
        self.queue: deque[Entry] = deque()
        self.room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.group: set[Lane] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.things: dict[str, deque[Entry]] = {}
        self.done: dict[int, bool] = {}
        self.failed: dict[int, Waiting] = {}
        self.held: set[str] = set()
        self.moves = False

    def add(self, entry: Entry) -> None:
        """An entry waits."""
        self.handed = entry.position
        self.queue.append(entry)
        self.load.bytes += weight(entry)

    def pop(self) -> None:
        """The first is handled."""
        self.load.bytes -= weight(self.queue.popleft())
        self.room.set()

    def close(self) -> None:
        """It is given away, with what waits in it."""
        self.gone = True
        while self.queue:
            self.pop()
