"""A question to another process and its answer, by one caller, beside bare sockets and request and reply over NATS."""

from __future__ import annotations

from benchmarks._bus import nats_server
from benchmarks._run import Contender, Found, Run, Sample, Turn, Versus, by_median
from benchmarks.contenders import asking, jetstream, sockets

__all__ = ["GOALS", "measure"]

GOALS = {
    "ask.two_processes_p50.vs_bare_socket": 0.25,
    "ask.two_processes_p50.vs_bare_asyncio": 0.25,
    "ask.two_processes_p50.vs_faststream_nats": 2.0,
}

_RATIOS = tuple(
    Versus(name, "ask.ours", theirs, by_median)
    for name, theirs in zip(GOALS, ("ask.bare_socket", "ask.bare_asyncio", "ask.faststream_nats"), strict=True)
)


def measure(run: Run) -> Found:
    ground = run.ground

    def over_nats(turn: Turn) -> Sample:
        with nats_server(ground.folder) as address:
            return jetstream.ask(address, turn.seconds)

    contenders: dict[str, Contender] = {
        "ask.ours": lambda turn: asking.ask(f"sqlite:///{ground.fresh('bus')}", turn.seconds),
        "ask.bare_socket": lambda turn: sockets.echo(ground.fresh("echo"), turn.seconds),
        "ask.bare_asyncio": lambda turn: sockets.protocol(ground.fresh("protocol"), turn.seconds),
        "ask.faststream_nats": over_nats,
    }
    return run.race(contenders, run.wanted(_RATIOS))
