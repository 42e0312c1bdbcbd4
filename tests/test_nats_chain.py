"""Entries that go to NATS as a chain, of which only the last is answered, or where nobody looked before."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from cauce.accept import slot_of
from cauce.backends import nats as backend
from cauce.backends.nats import NatsBus
from cauce.backends.nats.chain import Pace
from cauce.backends.nats.heads import Heads
from cauce.backends.nats.link import Link
from cauce.backends.nats.stream import Stream
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Conflict
from cauce.log import Appended

CLOCK = SystemClock()


def fact(stream: str) -> Entry:
    return sealed(stream, "Counted", CLOCK.id(), Meta(CLOCK.now()), b"{}")


async def told(bus: NatsBus, streams: list[str], expect: int | None) -> list[Appended | BaseException]:
    """The verdicts of one entry for each stream, all under way at once."""
    entries = [(stream, fact(stream)) for stream in streams]
    return await asyncio.gather(
        *(bus.facts.append(stream, [entry], expect=expect) for stream, entry in entries), return_exceptions=True
    )


@pytest.mark.parametrize("expect", [1, None])
async def test_a_chain_that_another_writer_broke_stands_once_and_each_has_its_own_verdict(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch, expect: int | None
) -> None:
    monkeypatch.setattr(Pace, "chains", lambda _, count: True)
    streams = [f"things/{n}" for n in range(6)]
    one, other = await backend.open(nats_bus), await backend.open(nats_bus)
    assert [each.version for each in await told(one, streams, 0) if isinstance(each, Appended)] == [1] * 6
    await other.facts.append("things/2", [fact("things/2")])
    verdicts = await told(one, streams, expect)
    taken = [each for each in verdicts if isinstance(each, Appended)]
    if expect is None:
        assert [each.version for each in taken] == [2, 2, 3, 2, 2, 2]
    else:
        assert isinstance(verdicts[2], Conflict)
        assert [each.version for each in taken] == [2] * 5
    assert not any(each.repeated for each in taken)
    assert taken == sorted(taken, key=lambda each: each.position)
    page = await other.facts.read(after=7)
    assert [(each.position, each.checked().version) for each in page.entries] == [
        (each.position, each.version) for each in taken
    ]
    await one.close()
    await other.close()


async def test_what_another_wrote_into_a_log_that_was_empty_when_it_was_opened_is_seen(nats_bus: str) -> None:
    one, other = await backend.open(nats_bus), await backend.open(nats_bus)
    entry = fact("things/1")
    first = await other.facts.append("things/1", [entry])
    assert await one.facts.append("things/1", [entry], repeat=True) == Appended(1, first.position, True)
    assert (await one.facts.append("things/1", [fact("things/1")], expect=1)).version == 2
    await other.facts.append("things/2", [fact("things/2")])
    with pytest.raises(Conflict):
        await one.facts.append("things/2", [fact("things/2")], expect=0)
    await one.close()
    await other.close()


async def test_where_many_streams_end_is_asked_at_once_when_a_log_is_opened_again(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [f"things/{n}" for n in range(40)]
    one = await backend.open(nats_bus)
    await told(one, streams, None)
    await one.close()

    async def last_of(stream: Stream, subject: str) -> None:
        raise AssertionError(f"{subject} was looked for alone")

    monkeypatch.setattr(Stream, "last_of", last_of)
    again = await backend.open(nats_bus)
    verdicts = await told(again, [*streams, "things/new", "things/Ünïcode *.>"], None)
    assert [each.version for each in verdicts if isinstance(each, Appended)] == [2] * 40 + [1, 1]
    await again.close()


# ------------------------------------------------------------------------------- what the end of a slot does not show


@pytest.mark.parametrize("when", ["before the slot", "between slot and stream", "after both"])
async def test_what_another_writes_while_ends_are_looked_up_comes_before_or_is_refused_and_leaves_no_version_twice(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    one, other = await backend.open(nats_bus), await backend.open(nats_bus)
    claim = await one.facts.claim("things/1", "one")
    stream = next(f"things/{n}" for n in range(100) if slot_of(str(n)) == 1)
    await one.facts.append(stream, [fact(stream)], fence=claim)
    one.facts._heads.forget([])
    last, load, meddled = Heads.last, Heads.load, list[str]()

    async def meddle(heads: Heads, now: str) -> None:
        if heads is one.facts._heads and now == when and not meddled:
            meddled.append(now)
            await other.facts.append(stream, [fact(stream)])

    async def last_after(self: Heads, subject: str) -> int:
        if subject.endswith(">"):
            await meddle(self, "before the slot")
        return await last(self, subject)

    async def load_after(self: Heads, subjects: Collection[str]) -> None:
        await meddle(self, "between slot and stream")
        await load(self, subjects)
        await meddle(self, "after both")

    monkeypatch.setattr(Heads, "last", last_after)
    monkeypatch.setattr(Heads, "load", load_after)
    verdicts = await asyncio.gather(*(one.facts.append(stream, [fact(stream)], fence=claim) for _ in range(3)))
    assert meddled == [when]
    assert [each.version for each in verdicts] == [3, 4, 5]
    entries = (await other.facts.read()).entries
    assert [each.version for each in entries] == [1, 2, 3, 4, 5]
    await one.close()
    await other.close()


async def test_who_takes_a_slot_again_knows_of_no_stream_in_it_what_was_known_before(nats_bus: str) -> None:
    one, other = await backend.open(nats_bus), await backend.open(nats_bus)
    stream, fresh = [f"things/{n}" for n in range(200) if slot_of(str(n)) == 1][:2]
    claim = await one.facts.claim("things/1", "one")
    await one.facts.append(stream, [fact(stream)], fence=claim)
    await one.facts.release(claim)
    theirs = await other.facts.claim("things/1", "other")
    for each in (stream, fresh):
        await other.facts.append(each, [fact(each)], fence=theirs)
    await other.facts.release(theirs)
    again = await one.facts.claim("things/1", "one")
    with pytest.raises(Conflict):
        await one.facts.append(fresh, [fact(fresh)], fence=again, expect=0)
    for each, version in ((stream, 3), (fresh, 2)):
        assert (await one.facts.append(each, [fact(each)], fence=again)).version == version
    await one.close()
    await other.close()


async def test_many_on_one_stream_whose_answer_comes_late_stand_once_and_are_found_in_few_questions(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await backend.open(nats_bus)
    claim = await bus.facts.claim("things/1", "one")
    stream = next(f"things/{n}" for n in range(100) if slot_of(str(n)) == 1)
    next_of, asked, late = Stream.next_of, list[str](), [0.001, 0.001]

    async def counted(self: Stream, *subject: Any) -> Any:
        asked.append(str(subject))
        return await next_of(self, *subject)

    monkeypatch.setattr(Stream, "next_of", counted)
    monkeypatch.setattr(Link, "turn", property(lambda _: late.pop() if late else 5.0))
    verdicts = await asyncio.gather(*(bus.facts.append(stream, [fact(stream)], fence=claim) for _ in range(400)))
    assert [each.version for each in verdicts] == list(range(1, 401))
    assert [each.version for each in (await bus.facts.read(limit=1000)).entries] == list(range(1, 401))
    assert len(asked) < 10
    assert not late
    await bus.close()


def chained(pace: Pace, message: float, batch: float) -> float:
    """The share of chains among groups of 64, of which each fiftieth takes twenty times as long."""
    taken = 0
    for group in range(2000):
        long = 1 if (group + 1) % 50 else 20
        if pace.chains(64):
            taken += 1
            pace.chain(64, 64 * message * long)
        else:
            pace.batch(64, batch * long)
    return taken / 2000


def test_what_is_faster_is_found_and_found_again_when_it_changes() -> None:
    pace = Pace()
    assert chained(pace, 20e-6, 6e-3) > 0.95
    assert chained(pace, 300e-6, 6e-3) < 0.05
    assert chained(pace, 20e-6, 6e-3) > 0.9
