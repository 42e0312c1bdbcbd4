"""From append to a handler whose place is committed, by 64 publishers, beside `eventsourcing` in the same database."""

from __future__ import annotations

from functools import partial

from benchmarks._bus import postgres_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import anywhere, peer_postgres

__all__ = ["GOALS", "measure"]

GOALS = {"pg.deliver.64.vs_eventsourcing": 5.0}

_RATIOS = [Versus("pg.deliver.64.vs_eventsourcing", "pg.deliver.64.ours", "pg.deliver.eventsourcing")]


def measure(run: Run) -> Found:
    ratios, found = run.wanted(_RATIOS), Found()
    place, way = partial(postgres_bus, run.bus), peer_postgres.FOLLOWING[0]
    if ratios:
        run.say("deliver: looking for the best runner of eventsourcing")
        way = peer_postgres.best(
            peer_postgres.FOLLOWING, lambda url, way: peer_postgres.deliver(url, run.load, way, run.seconds / 4), place
        )
        found.settings["eventsourcing deliver"] = f"{way[1]} saving threads, followed {way[0]}"

    def ours(turn: Turn) -> Sample:
        with place() as url:
            return anywhere.deliver(url, run.load, 64, turn.seconds)

    def theirs(turn: Turn) -> Sample:
        with place() as url:
            return peer_postgres.deliver(url, run.load, way, turn.seconds)

    contenders: dict[str, Contender] = {"pg.deliver.64.ours": ours, "pg.deliver.eventsourcing": theirs}
    found.add(run.race(contenders, ratios))
    return found
