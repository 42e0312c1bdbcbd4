"""Feeding a log line by line: many cases at once, each in its order, and each line once, however often it is killed."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta

from cauce import Bus, SystemClock, Unavailable
from cauce.log import Filter
from loans.lines import Line

DOMAINS = frozenset({"applications", "offers", "work"})
CASES = 500
"""So many lines are wished at once, each of another case."""
AHEAD = 5_000
"""So many are read before they are wished, because those of one case lie close together."""
PAUSE = 0.25
"""Seconds, before a line is wished again of somebody who is busy or away."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_moment: ContextVar[int | None] = ContextVar("moment", default=None)


class LogClock(SystemClock):
    """Whoever works on a line is told the moment of that line, all others what time it is.

    The owners run in this process, so a call never leaves its task: facts bear the times of the log, and
    `bus.state(…, at=…)` answers how a thing stood then.
    """

    def now(self) -> int:
        moment = _moment.get()
        return super().now() if moment is None else moment


async def feed(bus: Bus, lines: Iterable[Line]) -> int:
    """Wish each line that is not there yet, and say how many these were.

    Raises a group with `Rejected`, where a line may not follow what stands.
    """
    there, cases, count = await fed(bus), dict[str, deque[Line]](), 0
    ahead, at_once = asyncio.Semaphore(AHEAD), asyncio.Semaphore(CASES)

    async def one_case(case: str) -> None:
        waiting = cases[case]
        async with at_once:
            while waiting:
                await wish(bus, waiting[0])
                waiting.popleft()
                ahead.release()
            del cases[case]

    async with asyncio.TaskGroup() as group:
        for line in lines:
            if there[line.stream]:
                there[line.stream] -= 1
                continue
            await ahead.acquire()
            count += 1
            if line.case not in cases:
                cases[line.case] = deque()
                group.create_task(one_case(line.case))
            cases[line.case].append(line)
    return count


async def fed(bus: Bus) -> Counter[str]:
    """How many lines of each stream are there: each line is one fact."""
    found, looked, head = Counter[str](), 0, await bus.facts.head()
    while looked < head:
        page = await bus.facts.read(Filter(domains=DOMAINS), after=looked, bodies=False)
        found.update(entry.stream for entry in page.entries)
        looked = page.looked
    return found


async def wish(bus: Bus, line: Line) -> None:
    """With its own id it is the same call each time, whatever became of the last."""
    _moment.set((line.at - _EPOCH) // timedelta(microseconds=1))
    while True:
        try:
            await bus.call(line.command, by=line.by, id=line.id)
            return
        except Unavailable:
            await bus.clock.sleep(PAUSE)
