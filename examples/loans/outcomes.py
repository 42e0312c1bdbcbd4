"""What became of the loans: a view of the applications, and the questions that it answers."""

from cauce import Context, Domain, Query, Service, Store
from loans.applications import NAMES, Later, Submitted

outcomes = Domain("outcomes")
service = Service("outcomes", owns=outcomes)


class Standing(Query[dict[str, int]], domain=outcomes):
    """How many applications stand at each step."""


class Requested(Query[int], domain=outcomes):
    """How much is asked for in all of them together."""


@service.view("loans", schema="create table loans (case_id text primary key, amount bigint, step text)")
def submitted(event: Submitted, db: Store) -> None:
    db.execute("insert into loans values (?, ?, 'A_SUBMITTED')", (event.case_id, event.amount))


@service.view("loans")
def advanced(event: Later, db: Store) -> None:
    db.execute("update loans set step = ? where case_id = ?", (NAMES[type(event)], event.case_id))


@service.answer
async def standing(query: Standing, ctx: Context) -> dict[str, int]:
    rows = await ctx.view("loans").fetch("select step, count(*) from loans group by step order by step")
    return dict(rows)


@service.answer
async def requested(query: Requested, ctx: Context) -> int:
    ((total,),) = await ctx.view("loans").fetch("select coalesce(sum(amount), 0) from loans")
    return int(total)
