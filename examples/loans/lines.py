"""The lines of the bank's log: what each of them wishes, of which thing, by whom and when."""

import gzip
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cauce import Command
from loans import applications, offers, work

STAGES = {"SCHEDULE": work.Schedule, "START": work.Start, "COMPLETE": work.Complete}


class Line(NamedTuple):
    """One line of a case: the wish, of whose stream, by whom, when, and an id that it has each time it is read."""

    case: str
    stream: str
    command: Command
    by: str
    at: datetime
    id: str


def lines(path: Path) -> Iterator[Line]:
    """Each line of a file, plain or gzip, in its order."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(line, file)


def line(text: str) -> Line:
    told: dict[str, Any] = json.loads(text)
    case, at = told["case"], datetime.fromisoformat(told["time"])
    domain, command = _wish(told, at)
    return Line(case, f"{domain}/{case}", command, told["resource"] or "", at, f"loans/{case}/{told['seq']}")


def _wish(told: dict[str, Any], at: datetime) -> tuple[str, Command]:
    case, type = told["case"], told["type"]
    if type == "A_SUBMITTED":
        return "applications", applications.Submit(case, int(told["case_data"]["AMOUNT_REQ"]), at)
    if type.startswith("A_"):
        return "applications", applications.Advance(case, type, at)
    if type.startswith("O_"):
        return "offers", offers.Advance(case, type, at)
    return "work", STAGES[told["lifecycle"]](case, type, at)
