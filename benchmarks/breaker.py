"""Calls through a closed breaker, one after the other, beside the fastest of purgatory, circuitbreaker and aiobreaker.

What is called is a coroutine function that does nothing. `breaker.bare` calls it without any; it is a figure only.
"""

from __future__ import annotations

from benchmarks._run import Contender, Found, Run, Versus
from benchmarks.contenders import breakers

__all__ = ["GOALS", "measure"]

GOALS = {"breaker.vs_fastest": 1.0}

_RATIOS = (Versus("breaker.vs_fastest", "breaker.ours", "breaker.peer"),)


def measure(run: Run) -> Found:
    contenders: dict[str, Contender] = {
        "breaker.ours": lambda turn: breakers.ours(turn.seconds),
        "breaker.bare": lambda turn: breakers.bare(turn.seconds),
        "breaker.peer.purgatory": lambda turn: breakers.purgatory(turn.seconds),
        "breaker.peer.circuitbreaker": lambda turn: breakers.circuitbreaker(turn.seconds),
        "breaker.peer.aiobreaker": lambda turn: breakers.aiobreaker(turn.seconds),
    }
    # The least of the ratios counts, which is that with the fastest of them.
    return run.race(contenders, run.wanted(_RATIOS), breakers.PEERS, also=("breaker.bare",))
