"""What a program talks to: asks and wishes go out by it, records and facts are read from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timedelta
from functools import partial
from math import inf, isnan
from typing import Any, Generic, Protocol, TypeVar, cast, overload

import msgspec

from cauce import errors
from cauce.accept import check_key, slot_of
from cauce.agenda import Agenda
from cauce.clock import Clock
from cauce.codec import Entry, Meta, derive_id, micros, moment, sealed
from cauce.deadline import StoodStill, ending, share
from cauce.errors import (
    CauceError,
    Conflict,
    Gone,
    NoAnswer,
    NotOwner,
    OutcomeUnknown,
    Overran,
    Refused,
    Unavailable,
    Unreadable,
)
from cauce.fallback import or_else
from cauce.guarded import Bounded, Guarded
from cauce.log import Filter, Log
from cauce.messages import Command, Copy, Declared, Event, Message, Query, Record, declared
from cauce.meter import Meter
from cauce.past import Change, Changes, Standing, Stood, check_count, moment_or_version
from cauce.receipt import Receipt
from cauce.schema import Schema, encode, key_of
from cauce.sql import Store
from cauce.undone import Asked, Fact, ToldUndo, Undone, undo_of
from cauce.wire import Instance, Wire, healthy_first, located

__all__ = [
    "NOTHING",
    "After",
    "Ask",
    "Asking",
    "Bus",
    "Cause",
    "Context",
    "Copies",
    "Reading",
    "Receipt",
    "Reply",
    "check_line",
    "correlation",
    "error_name",
    "handling",
    "keep",
    "other_record",
    "own",
    "owned",
]

R = TypeVar("R", bound=Record)
C = TypeVar("C", bound=Copy)
Answer = TypeVar("Answer")
F = TypeVar("F")

TIMEOUT = 30.0
"""Seconds a `call`, `ask` or `fetch` waits when nothing else is said."""

_LINE = 256

_SAFE = frozenset({"ask", "fetch", "state", "history", "states"})
"""Questions that change nothing: they may be asked of two."""

correlation: ContextVar[str] = ContextVar("cauce.correlation", default="")
"""The id with which it all began, of what is being handled here: for whoever writes a log."""

handling: ContextVar[Context | None] = ContextVar("cauce.handling", default=None)
"""What the handler at work here was told beside its message: for whoever writes a log."""


class After(msgspec.Struct, frozen=True):
    """What whoever answers must have seen before: the facts up to a position, and a version of one thing."""

    position: int
    domain: str = ""
    key: str = ""
    version: int = 0


class Cause(msgspec.Struct, frozen=True):
    """Because of what something is said: the id of the message, and the correlation, trace and person it carries on."""

    id: str = ""
    correlation: str = ""
    by: str = ""
    trace: str = ""
    tracestate: str = ""


NOTHING = Cause()


class Ask(msgspec.Struct, frozen=True, omit_defaults=True):
    """What goes over the wire to an owner: a command (`call`), a query (`ask`), a record to fold (`fetch`, `state`).

    Or an undo (`undo`), or a page of the past: `history` of a thing behind version `since`, `states` of all things
    first met behind position `since`, as they stood at position `upto`.

    By hand `type` and `body` are enough, or for a record `type` and `key`: see `cauce.question`.
    """

    kind: str = ""
    type: str = ""
    id: str = ""
    key: str = ""
    schema: int = 1
    body: msgspec.Raw = msgspec.Raw(b"{}")
    again: bool = False
    by: str = ""
    correlation: str = ""
    causation: str = ""
    trace: str = ""
    tracestate: str = ""
    at_version: int | None = None
    at_time: int | None = None
    after: After | None = None
    since: int = 0
    upto: int | None = None


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What comes back: an error by its name, or a verdict, or a body; `schema` is the version of a record's type."""

    error: str = ""
    message: str = ""
    version: int = 0
    position: int = 0
    changed: bool = False
    body: msgspec.Raw = msgspec.Raw(b"")
    schema: int = 0


Asking = Callable[[str, Ask, float], Awaitable[Reply]]
"""Puts a question at an address, for so many seconds; raises as the wire does, and what the reply says."""

_encode = msgspec.json.Encoder().encode
_decode_reply = msgspec.json.Decoder(Reply).decode
_decode_changes = msgspec.json.Decoder(Changes).decode
_decode_standing = msgspec.json.Decoder(Standing).decode
_decode_undo = msgspec.json.Decoder(ToldUndo).decode
_decode_stood = msgspec.json.Decoder(Stood | None).decode
_decode_fact = msgspec.json.Decoder(Fact).decode
_ERRORS: dict[str, type[CauceError]] = {
    name: cls
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, CauceError) and cls not in (Conflict, OutcomeUnknown, errors.Held)
}


def error_name(error: CauceError) -> str:
    """By what name an error travels: its own, or that of the nearest kind that the asker can be given."""
    if isinstance(error, OutcomeUnknown):
        return OutcomeUnknown.__name__
    if isinstance(error, Overran):
        # It is the fault of who answers, and nothing was done.
        return Unavailable.__name__
    return next((cls.__name__ for cls in type(error).__mro__ if _ERRORS.get(cls.__name__) is cls), "CauceError")


class Reading(Protocol):
    """A view, as handlers of its service read it."""

    async def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, as last committed."""
        ...

    async def wait(self, receipt: Receipt) -> None:
        """Wait until it holds all up to a receipt."""
        ...


class Copies(Protocol):
    """The views and replicas of a service, as a handler's context reads them."""

    def view(self, name: str) -> Reading: ...
    async def get(self, copy: type[C], key: str) -> C | None: ...
    async def find(self, copy: type[C], limit: int, equals: Mapping[str, Any]) -> list[C]: ...
    async def count(self, copy: type[Copy], equals: Mapping[str, Any]) -> int: ...


class Bus:
    """Three logs and a wire.

    Made by `running` and `connect`. All times are in seconds. `failed` is done when a service has stopped by itself;
    `guards` tells what stands before each callee, `bulkheads` what before each function that answers here. Every
    question goes through `asking`, before which guards are put. `meter` counts what is done here, if there is one.
    """

    def __init__(self, id: str, facts: Log, commands: Log, records: Log, wire: Wire, clock: Clock) -> None:
        self.id, self.facts, self.commands, self.records, self.wire, self.clock = (
            id,
            facts,
            commands,
            records,
            wire,
            clock,
        )
        self.copies: dict[str, Copies] = {}
        self.meter: Meter | None = None
        self.asking: Asking = self._over_the_wire
        self.guards: Mapping[str, Guarded] = {}
        self.bulkheads: dict[str, Bounded] = {}
        self._settled: list[Callable[[], Awaitable[None]]] = []
        self._settled_behind: list[Callable[[], Awaitable[None]]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def call(
        self, command: Command, *, by: str = "", timeout: float = TIMEOUT, id: str | None = None, cause: Cause = NOTHING
    ) -> Receipt:
        """Ask the owner to fulfil a command, and wait for the verdict.

        Parameters:
            by: who wishes, kept with the facts.
            timeout: seconds.
            id: that of an earlier call whose outcome is unknown: if it was accepted, its receipt is given again.

        Raises `Rejected` if the owner says no, `NoAnswer` if nobody serves it (nothing is stored), `OutcomeUnknown`
        with the id if the time is over first, or the owner's process went away before it answered.
        """
        kind = _declared(command, "command")
        key = key_of(command)
        asked = self.clock.id() if id is None else check_line(id, "id")
        ask = Ask(
            "call", kind.name, asked, key, kind.version, msgspec.Raw(encode(command)), id is not None,
            check_line(by or cause.by, "by"), cause.correlation, cause.id, cause.trace, cause.tracestate,
        )  # fmt: skip
        reply = await self.wish(kind.domain.name, ask, timeout)
        return Receipt(asked, key, reply.version, reply.position, reply.changed, kind.domain.name)

    async def send(
        self,
        command: Command,
        *,
        by: str = "",
        id: str | None = None,
        expires: datetime | None = None,
        cause: Cause = NOTHING,
    ) -> str:
        """Leave a command for its owner, durably, to be decided in order per thing, now or when the owner is back.

        Parameters:
            by: who wishes, kept with the facts.
            id: to send again what may have been sent: the same id is kept once.
            expires: after this moment the owner no longer fulfils it.

        Returns the command's id.
        """
        kind = _declared(command, "command")
        asked = self.clock.id() if id is None else check_line(id, "id")
        meta = Meta(
            self.clock.now(), kind.version, cause.correlation, cause.id, check_line(by or cause.by, "by"), cause.trace, cause.tracestate,
            micros(expires) if expires is not None else 0, again=id is not None and not cause.id,
        )  # fmt: skip
        stream = f"{kind.domain.name}/{key_of(command)}"
        await self.commands.append(
            stream, [sealed(stream, kind.name, asked, meta, encode(command))], repeat=id is not None
        )
        return asked

    @overload
    async def ask(
        self, query: Query[Answer], *, after: Receipt | None = None, timeout: float = TIMEOUT,
        cause: Cause = NOTHING, fallback: None = None,
    ) -> Answer: ...  # fmt: skip
    @overload
    async def ask(
        self, query: Query[Answer], *, after: Receipt | None = None, timeout: float = TIMEOUT,
        cause: Cause = NOTHING, fallback: Callable[[], Awaitable[F]],
    ) -> Answer | F: ...  # fmt: skip
    @overload
    async def ask(
        self, query: Query[Answer], *, after: Receipt | None = None, timeout: float = TIMEOUT,
        cause: Cause = NOTHING, fallback: Callable[[], F],
    ) -> Answer | F: ...  # fmt: skip
    async def ask(
        self, query: Query[Any], *, after: Receipt | None = None, timeout: float = TIMEOUT, cause: Cause = NOTHING,
        fallback: Callable[[], Any] | None = None,
    ) -> Any:  # fmt: skip
        """The answer of the service that owns the query's domain, within so many seconds.

        It comes from one instance that is well: one in this process if there is one, else by turns and by how much is
        under way. A query changes nothing, so it may be asked of two: when who was asked went away, or is silent.

        Parameters:
            after: answered when all views and replicas of that service have passed this receipt.
            fallback: gives what is returned instead of raising `Unavailable`: a function without parameters, async, or
                plain, and then it must not block.

        Raises `NoAnswer` if nobody serves it, the time is over, or who was asked went away and there is no other;
        `BreakerOpen` and `Overloaded` at once, where it is not asked at all.
        """
        kind = _declared(query, "query")
        if fallback is not None:
            work: Callable[[], Awaitable[Any]] = partial(self.ask, query, after=after, timeout=timeout, cause=cause)
            return await or_else(work, fallback, kind.name)
        ask = Ask(
            "ask", kind.name, self.clock.id(), "", kind.version, msgspec.Raw(encode(query)), False,
            cause.by, cause.correlation, cause.id, cause.trace, cause.tracestate,
            after=None if after is None else After(after.position, after.domain, after.key, after.version),
        )  # fmt: skip
        try:
            reply = await self._ask(kind.domain.name, ask, timeout)
        except TimeoutError as error:
            raise NoAnswer(
                f"{kind.domain.name} did not answer {kind.name} {error}: look whether it is blocked"
            ) from None
        except ConnectionError as error:
            raise NoAnswer(f"{kind.domain.name} did not answer {kind.name}: {error}; ask again") from None
        try:
            return msgspec.json.decode(reply.body, type=reply_type(type(query)))
        except msgspec.MsgspecError as error:
            raise Unreadable(f"the answer to {kind.name} of {kind.domain.name} is not what it says: {error}") from None

    @overload
    async def fetch(
        self, record: type[R], key: str, *, timeout: float = TIMEOUT, cause: Cause = NOTHING, fallback: None = None
    ) -> R: ...
    @overload
    async def fetch(
        self, record: type[R], key: str, *, timeout: float = TIMEOUT, cause: Cause = NOTHING,
        fallback: Callable[[], Awaitable[F]],
    ) -> R | F: ...  # fmt: skip
    @overload
    async def fetch(
        self, record: type[R], key: str, *, timeout: float = TIMEOUT, cause: Cause = NOTHING, fallback: Callable[[], F]
    ) -> R | F: ...
    async def fetch(
        self, record: type[Any], key: str, *, timeout: float = TIMEOUT, cause: Cause = NOTHING,
        fallback: Callable[[], Any] | None = None,
    ) -> Any:  # fmt: skip
        """How a thing stands now, by its owner: at least as new as anything seen before.

        A `fallback` is as that of `ask`, and may be older. Raises `Gone`, `NoAnswer`, `BreakerOpen`, `Overloaded`.
        """
        if fallback is not None:
            return await or_else(
                partial(self.fetch, record, key, timeout=timeout, cause=cause), fallback, f"{record.__name__} {key}"
            )
        found = await self._state("fetch", record, key, timeout, cause, None)
        if found is None:
            raise Gone(f"{declared(record).domain.name}/{key} does not stand: it was deleted, or never was")
        return found

    async def record(self, record: type[R], key: str) -> R | None:
        """The last written record of a thing; None if it does not stand. Needs no owner, may lag a moment behind."""
        kind = _declared(record, "record")
        page = await self.records.read(Filter(f"{kind.domain.name}/{check_key(key)}"), limit=1)
        if not page.entries:
            return None
        entry = page.entries[-1].checked()
        if not entry.body:
            return None
        found = _Records(record).found(Stood(entry.type, entry.meta.schema, msgspec.Raw(entry.body)))
        if not isinstance(found, record):
            raise other_record(entry.stream, entry.type, kind.name)
        return found

    async def state(
        self, record: type[R], key: str, *, at: int | datetime | None = None, timeout: float = TIMEOUT
    ) -> R | None:
        """How a thing stands, or stood, folded from its facts by its owner; None: it did not stand.

        Parameters:
            at: a version, 0 for before the first; or a moment, by the times of the facts: then what stood after the
                longest beginning of its stream before the first fact later than it.
            timeout: seconds.

        Raises `Refused` for a version that never was and for a datetime without a time zone; `NoAnswer`.
        """
        return await self._state("state", record, key, timeout, NOTHING, at)

    async def history(
        self, record: type[R], key: str, *, after: int = 0, timeout: float = TIMEOUT
    ) -> AsyncIterator[Change[R]]:
        """What changed of a thing, fact by fact, from the first to the last as it is now, folded by its owner.

        It comes page by page, so a history of any length takes little memory. A fact that cannot be folded is raised
        when all before it were given.

        Parameters:
            after: a version: only what came later.
            timeout: seconds for each page.

        Raises `NoAnswer`, and what folding raises.
        """
        kind, records = _declared(record, "record"), _Records(record)
        wanted = check_count(after, "after", "a version, 0 or more")
        # A page tells what stood after each fact: the one before the first that is wanted tells what stood before it.
        since, before, more = max(wanted - 1, 0), None, True
        while more:
            ask = Ask("history", kind.name, self.clock.id(), check_key(key), kind.version, since=since)
            page = _decode_changes((await self._look(kind.domain.name, ask, timeout)).body)
            for told in page.told:
                stands = records.found(told.after)
                if told.version > wanted:
                    yield Change(
                        told.version, told.position, moment(told.time), told.event, told.id, told.by, told.wish,
                        told.causation, told.correlation, before, stands,
                    )  # fmt: skip
                since, before = told.version, stands
            more = page.more

    async def states(
        self, record: type[R], *, at: datetime | None = None, upto: int | None = None, timeout: float = TIMEOUT
    ) -> AsyncIterator[R]:
        """All things of a domain that stand, or stood, each once, in the order of their first facts.

        It comes page by page, so a domain of any size takes little memory. All are shown at one place in the log,
        though others write meanwhile: what comes behind it is not seen.

        Parameters:
            at: a moment, as in `state`.
            upto: a position of the facts, such as that of a `Receipt` or a `Change`; the last one if not said.
            timeout: seconds for each page.

        Raises `Refused` for a position that never was and for a datetime without a time zone; `NoAnswer`, and what
        folding raises.
        """
        kind, records = _declared(record, "record"), _Records(record)
        if at is not None and not isinstance(at, datetime):
            raise Refused(
                f"at={at!r}: pass a datetime; versions are those of one thing, for all at a place in the log pass upto=position"
            )
        at_time = None if at is None else micros(at)
        place = None if upto is None else check_count(upto, "upto", "a position, 0 or more")
        looked = 0
        while place is None or looked < place:
            ask = Ask("states", kind.name, self.clock.id(), "", kind.version, at_time=at_time, since=looked, upto=place)
            page = _decode_standing((await self._look(kind.domain.name, ask, timeout)).body)
            for each in page.stood:
                if (stood := records.found(each)) is not None:
                    yield stood
            looked, place = page.looked, page.upto

    async def undo(
        self,
        record: type[R],
        key: str,
        *,
        to: int | None = None,
        steps: int | None = None,
        correlation: str | None = None,
        by: str = "",
        dry_run: bool = False,
        expect: int | None = None,
        without: Collection[str] = (),
        timeout: float = TIMEOUT,
        id: str | None = None,
    ) -> Undone[R]:
        """Take a thing back by facts that compensate; none is deleted, and an undo can be undone.

        The owner decides, as it decides a command. Where each fact to be undone has an inverse (`service.invert`),
        these are recorded, the newest first; else one `Restored[record]`, which carries what stood then. Where that
        stands already nothing is recorded.

        Parameters:
            to: back to this version, 0 for before the first fact.
            steps: so many facts back. If others come in between, it is refused.
            correlation: the facts with this correlation; if others came after them, by inverses only.
            by: who wishes, kept with the facts.
            dry_run: record nothing, only tell what would be.
            expect: the version that was looked at; refused if the thing went on since.
            without: services that need not be told of a `Restored`, because they are gone or do not mind.
            timeout: seconds.
            id: that of an earlier undo whose outcome is unknown, as in `call`.

        Raises `Refused`, naming them, if views or reactions that take the facts do not take `Restored[record]`; for an
        irreversible fact, a version that never was, the present one; and what `call` raises.
        """
        kind, undo, me = _declared(record, "record"), undo_of(to, steps, correlation), check_line(by, "by")
        records = _Records(record)
        if isinstance(without, str):
            raise Refused(f"without={without!r}: pass the names of services, without=[{without!r}]")
        if expect is not None:
            check_count(expect, "expect", "a version, 0 or more")
        elif steps is not None and not dry_run:
            # Who is told twice to go back a step must not go back over the first of them.
            seen = await self.undo(record, key, steps=steps, dry_run=True, without=without, timeout=timeout, id=id)
            if seen.receipt.changed:
                return seen
            expect = seen.receipt.version
        asked = self.clock.id() if id is None else check_line(id, "id")
        again, parts, more, told = id is not None, list[msgspec.Raw](), True, None
        while more:
            body = msgspec.Raw(_encode(Asked(undo, expect, tuple(without), dry_run)))
            ask = Ask("undo", kind.name, asked, check_key(key), kind.version, body, again, me, since=len(parts))
            told = _decode_undo(
                (await (self._look_ahead if dry_run else self.wish)(kind.domain.name, ask, timeout)).body
            )
            # What is left to be told is of what was recorded, or would be upon what stood.
            parts, more, again, expect = [*parts, *told.parts], told.more, True, told.version
        assert told is not None
        before, after, *facts = parts
        return Undone(
            Receipt(asked, key, told.version, told.position, told.changed, kind.domain.name), tuple(map(_decode_fact, facts)),
            records.found(_decode_stood(before)), records.found(_decode_stood(after)),
        )  # fmt: skip

    async def locate(self, name: str = "") -> list[Instance]:
        """Who runs: the instances of a service, or of whoever answers in a domain, by its name; all if none is given.

        Those that are well come first, and of these the one with the least to do. To ask them no address of theirs is
        needed, only the bus. When the registry cannot be read these are who ran when that was last possible, `stale`.

        Raises `Unavailable` if it cannot be read and never could.
        """
        return healthy_first(located(await self.wire.instances(), name), self.clock.now())

    async def settled(self, timeout: float = TIMEOUT) -> None:
        """Wait until every consumer of this process has passed the heads as they are now, and records are written.

        Raises `TimeoutError` after so many seconds, and at once what stopped a consumer.
        """
        waiting: asyncio.Future[Any] = asyncio.ensure_future(self._all_settled())
        await asyncio.wait({waiting, self.failed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            if self.failed.done():
                self.failed.result()
            raise TimeoutError(
                f"consumers did not settle within {timeout:g} s: a handler hangs or fails; look at the log"
            )
        await waiting

    async def wish(self, domain: str, ask: Ask, timeout: float = TIMEOUT) -> Reply:
        """The verdict of the instance of the owner that holds the slot. Raises as `call`."""
        what = f"{ask.type} for {domain}/{ask.key}"
        try:
            return await self._ask(f"{domain}/{slot_of(ask.key)}", ask, timeout)
        except TimeoutError as error:
            raise OutcomeUnknown(ask.id, f"{what} had no verdict {error}") from None
        except ConnectionError as error:
            raise OutcomeUnknown(ask.id, f"{what} had no verdict: {error}") from None

    async def publish(self, domain: str, ask: Ask) -> None:
        """Let the instance of the owner that holds the slot record an event that another instance's handler made."""
        try:
            await self._ask(f"{domain}/{slot_of(ask.key)}", ask, TIMEOUT)
        except TimeoutError as error:
            raise NoAnswer(f"{domain} did not record {ask.type} of {ask.key} {error}") from None
        except ConnectionError as error:
            raise NoAnswer(f"{domain} did not record {ask.type} of {ask.key}: {error}") from None

    async def _all_settled(self) -> None:
        await asyncio.gather(*(each() for each in self._settled))
        await asyncio.gather(*(each() for each in self._settled_behind))

    def settles(self, wait: Callable[[], Awaitable[None]], *, behind: bool = False) -> None:
        """Let `settled` wait for this, too; `behind`: when all records are written."""
        (self._settled_behind if behind else self._settled).append(wait)

    async def _state(
        self, how: str, record: type[R], key: str, timeout: float, cause: Cause, at: int | datetime | None
    ) -> R | None:
        kind = _declared(record, "record")
        at_version, at_time = moment_or_version(at)
        ask = Ask(
            how, kind.name, self.clock.id(), check_key(key), kind.version, correlation=cause.correlation, causation=cause.id,
            at_version=at_version, at_time=at_time,
        )  # fmt: skip
        reply = await self._look(kind.domain.name, ask, timeout)
        if not reply.changed:
            return None
        return _found(record, reply.schema or kind.version, bytes(reply.body))

    async def _look_ahead(self, domain: str, ask: Ask, timeout: float) -> Reply:
        """What the instance that holds the slot would record: of that no outcome is left unknown."""
        return await self._look(f"{domain}/{slot_of(ask.key)}", ask, timeout)

    async def _look(self, domain: str, ask: Ask, timeout: float) -> Reply:
        """What an owner folds. Raises `NoAnswer`."""
        try:
            return await self._ask(domain, ask, timeout)
        except TimeoutError as error:
            raise NoAnswer(f"{domain} did not answer {error}: look whether it is blocked") from None
        except ConnectionError as error:
            raise NoAnswer(f"{domain} did not answer: {error}; ask again") from None

    def _ask(self, address: str, ask: Ask, timeout: float) -> Awaitable[Reply]:
        if not isinstance(timeout, (int, float)) or isnan(timeout):
            raise Refused(f"timeout={timeout!r}: say seconds, inf for as long as it takes")
        seconds = share(timeout)
        if not seconds and timeout > 0:
            raise NoAnswer(f"{address} is not asked {ask.type}: no time is left of the question because of which it is")
        return self.asking(address, ask, seconds)

    async def _over_the_wire(self, address: str, ask: Ask, seconds: float) -> Reply:
        try:
            payload = await self.wire.ask(
                address, _encode(ask), self.clock.monotonic() + seconds, safe=ask.kind in _SAFE
            )
        except StoodStill:
            raise StoodStill(f"within {round(seconds, 3):g} s, in which this process stood still itself") from None
        except TimeoutError:
            raise TimeoutError(f"within {round(seconds, 3):g} s") from None
        reply = _decode_reply(payload)
        if reply.error == OutcomeUnknown.__name__:
            # To the asker it is as if the owner had gone away: it knows no more.
            raise ConnectionError(reply.message)
        if reply.error:
            raise _ERRORS.get(reply.error, CauceError)(reply.message)
        return reply


class Context:
    """What a handler is told beside its message, and the bus from there: all that it says is because of the message."""

    def __init__(
        self,
        bus: Bus,
        service: str,
        handler: str,
        entry: Entry | None,
        cause: Cause,
        store: Store | None = None,
        *,
        timers: Callable[[str], Awaitable[int]] | None = None,
        due: datetime | None = None,
    ) -> None:
        self.bus, self.service, self.cause = bus, service, cause
        self.planned: Agenda | None = None
        self._timers, self._due = timers, due
        self._handler, self._entry, self._store = handler, entry, store
        self._end = ending.get()
        self._said: dict[tuple[str, str, str], int] = {}

    @property
    def idempotency_key(self) -> str:
        """The same text each time this handler is given this message: let the outside world see a repetition by it."""
        return derive_id(self.cause.id, self.service, self._handler)

    @property
    def store(self) -> Store:
        """The service's own tables. What is executed is committed with the message, or not at all."""
        if self._store is None:
            raise Refused(f"{self.service}.{self._handler} may not touch the store: reactions and intervals may")
        return self._store

    @property
    def left(self) -> float | None:
        """Seconds for which somebody still waits for what this handler does; None: nobody does.

        What it asks of others is given no more than that, and a little less, so that there is time to fall back.
        """
        at = self._end.at
        return None if at == inf else max(0.0, at - self.bus.failed.get_loop().time())

    @property
    def _agenda(self) -> Agenda:
        if self._timers is None:
            raise Refused(f"{self.service}.{self._handler} may not set timers: reactions and intervals may")
        if self.planned is None:
            # Most handlers say nothing for later.
            self.planned = Agenda(self.bus.clock, self._timers)
        return self.planned

    @property
    def due(self) -> datetime:
        """For which time an interval runs: the same when that run is made again. By its zone, or in UTC."""
        if self._due is None:
            raise Refused(f"{self.service}.{self._handler} is due at no time: intervals are")
        return self._due

    @property
    def correlation(self) -> str:
        """The id of the message with which it all began."""
        return self.cause.correlation

    @property
    def handler(self) -> str:
        """The name of this handler."""
        return self._handler

    @property
    def stream(self) -> str:
        """The thing that the message is about, as domain/key; empty for a question."""
        return "" if self._entry is None else self._entry.stream

    @property
    def key(self) -> str:
        """Which thing the message is about; empty for a question."""
        return "" if self._entry is None else self._entry.key

    @property
    def position(self) -> int:
        """Where the message stands in its log; 0 for a question, which stands nowhere."""
        return 0 if self._entry is None else self._entry.position

    @property
    def version(self) -> int:
        """The version of its stream that the message made."""
        return 0 if self._entry is None else self._entry.version

    async def call(self, command: Command, *, timeout: float = TIMEOUT) -> Receipt:
        """As `Bus.call`; made again for the same message, it is the same call."""
        return await self.bus.call(command, timeout=timeout, id=self.id_of(command), cause=self.cause)

    async def send(self, command: Command, *, expires: datetime | None = None) -> str:
        """As `Bus.send`; made again for the same message, it is the same command."""
        return await self.bus.send(command, id=self.id_of(command), expires=expires, cause=self.cause)

    def after(self, delay: float | timedelta, message: Command | Event, *, name: str = "") -> str:
        """Send a command, or record an event of an own domain, so much later; set with the unit, or not at all.

        It survives restarts and take-overs, and comes once in effect, because of the message that is handled now.

        Parameters:
            delay: seconds, or a timedelta, from now on, by the wall clock when it fires.
            name: what cancels it, and of which there is one in the service: set again, it is moved. Else its own id.

        Returns what cancels it.
        """
        return self._agenda.after(delay, message, check_line(name, "name"), self.id_of(message))

    def at(self, time: datetime, message: Command | Event, *, name: str = "") -> str:
        """As `after`, at a moment, told with its time zone; one that is past is due at once."""
        return self._agenda.at(time, message, check_line(name, "name"), self.id_of(message))

    async def cancel(self, timer: str) -> bool:
        """Let a timer of this service never fire, from the moment on when the unit is committed.

        False if none waits by this name or id: it has fired, or was cancelled, or never was; then nothing is done.
        """
        return await self._agenda.cancel(timer)

    @overload
    async def ask(
        self, query: Query[Answer], *, after: Receipt | None = None, timeout: float = TIMEOUT, fallback: None = None
    ) -> Answer: ...
    @overload
    async def ask(
        self, query: Query[Answer], *, after: Receipt | None = None, timeout: float = TIMEOUT,
        fallback: Callable[[], Awaitable[F]],
    ) -> Answer | F: ...  # fmt: skip
    @overload
    async def ask(
        self, query: Query[Answer], *, after: Receipt | None = None, timeout: float = TIMEOUT, fallback: Callable[[], F]
    ) -> Answer | F: ...
    async def ask(
        self, query: Query[Any], *, after: Receipt | None = None, timeout: float = TIMEOUT, fallback: Any = None
    ) -> Any:
        """As `Bus.ask`."""
        return await self.bus.ask(query, after=after, timeout=timeout, cause=self.cause, fallback=fallback)

    @overload
    async def fetch(self, record: type[R], key: str, *, timeout: float = TIMEOUT, fallback: None = None) -> R: ...
    @overload
    async def fetch(self, record: type[R], key: str, *, timeout: float = TIMEOUT, fallback: type[C]) -> R | C: ...
    @overload
    async def fetch(
        self, record: type[R], key: str, *, timeout: float = TIMEOUT, fallback: Callable[[], Awaitable[F]]
    ) -> R | F: ...
    @overload
    async def fetch(
        self, record: type[R], key: str, *, timeout: float = TIMEOUT, fallback: Callable[[], F]
    ) -> R | F: ...
    async def fetch(self, record: type[Any], key: str, *, timeout: float = TIMEOUT, fallback: Any = None) -> Any:
        """As `Bus.fetch`; the `fallback` may be a copy that the service keeps.

        Where the copy does not hold the thing, which may only be late, what the owner did not say is raised.
        """
        if not (isinstance(fallback, type) and issubclass(fallback, Copy)):
            return await self.bus.fetch(record, key, timeout=timeout, cause=self.cause, fallback=fallback)
        copies = self._copies()
        try:
            return await self.bus.fetch(record, key, timeout=timeout, cause=self.cause)
        except Unavailable:
            found = await copies.get(fallback, key)
            if found is None:
                raise
            return found

    def view(self, name: str) -> Reading:
        """A view of the own service: `fetch` reads it, `wait` waits until it has passed a receipt."""
        return self._copies().view(name)

    async def get(self, copy: type[C], key: str) -> C | None:
        """The service's own copy of one thing; None if it does not stand."""
        return await self._copies().get(copy, key)

    async def find(self, copy: type[C], /, *, limit: int = 100, **equals: Any) -> list[C]:
        """The service's own copies whose fields equal these values, in the order of their keys."""
        return await self._copies().find(copy, limit, equals)

    async def count(self, copy: type[Copy], /, **equals: Any) -> int:
        """How many of the service's own copies have fields equal to these values."""
        return await self._copies().count(copy, equals)

    def _copies(self) -> Copies:
        copies = self.bus.copies.get(self.service)
        if copies is None:
            raise Refused(f"service {self.service!r} has no views and no replicas: give it some, with view or replica")
        return copies

    def id_of(self, message: Message) -> str:
        """The id this handler's next such message always has: the same when the handler runs again."""
        kind = declared(message)
        what = (kind.domain.name, kind.name, key_of(message))
        count = self._said[what] = self._said.get(what, 0) + 1
        return derive_id(self.cause.id, self.service, self._handler, *what, str(count))


async def owned(facts: Log, domain: str, service: str) -> bool:
    """Whether the catalogue says that a service owns a domain. Raises `NotOwner` if it says that another does."""
    page = await facts.read(Filter(f"_catalogue/{domain}"), limit=1)
    if not page.entries:
        return False
    owner = msgspec.json.decode(page.entries[0].checked().body or b"{}").get("service")
    if owner != service:
        raise NotOwner(f"domain {domain!r} is owned by service {owner!r}, not by {service!r}: ask it, or use its name")
    return True


async def own(facts: Log, domain: str, service: str, clock: Clock) -> None:
    """Enter in the catalogue that a service owns a domain. Raises `NotOwner` if another does."""
    stream = f"_catalogue/{domain}"
    while not await owned(facts, domain, service):
        entry = sealed(stream, "Owned", clock.id(), Meta(clock.now()), _encode({"service": service}))
        try:
            await facts.append(stream, [entry], expect=0)
        except Conflict:
            continue


async def keep(facts: Log, service: str, store: str, place: str, fresh: bool, clock: Clock) -> None:
    """Enter in the catalogue in which store a service keeps its data.

    Parameters:
        store: its id.
        place: where it lies, as seen from the bus.
        fresh: whether nothing was ever kept in it: one that was removed may be begun anew in its place.

    Raises `Refused` if the service keeps its data in another store: two would each handle every message.
    """
    stream = f"_services/{service}"
    while True:
        page = await facts.read(Filter(stream))
        known = msgspec.json.decode(page.entries[-1].checked().body or b"{}") if page.entries else {}
        if known.get("store") == store:
            return
        if known and not (fresh and known.get("place") == place):
            raise Refused(
                f"service {service!r} keeps its data in store {known.get('store')} at {known.get('place')}, this one is {store} at {place}: "
                "start it with the store it had (--store sqlite:///folder, --store postgresql://host/database, or none for the "
                "one at the bus), on the machine that has it; to begin anew, take away what is kept there, and start it there"
            )
        body = _encode({"store": store, "place": place})
        entry = sealed(stream, "Kept", clock.id(), Meta(clock.now()), body)
        try:
            await facts.append(stream, [entry], expect=page.entries[-1].version if page.entries else 0)
        except Conflict:
            continue


def reply_type(query: type[Query[Any]]) -> Any:
    """The type of the answer: what stands in the brackets of `Query[…]`."""
    for base in getattr(query, "__orig_bases__", ()):
        if getattr(base, "__origin__", None) is Query:
            return base.__args__[0]
    raise Refused(f"{query.__name__} does not say what answers it: derive it from Query[Reply]")


class _Records(Generic[R]):
    """What an owner, who may run older or newer code than this program, tells who asked for a record.

    Where its domain has several, it may be another.
    """

    def __init__(self, record: type[R]) -> None:
        self._domain = declared(record).domain
        records = [cls for cls in self._domain.messages.values() if issubclass(cls, Record)]
        self._schema = Schema([*records, record])

    def found(self, stood: Stood | None) -> R | None:
        if stood is None:
            return None
        found = self._schema.decode(self._domain.name, stood.record, stood.schema, bytes(stood.body))
        return cast("R", found)


def other_record(stream: str, stands: str, asked: str) -> Refused:
    """What is told where another record of the domain stands than the one that was asked for."""
    return Refused(f"{stream} stands as {stands}, not as {asked}: ask for that")


def _found(record: type[R], version: int, body: bytes) -> R:
    kind = declared(record)
    found = Schema([record]).decode(kind.domain.name, kind.name, version, body)
    assert isinstance(found, record)
    return found


def check_line(text: str, what: str) -> str:
    """A short text in the envelope, which every backend and log viewer can take. Raises `Refused` for any other."""
    if not isinstance(text, str) or not text.isprintable() or len(text) > _LINE or (what == "id" and not text):
        raise Refused(f"{what}={text!r}: pass printable text of at most {_LINE} characters")
    return text


def _declared(message: Any, wanted: str) -> Declared:
    kind = declared(message)
    if kind.kind != wanted:
        name = message.__name__ if isinstance(message, type) else type(message).__name__
        cure = "facts are recorded by their owner only" if isinstance(message, Event) else f"pass a {wanted}"
        raise Refused(f"{name} is a {kind.kind}, not a {wanted}: {cure}")
    return kind
