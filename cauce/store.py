"""A service's own database, as a role: who of its instances holds what, where each consumer stands, what must wait.

What one message changes is one unit: statements of the handler, messages it said, its place. A unit is committed whole
or not at all, under the fence of its slot, many units a transaction. Places alone are written behind: after a crash a
message may be handled again, none is skipped.

It is no part of a bus: a folder of SQLite files, a schema in PostgreSQL or a bucket of NATS may be the store of a
service on any bus.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from cauce.clock import Clock
from cauce.errors import Damaged, Refused, Unavailable
from cauce.log import Log
from cauce.shelf import Shelf

__all__ = [
    "SAID",
    "BadStatement",
    "Inventory",
    "Letter",
    "Outline",
    "Pending",
    "Place",
    "Share",
    "Standing",
    "Store",
    "Stores",
    "Timer",
    "Unit",
    "Waiting",
    "check_places",
    "mark_of",
    "no_letter",
    "no_timer",
    "pending_of",
    "places_in",
    "write_places",
]


_log = logging.getLogger("cauce")
_PAUSE = 0.02
"""Seconds between two writings of places alone: a flush for each would take the disk from the log."""

_RETRY = 1.0

SAID = "the outbox"
"""The consumer of what handlers said, as which it waits when its log refuses it. No handler has a space in its name."""


class BadStatement(Refused):
    """What a handler wants to be stored, such as SQL, and cannot be; nothing of its message was stored."""


class Waiting(msgspec.Struct):
    """A message set aside.

    Where it stands, how often it failed, when it is due, or died (microseconds since 1970), whether a person must
    decide, why, the traceback, and for a dead one the whole entry as it came (`cauce.letter`).
    """

    position: int
    stream: str
    slot: int
    attempts: int = 0
    due: int = 0
    dead: bool = False
    error: str = ""
    trace: str = ""
    raw: bytes = b""

    @property
    def mark(self) -> str:
        """The id of the message, if it does not wait at all but was handled ahead of the place."""
        return msgspec.json.decode(self.raw, type=_Marked).id if self.attempts < 0 else ""


class _Marked(msgspec.Struct, frozen=True):
    id: str


def mark_of(position: int, stream: str, slot: int, id: str) -> Waiting:
    """What is kept, among what waits, of a message that was handled ahead of the place: until the place passes it."""
    return Waiting(position, stream, slot, -1, error="handled ahead of the place", raw=msgspec.json.encode(_Marked(id)))


class Share(msgspec.Struct, frozen=True):
    """A name that this instance holds. `clean`: who held it before let go of it in good order."""

    name: str
    fence: int
    clean: bool
    before: str

    @property
    def slot(self) -> int | None:
        """Its number; None for what is no slot."""
        number = self.name.partition("/")[2]
        return int(number) if number else None


class Standing(msgspec.Struct, frozen=True):
    """What the store knows: beats by instance, holders by name. `touched`: another process has written since."""

    alive: bool
    instances: dict[str, int]
    holders: dict[str, str]
    touched: bool


class Timer(msgspec.Struct, frozen=True):
    """A message that waits for its time, or with nothing `said` the next run of an interval.

    One of each `id`: a later one takes the place of an earlier one. `share` names what its handler worked on when it
    was set: whoever holds that lets it go. `due` is in microseconds since 1970, by the wall clock.
    """

    id: str
    share: str
    handler: str
    due: int
    said: bytes = b""


class Unit:
    """What one message changes, gathered while it is handled. `passed`: marks that go, of a consumer and a position."""

    __slots__ = (
        "cancelled",
        "committed",
        "later",
        "parked",
        "passed",
        "place",
        "said",
        "share",
        "statements",
        "timer",
        "unparked",
    )

    def __init__(self, share: Share | None) -> None:
        self.share = share
        self.statements: list[tuple[str, Sequence[Any]]] = []
        self.said: list[tuple[str, int, bytes]] = []
        self.parked: tuple[str, Waiting] | None = None
        self.unparked: tuple[str, int] | None = None
        self.passed: Sequence[tuple[str, int]] = ()
        self.place: tuple[str, str, int, str, int] | None = None
        self.timer: tuple[str, int] | None = None
        self.later: list[Timer] = []
        self.cancelled: list[str] = []
        self.committed: Callable[[], None] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but a place to write."""
        return not (
            self.statements
            or self.said
            or self.parked
            or self.unparked
            or self.passed
            or self.timer
            or self.later
            or self.cancelled
        )

    @property
    def size(self) -> int:
        """About how many bytes wait with it."""
        return 200 + sum(len(said) for _, _, said in self.said) + sum(len(each.said) + 100 for each in self.later)


class Place(msgspec.Struct, frozen=True):
    """Where a consumer stands in one slot of a log."""

    consumer: str
    domain: str
    slot: int
    log: str
    position: int


class Inventory(msgspec.Struct, frozen=True):
    """What is kept beside tables: all places, what waits for each consumer, how much is said and not in its log yet.

    `timers` counts the messages that wait for their time, and the intervals.
    """

    places: list[Place]
    waiting: list[tuple[str, Waiting]]
    outbox: int
    timers: int


class Pending(msgspec.Struct, frozen=True):
    """What waits of one consumer, in numbers.

    `retrying` are tried again by themselves, with what waits behind such a one; `dead` wait for a person, and `behind`
    for those. `position` and `stream` are of the first that is tried again, 0 if there is none.
    """

    consumer: str
    retrying: int = 0
    dead: int = 0
    behind: int = 0
    position: int = 0
    stream: str = ""


class Outline(msgspec.Struct, frozen=True):
    """What a store says of how far its service is.

    All places, what waits by consumer, how much is said and not in its log yet, how many timers there are, and how
    many of them are due.
    """

    places: list[Place]
    pending: list[Pending]
    outbox: int
    timers: int
    due: int


class Letter(msgspec.Struct, frozen=True):
    """One dead letter: whose it is, where the message stands, how often it was tried, why it failed, and how it came.

    `behind` counts the later messages of the same thing that wait for the decision, `died` is when it was given up, in
    microseconds since 1970; 0 if that is not known.
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
    died: int = 0


class Store(Protocol):
    """What one service keeps, shared by all its instances. Whatever waits for a server may raise `Unavailable`.

    `id` names it, and `place` says where it lies, as seen from the bus. `is_fresh`: nothing had been kept in it when it
    was opened.
    """

    @property
    def id(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def is_fresh(self) -> bool: ...

    async def tick(self, owner: str, dead: Sequence[tuple[str, int]], *, join: bool = False) -> Standing:
        """A sign of life, and what stands.

        Parameters:
            dead: owners with the beat that was seen unchanged for long enough; they are struck off.
            join: become one of the instances.
        """
        ...

    async def take(self, owner: str, names: Sequence[str]) -> list[Share]:
        """Of these names those that are free, or whose holder was struck off; the fence of each rises."""
        ...

    async def release(self, shares: Sequence[Share], *, owner: str = "") -> None:
        """Let go of these; with `owner` it leaves the list of instances, too."""
        ...

    async def places(self, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
        """Where a consumer stands in a log, by domain and slot. Raises `Damaged` if that was another, or longer."""
        ...

    def move(self, share: Share | None, consumer: str, domain: str, slot: int, log: str, position: int) -> None:
        """Note a place. It is written with the next unit, or soon by `run`."""
        ...

    async def commit(self, unit: Unit) -> None:
        """Write a unit with its place. Raises `BadStatement`, `Fenced`, and what a full or busy disk says."""
        ...

    async def run(self) -> None:
        """Write places that no unit carries, for ever."""
        ...

    async def flush(self) -> None:
        """Write the places that wait."""
        ...

    async def waiting(self, consumer: str) -> list[Waiting]:
        """The messages that wait, in order."""
        ...

    async def outbox(self, after: int, limit: int) -> list[tuple[int, str, int, bytes]]:
        """What was said and is not known to be in its log yet: number, consumer, slot, message.

        Numbers rise in the order of the commits, and are never used again.
        """
        ...

    async def relayed(self, numbers: Sequence[int]) -> None:
        """These stand in their log."""
        ...

    async def timer(self, name: str) -> int:
        """When something is due, in microseconds since 1970; 0 if that was never said."""
        ...

    async def due(self, id: str) -> int:
        """When the message of a timer is due, in microseconds since 1970; 0 if no such timer waits."""
        ...

    async def fire(self, shares: Sequence[Share], now: int, limit: int) -> tuple[int, int]:
        """Let go what is due by now, the oldest of each share first: it is said in the same transaction.

        Nothing of a share that has another holder by now. Gives how many were let go, and when to look again: no timer
        of these shares is due before; 0 if none waits.

        Parameters:
            now: microseconds since 1970.
            limit: at most so many.
        """
        ...

    async def inventory(self) -> Inventory:
        """All that hangs on logs, whoever it is for."""
        ...

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of what was last committed. Raises `BadStatement` for SQL that cannot be run, or does more than read."""
        ...

    async def close(self) -> None:
        """Write what waits, then let go."""
        ...


class Stores(Protocol):
    """Where the services of a bus keep what is their own."""

    async def open(self, service: str, migrations: Sequence[str] | None = (), *, keeps: bool = True) -> Store:
        """Open, and make if need be, the store of a service.

        Parameters:
            migrations: SQL of the service, each run once, in this order; later ones may be added. None: a store that is
                there, by whatever SQL it was made.
            keeps: whether the service keeps data of its own: tables, views, replicas.

        Raises `Refused` for a store of another service, or migrations that are not those it was made by.
        """
        ...

    @property
    def dialect(self) -> str:
        """Whose SQL services speak here: one of `cauce.sql.DIALECTS`."""
        ...

    def shelf(self, service: str) -> Shelf:
        """Where the views and replicas of a service lie."""
        ...

    async def services(self) -> list[str]:
        """Whose stores are here."""
        ...

    async def outline(self, service: str, now: int) -> Outline:
        """How far a service is, read beside its instances without getting in their way, and while there are none.

        Parameters:
            now: microseconds since 1970: what is due by then.

        Raises `Refused` for a service without a store.
        """
        ...

    async def letters(self, service: str = "") -> list[Letter]:
        """The dead letters of one service, or of one after the other, oldest first.

        Raises `Refused` for a service without a store.
        """
        ...

    async def retry(self, service: str, consumer: str, position: int) -> None:
        """Let a dead letter be tried again, as if for the first time. A running service does so within seconds.

        Raises `Refused` if there is none.
        """
        ...

    async def edit(self, service: str, consumer: str, position: int, before: bytes, after: bytes) -> None:
        """Keep a dead letter's message otherwise (`cauce.letter`). Raises `Refused` if it is not as it was before.

        It is given to the handler when it is tried again.
        """
        ...

    async def discard(self, service: str, consumer: str, position: int) -> None:
        """Give a dead letter up: the consumer goes on behind it. The message stays in its log.

        Raises `Refused` if there is none.
        """
        ...

    async def timers(self, service: str = "", limit: int = 1_000) -> list[tuple[str, Timer]]:
        """What waits for its time, by service: its intervals, then up to so many messages of each, the next one first.

        Raises `Refused` for a service without a store.
        """
        ...

    async def cancel(self, service: str, id: str) -> None:
        """Let a timer never fire. Raises `Refused` if there is none: it fired, or was cancelled, or never was."""
        ...


def pending_of(rows: Iterable[tuple[str, int, str, bool]]) -> list[Pending]:
    """What waits of each consumer, from consumer, position, stream and whether it is dead, in order per consumer."""
    found, blocked = dict[str, list[Any]](), set[tuple[str, str]]()
    for consumer, position, stream, dead in rows:
        counts = found.setdefault(consumer, [0, 0, 0, 0, ""])
        if dead:
            blocked.add((consumer, stream))
            counts[1] += 1
        elif (consumer, stream) in blocked:
            counts[2] += 1
        else:
            counts[0] += 1
            if not counts[3]:
                counts[3:] = position, stream
    return [Pending(consumer, *counts) for consumer, counts in sorted(found.items())]


async def write_places(
    moved: asyncio.Event, flush: Callable[[], Awaitable[None]], clock: Clock, *, pause: float = _PAUSE
) -> None:
    """Write places that no unit carries, for ever: what `Store.run` does, whatever the store is.

    Parameters:
        moved: set when a place was noted.
        flush: writes what is noted.
        pause: seconds between two writings.
    """
    while True:
        await moved.wait()
        moved.clear()
        await clock.sleep(pause)
        try:
            await flush()
        except Unavailable as error:
            _log.warning("places wait: %s", error)
            await clock.sleep(_RETRY)
            moved.set()


def no_letter(service: str, consumer: str, position: int) -> Refused:
    """What is told who would decide about a dead letter that is not there, or not as it was seen."""
    return Refused(
        f"{service} has no dead letter {position} of {consumer}, or it has changed meanwhile: see cauce dead list"
    )


def no_timer(service: str, id: str) -> Refused:
    """What is told where a timer is to be cancelled that does not wait."""
    return Refused(f"{service} has no timer {id}: it has fired, or was cancelled, or never was; see cauce timers list")


async def places_in(store: Store, consumer: str, log: Log) -> dict[tuple[str, int], int]:
    """Where a consumer stands in a log, as `Store.places`, while other instances go on."""
    places = await store.places(consumer, log.id, sys.maxsize)
    # Not before: what they have read meanwhile may be beyond the head as it was.
    head = await log.head()
    if any(place > head for place in places.values()):
        await store.places(consumer, log.id, head)
    return places


def check_places(
    places: Sequence[tuple[str, int, str, int]], consumer: str, log: str, head: int, service: str
) -> dict[tuple[str, int], int]:
    """Places by domain and slot, from domain, slot, log and position of each.

    Raises `Damaged` for one in another log, or beyond the head of this one, with the cure.

    Parameters:
        service: whose consumer it is.
    """
    cure = f"cauce reset {service} shows what is of use still, and lets the service go on from there"
    for domain, slot, seen, position in places:
        if seen != log:
            raise Damaged(f"{consumer} of {service} has read log {seen}, this one is {log} (restored?): {cure}")
        if position > head:
            raise Damaged(
                f"{consumer} of {service} has read {domain} slot {slot} up to {position}, the log ends at {head}: entries are lost; restore "
                f"a newer backup, or {cure}"
            )
    return {(domain, slot): position for domain, slot, _, position in places}
