"""SQLite against a plain model: whatever is done in whatever order, both answer the same."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cauce.backends import sqlite
from cauce.backends.sqlite import chain, table
from cauce.codec import Entry, Meta, sealed
from cauce.errors import CauceError, Conflict, Held
from cauce.log import Also, Appended, Claim, Filter, Log, Page
from tests.log_model import Model, Said, wanted

STREAMS = ("apples/1", "apples/2", "pears/1", "pears/*", "plums/a.b")
TYPES = ("Picked", "Eaten")


def some(values: tuple[Any, ...]) -> st.SearchStrategy[frozenset[Any]]:
    return st.frozensets(st.sampled_from(values), max_size=2)


streams = st.sampled_from(STREAMS)
handles = st.integers(0, 1)
filters = st.builds(Filter, st.none() | streams, some(("apples", "pears", "nuts")), some(TYPES), some(tuple(range(16))))
ids = st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True)
expects = st.sampled_from(("any", "any", "right", "right", "wrong"))
fences = st.sampled_from(("none", "none", "none", "standing", "stale"))
appends = st.tuples(streams, ids, st.integers(0, 9), expects, fences, st.booleans())


class SQLiteAndTheModel(RuleBasedStateMachine):
    """Two handles on one file, as two processes would have, and the model."""

    @initialize(tail=st.sampled_from((3, 10, chain.TAIL)), bits=st.sampled_from((0, 1, chain.CHAPTER_BITS)))
    def begin(self, tail: int, bits: int) -> None:
        # With short chapters, often written, a few entries go all the ways that millions go.
        self.patches = ExitStack()
        self.patches.enter_context(patch.object(table, "TAIL", tail))
        self.patches.enter_context(patch.object(chain, "CHAPTER_BITS", bits))
        self.folder = Path(tempfile.mkdtemp(prefix="cauce-model-"))
        self.runner = asyncio.Runner()
        self.model = Model()
        self.buses = [self.runner.run(self.open()) for _ in range(2)]
        self.heads = [0, 0]
        self.held: dict[str, list[Claim]] = {"a": [], "b": []}
        # From the start there is a holder, and one who was.
        self.claim(0, "a", "x", 0)
        self.claim(1, "a", "y", 1)

    async def open(self) -> sqlite.SQLiteBus:
        return await sqlite.open(self.folder / "bus.db")

    def teardown(self) -> None:
        if hasattr(self, "patches"):
            self.patches.close()
        if hasattr(self, "buses"):
            for bus in self.buses:
                self.runner.run(bus.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    def said(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await self.verdict(call())

        return self.runner.run(run())

    @staticmethod
    async def verdict(call: Awaitable[Any]) -> Any:
        try:
            return await call
        except CauceError as error:
            return error

    @staticmethod
    def plain(answer: Any) -> Said:
        match answer:
            case Appended():
                return (answer.version, answer.repeated)
            case Conflict():
                return (Conflict, answer.stream, answer.expected, answer.actual)
            case Held():
                return (Held, answer.claim)
            case CauceError():
                return (type(answer),)
            case _:
                return (answer,)

    # ------------------------------------------------------------------------------------------------ what is done

    @rule(handle=handles, batch=st.lists(appends, min_size=1, max_size=6))
    def append(self, handle: int, batch: list[Any]) -> None:
        """As many as the batch holds at once: they share a turn, and each has its own verdict."""
        calls = [self.prepared(n, *each) for n, each in enumerate(batch)]

        async def run() -> list[Any]:
            futures = [
                self.buses[handle].facts.append(stream, entries, expect=expect, fence=fence, repeat=repeat, also=also)
                for stream, entries, expect, fence, repeat, also in calls
            ]
            return await asyncio.gather(*(self.verdict(future) for future in futures))

        answers = self.runner.run(run())
        assert [self.plain(answer) for answer in answers] == [self.model.append(*call) for call in calls]
        done = [answer.position for answer in answers if isinstance(answer, Appended) and not answer.repeated]
        assert done == sorted(set(done))
        assert not done or done[0] > self.heads[0]
        self.heads[0] = len(self.model.facts)

    def prepared(
        self, early: int, stream: str, ids: list[int], salt: int, expect: str, fence: str, repeat: bool
    ) -> tuple[str, list[Entry], int | None, Claim | None, bool, list[Also]]:
        """The salt makes one in five bodies other than the id would have it, and half of them write to others, too."""
        at = len(self.model.of(stream))
        entries = [
            sealed(stream, TYPES[id % 2], f"id-{id}", Meta(1 + salt, 1 + (salt == 9)), b'{"n":%d}' % (id + (salt == 8)))
            for id in ids
        ]
        claims = [claim for each in self.held.values() for claim in each]
        stale = [claim for claim in claims if self.model.fence(claim.name) != claim.fence]
        standing = [claim for claim in claims if self.model.fence(claim.name) == claim.fence]
        by = {"none": [], "standing": standing, "stale": stale}[fence]
        wants = {"any": None, "right": at if not early else None, "wrong": at + 1 + salt}[expect]
        return stream, entries, wants, by[salt % len(by)] if by else None, repeat, self.also(early, stream, ids, salt)

    def also(self, early: int, stream: str, ids: list[int], salt: int) -> list[Also]:
        found = list[Also]()
        for n, other in enumerate(each for each in STREAMS if each != stream):
            if salt % 2 or ids[0] % 4 < n:
                break
            at = len(self.model.of(other))
            expect = {0: None, 2: at + 1}.get(salt) if early or salt in (0, 2) else at
            entries = [sealed(other, TYPES[id % 2], f"id-{id}", Meta(1 + salt), b'{"n":%d}' % id) for id in ids]
            found.append(Also(other, entries, expect))
        return found

    @rule(handle=handles, stream=streams, version=st.integers(1, 12), body=st.sampled_from((b"", b"{}", b"[1]")))
    def put(self, handle: int, stream: str, version: int, body: bytes) -> None:
        entry = sealed(stream, TYPES[version % 2], f"id-{version}", Meta(version), body)
        answer = self.said(lambda: self.buses[handle].records.put(stream, version, entry))
        assert self.plain(answer) == self.model.put(stream, version, entry)
        if answer.repeated:
            assert answer.position <= self.heads[1]
        else:
            assert answer.position > self.heads[1]
            self.heads[1] = answer.position

    @rule(handle=handles, name=st.sampled_from("ab"), owner=st.sampled_from("xy"), which=st.integers(0, 3))
    def claim(self, handle: int, name: str, owner: str, which: int) -> None:
        claims = self.held[name]
        over = claims[-which] if 0 < which <= len(claims) else None
        answer = self.said(lambda: self.buses[handle].facts.claim(name, owner, over=over))
        given = answer if isinstance(answer, Claim) else None
        assert self.plain(answer) == self.model.claim(name, given, over)
        if given is not None:
            assert (given.name, given.owner) == (name, owner)
            claims.append(given)

    @rule(handle=handles, name=st.sampled_from("ab"), which=st.integers(1, 2))
    def beat(self, handle: int, name: str, which: int) -> None:
        if len(claims := self.held[name]) >= which:
            answer = self.said(lambda: self.buses[handle].facts.beat(claims[-which]))
            later = answer if isinstance(answer, Claim) else None
            assert self.plain(answer) == self.model.beat(claims[-which], later)
            claims[-which] = later or claims[-which]

    @rule(handle=handles, name=st.sampled_from("ab"), which=st.integers(1, 2))
    def release(self, handle: int, name: str, which: int) -> None:
        if len(claims := self.held[name]) >= which:
            assert self.said(lambda: self.buses[handle].facts.release(claims[-which])) is None
            self.model.release(claims[-which])

    @rule(handle=handles)
    def reopen(self, handle: int) -> None:
        id = self.buses[handle].facts.id
        self.runner.run(self.buses[handle].close())
        self.buses[handle] = self.runner.run(self.open())
        assert self.buses[handle].facts.id == id

    # ------------------------------------------------------------------------------------------------ what is read

    @rule(handle=handles, last=st.booleans(), filter=filters, limit=st.integers(1, 9), bodies=st.booleans())
    def read(self, handle: int, last: bool, filter: Filter, limit: int, bodies: bool) -> None:
        log: Log = self.buses[handle].records if last else self.buses[handle].facts
        stand = self.model.records if last else self.model.facts
        found = self.runner.run(self.pages(log, filter, limit, bodies))
        wish = [entry for entry in stand if wanted(filter, entry)]
        if not bodies:
            wish = [msgspec.structs.replace(entry, wish=None, body=None) for entry in wish]
        assert [msgspec.structs.replace(entry, position=0, digest=0) for entry in found] == wish
        positions = [entry.position for entry in found]
        assert positions == sorted(set(positions))
        if bodies:
            assert [entry.checked() for entry in found] == found

    async def pages(self, log: Log, filter: Filter, limit: int, bodies: bool) -> list[Entry]:
        found, looked, head = list[Entry](), 0, await log.head()
        while looked < head:
            page: Page = await log.read(filter, after=looked, limit=limit, bodies=bodies)
            assert len(page.entries) <= limit
            assert looked < page.looked <= head
            found, looked = found + page.entries, page.looked
        return found

    @invariant()
    def the_heads_are_what_was_last_told(self) -> None:
        for bus in getattr(self, "buses", []):
            assert [self.runner.run(log.head()) for log in (bus.facts, bus.records)] == self.heads


TestSQLiteAnswersAsTheModelDoes = SQLiteAndTheModel.TestCase
TestSQLiteAnswersAsTheModelDoes.settings = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
