"""Log records that know because of what they were written: plain `logging`, for whatever handlers a team has.

    handler.addFilter(Because())

Each record gets `correlation`, the id with which it all began; `service` and `handler`, what was at work; `message_id`,
`stream` and `position` of the message it had in hand. What is not known is empty, a position 0; what was given by
`extra` stays as it is.
"""

from __future__ import annotations

import logging

from cauce.bus import correlation, handling

__all__ = ["FIELDS", "Because"]

FIELDS = ("correlation", "service", "handler", "message_id", "stream", "position")


class Because(logging.Filter):
    """Lets all records pass, and tells them what they are because of."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = handling.get()
        if context is None:
            values = (correlation.get(), "", "", "", "", 0)
        else:
            began = correlation.get() or context.correlation
            values = began, context.service, context.handler, context.cause.id, context.stream, context.position
        for name, value in zip(FIELDS, values, strict=True):
            if not hasattr(record, name):
                setattr(record, name, value)
        return True
