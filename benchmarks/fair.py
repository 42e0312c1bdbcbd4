"""How evenly four processes of one caller each share one file, and how long the unlucky ones wait."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks._run import Found, Run, Versus
from cauce.backends import sqlite
from cauce.codec import Meta, sealed

__all__ = ["GOALS", "measure"]

GOALS = {
    "fair.least_share": 0.8,
    "fair.tail": 1.0,
}
"""The least share beside the fastest one's; and 20 medians beside p99.9."""

_PROCESSES = 4
_APPENDS = 10_000
_BODY = b'{"user_id":"42","name":"Ana","email":"ana@example.org"}'


def measure(run: Run) -> Found:
    found = Found()
    if not run.wanted([Versus(name, "", "") for name in GOALS]):
        return found
    shares, halves, tails, rates = list[float](), list[float](), list[float](), list[float]()
    for round in range(run.rounds):
        run.say(f"round {round + 1} of {run.rounds}: fair")
        least, latencies, rate = _race(run.ground.fresh("fair"), _APPENDS if run.seconds >= 1 else 400)
        shares.append(least)
        halves.append(1000 * latencies[len(latencies) // 2])
        tails.append(1000 * latencies[len(latencies) * 999 // 1000])
        rates.append(rate)
    ratios = {
        "fair.least_share": shares,
        "fair.tail": [20 * half / tail for half, tail in zip(halves, tails, strict=True)],
    }
    for name, rounds in ratios.items():
        found.ratios[name], found.spread[name] = median(rounds), (min(rounds), max(rounds))
    found.figures = {
        "fair.share": median(shares), "fair.rate": median(rates), "fair.p50_ms": median(halves), "fair.p99.9_ms": median(tails),
    }  # fmt: skip
    return found


def _race(path: Path, appends: int) -> tuple[float, list[float], float]:
    """Least share, sorted latencies and the rate of all together, as long as all of them were at it."""
    command = [sys.executable, "-m", "benchmarks.fair", "append", str(path), str(appends // _PROCESSES)]
    racers = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(_PROCESSES)
    ]
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.readline()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told: list[list[tuple[float, float]]] = [json.loads(racer.communicate()[0]) for racer in racers]
    began, first = max(each[0][0] for each in told), min(each[-1][1] for each in told)
    within = [[end - start for start, end in each if start >= began and end <= first] for each in told]
    most = max(map(len, within))
    latencies = sorted(latency for each in within for latency in each)
    return min(map(len, within)) / most, latencies, len(latencies) / (first - began)


async def _append(path: str, appends: int, name: str) -> None:
    """One racer: begin and end of each append, on the clock that all processes share."""
    bus, stream, times = await sqlite.open(path, patience=60), f"things/{name}", list[tuple[float, float]]()
    entries = [sealed(stream, "Registered", f"{name}-{n}", Meta(1), _BODY) for n in range(appends)]
    await bus.facts.append(stream, [sealed(stream, "Registered", name, Meta(1), _BODY)])
    print("ready", flush=True)
    sys.stdin.readline()
    for entry in entries:
        start = time.monotonic()
        await bus.facts.append(stream, [entry])
        times.append((start, time.monotonic()))
    await bus.close()
    print(json.dumps(times))


if __name__ == "__main__":
    if sys.argv[1:2] == ["append"]:
        asyncio.run(_append(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
    else:
        from benchmarks.__main__ import main

        main(["fair", *sys.argv[1:]])
