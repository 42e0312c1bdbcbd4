"""A question to another process and its answer, by one caller, beside request and reply of FastStream and nats-py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks._bus import nats_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus, by_median
from benchmarks.contenders import asking, jetstream, nats_py

__all__ = ["GOALS", "measure"]

GOALS: dict[str, float] = {}

_RATIOS = [
    Versus(f"nats.ask.two_processes_p50.vs_{theirs}", "nats.ask.ours", f"nats.ask.{theirs}", by_median)
    for theirs in ("faststream", "nats_py")
]


def measure(run: Run) -> Found:
    contenders: dict[str, Contender] = {
        "nats.ask.ours": partial(_turn, run, asking.ask),
        "nats.ask.faststream": partial(_turn, run, lambda url, seconds: jetstream.ask(_server(url), seconds)),
        "nats.ask.nats_py": partial(_turn, run, lambda url, seconds: nats_py.ask(_server(url), seconds)),
    }
    return run.race(contenders, run.wanted(_RATIOS))


def _turn(run: Run, work: Callable[[str, float], Sample], turn: Turn) -> Sample:
    with nats_bus(run.bus, run.ground.folder) as url:
        return work(url, turn.seconds)


def _server(url: str) -> str:
    return url.rpartition("/")[0]
