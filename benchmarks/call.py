"""Commands decided by their owner, by 1, 64 and 1,000 callers, beside plain appends and the `eventsourcing` library.

20,000 things are registered. Each call changes one of them, so that each makes a fact and, sooner or later, a record;
the clock stops when the records are written, too. All is measured on a log that holds nothing else, and on one with
2,000,000 events more about 400,000 things, of which the 20,000 are a part; the lesser ratio counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks._load import Load
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import ours, peer

__all__ = ["GOALS", "measure"]

GOALS = {
    "call.1.vs_append": 0.6,
    "call.64.vs_append": 0.5,
    "call.1000.vs_append": 0.4,
    "call.64.vs_eventsourcing": 6.0,  # half of what a plain append must reach
}

_CALLERS = (1, 64, 1000)
_RATIOS = (
    *(Versus(f"call.{callers}.vs_append", f"call.{callers}.ours", f"call.{callers}.append") for callers in _CALLERS),
    Versus("call.64.vs_eventsourcing", "call.64.ours", "call.eventsourcing"),
)
_SPREAD = 20


def measure(run: Run) -> Found:
    ratios = run.wanted(_RATIOS)
    found = Found()
    threads = 1
    if any("eventsourcing" in each.name for each in ratios):
        run.say("call: looking for the best number of threads of eventsourcing")
        base = run.ground.made("aggregates.empty", partial(_theirs, Load(run.load.things, 0)))
        threads = peer.best(
            lambda threads: peer.call(run.ground.copy(base, threads), run.load, threads, run.seconds / 4)
        )
        found.settings["eventsourcing call"] = f"{threads} threads, all aggregates in its cache"
    contenders: dict[str, Contender] = {}
    for fill, load in (("empty", Load(run.load.things, 0)), ("full", run.load)):
        for callers in _CALLERS:
            contenders |= {
                f"call.{callers}.ours.{fill}": _on(
                    run, f"calls.{fill}", partial(_ours, load), partial(ours.call, callers=callers)
                ),
                f"call.{callers}.append.{fill}": _on(
                    run, f"appends.{fill}", partial(_ours, load), partial(ours.append, callers=callers)
                ),
            }
        contenders[f"call.eventsourcing.{fill}"] = _on(
            run, f"aggregates.{fill}", partial(_theirs, load), partial(peer.call, threads=threads)
        )
    found.add(run.race(contenders, ratios, ("empty", "full")))
    return found


def _on(run: Run, name: str, make: Callable[[Path], None], work: Callable[..., Sample]) -> Contender:
    def contender(turn: Turn) -> Sample:
        return work(run.ground.copy(run.ground.made(name, make), turn.round), run.load, seconds=turn.seconds)

    return contender


def _ours(load: Load, path: Path) -> None:
    ours.register(path, load)
    if load.events:
        ours.prefill(path, load, _SPREAD)
        ours.catch_up(path)


def _theirs(load: Load, path: Path) -> None:
    peer.register(path, load)
    if load.events:
        peer.prefill(path, load, _SPREAD)
