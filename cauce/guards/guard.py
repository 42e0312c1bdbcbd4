"""What stands before each callee of a bus: a bulkhead, behind it a breaker, behind it the wire."""

from __future__ import annotations

import sys
from collections.abc import Awaitable
from functools import partial
from math import inf

import msgspec

from cauce.bus import Ask, Asking, Reply
from cauce.clock import Clock
from cauce.errors import Refused
from cauce.guarded import State
from cauce.guards.breaker import Breaker, Limits
from cauce.guards.bulkhead import Bulkhead

__all__ = ["Callees", "Guard", "Guards"]

AT_ONCE = 10_000
"""Ten times what 1,000 callers have under way, and twice what an outbox says to another instance at once."""

_NEVER = Limits(least=sys.maxsize)


class Guards(msgspec.Struct, frozen=True):
    """What stands before each callee, a domain, of a bus.

    Parameters:
        breaker: when its breaker opens; None: never, but by hand.
        at_once: questions of this bus to it that may be under way at a time; None: any number.

    Raises `Refused` for a number that makes no sense.
    """

    breaker: Limits | None = Limits()
    at_once: int | None = AT_ONCE

    def __post_init__(self) -> None:
        if self.at_once is not None and not self.at_once >= 1:
            raise Refused(f"at_once={self.at_once}: say a number of questions, 1 or more, or None for any number")


class Guard:
    """The bulkhead and the breaker of one callee; see `cauce.guarded` for what each attribute says."""

    __slots__ = ("_breaker", "_bulkhead", "ask", "name")

    def __init__(self, name: str, clock: Clock, guards: Guards, ask: Asking) -> None:
        self.name = name
        self._bulkhead = Bulkhead(name, guards.at_once or inf, "raise at_once of its guards", clock)
        self._breaker = Breaker(name, clock, guards.breaker or _NEVER)
        # The bulkhead comes first: what it turns away says nothing of how the callee is.
        # (mypy misses the arguments that are not given yet.)
        past_bulkhead: Asking = partial(self._breaker.call, ask)  # type: ignore[call-arg]
        self.ask: Asking = partial(self._bulkhead.call, past_bulkhead)  # type: ignore[call-arg]

    @property
    def state(self) -> State:
        return self._breaker.state

    @property
    def opened(self) -> int:
        return self._breaker.opened

    @property
    def refused(self) -> int:
        return self._breaker.refused

    @property
    def under_way(self) -> int:
        return self._bulkhead.under_way

    @property
    def shed(self) -> int:
        return self._bulkhead.shed

    def open(self, why: str = "by hand") -> None:
        self._breaker.open(why)

    def close(self) -> None:
        self._breaker.close()


class Callees(dict[str, Guard]):
    """The guard of each callee, made when it is first asked or looked at."""

    def __init__(self, clock: Clock, guards: Guards, ask: Asking) -> None:
        super().__init__()
        self._clock, self._guards, self._ask = clock, guards, ask

    def __missing__(self, callee: str) -> Guard:
        guard = self[callee] = Guard(callee, self._clock, self._guards, self._ask)
        return guard

    def ask(self, address: str, ask: Ask, seconds: float) -> Awaitable[Reply]:
        """Ask a callee; of those who answer at `users/3` and `users` it is the same."""
        return self[address.partition("/")[0]].ask(address, ask, seconds)
