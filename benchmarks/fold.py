"""What stands, made of a stream of 100, 1,000 and 10,000 events, beside the `eventsourcing` library.

`fold.snapshot_100_vs_10000` is the median time to load a thing by its record of 100 events, and 4 more, beside that of
10,000: it must not grow with what was before. `fold.1000.ours_from_calls` folds facts that have with them the wish that
caused them, as `call` writes them; it is a figure only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks._load import Load
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus, by_median
from benchmarks.contenders import streams

__all__ = ["GOALS", "measure"]

_LENGTHS = (100, 1_000, 10_000)

GOALS = {f"fold.{length}.vs_eventsourcing": 10.0 for length in _LENGTHS} | {"fold.snapshot_100_vs_10000": 0.66}

_RATIOS = (
    *(
        Versus(f"fold.{length}.vs_eventsourcing", f"fold.{length}.ours", f"fold.{length}.eventsourcing")
        for length in _LENGTHS
    ),
    Versus("fold.snapshot_100_vs_10000", "fold.snapshot_10000", "fold.snapshot_100", by_median),
)
_RECORDED = 10
"""Things with records, of each length."""


def measure(run: Run) -> Found:
    load = run.load
    contenders: dict[str, Contender] = {}
    for length in _LENGTHS:
        contenders |= {
            f"fold.{length}.ours": _on(run, load, length, "facts", streams.of_facts, streams.fold),
            f"fold.{length}.eventsourcing": _on(run, load, length, "events", streams.of_peer, streams.get),
        }
    # A --quick run cannot fill in that many.
    long = min(10_000, load.events // _RECORDED)
    contenders["fold.snapshot_100"] = _loads(run, 100, long)
    contenders["fold.snapshot_10000"] = _loads(run, long, long)
    contenders["fold.1000.ours_from_calls"] = _on(run, load, 1_000, "calls", streams.of_calls, streams.fold)
    return run.race(contenders, run.wanted(_RATIOS), also=("fold.1000.ours_from_calls",))


def _loads(run: Run, length: int, long: int) -> Contender:
    """Load things by their records."""

    def contender(turn: Turn) -> Sample:
        make = partial(streams.of_records, lengths=(100, long), things=_RECORDED)
        return streams.load(run.ground.made("fold.records", make), length, _RECORDED, turn.seconds)

    return contender


def _on(
    run: Run, load: Load, length: int, name: str, make: Callable[..., None], work: Callable[..., Sample]
) -> Contender:
    """Work on a file that is made once, of streams of this length."""

    def contender(turn: Turn) -> Sample:
        path = run.ground.made(f"fold.{length}.{name}", partial(make, load=load, length=length))
        return work(path, load, length, turn.seconds)

    return contender
