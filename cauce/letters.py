"""The dead letters of services: which there are, of what cause, and what a person decides about them.

What the command line does, and any other face may do: plain functions on the stores of a bus.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from cauce.clock import Clock
from cauce.errors import Refused
from cauce.letter import envelope_of, with_mended
from cauce.schema import Schema, is_about
from cauce.store import Letter, Stores, no_letter

__all__ = ["Choice", "Decided", "Group", "by_cause", "cause_of", "discard", "edit", "found", "one", "retry"]

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBER = re.compile(
    r"\b(?:[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}|0x[0-9a-fA-F]+|[0-9a-fA-F]*\d[0-9a-fA-F]{7,}|\d+(?:\.\d+)?)\b"
)


class Choice(msgspec.Struct, frozen=True):
    """Which dead letters; what is empty does not narrow.

    `cause` is text in the error or the cause, in any case of letters; `since` is the earliest time at which it died,
    in microseconds since 1970.
    """

    service: str = ""
    consumer: str = ""
    position: int | None = None
    cause: str = ""
    stream: str = ""
    since: int = 0

    def takes(self, letter: Letter) -> bool:
        return (
            self.consumer in ("", letter.consumer)
            and self.position in (None, letter.position)
            and self.stream in ("", letter.stream)
            and letter.died >= self.since
            and (
                self.cause.casefold() in letter.error.casefold() or self.cause.casefold() in cause_of(letter).casefold()
            )
        )


class Group(msgspec.Struct, frozen=True):
    """Dead letters of one consumer with the same cause, oldest first."""

    service: str
    consumer: str
    cause: str
    letters: list[Letter]

    @property
    def behind(self) -> int:
        """How many later messages wait for these."""
        return sum(each.behind for each in self.letters)


class Decided(msgspec.Struct, frozen=True):
    """Those of which it was decided, and those that were gone by then: somebody else had decided."""

    letters: list[Letter]
    gone: list[Letter]


def cause_of(letter: Letter) -> str:
    """The error without what differs from message to message: its key, numbers, ids and what is quoted."""
    line = (letter.error.splitlines() or [""])[0]
    key = letter.stream.partition("/")[2]
    if key:
        line = re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "…", line)
    return _NUMBER.sub("…", _QUOTED.sub("…", line))


async def found(stores: Stores, choice: Choice) -> list[Letter]:
    """These dead letters, service by service, oldest first. Raises `Refused` for a service without a store."""
    return [_sound(letter) for letter in await stores.letters(choice.service) if choice.takes(letter)]


async def one(stores: Stores, service: str, consumer: str, position: int) -> Letter:
    """A dead letter. Raises `Refused` if there is none."""
    letters = await found(stores, Choice(service, consumer, position))
    if not letters:
        raise no_letter(service, consumer, position)
    return letters[0]


def by_cause(letters: Sequence[Letter]) -> list[Group]:
    """The same by service, consumer and cause, the most first."""
    groups: dict[tuple[str, str, str], list[Letter]] = {}
    for letter in letters:
        groups.setdefault((letter.service, letter.consumer, cause_of(letter)), []).append(letter)
    return sorted((Group(*key, each) for key, each in groups.items()), key=lambda group: -len(group.letters))


async def retry(stores: Stores, letters: Sequence[Letter]) -> Decided:
    """Let these be tried again, as if for the first time; each then the later ones of its thing, in order."""
    return await _decide(stores.retry, letters)


async def discard(stores: Stores, letters: Sequence[Letter]) -> Decided:
    """Give these up: their consumers go on behind them. The messages stay in their logs."""
    return await _decide(stores.discard, letters)


async def _decide(decide: Callable[[str, str, int], Awaitable[None]], letters: Sequence[Letter]) -> Decided:
    decided = Decided([], [])
    for letter in letters:
        try:
            await decide(letter.service, letter.consumer, letter.position)
        except Refused:
            decided.gone.append(letter)
        else:
            decided.letters.append(letter)
    return decided


async def edit(
    stores: Stores, letter: Letter, body: bytes, by: str, clock: Clock, schema: Schema | None = None
) -> Letter:
    """Keep another body beside that of a dead letter: its handler is given it when it is tried again.

    What stands in the log, and what was kept of it, is not changed.

    Parameters:
        schema: what knows its type; None: only the one acceptance rule is asked.

    Raises `Refused` for a body that is not to be had, or about another thing, and if the letter is not as it was seen;
    `Unreadable` for one that does not fit its type.
    """
    before = bytes(letter.message)
    after = with_mended(before, body, by, clock.now())
    kept = envelope_of(after)
    if schema is not None:
        message = schema.decode(kept.source.removeprefix("/"), kept.type, kept.schemaversion, body)
        if not is_about(message, kept.subject):
            raise Refused(f"{kept.type} would be about another thing than {kept.subject!r}: leave the key as it was")
    await stores.edit(letter.service, letter.consumer, letter.position, before, after)
    return msgspec.structs.replace(letter, message=msgspec.Raw(after))


def _sound(letter: Letter) -> Letter:
    """With a message that can be shown, whatever was kept: what is no JSON as base64."""
    try:
        msgspec.json.decode(letter.message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raw = msgspec.json.encode({"raw_base64": b64encode(bytes(letter.message)).decode()})
        return msgspec.structs.replace(letter, message=msgspec.Raw(raw))
    return letter
