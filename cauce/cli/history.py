"""`cauce history`: what changed of one thing, by which event and whose wish."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator

import click
import msgspec

from cauce.cli.place import as_json, bus, reading
from cauce.cli.text import count, cut, one_line, print_json, width
from cauce.cli.thing import exact_time, thing
from cauce.errors import Gone
from cauce.fold import Folder
from cauce.history import changes
from cauce.messages import Record
from cauce.past import Change

__all__ = ["columns", "history", "told"]

_COLUMNS = 100
_LEAST = 60
_NAME = 24
"""Columns that the name of a field gets at most."""
_EVENT, _LEAST_EVENT = 44, 24
_SHARED = 24
"""So much alike at the beginning of two values that do not fit is left out, but for its end."""
_KEPT = 8
_ABSENT = "(none)"


@click.command()
@click.argument("module", metavar="MODULE[:SERVICE]")
@click.argument("stream")
@bus
@as_json
@click.option(
    "--after", default=0, show_default=True, type=click.IntRange(min=0), help="Only what came later than this version."
)
def history(module: str, stream: str, url: str, as_json: bool, after: int) -> None:
    """Print what changed of STREAM, such as users/42: field by field, by which event, by which command of whom.

    It is folded from the log by the functions of MODULE; the service need not run. With --json each change is one
    object on one line.
    """
    folder, key = thing(module, stream)
    asyncio.run(_history(url, folder, key, after, as_json))


async def _history(url: str, folder: Folder, key: str, after: int, as_json: bool) -> None:
    name, number = f"{folder.domain}/{key}", 0
    async with reading(url) as logs:
        async for change in changes(folder, logs.facts, key, after=after):
            number += 1
            if as_json:
                print_json(_plain(name, change))
            else:
                for line in told(change, columns()):
                    click.echo(line)
                click.echo()
    if not number:
        behind = f" behind version {after}" if after else ""
        raise Gone(f"{name} has no facts{behind}: look for its name with cauce tail")
    if not as_json:
        click.secho(f"{one_line(name)}: {count(number, 'change')}", dim=True)


def columns() -> int:
    """How wide what is told may be."""
    return max(_LEAST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else _COLUMNS


def _plain(stream: str, change: Change[Record]) -> dict[str, object]:
    return {
        "stream": stream, "version": change.version, "position": change.position, "time": change.time.isoformat(),
        "event": change.event, "id": change.id, "by": change.by, "wish": change.wish, "causation": change.causation,
        "correlation": change.correlation,
        "fields": {name: {"before": before, "after": after} for name, (before, after) in change.fields.items()},
        "after": change.after,
    }  # fmt: skip


def told(change: Change[Record], columns: int) -> Iterator[str]:
    """The lines that tell of a change, none wider than so many columns."""
    version, when = f"{change.version:>4}  ", f"{exact_time(change.time):<26}  "
    left = columns - len(version) - len(when)
    event = cut(one_line(change.event), min(_EVENT, left))
    gap = " " * (max(_LEAST_EVENT - width(event), 0) + 2)
    said = " ".join(each for each in (change.wish, f"by {change.by}" if change.by else "") if each)
    who = cut(one_line(said), left - width(event) - len(gap))
    line = click.style(version, fg="cyan") + click.style(when, dim=True) + click.style(event, bold=True)
    yield line + gap + who if who else line
    yield from _fields(change, columns)


def _fields(change: Change[Record], columns: int) -> Iterator[str]:
    fields = [each for name, both in change.fields.items() for each in _apart(name, *both)]
    if not fields:
        yield click.style("        nothing changed", dim=True)
        return
    names = min(_NAME, max(width(name) for name, _, _ in fields))
    left = columns - 8 - names - 2
    for name, before, after in fields:
        shown = cut(name, names)
        start = shown + " " * (names - width(shown) + 2)
        if change.before is None:
            yield click.style("      + ", fg="green") + start + click.style(cut(after, left), fg="green")
        elif change.after is None:
            yield click.style("      - ", fg="red") + start + click.style(cut(before, left), fg="red")
        else:
            was, now = _both(before, after, left - 3)
            yield f"        {start}{click.style(was, fg='red')} → {click.style(now, fg='green')}"


def _apart(name: str, before: object, after: object) -> Iterator[tuple[str, str, str]]:
    """A field with its values as they are shown; of an object that was changed each field that differs: `data.size`."""
    was, now = msgspec.to_builtins(before), msgspec.to_builtins(after)
    if not (isinstance(was, dict) and isinstance(now, dict) and was.keys() & now.keys()):
        yield one_line(name), _text(was), _text(now)
        return
    for each in dict.fromkeys((*was, *now)):
        inner = f"{name}.{each}"
        if each not in was:
            yield one_line(inner), _ABSENT, _text(now[each])
        elif each not in now:
            yield one_line(inner), _text(was[each]), _ABSENT
        elif was[each] != now[each]:
            yield from _apart(inner, was[each], now[each])


def _both(before: str, after: str, columns: int) -> tuple[str, str]:
    """Two values that share so many columns: where they are too long for it, what differs is seen."""
    if width(before) + width(after) > columns:
        shared = next(
            (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        if shared > _SHARED:
            before, after = (f"…{each[shared - _KEPT :]}" for each in (before, after))
    half = columns // 2
    for_before = max(half, columns - width(after)) if width(before) > half else width(before)
    before = cut(before, for_before)
    return before, cut(after, columns - width(before))


def _text(value: object) -> str:
    """A plain value on one line: text as it is where it cannot be taken for something else, all else as JSON."""
    if isinstance(value, str) and value == value.strip() and not _is_json(value):
        return one_line(value)
    return one_line(msgspec.json.encode(value).decode())


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return text == ""
    return True
