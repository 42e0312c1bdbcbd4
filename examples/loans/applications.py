"""The applications for a loan: ten steps, which of them may follow which, and the service that owns them."""

from datetime import datetime

from cauce import Command, Domain, Event, Record, Rejected, Service, replace

applications = Domain("applications", key="case_id")


class Application(Record, domain=applications):
    case_id: str
    amount: int
    step: str
    at: datetime


class Submitted(Event, domain=applications):
    case_id: str
    amount: int
    at: datetime


class Step(Event):
    """What all later steps say: which application, and when."""

    case_id: str
    at: datetime


class PartlySubmitted(Step, domain=applications): ...


class PreAccepted(Step, domain=applications): ...


class Accepted(Step, domain=applications): ...


class Finalized(Step, domain=applications): ...


class Approved(Step, domain=applications): ...


class Registered(Step, domain=applications): ...


class Activated(Step, domain=applications): ...


class Declined(Step, domain=applications): ...


class Cancelled(Step, domain=applications): ...


Later = PartlySubmitted | PreAccepted | Accepted | Finalized | Approved | Registered | Activated | Declined | Cancelled


class Submit(Command, domain=applications):
    case_id: str
    amount: int
    at: datetime


class Advance(Command, domain=applications):
    """Take the next step, by the name that the bank's log has for it."""

    case_id: str
    step: str
    at: datetime


STEPS: dict[str, type[Step]] = {
    "A_PARTLYSUBMITTED": PartlySubmitted,
    "A_PREACCEPTED": PreAccepted,
    "A_ACCEPTED": Accepted,
    "A_FINALIZED": Finalized,
    "A_APPROVED": Approved,
    "A_REGISTERED": Registered,
    "A_ACTIVATED": Activated,
    "A_DECLINED": Declined,
    "A_CANCELLED": Cancelled,
}

NAMES = {fact: name for name, fact in STEPS.items()}

FOLLOWS = {
    "A_SUBMITTED": {"A_PARTLYSUBMITTED"},
    "A_PARTLYSUBMITTED": {"A_PREACCEPTED", "A_DECLINED", "A_CANCELLED"},
    "A_PREACCEPTED": {"A_ACCEPTED", "A_DECLINED", "A_CANCELLED"},
    "A_ACCEPTED": {"A_FINALIZED", "A_DECLINED", "A_CANCELLED"},
    "A_FINALIZED": {"A_APPROVED", "A_REGISTERED", "A_ACTIVATED", "A_DECLINED", "A_CANCELLED"},
    "A_APPROVED": {"A_REGISTERED", "A_ACTIVATED"},
    "A_REGISTERED": {"A_APPROVED", "A_ACTIVATED"},
    "A_ACTIVATED": {"A_APPROVED", "A_REGISTERED"},
}
"""What was found after what in the log. After the steps that are missing here nothing was."""

service = Service("applications", owns=applications)


@service.decide
def submit(application: Application | None, command: Submit) -> Submitted:
    if application is not None:
        raise Rejected(f"A_SUBMITTED never follows {application.step}")
    return Submitted(command.case_id, command.amount, command.at)


@service.decide
def advance(application: Application | None, command: Advance) -> Step:
    if application is None:
        raise Rejected(f"{command.step} begins no application")
    if command.step not in FOLLOWS.get(application.step, ()):
        raise Rejected(f"{command.step} never follows {application.step}")
    return STEPS[command.step](command.case_id, command.at)


@service.evolve
def submitted(application: Application | None, event: Submitted) -> Application:
    return Application(event.case_id, event.amount, "A_SUBMITTED", event.at)


@service.evolve
def advanced(application: Application, event: Later) -> Application:
    return replace(application, step=NAMES[type(event)], at=event.at)
