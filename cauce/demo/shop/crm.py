"""The CRM: CQRS. A view of its own, and for changes the same commander as the web."""

from cauce import Context, Domain, Query, Service, Store
from cauce.demo.shop.users import EmailChanged, UserRegistered

directory = Domain("directory")
service = Service("crm", owns=directory)


class WhoHas(Query[list[str]], domain=directory):
    mail_domain: str


@service.view("directory", schema="create table directory (user_id text primary key, mail_domain text)")
def entry(event: UserRegistered | EmailChanged, db: Store) -> None:
    db.execute(
        "insert into directory values (?, ?) on conflict (user_id) do update set mail_domain = excluded.mail_domain",
        (event.user_id, event.email.split("@")[1]),
    )


@service.answer
async def who_has(query: WhoHas, ctx: Context) -> list[str]:
    rows = await ctx.view("directory").fetch(
        "select user_id from directory where mail_domain = ? order by user_id", (query.mail_domain,)
    )
    return [user_id for (user_id,) in rows]
