"""Commands decided by their owner, by 1, 64 and 1,000 callers, beside plain appends, in one schema.

20,000 things are registered once. Each call changes one of them; the clock stops when the records are written, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks._bus import postgres_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import anywhere

__all__ = ["GOALS", "measure"]

GOALS: dict[str, float] = {}

_CALLERS = (1, 64, 1000)
_RATIOS = [
    Versus(f"pg.call.{callers}.vs_append", f"pg.call.{callers}.ours", f"pg.call.{callers}.append")
    for callers in _CALLERS
]


def measure(run: Run) -> Found:
    ratios = run.wanted(_RATIOS)
    if not ratios:
        return Found()
    with postgres_bus(run.bus) as url:
        run.say("call: registering")
        anywhere.register(url, run.load)
        contenders: dict[str, Contender] = {}
        for callers in _CALLERS:
            for name, work in (("ours", anywhere.call), ("append", anywhere.append)):
                contenders[f"pg.call.{callers}.{name}"] = partial(_turn, partial(work, url, run.load, callers))
        return run.race(contenders, ratios)


def _turn(work: Callable[[float], Sample], turn: Turn) -> Sample:
    return work(turn.seconds)
