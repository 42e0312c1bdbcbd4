"""What a turn says to the server: jobs decided by how streams and claims are presumed to stand, and what comes back.

Nothing here waits. A draft presumes; the server writes only if all that it presumes is so, else it says how things are
and the next draft knows better. So each verdict, also a refusal, rests on what is so after the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from cauce.accept import slot_of
from cauce.codec import Entry, digest, schema_in
from cauce.errors import Conflict, Fenced, Held, IdReused
from cauce.log import Also, Appended, Claim, check_claim

__all__ = ["COMMANDS", "FACTS", "LOGS", "RECORDS", "Asked", "Draft", "Job", "Known", "Placed", "Row"]

LOGS = ("facts", "commands", "records")
FACTS, COMMANDS, RECORDS = range(3)

_CACHED = 200_000
_MOST = 2**63 - 2**20
"""Beyond it nothing is counted or presumed: it would not fit the columns."""

Row = tuple[int, int, str, str, int, int, str, str, bytes, bytes | None, bytes | None, int]
"""Log, place above the head, domain, key, version, slot, type, id, envelope, wish, body, digest."""

Asked = tuple[int, str, str]
"""Log, stream, and the first id of an append that may be a repeat."""

Found = tuple[str, bytes, bytes, int, int]
"""Type, envelope and body of what stands, its version and position."""


class Placed(msgspec.Struct, frozen=True, gc=False):
    """A verdict whose position is known when the turn is: so far above the head of its log."""

    log: int
    version: int
    at: int
    repeated: bool = False


class Job(msgspec.Struct, gc=False, eq=False):
    """What somebody waits for. `decide` gives the verdict, or raises it and has then changed nothing."""

    future: Any
    decide: Callable[..., Any]
    arguments: tuple[Any, ...]
    id: str
    """The id, or the name of the claim, by which its caller would ask again."""
    size: int
    since: float
    """When it came, on the clock's `monotonic`."""


class _Head(msgspec.Struct, gc=False):
    """Where a stream stands. `at` above 0: written in this very draft, so far above the head."""

    version: int
    position: int
    presumed: int
    sure: bool
    at: int = 0


class _Holder(msgspec.Struct, gc=False):
    """Who holds a name. `whole`: owner and beat are known, too, not only the fence."""

    owner: str
    fence: int
    beat: int
    whole: bool
    presumed: tuple[str, int, int]
    sure: bool
    written: bool = False
    asked: bool = False
    """Whether owner and beat are presumed, too."""


class Known:
    """What this process knows of heads, claims and names. Trusted without a look only while nobody else took a turn."""

    def __init__(self) -> None:
        self.change = -1
        self._since = 0
        self.streams: dict[str, tuple[str, str, int]] = {}
        self._heads: tuple[dict[str, tuple[int, int, int]], ...] = ({}, {}, {})
        self._claims: dict[tuple[int, str], tuple[str, int, int, bool, int]] = {}

    def doubt(self) -> None:
        """Who knows what has happened meanwhile: nothing is sure before the next reply."""
        self.change = -1

    def name(self, stream: str) -> tuple[str, str, int]:
        """Domain, key and slot."""
        found = self.streams.get(stream)
        if found is None:
            domain, _, key = stream.partition("/")
            if len(self.streams) >= _CACHED:
                self.streams.clear()
            found = self.streams[stream] = domain, key, slot_of(key)
        return found

    def head(self, log: int, stream: str, guess: int) -> _Head:
        found = self._heads[log].get(stream)
        if found is None:
            return _Head(guess, 0, guess, False)
        version, position, change = found
        return _Head(version, position, version, change >= self._since)

    def holder(self, log: int, name: str, guess: tuple[str, int, int]) -> _Holder:
        found = self._claims.get((log, name))
        if found is None:
            return _Holder(*guess, False, guess, False)
        owner, fence, beat, whole, change = found
        return _Holder(owner, fence, beat, whole, (owner, fence, beat), change >= self._since)

    def learn(self, draft: Draft, reply: Mapping[str, Any]) -> None:
        """What the server said to a draft: how things stand, and if it was written, how they stand since."""
        latest, well = reply["latest"], reply["well"]
        others, heads = latest != self.change, reply["heads"]
        if latest < self.change:
            # Somebody restored the database under us.
            self._heads, self._claims = ({}, {}, {}), {}
        if others:
            self._since = latest
        self.change = latest + (well and draft.writes)
        for log, streams in enumerate(draft.heads):
            known = self._heads[log]
            if len(known) >= _CACHED:
                known.clear()
            for stream, head in streams.items():
                if well:
                    known[stream] = head.version, heads[log] + head.at if head.at else head.position, self.change
                else:
                    known[stream] = head.presumed, head.position, latest
        for key, holder in draft.holders.items():
            before = self._claims.get(key)
            whole = holder.asked or (before is not None and before[3] and not others)
            if well:
                now = holder.owner, holder.fence, holder.beat
                self._claims[key] = *now, whole or holder.written, self.change
            else:
                self._claims[key] = *holder.presumed, whole, latest
        if not well:
            self._correct(draft, reply, latest)

    def _correct(self, draft: Draft, reply: Mapping[str, Any], latest: int) -> None:
        """What was presumed and is not so."""
        if reply["streams"]:
            presumed = draft.presumed_heads()
            for n, version, position in zip(reply["streams"], reply["versions"], reply["positions"], strict=True):
                log, stream, _ = presumed[n - 1]
                self._heads[log][stream] = version, position, latest
        if reply["claims"]:
            keys = list(draft.holders)
            for n, *claim in zip(reply["claims"], reply["owners"], reply["fences"], reply["beats"], strict=True):
                self._claims[keys[n - 1]] = *claim, True, latest


class Draft:
    """One turn in the making.

    Parameters:
        found: what stands of that which may be repeated, as far as the server was asked already.
    """

    def __init__(self, known: Known, found: Mapping[Asked, list[Found]]) -> None:
        self._known, self._found = known, found
        self.heads: tuple[dict[str, _Head], ...] = ({}, {}, {})
        self.holders: dict[tuple[int, str], _Holder] = {}
        self.asked: dict[Asked, int] = {}
        """What must not stand yet, and how many entries would have to be compared if it does."""
        self.rows: tuple[list[Row], list[Row]] = ([], [])
        self.records: dict[str, Row] = {}
        self.counts = [0, 0, 0]
        self._ids: dict[Asked, int] = {}
        self._indexed = [0, 0]

    @property
    def writes(self) -> bool:
        return bool(any(self.counts) or any(holder.written for holder in self.holders.values()))

    def append(
        self,
        log: int,
        stream: str,
        entries: Sequence[Entry],
        expect: int | None,
        fence: Claim | None,
        repeat: bool,
        also: Sequence[Also] = (),
    ) -> Placed | Appended:
        known = self._known
        if fence is not None and (stands := self._fence(log, fence)) != fence.fence:
            raise Fenced(f"{fence.name} has another holder by now (fence {stands}, ours {fence.fence}): stop writing")
        domain, key, slot = known.streams.get(stream) or known.name(stream)
        head = self.heads[log].get(stream)
        if head is None:
            head = self._head(log, stream, expect or 0)
        if repeat and head.version:
            before = self._repeated(log, stream, head, entries)
            if before is not None:
                return before
        version, at = head.version, self.counts[log]
        if expect is not None and expect != version:
            raise Conflict(stream, expect, version)
        if also:
            self._check(log, also)
        rows: list[Row] = []
        for entry in entries:
            version += 1
            at += 1
            check = digest(entry, version)
            rows.append(
                (log, at, domain, key, version, slot, entry.type, entry.id, entry.raw, entry.wish, entry.body, check)
            )
        self.rows[log].extend(rows)
        head.version, head.at, self.counts[log] = version, at, at
        for each in also:
            self.append(log, each.stream, each.entries, None, None, False)
        return Placed(log, version, at)

    def _check(self, log: int, also: Sequence[Also]) -> None:
        """That all of it can be appended to its streams."""
        for each in also:
            version = (self.heads[log].get(each.stream) or self._head(log, each.stream, each.expect or 0)).version
            if each.expect is not None and each.expect != version:
                raise Conflict(each.stream, each.expect, version)
            for number, entry in enumerate(each.entries, version + 1):
                digest(entry, number)

    def put(self, stream: str, version: int, entry: Entry) -> Placed | Appended:
        known = self._known
        domain, key, slot = known.streams.get(stream) or known.name(stream)
        head = self.heads[RECORDS].get(stream) or self._head(RECORDS, stream, 0)
        if version <= head.version:
            if head.at:
                return Placed(RECORDS, head.version, head.at, True)
            return Appended(head.version, head.position, True)
        check = digest(entry, version)
        self.counts[RECORDS] = at = self.counts[RECORDS] + 1
        # What is put twice in one turn was never there for anybody to see.
        self.records[stream] = (
            RECORDS, at, domain, key, version, slot, entry.type, entry.id, entry.raw, entry.wish, entry.body, check
        )  # fmt: skip
        head.version, head.at = version, at
        return Placed(RECORDS, version, at)

    def claim(self, log: int, name: str, owner: str, over: Claim | None) -> Claim:
        holder = self._holder(log, name, ("", 0, 0))
        if not holder.asked and not holder.written:
            holder.asked = True
            if not holder.whole:
                holder.owner, holder.beat = "", 0
                holder.presumed = ("", holder.presumed[1], 0)
                holder.sure = False
        if holder.owner and (over is None or (over.name, over.fence) != (name, holder.fence)):
            raise Held(
                f"{name} is held by {holder.owner}: wait, or stop it",
                Claim(name, holder.owner, holder.fence, holder.beat),
            )
        self._write(holder, owner, holder.fence + 1, 0)
        return Claim(name, owner, holder.fence)

    def beat(self, log: int, claim: Claim) -> Claim:
        check_claim(claim)
        if self._fence(log, claim) != claim.fence:
            raise Fenced(f"{claim.name} has another holder by now: stop, claim again, read again")
        later = Claim(claim.name, claim.owner, claim.fence, claim.beat + 1)
        self._write(self.holders[log, claim.name], later.owner, later.fence, later.beat)
        return later

    def release(self, log: int, claim: Claim) -> None:
        with suppress(Fenced):
            check_claim(claim)
            if self._fence(log, claim) == claim.fence:
                self._write(self.holders[log, claim.name], "", claim.fence + 1, claim.beat)

    @staticmethod
    def _write(holder: _Holder, owner: str, fence: int, beat: int) -> None:
        holder.owner, holder.fence, holder.beat, holder.whole, holder.written = owner, fence, beat, True, True

    def _fence(self, log: int, claim: Claim) -> int:
        """The fence that stands for a name; 0 if it was never claimed. Raises `Fenced` where it never can be."""
        holder = self.holders.get((log, claim.name))
        if holder is None:
            check_claim(claim)
            holder = self._holder(log, claim.name, ("", claim.fence, 0))
        return holder.fence

    def _holder(self, log: int, name: str, guess: tuple[str, int, int]) -> _Holder:
        holder = self.holders.get((log, name))
        if holder is None:
            holder = self.holders[log, name] = self._known.holder(log, name, guess)
        return holder

    def _head(self, log: int, stream: str, guess: int) -> _Head:
        head = self.heads[log][stream] = self._known.head(log, stream, guess if 0 <= guess < _MOST else 0)
        return head

    def _repeated(self, log: int, stream: str, head: _Head, entries: Sequence[Entry]) -> Placed | Appended | None:
        asked, found = (log, stream, entries[0].id), None
        # What stands is older than what is in this draft.
        if head.presumed:
            found = self._found.get(asked)
            if found is None:
                self.asked[asked] = max(self.asked.get(asked, 0), len(entries))
        if found:
            first = found[0][4]
            rows = [row for row in found if row[4] < first + len(entries)]
            _same(stream, entries, rows)
            return Appended(rows[-1][3], rows[-1][4], True)
        place = self._place(asked)
        if place is None:
            return None
        name = self._known.name(stream)
        drafted = [row for row in self.rows[log][place - 1 : place - 1 + len(entries)] if row[2:4] == name[:2]]
        rows = [(row[6], row[8], row[10] or b"", row[4], row[1]) for row in drafted]
        _same(stream, entries, rows)
        return Placed(log, rows[-1][3], rows[-1][4], True)

    def _place(self, asked: Asked) -> int | None:
        """Where an id was written first in this draft."""
        rows = self.rows[asked[0]]
        for row in rows[self._indexed[asked[0]] :]:
            self._ids.setdefault((row[0], f"{row[2]}/{row[3]}", row[7]), row[1])
        self._indexed[asked[0]] = len(rows)
        return self._ids.get(asked)

    def presumed_heads(self) -> list[tuple[int, str, _Head]]:
        return [(log, stream, head) for log, streams in enumerate(self.heads) for stream, head in streams.items()]

    def arguments(self) -> tuple[Any, ...]:
        """What `take_turn` is called with, from `doubt` on."""
        heads, names = self.presumed_heads(), self._known.name
        holders, written = list(self.holders.items()), [item for item in self.holders.items() if item[1].written]
        streams = [(log, *names(stream)[:2], head.presumed, head.sure) for log, stream, head in heads]
        claims = [
            (log, name, holder.presumed[0], holder.presumed[1], holder.presumed[2] if holder.asked else -1, holder.sure)
            for (log, name), holder in holders
        ]
        doubt = not all(head.sure for _, _, head in heads) or not all(holder.sure for _, holder in holders)
        repeats = [(log, *names(stream)[:2], id) for log, stream, id in self.asked]
        writes = [(log, name, holder.owner, holder.fence, holder.beat) for (log, name), holder in written]
        facts, commands = self.rows
        rows = [*facts, *commands, *self.records.values()] if commands or self.records else facts
        return (
            doubt, *_columns(streams, 5), *_columns(claims, 6), *_columns(repeats, 4), *_columns(writes, 5),
            *_columns(rows, 12), self.counts,
        )  # fmt: skip


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[Sequence[Any]]:
    return list(zip(*rows, strict=True)) if rows else [()] * width


def _same(stream: str, entries: Sequence[Entry], rows: Sequence[Found]) -> None:
    """Raises `IdReused` unless the rows are these entries."""
    if len(rows) != len(entries) or any(
        (entry.type, entry.meta.schema, entry.body) != (row[0], schema_in(row[1]), row[2])
        for entry, row in zip(entries, rows, strict=True)
    ):
        raise IdReused(
            f"{stream} holds id {entries[0].id} with another type, schema or body: use a fresh id for another message"
        )
