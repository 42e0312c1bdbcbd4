"""`cauce dead`: the messages that failed too often, and what becomes of them."""

from __future__ import annotations

import asyncio
import getpass
import shlex
import sys
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, BinaryIO, TypeVar

import click
import msgspec

from cauce.bus import check_line
from cauce.cli.place import as_json, bus, store, stores_of
from cauce.cli.run import find
from cauce.cli.text import count, one_line, print_json
from cauce.cli.thing import exact_time, time_given
from cauce.clock import SystemClock
from cauce.codec import micros, moment
from cauce.errors import Refused
from cauce.letter import Envelope, envelope_of
from cauce.letters import Choice, Decided, by_cause, cause_of, found, one
from cauce.letters import discard as discard_these
from cauce.letters import edit as edit_one
from cauce.letters import retry as retry_these
from cauce.messages import Message, declared
from cauce.schema import Schema
from cauce.service import bind
from cauce.store import Letter, Stores

__all__ = ["dead"]

F = TypeVar("F", bound=Callable[..., Any])
_INDENT = "    "


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


_one = _all(
    click.argument("service"), click.argument("consumer"), click.argument("position", type=int), bus, store, as_json
)
"""The arguments that name one dead letter."""

_narrowed = _all(
    click.argument("service", default=""),
    click.argument("consumer", default=""),
    click.option("--cause", default="", metavar="TEXT", help="Those with this text in their error or cause."),
    click.option("--stream", default="", metavar="STREAM", help="Those of one thing, such as users/42."),
    click.option("--since", callback=time_given, metavar="TIME", help="Those that died at this time or later."),
    bus, store, as_json,
)  # fmt: skip
"""What says which."""

_decided_by = _all(
    click.argument("position", type=int, default=None, required=False),
    click.option("--dry-run", is_flag=True, help="Only show which."),
    click.option("--yes", is_flag=True, help="Do not ask."),
)


@click.group()
def dead() -> None:
    """Messages that a consumer has tried too often. Later ones of the same thing wait until a person decides."""


@dead.command("list")
@_narrowed
@click.option("--each", is_flag=True, help="One line for each, not for each cause.")
def list_(
    service: str, consumer: str, each: bool, cause: str, stream: str, since: datetime | None, url: str,
    store: str | None, as_json: bool,
) -> None:  # fmt: skip
    """The dead letters of a service, or of all, by cause. With --json each is one object on one line."""
    letters = asyncio.run(_found(url, store, _choice(service, consumer, None, cause, stream, since)))
    if as_json:
        for letter in letters:
            print_json(_plain(letter))
    else:
        _print(_lines(letters) if each else _grouped(letters))
        if not letters:
            click.echo("No dead letters.")


@dead.command()
@_one
def show(service: str, consumer: str, position: int, url: str, store: str | None, as_json: bool) -> None:
    """One dead letter, with the message as it came, what was mended of it, and the traceback."""
    letter = asyncio.run(_letter(url, store, service, consumer, position))
    if as_json:
        print_json(_plain(letter))
        return
    _print(_lines([letter]))
    _print(_told(envelope_of(bytes(letter.message)), bytes(letter.message)))
    _print(_INDENT + line for line in letter.trace.splitlines())


@dead.command()
@_one
@click.option(
    "--body", type=click.File("rb"), metavar="FILE", help="What the body shall be, as JSON; - for standard input."
)
@click.option(
    "--code", default="", metavar="MODULE[:SERVICE]", help="What knows its type: a body that does not fit is refused."
)
@click.option("--by", default=None, help="Who mends it, kept beside it; else the name of the user.")
def edit(
    service: str, consumer: str, position: int, body: BinaryIO | None, code: str, by: str | None, url: str,
    store: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Mend the body of one dead letter, in $EDITOR or from a file; then try it again with `cauce dead retry`.

    The handler is given the mended body. The message in the log, and what was kept of it here, stays as it was.
    """
    name = check_line(_user() if by is None else by, "by")
    schema = _schema(code) if code else None
    letter = asyncio.run(_letter(url, store, service, consumer, position))
    text = body.read() if body is not None else _written(envelope_of(bytes(letter.message)))
    letter = asyncio.run(_edit(url, store, letter, text, name, schema))
    if as_json:
        print_json(_plain(letter))
    else:
        _print([f"{_name(letter)} ({letter.stream}) is mended, and tried so by: cauce dead retry {_argument(letter)}"])


@dead.command()
@_narrowed
@_decided_by
def retry(
    service: str, consumer: str, position: int | None, cause: str, stream: str, since: datetime | None, dry_run: bool,
    yes: bool, url: str, store: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Try one again, or many, as if for the first time; then the later ones of their things, in order.

    Without POSITION all that the rest names, after it was shown and agreed to.
    """
    choice = _choice(service, consumer, position, cause, stream, since)
    _decide(url, store, choice, retry_these, "tried again", as_json=as_json, yes=yes, dry_run=dry_run)


@dead.command()
@_narrowed
@_decided_by
def discard(
    service: str, consumer: str, position: int | None, cause: str, stream: str, since: datetime | None, dry_run: bool,
    yes: bool, url: str, store: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Give one up, or many: their consumers go on with the later ones of their things. The messages stay in their logs.

    Without POSITION all that the rest names, after it was shown and agreed to.
    """
    choice = _choice(service, consumer, position, cause, stream, since)
    _decide(url, store, choice, discard_these, "given up", as_json=as_json, yes=yes, dry_run=dry_run)


def _decide(
    url: str, store: str | None, choice: Choice, decide: Callable[[Stores, Sequence[Letter]], Awaitable[Decided]],
    what: str, *, as_json: bool, yes: bool, dry_run: bool,
) -> None:  # fmt: skip
    if choice.position is not None:
        letters = [asyncio.run(_letter(url, store, choice.service, choice.consumer, choice.position))]
    else:
        letters = asyncio.run(_found(url, store, choice))
        if not as_json:
            _print(_grouped(letters))
        if letters and not dry_run and not yes:
            _ask(len(letters), what)
    if dry_run or not letters:
        decided, would = Decided(letters, []), "would be "
    else:
        decided, would = asyncio.run(_done(url, store, decide, letters)), ""
    if as_json:
        for letter in decided.letters:
            print_json(_plain(letter))
        return
    if len(letters) == 1 and decided.letters:
        _print([f"{_name(letters[0])} ({letters[0].stream}) {would or 'is '}{what}"])
    else:
        click.echo(f"{count(len(decided.letters), 'dead letter')} {would}{what}")
    if decided.gone:
        click.echo(f"{count(len(decided.gone), 'dead letter')} was gone by then: somebody else had decided")


def _ask(many: int, what: str) -> None:
    """Raises `Refused` where nobody can be asked."""
    if not sys.stdin.isatty():
        raise Refused(f"{count(many, 'dead letter')} would be {what}, and nobody is there to be asked: say --yes")
    if not click.confirm(f"Shall {count(many, 'dead letter')} be {what}?", err=True):
        raise Refused("nothing was decided")


# -------------------------------------------------------------------------------------------------------- the stores


async def _found(url: str, store: str | None, choice: Choice) -> list[Letter]:
    async with stores_of(url, store) as stores:
        return await found(stores, choice)


async def _letter(url: str, store: str | None, service: str, consumer: str, position: int) -> Letter:
    async with stores_of(url, store) as stores:
        return await one(stores, service, consumer, position)


async def _done(
    url: str, store: str | None, decide: Callable[[Stores, Sequence[Letter]], Awaitable[Decided]], letters: Sequence[Letter]
) -> Decided:  # fmt: skip
    async with stores_of(url, store) as stores:
        return await decide(stores, letters)


async def _edit(url: str, store: str | None, letter: Letter, body: bytes, by: str, schema: Schema | None) -> Letter:
    async with stores_of(url, store) as stores:
        return await edit_one(stores, letter, body, by, SystemClock(), schema)


# ----------------------------------------------------------------------------------------------------------- editing


def _choice(
    service: str, consumer: str, position: int | None, cause: str, stream: str, since: datetime | None
) -> Choice:
    return Choice(service, consumer, position, cause, stream, 0 if since is None else micros(since))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _schema(code: str) -> Schema:
    """All message types that the services of a module take, or that are declared beside those."""
    classes = dict[type[Message], None]()
    for service in find(code).values():
        for bound in bind(service):
            for cls in bound.messages:
                classes |= dict.fromkeys((cls, *declared(cls).domain.messages.values()))
    return Schema(classes)


def _written(envelope: Envelope) -> bytes:
    """What a person makes of a body in an editor. Raises `Refused` where nothing was changed."""
    if not sys.stdin.isatty():
        raise Refused("there is no terminal for an editor: give the body with --body FILE, or --body -")
    stands = bytes(envelope.data if envelope.mended is None else envelope.mended.data) or b"{}"
    text = click.edit(msgspec.json.format(stands, indent=2).decode(), extension=".json")
    if text is None:
        raise Refused("nothing was changed")
    return text.encode()


# ----------------------------------------------------------------------------------------------------------- showing


def _plain(letter: Letter) -> dict[str, Any]:
    return msgspec.structs.asdict(letter) | {"cause": cause_of(letter)}


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(one_line(line))


def _name(letter: Letter) -> str:
    return f"{letter.service} {letter.consumer} {letter.position}"


def _argument(letter: Letter) -> str:
    return shlex.join((letter.service, letter.consumer, str(letter.position)))


def _lines(letters: Sequence[Letter]) -> Iterable[str]:
    for letter in letters:
        behind = f", {count(letter.behind, 'later message')} behind it" if letter.behind else ""
        died = f", since {exact_time(moment(letter.died))}" if letter.died else ""
        yield f"{_name(letter)}: {letter.stream}, {count(letter.attempts, 'attempt')}{died}{behind}: {letter.error}"


def _grouped(letters: Sequence[Letter]) -> Iterable[str]:
    for group in by_cause(letters):
        behind = f", {count(group.behind, 'later message')} behind" if group.behind else ""
        first = group.letters[0]
        yield f"{group.service} {group.consumer}: {count(len(group.letters), 'dead letter')}{behind}: {group.cause}"
        yield f"{_INDENT}{first.stream}: {first.error}"
        yield f"{_INDENT}cauce dead show {_argument(first)}"


def _told(envelope: Envelope, kept: bytes) -> Iterable[str]:
    """The message, readable; whole where it is none of ours."""
    if not envelope.type:
        yield kept.decode(errors="replace")
        return
    yield f"{envelope.type} {envelope.source}/{envelope.subject} of {envelope.time}, schema version {envelope.schemaversion}"
    if envelope.data_base64:
        body = b64decode(envelope.data_base64)
        yield f"{_INDENT}a body of {count(len(body), 'byte')} that is no JSON, as base64: {envelope.data_base64}"
    yield from _pretty(bytes(envelope.data))
    if envelope.mended is not None:
        yield f"mended by {envelope.mended.by or 'somebody'} at {envelope.mended.time}"
        yield from _pretty(bytes(envelope.mended.data))


def _pretty(body: bytes) -> Iterable[str]:
    if body:
        yield from (_INDENT + line for line in msgspec.json.format(body, indent=2).decode(errors="replace").split("\n"))
