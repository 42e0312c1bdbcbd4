"""From append to a handler whose place is committed, by 64 publishers, beside FastStream that acknowledges.

Both flushed, on servers with `sync_interval: always`, and both not. Of FastStream's subscribers the best one runs.
"""

from __future__ import annotations

from functools import partial

from benchmarks._bus import NATS, nats_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import anywhere, jetstream

__all__ = ["GOALS", "measure"]

GOALS = {"nats.deliver.64.vs_faststream": 2.0, "nats.deliver.64.flushed.vs_faststream_flushed": 2.0}

_CALLERS = 64
_FLUSHED = {"": False, ".flushed": True}


def _ratio(end: str) -> Versus:
    name = f"nats.deliver.{_CALLERS}"
    return Versus(f"{name}{end}.vs_faststream{end.replace('.', '_')}", f"{name}.ours{end}", f"{name}.faststream{end}")


def measure(run: Run) -> Found:
    found, contenders, ratios = Found(), dict[str, Contender](), list[Versus]()
    for end, flushed in (_FLUSHED if run.bus == NATS else {"": False}).items():
        wanted = run.wanted([_ratio(end)])
        if not wanted:
            continue
        ratios += wanted
        place = partial(nats_bus, run.bus, run.ground.folder, flushed=flushed)
        run.say("deliver: looking for the best subscriber of FastStream")
        way = jetstream.best(place, run.load, _CALLERS, run.seconds / 2)
        found.settings[f"faststream deliver{end}"] = way

        def ours(turn: Turn, place: jetstream.Place = place) -> Sample:
            with place() as url:
                return anywhere.deliver(url, run.load, _CALLERS, turn.seconds)

        def theirs(turn: Turn, place: jetstream.Place = place, way: str = way) -> Sample:
            with place() as url:
                return jetstream.deliver(url, run.load, _CALLERS, turn.seconds, way)

        contenders |= {f"nats.deliver.{_CALLERS}.ours{end}": ours, f"nats.deliver.{_CALLERS}.faststream{end}": theirs}
    found.add(run.race(contenders, ratios))
    return found
