"""Lengths of time as people say them, in seconds, which all of the library counts in."""

from __future__ import annotations

import math
from datetime import timedelta

from cauce.errors import Refused

__all__ = ["days", "hours", "minutes", "seconds_in"]


def minutes(number: float) -> float:
    """So many minutes, in seconds."""
    return number * 60.0


def hours(number: float) -> float:
    """So many hours, in seconds."""
    return number * 3_600.0


def days(number: float) -> float:
    """So many days of 24 hours, in seconds."""
    return number * 86_400.0


def seconds_in(length: float | timedelta, what: str, *, least: float = 0.0) -> float:
    """A length of time in seconds. Raises `Refused` for what is none, is less than `least`, or beyond 30 years."""
    seconds = length.total_seconds() if isinstance(length, timedelta) else length
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        raise Refused(f"{what} {length!r}: pass a number of seconds, or a timedelta")
    if not least <= seconds < 1e9:
        raise Refused(f"{what} {length!r}: pass {least:g} seconds or more, and less than thirty years")
    return float(seconds)
