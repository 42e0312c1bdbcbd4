"""Commands decided by their owner, by 1, 64 and 1,000 callers, beside plain appends, on one bus.

20,000 things are registered once. Each call changes one of them; the clock stops when the records are written, too.
Flushed stands beside flushed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from benchmarks._bus import NATS, nats_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import anywhere

__all__ = ["GOALS", "measure"]

GOALS: dict[str, float] = {}

_CALLERS = (1, 64, 1000)
_FLUSHED = {"": False, ".flushed": True}


def _ratio(callers: int, end: str) -> Versus:
    name = f"nats.call.{callers}"
    return Versus(f"{name}{end}.vs_append{end.replace('.', '_')}", f"{name}.ours{end}", f"{name}.append{end}")


def measure(run: Run) -> Found:
    contenders, ratios = dict[str, Contender](), list[Versus]()
    with ExitStack() as stack:
        for end, flushed in (_FLUSHED if run.bus == NATS else {"": False}).items():
            wanted = run.wanted(_ratio(callers, end) for callers in _CALLERS)
            if not wanted:
                continue
            ratios += wanted
            url = stack.enter_context(nats_bus(run.bus, run.ground.folder, flushed=flushed))
            run.say("call: registering")
            anywhere.register(url, run.load)
            for callers in _CALLERS:
                for name, work in (("ours", anywhere.call), ("append", anywhere.append)):
                    turn = partial(_turn, partial(work, url, run.load, callers))
                    contenders[f"nats.call.{callers}.{name}{end}"] = turn
        return run.race(contenders, ratios)


def _turn(work: Callable[[float], Sample], turn: Turn) -> Sample:
    return work(turn.seconds)
