"""When a function that runs by the clock is due: every so often, or at the times that a cron text tells."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal, Protocol
from zoneinfo import ZoneInfo

import msgspec

from cauce.codec import micros, moment
from cauce.duration import seconds_in
from cauce.errors import Refused

__all__ = ["LATE", "Cron", "Missed", "Often", "Schedule", "behind", "schedule_of"]

Missed = Literal["once", "all", "skip"]
"""What becomes of the runs that were missed: one of them is made up for, or each, or none."""

LATE = 60.0
"""Seconds behind its time from which on a run counts as missed, where those are skipped: a take-over takes less."""

_SHORTEST = 0.001


class Schedule(Protocol):
    """All times are microseconds since 1970."""

    def following(self, time: int) -> int:
        """The first time behind this one."""
        ...

    def standing(self, due: int, now: int) -> int:
        """What is due, where `due` was noted: an earlier time, if the clock was set back over what cannot wait."""
        ...

    def name_of(self, function: str) -> str:
        """Under which name it is noted when a function is due: it begins anew with another."""
        ...

    def shown(self, due: int) -> datetime:
        """A time as the schedule tells it."""
        ...


class Often(msgspec.Struct, frozen=True):
    """Every so many microseconds, counted from the run before."""

    step: int

    def following(self, time: int) -> int:
        return time + self.step

    def standing(self, due: int, now: int) -> int:
        # Or it would stand still for as long as the clock was set back.
        return min(due, now + self.step)

    def name_of(self, function: str) -> str:
        return function

    def shown(self, due: int) -> datetime:
        return moment(due)


class Cron(msgspec.Struct, frozen=True):
    """At the times that a cron text tells in a zone.

    Where its clocks go forward, what would be due in the hour that is left out is due right behind it; where they go
    back, what is due at a set time is due the first time only.
    """

    text: str
    zone: str

    def following(self, time: int) -> int:
        return micros(self._next(moment(time).astimezone(_zone(self.zone))))

    def _next(self, after: datetime) -> datetime:
        from cronsim import CronSim, CronSimError  # An extra, and only who names a cron text needs it.

        try:
            return next(CronSim(self.text, after))
        except CronSimError as error:
            raise Refused(f"cron text {self.text!r} cannot be read: {error}") from None
        except StopIteration:
            raise Refused(f"cron text {self.text!r} names no time in the next fifty years") from None

    def standing(self, due: int, now: int) -> int:
        return due

    def name_of(self, function: str) -> str:
        return f"{function} ({self.text} {self.zone})"

    def shown(self, due: int) -> datetime:
        return moment(due).astimezone(_zone(self.zone))


def behind(due: int, now: int, schedule: Schedule, missed: Missed) -> int:
    """When the next run is due, behind one that has ended."""
    following = schedule.following(due)
    return following if missed == "all" or following > now else schedule.following(now)


def schedule_of(when: float | timedelta | str, zone: str, what: str) -> Schedule:
    """The schedule in the words of `Service.every`. Raises `Refused` for what cannot be right."""
    if not isinstance(when, str):
        if zone:
            raise Refused(f"{what}: zone={zone!r} is for a cron text; every so often is the same in all zones")
        return Often(round(seconds_in(when, what, least=_SHORTEST) * 1_000_000))
    try:
        import cronsim  # noqa: F401 - whether it is there
    except ModuleNotFoundError:
        raise Refused(f"{what}: the cron text {when!r} needs cronsim: pip install 'cauce[cron]'") from None
    try:
        cron = Cron(" ".join(when.split()), zone or "UTC")
        cron._next(datetime(2026, 1, 1, tzinfo=_zone(cron.zone)))
    except Refused as error:
        raise Refused(f"{what}: {error}") from None
    return cron


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise Refused(
            f"zone {name!r} is not known here: name one such as Europe/Madrid; if the system has none, pip install tzdata"
        ) from None
