"""Every promise of the log seam holds on every backend, and a log that does nothing keeps none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from cauce import conformance
from cauce.backends import open_backend
from cauce.clock import SystemClock
from cauce.codec import Entry
from cauce.conformance import Keeps, Promise
from cauce.log import EVERYTHING, Also, Appended, Claim, Filter, Log, Page


@pytest.mark.parametrize("promise", conformance.PROMISES, ids=str)
async def test_each_backend_keeps_the_promise_that(promise: Promise, each_bus: str) -> None:
    @asynccontextmanager
    async def open(keeps: Keeps) -> AsyncIterator[Log]:
        bus = await open_backend(each_bus, SystemClock())
        try:
            yield {"all": bus.facts, "undecided": bus.commands, "last": bus.records}[keeps]
        finally:
            await bus.close()

    await promise(open)


@pytest.mark.parametrize("promise", conformance.PROMISES, ids=str)
async def test_a_log_that_does_nothing_breaks_the_promise_that(promise: Promise) -> None:
    @asynccontextmanager
    async def open(keeps: Keeps) -> AsyncIterator[Log]:
        yield Nothing(keeps)

    with pytest.raises(conformance.Broken):
        await promise(open)


class Nothing:
    """Says yes to everything, and keeps nothing."""

    def __init__(self, id: str) -> None:
        self.id = id

    def append(
        self,
        stream: str,
        entries: Sequence[Entry],
        *,
        expect: int | None = None,
        fence: Claim | None = None,
        repeat: bool = False,
        also: Sequence[Also] = (),
    ) -> asyncio.Future[Appended]:
        return self.put(stream, (expect or 0) + len(entries), entries[0] if entries else None)

    def put(self, stream: str, version: int, entry: Entry | None) -> asyncio.Future[Appended]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(Appended(version, 0))
        return future

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        return Page([], after)

    async def claim(self, name: str, owner: str, *, over: Claim | None = None) -> Claim:
        return Claim(name, owner, over.fence + 1 if over else 1)

    async def beat(self, claim: Claim) -> Claim:
        return Claim(claim.name, claim.owner, claim.fence, claim.beat + 1)

    async def release(self, claim: Claim) -> None: ...

    async def head(self) -> int:
        return 0

    async def forget(self, domain: str, slot: int, upto: int, before: int) -> int:
        return 0


def test_the_contract_has_as_many_sentences_as_promises_and_none_twice() -> None:
    names = [promise.name for promise in conformance.PROMISES]
    assert len(names) > 40
    assert len(set(names)) == len(names)
    assert all(promise.why for promise in conformance.PROMISES)
