"""What stands between callers and callees, as people see it and take it in hand."""

from __future__ import annotations

from typing import Literal, Protocol

__all__ = ["Bounded", "Guarded", "State"]

State = Literal["closed", "open", "half-open"]
"""Of a breaker: all is let through, nothing is, one question is."""


class Bounded(Protocol):
    """A bulkhead: of an answer function, or of what else a domain is asked."""

    @property
    def name(self) -> str:
        """What is asked."""
        ...

    @property
    def most(self) -> float:
        """How many questions may be in hand at a time."""
        ...

    @property
    def under_way(self) -> int:
        """How many questions are in hand now."""
        ...

    @property
    def shed(self) -> int:
        """How many questions were too many at once: `Overloaded`."""
        ...


class Guarded(Protocol):
    """The breaker and the bulkhead of one callee, as this bus asks it."""

    @property
    def name(self) -> str:
        """The callee: a domain."""
        ...

    @property
    def state(self) -> State:
        """Of the breaker."""
        ...

    @property
    def opened(self) -> int:
        """How often the breaker has opened."""
        ...

    @property
    def refused(self) -> int:
        """How many questions the breaker did not let through: `BreakerOpen`."""
        ...

    @property
    def under_way(self) -> int:
        """How many questions wait for their answer now."""
        ...

    @property
    def shed(self) -> int:
        """How many questions were too many at once: `Overloaded`."""
        ...

    def open(self, why: str = "by hand") -> None:
        """Let nothing through until `close`."""
        ...

    def close(self) -> None:
        """Let all through, as if nothing had ever failed."""
        ...
