"""What views, reactions and replicas of every service take, also of those that do not run: kept in the catalogue."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import msgspec

from cauce.clock import Clock
from cauce.codec import Meta, sealed
from cauce.errors import Conflict, Refused, Unreadable
from cauce.log import Filter, Log, entries_of

__all__ = ["Reads", "Takes", "check_told", "enter", "readers"]

Takes = dict[str, dict[str, tuple[str, ...]]]
"""By domain and handler all names of the types of events. The reactions of a service are one handler."""

_STREAM = "_takes/services"
_encode = msgspec.json.Encoder(order="sorted").encode


class Reads(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one reader of a service wants of which log: by domain all names of the types, none means all.

    `now`: where it never was it begins with what comes from then on.
    """

    kind: Literal["on", "decide", "view", "replica"]
    name: str
    log: Literal["facts", "commands", "records"]
    wants: dict[str, tuple[str, ...]]
    now: bool = False


class _Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    service: str
    takes: Takes
    reads: tuple[Reads, ...] = ()


_decode = msgspec.json.Decoder(_Entry).decode


async def enter(facts: Log, service: str, reads: tuple[Reads, ...], clock: Clock) -> None:
    """Enter what the readers of a service want, if that is not what the catalogue says already."""
    entered = _Entry(service, _taken(reads), reads)
    while True:
        all_of_them, version = await _read(facts)
        if all_of_them.get(service, _Entry(service, {})) == entered:
            return
        body = _encode(entered)
        try:
            await facts.append(_STREAM, [sealed(_STREAM, "Takes", clock.id(), Meta(clock.now()), body)], expect=version)
        except Conflict:
            continue


async def check_told(
    facts: Log, domain: str, types: Mapping[str, Collection[str]], event: str, without: Collection[str]
) -> None:
    """Raises `Refused`, naming them, if views or reactions that take one of these types do not take an event.

    Parameters:
        types: all names of each, by that of today: a service may run code that is older, or newer.
        without: services that are not asked for it.
    """
    services, _ = await _read(facts)
    deaf = list[str]()
    for service, entered in sorted(services.items()):
        for handler, taken in sorted(entered.takes.get(domain, {}).items()):
            missed = sorted(name for name, names in types.items() if not set(taken).isdisjoint(names))
            if missed and event not in taken and service not in without:
                deaf.append(f"{handler} of {service}, taking {' and '.join(missed)}")
    if deaf:
        raise Refused(
            f"{'; '.join(deaf)}: would not be told. Let {'each' if len(deaf) > 1 else 'it'} take {_typed(event)}, too, give those events inverses "
            "with @service.invert, or name services that are gone, or do not mind, with without="
        )


def _taken(reads: Iterable[Reads]) -> Takes:
    """Which events its views and reactions take: the reactions together, who undoes must tell one of them."""
    found: dict[str, dict[str, set[str]]] = {}
    for each in reads:
        if each.log == "facts":
            handler = f"view {each.name}" if each.kind == "view" else "the reactions"
            for domain, types in each.wants.items():
                found.setdefault(domain, {}).setdefault(handler, set()).update(types)
    return {
        domain: {handler: tuple(sorted(types)) for handler, types in handlers.items()}
        for domain, handlers in found.items()
    }


def _typed(event: str) -> str:
    return f"Restored[{event.removeprefix('Restored')}]"


async def readers(facts: Log) -> dict[str, tuple[Reads, ...]]:
    """By service what each of its readers wants, as the code said that was started last.

    Raises `Unreadable`.
    """
    return {service: entered.reads for service, entered in (await _read(facts))[0].items()}


async def _read(facts: Log) -> tuple[Mapping[str, _Entry], int]:
    """What each service takes, and the version of the stream that says so."""
    found, version = dict[str, _Entry](), 0
    async for entry in entries_of(facts, Filter(_STREAM)):
        try:
            each = _decode(entry.checked().body or b"")
        except msgspec.MsgspecError as error:
            raise Unreadable(
                f"position {entry.position} ({entry.stream} version {entry.version}) does not say what a service takes: {error}: deploy the code that wrote it"
            ) from None
        found[each.service], version = each, entry.version
    return found, version
