"""Commands that are decided and old, removed: looked for page by page, and taken out in turns of their own."""

from __future__ import annotations

from typing import Any

from cauce.backends.postgres.link import Link
from cauce.backends.postgres.migrations import lock_number
from cauce.log import old_of

__all__ = ["FORGOTTEN", "forget", "forgotten"]

_SOME = 2_000
# Of a page of the log what is in the slot, and the last, which says how old the page is.
_NEXT = """
    with page as materialized (
        select c.position, c.domain, c.slot, c.meta from commands c where c.position > $1
        and c.position <= least($2, (select t.commands - 1 from turns t order by t.change desc limit 1))
        order by c.position limit $3
    ), ends as (select count(*) as many, max(position) as last from page)
    select p.position, p.domain = $4 and p.slot = $5, p.meta, e.many from page p, ends e
    where (p.domain = $4 and p.slot = $5) or p.position = e.last order by p.position"""
# A turn that writes nothing, so that whoever was sure how streams stand looks again. It bears the count of all that was
# removed, and is void, so that it is kept until the next one.
_COUNT = "select max(turn) from turns where writer = $1"
_MISSING = """
    select (select t.commands from turns t order by t.change desc limit 1) - (select count(*) from commands)"""
_TURN = """
    insert into turns (change, writer, turn, facts, commands, records, void)
    select t.change + 1, $1, $2, t.facts, t.commands, t.records, true from turns t order by t.change desc limit 1"""
_LAST = "delete from turns where writer = $1 and turn < $2"
_REMOVE = "delete from commands where position = any($1::bigint[]) returning position"

FORGOTTEN = "forgotten"
"""Whose turns count what was removed on purpose."""


async def forget(link: Link, domain: str, slot: int, upto: int, before: int) -> int:
    """See `cauce.log.Log.forget`. Where a reply was lost, what it removed is not counted."""
    removed, looked, more = 0, 0, True
    while more:
        rows = await link.fetch(_NEXT, looked, upto, _SOME, domain, slot)
        gone, looked, old = old_of(((position, own, raw) for position, own, raw, _ in rows), before)
        more = old and rows[-1][3] == _SOME
        if gone:
            removed += await _remove(link, gone)
    return removed


async def _remove(link: Link, gone: list[int]) -> int:
    lock = lock_number(link.schema)

    async def work(session: Any) -> int:
        async with session.transaction():
            await session.execute(f"select pg_advisory_xact_lock({lock})")
            before = await session.fetchval(_COUNT, FORGOTTEN)
            if before is None:
                before = await session.fetchval(_MISSING)
            removed = len(await session.fetch(_REMOVE, gone))
            if removed:
                await session.execute(_TURN, FORGOTTEN, before + removed)
                await session.execute(_LAST, FORGOTTEN, before + removed)
            return removed

    return await link.again(work)


async def forgotten(session: Any) -> int | None:
    """How many commands were removed on purpose; None where that was never counted."""
    count: int | None = await session.fetchval(_COUNT, FORGOTTEN)
    return count
