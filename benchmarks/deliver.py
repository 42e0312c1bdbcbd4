"""From append to handler: how many a second, of 64 publishers, and how soon.

A rate ends when the handler has run for the last one and its place is committed. FastStream's stream is measured as its
server comes, which is not flushed, and flushed before each acknowledgement, as all others here are. How soon is
compared with the least that it can take: a bare commit of SQLite, and a datagram to another process and back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks._bus import NATS, nats_bus
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus
from benchmarks.contenders import bare, delivery, following, jetstream, sockets

__all__ = ["GOALS", "measure"]

GOALS = {
    "deliver.64.vs_best_peer": 3.0,
    "deliver.four_processes.vs_best_peer": 3.0,
    "deliver.64.vs_faststream_jetstream": 2.0,
    "deliver.64.vs_faststream_jetstream_flushed": 2.0,
    "deliver.64.vs_eventsourcing": 10.0,
    "deliver.same_process_p50.vs_flush_plus_200us": 1.0,
    "deliver.two_processes_p99.vs_4_pingpongs_plus_flush": 1.0,
}

_CALLERS = 64
_STREAMS = {"jetstream": False, "jetstream_flushed": True}
"""Whether it flushes."""

_PEERS = (*_STREAMS, "eventsourcing")

_FLUSH, _PING_PONG = "flush_p50_ms", "ping_pong_p99_ms"


def _near_a_flush(ours: Sample, least: Sample) -> float:
    return (least.figures[_FLUSH] + 0.2) / (1000 * ours.within(50))


def _near_ping_pongs(ours: Sample, least: Sample) -> float:
    return (4 * least.figures[_PING_PONG] + least.figures[_FLUSH]) / (1000 * ours.within(99))


_RATIOS = (
    Versus("deliver.64.vs_best_peer", "deliver.64.ours", "deliver.64"),
    Versus("deliver.four_processes.vs_best_peer", "deliver.four_processes.ours", "deliver.four_processes"),
    Versus("deliver.64.vs_faststream_jetstream", "deliver.64.ours", "deliver.64.jetstream"),
    Versus("deliver.64.vs_faststream_jetstream_flushed", "deliver.64.ours", "deliver.64.jetstream_flushed"),
    Versus("deliver.64.vs_eventsourcing", "deliver.64.ours", "deliver.64.eventsourcing"),
    Versus(
        "deliver.same_process_p50.vs_flush_plus_200us", "deliver.same_process.ours", "deliver.least", _near_a_flush
    ),
    Versus(
        "deliver.two_processes_p99.vs_4_pingpongs_plus_flush", "deliver.two_processes.ours", "deliver.least", _near_ping_pongs
    ),
)  # fmt: skip


def measure(run: Run) -> Found:
    ratios, found, ground = run.wanted(_RATIOS), Found(), run.ground
    place = partial(nats_bus, NATS, ground.folder)
    runner, ways = following.WAYS[0], dict[bool, str]()
    names = {each.name for each in ratios}
    best_of_all = "deliver.64.vs_best_peer" in names
    if best_of_all or "deliver.64.vs_eventsourcing" in names:
        run.say("deliver: looking for the best runner of eventsourcing")
        runner = following.best(lambda: ground.fresh("follow.try"), run.load, run.seconds / 4)
        found.settings["eventsourcing deliver"] = f"{runner[1]} saving threads, followed {runner[0]}"
    for stream, flushed in _STREAMS.items():
        if best_of_all or names & {f"deliver.64.vs_faststream_{stream}", "deliver.four_processes.vs_best_peer"}:
            run.say("deliver: looking for the best subscriber of FastStream")
            ways[flushed] = jetstream.best(partial(place, flushed=flushed), run.load, _CALLERS, run.seconds / 4)
            found.settings[f"deliver.{stream}"] = ways[flushed]

    def streamed(turn: Turn, flushed: bool, deliver: Callable[..., Sample]) -> Sample:
        with place(flushed=flushed) as url:
            return deliver(url, run.load, _CALLERS, turn.seconds, ways[flushed])

    def least(turn: Turn) -> Sample:
        flush = bare.commits(ground.fresh("flush"), run.load, turn.seconds / 2)
        ping_pong = sockets.ping_pong(ground.fresh("ping_pong"), turn.seconds / 2)
        figures = {_FLUSH: 1000 * flush.within(50), _PING_PONG: 1000 * ping_pong.within(99)}
        return Sample(flush.count, flush.seconds, figures=figures)

    contenders: dict[str, Contender] = {
        "deliver.64.ours": lambda turn: delivery.deliver(ground.fresh("bus"), run.load, _CALLERS, turn.seconds),
        **{
            f"deliver.{many}.{stream}": partial(streamed, flushed=flushed, deliver=deliver)
            for many, deliver in (("64", jetstream.deliver), ("four_processes", jetstream.four_processes))
            for stream, flushed in _STREAMS.items()
        },
        "deliver.four_processes.ours": lambda turn: delivery.four_processes(
            ground.fresh("bus"), run.load, _CALLERS, turn.seconds
        ),
        "deliver.64.eventsourcing": lambda turn: following.deliver(
            ground.fresh("follow"), run.load, *runner, turn.seconds
        ),
        "deliver.same_process.ours": lambda turn: delivery.same_process(ground.fresh("bus"), run.load, turn.seconds),
        "deliver.two_processes.ours": lambda turn: delivery.two_processes(ground.fresh("bus"), run.load, turn.seconds),
        "deliver.least": least,
    }
    shared = [each for each in ratios if each.theirs == "deliver.four_processes"]
    found.add(run.race(contenders, [each for each in ratios if each not in shared], _PEERS))
    found.add(run.race(contenders, shared, tuple(_STREAMS)))
    return found
