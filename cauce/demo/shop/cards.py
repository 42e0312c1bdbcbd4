"""The cards: event-carried state transfer. Their own copy of the users lets them work while users is down."""

from cauce import Command, Context, Copy, Domain, Event, Query, Record, Rejected, Service
from cauce.demo.shop.users import User

cards = Domain("cards", key="card_id")


class Card(Record, domain=cards):
    card_id: str
    user_id: str
    name: str


class CardIssued(Event, domain=cards):
    card_id: str
    user_id: str
    name: str


class IssueCard(Command, domain=cards):
    card_id: str
    user_id: str


class Holder(Copy, of=User):
    user_id: str
    name: str
    email: str


class Holders(Query[list[Holder]], domain=cards):
    """Whom the cards know."""


service = Service("cards", owns=cards)
service.replica(Holder)


@service.decide
async def issue(card: Card | None, command: IssueCard, ctx: Context) -> CardIssued:
    if card is not None:
        raise Rejected(f"card {command.card_id} is already issued")
    holder = await ctx.get(Holder, command.user_id)
    if holder is None:
        raise Rejected(f"there is no user {command.user_id}")
    return CardIssued(command.card_id, holder.user_id, holder.name)


@service.evolve
def issued(card: Card | None, event: CardIssued) -> Card:
    return Card(event.card_id, event.user_id, event.name)


@service.answer
async def holders(query: Holders, ctx: Context) -> list[Holder]:
    return await ctx.find(Holder)
