"""The log seam on SQLite: appends go to the writer thread, reads are short queries on a connection of their own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import apsw

from cauce.accept import check_key, slot_of
from cauce.backends.sqlite.chain import OVERHANG, Chain
from cauce.backends.sqlite.file import translate
from cauce.backends.sqlite.table import Table
from cauce.backends.sqlite.writer import Writer
from cauce.codec import Entry
from cauce.errors import Damaged, Refused
from cauce.log import (
    EVERYTHING,
    Also,
    Appended,
    Claim,
    Filter,
    Page,
    check_append,
    check_filter,
    check_forget,
    check_put,
    old_of,
)

__all__ = ["Reader", "SQLiteLog"]

_POLL = 0.5
_WINDOW = 50_000
_LONGEST = 5_000
_MANY = 500
_SOME = 2_000
_SLOW = 1024 * 1024
_QUESTIONS = 1_000
_END = 2**62
_OVERHEAD = 200
"""About as many bytes as an entry of nothing is worth, in memory and in time."""


class _OnFile:
    """Within it, what goes wrong with a file is told in our errors, and a forked child is refused."""

    def __init__(self, path: Path) -> None:
        self._path, self._pid = path, os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._pid:
            raise Refused(
                f"{self._path} was opened before a fork: close it first, or start the process anew (spawn instead of fork)"
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, apsw.Error):
            raise translate(error, self._path) from error
        if isinstance(error, UnicodeDecodeError):
            raise Damaged(
                f"{self._path}: {error}; run cauce verify, and restore from a backup if it finds damage"
            ) from error


class Reader:
    """The connection that reads, and what it knows of numbers and names. Names are never changed, so they stay right.

    Entered for each look, which sees one state of the file, however many questions it asks: between two states a record
    may move beyond the head and would be found at neither place. A single question sees one state by itself.

    Attributes:
        file: to be entered for such a question.
    """

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self.connection, self.file = connection, _OnFile(path)
        self.streams = _Names(connection, "select name from streams where id = ?")
        self.types = _Names(connection, "select name from types where id = ?")
        self.kinds = _Names(connection, "select domain || '/' || name from types where id = ?")

    def __enter__(self) -> None:
        with self.file:
            self.connection.execute("begin")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.connection.in_transaction:
            self.connection.execute("rollback")
        self.file.__exit__(kind, error, trace)

    def stream(self, name: str) -> int | None:
        row = self.connection.execute("select id from streams where name = ?", (name,)).fetchone()
        return row[0] if row else None

    def types_of(self, domains: frozenset[str], names: frozenset[str]) -> list[int]:
        rows: list[tuple[Any, ...]] = self.connection.execute("select id, domain, name from types").fetchall()
        return [id for id, domain, name in rows if (not domains or domain in domains) and (not names or name in names)]


class _Names(dict[int, str]):
    """Names by number, read when they are first met."""

    def __init__(self, connection: apsw.Connection, query: str) -> None:
        self._connection, self._query = connection, query

    def __missing__(self, id: int) -> str:
        row = self._connection.execute(self._query, (id,)).fetchone()
        name: str = row[0] if row else f"?/{id}"
        if len(self) > 500_000:
            self.clear()
        self[id] = name
        return name


class SQLiteLog:
    """One of the three logs of a file. See `cauce.log.Log` for what each method promises."""

    def __init__(self, id: str, table: Table, writer: Writer, reader: Reader) -> None:
        self._id, self._table, self._writer, self._reader = id, table, writer, reader
        self._waiters: list[tuple[Filter, asyncio.Future[None]]] = []
        self._chain = Chain(reader.connection, table.name)
        self._seen = 0
        self._questions: dict[tuple[Filter, bool], tuple[str, tuple[str, ...], int]] = {}
        self._max = f"select coalesce(max(position), 0) from {table.name}"

    @property
    def id(self) -> str:
        return self._id

    def append(
        self,
        stream: str,
        entries: Sequence[Entry],
        *,
        expect: int | None = None,
        fence: Claim | None = None,
        repeat: bool = False,
        also: Sequence[Also] = (),
    ) -> asyncio.Future[Appended]:
        if self._table.last:
            raise Refused(f"{self._table.name} keeps only the last of each stream: put there, do not append")
        size = check_append(stream, entries, also) + _OVERHEAD * (len(entries) + len(also))
        return self._writer.submit(self._table.append, stream, entries, expect, fence, repeat, also, size=size)

    def put(self, stream: str, version: int, entry: Entry) -> asyncio.Future[Appended]:
        if not self._table.last:
            raise Refused(f"{self._table.name} keeps all of each stream: append there, do not put")
        size = check_put(stream, version, entry)
        return self._writer.submit(self._table.put, stream, version, entry, size=size)

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        page = self._look(filter, after, limit, bodies)
        if page.entries or wait <= 0:
            if len(page.entries) >= _MANY or (filter.stream is None and page.looked - after >= _WINDOW):
                # Who reads on and on gives others their turn on the loop.
                await self._woken(filter, 0)
            return page
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not page.entries and (left := until - loop.time()) > 0:
            # Where much is left to look through, others get their turn on the loop between two looks.
            await self._woken(filter, min(left, _POLL) if page.looked >= self._head() else 0)
            page = self._look(filter, page.looked, limit, bodies)
        return page

    async def claim(self, name: str, owner: str, *, over: Claim | None = None) -> Claim:
        return await self._writer.submit(self._table.claim, check_key(name), check_key(owner), over)

    async def beat(self, claim: Claim) -> Claim:
        return await self._writer.submit(self._table.beat, claim)

    async def release(self, claim: Claim) -> None:
        await self._writer.submit(self._table.release, claim)

    async def head(self) -> int:
        with self._reader:
            return self._head()

    async def forget(self, domain: str, slot: int, upto: int, before: int) -> int:
        check_forget(self._table.name, domain, slot)
        removed = looked = 0
        more = True
        while more:
            gone, looked, more = self._old(domain, slot, looked, upto, before)
            if gone:
                # Too much to be done while the loop stands still.
                removed += await self._writer.submit(self._table.remove, gone, size=_SLOW)
            # Others get their turn on the loop between two looks.
            await self._woken(EVERYTHING, 0)
        return removed

    def _old(
        self, domain: str, slot: int, after: int, upto: int, before: int
    ) -> tuple[list[tuple[int, int]], int, bool]:
        """What may go of the next entries of the log, how far was looked, and whether to look further."""
        with self._reader:
            upto = min(upto, self._head() - 1)
            types = set(self._reader.types_of(frozenset({domain}), frozenset()))
            rows: list[Any] = self._reader.connection.execute(
                "select position, stream, type, meta from commands where position > ? and position <= ? "
                "order by position limit ?",
                (after, upto, _SOME),
            ).fetchall()
        gone, looked, old = old_of(
            ((position, stream % 16 == slot and type in types, raw) for position, stream, type, raw in rows), before
        )
        streams = {position: stream for position, stream, _, _ in rows}
        return [(position, streams[position]) for position in gone], looked, old and len(rows) == _SOME

    def wake(self, rows: list[tuple[Any, ...]] | None) -> None:
        """Wake who waits for one of these rows; None: another process wrote, so whoever waits looks again."""
        if not self._waiters:
            return
        wanted = [each for each in self._waiters if rows is None or self._wants(each[0], rows)]
        for each in wanted:
            if not each[1].done():
                each[1].set_result(None)

    async def _woken(self, filter: Filter, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = asyncio.get_running_loop().call_later(seconds, _done, future)
        waiter = (filter, future)
        self._waiters.append(waiter)
        try:
            await future
        finally:
            timer.cancel()
            self._waiters.remove(waiter)

    def _wants(self, filter: Filter, rows: list[tuple[Any, ...]]) -> bool:
        if filter == EVERYTHING:
            return True
        stream = self._reader.stream(filter.stream) if filter.stream is not None else None
        return any(
            (filter.stream is None or row[1] == stream)
            and (not filter.slots or row[1] % 16 in filter.slots)
            and self._takes(filter, row[4])
            for row in rows
        )

    def _takes(self, filter: Filter, type: int) -> bool:
        domain, _, name = self._reader.kinds[type].partition("/")
        return (not filter.domains or domain in filter.domains) and (not filter.types or name in filter.types)

    def _head(self) -> int:
        row = self._reader.connection.execute(self._max).fetchone()
        return row[0] if row else 0

    def _look(self, filter: Filter, after: int, limit: int, bodies: bool) -> Page:
        if filter.stream is None and limit > 0:
            page = self._next(filter, after, min(limit, _LONGEST), bodies)
            if page.entries:
                return page
            after = page.looked
        with self._reader:
            return self._scan(filter, after, limit, bodies)

    def _next(self, filter: Filter, after: int, limit: int, bodies: bool) -> Page:
        """What comes next, if there is something; else how far it is known that there is nothing.

        Each question lets go of the interpreter, and may wait long until it is given back: so it is one.
        """
        if filter is not EVERYTHING:
            check_filter(filter)
        text, named, window = self._question(filter, bodies)
        until, seen = min(after + window, _END), self._seen
        with self._reader.file:
            rows: list[Any] = self._reader.connection.execute(text, (after, until, *named, limit)).fetchall()
            streams, types = self._reader.streams, self._reader.types
            entries = [
                Entry(position, streams[stream], version, types[type], id, raw, wish, body, digest)
                for position, stream, version, type, id, raw, wish, body, digest, _ in rows
            ]
        if not rows:
            return Page([], max(after, min(until, seen)))
        self._seen = rows[0][-1]
        return Page(entries, entries[-1].position if len(rows) == limit else min(until, self._seen))

    def _question(self, filter: Filter, bodies: bool) -> tuple[str, tuple[str, ...], int]:
        """The text by which a filter asks, what it names, and how far it looks at once."""
        known = self._questions.get((filter, bodies))
        if known is None:
            wanted = [
                (column, sorted(names))
                for column, names in (("domain", filter.domains), ("name", filter.types))
                if names
            ]
            where = " and ".join(f"{column} in ({', '.join('?' * len(names))})" for column, names in wanted)
            where = f" and type in (select id from types where {where})" if where else ""
            if filter.slots:
                where += f" and stream % 16 in ({','.join(map(str, sorted(filter.slots)))})"
            text = (
                f"select {self._columns(bodies)}, (select max(position) from {self._table.name}) from {self._table.name} "
                f"where position > ? and position <= ?{where} order by position limit ?"
            )
            if len(self._questions) >= _QUESTIONS:
                self._questions.clear()
            known = text, tuple(name for _, names in wanted for name in names), _WINDOW if where else _END
            self._questions[filter, bodies] = known
        return known

    def _scan(self, filter: Filter, after: int, limit: int, bodies: bool) -> Page:
        if filter is not EVERYTHING:
            check_filter(filter)
        head = self._seen = self._head()
        limit = min(limit, _LONGEST)
        if head <= after or limit < 1:
            return Page([], after)
        if filter.stream is not None and not self._table.last:
            return self._stream(filter, after, limit, bodies, head)
        until, where, named = head, "", list[int]()
        if filter.stream is not None:
            stream = self._reader.stream(filter.stream)
            if stream is None:
                return Page([], head)
            # No number in the text: it would be parsed anew for each stream.
            where, named = " and stream = ?", [stream]
        elif filter is not EVERYTHING and filter != EVERYTHING:
            until = min(head, after + _WINDOW)
        if filter.domains or filter.types:
            numbers = self._reader.types_of(filter.domains, filter.types)
            where += f" and type in ({','.join(map(str, numbers))})"
        if filter.slots:
            where += f" and stream % 16 in ({','.join(map(str, sorted(filter.slots)))})"
        entries = self._entries(
            f"select {self._columns(bodies)} from {self._table.name} "
            f"where position > ? and position <= ?{where} order by position limit ?",
            (after, until, *named, limit),
        )
        return Page(entries, entries[-1].position if len(entries) == limit else until)

    def _stream(self, filter: Filter, after: int, limit: int, bodies: bool, head: int) -> Page:
        """The entries of one stream, found by their chain."""
        assert filter.stream is not None
        stream = self._reader.stream(filter.stream)
        end, on = (0, False) if stream is None else self._chain.end(stream, after, limit)
        if stream is None or end <= after:
            return Page([], head)
        entries = self._walked(filter.stream, end, after, on, limit, bodies)
        # A pointer is in no digest, so what it leads to is looked at.
        if not entries or (on and len(entries) < limit) or not self._begins(stream, entries[0], after):
            raise Damaged(f"{filter.stream} breaks off behind position {after} of {self._table.name}: run cauce verify")
        looked = entries[-1].position if len(entries) == limit else head
        one = entries[0]
        if (filter.domains and one.domain not in filter.domains) or (
            filter.slots and slot_of(one.key) not in filter.slots
        ):
            return Page([], looked)
        if filter.types:
            entries = [entry for entry in entries if entry.type in filter.types]
        return Page(entries, looked)

    def _walked(self, name: str, end: int, behind: int, on: bool, limit: int, bodies: bool) -> list[Entry]:
        """The first entries behind a position; none where the chain is broken."""
        columns, most = self._columns(bodies), limit + min(limit, OVERHANG)
        if limit >= OVERHANG or not on:
            # Mostly there are no more than that, and then it is quicker.
            entries = self._entries(self._chain.back(columns), (end, behind), most + 1)
            if len(entries) <= most:
                entries.reverse()
                del entries[limit:]
                return entries if _follow(entries, name) else []
        entries = self._entries(self._chain.walk(columns), (end, behind, limit))
        return entries if _follow(entries, name) else []

    def _begins(self, stream: int, entry: Entry, behind: int) -> bool:
        """Whether nothing of the stream can lie between a position and this entry."""
        if entry.version == 1 and not behind:
            return True  # the walk ended where it points at nothing
        previous, before, version = self._chain.before(entry.position)
        if entry.version == 1 or not previous:
            return entry.version == 1 and not previous
        if before is None:
            return self._chain.forgets and 0 < previous < entry.position
        return previous <= behind and (before, version) == (stream, entry.version - 1)

    @staticmethod
    def _columns(bodies: bool) -> str:
        return f"position, stream, version, type, id, meta, {'wish, body' if bodies else 'null, null'}, digest"

    def _entries(self, query: str, values: tuple[int, ...], most: int = _LONGEST) -> list[Entry]:
        streams, types = self._reader.streams, self._reader.types
        rows: Any = self._reader.connection.execute(query, values)
        return [
            Entry(position, streams[stream], version, types[type], id, raw, wish, body, digest)
            for position, stream, version, type, id, raw, wish, body, digest in islice(rows, most)
        ]


def _follow(entries: Sequence[Entry], name: str) -> bool:
    """Whether these are entries of one stream, one after the other."""
    first = entries[0].version if entries else 0
    return {entry.stream for entry in entries} == {name} and [entry.version for entry in entries] == [
        *range(first, first + len(entries))
    ]


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
