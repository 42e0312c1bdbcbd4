"""Where a handler stands when it takes too long: the stack of a coroutine or of a thread, as text, and in the log."""

from __future__ import annotations

import logging
import traceback
from types import FrameType
from typing import Any

__all__ = ["of_coroutine", "of_frame", "tell"]

_log = logging.getLogger("cauce")
_DEEPEST = 200


def of_coroutine(coroutine: Any) -> str:
    """The chain of what it awaits, from the outside in."""
    frames, at = traceback.StackSummary(), coroutine
    for _ in range(_DEEPEST):
        frame = next(
            (found for name in ("cr_frame", "gi_frame", "ag_frame") if (found := getattr(at, name, None))), None
        )
        if frame is None:
            break
        frames.append(traceback.FrameSummary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        at = next(
            (found for name in ("cr_await", "gi_yieldfrom", "ag_await") if (found := getattr(at, name, None))), None
        )
    return "".join(traceback.format_list(frames))


def of_frame(frame: FrameType | None) -> str:
    """Where a thread is, from the outside in."""
    return "" if frame is None else "".join(traceback.format_list(traceback.extract_stack(frame)))


def tell(level: int, stack: str, message: str, *arguments: object) -> None:
    """Log a message with a stack below it."""
    if _log.isEnabledFor(level):
        record = _log.makeRecord(_log.name, level, __file__, 0, message, arguments, None)
        record.stack_info = stack.rstrip("\n") or None
        _log.handle(record)
