"""The work that a bank does for an application: items that are scheduled, started and completed, and their owner."""

from datetime import datetime

from cauce import Command, Domain, Event, Record, Rejected, Service

work = Domain("work", key="case_id")

LEADS = "W_Afhandelen leads"
APPLICATION = "W_Completeren aanvraag"
OFFERS = "W_Nabellen offertes"
VALIDATION = "W_Valideren aanvraag"
DOSSIER = "W_Nabellen incomplete dossiers"
FRAUD = "W_Beoordelen fraude"
CONTRACT = "W_Wijzigen contractgegevens"


class Work(Record, domain=work):
    """The last that was done for a case; `completed` counts what was."""

    case_id: str
    item: str
    stage: str
    completed: int
    at: datetime


class Scheduled(Event, domain=work):
    case_id: str
    item: str
    at: datetime


class Started(Event, domain=work):
    case_id: str
    item: str
    at: datetime


class Completed(Event, domain=work):
    case_id: str
    item: str
    at: datetime


class Schedule(Command, domain=work):
    case_id: str
    item: str
    at: datetime


class Start(Command, domain=work):
    case_id: str
    item: str
    at: datetime


class Complete(Command, domain=work):
    case_id: str
    item: str
    at: datetime


FOLLOWS: dict[tuple[str, str], dict[str, str]] = {
    ("", ""): {LEADS: "SCHEDULE", APPLICATION: "SCHEDULE", FRAUD: "SCHEDULE"},
    (LEADS, "SCHEDULE"): {LEADS: "START", FRAUD: "COMPLETE"},
    (LEADS, "START"): {LEADS: "COMPLETE", APPLICATION: "SCHEDULE", FRAUD: "SCHEDULE"},
    (LEADS, "COMPLETE"): {LEADS: "START COMPLETE", APPLICATION: "SCHEDULE START", FRAUD: "START"},
    (APPLICATION, "SCHEDULE"): {LEADS: "START COMPLETE", APPLICATION: "START COMPLETE", FRAUD: "COMPLETE"},
    (APPLICATION, "START"): {APPLICATION: "START COMPLETE", OFFERS: "SCHEDULE", FRAUD: "SCHEDULE"},
    (APPLICATION, "COMPLETE"): {APPLICATION: "START COMPLETE", OFFERS: "SCHEDULE START COMPLETE", FRAUD: "START"},
    (OFFERS, "SCHEDULE"): {APPLICATION: "COMPLETE", OFFERS: "COMPLETE"},
    (OFFERS, "START"): {OFFERS: "SCHEDULE COMPLETE", VALIDATION: "SCHEDULE"},
    (OFFERS, "COMPLETE"): {APPLICATION: "START", OFFERS: "START COMPLETE", VALIDATION: "START COMPLETE", CONTRACT: "SCHEDULE"},
    (VALIDATION, "SCHEDULE"): {OFFERS: "COMPLETE", VALIDATION: "START", DOSSIER: "COMPLETE", FRAUD: "COMPLETE"},
    (VALIDATION, "START"): {VALIDATION: "COMPLETE", DOSSIER: "SCHEDULE", FRAUD: "SCHEDULE"},
    (VALIDATION, "COMPLETE"): {OFFERS: "START", VALIDATION: "START COMPLETE", DOSSIER: "SCHEDULE START", FRAUD: "SCHEDULE START", CONTRACT: "SCHEDULE"},
    (DOSSIER, "SCHEDULE"): {VALIDATION: "START COMPLETE", DOSSIER: "COMPLETE"},
    (DOSSIER, "START"): {VALIDATION: "SCHEDULE", DOSSIER: "SCHEDULE START COMPLETE"},
    (DOSSIER, "COMPLETE"): {VALIDATION: "START", DOSSIER: "START COMPLETE", CONTRACT: "SCHEDULE"},
    (FRAUD, "SCHEDULE"): {LEADS: "COMPLETE", APPLICATION: "COMPLETE", VALIDATION: "COMPLETE", FRAUD: "START"},
    (FRAUD, "START"): {LEADS: "SCHEDULE", APPLICATION: "SCHEDULE", VALIDATION: "SCHEDULE", FRAUD: "COMPLETE"},
    (FRAUD, "COMPLETE"): {LEADS: "SCHEDULE START", APPLICATION: "SCHEDULE START", VALIDATION: "SCHEDULE START", FRAUD: "START"},
    (CONTRACT, "SCHEDULE"): {OFFERS: "START", VALIDATION: "START", CONTRACT: "SCHEDULE"},
}  # fmt: skip
"""What was found in the log after a stage of an item, and first (`""`): items, and the stages of each."""

service = Service("work", owns=work)


def check(before: Work | None, item: str, stage: str) -> None:
    """Raises `Rejected` for a stage of an item that was never found there."""
    last = ("", "") if before is None else (before.item, before.stage)
    if stage not in FOLLOWS[last].get(item, "").split():
        raise Rejected(f"{item} {stage} never follows {' '.join(last)}" if before else f"{item} {stage} begins no work")


@service.decide
def schedule(before: Work | None, command: Schedule) -> Scheduled:
    check(before, command.item, "SCHEDULE")
    return Scheduled(command.case_id, command.item, command.at)


@service.decide
def start(before: Work | None, command: Start) -> Started:
    check(before, command.item, "START")
    return Started(command.case_id, command.item, command.at)


@service.decide
def complete(before: Work | None, command: Complete) -> Completed:
    check(before, command.item, "COMPLETE")
    return Completed(command.case_id, command.item, command.at)


@service.evolve
def scheduled(before: Work | None, event: Scheduled) -> Work:
    return Work(event.case_id, event.item, "SCHEDULE", before.completed if before else 0, event.at)


@service.evolve
def started(before: Work, event: Started) -> Work:
    return Work(event.case_id, event.item, "START", before.completed, event.at)


@service.evolve
def completed(before: Work, event: Completed) -> Work:
    return Work(event.case_id, event.item, "COMPLETE", before.completed + 1, event.at)
