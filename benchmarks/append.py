"""Durable appends by 1, 64 and 1,000 callers, beside bare SQLite and the `eventsourcing` library.

Everything is measured on an empty log and on one that holds 2,000,000 events, and the lesser ratio counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks._run import Found, Prefill, Run, Sample, Versus, on_a_file
from benchmarks.contenders import bare, ours, peer

__all__ = ["GOALS", "measure"]

GOALS = {
    "append.1.vs_eventsourcing": 1.0,
    "append.64.vs_eventsourcing": 12.0,
    "append.1000.vs_eventsourcing": 30.0,
    "append.1.vs_raw_sqlite": 0.4,
    "append.64.vs_bare": 0.6,
    "append.1000.vs_bare": 0.6,
    "append.64.full_vs_empty": 0.7,
}

_RATIOS = (
    Versus("append.1.vs_eventsourcing", "append.1.ours", "append.eventsourcing"),
    Versus("append.64.vs_eventsourcing", "append.64.ours", "append.eventsourcing"),
    Versus("append.1000.vs_eventsourcing", "append.1000.ours", "append.eventsourcing"),
    Versus("append.1.vs_raw_sqlite", "append.1.ours", "append.1.raw_sqlite"),
    Versus("append.64.vs_bare", "append.64.ours", "append.64.bare"),
    Versus("append.1000.vs_bare", "append.1000.ours", "append.1000.bare"),
    Versus("append.64.full_vs_empty", "append.64.ours.full", "append.64.ours.empty"),
)


def measure(run: Run) -> Found:
    ratios = run.wanted(_RATIOS)
    found = Found()
    threads = 1
    if any("eventsourcing" in each.name for each in ratios):
        run.say("append: looking for the best number of threads of eventsourcing")
        threads = peer.best(
            lambda threads: peer.append(run.ground.fresh("peer.try"), run.load, threads, run.seconds / 4)
        )
        pragmas = peer.settings(run.ground.fresh("peer.try"))
        found.settings["eventsourcing"] = ", ".join(
            (f"{threads} threads", *(f"{name}={value}" for name, value in pragmas.items()))
        )
    kinds: dict[str, tuple[str, Prefill, Callable[..., Sample]]] = {
        "append.1.ours": ("log", ours.prefill, partial(ours.append, callers=1)),
        "append.1.raw_sqlite": ("rows", bare.prefill, bare.commits),
        "append.eventsourcing": ("events", peer.prefill, partial(peer.append, threads=threads)),
        "append.64.ours": ("log", ours.prefill, partial(ours.append, callers=64)),
        "append.64.bare": ("rows", bare.prefill, partial(bare.append, callers=64)),
        "append.1000.ours": ("log", ours.prefill, partial(ours.append, callers=1000)),
        "append.1000.bare": ("rows", bare.prefill, partial(bare.append, callers=1000)),
    }
    contenders = {
        f"{name}.{fill}": on_a_file(run, fill == "full", *kind)
        for fill in ("empty", "full")
        for name, kind in kinds.items()
    }
    found.add(run.race(contenders, ratios, ("empty", "full")))
    return found
