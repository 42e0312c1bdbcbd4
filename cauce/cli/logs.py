"""How `cauce run` writes its log: text for people, or one JSON object a line for machines."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import click

from cauce.cli.text import json_line, one_line
from cauce.ext.logs import FIELDS, Because

__all__ = ["FORMATS", "begin", "formatter", "tell"]

_log = logging.getLogger("cauce")

FORMATS = ("text", "json")


def begin(format: str) -> None:
    """Write what is logged to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Because())
    handler.setFormatter(formatter(format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def formatter(format: str, text: str = "%(asctime)s %(levelname)-8s %(because)s%(message)s") -> logging.Formatter:
    """One of `FORMATS`; `text` is the line of the first."""
    return _Json() if format == "json" else _Text(text)


def tell(text: str) -> None:
    """Say something of the process itself: among its log where that is JSON, else as it is."""
    if any(isinstance(each.formatter, _Json) for each in logging.getLogger().handlers):
        _log.info("%s", text)
    else:
        click.echo(text, err=True)


class _Text(logging.Formatter):
    """Messages of handlers hold what others wrote: it commands no terminal, and looks like no line of ours.

    In brackets stands the id of the message with which it all began, the same in the logs of all services.
    """

    def format(self, record: logging.LogRecord) -> str:
        first, *more = super().format(record).split("\n")
        return "\n".join((one_line(first), *(f"    {one_line(line)}" for line in more)))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it so
        record.message = one_line(record.message)
        began = getattr(record, "correlation", "")
        record.because = f"[{one_line(str(began))}] " if began else ""
        return super().formatMessage(record)


_OURS = {*vars(logging.makeLogRecord({})), *FIELDS, "message", "asctime", "because", "taskName"}
_LARGEST = 63
"""Bits of a number that is one in every reader of JSON."""


class _Json(logging.Formatter):
    """One object a line: time, level, logger, message, what is known of `FIELDS`, an exception, and `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _said(record),
        }
        told |= {name: _plain(found) for name in FIELDS if (found := getattr(record, name, None))}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = self.formatStack(record.stack_info)
        extra = {name: _plain(value) for name, value in vars(record).items() if name not in _OURS}
        if extra:
            told["extra"] = extra
        return json_line(told)


def _said(record: logging.LogRecord) -> str:
    """Its message. Whoever logs what cannot be told must still find it, as an object, among the others."""
    try:
        return record.getMessage()
    except Exception as error:
        return f"{_repr(record.msg)} cannot be told with {_repr(record.args)}: {type(error).__name__}"


def _plain(value: Any) -> Any:
    if type(value) is int and value.bit_length() > _LARGEST:
        return _repr(value)
    return value if value is None or type(value) in (str, int, float, bool) else _repr(value)


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__} without a repr: {type(error).__name__}>"
