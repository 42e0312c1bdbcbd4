"""Appends by 1, 64 and 1,000 callers, beside nats-py on a stream of the same server.

Ours flushed stands beside theirs flushed, on servers with `sync_interval: always`, and not flushed beside not flushed.
"""

from __future__ import annotations

from functools import partial

from benchmarks._bus import NATS, nats_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import anywhere, nats_py

__all__ = ["GOALS", "measure"]

GOALS = {"nats.append.64.vs_nats_py": 1.0, "nats.append.64.flushed.vs_nats_py_flushed": 1.0}

_CALLERS = (1, 64, 1000)
_FLUSHED = {"": False, ".flushed": True}
"""What the names of flushed ones end in."""


def _ratio(callers: int, end: str) -> Versus:
    name = f"nats.append.{callers}"
    return Versus(f"{name}{end}.vs_nats_py{end.replace('.', '_')}", f"{name}.ours{end}", f"{name}.nats_py{end}")


def measure(run: Run) -> Found:
    ends = _FLUSHED if run.bus == NATS else {"": False}
    ratios = run.wanted(_ratio(callers, end) for callers in _CALLERS for end in ends)

    def ours(turn: Turn, callers: int, flushed: bool) -> Sample:
        with nats_bus(run.bus, run.ground.folder, flushed=flushed) as url:
            return anywhere.append(url, run.load, callers, turn.seconds)

    def theirs(turn: Turn, callers: int, flushed: bool) -> Sample:
        with nats_bus(run.bus, run.ground.folder, flushed=flushed) as url:
            return nats_py.append(url, run.load, callers, turn.seconds)

    contenders: dict[str, Contender] = {
        f"nats.append.{callers}.{name}{end}": partial(work, callers=callers, flushed=flushed)
        for callers in _CALLERS
        for end, flushed in ends.items()
        for name, work in (("ours", ours), ("nats_py", theirs))
    }
    return run.race(contenders, ratios)
