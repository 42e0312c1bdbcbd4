"""When a message whose handler failed is tried again, and how often, before it is a dead letter."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cauce.errors import Refused

__all__ = ["ALWAYS", "NEVER", "USUAL", "Retries", "Retry", "check_retries", "longest", "retry_for", "usual"]

_LAST = 100
"""The delays grow so often at most; the number must stay one that can be reckoned with."""


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How a message is tried again.

    The delay before the next try lies between half and all of `first * factor ** tries`, by chance, and grows up to
    `longest`: so those that failed together do not come back together, and none comes back at once. This is "equal
    jitter" (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Parameters:
        attempts: how often it is tried before it is a dead letter; 0: without end. What is nobody's fault but the
            moment's (`Unavailable`) never counts.
        first: seconds before the second try, at most.
        longest: seconds between two tries, at most.
        factor: by which the delay grows from try to try.

    Raises `Refused` for what cannot be right.
    """

    attempts: int = 12
    first: float = 0.1
    longest: float = 60.0
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or self.attempts < 0:
            raise Refused(f"attempts={self.attempts!r}: say how often, or 0 for without end")
        # A comparison that NaN fails, too.
        if not 0 < self.first <= self.longest < 1e9:
            raise Refused(f"first={self.first!r}, longest={self.longest!r}: say seconds above 0, the longest last")
        if not 1 <= self.factor <= _LAST:
            raise Refused(f"factor={self.factor!r}: say by how much the delay grows, from 1 to {_LAST}")

    def delay(self, tries: int, chance: float) -> float:
        """Seconds to wait after so many tries.

        Parameters:
            chance: from 0 to 1.
        """
        most = min(self.longest, self.first * self.factor ** min(max(tries - 1, 0), _LAST))
        return most * (1 + chance) / 2


NEVER = Retry(attempts=1)
"""What fails so is a dead letter at once."""

ALWAYS = Retry(attempts=0)
"""What fails so is tried without end."""

Retries = Retry | Mapping[type[Exception], Retry]
"""One for all errors, or one for each kind: the nearest class counts, and for those not named, what is usual."""

USUAL = Retry()
"""What holds where nothing else is said: for two minutes or so."""


def check_retries(retries: object, where: str) -> None:
    """Raises `Refused` for what is no policy."""
    if isinstance(retries, Retry):
        return
    if not isinstance(retries, Mapping):
        raise Refused(f"{where}: retry={retries!r}: pass a Retry, or {{SomeError: Retry(…)}}")
    for cls, each in retries.items():
        if not (isinstance(cls, type) and issubclass(cls, Exception)) or not isinstance(each, Retry):
            raise Refused(f"{where}: retry={{{cls!r}: {each!r}}}: name a class of exceptions, and a Retry for it")


def usual(retries: Retries) -> Retry:
    """For errors that nothing else is said about."""
    return retries if isinstance(retries, Retry) else retries.get(Exception, USUAL)


def retry_for(retries: Retries, error: BaseException) -> Retry:
    """For this error: what is said of its class, or of the nearest one above."""
    if isinstance(retries, Retry):
        return retries
    return next((retries[cls] for cls in type(error).__mro__ if cls in retries), USUAL)


def longest(retries: Retries) -> float:
    """Seconds that anything of this may wait at most."""
    each = [retries] if isinstance(retries, Retry) else [*retries.values(), USUAL]
    return max(one.longest for one in each)
