"""The desk: what it keeps of the members, by a replica and by a view, and whom it writes to."""

from cauce import Context, Copy, Service, Store
from library.members import EmailChanged, Member, MemberJoined

desk = Service("desk")


class Card(Copy, of=Member):
    member_id: str
    first: str
    last: str


desk.replica(Card)


@desk.view("addresses", schema="create table addresses (member_id text primary key, email text)")
def address(event: MemberJoined | EmailChanged, db: Store) -> None:
    db.execute(
        "insert into addresses values (?, ?) on conflict (member_id) do update set email = excluded.email",
        (event.member_id, event.email),
    )


@desk.on(start="now")
async def welcome(event: MemberJoined, ctx: Context) -> None:
    print(f"to {event.email}: welcome, {event.first}, to {event.branch}")
