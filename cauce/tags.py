"""What the things of a domain bear, and how many may bear it: each tag is a stream, whose last entry says how many do.

A thing that gains or loses a tag writes to that stream in the append of its own facts, and expects what it has read
there. So of two that would be one too many the second is in conflict, whichever processes they are decided in.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any

import msgspec

from cauce.accept import KEY_BYTES, check_key
from cauce.clock import Clock
from cauce.codec import Entry, Meta, derive_id, sealed
from cauce.errors import Inconsistent, Refused, Rejected
from cauce.log import Also, Filter, Log
from cauce.messages import Record

__all__ = ["Borne", "Change", "Rule", "Tags", "borne", "count_of", "stream_of"]

_CACHED = 100_000
_PAUSE = 0.002
"""Seconds, times the number of conflicts, within which who lost a tag to another process comes again."""

_encode = msgspec.json.Encoder().encode


class Rule(msgspec.Struct, frozen=True):
    """At most so many things of a domain bear each tag that a function finds in their record.

    Parameters:
        function: pure, from a record to a tag, several, or None.
        most: a number, or a pure function from the record of the thing that wants the tag.
        code: names what function and `evolve` do: where it is another one, the tags are built anew.
    """

    name: str
    domain: str
    record: type[Record]
    function: Callable[[Any], Any]
    most: int | Callable[[Any], int] = 1
    code: str = ""

    def tags(self, state: Record | None) -> frozenset[str]:
        """What a thing bears that stands so. Raises `Refused` where that is no text."""
        if not isinstance(state, self.record):
            return frozenset()
        try:
            found = self.function(state)
            if found is None:
                return frozenset()
            several = isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping))
            tags = frozenset(found if several else (found,))
        except Exception as error:
            self._note(error, state)
            raise
        for tag in tags:
            if type(tag) is not str or not tag:
                raise Refused(
                    f"rule {self.name} of {self.domain} gave {found!r:.200}: return a tag (text), several, or None"
                )
        return tags

    def room(self, state: Record | None) -> int:
        """How many may bear a tag, by the record of who wants it. Raises `Refused` where that is no number."""
        if not callable(self.most):
            return self.most
        try:
            room = self.most(state)
        except Exception as error:
            self._note(error, state)
            raise
        if type(room) is not int:
            raise Refused(
                f"rule {self.name} of {self.domain} gave {room!r:.200} as the most: return a number of things"
            )
        return room

    def _note(self, error: Exception, state: Record | None) -> None:
        error.add_note(f"in rule {self.name} of {self.domain}, for {state!r:.200}")


class Borne(msgspec.Struct, frozen=True, omit_defaults=True):
    """The last entry of a tag: how many bear it, who took it last, and how far a build has counted them."""

    n: int = 0
    by: str = ""
    upto: int = 0


class Change(msgspec.Struct, frozen=True):
    """A tag that a thing gains or loses."""

    rule: Rule
    tag: str
    stream: str
    gained: bool


class Count(msgspec.Struct, frozen=True):
    """How a tag stood when it was looked at last: its version, what it said, and how far its stream was read."""

    version: int = 0
    borne: Borne = Borne()
    looked: int = 0


_decode = msgspec.json.Decoder(Borne).decode
_NOTHING = Count()


def stream_of(rule: Rule, since: int, tag: str) -> str:
    """The stream of a tag.

    A tag that is no key, or too long beside the names, is named by its digest, which no other tag can look like.
    """
    before = f"{rule.domain}.{rule.name}.{since}/"
    try:
        if not tag.startswith("=") and len(tag) <= KEY_BYTES:
            return f"_tags/{check_key(before + tag)}"
    except Refused:
        pass
    return f"_tags/{before}={blake2b(tag.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def borne(stream: str, borne: Borne, cause: Entry, now: int) -> Entry:
    """The next entry of a tag, because of a fact of the thing that gains or loses it."""
    meta = Meta(now, correlation=cause.meta.correlation, causation=cause.id)
    return sealed(stream, "Borne", derive_id(cause.id, stream), meta, _encode(borne))


async def count_of(facts: Log, stream: str, before: Count = _NOTHING) -> Count:
    """How a tag stands now, from what was known of it before."""
    head, count = await facts.head(), before
    while count.looked < head:
        page = await facts.read(Filter(stream), after=count.looked)
        last = page.entries[-1] if page.entries else None
        if last is None:
            count = Count(count.version, count.borne, page.looked)
        else:
            count = Count(last.version, _decode(last.checked().body or b"{}"), page.looked)
    return count


class Tags:
    """The tags of one domain, as the process that decides for some of its things sees them.

    What is remembered of a tag may be old: whoever relies on it is in conflict then, and nobody is rejected by it.
    """

    def __init__(self, facts: Log, rules: Sequence[Rule], clock: Clock) -> None:
        self._facts, self.rules, self._clock = facts, rules, clock
        self.since: Mapping[str, int] = {}
        """For each rule the number of its build, which is part of the names of its streams."""

        self._counts: dict[str, Count] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._users = Counter[str]()

    def changes(self, before: Record | None, after: Record | None) -> list[Change]:
        """Which tags are gained and lost from one state of a thing to the next."""
        found = list[Change]()
        for rule in self.rules:
            had, has = rule.tags(before), rule.tags(after)
            since = self.since.get(rule.name, 0)
            found += [Change(rule, tag, stream_of(rule, since, tag), tag in has) for tag in had ^ has]
        return found

    @asynccontextmanager
    async def turn(self, changes: Sequence[Change]) -> AsyncIterator[None]:
        """Whoever changes the same tags in this process comes one after the other, as else only one would win."""
        streams, held = sorted({change.stream for change in changes}), list[asyncio.Lock]()
        for stream in streams:
            self._users[stream] += 1
        try:
            # All in one order, so that no two wait for each other.
            for stream in streams:
                lock = self._locks.setdefault(stream, asyncio.Lock())
                await lock.acquire()
                held.append(lock)
            yield
        finally:
            for lock in held:
                lock.release()
            for stream in streams:
                self._users[stream] -= 1
                if not self._users[stream]:
                    del self._users[stream]
                    self._locks.pop(stream, None)

    async def also(self, changes: Sequence[Change], key: str, state: Record | None, cause: Entry) -> list[Also]:
        """What is to be written with the facts of a thing that change its tags, in its turn.

        Raises `Rejected` where a tag is borne by as many as may, `Inconsistent` where it was never counted.
        """
        found = list[Also]()
        now = self._clock.now()
        # What is given back is counted first: nothing of it can fail by what another has.
        for change in sorted(changes, key=lambda each: (each.gained, each.stream)):
            count = self._counts.get(change.stream)
            if count is None or not self._goes(change, count, key, state):
                count = await self._look(change)
            if not self._goes(change, count, key, state):
                raise _full(change, count.borne) if change.gained else _uncounted(change, key)
            n = count.borne.n + (1 if change.gained else -1)
            by = key if change.gained else count.borne.by if n else ""
            found.append(Also(change.stream, [borne(change.stream, Borne(n, by), cause, now)], count.version))
        return found

    @staticmethod
    def _goes(change: Change, count: Count, key: str, state: Record | None) -> bool:
        if change.gained:
            return count.borne.n < change.rule.room(state)
        # Where one bears it that is who took it last, if another rule of its name has not counted it.
        return count.borne.n > 1 or (count.borne.n == 1 and (change.rule.most != 1 or count.borne.by == key))

    def wrote(self, also: Sequence[Also], position: int) -> None:
        """They stand, behind a position."""
        for each in also:
            assert each.expect is not None
            entry = each.entries[-1]
            self._remember(each.stream, Count(each.expect + 1, _decode(entry.body or b"{}"), position))

    async def lost(self, changes: Sequence[Change], conflicts: int) -> None:
        """Another process was first: look again, a little later each time."""
        for change in changes:
            await self._look(change)
        await self._clock.sleep(_PAUSE * conflicts * self._clock.random())

    async def _look(self, change: Change) -> Count:
        before = self._counts.get(change.stream, _NOTHING)
        return self._remember(change.stream, await count_of(self._facts, change.stream, before))

    def _remember(self, stream: str, count: Count) -> Count:
        if len(self._counts) >= _CACHED:
            self._counts.clear()
        self._counts[stream] = count
        return count


def _full(change: Change, borne: Borne) -> Rejected:
    rule, tag = change.rule, change.tag
    if borne.n == 1 and rule.most == 1:
        return Rejected(f"{rule.name} {tag!r:.200} is borne by {rule.domain}/{borne.by} already")
    return Rejected(f"{rule.name} {tag!r:.200} is borne by {borne.n} of {rule.domain} already, and no more may")


def _uncounted(change: Change, key: str) -> Inconsistent:
    rule = change.rule
    return Inconsistent(
        f"{rule.domain}/{key} gives {rule.name} {change.tag!r:.200} back, which was never counted for it: its rule, or evolve, "
        f"uses code of another module that was changed, so rename the rule, which builds its tags anew"
    )
