"""One log as a table: the statements, run inside the writer's transaction, and the caches that save most of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from cauce.accept import check_name, check_stream, slot_of
from cauce.codec import Entry, digest
from cauce.errors import Conflict, Damaged, Fenced, Held, IdReused, Refused
from cauce.log import Appended, Claim

__all__ = ["Names", "Table"]

_CACHED = 200_000


class _Head(msgspec.Struct, gc=False):
    """Where a stream stands in one table, and the type numbers of its domain. `id` 0: it has no number yet.

    `position` is kept where only the last is.
    """

    id: int
    version: int
    position: int
    types: dict[str, int]


class Names:
    """Numbers for streams and types, and the claims: what the three tables of a file share."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.streams: dict[str, int] = {}
        self.types: dict[str, dict[str, int]] = {}
        self.fences: dict[tuple[str, str], int] = {}
        self._next_stream = 0

    def forget(self) -> None:
        """Another process has written, or a transaction was rolled back: nothing remembered may be relied on."""
        self.streams.clear()
        self.types.clear()
        self.fences.clear()
        self._next_stream = 0

    def stream(self, name: str) -> int:
        """The number of a stream, 0 if it has none yet. Raises `Refused` for a name that no log takes."""
        found = self.streams.get(name)
        if found is None:
            row = self._connection.execute("select id from streams where name = ?", (check_stream(name),)).fetchone()
            if row is None:
                return 0
            found = self._remember(name, row[0])
        return found

    def _remember(self, name: str, id: int) -> int:
        if len(self.streams) >= _CACHED:
            self.streams.clear()
        self.streams[name] = id
        return id

    def new_stream(self, name: str) -> int:
        """A number for a stream that has none. Its last four bits are the slot, so that filters need no join."""
        if not self._next_stream:
            (last,) = self._connection.execute("select coalesce(max(id), 0) from streams").fetchone() or (0,)
            self._next_stream = last // 16 + 1
        id = self._next_stream * 16 + slot_of(name.partition("/")[2])
        self._next_stream += 1
        self._connection.execute("insert into streams values (?, ?)", (id, name))
        return self._remember(name, id)

    def type(self, domain: str, name: str) -> int:
        """The number of a type, made now if it is new. Raises `Refused` for a name that no log takes."""
        check_name(name)
        row = self._connection.execute("select id from types where domain = ? and name = ?", (domain, name)).fetchone()
        if row is None:
            row = self._connection.execute(
                "insert into types (domain, name) values (?, ?) returning id", (domain, name)
            ).fetchone()
        assert row is not None
        found: int = row[0]
        self.types.setdefault(domain, {})[name] = found
        return found

    def fence(self, log: str, name: str) -> int:
        """The fence that stands for a name, 0 if it was never claimed."""
        found = self.fences.get((log, name))
        if found is None:
            row = self._connection.execute(
                "select fence from claims where log = ? and name = ?", (log, name)
            ).fetchone()
            found = self.fences[log, name] = row[0] if row else 0
        return found


class Table:
    """One log. Every method but `flush` either returns a verdict or raises, and then has changed nothing."""

    def __init__(self, connection: apsw.Connection, names: Names, name: str, *, last: bool) -> None:
        self._connection, self._names, self.name, self.last = connection, names, name, last
        self._insert = (
            f"insert or replace into {name} values (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            if last
            else f"insert into {name} values (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        self._heads: dict[str, _Head] = {}
        self._rows: list[tuple[Any, ...]] = []
        self._flushed: list[tuple[Any, ...]] = []
        self._ids: dict[str, int] = {}
        self.position = -1

    def forget(self) -> None:
        self._heads.clear()
        self._rows.clear()
        self._flushed.clear()
        self._ids.clear()
        self.position = -1

    def begin(self) -> None:
        """At the start of a transaction: know where the log ends."""
        if self.position < 0:
            (self.position,) = self._connection.execute(
                f"select coalesce(max(position), 0) from {self.name}"
            ).fetchone() or (0,)

    def flush(self) -> None:
        """Write what was queued since the last flush."""
        if self._rows:
            self._connection.executemany(self._insert, self._rows)
            self._flushed += self._rows
            self._rows = []
            self._ids.clear()

    def committed(self) -> list[tuple[Any, ...]]:
        """What the transaction that just ended has written."""
        rows, self._flushed = self._flushed, []
        return rows

    def append(
        self, stream: str, entries: Sequence[Entry], expect: int | None, fence: Claim | None, repeat: bool
    ) -> Appended:
        if fence is not None and self._names.fence(self.name, fence.name) != fence.fence:
            raise Fenced(
                f"{fence.name} has another holder by now (fence {self._names.fence(self.name, fence.name)}, ours {fence.fence}): stop writing"
            )
        head = self._heads.get(stream) or self._head(stream)
        if repeat and head.version:
            before = self._repeated(stream, head, entries)
            if before is not None:
                return before
        version, position, types = head.version, self.position, head.types
        if expect is not None and expect != version:
            raise Conflict(stream, expect, version)
        id = head.id or self._number(stream, head)
        rows = []
        for entry in entries:
            version += 1
            position += 1
            type = types.get(entry.type) or self._names.type(entry.domain, entry.type)
            rows.append(
                (position, id, version, type, entry.id, entry.raw, entry.wish, entry.body, _digest(entry, version))
            )
        self._rows += rows
        head.version, self.position = version, position
        return Appended(version, position)

    def put(self, stream: str, version: int, entry: Entry) -> Appended:
        head = self._heads.get(stream) or self._head(stream)
        if version <= head.version:
            return Appended(head.version, head.position, True)
        type = head.types.get(entry.type) or self._names.type(entry.domain, entry.type)
        id = head.id or self._number(stream, head)
        position = self.position + 1
        self._rows.append(
            (position, id, version, type, entry.id, entry.raw, entry.wish, entry.body, _digest(entry, version))
        )
        head.version, head.position, self.position = version, position, position
        return Appended(version, position)

    def _number(self, stream: str, head: _Head) -> int:
        """Given with the first entry only, so that what was refused leaves no name behind."""
        head.id = self._names.new_stream(stream)
        self._keep(stream, head)
        return head.id

    def _head(self, stream: str) -> _Head:
        id, version, position = self._names.stream(stream), 0, 0
        if id:
            version, position = self._connection.execute(
                f"select version, position from {self.name} where stream = ? order by position desc limit 1", (id,)
            ).fetchone() or (0, 0)
        head = _Head(id, version, position, self._names.types.setdefault(stream.partition("/")[0], {}))
        if id:
            self._keep(stream, head)
        return head

    def _keep(self, stream: str, head: _Head) -> None:
        if len(self._heads) >= _CACHED:
            # Rows that wait to be flushed are known to the caches only.
            self.flush()
            self._heads.clear()
        self._heads[stream] = head

    def _repeated(self, stream: str, head: _Head, entries: Sequence[Entry]) -> Appended | None:
        first = entries[0].id
        for row in self._rows[len(self._ids) :]:
            self._ids[row[4]] = row[0]
        if first in self._ids:
            self.flush()
        found = self._connection.execute(
            f"select position from {self.name} where id = ? and stream = ? order by position limit 1", (first, head.id)
        ).fetchone()
        if found is None:
            return None
        rows: list[tuple[Any, ...]] = self._connection.execute(
            f"select f.position, f.version, t.name, f.meta, f.body from {self.name} f join types t on t.id = f.type "
            "where f.stream = ? and f.position >= ? order by f.position limit ?",
            (head.id, found[0], len(entries)),
        ).fetchall()
        same = len(rows) == len(entries) and all(
            (entry.type, entry.meta.schema, entry.body) == (row[2], _schema(row[3]), row[4])
            for entry, row in zip(entries, rows, strict=True)
        )
        if not same:
            raise IdReused(
                f"{stream} holds id {first} with another type, schema or body: use a fresh id for another message"
            )
        return Appended(rows[-1][1], rows[-1][0], True)

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
        if self._names.fence(self.name, claim.name) != claim.fence:
            raise Fenced(f"{claim.name} has another holder by now: stop, claim again, read again")
        later = Claim(claim.name, claim.owner, claim.fence, claim.beat + 1)
        self._write_claim(later)
        return later

    def release(self, claim: Claim) -> None:
        if self._names.fence(self.name, claim.name) == claim.fence:
            self._write_claim(Claim(claim.name, "", claim.fence + 1))

    def _write_claim(self, claim: Claim) -> None:
        self._connection.execute(
            "insert or replace into claims values (?, ?, ?, ?, ?)",
            (self.name, claim.name, claim.owner, claim.fence, claim.beat),
        )
        self._names.fences[self.name, claim.name] = claim.fence


def _digest(entry: Entry, version: int) -> int:
    try:
        return digest(entry, version)
    except UnicodeEncodeError:
        raise Refused(
            f"id {entry.id!r} in {entry.stream} is no text of Unicode: use an id of the clock, or a derived one"
        ) from None


def _schema(raw: bytes) -> int:
    try:
        return msgspec.json.decode(raw, type=_OnlySchema).schema
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Damaged("an envelope that stands in the way of a repeat cannot be read: run cauce verify") from None


class _OnlySchema(msgspec.Struct):
    schema: int = 1
