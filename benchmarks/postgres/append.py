"""Durable appends by 1, 64 and 1,000 callers, beside the `eventsourcing` library in the same database.

Each turn begins with a schema of its own.
"""

from __future__ import annotations

from functools import partial

from benchmarks._bus import postgres_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import anywhere, peer_postgres

__all__ = ["GOALS", "measure"]

GOALS = {"pg.append.64.vs_eventsourcing": 20.0}

_CALLERS = (1, 64, 1000)
_RATIOS = [
    Versus(f"pg.append.{callers}.vs_eventsourcing", f"pg.append.{callers}.ours", "pg.append.eventsourcing")
    for callers in _CALLERS
]


def measure(run: Run) -> Found:
    ratios, found = run.wanted(_RATIOS), Found()
    place, way = partial(postgres_bus, run.bus), peer_postgres.WAYS[0]
    if ratios:
        run.say("append: looking for the best way of eventsourcing")
        way = peer_postgres.best(
            peer_postgres.WAYS, lambda url, way: peer_postgres.append(url, run.load, way, run.seconds / 4), place
        )
        found.settings["eventsourcing append"] = f"{way[0]} threads" + (", functions in the database" if way[1] else "")

    def ours(turn: Turn, callers: int) -> Sample:
        with place() as url:
            return anywhere.append(url, run.load, callers, turn.seconds)

    def theirs(turn: Turn) -> Sample:
        with place() as url:
            return peer_postgres.append(url, run.load, way, turn.seconds)

    contenders: dict[str, Contender] = {
        "pg.append.1.ours": partial(ours, callers=1),
        "pg.append.eventsourcing": theirs,
        "pg.append.64.ours": partial(ours, callers=64),
        "pg.append.1000.ours": partial(ours, callers=1000),
    }
    found.add(run.race(contenders, ratios))
    return found
