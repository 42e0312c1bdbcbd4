"""The commander: for each wish it knows what stands, decides, and records; one append is the whole commitment.

It decides ahead of the disk: the next wish for a thing is decided on what the last one will have made of it, so that
one flush serves many. Nothing is shown before the commit; if that fails, what was decided ahead is forgotten and
decided again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from cauce.accept import SLOTS, check_body, slot_of
from cauce.audit import SHORTEST
from cauce.bus import Ask, Bus, Cause, Context, Receipt, correlation
from cauce.codec import Entry, Meta, Wish, derive_id, sealed, time_of
from cauce.errors import (
    Conflict,
    Damaged,
    Fenced,
    Held,
    IdReused,
    Inconsistent,
    NoAnswer,
    NotOwner,
    Overloaded,
    Refused,
    Rejected,
    Unavailable,
)
from cauce.fold import Folder, messages_of
from cauce.folded import Folded
from cauce.lease import Leases
from cauce.log import Also, Appended, Filter, entries_of
from cauce.messages import Event, Message, Record, declared
from cauce.past import Stood, stood_as
from cauce.records import Records, ahead, written
from cauce.rules import are_coming, build, check
from cauce.schema import Schema, encode, is_about, key_of
from cauce.tags import Rule, Tags
from cauce.undo import Invert, Undoing, told
from cauce.undone import UNDO, Asked, ToldUndo

__all__ = ["Commander", "Decider"]

_log = logging.getLogger("cauce")
_encode = msgspec.json.Encoder().encode
_MOST_CONFLICTS = 10
_MOST_CONFLICTS_OF_TAGS = 100
"""A tag is written by all processes, and with each conflict one of them has got what it wanted."""

_IMPATIENT = 3
"""Conflicts after which all others wait while a function that waits decides."""

_NESTED = 0.5
_CACHED = 100_000
_LATE = round(SHORTEST * 1_000_000) // 2
"""Microseconds: an earlier try of what was said longer ago may be forgotten by now."""

_PATIENCE = 30.0
"""Seconds to wait for instances with other rules to go, or for one that looks whether its own bind."""

_PAUSE = 0.25
_LONGEST_PAUSE = 5.0


class Decider(msgspec.Struct, frozen=True):
    """A `decide` function, the name of its context parameter, if it has one, and whether it may wait."""

    function: Callable[..., Any]
    context: str | None = None
    is_async: bool = False


class _Standing:
    """How a thing stands, as far as decided; `tail` is the last append that may still fail."""

    __slots__ = ("folded", "tail")

    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self.tail: asyncio.Future[Appended] | None = None


class _Turn:
    """Whose turn it is with a thing that functions which wait decide for; `all`: the others keep to it, too."""

    __slots__ = ("all", "cause", "lock", "users")

    def __init__(self) -> None:
        self.lock, self.users, self.all = asyncio.Lock(), 0, False
        self.cause: Cause | None = None

    async def entered(self, cause: Cause, parent: str) -> bool:
        """Wait for the turn. False: whose turn it is may be waiting for this one, so they decide side by side."""
        if self.cause is None or self.cause.correlation != cause.correlation:
            await self.lock.acquire()
        elif self.cause.id == parent:
            return False
        else:
            try:
                async with asyncio.timeout(_NESTED):
                    await self.lock.acquire()
            except TimeoutError:
                return False
        self.cause = cause
        return True


class Commander:
    """The owner of one domain, in one process: it decides for the things in the slots it holds."""

    def __init__(
        self,
        service: str,
        domain: str,
        deciders: Mapping[type[Message], Decider],
        inverses: Mapping[type[Message], Invert],
        folder: Folder,
        schema: Schema,
        bus: Bus,
        leases: Leases,
        rules: Sequence[Rule] = (),
    ) -> None:
        self._service, self.domain, self._deciders = service, domain, dict(deciders)
        self._folder, self._schema, self._bus, self._leases = folder, schema, bus, leases
        self._facts, self._clock = bus.facts, bus.clock
        self._undoing = Undoing(folder, inverses, bus.facts)
        self._things: dict[str, _Standing] = {}
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._deciding: dict[str, asyncio.Future[None] | None] = {}
        self._turns: dict[str, _Turn] = {}
        self.slots: set[int] = set()
        self._backlog: dict[int, int] = {}
        self._busy: Counter[int] = Counter()
        self._idle = asyncio.Event()
        self._doubts: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._audits: set[asyncio.Future[Appended]] = set()
        self.records = Records(bus.records, domain, bus.clock, folder.fingerprint)
        self._unsure = self.records.unsure
        self._tags = Tags(bus.facts, rules, bus.clock)
        self._most_conflicts = _MOST_CONFLICTS_OF_TAGS if rules else _MOST_CONFLICTS
        self._slots = [f"{domain}/{slot}" for slot in range(SLOTS)]

    async def take_over(self, slots: Iterable[int], superseded: frozenset[str] = frozenset()) -> None:
        """Claim slots, then give each stream that was left behind there its record.

        Parameters:
            superseded: owners that have lost these slots already.

        Raises `Held` if somebody else writes there, and what the disk says; then no slot is kept.
        """
        mine = sorted(slots)
        names = [self._slots[slot] for slot in mine]
        await self._take(names, superseded)
        try:
            # Not before: who changes the rules holds all slots.
            self._tags.since = await check(self._facts, self.domain, self._tags.rules)
            await self._make_up_for(mine)
        except BaseException:
            self.records.leave(frozenset(mine))
            with suppress(Unavailable):
                await self._leases.release(*names)
            raise
        self.slots.update(mine)

    async def _take(self, names: Sequence[str], superseded: frozenset[str] = frozenset()) -> None:
        """Claim slots. Another instance that looks whether its rules bind holds all of them, but not for long."""
        until = self._clock.monotonic() + (_PATIENCE if self._tags.rules else 0.0)
        while True:
            try:
                return await self._leases.take(*names, superseded=superseded)
            except Held:
                if self._clock.monotonic() >= until:
                    raise
            await self._clock.sleep(_PAUSE * (1 + self._clock.random()))

    async def bind(self) -> None:
        """Have the rules of this code bind the domain. Where others did, all slots are held while that is changed.

        Another instance that does the same is waited for. Raises `Held` where one with other rules does not go, and
        `Refused` where more things bear a tag than may.
        """
        until = self._clock.monotonic() + _PATIENCE
        while True:
            with suppress(Refused):
                self._tags.since = await check(self._facts, self.domain, self._tags.rules)
                return
            try:
                await self._leases.take(*self._slots)
            except Held as held:
                coming = await are_coming(self._facts, self.domain, self._tags.rules)
                if self._clock.monotonic() > until and not coming:
                    why = f"{held}, because {self.domain} gets other rules, which binds all instances or none"
                    raise Held(why, held.claim) from None
                await self._clock.sleep(_PAUSE * (1 + self._clock.random()))
                continue
            await self._bind()

    async def _bind(self) -> None:
        beating = asyncio.get_running_loop().create_task(self._leases.beat())
        try:
            await self._make_up_for(range(SLOTS))
            if self._unsure:
                raise Refused(
                    f"{self.domain} has things without a record ({', '.join(sorted(self._unsure)[:3])}): see the log"
                )
            await build(
                self._facts,
                self._bus.records,
                self._folder,
                self._tags.rules,
                [self._leases.claims[slot] for slot in self._slots],
                self._clock,
            )
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            with suppress(Unavailable):
                await self._leases.release(*self._slots)

    async def _make_up_for(self, mine: Sequence[int]) -> None:
        """Write the records that are missing."""
        backlog, head = await self._bus.commands.head(), await self._facts.head()
        marks = {slot: await written(self._bus.records, self.domain, slot) for slot in mine}
        for slot, mark in marks.items():
            if mark > head:
                # What comes now would be taken for written.
                raise ahead(f"those of {self.domain} slot {slot} are written up to position {mark}", f"end at {head}")
        looked, touched = min(marks.values(), default=head), dict[str, None]()
        wanted = Filter(domains=frozenset({self.domain}), slots=frozenset(mine) if len(mine) < SLOTS else frozenset())
        while looked < head:
            page = await self._facts.read(wanted, after=looked, bodies=False)
            touched.update((entry.key, None) for entry in page.entries if entry.position > marks[slot_of(entry.key)])
            looked = page.looked
        # Until all are folded the marks must stand still: one of a slot would pass what comes later in the loop.
        doubts, failed = [key for key in touched if key not in self._unsure], dict[str, Exception]()
        self._unsure.update(dict.fromkeys(doubts, 1))
        try:
            failed = await self._remember_each(touched)
        finally:
            for key in doubts:
                if key not in failed:
                    del self._unsure[key]
        if touched:
            await self.records.flush()
        self._backlog |= dict.fromkeys(mine, backlog)

    async def _remember_each(self, keys: Iterable[str]) -> dict[str, Exception]:
        """Give many things their records. Returns which cannot be folded, and why: they keep no other waiting."""
        failed = dict[str, Exception]()
        for key in keys:
            try:
                await self._remember(key)
            except (Unavailable, Damaged):
                raise
            except Exception as error:
                failed[key] = error
        if failed:
            first, why = next(iter(failed.items()))
            what = (
                "%s: %d things have no record of their last facts until a start that can fold them, the first is %s: %r"
            )
            _log.error(what, self.domain, len(failed), first, why)
        return failed

    async def let_go(self, slots: Iterable[int], within: float) -> None:
        """Decide nothing more there, finish what is in hand with its records, and release the claims.

        Parameters:
            within: seconds to wait for what is being decided; what takes longer is refused by the log afterwards.
        """
        gone = set(slots)
        self.slots -= gone
        try:
            async with asyncio.timeout(within):
                while any(self._busy[slot] for slot in gone):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            _log.warning("%s: what is being decided does not end, and its slot is given away", self.domain)
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        # Not until nothing is left to be written: other slots go on, and under load there always is something.
        await self.records.flush()
        for key in [key for key in self._things if slot_of(key) in gone]:
            del self._things[key]
        await self._leases.release(*(self._slots[slot] for slot in gone))

    def abandon(self) -> None:
        """Hold nothing more, and forget what stood: others decide here, and may have done so already.

        What is being decided is refused by the log, or begins anew with what stands where this instance decides again.
        What has no record yet the others make up for: the marks have not passed it, and move from here no more.
        """
        self.slots.clear()
        self._things = {}
        for task in self._tasks:
            task.cancel()
        self._unsure.clear()
        self.records.leave(frozenset(range(SLOTS)))

    @contextmanager
    def _working(self, key: str) -> Iterator[int]:
        """While a thing is decided here, its slot is not given away. Raises `NoAnswer` where it is not held."""
        slot = slot_of(key)
        if slot not in self.slots:
            raise self._not_held(key)
        self._busy[slot] += 1
        try:
            yield slot
        except Fenced as error:
            # That is this instance's affair, and nothing was written: whoever wished finds the one that holds it now.
            raise self._not_held(key) from error
        finally:
            self._busy[slot] -= 1
            if not self._busy[slot]:
                self._idle.set()

    async def call(self, ask: Ask) -> Receipt:
        """Decide a wish that came over the wire. Raises `Rejected`, and what stopped it."""
        command = self._schema.decode(self.domain, ask.type, ask.schema, bytes(ask.body))
        cause = Cause(ask.id, ask.correlation or ask.id, ask.by, ask.trace, ask.tracestate)
        if not is_about(command, ask.key):
            raise Refused(f"a {ask.type} for {key_of(command)!r} came as one for {ask.key!r}: ask with its own key")
        with self._working(ask.key) as slot:
            return await self._called(ask, command, cause, slot)

    async def _called(self, ask: Ask, command: Message, cause: Cause, slot: int) -> Receipt:
        await self._alone(ask.id)
        try:
            if ask.again:
                # It may also have been sent: all that was sent up to now is looked for before it is decided.
                self._backlog[slot] = await self._bus.commands.head()
                before = await self._accepted(ask.key, Wish(ask.type, ask.body, ask.schema), ask.id)
                if before is not None:
                    return before
            return await self._decide(command, cause, ask.body, ask.schema, ask.causation)
        finally:
            self._done(ask.id)

    async def handle(self, entry: Entry) -> None:
        """Decide a wish that was sent. A rejection is audited and done with; anything else that is raised is not."""
        meta = entry.checked().meta
        if meta.verdict:
            return
        with self._working(entry.key) as slot:
            await self._handled(entry, meta, slot)

    async def _handled(self, entry: Entry, meta: Meta, slot: int) -> None:
        body = entry.body or b""
        cause = Cause(entry.id, entry.correlation, meta.by, meta.trace, meta.tracestate)
        await self._alone(entry.id)
        try:
            # Who took over, failed half-way or heard of an earlier try cannot know if it was decided: the log does.
            doubtful = (
                entry.position <= self._backlog[slot]
                or entry.position in self._doubts
                or meta.again
                or min(meta.time, time_of(entry.id)) < self._clock.now() - _LATE
            )
            wish = Wish(entry.type, msgspec.Raw(body), meta.schema)
            if doubtful and (await self._audited(entry) or await self._accepted(entry.key, wish, entry.id)):
                pass
            elif meta.expires and self._clock.now() > meta.expires:
                self._audit(entry.stream, entry.type, meta.schema, body, cause, "expired")
            else:
                command = self._schema.decode(self.domain, entry.type, meta.schema, body)
                if not is_about(command, entry.key):
                    # As a person may have mended it: another slot's thing is not decided here.
                    raise Refused(f"{entry.type} is about another thing than {entry.key!r}: leave the key as it was")
                self._doubts.add(entry.position)
                await self._decide(command, cause, msgspec.Raw(body), meta.schema)
        except Rejected:
            pass  # audited where it was decided
        except IdReused as error:
            self._audit(entry.stream, entry.type, meta.schema, body, cause, f"refused: {error}")
        finally:
            self._done(entry.id)
        if self._audits:
            # The place must not pass a verdict that is not kept: a restore would decide anew.
            await asyncio.wait(self._audits)
        self._doubts.discard(entry.position)

    async def publish(
        self, events: Sequence[Event], ids: Sequence[str], cause: Cause, said: Sequence[Ask] = ()
    ) -> None:
        """Record facts that no command asked for; recorded once, however often it is said with the same ids.

        Parameters:
            said: the same facts, as older code said them, if it did: they are recorded so, because it may have done
                that already.
        """
        key = _one_key(self._service, events)
        stream, now = f"{self.domain}/{key}", self._clock.now()
        entries = self._sealed(stream, events, ids, cause, now)
        if said:
            entries = [
                sealed(
                    stream,
                    ask.type,
                    each.id,
                    msgspec.structs.replace(each.meta, schema=ask.schema),
                    check_body(bytes(ask.body), ask.type),
                )
                for ask, each in zip(said, entries, strict=True)
            ]
        with self._working(key):
            for conflicts in range(self._most_conflicts):
                leave = await self._my_turn(key, cause, "", conflicts) if self._is_waited_for(key, conflicts) else None
                try:
                    thing = self._things.get(key) or await self._load(key)
                    if await self._record(key, thing, events, entries, leave, conflicts, repeat=True) is not None:
                        return
                finally:
                    if leave is not None:
                        leave()
        raise self._contended(entries[0].stream)

    def _contended(self, stream: str) -> Overloaded:
        what = f"{stream}, or a tag that it would get," if self._tags.rules else stream
        return Overloaded(
            f"{what} changed {self._most_conflicts} times while it was decided: another writer is at it; try again"
        )

    async def undo(self, ask: Ask, asked: Asked, record: type[Record]) -> ToldUndo:
        """Undo facts of a thing, as `cauce.undo` plans it. Raises as `call`, and what planning raises."""
        key, cause = ask.key, Cause(ask.id, ask.correlation or ask.id, ask.by, ask.trace, ask.tracestate)
        wish = Wish(UNDO, msgspec.Raw(_encode(asked.undo)), time=self._clock.now())
        with self._working(key):
            await self._alone(ask.id)
            try:
                if ask.again and (before := await self._accepted(key, wish, ask.id)) is not None:
                    return await self._told(before, ask.type)
                for conflicts in range(self._most_conflicts):
                    leave = await self._my_turn(key, cause, "", conflicts)
                    try:
                        undone = await self._undone(record, ask, asked, cause, wish, leave, conflicts)
                    finally:
                        leave()
                    if isinstance(undone, Receipt):
                        return await self._told(undone, ask.type)
                    if undone is not None:
                        return undone
            finally:
                self._done(ask.id)
        raise self._contended(f"{self.domain}/{key}")

    async def _undone(
        self,
        record: type[Record],
        ask: Ask,
        asked: Asked,
        cause: Cause,
        wish: Wish,
        leave: Callable[[], None],
        conflicts: int,
    ) -> Receipt | ToldUndo | None:
        """Undo once, or only tell what would be. None: the thing changed meanwhile, so that must be decided again."""
        key = ask.key
        thing = self._things.get(key) or await self._load(key)
        # The plan reads the facts back: what is decided ahead of the disk must be there.
        if not await self._shown(key, thing):
            return None
        before = thing.folded
        events = await self._undoing.plan(record, key, before, asked)
        self._check(events, key, "an undo")
        if self._moved(key, thing, before):
            return None
        before = thing.folded
        stream = f"{self.domain}/{key}"
        ids = [derive_id(cause.id, self._service, stream, str(n)) for n in range(len(events))]
        entries = self._sealed(stream, events, ids, cause, self._clock.now(), _encode(wish))
        if asked.dry or not events:
            after = self._stepped(key, before, events, entries)[0].state if events else before.state
            return told(entries, before, *self._stood(ask.type, before.state, after), changed=False)
        appended = await self._record(key, thing, events, entries, leave, conflicts)
        return None if appended is None else Receipt(cause.id, key, appended.version, appended.position, True)

    async def _told(self, receipt: Receipt, asked: str) -> ToldUndo:
        """What an undo recorded, by the log."""
        key = receipt.key
        facts = entries_of(self._facts, Filter(f"{self.domain}/{key}"))
        entries = [each async for each in facts if each.meta.causation == receipt.id]
        before = await self._folder.fold(self._facts, key, at_version=entries[0].version - 1)
        after = await self._folder.fold(self._facts, key, at_version=receipt.version)
        return told(entries, after, *self._stood(asked, before.state, after.state), changed=True)

    def _stood(self, asked: str, *states: Record | None) -> list[Stood | None]:
        return [stood_as(self._schema, asked, state) for state in states]

    async def settled(self) -> None:
        """Wait until all that is decided has its record."""
        while self._tasks:
            # Not gather: who gives up waiting here must not cancel them.
            await asyncio.wait(self._tasks)
        await self.records.settled()

    async def _decide(
        self, command: Message, cause: Cause, body: msgspec.Raw, schema: int, parent: str = ""
    ) -> Receipt:
        key = key_of(command)
        kind = declared(command)
        decider = self._deciders.get(type(command))
        if decider is None:
            raise NoAnswer(f"service {self._service!r} decides no {kind.name}: add a decide function for it")
        for conflicts in range(self._most_conflicts):
            leave = None
            if decider.is_async or self._is_waited_for(key, conflicts):
                leave = await self._my_turn(key, cause, parent, conflicts)
            try:
                receipt = await self._decided(decider, command, cause, body, schema, leave, conflicts)
            finally:
                if leave is not None:
                    leave()
            if receipt is not None:
                return receipt
        raise self._contended(f"{self.domain}/{key}")

    async def _decided(
        self,
        decider: Decider,
        command: Message,
        cause: Cause,
        body: msgspec.Raw,
        schema: int,
        leave: Callable[[], None] | None,
        conflicts: int,
    ) -> Receipt | None:
        """Decide once. None: the thing changed meanwhile, so that must be decided again."""
        key, kind = key_of(command), declared(command)
        stream = f"{self.domain}/{key}"
        thing = self._things.get(key) or await self._load(key)
        before = thing.folded
        try:
            events = await self._wished(decider, before, command, key, cause)
        except Rejected as rejected:
            if leave is not None:
                leave()
            if await self._shown(key, thing):
                self._audit(stream, kind.name, schema, bytes(body), cause, f"rejected: {rejected}")
                raise
            return None
        if self._moved(key, thing, before):
            return None
        # The same, but perhaps committed meanwhile.
        before = thing.folded
        if not events:
            if leave is not None:
                leave()
            tail = thing.tail
            if await self._shown(key, thing):
                self._audit(stream, kind.name, schema, bytes(body), cause, "unchanged")
                position = before.position or (0 if tail is None else tail.result().position)
                return Receipt(cause.id, key, before.version, position, False)
            return None
        ids = [derive_id(cause.id, self._service, stream, str(n)) for n in range(len(events))]
        now = self._clock.now()
        wish = _encode(Wish(kind.name, body, schema, now))
        entries = self._sealed(stream, events, ids, cause, now, wish)
        try:
            appended = await self._record(key, thing, events, entries, leave, conflicts)
        except Rejected as rejected:
            self._audit(stream, kind.name, schema, bytes(body), cause, f"rejected: {rejected}")
            raise
        return None if appended is None else Receipt(cause.id, key, appended.version, appended.position, True)

    def _is_waited_for(self, key: str, conflicts: int) -> bool:
        """Whether who does not wait while it decides takes its turn all the same."""
        return conflicts > 0 or (key in self._turns and self._turns[key].all)

    async def _my_turn(self, key: str, cause: Cause, parent: str, conflicts: int) -> Callable[[], None]:
        """Wait until it is this one's turn to decide for a thing; what is returned ends it.

        Parameters:
            parent: the id of the message because of which it was wished: who decides that waits for this one.
            conflicts: how often it was decided in vain.
        """
        turn = self._turns.setdefault(key, _Turn())
        turn.users += 1
        entered, left = False, False

        def leave() -> None:
            nonlocal left
            if left:
                return
            left = True
            if entered:
                turn.cause = None
                turn.lock.release()
            turn.users -= 1
            if not turn.users:
                del self._turns[key]

        try:
            entered = await turn.entered(cause, parent)
        except BaseException:
            leave()
            raise
        turn.all |= conflicts >= _IMPATIENT
        return leave

    async def _record(
        self,
        key: str,
        thing: _Standing,
        events: Sequence[Event],
        entries: Sequence[Entry],
        leave: Callable[[], None] | None,
        conflicts: int,
        *,
        repeat: bool = False,
    ) -> Appended | None:
        """Append upon what stands as far as decided. None: the stream is elsewhere, so that must be decided again.

        Parameters:
            leave: called as soon as the next may decide ahead of the disk.
            conflicts: how often it was decided in vain.

        Raises `Rejected`, when all that it rests on is on the disk, if a tag that the thing would get is not to be had.
        """
        after, body = self._stepped(key, thing.folded, events, entries)
        changes = self._tags.changes(thing.folded.state, after.state) if self._tags.rules else ()
        if not changes:
            return await self._appended(key, thing, after, body, entries, leave, repeat)
        before = thing.folded
        async with self._tags.turn(changes):
            also: Sequence[Also] = ()
            if not repeat or not await self._stands(entries[0]):
                if conflicts:
                    await self._tags.lost(changes, conflicts)
                try:
                    also = await self._tags.also(changes, key, after.state, entries[0])
                except (Rejected, Inconsistent):
                    # What was decided ahead and failed meanwhile was no reason.
                    if not self._moved(key, thing, before) and await self._shown(key, thing):
                        raise
                    return None
            if self._moved(key, thing, before):
                return None
            appended = await self._appended(key, thing, after, body, entries, leave, repeat, also)
            if appended is not None and not appended.repeated:
                self._tags.wrote(also, appended.position)
            return appended

    def _moved(self, key: str, thing: _Standing, before: Folded) -> bool:
        """Whether a thing stands otherwise by now than it did; what was committed meanwhile is the same."""
        now = thing.folded
        return (now.version, now.id) != (before.version, before.id) or self._things.get(key) is not thing

    async def _stands(self, entry: Entry) -> bool:
        """Whether a stream holds the id of an entry."""
        return any([each.id == entry.id async for each in entries_of(self._facts, Filter(entry.stream), bodies=False)])

    async def _appended(
        self,
        key: str,
        thing: _Standing,
        after: Folded,
        body: bytes,
        entries: Sequence[Entry],
        leave: Callable[[], None] | None,
        repeat: bool,
        also: Sequence[Also] = (),
    ) -> Appended | None:
        """Append, and let the next decide ahead on what will stand."""
        before, things = thing.folded, self._things
        thing.tail = future = self._facts.append(
            entries[0].stream, entries, expect=before.version, fence=self._claim(key), repeat=repeat, also=also
        )
        thing.folded = after
        if leave is not None:
            leave()
        try:
            appended = await future
        except Conflict:
            self._drop(key, thing)
            return None
        except BaseException:
            if self._things is things:
                self._forget(key)
            raise
        if appended.repeated:
            self._drop(key, thing)
        elif self._things is things:
            # Else the instance was struck off meanwhile, and who took over gives it its record.
            placed = Folded(after.state, after.version, appended.position, after.id)
            self.records.changed(key, placed, body)
            if thing.folded is after:
                thing.folded, thing.tail = placed, None
        return appended

    async def _wished(self, decider: Decider, before: Folded, command: Message, key: str, cause: Cause) -> list[Event]:
        function = decider.function
        # The one who called may wait in this very task.
        before_it = correlation.set(cause.correlation)
        try:
            if decider.context is None:
                result = function(before.state, command)
            else:
                context = Context(self._bus, self._service, function.__name__, None, cause)
                result = function(before.state, command, **{decider.context: context})
            if not isinstance(result, Event) and inspect.isawaitable(result):
                result = await result
        finally:
            correlation.reset(before_it)
        where = f"{self._service}.{function.__name__}"
        events = messages_of(result, where, "events, or None")
        self._check(events, key, where)
        return events

    def _check(self, events: Sequence[Any], key: str, where: str) -> None:
        """Raises `Refused` and `NotOwner` for what is no fact of the thing."""
        for event in events:
            if not isinstance(event, Event):
                raise Refused(f"{where} returned {event!r}: return events, or None")
            if declared(event).domain.name != self.domain:
                raise NotOwner(
                    f"{where} returned {type(event).__name__} of {declared(event).domain.name!r}: only its owner records it; send it a command"
                )
            if not is_about(event, key):
                raise Refused(
                    f"{where} returned {type(event).__name__} for {key_of(event)!r}, the command is for {key!r}: one command, one thing"
                )

    @staticmethod
    def _sealed(
        stream: str, events: Sequence[Event], ids: Sequence[str], cause: Cause, now: int, wish: bytes | None = None
    ) -> list[Entry]:
        entries = []
        for event, id in zip(events, ids, strict=True):
            kind = declared(event)
            meta = Meta(now, kind.version, cause.correlation, cause.id, cause.by, cause.trace, cause.tracestate)
            entries.append(sealed(stream, kind.name, id, meta, encode(event), wish))
            wish = None
        return entries

    def _stepped(
        self, key: str, before: Folded, events: Sequence[Event], entries: Sequence[Entry]
    ) -> tuple[Folded, bytes]:
        """What will stand, and its record as it will be written behind: what could not be must be refused now."""
        state, body = before.state, b""
        for version, event in enumerate(events, before.version + 1):
            state = self._folder.step(state, event, version)
        if state is not None:
            body = encode(state)
            if not is_about(state, key):
                raise Refused(
                    f"evolve made a record of {key_of(state)!r} from facts of {self.domain}/{key}: keep the key"
                )
        return Folded(state, before.version + len(events), 0, entries[-1].id), body

    async def _shown(self, key: str, thing: _Standing) -> bool:
        """Whether what was decided upon is on disk by now. What was decided ahead and failed must be decided again."""
        tail = thing.tail
        if tail is not None and not tail.done():
            # Waits without owning the future: giving up here must not cancel another caller's append.
            await asyncio.wait({tail})
        if tail is not None and (tail.cancelled() or tail.exception() is not None or tail.result().repeated):
            # Who appended may not have been woken yet to forget it.
            self._drop(key, thing)
        return self._things.get(key) is thing

    async def _alone(self, id: str) -> None:
        """Wait until nobody else decides the wish with this id, which may come by call and by send at once."""
        while id in self._deciding:
            other = self._deciding[id]
            if other is None:
                other = self._deciding[id] = asyncio.get_running_loop().create_future()
            await asyncio.wait({other})
        self._deciding[id] = None

    def _done(self, id: str) -> None:
        waiting = self._deciding.pop(id)
        if waiting is not None:
            waiting.set_result(None)

    async def _accepted(self, key: str, wish: Wish, id: str) -> Receipt | None:
        """The receipt of a command that was accepted before: a fact with its causation is in the stream.

        Raises `IdReused` if that was another wish.
        """
        thing = self._things.get(key)
        if key in self._unsure or (thing is not None and thing.tail is not None and not thing.tail.done()):
            await self._sure(key)
        stream = Filter(f"{self.domain}/{key}")
        known = entries_of(self._facts, stream, bodies=False)
        found = [entry async for entry in known if entry.meta.causation == id]
        if not found:
            return None
        page = await self._facts.read(stream, after=found[0].position - 1, limit=1)
        before = page.entries[0].checked().wished
        if before is not None and not self._same(before, wish):
            raise IdReused(f"{stream.stream} holds another wish with id {id}: use a fresh id for another wish")
        return Receipt(id, key, found[-1].version, found[-1].position, True)

    def _same(self, before: Wish, wish: Wish) -> bool:
        """Whether two wishes are one. Whoever wishes again after a new version was deployed may word it anew."""
        name = self._schema.today(self.domain, wish.type)
        if self._schema.today(self.domain, before.type) != name:
            return False
        if before.schema == wish.schema:
            return bytes(before.body) == bytes(wish.body)
        decode = self._schema.decode
        return decode(self.domain, before.type, before.schema, bytes(before.body)) == decode(
            self.domain, wish.type, wish.schema, bytes(wish.body)
        )

    async def _audited(self, entry: Entry) -> bool:
        """Whether a wish that was sent has its verdict already: what was rejected once is not granted by a restore."""
        looked, head = entry.position, await self._bus.commands.head()
        while looked < head:
            page = await self._bus.commands.read(Filter(entry.stream), after=looked, bodies=False)
            if any(each.meta.verdict and each.meta.causation == entry.id for each in page.entries):
                return True
            looked = page.looked
        return False

    async def _sure(self, key: str) -> None:
        """Wait for what was appended: the log keeps the order of what it is told, and a beat comes after all of it."""
        await self._facts.beat(self._claim(key))

    def _claim(self, key: str) -> Any:
        name = self._slots[slot_of(key)]
        claim = self._leases.claims.get(name)
        if claim is None:
            raise self._not_held(key)
        return claim

    def _not_held(self, key: str) -> NoAnswer:
        return NoAnswer(f"{self._slots[slot_of(key)]} is not held here any more: try again")

    async def _load(self, key: str) -> _Standing:
        while (loading := self._loading.get(key)) is not None:
            # A crowd that asks for one thing would take all connections to a server from whoever else reads.
            await asyncio.wait([loading])
            if (thing := self._things.get(key)) is not None:
                return thing
        self._loading[key] = loaded = asyncio.get_running_loop().create_future()
        try:
            return await self._loaded(key)
        finally:
            del self._loading[key]
            loaded.set_result(None)

    async def _loaded(self, key: str) -> _Standing:
        if key in self._unsure:
            # What is still under way for it would come between: it stands in the cache no more, and not in the log yet.
            await self._sure(key)
        things = self._things
        folded = await self._folder.fold(self._facts, key, records=self._bus.records)
        if len(things) >= _CACHED:
            self._evict()
        # Where all was forgotten meanwhile, that is no news to anybody.
        return things.setdefault(key, _Standing(folded))

    def _evict(self) -> None:
        for key in [key for key, thing in self._things.items() if thing.tail is None or thing.tail.done()][
            : _CACHED // 2
        ]:
            del self._things[key]

    def _drop(self, key: str, thing: _Standing) -> None:
        if self._things.get(key) is thing:
            del self._things[key]

    def _forget(self, key: str) -> None:
        """What became of an append is not known here: look again, when all that was queued has its verdict."""
        self._things.pop(key, None)
        self._unsure[key] = self._unsure.get(key, 0) + 1
        if self._unsure[key] == 1:
            task = asyncio.get_running_loop().create_task(self._look_again(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look_again(self, key: str) -> None:
        """Until it is known, the marks of the records stand still: so the next start would look, too."""
        seen, pause = 0, 0.0
        while seen != self._unsure[key]:
            try:
                forgotten = self._unsure[key]
                await self._sure(key)
                await self._remember(key)
                # What was met may be ahead of what others of its slot are told of; the mark must not pass them.
                await self._sure(key)
                seen = forgotten
            except Unavailable as error:
                pause = min(_LONGEST_PAUSE, pause * 2 or _PAUSE)
                _log.warning("%s/%s: its record waits: %s", self.domain, key, error)
                await self._clock.sleep(pause)
            except Exception as error:
                _log.error("%s/%s: its record waits for the next start: %r", self.domain, key, error)
                return
        del self._unsure[key]

    async def _remember(self, key: str) -> None:
        folded = await self._folder.fold(self._facts, key, records=self._bus.records)
        if folded.version:
            self.records.changed(key, folded)

    def _audit(self, stream: str, type: str, schema: int, body: bytes, cause: Cause, verdict: str) -> None:
        """Keep what was wished in vain. Nobody waits for it: it binds nobody."""
        now = self._clock.now()
        meta = Meta(
            now, schema, cause.correlation, cause.id, cause.by, cause.trace, cause.tracestate, verdict=verdict[:500]
        )
        try:
            future = self._bus.commands.append(stream, [sealed(stream, type, self._clock.id(), meta, body)])
        except Exception as error:
            _log.warning("no audit of %s for %s: %s", type, stream, error)
            return
        self._audits.add(future)
        future.add_done_callback(self._audits.discard)
        future.add_done_callback(_told)


def _told(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.warning("an audit entry was not kept: %s", error)


def _one_key(service: str, events: Sequence[Event]) -> str:
    keys = {key_of(event) for event in events}
    if len(keys) != 1:
        raise Refused(
            f"{service} records facts of several things at once ({', '.join(sorted(keys))}): one append, one thing"
        )
    return keys.pop()
