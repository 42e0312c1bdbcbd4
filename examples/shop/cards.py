"""The cards: event-carried state transfer. Its own copy of three fields lets it work while users is down."""

from cauce import Command, Context, Copy, Domain, Event, Record, Rejected, Service
from shop.users import User

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


service = Service("cards", owns=cards)


class Holder(Copy, of=User):
    user_id: str
    name: str
    address: str


service.replica(Holder)


@service.decide
async def issue(card: Card | None, command: IssueCard, ctx: Context) -> CardIssued:
    if card is not None:
        raise Rejected("already issued")
    holder = await ctx.get(Holder, command.user_id)
    if holder is None:
        raise Rejected("unknown user")
    return CardIssued(command.card_id, holder.user_id, holder.name)


@service.evolve
def issued(card: Card | None, event: CardIssued) -> Card:
    return Card(event.card_id, event.user_id, event.name)
