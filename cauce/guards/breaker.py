"""A circuit breaker: who asks a callee that keeps failing is told so at once, and the callee is left to recover.

After M. Nygard, Release It! (2nd edition, 2018). Closed, it lets all through and counts; where too large a share of the
last calls failed or were slow, it opens. Open, it lets none through. After a rest it is half-open: one call of this
process is let through as a probe, and closes it, or has it rest again, twice as long each time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import msgspec

from cauce.clock import Clock
from cauce.deadline import StoodStill
from cauce.errors import BreakerOpen, NoAnswer, Overloaded, Refused, Unavailable
from cauce.guarded import State

__all__ = ["Breaker", "Limits", "State"]

_log = logging.getLogger("cauce")

P = ParamSpec("P")
T = TypeVar("T")

_FAILURES = (Unavailable, TimeoutError, ConnectionError)
"""What a callee in trouble answers. That it says no, or cannot take what it was asked, is an answer like any other.

Two are not among them. That nobody is there to be asked: it burdens nobody, and who comes back is to be asked at once.
That it was too much: who sheds load is well, and may shed what one function of many is asked.
"""

_NO_FAILURES = (NoAnswer, Overloaded)


class Limits(msgspec.Struct, frozen=True):
    """When a breaker opens, and for how long.

    Parameters:
        share: of the calls in the window, from which on it opens, if they failed or were slow.
        least: calls that must be in the window, before anything is made of their share.
        window: seconds; the last half to whole of it is looked at.
        slow: seconds from which a call is slow; None: none is.
        rest: seconds that it stays open before the first probe.
        longest: seconds that it rests at most between two probes.

    Raises `Refused` for numbers that make no sense.
    """

    share: float = 0.5
    least: int = 10
    window: float = 10.0
    slow: float | None = None
    rest: float = 1.0
    longest: float = 30.0

    def __post_init__(self) -> None:
        sound = 0 < self.share <= 1 and self.least >= 1 and self.window > 0 and (self.slow is None or self.slow > 0)
        if not (sound and 0 < self.rest <= self.longest):
            raise Refused(
                f"{self}: say a share above 0 and up to 1, at least one call, and seconds above 0, rest no longer than longest"
            )


class Breaker:
    """The breaker of one callee, as this process sees it.

    Calls are looked at where they end. What began before it opened and ends later says nothing any more.

    Parameters:
        name: the callee, as messages and the log name it.

    Attributes:
        state: closed, open or half-open.
        opened: how often it has opened.
        refused: how many calls were not let through.
    """

    __slots__ = (
        "_before", "_clock", "_held", "_least", "_limits", "_now", "_pause", "_probing", "_round", "_share", "_slow", "_until",
        "_window", "name", "opened", "refused", "state",
    )  # fmt: skip

    def __init__(self, name: str, clock: Clock, limits: Limits | None = None) -> None:
        self.name, self._clock, self._limits = name, clock.monotonic, limits or Limits()
        self._share, self._least, self._slow = self._limits.share, self._limits.least, self._limits.slow
        self._window = self._limits.window / 2
        self.state: State = "closed"
        self.opened = self.refused = 0
        self._round = 0
        self._pause = self._limits.rest
        self._until, self._held, self._probing = 0.0, False, False
        # All calls and the bad ones: of the half window that was, and of the one that is until then.
        self._before = (0, 0)
        self._now = [0, 0]
        self._until = self._clock() + self._window

    async def call(self, work: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of the work, if it is let through.

        Raises `BreakerOpen` if it is not, and then nothing ran; and what the work raises.
        """
        if self.state != "closed":
            self._admit()
        round, began = self._round, self._clock() if self._slow else 0.0
        try:
            result = await work(*args, **kwargs)
        except StoodStill:
            # The one that stood still is who asks.
            self._given_up(round)
            raise
        except _FAILURES as error:
            self._ended(round, began, not isinstance(error, _NO_FAILURES))
            raise
        except Exception:
            self._ended(round, began, False)
            raise
        except BaseException:
            # Nobody waited for what it would have said.
            self._given_up(round)
            raise
        self._ended(round, began, False)
        return result

    def open(self, why: str = "by hand") -> None:
        """Open it, and keep it open until `close`."""
        self._held = True
        self._turn("open", why)

    def close(self) -> None:
        """Close it, as if nothing had ever failed."""
        self._held, self._pause = False, self._limits.rest
        self._turn("closed", "by hand")

    def _admit(self) -> None:
        now = self._clock()
        if not self._held and not self._probing and now >= self._until:
            self._turn("half-open", "one call is let through")
            self._probing = True
            return
        self.refused += 1
        left = max(0.0, self._until - now)
        when = (
            "until it is closed" if self._held else f"for {left:.1f} s" if left else "until one call has come through"
        )
        raise BreakerOpen(f"{self.name} is in trouble and is not asked {when}: nothing ran; wait, or use a fallback")

    def _ended(self, round: int, began: float, failed: bool) -> None:
        if round != self._round:
            return
        now = self._clock()
        bad = failed or (self._slow is not None and now - began >= self._slow)
        if self.state == "closed":
            if now >= self._until:
                self._roll(now)
            counts = self._now
            counts[0] += 1
            if bad:
                counts[1] += 1
                self._judge(now)
        elif not bad:
            self._pause = self._limits.rest
            self._turn("closed", "a call came through")
        else:
            self._pause = min(self._limits.longest, self._pause * 2)
            self._turn("open", "the call that was let through failed" if failed else "it was slow")

    def _given_up(self, round: int) -> None:
        if round == self._round and self._probing:
            self._turn("open", "the call that was let through was given up")
            self._until = self._clock()

    def _judge(self, now: float) -> None:
        calls, bad = self._before[0] + self._now[0], self._before[1] + self._now[1]
        if calls >= self._least and bad >= self._share * calls:
            self._turn("open", f"{bad} of {calls} calls failed or were slow")

    def _roll(self, now: float) -> None:
        """A half window is over; where two are, nothing is left of both."""
        self._before = (self._now[0], self._now[1]) if now < self._until + self._window else (0, 0)
        self._now = [0, 0]
        self._until = now + self._window

    def _turn(self, state: State, why: str) -> None:
        if state == "open" and self.state == "closed":
            self.opened += 1
        level = logging.WARNING if state == "open" else logging.INFO
        _log.log(level, "breaker of %s: %s, %s", self.name, state, why)
        self.state, self._probing, self._round = state, False, self._round + 1
        self._before, self._now = (0, 0), [0, 0]
        self._until = self._clock() + (self._pause if state == "open" else self._window)
