"""The loans of a bank, fed line by line: what stands is what the lines say, at any moment, and after any kill."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cauce import Command, Record, Rejected, Service, running
from cauce.backends import look
from cauce.clock import SystemClock
from cauce.folding import fold_of
from cauce.log import Filter
from cauce.messages import declared
from cauce.service import bind
from cauce.testing import given
from loans import applications, offers, outcomes, work
from loans.__main__ import SERVICES, main
from loans.feed import DOMAINS, LogClock, fed, feed
from loans.lines import line

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "bpic2012.jsonl.gz"
real = pytest.mark.skipif(
    not DATA.is_file(), reason="the real event logs lie outside this repository, in ../shared/data, and are not there"
)
MANY = int(os.environ.get("CAUCE_LOANS_LINES", "1000"))
"""How many lines of the real log are fed to each backend; there are 262,200."""
SEED = int(os.environ.get("CAUCE_LOANS_SEED", "2012"))
OWNERS = (
    (applications.service, applications.Application),
    (offers.service, offers.Offer),
    (work.service, work.Work),
)

FIGURES = {"A_DECLINED": 7_635, "A_CANCELLED": 2_807, "A_ACTIVATED": 1_122, "A_REGISTERED": 787, "A_APPROVED": 337}
UNDECIDED = 399
REQUESTED = 177_634_511


def told(case: str, seq: int, minute: int, type: str, stage: str = "COMPLETE", by: str | None = "7") -> str:
    """A line of the shape that the real log has."""
    at = datetime(2020, 5, 1, 9, tzinfo=UTC) + timedelta(minutes=minute)
    about = {"REG_DATE": at.isoformat(), "AMOUNT_REQ": str(1_000 + 500 * int(case))} if not seq else None
    return json.dumps(
        {
            "case": case, "seq": seq, "type": type, "time": at.isoformat(), "lifecycle": stage, "resource": by,
            "data": {}, "case_data": about,
        }
    )  # fmt: skip


A_FEW = [
    told("1", 0, 0, "A_SUBMITTED"),
    told("1", 1, 0, "A_PARTLYSUBMITTED"),
    told("2", 0, 1, "A_SUBMITTED"),
    told("1", 2, 1, "A_PREACCEPTED"),
    told("1", 3, 1, "W_Completeren aanvraag", "SCHEDULE"),
    told("2", 1, 2, "A_PARTLYSUBMITTED"),
    told("3", 0, 2, "A_SUBMITTED", by=None),
    told("2", 2, 2, "A_DECLINED"),
    told("1", 4, 5, "W_Completeren aanvraag", "START", by=None),
    told("1", 5, 9, "A_ACCEPTED"),
    told("1", 6, 9, "O_SELECTED"),
    told("1", 7, 9, "A_FINALIZED"),
    told("1", 8, 9, "O_CREATED"),
    told("1", 9, 9, "O_SENT"),
    told("1", 10, 9, "W_Nabellen offertes", "SCHEDULE"),
    told("1", 11, 9, "W_Completeren aanvraag"),
    told("1", 12, 20, "W_Nabellen offertes", "START"),
    told("1", 13, 21, "O_SENT_BACK"),
    told("1", 14, 21, "W_Nabellen offertes"),
    told("1", 15, 21, "O_ACCEPTED"),
    told("1", 16, 21, "A_APPROVED"),
    told("1", 17, 21, "A_REGISTERED"),
    told("1", 18, 21, "A_ACTIVATED"),
    told("3", 1, 22, "A_PARTLYSUBMITTED"),
]


def of_the_bank(many: int | None = None) -> list[str]:
    with gzip.open(DATA, "rt") as file:
        return list(itertools.islice(file, many))


@pytest.fixture
def log() -> list[str]:
    """The lines of a log, in their order: of the real one, or where that is not there, some of the same shape."""
    return of_the_bank(MANY) if DATA.is_file() else A_FEW


@pytest.fixture
def file(log: list[str], tmp_path: Path) -> Path:
    return written(tmp_path / "log.jsonl.gz", log)


def written(path: Path, log: list[str]) -> Path:
    with gzip.open(path, "wt") as out:
        out.writelines(f"{each.strip()}\n" for each in log)
    return path


# ------------------------------------------------------------------------------ what the lines say, without Cauce


State = dict[str, Any]


def stream_of(line: dict[str, Any]) -> str:
    domain = {"A": "applications", "O": "offers", "W": "work"}[line["type"][0]]
    return f"{domain}/{line['case']}"


def after(line: dict[str, Any], before: State | None) -> State:
    case, type, at = line["case"], line["type"], datetime.fromisoformat(line["time"])
    if type[0] == "A":
        amount = before["amount"] if before else int(line["case_data"]["AMOUNT_REQ"])
        return {"case_id": case, "amount": amount, "step": type, "at": at}
    if type[0] == "O":
        sent = (before["sent"] if before else 0) + (type == "O_SENT")
        return {"case_id": case, "step": type, "sent": sent, "at": at}
    completed = (before["completed"] if before else 0) + (line["lifecycle"] == "COMPLETE")
    return {"case_id": case, "item": type, "stage": line["lifecycle"], "completed": completed, "at": at}


def folded(lines: Iterable[dict[str, Any]]) -> dict[str, State]:
    """How each thing stands after these lines."""
    stands = dict[str, State]()
    for each in lines:
        stream = stream_of(each)
        stands[stream] = after(each, stands.get(stream))
    return stands


def outcome(stands: dict[str, State]) -> tuple[dict[str, int], int]:
    """How many applications stand at each step, and what all of them ask for."""
    loans = [each for stream, each in stands.items() if stream.startswith("applications/")]
    return dict(Counter(each["step"] for each in loans)), sum(each["amount"] for each in loans)


def plain(record: Record | None) -> State | None:
    return None if record is None else msgspec.structs.asdict(record)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- what may follow what


@real
def test_the_tables_are_just_what_is_found_in_the_log() -> None:
    found, last = defaultdict[tuple[str, Any], set[Any]](set), dict[str, Any]()
    for text in of_the_bank():
        line = json.loads(text)
        stream, type = stream_of(line), line["type"]
        step = (type, line["lifecycle"]) if type[0] == "W" else type
        found[stream.partition("/")[0], last.get(stream, ("", "") if type[0] == "W" else "")].add(step)
        last[stream] = step
    table = {("applications", before): after for before, after in applications.FOLLOWS.items()}
    table["applications", ""] = {"A_SUBMITTED"}
    table |= {("offers", before): after for before, after in offers.FOLLOWS.items()}
    tables: dict[tuple[str, Any], set[Any]] = {**table}
    for before, items in work.FOLLOWS.items():
        tables["work", before] = {(item, stage) for item, stages in items.items() for stage in stages.split()}
    assert tables == found


@real
def test_each_line_of_the_log_is_accepted_and_what_stands_then_are_the_known_figures() -> None:
    deciders, folders = dict[type[Command], Callable[..., Any]](), dict[str, Any]()
    for service, _ in OWNERS:
        parts = bind(service)
        folders[service.name] = fold_of(parts, service.owns[0])
        deciders |= {cls: each.part.function for each in parts if each.part.kind == "decide" for cls in each.messages}  # type: ignore[misc]
    texts, stands = of_the_bank(), dict[str, Any]()
    assert len(texts) == 262_200
    for text in texts:
        _, stream, command, *_ = line(text)
        before = stands.get(stream)
        fact = deciders[type(command)](before, command)
        stands[stream] = folders[stream.partition("/")[0]].step(before, fact, 1)
    expected = folded(map(json.loads, texts))
    assert {stream: plain(each) for stream, each in stands.items()} == expected
    steps, requested = outcome(expected)
    assert {step: steps.pop(step) for step in FIGURES} == FIGURES
    assert (sum(steps.values()), requested) == (UNDECIDED, REQUESTED)


AT = datetime(2020, 5, 1, 9, tzinfo=UTC)
SUBMITTED = applications.Submitted("1", 500, AT)
NEVER: list[tuple[Service, list[Any], Command, str]] = [
    (applications.service, [], applications.Advance("1", "A_DECLINED", AT), "A_DECLINED begins no application"),
    (applications.service, [], applications.Advance("1", "A_SUBMITTED", AT), "A_SUBMITTED begins no application"),
    (applications.service, [SUBMITTED], applications.Submit("1", 500, AT), "A_SUBMITTED never follows A_SUBMITTED"),
    (
        applications.service,
        [SUBMITTED, applications.PartlySubmitted("1", AT), applications.Declined("1", AT)],
        applications.Advance("1", "A_ACTIVATED", AT),
        "A_ACTIVATED never follows A_DECLINED",
    ),
    (applications.service, [SUBMITTED], applications.Advance("1", "no step", AT), "no step never follows A_SUBMITTED"),
    (offers.service, [], offers.Advance("1", "O_SENT", AT), "O_SENT begins no offer"),
    (offers.service, [offers.Selected("1", AT)], offers.Advance("1", "O_SENT", AT), "O_SENT never follows O_SELECTED"),
    (work.service, [], work.Complete("1", work.LEADS, AT), "W_Afhandelen leads COMPLETE begins no work"),
    (
        work.service,
        [work.Scheduled("1", work.LEADS, AT)],
        work.Complete("1", work.LEADS, AT),
        "W_Afhandelen leads COMPLETE never follows W_Afhandelen leads SCHEDULE",
    ),
    (work.service, [work.Scheduled("1", work.LEADS, AT)], work.Start("1", "W_x", AT), "W_x START never follows"),
]


@pytest.mark.parametrize(("service", "events", "command", "why"), NEVER, ids=[why for *_, why in NEVER])
def test_what_never_follows_is_rejected(service: Service, events: list[Any], command: Command, why: str) -> None:
    rejection = given(service, *events).when(command).rejection
    assert rejection is not None
    assert rejection.reason.startswith(why)


async def test_a_line_that_may_not_follow_ends_the_feeding_and_is_no_fact(each_bus: str) -> None:
    wrong = [*A_FEW[:3], told("2", 1, 3, "A_ACTIVATED"), told("2", 2, 4, "A_PARTLYSUBMITTED")]
    async with running(*SERVICES, bus=each_bus, clock=LogClock()) as bus:
        with pytest.raises(ExceptionGroup) as raised:
            await feed(bus, map(line, wrong))
        assert raised.group_contains(Rejected, match="A_ACTIVATED never follows A_SUBMITTED")
        assert (await fed(bus))["applications/2"] == 1


# ------------------------------------------------------------------------------------------------ on each backend


async def facts_of(url: str) -> dict[str, list[tuple[str, int, str]]]:
    """By stream: of each of its facts the id of its wish, its time, and who wished it."""
    found = defaultdict[str, list[tuple[str, int, str]]](list)
    async with look(url, SystemClock()) as looked:
        place, head = 0, await looked.facts.head()
        while place < head:
            page = await looked.facts.read(Filter(domains=DOMAINS), after=place, bodies=False)
            for entry in page.entries:
                assert entry.version == len(found[entry.stream]) + 1
                found[entry.stream].append((entry.meta.causation, entry.meta.time, entry.meta.by))
            place = page.looked
    return dict(found)


async def figures(url: str) -> tuple[dict[str, int], int]:
    """What the view says."""
    async with running(outcomes.service, bus=url) as bus:
        await bus.settled(timeout=100)
        return await bus.ask(outcomes.Standing()), await bus.ask(outcomes.Requested())


def test_the_script_feeds_a_log_and_tells_what_became_of_the_loans(
    each_bus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "few.jsonl.gz", A_FEW)
    for many in (len(A_FEW), 0):
        asyncio.run(main(file, each_bus))
        first, *rest = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{many} lines in ")
        assert [each.split() for each in rest] == [
            ["1", "A_ACTIVATED"],
            ["1", "A_DECLINED"],
            ["1", "A_PARTLYSUBMITTED"],
            ["6,000", "asked", "for"],
        ]


_MORTAL_FEED = """
import os, runpy, signal, sys
from loans import feed

wish, left = feed.wish, int(sys.argv.pop())

async def mortal(bus, line):
    global left
    await wish(bus, line)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

feed.wish = mortal
runpy.run_module("loans", run_name="__main__")
"""


def test_a_log_that_is_fed_by_a_process_that_is_killed_twice_is_there_once(
    each_bus: str, file: Path, log: list[str], program: Callable[..., subprocess.Popen[str]]
) -> None:
    lines, there = list(map(json.loads, log)), 0
    for _ in range(2):
        process = program(_MORTAL_FEED, str(file), "--bus", each_bus, str(len(log) // 3))
        assert process.wait(timeout=MANY) == -signal.SIGKILL
        before, there = there, sum(map(len, asyncio.run(facts_of(each_bus)).values()))
        assert before + len(log) // 3 <= there < len(log)
    asyncio.run(main(file, each_bus))
    facts = asyncio.run(facts_of(each_bus))
    expected = defaultdict[str, list[tuple[str, int, str]]](list)
    for each in lines:
        at = datetime.fromisoformat(each["time"]) - datetime(1970, 1, 1, tzinfo=UTC)
        wish = (f"loans/{each['case']}/{each['seq']}", at // timedelta(microseconds=1), each["resource"] or "")
        expected[stream_of(each)].append(wish)
    assert facts == expected
    steps, requested = asyncio.run(figures(each_bus))
    assert (steps, requested) == outcome(folded(lines))
    if len(log) == 262_200:
        assert ({step: steps[step] for step in FIGURES}, requested) == (FIGURES, REQUESTED)


async def test_what_stands_at_a_moment_or_a_version_is_what_the_lines_before_it_say(
    each_bus: str, log: list[str]
) -> None:
    chance, lines = random.Random(SEED), list(map(json.loads, log))
    times = [datetime.fromisoformat(each["time"]) for each in lines]
    cases = sorted({each["case"] for each in lines})
    async with running(*SERVICES, bus=each_bus, clock=LogClock()) as bus:
        assert await feed(bus, map(line, log)) == len(log)
        for _ in range(20):
            # Now and then just at the moment of a line, or just before it.
            at = chance.choice(times) if chance.random() < 0.5 else times[0] + (times[-1] - times[0]) * chance.random()
            at -= timedelta(microseconds=chance.randrange(2))
            stood = folded(each for each, when in zip(lines, times, strict=True) if when <= at)
            about = {stream.partition("/")[2] for stream in stood} or set(cases)
            for case in (chance.choice(sorted(about)), chance.choice(cases)):
                for _, record in OWNERS:
                    stream = f"{declared(record).domain.name}/{case}"
                    assert plain(await bus.state(record, case, at=at)) == stood.get(stream), (SEED, stream, at)
                    of_it = [each for each in lines if stream_of(each) == stream]
                    version = chance.randrange(len(of_it) + 1)
                    then = folded(of_it[:version]).get(stream)
                    assert plain(await bus.state(record, case, at=version)) == then, (SEED, stream, version)


_MORTAL_REBUILD = """
import functools, os, signal, sys
import msgspec
from cauce.cli import main
from loans import outcomes

left = int(sys.argv.pop())

def mortal(function):
    @functools.wraps(function)
    def run(event, db):
        global left
        function(event, db)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return run

parts = outcomes.service.parts
parts[:] = [msgspec.structs.replace(each, function=mortal(each.function)) if each.kind == "view" else each for each in parts]
sys.argv = ["cauce", "rebuild", "loans.outcomes", "loans", "--json", *sys.argv[1:]]
main()
"""


def test_a_rebuild_that_is_killed_changes_no_figure_and_the_next_one_ends_it(
    each_bus: str, file: Path, log: list[str], program: Callable[..., subprocess.Popen[str]]
) -> None:
    asyncio.run(main(file, each_bus))
    expected = outcome(folded(map(json.loads, log)))
    events = sum(each["type"][0] == "A" for each in map(json.loads, log))
    assert program(_MORTAL_REBUILD, "--bus", each_bus, str(events // 2)).wait(timeout=100) == -signal.SIGKILL
    assert asyncio.run(figures(each_bus)) == expected
    out, _ = program(_MORTAL_REBUILD, "--bus", each_bus, "0").communicate(timeout=100)
    assert 0 < json.loads(out)["entries"] <= events
    assert asyncio.run(figures(each_bus)) == expected
