"""Which rules bind a domain, and the tags of a new one, made from what stands before anybody decides by it.

The last entry of `_rules/<domain>` says by which rules whoever owns the domain decides. It is changed only by who holds
all slots, and each who takes a slot looks at it then: so nobody writes who does not count what others count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from cauce.clock import Clock
from cauce.codec import Entry, Meta, sealed
from cauce.errors import Refused
from cauce.fold import Folder
from cauce.log import Appended, Claim, Filter, Log, entries_of
from cauce.tags import Borne, Count, Rule, borne, count_of, stream_of

__all__ = ["Binding", "are_coming", "build", "check", "standing", "void"]

_PAGE = 256
"""Things that are looked at together."""

_AT_ONCE = 1_000
"""Tags that are counted together: one thing may bear many, and a log refuses who has too much on the way."""

_CACHED = 100_000
_encode = msgspec.json.Encoder().encode


class Binding(msgspec.Struct, frozen=True):
    """A rule that binds: what its code is named, the number of its build, whether that has ended, and what it counts.

    `records` is the log whose positions the build goes by.
    """

    code: str
    since: int
    built: bool
    records: str = ""


_decode = msgspec.json.Decoder(dict[str, Binding]).decode


async def standing(facts: Log, domain: str) -> tuple[dict[str, Binding], int]:
    """The rules that bind a domain, and the version of the entry that says so."""
    said = [entry async for entry in entries_of(facts, Filter(f"_rules/{domain}"))]
    return (_decode(said[-1].checked().body or b"{}"), said[-1].version) if said else ({}, 0)


async def check(facts: Log, domain: str, rules: Sequence[Rule]) -> dict[str, int]:
    """The number of the build of each rule.

    Raises `Refused` where others bind the domain: who decided by these would leave the tags of those uncounted.
    """
    stands, _ = await standing(facts, domain)
    if not _agree(stands, rules):
        raise Refused(
            f"{domain} is bound by {_named(stands)}, and this code has {_named({rule.name: rule for rule in rules})}: "
            "stop all instances of the service, then start those that shall run"
        )
    return {name: each.since for name, each in stands.items()}


async def are_coming(facts: Log, domain: str, rules: Sequence[Rule]) -> bool:
    """Whether just these rules bind the domain, or will as soon as their tags are made."""
    stands, _ = await standing(facts, domain)
    return _are_named(stands, rules)


async def void(facts: Log, domain: str, fence: Claim, clock: Clock) -> None:
    """Let no rule bind a domain whose slots are all held here: who starts next builds the tags anew."""
    stands, version = await standing(facts, domain)
    if stands:
        await _say(facts, domain, {}, version, fence, clock)


async def build(
    facts: Log, records: Log, folder: Folder, rules: Sequence[Rule], fences: Sequence[Claim], clock: Clock
) -> None:
    """Have just these rules bind the domain, whose slots are all held here and whose records are all written.

    What was begun and not ended is gone on with, if the records are still the same log. Raises `Refused` where more
    bear a tag than may, and `Fenced` where a slot was taken over meanwhile.

    Parameters:
        fences: of all slots.
    """
    # All who do this hold the first.
    domain, fence = folder.domain, fences[0]
    stands, version = await standing(facts, domain)
    if _agree(stands, rules):
        return
    lost = any(not each.built and each.records != records.id for each in stands.values())
    if lost or not _are_named(stands, rules):
        kept = {rule.name: stands[rule.name] for rule in rules if rule.name in stands}
        stands = {
            rule.name: kept[rule.name]
            if rule.name in kept and kept[rule.name].code == rule.code and kept[rule.name].built
            else Binding(rule.code, version + 1, False, records.id)
            for rule in rules
        }
        version = await _say(facts, domain, stands, version, fence, clock)
    due = [(rule, stands[rule.name].since) for rule in rules if not stands[rule.name].built]
    if due:
        # Who takes a slot from here on finds these rules, and takes none; who did before is met now.
        await asyncio.gather(*(facts.beat(each) for each in fences))
        await _Building(facts, records, folder, due, fence, clock).run()
        done = {name: msgspec.structs.replace(each, built=True) for name, each in stands.items()}
        await _say(facts, domain, done, version, fence, clock)


def _agree(stands: Mapping[str, Binding], rules: Sequence[Rule]) -> bool:
    return _are_named(stands, rules) and all(each.built for each in stands.values())


def _are_named(stands: Mapping[str, Binding], rules: Sequence[Rule]) -> bool:
    return {name: each.code for name, each in stands.items()} == {rule.name: rule.code for rule in rules}


def _named(rules: Mapping[str, object]) -> str:
    return f"the rules {', '.join(sorted(rules))} as they were written" if rules else "no rules"


async def _say(facts: Log, domain: str, stands: Mapping[str, Binding], version: int, fence: Claim, clock: Clock) -> int:
    stream = f"_rules/{domain}"
    entry = sealed(stream, "Bound", clock.id(), Meta(clock.now()), _encode(stands))
    return (await facts.append(stream, [entry], expect=version, fence=fence)).version


class _Bearers(msgspec.Struct, frozen=True):
    """Those of some things that bear a tag."""

    rule: Rule
    tag: str
    things: list[Entry]


class _Building:
    """One pass over all that stands, some things at a time."""

    def __init__(
        self, facts: Log, records: Log, folder: Folder, due: Sequence[tuple[Rule, int]], fence: Claim, clock: Clock
    ) -> None:
        self._facts, self._records, self._folder, self._due = facts, records, folder, due
        self._fence, self._clock = fence, clock
        self._counts: dict[str, Count] = {}
        self._rooms: dict[str, int] = {}
        """Where the record says how many may bear a tag: the most that was said, as not all say the same."""

    async def run(self) -> None:
        wanted, looked = Filter(domains=frozenset({self._folder.domain})), 0
        while looked < await self._records.head():
            page = await self._records.read(wanted, after=looked, limit=_PAGE, bodies=False)
            await self._page(page.entries)
            looked = page.looked

    async def _page(self, entries: Sequence[Entry]) -> None:
        folds = [self._folder.fold(self._facts, entry.key, records=self._records) for entry in entries]
        bearing: dict[str, _Bearers] = {}
        for entry, folded in zip(entries, await asyncio.gather(*folds), strict=True):
            for rule, since in self._due:
                for tag in rule.tags(folded.state):
                    stream = stream_of(rule, since, tag)
                    bearing.setdefault(stream, _Bearers(rule, tag, [])).things.append(entry)
                    if callable(rule.most):
                        self._rooms[stream] = max(rule.room(folded.state), self._rooms.get(stream, 0))
        streams = list(bearing)
        for first in range(0, len(streams), _AT_ONCE):
            await self._count({stream: bearing[stream] for stream in streams[first : first + _AT_ONCE]})

    async def _count(self, bearing: Mapping[str, _Bearers]) -> None:
        if len(self._counts) >= _CACHED:
            self._counts.clear()
        unknown = [stream for stream in bearing if stream not in self._counts]
        for stream, count in zip(
            unknown, await asyncio.gather(*(count_of(self._facts, stream) for stream in unknown)), strict=True
        ):
            self._counts[stream] = count
        futures = list[asyncio.Future[Appended]]()
        try:
            for stream, bearers in bearing.items():
                future = self._counted(stream, bearers)
                if future is not None:
                    futures.append(future)
        finally:
            await asyncio.gather(*futures)

    def _counted(self, stream: str, bearers: _Bearers) -> asyncio.Future[Appended] | None:
        count, rule = self._counts[stream], bearers.rule
        # Nobody writes the domain meanwhile, so its records stay where they are, whoever goes on with the build.
        new = [entry for entry in bearers.things if entry.position > count.borne.upto]
        if not new:
            return None
        n, room = count.borne.n + len(new), self._rooms[stream] if callable(rule.most) else rule.most
        if n > room:
            keys = [*([count.borne.by] if count.borne.n else []), *(entry.key for entry in new)]
            raise _clash(rule, bearers.tag, n, room, keys)
        stands = Borne(n, new[-1].key, new[-1].position)
        entry = borne(stream, stands, new[-1], self._clock.now())
        self._counts[stream] = Count(count.version + 1, stands, count.looked)
        return self._facts.append(stream, [entry], expect=count.version, fence=self._fence)


def _clash(rule: Rule, tag: str, n: int, room: int, keys: Sequence[str]) -> Refused:
    named = " and ".join(f"{rule.domain}/{key}" for key in keys[:3])
    return Refused(
        f"rule {rule.name} of {rule.domain}: {tag!r:.200} is borne by {n} ({named}{', …' if len(keys) > 3 else ''}), and at most {room} "
        "may: start the service without the rule, let a command change or delete what is too much, then start it with the rule"
    )
