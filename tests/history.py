"""What went wrong in a run, found in what its clients were told and in what is stored when all is quiet.

The things that are watched count. Each fact of the type `REACTED` must have one effect in the store of a service, and
one command that the service said because of it, which made one fact of the type `ANSWERED`. A copy of a thing is how
many facts of each type it has.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["REACTED", "Copy", "Effect", "Fact", "History", "Said", "Seen", "Told", "findings"]

REACTED = "Added"
ANSWERED = "Confirmed"


class Told(NamedTuple):
    """What a client was told of a wish. `nothing`: that nothing was written; `sent`: that it will be decided."""

    id: str
    key: str
    outcome: Literal["accepted", "rejected", "nothing", "unknown", "sent"]
    version: int = 0
    position: int = 0


class Fact(NamedTuple):
    """An entry of the facts, in the order in which it was read. `cause`: the id of the wish."""

    position: int
    key: str
    version: int
    type: str
    id: str
    cause: str


class Effect(NamedTuple):
    """A row that a handler stored because of a fact; numbers rise in the order of storing."""

    number: int
    key: str
    version: int
    instance: str = ""


class Said(NamedTuple):
    """A command in its log, in the order in which it was read. `cause`: the id of the fact that made it be said."""

    id: str
    key: str
    cause: str


class Seen(NamedTuple):
    """A version that somebody was shown of a thing, in the order in which that happened. `where`: by whom."""

    where: str
    key: str
    version: int


class Copy(NamedTuple):
    """How a thing stands: how many facts of each kind it has. A record also tells its version."""

    added: int
    confirmed: int
    version: int


@dataclass
class History:
    """All that is known of a run. `copies`: by who keeps them, such as "record", then by key."""

    told: list[Told] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    copies: dict[str, dict[str, Copy]] = field(default_factory=dict)


def findings(history: History) -> list[str]:
    """All that may not be, as sentences; nothing if the run kept every promise."""
    checks: Iterable[Callable[[History], Iterator[str]]] = (_told, _versions, _effects, _said, _answers, _seen, _copies)
    return [finding for check in checks for finding in check(history)]


def _told(history: History) -> Iterator[str]:
    """What was acknowledged stands once, where it was said to stand; what was not is not there."""
    by_cause = defaultdict[str, list[Fact]](list)
    for fact in history.facts:
        by_cause[fact.cause].append(fact)
    for told in history.told:
        found = by_cause[told.id]
        what = f"wish {told.id} for {told.key}"
        if len(found) > 1:
            yield f"{what} is there {len(found)} times: versions {[fact.version for fact in found]}"
        elif not found and told.outcome in ("accepted", "sent"):
            yield f"{what} was {told.outcome} and is not there"
        elif found and told.outcome in ("rejected", "nothing"):
            yield f"{what} stands at version {found[0].version}, its client was told {told.outcome}"
        elif found and found[0].key != told.key:
            yield f"{what} is a fact of {found[0].key}"
        elif found and told.outcome == "accepted" and (found[0].version, found[0].position) != told[3:]:
            yield f"{what} was told version {told.version} at {told.position}, it stands at {found[0].version} at {found[0].position}"


def _versions(history: History) -> Iterator[str]:
    """Positions rise, versions count without gaps, and no id is there twice."""
    last, position = Counter[str](), 0
    for fact in history.facts:
        if fact.position <= position:
            yield f"position {fact.position} comes after {position}"
        if fact.version != last[fact.key] + 1:
            yield f"{fact.key} goes from version {last[fact.key]} to {fact.version}"
        last[fact.key], position = fact.version, fact.position
    for id, many in Counter(fact.id for fact in history.facts).items():
        if many > 1:
            yield f"fact {id} is there {many} times"


def _effects(history: History) -> Iterator[str]:
    """Each fact has its effect once, in the order of its thing."""
    wanted = {(fact.key, fact.version) for fact in history.facts if fact.type == REACTED}
    found = Counter((effect.key, effect.version) for effect in history.effects)
    for key, version in sorted(wanted - found.keys()):
        yield f"{key} version {version} has no effect"
    for (key, version), many in sorted(found.items()):
        if (key, version) not in wanted:
            yield f"{key} version {version} has an effect, and is no such fact"
        elif many > 1:
            yield f"{key} version {version} has its effect {many} times"
    last = dict[str, Effect]()
    for effect in sorted(history.effects):
        before = last.get(effect.key)
        if before is not None and before.version > effect.version:
            yield f"{effect.key} version {effect.version} (by {effect.instance}) has its effect after version {before.version} (by {before.instance})"
        last[effect.key] = effect


def _said(history: History) -> Iterator[str]:
    """Because of each fact one command was said, in the order of its thing."""
    facts = {fact.id: fact for fact in history.facts if fact.type == REACTED}
    found = Counter(said.cause for said in history.said if said.cause in facts)
    for id, fact in facts.items():
        if found[id] != 1:
            yield f"because of {fact.key} version {fact.version} a command was said {found[id]} times"
    last = Counter[str]()
    for said in history.said:
        if (cause := facts.get(said.cause)) is not None:
            if cause.version < last[said.key]:
                yield f"{said.key}: the command of version {cause.version} was said after that of {last[said.key]}"
            last[said.key] = cause.version


def _answers(history: History) -> Iterator[str]:
    """Each command that was said made one fact, in the order in which it was said."""
    number = {said.id: n for n, said in enumerate(history.said)}
    answers = [fact for fact in history.facts if fact.type == ANSWERED]
    found, last = Counter(fact.cause for fact in answers), dict[str, int]()
    causes = {fact.id for fact in history.facts}
    for said in history.said:
        if said.cause in causes and found[said.id] != 1:
            yield f"command {said.id} for {said.key} made {found[said.id]} facts"
    for fact in answers:
        n = number.get(fact.cause, -1)
        if n < 0:
            yield f"{fact.key} version {fact.version} answers a command that nobody said"
        elif n < last.get(fact.key, -1):
            yield f"{fact.key} version {fact.version} answers a command that was said before the last one"
        last[fact.key] = n


def _seen(history: History) -> Iterator[str]:
    """What is shown of a thing never goes back."""
    last = dict[tuple[str, str], int]()
    for seen in history.seen:
        before = last.get((seen.where, seen.key), 0)
        if seen.version < before:
            yield f"{seen.where} showed version {seen.version} of {seen.key} after {before}"
        last[seen.where, seen.key] = seen.version


def _copies(history: History) -> Iterator[str]:
    """At the end all copies are what the facts make of them."""
    added, confirmed, last = Counter[str](), Counter[str](), dict[str, int]()
    for fact in history.facts:
        added[fact.key] += fact.type == REACTED
        confirmed[fact.key] += fact.type == ANSWERED
        last[fact.key] = fact.version
    wanted = {key: Copy(added[key], confirmed[key], version) for key, version in last.items()}
    for where, copies in history.copies.items():
        for key in sorted(wanted.keys() | copies.keys()):
            if copies.get(key) != wanted.get(key):
                yield f"{where} of {key} is {copies.get(key)}, the facts make {wanted.get(key)}"
