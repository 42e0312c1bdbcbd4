"""A question to another process and its answer, by one caller, beside bare notifications there and back."""

from __future__ import annotations

from benchmarks._bus import postgres_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus, by_median
from benchmarks.contenders import asking, notify

__all__ = ["GOALS", "measure"]

GOALS: dict[str, float] = {}

_RATIOS = [Versus("pg.ask.two_processes_p50.vs_bare_notify", "pg.ask.ours", "pg.ask.bare_notify", by_median)]


def measure(run: Run) -> Found:
    def ours(turn: Turn) -> Sample:
        with postgres_bus(run.bus) as url:
            return asking.ask(url, turn.seconds)

    def bare(turn: Turn) -> Sample:
        with postgres_bus(run.bus) as url:
            return notify.ask(url, turn.seconds)

    contenders: dict[str, Contender] = {"pg.ask.ours": ours, "pg.ask.bare_notify": bare}
    return run.race(contenders, run.wanted(_RATIOS))
