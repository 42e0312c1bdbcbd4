"""Callers, each of whom waits for its own before it does the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter

from benchmarks._run import Sample

__all__ = ["WARM", "drive", "repeat"]

WARM = 0.15
"""The part of a turn that each contender works beforehand, unmeasured."""


async def drive(
    work: Callable[[], Awaitable[object]],
    callers: int,
    seconds: float,
    finish: Callable[[], Awaitable[object]] | None = None,
) -> Sample:
    """Keep so many callers at work for so many seconds; what was begun is finished, within the clock."""
    latencies: list[float] = []
    done = latencies.append
    began = perf_counter()
    end = began + seconds

    async def caller() -> None:
        since = perf_counter()
        while since < end:
            await work()
            now = perf_counter()
            done(now - since)
            since = now

    await asyncio.gather(*(caller() for _ in range(callers)))
    if finish is not None:
        await finish()
    return Sample(len(latencies), perf_counter() - began, latencies)


def repeat(work: Callable[[], None], seconds: float) -> Sample:
    """The same by one caller without a loop."""
    latencies: list[float] = []
    done = latencies.append
    since = began = perf_counter()
    while since < began + seconds:
        work()
        now = perf_counter()
        done(now - since)
        since = now
    return Sample(len(latencies), since - began, latencies)
