"""A clock that is set back changes no order: versions, places, views and replicas go by positions, never by times."""

from __future__ import annotations

from cauce import running
from cauce.backends import read_all
from cauce.clock import SystemClock, uuid7
from cauce.codec import Entry
from cauce.log import Filter
from tests.kept import rows
from tests.test_reset import EFFECTS, Grow, Thing, grow_all, keeper, owner, reacting, small, sums

HOURS = 3_600_000_000


class Wrong(SystemClock):
    """The real clock, wrong by so many microseconds; its ids follow it, as those of a process that has just begun."""

    wrong = 0

    def now(self) -> int:
        return super().now() + self.wrong

    def id(self) -> str:
        return uuid7(self.now() * 4096 // 1000, round(self.random() * 2**61))


async def test_a_clock_that_goes_back_two_hours_between_appends_changes_no_order(each_bus: str) -> None:
    said, clock = list[tuple[str, int]](), Wrong()
    facts = list[Entry]()
    async with running(owner, keeper(), reacting(said), bus=each_bus, clock=clock) as bus:
        await grow_all(bus, "a", "b")
        clock.wrong = -2 * HOURS
        await grow_all(bus, "a", "c")
        await bus.send(Grow("b"))
        await bus.settled()
        await bus.settled()
        assert (await sums(bus), await small(bus, "a")) == ({"a": 2, "b": 2, "c": 1}, 2)
    # A second start, by which time it is later, or earlier still.
    for wrong in (0, -5 * HOURS):
        clock.wrong = wrong
        async with running(owner, keeper(), reacting(said), bus=each_bus, clock=clock) as bus:
            await grow_all(bus, "a")
            state = await bus.state(Thing, "a")
            assert state is not None
            record = await bus.record(Thing, "a")
            assert record == state
            facts = (await bus.facts.read(Filter("things/a"))).entries
            assert await sums(bus) == {"a": len(facts), "b": 2, "c": 1}
            assert await small(bus, "a") == state.n == len(facts)
    assert [entry.version for entry in facts] == [1, 2, 3, 4]
    assert sorted(entry.position for entry in facts) == [entry.position for entry in facts]
    times = [entry.meta.time for entry in facts]
    assert times[3] < times[1] < times[0] < times[2], "the clock was set back"
    # In order per thing; things of two slots are handled side by side.
    assert [[n for name, n in said if name == each] for each in "abc"] == [[1, 2, 3, 4], [1, 2], [1]]
    effects = await rows(each_bus, "keeper", EFFECTS, "select name, n from effects")
    assert sorted(effects) == sorted(said)
    assert (await read_all(each_bus, SystemClock())).ok
