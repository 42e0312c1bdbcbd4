"""What is given in the place of an answer that cannot be had now."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from cauce.errors import Refused, Unavailable
from cauce.messages import Copy

__all__ = ["or_else"]

_log = logging.getLogger("cauce")


async def or_else(work: Callable[[], Awaitable[Any]], fallback: Callable[[], Any], what: str) -> Any:
    """What the work comes to; where that is nobody's fault but the moment's, what the fallback gives.

    Parameters:
        fallback: a plain function, called here and now, so it must not block; or an async one.
        what: is asked, for the log.
    """
    if not callable(fallback) or (isinstance(fallback, type) and issubclass(fallback, Copy)):
        raise Refused(f"fallback={fallback!r}: pass a function without parameters, or to `ctx.fetch` an own copy")
    try:
        return await work()
    except Unavailable as error:
        _log.debug("%s is answered by its fallback: %s", what, error)
        given = fallback()
        return await given if inspect.isawaitable(given) else given
