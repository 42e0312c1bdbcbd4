"""What `cauce verify` finds on every backend alike: whether the entries of three logs are what was written.

A backend gives all entries of a log, in their order, to a `Walk`, and looks after what is its own: tables and files,
settings, counts of what was removed on purpose. Memory holds a few numbers for each stream, whatever they contain.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from cauce.accept import SLOTS, check_key
from cauce.codec import Entry, digest
from cauce.errors import CauceError, NotPermitted, Refused, Unavailable
from cauce.twice import Twice

__all__ = [
    "LOGS", "Doubt", "Fact", "Finding", "Findings", "Repeats", "Report", "Walk", "check_entered", "check_holder",
    "check_mark", "check_record", "upto_of", "wished_by",
]  # fmt: skip

LOGS = ("facts", "commands", "records")
_MOST = 1000


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is not as it was written. `log` and `position` name the entry, where it is about one.

    `kind` is file, schema, structure (what the storage itself says), names, entry (its bytes), order (positions and
    versions), twice (an id or a wish), records (and the facts they were made of), catalogue, witness, wal or claims.
    """

    kind: str
    message: str
    log: str = ""
    position: int = 0


class Report(msgspec.Struct, frozen=True):
    """What `verify` saw. `ok`: nothing was found. `more` counts findings beyond those that are listed.

    `path` is the file of a bus, or the address of one on a server.
    """

    path: str
    ok: bool
    id: str
    entries: dict[str, int]
    heads: dict[str, int]
    streams: int
    findings: list[Finding]
    more: int = 0


class Findings:
    """What was found up to now."""

    def __init__(self) -> None:
        self.listed: list[Finding] = []
        self.more = 0

    def add(self, kind: str, message: str, log: str = "", position: int = 0) -> None:
        if len(self.listed) < _MOST:
            self.listed.append(Finding(kind, message, log, position))
        else:
            self.more += 1

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Whatever fails in it is a finding: damaged storage may fail in any way.

        Only what cannot be read now, or not by us, is raised: that says nothing of what is there.
        """
        try:
            yield
        except (Unavailable, NotPermitted):
            raise
        except CauceError as error:
            self.add(kind, str(error))
        except Exception as error:
            self.add(kind, f"{type(error).__name__}: {error}")


class Fact(msgspec.Struct, frozen=True, gc=False):
    """A fact as a record names it."""

    stream: str
    version: int
    id: str


class Doubt(msgspec.Struct, frozen=True):
    """A stream of commands that goes on where it should not, unless what stood at `before` is forgotten by now.

    0: nothing was met of it before, and it does not begin at version 1.
    """

    before: int
    finding: Finding


class _Envelope(msgspec.Struct):
    causation: str = ""
    upto: int = 0


_CAUSATION = b'"causation":"'
_envelope = msgspec.json.Decoder(_Envelope).decode


# ------------------------------------------------------------------------------------------------------ the entries


class Walk:
    """One log as it is read, entry after entry.

    `last` and `count` say how far that has come, `missing` how many positions were passed that nobody wrote or
    somebody took away. `doubts` are for those to settle who read page by page, while others forget. `asked` are
    records whose facts are not the last of their streams: `there` says of which positions one must know more.

    Parameters:
        facts: the walk through the facts that is over, where this is one through their records.
        forgot: whether some entries are gone on purpose.
        moves: whether what was read may come again, newer, at the end.
    """

    def __init__(
        self, log: str, found: Findings, facts: Walk | None = None, *, forgot: bool = False, moves: bool = False
    ) -> None:
        self.log, self._found, self._facts, self._forgot, self._moves = log, found, facts, forgot, moves
        self.last = self.count = self.missing = 0
        self.doubts: list[Doubt] = []
        self.asked: list[tuple[Entry, int]] = []
        self.marks: list[tuple[Entry, int]] = []
        self.twice = Twice()
        self._numbers: dict[str, int] = {}
        self._versions, self._positions, self._ids = array("q"), array("q"), array("q")

    @property
    def streams(self) -> Collection[str]:
        return self._numbers.keys()

    def passed(self, position: int) -> bool:
        """Something stands at this position. Gives whether it comes after what came before."""
        if position <= self.last:
            self._found.add("order", f"{self.log} position {position} comes after {self.last}", self.log, position)
            return False
        if position > self.last + 1:
            self.missing += position - self.last - 1
            if self.log == "facts":
                self._found.add(
                    "order", f"facts positions {self.last + 1} to {position - 1} are missing", "facts", self.last + 1
                )
        self.last = position
        return True

    def ended(self, head: int, who: str) -> None:
        """The log ends here. Parameters: head: where it should, as `who` says."""
        self.missing += max(0, head - self.last)
        if self.last < head and self.log == "facts":
            self._found.add(
                "order", f"facts end at position {self.last}, but {who} says {head}: what is between is lost",
                "facts", self.last,
            )  # fmt: skip

    def unread(self, stream: str, position: int, why: str) -> None:
        """An entry that cannot be read, but of which stream it is can be told."""
        if self.passed(position):
            self.count += 1
            self._found.add("entry", why, self.log, position)
            number = self._number(stream)
            self._versions[number], self._positions[number] = self._versions[number] + 1, position

    def see(self, entries: Iterable[Entry]) -> None:
        """The hot loop: every entry of a log passes here once."""
        log, found, add = self.log, self._found, self.twice.open.append
        is_facts, is_records = log == "facts", log == "records"
        for entry in entries:
            stream, version, position = entry.stream, entry.version, entry.position
            if position != self.last + 1:
                if not self.passed(position):
                    continue
            else:
                self.last = position
            self.count += 1
            try:
                whole = digest(entry, version) == entry.digest
            except (TypeError, ValueError):
                whole = False
            if not whole:
                found.add(
                    "entry", f"{log} position {position} ({stream} version {version}) is not what was written",
                    log, position,
                )  # fmt: skip
            number = self._number(stream)
            if is_records:
                self._record(entry, number, whole=whole)
            else:
                if version != self._versions[number] + 1:
                    self._leap(entry, number)
                add(hash(stream) ^ hash(entry.id))
                if is_facts and entry.wish is not None and (cause := wished_by(entry.raw)):
                    add(hash(stream) ^ hash(cause))
            if is_facts and whole and stream[0] == "_":
                check_entered(entry, found)
            self._versions[number], self._positions[number], self._ids[number] = version, position, hash(entry.id)
        self.twice.tidy()

    def _number(self, stream: str) -> int:
        number = self._numbers.get(stream)
        if number is None:
            number = self._numbers[stream] = len(self._versions)
            for each in (self._versions, self._positions, self._ids):
                each.append(0)
        return number

    def _leap(self, entry: Entry, number: int) -> None:
        before, where = self._versions[number], f"{self.log} position {entry.position} is {entry.stream}"
        finding = Finding("order", f"{where} version {entry.version}, after version {before}", self.log, entry.position)
        if self.log == "commands" and entry.version > 0:
            # A stream that lost its beginning, or all, and began again at 1.
            if self._forgot and not before:
                return
            if self._moves:
                self.doubts.append(Doubt(self._positions[number], finding))
                return
        self._found.add(finding.kind, finding.message, finding.log, finding.position)

    # ------------------------------------------------------------------------------------------------ records

    def _record(self, entry: Entry, number: int, *, whole: bool) -> None:
        before, again = self._versions[number], self._positions[number] > 0
        if again and not (self._moves and entry.version > before):
            self._found.add(
                "order", f"records position {entry.position} is {entry.stream} version {entry.version}, after version {before}",
                "records", entry.position,
            )  # fmt: skip
        if not whole or entry.stream[0] == "_":
            if whole and entry.stream.startswith("_written/"):
                self.marks.append((entry, upto_of(entry.raw)))
            return
        upto = upto_of(entry.raw)
        if upto and not (self._facts is not None and self._facts.ends(entry, upto)):
            self.asked.append((entry, upto))

    def ends(self, record: Entry, upto: int) -> bool:
        """Whether a stream of these facts ends with the very fact that made a record."""
        number = self._numbers.get(record.stream)
        if number is None:
            return False
        return (self._versions[number], self._positions[number], self._ids[number]) == (
            record.version, upto, hash(record.id),
        )  # fmt: skip

    def settle(self, there: Mapping[int, Fact], head: int) -> None:
        """Say what is wrong with the records that were asked for, and the marks.

        Parameters:
            there: the facts at the positions that they name, as far as there are any.
            head: where the facts end, asked for after these records were read.
        """
        for entry, upto in self.asked:
            check_record(entry, upto, there.get(upto), head, self._found)
        for entry, upto in self.marks:
            check_mark(entry, upto, head, self._found)
        self.asked, self.marks = [], []


class Repeats:
    """A second look at a log in which something may stand twice, by its hash: only what still does is told."""

    def __init__(self, log: str, hashes: Collection[int], found: Findings) -> None:
        self._log, self._hashes, self._found = log, hashes, found
        self._seen: dict[tuple[str, str, bool], Entry] = {}

    def see(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            stream = hash(entry.stream)
            if stream ^ hash(entry.id) in self._hashes:
                self._once(entry, entry.id, wish=False)
            if self._log == "facts" and entry.wish is not None and stream ^ hash(wished_by(entry.raw)) in self._hashes:
                self._once(entry, _read(entry.raw).causation, wish=True)

    def _once(self, entry: Entry, id: str, *, wish: bool) -> None:
        first = self._seen.setdefault((entry.stream, id, wish), entry)
        if first is not entry:
            what = f"the command {id} was accepted twice" if wish else f"the id {id} stands twice"
            self._found.add(
                "twice",
                f"{self._log} position {entry.position} ({entry.stream} version {entry.version}): {what}, "
                f"first at position {first.position} (version {first.version})",
                self._log, entry.position,
            )  # fmt: skip


def wished_by(raw: bytes) -> bytes:
    """The id of the command that made a fact as it stands in the envelope, or the beginning of it."""
    begin = raw.find(_CAUSATION)
    return raw[begin + len(_CAUSATION) : raw.find(b'"', begin + len(_CAUSATION))] if begin >= 0 else b""


def upto_of(raw: bytes) -> int:
    """The position of the fact up to which a record includes all; 0 where that is not said."""
    return _read(raw).upto


def _read(raw: bytes) -> _Envelope:
    try:
        return _envelope(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
        return _Envelope()


# -------------------------------------------------------------------------------------------- what refers to others


def check_record(entry: Entry, upto: int, fact: Fact | None, head: int, found: Findings) -> None:
    """Whether the fact that made a record is there."""
    where = f"records position {entry.position} ({entry.stream} version {entry.version}) was made by the fact at {upto}"
    if upto > head:
        found.add("records", f"{where}, but the facts end at {head}", "records", entry.position)
    elif fact is None:
        found.add("records", f"{where}, which is not there", "records", entry.position)
    elif (fact.stream, fact.version, fact.id) != (entry.stream, entry.version, entry.id):
        found.add("records", f"{where}, where {fact.stream} version {fact.version} stands", "records", entry.position)


def check_mark(entry: Entry, upto: int, head: int, found: Findings) -> None:
    """Whether a mark says of no more facts than there are that their records are written."""
    where = f"records position {entry.position} ({entry.stream} version {entry.version})"
    _, _, slot = entry.stream.rpartition("/")
    if not (slot.isdecimal() and int(slot) < SLOTS):
        found.add("records", f"{where} is the mark of no slot", "records", entry.position)
    if max(upto, entry.version) > head:
        found.add(
            "records", f"{where} says that records are written up to {max(upto, entry.version)}, but the facts end at {head}",
            "records", entry.position,
        )  # fmt: skip


class _Owned(msgspec.Struct):
    """What `_catalogue/<domain>` says."""

    service: str


class _Kept(msgspec.Struct):
    """What `_services/<service>` says."""

    store: str
    place: str


class _Takes(msgspec.Struct):
    """What `_takes/services` says."""

    service: str
    takes: dict[str, dict[str, list[str]]]


_ENTERED: dict[str, type[_Owned | _Kept | _Takes]] = {"_catalogue": _Owned, "_services": _Kept, "_takes": _Takes}


def check_entered(entry: Entry, found: Findings) -> None:
    """Whether a fact in a stream of the bus's own says what it is there to say."""
    domain, _, name = entry.stream.partition("/")
    where = f"facts position {entry.position} ({entry.stream} version {entry.version})"
    shape = _ENTERED.get(domain)
    if shape is None:
        return
    try:
        msgspec.json.decode(entry.body or b"", type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        found.add("catalogue", f"{where} is no entry of the catalogue: {error}", "facts", entry.position)
    if shape is _Owned and entry.version > 1:
        found.add("catalogue", f"{where} gives {name} an owner a second time", "facts", entry.position)


def check_holder(log: str, name: str, owner: str, fence: int, beat: int, found: Findings) -> None:
    """Whether a claim is one that a log could have given."""
    try:
        check_key(name)
        sound = log in LOGS and fence > 0 and beat >= 0 and (not owner or bool(check_key(owner)))
    except Refused:
        sound = False
    if not sound:
        found.add("claims", f"the claim {name!r} of {log} by {owner!r} (fence {fence}, beat {beat}) is none")
