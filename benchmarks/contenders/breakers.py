"""Circuit breakers around a coroutine function that does nothing: ours, and those that others use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter

from benchmarks._run import Sample
from cauce.clock import SystemClock
from cauce.guards.breaker import Breaker

__all__ = ["PEERS", "aiobreaker", "bare", "circuitbreaker", "ours", "purgatory"]

PEERS = ("purgatory", "circuitbreaker", "aiobreaker")
_AT_ONCE = 1_000

Call = Callable[[], Awaitable[object]]


async def nothing() -> None:
    return None


def ours(seconds: float) -> Sample:
    breaker = Breaker("callee", SystemClock())
    return _run(lambda: breaker.call(nothing), seconds)


def bare(seconds: float) -> Sample:
    return _run(lambda: nothing(), seconds)


def purgatory(seconds: float) -> Sample:
    from purgatory import AsyncCircuitBreakerFactory

    guarded = AsyncCircuitBreakerFactory()("callee")(nothing)
    return _run(lambda: guarded(), seconds)


def circuitbreaker(seconds: float) -> Sample:
    from circuitbreaker import circuit  # type: ignore[import-untyped]

    guarded = circuit(nothing)
    return _run(lambda: guarded(), seconds)


def aiobreaker(seconds: float) -> Sample:
    from aiobreaker import CircuitBreaker  # type: ignore[import-untyped]

    breaker = CircuitBreaker()
    return _run(lambda: breaker.call_async(nothing), seconds)


def _run(call: Call, seconds: float) -> Sample:
    async def main() -> Sample:
        count, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            for _ in range(_AT_ONCE):
                await call()
            count += _AT_ONCE
        return Sample(count, perf_counter() - began)

    return asyncio.run(main())
