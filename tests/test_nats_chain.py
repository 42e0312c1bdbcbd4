"""Entries that go to NATS as a chain, of which only the last is answered, or where nobody looked before."""

from __future__ import annotations

import asyncio

import pytest

from cauce.backends import nats as backend
from cauce.backends.nats import NatsBus
from cauce.backends.nats.chain import Pace
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
