"""What a handle knows of a log in order to write: where streams and slots end, who holds what, which ids stand."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import msgspec

from cauce.accept import SLOTS, slot_of
from cauce.backends.nats.direct import ends, fetch
from cauce.backends.nats.events import id_of, version_of
from cauce.backends.nats.names import token
from cauce.backends.nats.stream import Stream

__all__ = ["NOTHING", "Head", "Heads"]

_CACHED = 200_000


class Head(msgspec.Struct, frozen=True, gc=False):
    """Where a stream stands: its version, and the position of its last entry, which is all that the server knows."""

    version: int = 0
    position: int = 0


NOTHING = Head()


class _Ids(msgspec.Struct):
    """The positions of a stream's ids, each where it stands first, up to a position."""

    upto: int = 0
    first: dict[str, int] = {}


class Heads:
    """Nothing here need be right: whatever is written says what it relies on, and is refused where that has changed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.alone = stream.head == 0
        """Whether all that was written is known here: nothing was there before, and nobody else was noticed."""

        self._ours = 0
        self._heads: dict[str, Head] = {}
        self.slots: dict[str, int] = {}
        self.fences: dict[str, int] = {}
        self._ids: dict[str, _Ids] = {}
        self._counted = 0
        self._subjects: dict[str, str] = {}
        self._claims: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------- names

    def subject(self, stream: str) -> str:
        """The subject of a stream, `facts.users.3.42`."""
        found = self._subjects.get(stream)
        if found is None:
            domain, _, key = stream.partition("/")
            if len(self._subjects) >= _CACHED:
                self._subjects.clear()
            found = self._stream.link.subject(self._stream.log, domain, str(slot_of(key)), token(key))
            self._subjects[stream] = found
        return found

    def claim(self, name: str) -> str:
        """The subject of a claim: among the slot's own where it is named so, else apart."""
        found = self._claims.get(name)
        if found is None:
            if len(self._claims) >= _CACHED:
                self._claims.clear()
            found = self._claims[name] = self._of_claim(name)
        return found

    def _of_claim(self, name: str) -> str:
        domain, slash, slot = name.partition("/")
        if (
            slash
            and slot.isdigit()
            and slot.isascii()
            and int(slot) < SLOTS
            and str(int(slot)) == slot
            and _plain(domain)
        ):
            return self._stream.link.subject(self._stream.log, domain, slot, "$claim")
        return self._stream.link.subject(self._stream.log, "$claim", token(name))

    # ------------------------------------------------------------------------------------------------- heads

    def head(self, subject: str) -> Head | None:
        return self._heads.get(subject)

    def note(self, subject: str, head: Head) -> None:
        if len(self._heads) >= _CACHED:
            self._heads.clear()
            self.alone = False
        self._heads[subject] = head

    def wrote_up_to(self, last: int, count: int) -> None:
        """This handle wrote so many messages, the last at this position; before them may stand what another wrote."""
        self.alone = self.alone and last - count == self._ours
        self._ours = last

    def enter(self, pattern: str, last: int) -> None:
        """A slot ends here. Where streams in it end has to be looked up after that: a write is refused for what comes
        after the end of its slot, not for what came before."""
        self.alone = self.alone and last <= self._ours
        begin = pattern[:-1]
        for subject in [each for each in self._heads if each.startswith(begin)]:
            del self._heads[subject]
        self.slots[pattern] = last

    def forget(self, subjects: Collection[str]) -> None:
        """Another has written: what was known of these streams, and of all slots and claims, is looked up again."""
        self.alone = False
        for subject in subjects:
            self._heads.pop(subject, None)
        self.slots.clear()
        self.fences.clear()

    async def load(self, subjects: Collection[str]) -> None:
        """Ask the leader where these streams end."""
        if len(subjects) == 1:
            (subject,) = subjects
            stored = await self._stream.last_of(subject)
            self.note(subject, NOTHING if stored is None else Head(version_of(stored.hdrs), stored.seq))
        elif subjects:
            # Where one server is all there is, what answers soonest is right.
            found = await ends(self._stream, subjects) if self._stream.replicas == 1 else {}
            for subject, message in found.items():
                self.note(subject, NOTHING if message is None else Head(version_of(message.head), message.position))
            await asyncio.gather(*(self.load((subject,)) for subject in subjects if subject not in found))

    async def last(self, subject: str) -> int:
        """The last position on a subject or pattern, as the leader has it; 0 where nothing is."""
        stored = await self._stream.last_of(subject)
        return 0 if stored is None else stored.seq

    # ------------------------------------------------------------------------------------------------- ids

    async def first(self, subject: str, id: str, upto: int) -> int:
        """The position at which an id stands first in a stream that ends at a position; 0 if it does not.

        The ids of a stream are read once, and then as it grows.
        """
        known = self._ids.get(subject)
        if known is None:
            if self._counted >= _CACHED:
                self._ids.clear()
                self._counted = 0
            known = self._ids[subject] = _Ids()
        while known.upto < upto:
            some = await fetch(self._stream, subject, known.upto, 1000)
            if not some:
                # A follower that answers for the leader may be a moment behind.
                stored = await self._stream.next_of(subject, known.upto + 1)
                if stored is None:
                    break
                self._add(known, stored.hdrs, stored.seq)
            for message in some:
                self._add(known, message.head, message.position)
        return known.first.get(id, 0)

    def forget_ids(self, subject: str) -> None:
        """Some of them are gone: they are read again."""
        known = self._ids.pop(subject, None)
        self._counted -= 0 if known is None else len(known.first)

    def _add(self, known: _Ids, head: bytes, position: int) -> None:
        known.first.setdefault(id_of(head), position)
        known.upto = position
        self._counted += 1

    def reads(self, subject: str) -> bool:
        """Whether the ids of this stream are known, so that `wrote` has to be told of more."""
        return subject in self._ids

    def wrote(self, subject: str, after: int, ids: Collection[str], position: int) -> None:
        """This handle wrote these ids, the last at a position, behind another."""
        known = self._ids.get(subject)
        if known is not None and known.upto == after:
            for number, id in enumerate(ids, position - len(ids) + 1):
                known.first.setdefault(id, number)
            known.upto = position
            self._counted += len(ids)


def _plain(domain: str) -> bool:
    return domain.isascii() and bool(domain) and domain[0].isalpha() and all(c.isalnum() or c in "_-" for c in domain)
