"""Whether a log still is what was written: broken pages by SQLite's own check, the rest by our digests and counts."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from cauce.accept import slot_of
from cauce.backends.sqlite.chain import forgotten, written_upto, wrong_chapters
from cauce.backends.sqlite.file import APPLICATION_ID, FORMAT, SCHEMA, folder_of
from cauce.backends.sqlite.peek import looking, wal_of
from cauce.backends.sqlite.wal import Rest, rest
from cauce.backends.sqlite.witness import Witness
from cauce.codec import Entry, digest
from cauce.errors import Refused
from cauce.twice import Twice
from cauce.verify import (
    LOGS,
    Fact,
    Findings,
    Repeats,
    Report,
    check_entered,
    check_holder,
    check_mark,
    check_record,
    upto_of,
    wished_by,
)

__all__ = ["Seen", "check", "verify", "witnessed"]

_FARTHEST = 2**40
_SOME = 2**16 - 1

Seen = tuple[bytes, tuple[int, int, int]]
"""What a witness saw: the id of the log, empty if there was no commit yet, and the heads of `LOGS`."""

_NOTHING: Seen = (b"", (0, 0, 0))


def verify(path: Path) -> Report:
    """Read all of a log and say what is not as it was written. Never changes it, and does not stop those who write.

    It needs 300 bytes of memory a stream. While it runs, SQLite's WAL only grows. Raises `Refused` where there is no
    file; damage of any kind is a finding.
    """
    path = path.resolve()
    if not path.exists():
        raise Refused(f"there is no log at {path}: name another with --bus")
    search = _Search(path)
    seen = None
    with search.step("witness"):
        # Before anything else is read: whatever it saw must be there afterwards.
        seen = witnessed(path)
    return search.run(seen)


def check(path: Path, seen: Seen | None) -> Report:
    """As `verify`, for a copy: the witness is the one of the log that it was copied from."""
    return _Search(path).run(seen)


def witnessed(path: Path) -> Seen | None:
    """What the witness beside a log saw, None where there is no witness. Raises `Damaged`."""
    file = folder_of(path) / "witness"
    if not file.exists():
        return None
    if not os.access(file, os.R_OK | os.W_OK):
        raise Refused(f"{file} may not be opened: run this as the owner of the log")
    witness = Witness(file)
    try:
        return witness.read() or _NOTHING
    finally:
        witness.close()


class _Thing:
    """A stream as it is met: its name, its domain, and what was last seen of it in the log that is being read.

    `mark` is the hash of its name, `fact` where it ends in the facts, with the hash of the id that stands there.
    """

    __slots__ = ("domain", "fact", "id", "mark", "name", "position", "version")

    def __init__(self, name: str, domain: str) -> None:
        self.name, self.domain, self.version, self.position, self.id = name, domain, 0, 0, ""
        self.mark, self.fact = hash(name), (0, 0, 0)


class _Walk:
    """How far the reading of one log has come. `lossy`: something before could not be read, so versions may jump.

    `forgot`: so many entries were removed on purpose, so that a stream may begin behind them.
    """

    def __init__(self, log: str) -> None:
        self.log, self.last, self.count, self.forgot, self.lossy = log, 0, 0, 0, False
        self.twice = Twice()


class _Search:
    """One run over one file, and what it finds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._id = ""
        self._found = Findings()
        self.find, self.step = self._found.add, self._found.step
        self._things: dict[int, _Thing] = {}
        self._types: dict[int, tuple[str, str]] = {}
        self._walks = [_Walk(log) for log in LOGS]

    def run(self, seen: Seen | None) -> Report:
        with self.step("file"), looking(self._path) as open:
            pages, rows, tail = open(), open(), open()
            with ThreadPoolExecutor(1) as thread:
                structure = thread.submit(_structure, pages)
                try:
                    self._read(rows, structure)
                except BaseException:
                    pages.interrupt()
                    raise
            with self.step("wal"):
                self._look_behind(tail, seen)
        self._compare(seen)
        return Report(
            str(self._path), not self._found.listed, self._id, {walk.log: walk.count for walk in self._walks},
            {walk.log: walk.last for walk in self._walks}, len(self._things), self._found.listed, self._found.more,
        )  # fmt: skip

    def _read(self, connection: apsw.Connection, structure: Future[list[str]]) -> None:
        connection.execute("begin")
        for part in (self._head, self._schema, self._bus, self._name_streams, self._name_types, self._claims):
            with self.step("schema" if part == self._schema else "names"):
                part(connection)
        for walk in self._walks:
            with self.step("structure"):
                self._walk(connection, walk)
        with self.step("structure"):
            for line in structure.result():
                self.find("structure", line)

    # ------------------------------------------------------------------------------------------ what holds the entries

    def _head(self, connection: apsw.Connection) -> None:
        for pragma, wanted in (("application_id", APPLICATION_ID), ("user_version", FORMAT)):
            found = connection.pragma(pragma)
            if found != wanted:
                self.find("file", f"{pragma} is {found}, not {wanted}: this is no Cauce log of format {FORMAT}")

    def _schema(self, connection: apsw.Connection) -> None:
        query = "select type, name, tbl_name, sql from sqlite_schema"
        with apsw.Connection(":memory:") as model:
            for statement in SCHEMA:
                model.execute(statement)
            wanted = set(model.execute(query))
        for row in wanted.symmetric_difference(connection.execute(query)):
            self.find(
                "schema", f"{row[0]} {row[1]} is {'missing or changed' if row in wanted else 'not ours'}: {row[3]}"
            )

    def _bus(self, connection: apsw.Connection) -> None:
        ids = [row[0] for row in connection.execute("select id from bus")]
        if len(ids) != 1 or str(uuid.UUID(ids[0])) != ids[0]:
            self.find("names", f"the log has the ids {ids}, not one UUID")
        self._id = str(ids[0])

    def _name_streams(self, connection: apsw.Connection) -> None:
        domains: dict[str, str] = {}
        for id, kind, raw in connection.execute("select id, typeof(name), cast(name as blob) from streams"):
            name = _text(kind, raw)
            domain, slash, key = name.partition("/")
            if not slash or slot_of(key) != id % 16:
                self.find("names", f"stream {id} is named {name!r}, which does not belong to its number")
            self._things[id] = _Thing(name, domains.setdefault(domain, domain))

    def _name_types(self, connection: apsw.Connection) -> None:
        query = "select id, typeof(domain), cast(domain as blob), typeof(name), cast(name as blob) from types"
        for id, *parts in connection.execute(query):
            self._types[id] = (_text(*parts[:2]), _text(*parts[2:]))

    def _claims(self, connection: apsw.Connection) -> None:
        rows: Any = connection.execute("select log, name, owner, fence, beat from claims")
        for log, name, owner, fence, beat in rows:
            if [*map(type, (log, name, owner, fence, beat))] != [str, str, str, int, int]:
                self.find("claims", f"the claim {(log, name, owner, fence, beat)} is none")
            else:
                check_holder(log, name, owner, fence, beat, self._found)

    # --------------------------------------------------------------------------------------------------- the entries

    def _walk(self, connection: apsw.Connection, walk: _Walk) -> None:
        for thing in self._things.values():
            thing.version = thing.position = 0
        forgot: Any = forgotten(connection, walk.log)
        if type(forgot) is int and forgot >= 0:
            walk.forgot = forgot
        else:
            self.find("names", f"{forgot!r} entries of {walk.log} were removed, which is no number of them", walk.log)
        on = True
        while on:
            try:
                self._scan(connection, walk)
                on = False
            except UnicodeDecodeError:
                on = self._step_over(connection, walk)
            except apsw.Error as error:
                self.find("structure", f"{walk.log} cannot be read behind position {walk.last}: {error}", walk.log)
                on = self._leap(connection, walk)
        if walk.log == "facts":
            for thing in self._things.values():
                thing.fact = thing.version, thing.position, hash(thing.id)
        self._look_twice(connection, walk)
        if walk.log != "records" and not walk.lossy:
            self._compare_chapters(connection, walk)
            if walk.forgot and walk.last - walk.count != walk.forgot:
                self.find(
                    "order",
                    f"{walk.log} lack {walk.last - walk.count} entries, of which {walk.forgot} were removed on purpose",
                    walk.log,
                )

    def _compare_chapters(self, connection: apsw.Connection, walk: _Walk) -> None:
        """Each chapter ends where it says, and none is missing: else a stream would look shorter than it is."""
        log, upto = walk.log, written_upto(connection, walk.log)
        if type(upto) is not int or not 0 <= upto <= walk.last:
            self.find("names", f"the chapters of {log} are written up to {upto!r}, it ends at {walk.last}", log)
            return
        for stream, chapter, position, said in wrong_chapters(connection, log, upto):
            self.find("names", f"chapter {chapter} of stream {stream} ends at {position} of {log}, not at {said}", log)

    def _scan(self, connection: apsw.Connection, walk: _Walk) -> None:
        """The hot loop: every entry of a log passes here once."""
        things, types, log, last, records = self._things, self._types, walk.log, walk.last, walk.log == "records"
        facts, add = log == "facts", walk.twice.open.append
        query = f"select position, stream, version, previous, type, id, meta, wish, body, digest from {log} where position > ? order by position"
        for position, stream, version, previous, type_, id, raw, wish, body, stored in connection.execute(
            query, (last,)
        ):
            if position != last + 1 and not self._may_leap(walk, position):
                return
            walk.last = last = position
            walk.count += 1
            thing, kind = things.get(stream), types.get(type_)
            if thing is None or kind is None:
                self.find(
                    "names",
                    f"{log} position {position} names a stream or type that is not there ({stream}, {type_})",
                    log,
                    position,
                )
                continue
            entry = Entry(position, thing.name, version, kind[1], id, raw, wish, body, stored)
            try:
                whole = digest(entry, version) == stored
            except (TypeError, ValueError):
                whole = False
            # What the digest cannot tell apart: nothing, and an empty text or a zero in its place.
            whole = whole and type(body) is bytes and wish != b"" and type(stored) is int
            if not whole:
                self.find(
                    "entry",
                    f"{log} position {position} ({thing.name} version {version}) is not what was written",
                    log,
                    position,
                )
            if thing.domain != kind[0]:
                self.find(
                    "names", f"{log} position {position} ({thing.name}) has a type of domain {kind[0]!r}", log, position
                )
            if version != thing.version + 1 or records:
                self._leaps_version(walk, thing, position, version)
            if previous != thing.position and not walk.lossy:
                self._points_elsewhere(connection, walk, thing, position, previous)
            thing.version = version
            if not records:
                thing.position, thing.id = position, id
                add(thing.mark ^ hash(id))
                if facts and wish is not None and (cause := wished_by(raw)):
                    add(thing.mark ^ hash(cause))
                if not position & _SOME:
                    walk.twice.tidy()
            elif whole:
                self._refers(connection, thing, entry)
            if facts and whole and thing.domain[0] == "_":
                check_entered(entry, self._found)

    def _look_twice(self, connection: apsw.Connection, walk: _Walk) -> None:
        """Read again what may stand twice: only where something does, or two hashes are the same."""
        hashes = walk.twice.found()
        if not hashes:
            return
        repeats = Repeats(walk.log, hashes, self._found)
        query = f"select position, stream, version, id, meta, wish from {walk.log} order by position"
        for position, stream, version, id, raw, wish in connection.execute(query):
            if thing := self._things.get(stream):
                repeats.see((Entry(position, thing.name, version, "", id, raw, wish, b"", 0),))

    def _refers(self, connection: apsw.Connection, thing: _Thing, entry: Entry) -> None:
        """Whether the fact is there that made a record, and what a mark says is so."""
        upto = upto_of(entry.raw)
        head = self._walks[0].last
        if thing.domain == "_written":
            check_mark(entry, upto, head, self._found)
        elif upto and (entry.version, upto, hash(entry.id)) != thing.fact and not self._walks[0].lossy:
            query = "select s.name, f.version, f.id from facts f join streams s on s.id = f.stream where f.position = ?"
            row: Any = connection.execute(query, (upto,)).fetchone()
            check_record(entry, upto, None if row is None else Fact(*row), head, self._found)

    def _may_leap(self, walk: _Walk, position: Any) -> bool:
        """Positions count from 1; of commands some may be gone, which are counted in the end, and of records."""
        log, last = walk.log, walk.last
        if type(position) is not int or position <= last:
            self.find("order", f"{log} position {position} comes after {last}: the rest of it was not read", log, last)
            return False
        if log == "facts" or (log == "commands" and not walk.forgot):
            self.find("order", f"{log} positions {last + 1} to {position - 1} are missing", log, last + 1)
        return True

    def _leaps_version(self, walk: _Walk, thing: _Thing, position: int, version: Any) -> None:
        if type(version) is not int or version < 1:
            self.find(
                "order", f"{walk.log} position {position} ({thing.name}) has version {version!r}", walk.log, position
            )
            return
        if walk.log == "records":
            wrong = thing.version > 0
        elif walk.lossy or (walk.forgot and not thing.version):
            wrong = version <= thing.version
        else:
            wrong = True
        if wrong:
            self.find(
                "order",
                f"{walk.log} position {position} is {thing.name} version {version}, after version {thing.version}",
                walk.log,
                position,
            )

    def _points_elsewhere(
        self, connection: apsw.Connection, walk: _Walk, thing: _Thing, position: int, previous: Any
    ) -> None:
        if walk.forgot and not thing.position and type(previous) is int and 0 < previous < position:
            there = connection.execute(f"select 1 from {walk.log} where position = ?", (previous,)).fetchone()
            if there is None:
                return
        self.find(
            "order",
            f"{walk.log} position {position} ({thing.name}) points back at {previous!r}, not at {thing.position}",
            walk.log,
            position,
        )

    def _step_over(self, connection: apsw.Connection, walk: _Walk) -> bool:
        """Past the one entry whose id is no text, so that SQLite's binding cannot give it."""
        row: Any = connection.execute(
            f"select position, stream, version from {walk.log} where position > ? order by position limit 1",
            (walk.last,),
        ).fetchone()
        if row is None or row[0] <= walk.last:
            return False
        self.find("entry", f"{walk.log} position {row[0]} is not what was written: its id is no text", walk.log, row[0])
        walk.last, walk.count = row[0], walk.count + 1
        if row[1] in self._things:
            self._things[row[1]].version, self._things[row[1]].position = row[2], row[0]
        return True

    def _leap(self, connection: apsw.Connection, walk: _Walk) -> bool:
        """Past what cannot be read, in growing steps."""
        walk.lossy = True
        far = 1
        while far < _FARTHEST:
            try:
                row: Any = connection.execute(
                    f"select position from {walk.log} where position > ? order by position limit 1", (walk.last + far,)
                ).fetchone()
            except apsw.Error:
                far *= 2
                continue
            if row is None:
                return False
            # In a tree out of order the next one may lie before the one that was asked for.
            if row[0] > walk.last + far:
                walk.last = row[0] - 1
                return True
            far *= 2
        return False

    # ---------------------------------------------------------------------------------------------- what may be gone

    def _compare(self, seen: Seen | None) -> None:
        if seen is None:
            return
        id, heads = seen
        if self._id and id and str(uuid.UUID(bytes=id)) != self._id:
            self.find(
                "witness", f"the log is {self._id}, its witness saw {uuid.UUID(bytes=id)}: one of them was replaced"
            )
        for walk, head in zip(self._walks, heads, strict=True):
            if walk.last < head:
                self.find(
                    "witness",
                    f"{walk.log} ends at position {walk.last}, but its witness saw {head}: what is between is lost",
                    walk.log,
                    walk.last,
                )

    def _look_behind(self, connection: apsw.Connection, seen: Seen | None) -> None:
        """Commits that SQLite silently ignores."""
        wal = wal_of(self._path)
        left = _behind(connection, wal)
        if left == Rest():
            return
        with _quiet(folder_of(self._path)) as quiet:
            # Else it is what somebody is writing just now.
            left = _behind(connection, wal) if quiet else Rest()
        if not left.header:
            self.find("wal", f"the head of {wal} is damaged, so that nothing in it is read")
        elif left.frames and seen is None:
            # A killed writer leaves such pages, too; only the witness can tell.
            self.find(
                "wal",
                f"{wal} holds {left.frames} pages that are not read, and there is no witness to say whether "
                f"they should be: put {folder_of(self._path)} beside the log, too",
            )


def _structure(connection: apsw.Connection) -> list[str]:
    found = [str(row[0]) for row in connection.execute("pragma integrity_check(100)")]
    return [] if found == ["ok"] else found


def _text(kind: str, raw: bytes) -> str:
    """The name in these bytes, or something that no entry was ever written under."""
    try:
        return raw.decode() if kind == "text" else f"\0{raw!r}"
    except UnicodeDecodeError:
        return f"\0{raw!r}"


def _behind(connection: apsw.Connection, wal: Path) -> Rest:
    frames, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
    return rest(wal, max(0, frames))


@contextmanager
def _quiet(folder: Path) -> Iterator[bool]:
    """Whether nobody is inside a write transaction; if so, nobody enters one until the end."""
    try:
        turn = os.open(folder / "turn.main", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(turn, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(turn)
