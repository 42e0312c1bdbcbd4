"""Permits whose facts come from a file: what `cauce import` brings of another system can be looked at as things.

The file is an event log of a Dutch municipality (receipt phase of an environmental permit, CoSeLoG, J.C.A.M. Buijs,
4TU.ResearchData). It names 27 steps, all of one shape; here two types are enough, and `was=` reads the file's names as
theirs.

```
cauce import receipt.jsonl.gz --domain permits --key case --type type --time time --as permits
cauce history permits permits/case-891
cauce state permits permits/case-891 --at 2010-10-05
```
"""

from datetime import datetime

from cauce import Domain, Event, Record, Service, field, replace

permits = Domain("permits", key="case")

BEGUN = "Confirmation of receipt"
STEPS = (
    "T02 Check confirmation of receipt",
    "T03 Adjust confirmation of receipt",
    "T04 Determine confirmation of receipt",
    "T05 Print and send confirmation of receipt",
    "T06 Determine necessity of stop advice",
    "T07-1 Draft intern advice aspect 1",
    "T07-2 Draft intern advice aspect 2",
    "T07-3 Draft intern advice hold for aspect 3",
    "T07-4 Draft internal advice to hold for type 4",
    "T07-5 Draft intern advice aspect 5",
    "T08 Draft and send request for advice",
    "T09-1 Process or receive external advice from party 1",
    "T09-2 Process or receive external advice from party 2",
    "T09-3 Process or receive external advice from party 3",
    "T09-4 Process or receive external advice from party 4",
    "T10 Determine necessity to stop indication",
    "T11 Create document X request unlicensed",
    "T12 Check document X request unlicensed",
    "T13 Adjust document X request unlicensed",
    "T14 Determine document X request unlicensed",
    "T15 Print document X request unlicensed",
    "T16 Report reasons to hold request",
    "T17 Check report Y to stop indication",
    "T18 Adjust report Y to stop indicition",
    "T19 Determine report Y to stop indication",
    "T20 Print report Y to stop indication",
)


class Permit(Record, domain=permits):
    case: str
    activity: str
    resource: str
    steps: int
    department: str = ""
    channel: str = ""
    responsible: str = ""
    deadline: datetime | None = None
    data: dict[str, str] = field(default_factory=dict)


class ReceiptConfirmed(Event, domain=permits, was=(BEGUN,)):
    case: str
    type: str
    resource: str
    data: dict[str, str]
    case_data: dict[str, str] | None = None


class StepDone(Event, domain=permits, was=STEPS):
    case: str
    type: str
    resource: str
    data: dict[str, str]


service = Service("permits", owns=permits)


@service.evolve
def confirmed(permit: Permit | None, event: ReceiptConfirmed) -> Permit:
    about = event.case_data or {}
    due = about.get("deadline")
    return Permit(
        event.case, event.type, event.resource, 1, about.get("department", ""), about.get("channel", ""),
        about.get("responsible", ""), datetime.fromisoformat(due) if due else None, event.data,
    )  # fmt: skip


@service.evolve
def done(permit: Permit, event: StepDone) -> Permit:
    return replace(
        permit, activity=event.type, resource=event.resource, steps=permit.steps + 1, data=permit.data | event.data
    )
