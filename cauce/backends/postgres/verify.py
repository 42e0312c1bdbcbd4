"""Whether a bus in PostgreSQL still is what was written: read in one transaction that sees one moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cauce.accept import slot_of
from cauce.backends import nothing_at
from cauce.backends.postgres.faults import translate
from cauce.backends.postgres.forgetting import forgotten
from cauce.backends.postgres.link import Link, Session
from cauce.backends.postgres.migrations import format_of
from cauce.backends.postgres.table import LOGS
from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import NotPermitted, Unavailable
from cauce.verify import Fact, Findings, Repeats, Report, Walk, check_holder

__all__ = ["verify"]

_BYTES = 8 * 1024 * 1024
_FEW, _MANY = 20, 2_000
_ROWS = "select position, domain, key, version, slot, type, id, meta, wish, body, digest from {} order by position"
_HEADS = "select facts, commands, records from turns order by change desc limit 1"
_FACTS = "select position, domain || '/' || key, version, id from facts where position = any($1::bigint[])"
_CLAIMS = "select log, name, owner, fence, beat from claims order by log, name"


async def verify(url: str, clock: Clock) -> Report:
    """Read all of a bus and say what is not as it was written. Writers do not wait for it.

    While it runs the server keeps rows that were replaced since it began. Raises `Refused` where there is no bus,
    `Unreachable` and `NotPermitted`; damage of any kind is a finding.
    """
    link = Link(url, clock)
    await link.open()
    try:
        if await format_of(link) is None:
            raise nothing_at(link.url)
        session = await link.dedicated("verify", default_transaction_read_only="on", lock_timeout="0")
        try:
            with _reached(link):
                # It ends with its session.
                await session.transaction(isolation="repeatable_read", readonly=True).start()
                return await _Search(link, session).run()
        finally:
            session.terminate()
    finally:
        await link.close()


@contextmanager
def _reached(link: Link) -> Iterator[None]:
    """Raises as ours what the server cannot do now, or not for us: whatever it holds is not damaged by that."""
    try:
        yield
    except Exception as error:
        ours = translate(error, link.url)
        if isinstance(ours, (NotPermitted, Unavailable)):
            raise ours from error
        raise


class _Search:
    """One run over one bus, and what it finds."""

    def __init__(self, link: Link, session: Session) -> None:
        self._link, self._session, self._found = link, session, Findings()

    async def run(self) -> Report:
        found, id, heads = self._found, "", (0, 0, 0)
        walks = [Walk(log, found) for log in LOGS]
        with found.step("names"), _reached(self._link):
            id = await self._id()
            heads = await self._heads()
            walks = await self._walks()
            await self._claims()
        for walk, head in zip(walks, heads, strict=True):
            # A page that cannot be read ends the transaction, so that nothing behind it is read either.
            with found.step("structure"), _reached(self._link):
                await self._walk(walk, head, heads[0])
        streams = set[str]().union(*(walk.streams for walk in walks))
        return Report(
            self._link.url, not found.listed, id, {walk.log: walk.count for walk in walks},
            {walk.log: walk.last for walk in walks}, len(streams), found.listed, found.more,
        )  # fmt: skip

    async def _id(self) -> str:
        ids = await self._session.fetch("select id from bus")
        if len(ids) != 1:
            self._found.add("names", f"the bus has {len(ids)} ids, not one")
        return str(ids[0][0]) if ids else ""

    async def _heads(self) -> tuple[int, int, int]:
        row = await self._session.fetchrow(_HEADS)
        if row is None:
            self._found.add("structure", "there is no turn left, so nobody knows where the logs end")
            return 0, 0, 0
        return row[0], row[1], row[2]

    async def _walks(self) -> list[Walk]:
        self._forgot = await forgotten(self._session)
        facts = Walk("facts", self._found)
        # Where they were not counted yet, an older version of Cauce may have removed some.
        commands = Walk("commands", self._found, forgot=self._forgot != 0)
        return [facts, commands, Walk("records", self._found, facts)]

    async def _claims(self) -> None:
        for log, name, owner, fence, beat in await self._session.fetch(_CLAIMS):
            check_holder(LOGS[log] if log in range(len(LOGS)) else str(log), name, owner, fence, beat, self._found)

    async def _walk(self, walk: Walk, head: int, facts: int) -> None:
        async for page in self._pages(walk.log):
            walk.see(page)
            if walk.asked or walk.marks:
                await self._settle(walk, facts)
        walk.ended(head, "the last turn")
        if walk.last > head:
            self._found.add(
                "order", f"{walk.log} go on to position {walk.last}, behind {head} of the last turn", walk.log
            )
        if walk.log == "commands" and self._forgot is not None and walk.missing != self._forgot:
            self._found.add(
                "order",
                f"commands lack {walk.missing} entries, of which {self._forgot} were removed on purpose",
                "commands",
            )
        hashes = walk.twice.found()
        if hashes:
            repeats = Repeats(walk.log, hashes, self._found)
            async for page in self._pages(walk.log, told=True):
                repeats.see(page)

    async def _pages(self, log: str, *, told: bool = False) -> AsyncIterator[Sequence[Entry]]:
        cursor = await self._session.cursor(_ROWS.format(log))
        many = _FEW
        while rows := await cursor.fetch(many):
            yield [self._entry(log, row, told) for row in rows]
            size = sum(len(row[7]) + len(row[9]) + 300 for row in rows) // len(rows)
            many = max(_FEW, min(_MANY, _BYTES // size))

    def _entry(self, log: str, row: Any, told: bool) -> Entry:
        position, domain, key, version, slot, type, id, raw, wish, body, digest = row
        if slot != slot_of(key) and not told:
            self._found.add(
                "names", f"{log} position {position} ({domain}/{key} version {version}) has slot {slot}, not {slot_of(key)}",
                log, position,
            )  # fmt: skip
        return Entry(position, f"{domain}/{key}", version, type, id, raw, wish, body, digest)

    async def _settle(self, walk: Walk, head: int) -> None:
        rows = await self._session.fetch(_FACTS, [upto for _, upto in walk.asked])
        walk.settle({position: Fact(stream, version, id) for position, stream, version, id in rows}, head)
