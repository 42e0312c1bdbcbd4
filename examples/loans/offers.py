"""The offers that a bank makes to whoever applied: seven steps, which of them may follow which, and their owner."""

from datetime import datetime

from cauce import Command, Domain, Event, Record, Rejected, Service

offers = Domain("offers", key="case_id")


class Offer(Record, domain=offers):
    """How far the offers of one case are; `sent` counts them."""

    case_id: str
    step: str
    sent: int
    at: datetime


class Step(Event):
    """What each step says: which case, and when."""

    case_id: str
    at: datetime


class Selected(Step, domain=offers): ...


class Created(Step, domain=offers): ...


class Sent(Step, domain=offers): ...


class SentBack(Step, domain=offers): ...


class Accepted(Step, domain=offers): ...


class Declined(Step, domain=offers): ...


class Cancelled(Step, domain=offers): ...


AnyStep = Selected | Created | Sent | SentBack | Accepted | Declined | Cancelled


class Advance(Command, domain=offers):
    """Take the next step, by the name that the bank's log has for it."""

    case_id: str
    step: str
    at: datetime


STEPS: dict[str, type[Step]] = {
    "O_SELECTED": Selected,
    "O_CREATED": Created,
    "O_SENT": Sent,
    "O_SENT_BACK": SentBack,
    "O_ACCEPTED": Accepted,
    "O_DECLINED": Declined,
    "O_CANCELLED": Cancelled,
}

NAMES = {fact: name for name, fact in STEPS.items()}

FOLLOWS = {
    "": {"O_SELECTED"},
    "O_SELECTED": {"O_CREATED", "O_CANCELLED"},
    "O_CREATED": {"O_SENT"},
    "O_SENT": {"O_SENT_BACK", "O_ACCEPTED", "O_DECLINED", "O_CANCELLED", "O_SELECTED"},
    "O_SENT_BACK": {"O_ACCEPTED", "O_DECLINED", "O_CANCELLED", "O_SELECTED"},
    "O_CANCELLED": {"O_SELECTED", "O_CREATED"},
}
"""What was found after what in the log, and first (`""`). After the steps that are missing here nothing was."""

service = Service("offers", owns=offers)


@service.decide
def advance(offer: Offer | None, command: Advance) -> Step:
    last = "" if offer is None else offer.step
    if command.step not in FOLLOWS.get(last, ()):
        raise Rejected(f"{command.step} never follows {last}" if last else f"{command.step} begins no offer")
    return STEPS[command.step](command.case_id, command.at)


@service.evolve
def advanced(offer: Offer | None, event: AnyStep) -> Offer:
    sent = (offer.sent if offer else 0) + isinstance(event, Sent)
    return Offer(event.case_id, NAMES[type(event)], sent, event.at)
