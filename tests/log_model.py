"""The log seam as a plain model, in lists and dicts: what a log must answer, whatever was done before."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cauce.accept import slot_of
from cauce.codec import Entry
from cauce.errors import Conflict, Fenced, Held, IdReused
from cauce.log import Also, Claim, Filter

__all__ = ["Model", "Said", "wanted"]

Said = tuple[object, ...]


class Model:
    """The log seam in lists and dicts: what it says is `Said`, without positions, which are each log's own affair."""

    def __init__(self) -> None:
        self.facts: list[Entry] = []
        self.records: list[Entry] = []
        self.claims: dict[str, Claim] = {}

    def of(self, stream: str) -> list[Entry]:
        return [entry for entry in self.facts if entry.stream == stream]

    def append(
        self,
        stream: str,
        entries: list[Entry],
        expect: int | None,
        fence: Claim | None,
        repeat: bool,
        also: Sequence[Also] = (),
    ) -> Said:
        before = self.of(stream)
        if fence is not None and self.fence(fence.name) != fence.fence:
            return (Fenced,)
        found = next((n for n, entry in enumerate(before) if repeat and entry.id == entries[0].id), None)
        if found is not None:
            # One append lies side by side, and only what one append wrote is its repetition.
            at = self.facts.index(before[found])
            beside = [self.core(entry) for entry in self.facts[at : at + len(entries)] if entry.stream == stream]
            same = beside == [self.core(entry) for entry in entries]
            return (found + len(entries), True) if same else (IdReused,)
        if expect is not None and expect != len(before):
            return (Conflict, stream, expect, len(before))
        for each in also:
            stands = len(self.of(each.stream))
            if each.expect is not None and each.expect != stands:
                return (Conflict, each.stream, each.expect, stands)
        for added in (entries, *(each.entries for each in also)):
            for n, entry in enumerate(added, start=len(self.of(added[0].stream)) + 1):
                self.facts.append(msgspec.structs.replace(entry, version=n))
        return (len(before) + len(entries), False)

    @staticmethod
    def core(entry: Entry) -> Said:
        return (entry.type, entry.meta.schema, entry.body)

    def put(self, stream: str, version: int, entry: Entry) -> Said:
        before = next((each for each in self.records if each.stream == stream), None)
        if before is not None and before.version >= version:
            return (before.version, True)
        self.records = [each for each in self.records if each.stream != stream]
        self.records.append(msgspec.structs.replace(entry, version=version))
        return (version, False)

    def fence(self, name: str) -> int | None:
        return self.claims[name].fence if name in self.claims and self.claims[name].owner else None

    def claim(self, name: str, claim: Claim | None, over: Claim | None) -> Said:
        """`claim` is what the log gave, None if it gave none."""
        stands = self.claims.get(name)
        if stands is not None and stands.owner and (over is None or (over.name, over.fence) != (name, stands.fence)):
            return (Held, stands)
        assert claim is not None
        assert claim.fence > (stands.fence if stands else 0)
        self.claims[name] = claim
        return (claim,)

    def beat(self, claim: Claim, later: Claim | None) -> Said:
        if self.fence(claim.name) != claim.fence:
            return (Fenced,)
        assert later is not None
        assert (later.owner, later.fence) == (claim.owner, claim.fence)
        self.claims[claim.name] = later
        return (later,)

    def release(self, claim: Claim) -> None:
        if self.fence(claim.name) == claim.fence:
            self.claims[claim.name] = Claim(claim.name, "", claim.fence)


def wanted(filter: Filter, entry: Entry) -> bool:
    return (
        filter.stream in (None, entry.stream)
        and (not filter.domains or entry.domain in filter.domains)
        and (not filter.types or entry.type in filter.types)
        and (not filter.slots or slot_of(entry.key) in filter.slots)
    )
