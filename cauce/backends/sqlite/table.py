"""One log as a table: the statements, run inside the writer's transaction, and the caches that save most of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, cast

import apsw
import msgspec

from cauce.accept import slot_of
from cauce.backends.sqlite.chain import TAIL, forgotten, last_of, remove, write_chapters, written_upto
from cauce.codec import Entry, digest, schema_in
from cauce.errors import Conflict, Fenced, Held, IdReused
from cauce.log import Also, Appended, Claim, check_claim

__all__ = ["Names", "Table"]

_CACHED = 200_000
_FEW = 400
_TOGETHER = 8
"""Rows that may be looked at, or come up to the next chapters, while the loop stands still."""


class _Head(msgspec.Struct, gc=False):
    """Where a stream stands in one table."""

    version: int = 0
    position: int = 0


class Names:
    """Numbers for streams and types, and the claims: what the three tables of a file share."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.streams: dict[str, tuple[int, dict[str, int]]] = {}
        self.types: dict[str, dict[str, int]] = {}
        self.fences: dict[tuple[str, str], int] = {}
        self._next_stream = 0

    def doubt(self) -> None:
        """Another process has written. Numbers once given stay, but there may be more of them, and other holders."""
        self.fences.clear()
        self._next_stream = 0

    def forget(self) -> None:
        """A transaction was rolled back: nothing remembered may be relied on."""
        self.doubt()
        self.streams.clear()
        self.types.clear()

    def stream(self, name: str) -> tuple[int, dict[str, int]]:
        """The number of a stream, 0 if it has none yet, and the numbers of its domain's types."""
        found = self.streams.get(name)
        if found is None:
            row = self._connection.execute("select id from streams where name = ?", (name,)).fetchone()
            if row is None:
                return 0, {}
            found = self._remember(name, row[0])
        return found

    def _remember(self, name: str, id: int) -> tuple[int, dict[str, int]]:
        if len(self.streams) >= _CACHED:
            self.streams.clear()
        found = self.streams[name] = id, self.types.setdefault(name.partition("/")[0], {})
        return found

    def new_stream(self, name: str) -> tuple[int, dict[str, int]]:
        """A number for a stream that has none. Its last four bits are the slot, so that filters need no join."""
        if not self._next_stream:
            (last,) = self._connection.execute("select coalesce(max(id), 0) from streams").fetchone() or (0,)
            self._next_stream = last // 16 + 1
        id = self._next_stream * 16 + slot_of(name.partition("/")[2])
        self._next_stream += 1
        self._connection.execute("insert into streams values (?, ?)", (id, name))
        return self._remember(name, id)

    def types_of(self, domain: str, entries: Sequence[Entry]) -> list[int]:
        """The numbers of their types, made now if they are new."""
        types = self.types.get(domain, {})
        found = [types.get(entry.type) for entry in entries]
        if None in found:
            return [self.types.get(domain, {}).get(entry.type) or self._type(domain, entry.type) for entry in entries]
        return cast(list[int], found)

    def _type(self, domain: str, name: str) -> int:
        row = self._connection.execute("select id from types where domain = ? and name = ?", (domain, name)).fetchone()
        if row is None:
            row = self._connection.execute(
                "insert into types (domain, name) values (?, ?) returning id", (domain, name)
            ).fetchone()
        assert row is not None
        found: int = row[0]
        self.types.setdefault(domain, {})[name] = found
        return found

    def fence(self, log: str, claim: Claim) -> int:
        """The fence that stands for a name, 0 if it was never claimed. Raises `Fenced` where it never can be."""
        name = claim.name
        found = self.fences.get((log, name))
        if found is None:
            check_claim(claim)
            row = self._connection.execute(
                "select fence from claims where log = ? and name = ?", (log, name)
            ).fetchone()
            found = self.fences[log, name] = row[0] if row else 0
        return found


class Table:
    """One log. Every job (append, put, claim …) returns a verdict, or raises and has then changed nothing."""

    def __init__(self, connection: apsw.Connection, names: Names, name: str, *, last: bool) -> None:
        self._connection, self._names, self.name, self.last = connection, names, name, last
        self._insert = f"insert {'or replace ' if last else ''}into {name} values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._insert_many = self._insert + (_TOGETHER - 1) * ", (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._heads: dict[int, _Head] = {}
        self._forgot = 0
        self._rows: list[tuple[Any, ...]] = []
        self._flushed: list[tuple[Any, ...]] = []
        self._ids: dict[str, int] = {}
        self._chapters = 0
        self.position = -1

    def forget(self) -> None:
        """A transaction was rolled back."""
        self._heads.clear()
        self._rows.clear()
        self._flushed.clear()
        self._ids.clear()
        self.position = -1

    def begin(self, *, others: bool = False) -> None:
        """At the start of a transaction: know where the log ends, and the streams that are not in the chapters yet.

        Parameters:
            others: whether another process may have written since the last transaction.
        """
        full = len(self._heads) >= _CACHED
        if self.position >= 0 and not others and not full:
            return
        position = self._connection.execute(f"select coalesce(max(position), 0) from {self.name}").get
        self._chapters = position if self.last else written_upto(self._connection, self.name)
        forgot = forgotten(self._connection, self.name)
        if self.position < self._chapters or full or forgot != self._forgot:
            # The rows between say too little: a stream may have moved on before them, and its row be gone since.
            self._heads.clear()
            self._know(self._chapters)
        else:
            self._know(self.position)
        self.position, self._forgot = position, forgot

    def _know(self, after: int) -> None:
        """Where the streams stand that have rows behind a position."""
        for position, stream, version in self._connection.execute(
            f"select position, stream, version from {self.name} where position > ? order by position", (after,)
        ):
            self._heads[stream] = _Head(version, position)

    def flush(self) -> None:
        """Write what was queued since the last flush."""
        if self._rows:
            rows = self._rows
            whole = len(rows) - len(rows) % _TOGETHER
            for first in range(0, whole, _TOGETHER):
                self._connection.execute(self._insert_many, tuple(chain.from_iterable(rows[first : first + _TOGETHER])))
            if whole < len(rows):
                self._connection.executemany(self._insert, rows[whole:])
            self._flushed += self._rows
            self._rows = []
            self._ids.clear()
            if not self.last and self.position - self._chapters >= TAIL:
                write_chapters(self._connection, self.name, self.position)
                self._chapters = self.position

    def is_due(self, *, others: bool) -> bool:
        """Whether the next transaction has much to look at, or may have to write the chapters."""
        if self.position < 0 or len(self._heads) >= _CACHED:
            return True
        if others:
            head = self._connection.execute(f"select coalesce(max(position), 0) from {self.name}").get
            if head - self.position > _FEW or forgotten(self._connection, self.name) != self._forgot:
                return True
        return not self.last and self.position - self._chapters >= TAIL - _FEW

    def committed(self) -> list[tuple[Any, ...]]:
        """What the transaction that just ended has written."""
        rows, self._flushed = self._flushed, []
        return rows

    def append(
        self,
        stream: str,
        entries: Sequence[Entry],
        expect: int | None,
        fence: Claim | None,
        repeat: bool,
        also: Sequence[Also] = (),
    ) -> Appended:
        if fence is not None and (stands := self._names.fence(self.name, fence)) != fence.fence:
            raise Fenced(f"{fence.name} has another holder by now (fence {stands}, ours {fence.fence}): stop writing")
        id, types = self._names.streams.get(stream) or self._names.stream(stream)
        head = self._heads.get(id) or self._head(id)
        if repeat and head.version:
            before = self._repeated(stream, id, entries)
            if before is not None:
                return before
        version, previous, position = head.version, head.position, self.position
        if expect is not None and expect != version:
            raise Conflict(stream, expect, version)
        # Whatever can be refused comes first, so that what was refused leaves no name behind.
        checks = [digest(entry, number) for number, entry in enumerate(entries, version + 1)]
        if also:
            self._check(also)
        if len(entries) == 1 and (type := types.get(entries[0].type)):
            numbers = [type]
        else:
            numbers = self._names.types_of(entries[0].domain, entries)
        if not id:
            id = self._new(stream, head)
        rows = []
        for entry, type, check in zip(entries, numbers, checks, strict=True):
            version += 1
            position += 1
            rows.append(
                (position, id, version, previous, type, entry.id, entry.raw, entry.wish, entry.body, check)
            )  # fmt: skip
            previous = position
        self._rows += rows
        head.version, head.position, self.position = version, position, position
        for each in also:
            self.append(each.stream, each.entries, None, None, False)
        return Appended(version, position)

    def _check(self, also: Sequence[Also]) -> None:
        """That all of it can be appended to its streams."""
        for each in also:
            id, _ = self._names.stream(each.stream)
            version = (self._heads.get(id) or self._head(id)).version
            if each.expect is not None and each.expect != version:
                raise Conflict(each.stream, each.expect, version)
            for number, entry in enumerate(each.entries, version + 1):
                digest(entry, number)

    def put(self, stream: str, version: int, entry: Entry) -> Appended:
        id, types = self._names.stream(stream)
        head = self._heads.get(id) or self._head(id)
        if version <= head.version:
            return Appended(head.version, head.position, True)
        check = digest(entry, version)
        type = types.get(entry.type) or self._names.types_of(entry.domain, [entry])[0]
        if not id:
            id = self._new(stream, head)
        position = self.position + 1
        self._rows.append((position, id, version, 0, type, entry.id, entry.raw, entry.wish, entry.body, check))
        head.version, head.position, self.position = version, position, position
        return Appended(version, position)

    def _new(self, stream: str, head: _Head) -> int:
        id, _ = self._names.new_stream(stream)
        self._heads[id] = head
        return id

    def _head(self, id: int) -> _Head:
        if not id:
            return _Head()
        if self.last:
            row = self._connection.execute(
                f"select version, position from {self.name} where stream = ?", (id,)
            ).fetchone()
        else:
            row = last_of(self._connection, self.name, id)
        head = self._heads[id] = _Head(*row) if row else _Head()
        return head

    def _repeated(self, stream: str, id: int, entries: Sequence[Entry]) -> Appended | None:
        first = entries[0].id
        for row in self._rows[len(self._ids) :]:
            self._ids[row[5]] = row[0]
        if first in self._ids:
            self.flush()
        found = self._connection.execute(
            f"select position from {self.name} where id = ? and stream = ? order by position limit 1", (first, id)
        ).fetchone()
        if found is None:
            return None
        rows: list[tuple[Any, ...]] = self._connection.execute(
            # The entries of one append lie side by side.
            f"select f.position, f.version, t.name, f.meta, f.body from {self.name} f join types t on t.id = f.type "
            "where f.position >= ?1 and f.position < ?1 + ?2 and f.stream = ?3 order by f.position",
            (found[0], len(entries), id),
        ).fetchall()
        same = len(rows) == len(entries) and all(
            (entry.type, entry.meta.schema, entry.body) == (row[2], schema_in(row[3]), row[4])
            for entry, row in zip(entries, rows, strict=True)
        )
        if not same:
            raise IdReused(
                f"{stream} holds id {first} with another type, schema or body: use a fresh id for another message"
            )
        return Appended(rows[-1][1], rows[-1][0], True)

    def remove(self, gone: Sequence[tuple[int, int]]) -> int:
        """Remove these entries, each a position and its stream, the first of what is left of that stream."""
        self.flush()
        removed = remove(self._connection, self.name, gone)
        self._heads.clear()
        self._know(self._chapters)
        self._forgot += removed
        return removed

    def claim(self, name: str, owner: str, over: Claim | None) -> Claim:
        row = self._connection.execute(
            "select owner, fence, beat from claims where log = ? and name = ?", (self.name, name)
        ).fetchone()
        stands = Claim(name, *row) if row else Claim(name, "", 0)
        if stands.owner and (over is None or (over.name, over.fence) != (name, stands.fence)):
            raise Held(f"{name} is held by {stands.owner}: wait, or stop it", stands)
        claim = Claim(name, owner, stands.fence + 1)
        self._write_claim(claim)
        return claim

    def beat(self, claim: Claim) -> Claim:
        check_claim(claim)
        if self._names.fence(self.name, claim) != claim.fence:
            raise Fenced(f"{claim.name} has another holder by now: stop, claim again, read again")
        later = Claim(claim.name, claim.owner, claim.fence, claim.beat + 1)
        self._write_claim(later)
        return later

    def release(self, claim: Claim) -> None:
        with suppress(Fenced):
            check_claim(claim)
            if self._names.fence(self.name, claim) == claim.fence:
                self._write_claim(Claim(claim.name, "", claim.fence + 1))

    def _write_claim(self, claim: Claim) -> None:
        self._connection.execute(
            "insert or replace into claims values (?, ?, ?, ?, ?)",
            (self.name, claim.name, claim.owner, claim.fence, claim.beat),
        )
        self._names.fences[self.name, claim.name] = claim.fence
