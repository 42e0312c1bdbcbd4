"""What is wrong between the messages as the code declares them today and what was locked of them, here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cauce.compatible import Change, changes, described, fields_of
from cauce.corpus import Corpus, Locked
from cauce.errors import CauceError, Refused
from cauce.messages import Domain, Message, declared
from cauce.reader import Reader, readers
from cauce.replay import Replay, Sample
from cauce.schema import Schema
from cauce.service import Service, bind, bound_parts
from cauce.upcaster import check_chain, upcasts

__all__ = ["Finding", "Report", "check"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that would break a reader: what, where, and who reads it.

    `readers` read the field, or take the message where no field is named; `handed` hand the message on, and may.
    """

    what: str
    domain: str = ""
    type: str = ""
    version: int = 0
    field: str = ""
    readers: tuple[str, ...] = ()
    handed: tuple[str, ...] = ()


class Report(msgspec.Struct):
    """What was found, what could not be looked at (`notes`), and how much was."""

    findings: list[Finding] = []
    notes: list[str] = []
    types: int = 0
    samples: int = 0


def check(
    domains: Iterable[Domain], services: Iterable[Service], corpus: Corpus, other: Corpus | None = None
) -> Report:
    """Compare what these domains declare with a lock folder, and with that of another repository.

    Parameters:
        services: whose functions read the messages, and whose `evolve` folds the samples of events.
        other: what others send; found is what this code cannot read of it.

    Raises `Refused` for a function whose parameters cannot be right.
    """
    return _Check(list(domains), list(services)).report(corpus, other)


class _Check:
    """One look at one state of the code."""

    def __init__(self, domains: Sequence[Domain], services: Sequence[Service]) -> None:
        self._domains = {domain.name for domain in domains}
        self._owned = {domain.name for service in services for domain in service.owns}
        bounds = [(service, bound_parts(service)) for service in services]
        self._readers = readers(bounds)
        self._found = Report()
        for service in services:
            try:
                bind(service)
            except Refused as error:
                # Such as a copy of a field that its record has no more: what else is found says who reads it.
                self._found.findings.append(Finding(f"service {service.name} would not start: {error}"))
        self._classes: dict[tuple[str, str], type[Message]] = {}
        self._now: dict[type[Message], dict[str, Any]] = {}
        whole = []
        for domain in domains:
            for cls in domain.messages.values():
                self._classes |= {(domain.name, name): cls for name in declared(cls).names}
                if self._is_whole(cls):
                    whole.append(cls)
        self._schema = Schema(whole)
        self._replay = Replay(bounds, self._schema)

    def report(self, corpus: Corpus, other: Corpus | None) -> Report:
        report = self._found
        report.findings += _damage(corpus)
        report.types, report.samples = len(self._now), 0
        for cls in self._now:
            self._against_lock(cls, corpus)
        for row in corpus.rows:
            if (row.domain, row.type) not in self._classes:
                self._add(
                    row,
                    "was locked, and is declared no more: keep the class, or name it in was= of the one that took its place",
                )
        self._samples(corpus, "")
        if other is not None:
            report.findings += _damage(other)
            for row in other.rows:
                self._of_others(row, other, corpus)
            self._samples(other, f" of {other.folder}")
        report.notes += self._replay.notes
        return report

    def _is_whole(self, cls: type[Message]) -> bool:
        kind = declared(cls)
        try:
            check_chain(cls)
            self._now[cls] = described(cls)
        except Refused as error:
            self._found.findings.append(Finding(str(error), kind.domain.name, kind.name, kind.version))
            return False
        return True

    # ------------------------------------------------------------------------------------------------ the own lock

    def _against_lock(self, cls: type[Message], corpus: Corpus) -> None:
        kind, now = declared(cls), self._now[cls]
        rows = [row for row in corpus.rows if row.domain == kind.domain.name and row.type in kind.names]
        rows.sort(key=lambda row: row.version)
        if corpus.is_there and corpus.of(kind.domain.name, kind.name, kind.version) is None and not corpus.wrong:
            here = Locked(kind.domain.name, kind.name, kind.version, kind.kind, "")
            self._add(here, "is not locked: run cauce schema lock, and commit what it writes")
        for row in rows:
            then = corpus.schema(row)
            if row.version > kind.version:
                self._add(row, f"was locked, and the class says version={kind.version}: a version is never taken back")
            elif row.version == kind.version and then is not None and then != now:
                self._unraised(row, then, cls)
            elif row.version < kind.version and then is not None and not upcasts(cls):
                self._unlifted(row, then, cls)
        older = [then for row in rows if row.version < kind.version and (then := corpus.schema(row)) is not None]
        if older and upcasts(cls):
            self._still_read(cls, older)

    def _unraised(self, row: Locked, then: dict[str, Any], cls: type[Message]) -> None:
        """The fields changed, the version did not."""
        for change in changes(then, self._now[cls]) or [Change("", "type", "its schema changed", True)]:
            more = f", and add @upcast({cls.__name__}, from_version={row.version})" if change.breaks else ""
            self._add(
                row, f"{change.text}, but the version was not raised: say version={row.version + 1}{more}", change, cls
            )

    def _unlifted(self, row: Locked, then: dict[str, Any], cls: type[Message]) -> None:
        """The version was raised, and nothing lifts what cannot be read as it is."""
        for change in changes(then, self._now[cls]):
            if change.breaks:
                self._add(
                    row,
                    f"{change.text}, and nothing lifts older bodies: add @upcast({cls.__name__}, from_version={row.version})",
                    change,
                    cls,
                )

    def _still_read(self, cls: type[Message], older: Sequence[dict[str, Any]]) -> None:
        """A field that upcasters took away, and that somebody reads all the same."""
        kind, gone = (
            declared(cls),
            {name for then in older for name in fields_of(then)} - fields_of(self._now[cls]).keys(),
        )
        here = Locked(kind.domain.name, kind.name, kind.version, kind.kind, "")
        told = {each.field for each in self._found.findings if (each.domain, each.type) == (here.domain, here.type)}
        mine = [each for each in self._readers if each.message is cls]
        for name in sorted(gone - told):
            if not hasattr(cls, name) and any(name in each.fields and not _elsewhere(each, name) for each in mine):
                self._add(here, "was removed, and is still read", Change(name, "removed", "", True), cls)

    # ----------------------------------------------------------------------------------------------------- samples

    def _samples(self, corpus: Corpus, where: str) -> None:
        """Each body through today's upcasters, and events through `evolve`."""
        read: list[Sample] = []
        for row in corpus.rows:
            cls = self._classes.get((row.domain, row.type))
            if cls is None or cls not in self._now or row.version > declared(cls).version:
                continue
            bodies = corpus.samples(row)
            if not bodies:
                self._found.notes.append(f"{row.name} has no samples{where}: none can be made from its type")
            self._found.samples += len(bodies)
            failed = []
            for number, body in enumerate(bodies, start=1):
                try:
                    read.append(Sample(row, number, self._schema.decode(row.domain, row.type, row.version, body)))
                except CauceError as error:
                    failed.append((number, str(error)))
            if failed:
                self._add(row, _failed(failed, "read", where), None, cls)
        for failure in self._replay.failures(read):
            what = _failed(failure.samples, "folded", where)
            row = failure.row
            self._found.findings.append(Finding(what, row.domain, row.type, row.version, "", (failure.reader,)))

    # ------------------------------------------------------------------------------------- what others send

    def _of_others(self, row: Locked, other: Corpus, corpus: Corpus) -> None:
        if row.domain not in self._domains:
            return
        cls = self._classes.get((row.domain, row.type))
        if cls is None:
            if row.kind in ("command", "query") and row.domain in self._owned:
                self._add(row, f"is sent by {other.folder}, and this owner does not know it")
            elif row.kind == "event" and row.domain in self._owned:
                self._add(
                    row,
                    f"is in {other.folder}, and this owner does not know it, so no thing that has one can be folded",
                )
            else:
                self._found.notes.append(f"{row.name} is in {other.folder} only: nobody here reads it")
            return
        version, theirs = declared(cls).version, other.schema(row)
        if row.version > version:
            self._add(
                row,
                f"is in {other.folder}, and this code reads up to version {version}: deploy the newer class here first",
                None,
                cls,
            )
            return
        mine = corpus.of(row.domain, row.type, row.version)
        ours = self._now.get(cls)
        if row.version < version and upcasts(cls):
            ours = None if mine is None else corpus.schema(mine)
        for change in changes(theirs, ours) if theirs is not None and ours is not None else ():
            if change.breaks and change.what != "removed":
                self._add(row, f"in {other.folder} it {change.text} here", change, cls)

    # ---------------------------------------------------------------------------------------------------- telling

    def _add(self, row: Locked, what: str, change: Change | None = None, cls: type[Message] | None = None) -> None:
        field = "" if change is None else change.field
        mine = [each for each in self._readers if each.message is cls]
        name = field.partition(".")[0].removesuffix("[]")
        reads = [each for each in mine if not field or name in each.fields]
        may = [each for each in mine if field and each.whole and each not in reads]
        self._found.findings.append(Finding(what, row.domain, row.type, row.version, field, _names(reads), _names(may)))


def _damage(corpus: Corpus) -> list[Finding]:
    strange = [
        f"{corpus.folder / name} was not locked: remove it; only cauce schema lock adds files"
        for name in corpus.unknown
    ]
    return [Finding(each) for each in (*corpus.wrong, *strange)]


def _names(found: Iterable[Reader]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.name for each in found))


def _failed(samples: Sequence[tuple[int, str]], what: str, where: str) -> str:
    numbers = ", ".join(str(number) for number, _ in samples)
    return f"sample{'s' if len(samples) > 1 else ''} {numbers}{where} cannot be {what}: {samples[0][1]}"


def _elsewhere(reader: Reader, field: str) -> bool:
    """Whether another message that the same parameter may be has the field, so that it may be read of that one only."""
    return any(hasattr(other, field) for other in reader.others)
