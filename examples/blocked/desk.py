"""The desk: shows a user as the owner has them now, and where the owner cannot be asked, as its own copy knows them."""

from cauce import Context, Copy, Domain, Query, Service
from shop.users import User

desk = Domain("desk")


class Page(Query[tuple[str, bool]], domain=desk):
    """The name on a page, and whether it comes from the owner."""

    user_id: str


service = Service("desk", owns=desk)


class Known(Copy, of=User):
    user_id: str
    name: str


service.replica(Known)


@service.answer
async def page(query: Page, ctx: Context) -> tuple[str, bool]:
    user = await ctx.fetch(User, query.user_id, timeout=0.2, fallback=Known)
    return user.name, isinstance(user, User)
