"""What stands, made of a stream of 100, 1,000 and 10,000 events, beside the `eventsourcing` library.

`fold.1000.ours_from_calls` folds facts that have with them the wish that caused them, as `call` writes them; it is a
figure only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks._load import Load
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import streams

__all__ = ["GOALS", "measure"]

_LENGTHS = (100, 1_000, 10_000)

GOALS = {f"fold.{length}.vs_eventsourcing": 10.0 for length in _LENGTHS}

_RATIOS = tuple(
    Versus(f"fold.{length}.vs_eventsourcing", f"fold.{length}.ours", f"fold.{length}.eventsourcing")
    for length in _LENGTHS
)


def measure(run: Run) -> Found:
    load = run.load
    contenders: dict[str, Contender] = {}
    for length in _LENGTHS:
        contenders |= {
            f"fold.{length}.ours": _on(run, load, length, "facts", streams.of_facts, streams.fold),
            f"fold.{length}.eventsourcing": _on(run, load, length, "events", streams.of_peer, streams.get),
        }
    contenders["fold.1000.ours_from_calls"] = _on(run, load, 1_000, "calls", streams.of_calls, streams.fold)
    return run.race(contenders, run.wanted(_RATIOS), also=("fold.1000.ours_from_calls",))


def _on(
    run: Run, load: Load, length: int, name: str, make: Callable[..., None], work: Callable[..., Sample]
) -> Contender:
    """Work on a file that is made once, of streams of this length."""

    def contender(turn: Turn) -> Sample:
        path = run.ground.made(f"fold.{length}.{name}", partial(make, load=load, length=length))
        return work(path, load, length, turn.seconds)

    return contender
