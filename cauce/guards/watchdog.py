"""The watchdog: a thread that notices when the event loop stands still, and says where, while it does.

It asks the loop for a sign of life again and again. While a function keeps the loop from answering, nothing else of the
process goes on: no beat is shown, so other instances take its slots over. A thread needs no loop to say so.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Mapping
from types import CodeType, FrameType

from cauce.clock import Clock
from cauce.guards.stack import of_frame, tell
from cauce.lease import TTL

__all__ = ["STALL", "Watchdog"]

_log = logging.getLogger("cauce")

STALL = 1.0
"""Seconds without a sign of life after which the loop is told to stand still, with its stack."""

_LOOK = 0.25
"""Seconds between two looks."""


class Watchdog(threading.Thread):
    """Watches the loop that it is made in, from `start` to `stop`.

    Parameters:
        names: what each handler is called, by its code, to be named where it blocks the loop.
        aside: those that run in threads of their own, and cannot be given up: they are told of after `patience`.

    Attributes:
        blocked: what keeps the loop from going on, by its name, or "something"; empty while nothing does.
    """

    def __init__(
        self, names: Mapping[CodeType, str], aside: Mapping[CodeType, str], clock: Clock, patience: float
    ) -> None:
        super().__init__(name="cauce watchdog", daemon=True)
        self._names, self._aside, self._clock, self._patience = names, aside, clock, patience
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._ending, self._ticked = threading.Event(), False
        self._seen: dict[int, tuple[FrameType, float, bool]] = {}
        self.blocked = ""

    def stop(self) -> None:
        """Watch no more."""
        self._ending.set()

    def run(self) -> None:
        """Look, until told to stop or the loop is gone."""
        while not self._ending.is_set():
            self._ticked = False
            try:
                self._loop.call_soon_threadsafe(self._tick)
            except RuntimeError:
                return  # It was closed.
            self._watch()
            if self._aside:
                self._look_aside()

    def _tick(self) -> None:
        self._ticked = True

    def _watch(self) -> None:
        """Wait for the sign of life, and tell what happens until it comes."""
        asked = self._clock.monotonic()
        told = lost = False
        while not self._ending.is_set():
            began = self._clock.monotonic()
            self._ending.wait(_LOOK)
            now = self._clock.monotonic()
            if now - began > _LOOK + STALL:
                # It was not the loop that stood still: the whole process did.
                _log.error("this process stood still for %.1f s: it was stopped, or its machine was", now - began)
                asked = now
            if self._ticked:
                break
            if now - asked >= STALL and not told:
                told = True
                self._tell(now - asked)
            elif now - asked >= TTL and not lost:
                lost = True
                _log.critical(
                    "%s has kept the event loop for %.0f s: nothing of this process goes on, and other instances take its "
                    "slots over; if it does not end, restart the process", self.blocked, now - asked,
                )  # fmt: skip
        if told:
            _log.error("the event loop goes on, after %.1f s in %s", self._clock.monotonic() - asked, self.blocked)
            self.blocked = ""

    def _tell(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._thread)
        self.blocked = _named(frame, self._names) or "something"
        tell(
            logging.ERROR, of_frame(frame),
            "%s keeps the event loop for %.1f s now, and all else waits: a handler that blocks belongs in a plain "
            "function (def), which runs in a thread; this is where it stands:", self.blocked, seconds,
        )  # fmt: skip

    def _look_aside(self) -> None:
        """Tell of what runs in another thread, in one call, for longer than anybody has patience."""
        now, seen = self._clock.monotonic(), dict[int, tuple[FrameType, float, bool]]()
        for thread, top in sys._current_frames().items():
            frame: FrameType | None = top
            while frame is not None and frame.f_code not in self._aside:
                frame = frame.f_back
            if frame is None or thread == self._thread:
                continue
            before, since, told = self._seen.get(thread, (None, now, False))
            if before is not frame:
                since, told = now, False
            if self._patience and now - since >= self._patience and not told:
                told = True
                tell(
                    logging.ERROR, of_frame(top), "%s has been at one entry for %.0f s, and cannot be given up: this is where it stands:",
                    self._aside[frame.f_code], now - since,
                )  # fmt: skip
            seen[thread] = frame, since, told
        self._seen = seen


def _named(frame: FrameType | None, names: Mapping[CodeType, str]) -> str:
    while frame is not None:
        if frame.f_code in names:
            return names[frame.f_code]
        frame = frame.f_back
    return ""
