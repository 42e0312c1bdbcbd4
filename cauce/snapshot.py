"""Records as snapshots: a written record saves a fold the facts before it. It never decides what stands.

Whatever is wrong with one, the fold begins at the first fact, and says so once.
"""

from __future__ import annotations

import logging

from cauce.codec import Entry, Meta
from cauce.errors import Damaged, Unreadable
from cauce.folded import Folded
from cauce.log import Filter, Log
from cauce.messages import Record
from cauce.schema import Schema

__all__ = ["Snapshots"]

_log = logging.getLogger("cauce")
_TOLD = 1_000


class Snapshots:
    """The records of one domain, as a fold begins with them.

    Parameters:
        fold: names the code by which they must have been made.
    """

    def __init__(self, domain: str, fold: str, schema: Schema) -> None:
        self._domain, self._fold, self._schema = domain, fold, schema
        self._told = set[str]()

    async def read(self, records: Log, stream: Filter) -> Folded | None:
        """The last written record of a thing; None if there is none, or none to go on from."""
        page = await records.read(stream, limit=1)
        if not page.entries:
            return None
        entry = page.entries[-1]
        try:
            meta = entry.checked().meta
            if not meta.fold or meta.fold != self._fold:
                self._say(
                    self._domain,
                    f"records of {self._domain} were made by other evolve functions, or another version of Python ({entry.stream} is the first "
                    "that was met): what stands is folded from its first fact, until its next record is written",
                )
                return None
            return self._made(entry, meta)
        except (Damaged, Unreadable) as error:
            self.ignored(entry.stream, str(error))
            return None

    def _made(self, entry: Entry, meta: Meta) -> Folded:
        state = self._schema.decode(self._domain, entry.type, meta.schema, entry.body) if entry.body else None
        if state is not None and not isinstance(state, Record):
            raise Unreadable(f"{entry.type} of {self._domain} is no record")
        return Folded(state, entry.version, meta.upto, entry.id)

    def follows(self, snapshot: Folded, entries: list[Entry], stream: Filter) -> bool:
        """Whether the stream, read from the fact that made the record, begins with that fact."""
        first = entries[0] if entries else None
        same = first is not None and (
            (first.position, first.version, first.id) == (snapshot.position, snapshot.version, snapshot.id)
        )
        if not same:
            self.ignored(
                f"{stream.stream}",
                f"it was made by version {snapshot.version} at position {snapshot.position}, which is not there",
            )
        return same

    def ignored(self, stream: str, why: str) -> None:
        """Say once for each thing that its record is of no use."""
        self._say(stream, f"the record of {stream} is ignored, and it is folded from its first fact: {why}")

    def _say(self, about: str, text: str) -> None:
        if about not in self._told and len(self._told) < _TOLD:
            self._told.add(about)
            _log.warning("%s", text)
