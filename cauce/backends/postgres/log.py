"""The log seam on PostgreSQL: appends go to the writer; reads are one statement each, and so see one state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from cauce.accept import check_key, slot_of
from cauce.backends.postgres.forgetting import forget
from cauce.backends.postgres.link import Link
from cauce.backends.postgres.table import FACTS, LOGS, RECORDS, Draft
from cauce.backends.postgres.writer import Writer
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
)

__all__ = ["PostgresLog"]

_POLL = 0.5
_WINDOW = 50_000
"""Positions that a reader of rare things looks through in one statement."""

_LONGEST = 5_000
_OVERHEAD = 200
"""About as many bytes as an entry of nothing is worth, in memory and in time."""

_PAGED = 1_000


class PostgresLog:
    """One of the three logs of a bus. See `cauce.log.Log` for what each method promises."""

    def __init__(self, id: str, number: int, link: Link, writer: Writer) -> None:
        self._id, self._number, self._link, self._writer = id, number, link, writer
        self._name, self._last = LOGS[number], number == RECORDS
        self._waiters: list[tuple[Filter, asyncio.Future[None]]] = []
        self._paged: dict[tuple[str, int], int] = {}
        self._head = f"select {self._name} as head from turns order by change desc limit 1"
        self._listening = False
        self._seen = 0

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
        if self._last:
            raise Refused(f"{self._name} keeps only the last of each stream: put there, do not append")
        size = check_append(stream, entries, also) + _OVERHEAD * (len(entries) + len(also))
        arguments = (self._number, stream, entries, expect, fence, repeat, also)
        return self._writer.submit(Draft.append, *arguments, id=entries[0].id, size=size)

    def put(self, stream: str, version: int, entry: Entry) -> asyncio.Future[Appended]:
        if not self._last:
            raise Refused(f"{self._name} keeps all of each stream: append there, do not put")
        size = check_put(stream, version, entry)
        return self._writer.submit(Draft.put, stream, version, entry, id=entry.id, size=size)

    async def claim(self, name: str, owner: str, *, over: Claim | None = None) -> Claim:
        arguments = (self._number, check_key(name), check_key(owner), over)
        claim: Claim = await self._writer.submit(Draft.claim, *arguments, id=name)
        return claim

    async def beat(self, claim: Claim) -> Claim:
        later: Claim = await self._writer.submit(Draft.beat, self._number, claim, id=claim.name)
        return later

    async def release(self, claim: Claim) -> None:
        await self._writer.submit(Draft.release, self._number, claim, id=claim.name)

    async def head(self) -> int:
        before = self._seen
        (row,) = await self._link.fetch(self._head)
        return self._later(row["head"], before)

    def _later(self, head: int, before: int) -> int:
        """Where the log ends now. Raises `Damaged` if it ended further on before that was asked."""
        if head < before:
            raise Damaged(
                f"{self._name} of {self._link.url} end at {head}, but had {before} entries while this process ran: the server was put back to "
                "an older state: stop, restore a newer backup, or cauce reset each service"
            )
        self._seen = max(self._seen, head)
        return head

    async def forget(self, domain: str, slot: int, upto: int, before: int) -> int:
        check_forget(self._name, domain, slot)
        return await forget(self._link, domain, slot, min(upto, 2**63 - 1), before)

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        check_filter(filter)
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        if wait > 0 and not self._listening:
            self._listening = True
            self._link.listen(self._name, lambda _: self.wake(None))
        looked = after
        while True:
            # Whoever is told between the look and the wait must not be lost, so the wait begins before the look.
            waiter = (filter, loop.create_future())
            self._waiters.append(waiter)
            try:
                page, head = await self._look(filter, looked, limit, bodies)
                left = until - loop.time()
                if page.entries or left <= 0:
                    return page
                looked = page.looked
                if looked >= head:
                    await _until(waiter[1], min(left, _POLL))
            finally:
                self._waiters.remove(waiter)

    # ------------------------------------------------------------------------------------------------- waking

    def wake(self, draft: Draft | None) -> None:
        """Wake who waits for one of these entries; None: another process wrote, so whoever waits looks again."""
        for filter, future in self._waiters:
            if not future.done() and (draft is None or self._wants(filter, draft)):
                future.set_result(None)

    def _wants(self, filter: Filter, draft: Draft) -> bool:
        rows = draft.records.values() if self._last else draft.rows[self._number]
        if filter == EVERYTHING:
            return bool(rows)
        return any(
            (not filter.domains or row[2] in filter.domains)
            and (not filter.types or row[6] in filter.types)
            and (not filter.slots or row[5] in filter.slots)
            and (filter.stream is None or filter.stream == f"{row[2]}/{row[3]}")
            for row in rows
        )

    # ------------------------------------------------------------------------------------------------ looking

    async def _look(self, filter: Filter, after: int, limit: int, bodies: bool) -> tuple[Page, int]:
        """A page, and where the log ended when it was made."""
        limit = min(limit, _LONGEST)
        if limit < 1:
            return Page([], after), 0
        if filter.stream is not None and not _may_be(filter, filter.stream):
            end = await self.head()
            return Page([], max(end, after)), end
        where, values, window = self._where(filter, after, limit)
        wide, before = "e.wish, e.body" if bodies else "null, null", self._seen
        rows = await self._link.fetch(
            f"""select h.head, e.position, e.domain, e.key, e.version, e.type, e.id, e.meta, {wide}, e.digest
            from ({self._head}) h left join lateral (
                select * from {self._name} f where f.position > $1 and f.position <= {window}{where} limit $2
            ) e on true""",
            after, limit, *values,
        )  # fmt: skip
        head = self._later(rows[0][0], before)
        if head <= after:
            return Page([], after), head
        entries = [_entry(row) for row in rows if row[1] is not None]
        # A stream of commands may begin again at version 1.
        if filter.stream is not None and self._number == FACTS and entries:
            self._remember(filter.stream, entries[-1])
        if len(entries) == limit:
            return Page(entries, entries[-1].position), head
        return Page(entries, min(head, after + _WINDOW) if "least" in window else head), head

    def _where(self, filter: Filter, after: int, limit: int) -> tuple[str, list[Any], str]:
        """What narrows a look, the values for it, and up to which position it goes."""
        where, values = "", list[Any]()

        def bind(condition: str, value: object) -> None:
            nonlocal where
            values.append(value)
            where += f" and {condition.format(f'${len(values) + 2}')}"

        window = "h.head"
        if filter.stream is not None:
            domain, _, key = filter.stream.partition("/")
            bind("f.domain = {}", domain)
            bind("f.key = {}", key)
        elif filter != EVERYTHING:
            window = f"least(h.head, $1 + {_WINDOW})"
            if filter.domains:
                # Not the column itself: the index over domain and key would find all that there ever was.
                bind("f.domain || '' = any({}::text[])", list(filter.domains))
            if filter.slots:
                bind("f.slot = any({}::smallint[])", list(filter.slots))
        if filter.types:
            bind("f.type = any({}::text[])", list(filter.types))
        if filter.stream is None or self._last:
            return f"{where} order by f.position", values, window
        begin = self._paged.get((filter.stream, after))
        if begin is not None:
            bind("f.version > {}", begin)
        else:
            where += (
                f" and f.version > coalesce((select p.version from {self._name} p where p.domain = $3 and p.key = $4"
                " and p.position <= $1 order by p.version desc limit 1), 0)"
            )
        return f"{where} order by f.version", values, window

    def _remember(self, stream: str, last: Entry) -> None:
        """Whoever pages through a long stream need not look for the place again from the end."""
        if len(self._paged) >= _PAGED:
            self._paged.clear()
        self._paged[stream, last.position] = last.version


def _may_be(filter: Filter, stream: str) -> bool:
    domain, _, key = stream.partition("/")
    return (not filter.domains or domain in filter.domains) and (not filter.slots or slot_of(key) in filter.slots)


def _entry(row: Any) -> Entry:
    _, position, domain, key, version, type, id, raw, wish, body, digest = row
    return Entry(position, f"{domain}/{key}", version, type, id, raw, wish, body, digest)


async def _until(future: asyncio.Future[None], seconds: float) -> None:
    """Until it is told, or the time is over."""
    timer = asyncio.get_running_loop().call_later(seconds, _done, future)
    try:
        await future
    finally:
        timer.cancel()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
