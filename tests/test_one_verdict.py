"""One verdict for one input: whatever is asked of a log, however hostile, every backend answers as the others do.

Hypothesis makes sequences of calls; each runs on every backend and on the model. `CAUCE_VERDICT_SEED=7` makes other
ones, or repeats those of a failure, which names its seed; `CAUCE_VERDICT_SECONDS=300` makes more of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cauce.accept import APPEND_ENTRIES, ENTRY_BYTES, ID_BYTES
from cauce.backends import Backend, open_backend
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta
from cauce.conformance import HOSTILE, ILLEGAL
from cauce.errors import CauceError, Conflict, Held, Refused
from cauce.log import Appended, Claim, Filter, Page
from tests.conftest import BACKENDS
from tests.log_model import Model, Said, wanted
from tests.servers import on_ci

SEED = int(os.environ.get("CAUCE_VERDICT_SEED", "0" if on_ci() else str(random.SystemRandom().randrange(10**6))))
ROUND = 20
"""Sequences that one seed makes."""

NOBODY = Claim("never claimed", "nobody", 1)
SECONDS = float(os.environ.get("CAUCE_VERDICT_SECONDS", "12"))

# ---------------------------------------------------------------------------------------------------- what is asked


class Append(NamedTuple):
    stream: str
    ids: Sequence[str]
    type: str = "Counted"
    body: bytes = b"{}"
    schema: int = 1
    wish: bytes | None = None
    expect: int | str | None = None  # "right" is the version at which the stream stood before this step
    fence: int | None = None  # which of the claims that were given, counted from the last
    repeat: bool = False
    entry: str | None = None  # for which stream the entries are sealed, if for another


class Put(NamedTuple):
    stream: str
    version: int
    body: bytes = b"{}"
    id: str = "1"
    type: str = "Counted"


class Take(NamedTuple):
    name: str
    owner: str
    over: int | None = None


class Hold(NamedTuple):
    """A beat, or a release, of one of the claims that were given."""

    what: str
    claim: int


class Read(NamedTuple):
    last: bool
    filter: Filter
    after: int = 0
    limit: int = 1000
    bodies: bool = True


class Wrong(NamedTuple):
    """What belongs to the other kind of log."""

    step: Append | Put


Step = Append | Put | Take | Hold | Read | Wrong | list[Append | Put]

KEYS = st.sampled_from(("1", "2", *HOSTILE))
NAMES = st.sampled_from(("Counted", *(each for each in HOSTILE if each == each.strip() and len(each.encode()) <= 128)))
DOMAINS = st.sampled_from(("things", "_things", "t", "thing-s", "x" * 63))
LEGAL = st.builds("{}/{}".format, DOMAINS, KEYS)
STREAMS = [
    "/",
    "/1",
    "things",
    "Things/1",
    "1/1",
    "../1",
    "*/1",
    "$claim/1",
    "_/1",
    "__things/1",
    "things./1",
    "thïngs/1",
]
UNLAWFUL = st.sampled_from(("", "th ings/1", "x" * 64 + "/1", *STREAMS, *(f"things/{key}" for key in ILLEGAL)))
IDS = st.sampled_from(
    (
        *"123456789",
        "01890a5d-ac96-774b-bcce-b302099a8057",
        *HOSTILE,
        *ILLEGAL,
        "x" * ID_BYTES,
        "x" * (ID_BYTES + 1),
        "\u00fc" * ID_BYTES,
    )
)
BODIES = st.sampled_from((b"{}", b"{}", b"[1]", b"", b"null", b'"\\u0000"', b"\xff\x00", b"NaN", b" {} ", "ü".encode()))
SIZES = st.sampled_from((ENTRY_BYTES - 100, ENTRY_BYTES + 1, 1_100_000)).map(lambda size: b"x" * size)
ODD = st.sampled_from((-1, 0, 1, 2, 3, 10**6, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1))


def now_and_then(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 24).flatmap(lambda n: rare if n == 7 else usual)


@st.composite
def sequences(draw: st.DrawFn) -> list[Step]:
    """A few streams, names and ids, often used again; and now and then what no log takes."""
    streams = draw(st.lists(LEGAL, min_size=1, max_size=4, unique=True))
    names = [*draw(st.lists(KEYS, min_size=1, max_size=2, unique=True)), "things/3"]
    ids = draw(st.lists(IDS, min_size=2, max_size=5, unique=True))
    types = draw(st.lists(NAMES, min_size=1, max_size=2, unique=True))
    stream = now_and_then(st.sampled_from(streams), UNLAWFUL)
    name = now_and_then(st.sampled_from(names), st.sampled_from(ILLEGAL))
    type = now_and_then(st.sampled_from(types), st.sampled_from((*ILLEGAL, " a", "a ", "x" * 129)))
    body = now_and_then(BODIES, SIZES)
    which = st.none() | st.integers(0, 3)
    batch = st.lists(st.sampled_from(ids), min_size=1, max_size=3)
    appends = st.builds(
        Append,
        stream,
        now_and_then(batch, st.sampled_from(([], ["1"] * (APPEND_ENTRIES + 1)))),
        type,
        body,
        st.sampled_from((1, 1, 2)),
        st.none() | st.sampled_from((b"", b"{}", b"\xff")),
        st.none() | st.just("right") | now_and_then(st.integers(0, 4), ODD),
        st.none() | which,
        st.booleans(),
        now_and_then(st.none(), stream),
    )
    puts = st.builds(Put, stream, now_and_then(st.integers(1, 5), ODD), body, st.sampled_from(ids), type)
    filters = st.builds(
        Filter,
        st.none() | stream,
        st.frozensets(st.sampled_from(("things", "_things", "t", "nuts")), max_size=2),
        st.frozensets(type, max_size=2),
        st.frozensets(st.integers(0, 15), max_size=12),
    )
    reads = st.builds(Read, st.booleans(), filters, st.just(0), st.integers(1, 9), st.booleans())
    takes = st.builds(Take, name, name, which)
    holds = st.builds(Hold, st.sampled_from(("beat", "release")), st.integers(0, 3))
    wrongs = st.builds(Wrong, appends | puts)
    many = st.lists(appends | puts, min_size=2, max_size=6)
    kinds: list[st.SearchStrategy[Any]] = [appends, appends, appends, many, many, puts, takes, holds, reads, wrongs]
    # From the start there is a holder, and one who was.
    begin: list[Step] = [Take(names[0], "a"), Take(names[0], "b", 0)]
    more: list[Step] = draw(st.lists(st.sampled_from(kinds).flatmap(lambda kind: kind), min_size=1, max_size=14))
    return begin + more


# ------------------------------------------------------------------------------------------------- what is answered


class Side:
    """One backend, and the claims that it gave: numbers are its own, so a claim is told by which one it was."""

    def __init__(self, bus: Backend) -> None:
        self.bus = bus
        self.claims: list[Claim] = []
        self.versions: dict[str, int] = {}

    async def answer(self, step: Step) -> list[Said]:
        if isinstance(step, Read):
            return await self.read(step)
        steps = step if isinstance(step, list) else [step]
        calls = [self.call(each) for each in steps]
        answers = [await verdict(call) for call in calls]
        for each, answer in zip(steps, answers, strict=True):
            if isinstance(each, Append) and isinstance(answer, Appended):
                self.versions[each.stream] = max(answer.version, self.versions.get(each.stream, 0))
        return [self.plain(answer) for answer in answers]

    def call(self, step: Append | Put | Take | Hold | Wrong) -> Awaitable[Any]:
        """What was called, with what it raised at once put off until it is awaited."""
        try:
            return asyncio.ensure_future(self.called(step))
        except CauceError as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future

    def called(self, step: Append | Put | Take | Hold | Wrong) -> Awaitable[Any]:
        facts, records = self.bus.facts, self.bus.records
        match step:
            case Append():
                return facts.append(
                    step.stream,
                    entries_of(step),
                    expect=self.expected(step),
                    fence=self.of(step.fence),
                    repeat=step.repeat,
                )
            case Put():
                return records.put(step.stream, step.version, entry_of(step))
            case Take():
                return facts.claim(step.name, step.owner, over=self.of(step.over))
            case Hold():
                claim = self.of(step.claim) or NOBODY
                return facts.beat(claim) if step.what == "beat" else facts.release(claim)
            case Wrong(Append() as append):
                return records.append(append.stream, entries_of(append))
            case Wrong(put):
                assert isinstance(put, Put)
                return facts.put(put.stream, put.version, entry_of(put))

    def expected(self, step: Append) -> int | None:
        return self.versions.get(step.stream, 0) if isinstance(step.expect, str) else step.expect

    def of(self, which: int | None) -> Claim | None:
        return self.claims[-1 - which] if which is not None and which < len(self.claims) else None

    def plain(self, answer: Any) -> Said:
        match answer:
            case Appended():
                assert answer.position > 0
                return (answer.version, answer.repeated)
            case Claim():
                return ("claim", *self.named(answer))
            case Conflict():
                return (Conflict, answer.stream, answer.expected, answer.actual)
            case Held():
                assert isinstance(answer.claim, Claim)
                return (Held, *self.named(answer.claim))
            case CauceError():
                return (type(answer),)
            case _:
                return (answer,)

    def named(self, claim: Claim) -> tuple[str, str, int]:
        """A claim by its place among those that were given; a new one is put there."""
        known = [(each.name, each.fence) for each in self.claims]
        if (claim.name, claim.fence) not in known:
            assert all(claim.fence > fence for name, fence in known if name == claim.name)
            self.claims.append(claim)
            known.append((claim.name, claim.fence))
        return claim.name, claim.owner, known.index((claim.name, claim.fence))

    async def read(self, step: Read) -> list[Said]:
        log = self.bus.records if step.last else self.bus.facts
        found, looked = list[Said](), step.after
        head = await log.head()
        while True:
            page = await verdict(log.read(step.filter, after=looked, limit=step.limit, bodies=step.bodies))
            if not isinstance(page, Page):
                return [self.plain(page)]
            found += [content(each) for each in page.entries]
            if page.looked >= head:
                return found
            assert page.looked > looked
            looked = page.looked

    async def contents(self) -> list[Said]:
        """All that stands in both logs, and that it is whole."""
        found = list[Said]()
        for last, log in enumerate((self.bus.facts, self.bus.records)):
            found += await self.read(Read(bool(last), Filter()))
            found += [("sound", each.id) for each in (await log.read()).entries if each.checked() is each]
        return found


async def verdict(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except CauceError as error:
        return error


def content(entry: Entry) -> Said:
    return (entry.stream, entry.version, entry.type, entry.id, entry.raw, entry.wish, entry.body)


def entries_of(step: Append) -> list[Entry]:
    stream = step.stream if step.entry is None else step.entry
    meta = msgspec.json.encode(Meta(1, step.schema))
    return [Entry(0, stream, 0, step.type, id, meta, step.wish, step.body, 0) for id in step.ids]


def entry_of(step: Put) -> Entry:
    return Entry(0, step.stream, 0, step.type, step.id, msgspec.json.encode(Meta(1)), None, step.body, 0)


# ----------------------------------------------------------------------------------------------------- what must be


class Reference:
    """The model beside the first backend. What that refuses, the model is not asked: it knows no acceptance rule."""

    def __init__(self, side: Side) -> None:
        self.side, self.model = side, Model()

    def check(self, step: Step, answers: list[Said], expects: list[int | None], fences: list[Claim | None]) -> None:
        if isinstance(step, Wrong):
            assert answers == [(Refused,)]
        elif isinstance(step, Read):
            if answers != [(Refused,)]:
                stand = self.model.records if step.last else self.model.facts
                assert answers == [content(bodiless(each, step)) for each in stand if wanted(step.filter, each)]
        else:
            steps = step if isinstance(step, list) else [step]
            for each, answer, expect, fence in zip(steps, answers, expects, fences, strict=True):
                if answer != (Refused,):
                    assert answer == self.answer(each, answer, expect, fence), each

    def answer(self, step: Append | Put | Take | Hold, answer: Said, expect: int | None, claim: Claim | None) -> Said:
        given = self.side.claims[answer[-1]] if answer[0] == "claim" and isinstance(answer[-1], int) else None
        match step:
            case Append():
                return self.model.append(step.stream, entries_of(step), expect, claim, step.repeat)
            case Put():
                return self.model.put(step.stream, step.version, entry_of(step))
            case Take():
                said = self.model.claim(step.name, given, claim)
            case _:
                claim = claim or NOBODY
                if step.what == "release":
                    self.model.release(claim)
                    return (None,)
                said = self.model.beat(claim, given and msgspec.structs.replace(given, beat=1))
        *kind, last = said
        return (*(kind or ["claim"]), *self.side.named(last)) if isinstance(last, Claim) else said


def bodiless(entry: Entry, step: Read) -> Entry:
    return entry if step.bodies else msgspec.structs.replace(entry, wish=None, body=None)


async def compare(addresses: dict[str, str], steps: list[Step]) -> None:
    buses = {name: await open_backend(address, SystemClock()) for name, address in addresses.items()}
    try:
        sides = {name: Side(bus) for name, bus in buses.items()}
        first = next(iter(sides.values()))
        reference = Reference(first)
        for n, step in enumerate(steps):
            calls = step if isinstance(step, list) else [step]
            expects = [first.expected(each) if isinstance(each, Append) else None for each in calls]
            fences = [first.of(which(each)) for each in calls]
            answers = {name: await side.answer(step) for name, side in sides.items()}
            same(answers, f"step {n}, {step}")
            reference.check(step, next(iter(answers.values())), expects, fences)
        same({name: await side.contents() for name, side in sides.items()}, "what stands in the end")
    finally:
        for bus in buses.values():
            await bus.close()


def which(step: Any) -> int | None:
    match step:
        case Append():
            return step.fence
        case Take():
            return step.over
        case Hold():
            return step.claim
        case _:
            return None


def same(answers: dict[str, list[Said]], what: str) -> None:
    first = next(iter(answers.values()))
    assert all(each == first for each in answers.values()), f"{what}: {answers}"


@pytest.fixture
def fresh(bus_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], dict[str, str]]]:
    """Gives the addresses of an empty bus on each backend, again and again; what the last one left is taken away."""
    servers: dict[str, Any] = {
        name: request.getfixturevalue({"postgresql": "postgres"}.get(name, name))
        for name in BACKENDS
        if name != "sqlite"
    }
    names = [bus_name]

    def next_ones() -> dict[str, str]:
        drop()
        names.append(f"{bus_name}_{len(names)}")
        return {
            name: f"sqlite:///{tmp_path / names[-1]}.db"
            if name == "sqlite"
            else servers[name].url(**{"schema" if name == "postgresql" else "bus": names[-1]})
            for name in BACKENDS
        }

    def drop() -> None:
        for server in servers.values():
            server.drop(names[-1])

    yield next_ones
    drop()


@pytest.mark.timeout(SECONDS + 280)
@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a failure, which it must not hide
def test_one_verdict_for_one_input_on_every_backend(fresh: Callable[[], dict[str, str]]) -> None:
    end, rounds = time.monotonic() + SECONDS, 0
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        # In short rounds: what is made when the time is over takes time, too.
        while time.monotonic() < end:
            compared(SEED + rounds, end, lambda steps: runner.run(compare(fresh(), steps)))
            rounds += 1


def compared(number: int, end: float, compare: Callable[[list[Step]], None]) -> None:
    failed = False

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(sequences())
    def run(steps: list[Step]) -> None:
        nonlocal failed
        # A failure is made small without regard to the time.
        if time.monotonic() > end and not failed:
            return
        try:
            compare(steps)
        except BaseException as error:
            failed = True
            error.add_note(f"CAUCE_VERDICT_SEED={number} repeats this")
            raise

    run()
