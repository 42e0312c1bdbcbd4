"""Where the entries of a stream lie: each row points at the one before it, a sparse table at the end of each chapter.

An index on the stream would cost a random page for each append, the most expensive thing in a large log. So a row keeps
the position of its stream's previous entry, and a chapter (256 entries of a stream) its last position, written in bulk
once in a while. A stream is read by walking back from the end of a chapter; what is not in the chapters yet, the tail,
each connection knows from having looked at these rows once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import apsw

from cauce.errors import Damaged

__all__ = [
    "CHAPTER_BITS",
    "OVERHANG",
    "TAIL",
    "Chain",
    "forgotten",
    "last_of",
    "remove",
    "write_chapters",
    "written_upto",
    "wrong_chapters",
]

CHAPTER_BITS = 8

TAIL = 16_384
"""Rows of a log that may be missing in its chapters. Fewer: a chapter's page is written again and again."""


OVERHANG = 2 << CHAPTER_BITS
"""Entries at most by which a walk from the end of a chapter meets more than were asked for."""


def written_upto(connection: apsw.Connection, log: str) -> int:
    """The position up to which the chapters of a log are written."""
    row = connection.execute(f"select position from {log}_chapters where stream = 0 and chapter = 0").fetchone()
    return row[0] if row else 0


def forgotten(connection: apsw.Connection, log: str) -> int:
    """How many entries were removed on purpose, as only commands are. It stands beside the place of the chapters.

    A pointer to one of them leads nowhere, and there the stream begins; one of which nothing is left begins again at
    version 1. Where the number has changed nothing that was known of the streams can be relied on.
    """
    if log != "commands":
        return 0
    row = connection.execute(f"select position from {log}_chapters where stream = 0 and chapter = 1").fetchone()
    return row[0] if row else 0


def remove(connection: apsw.Connection, log: str, gone: Sequence[tuple[int, int]]) -> int:
    """Remove entries, each a position and its stream, the first of what is left of that stream; gives how many."""
    removed = 0
    for position, _ in gone:
        connection.execute(f"delete from {log} where position = ?", (position,))
        removed += connection.changes()
    last = {stream: position for position, stream in gone}
    connection.executemany(f"delete from {log}_chapters where stream = ? and position <= ?", list(last.items()))
    count = forgotten(connection, log) + removed
    connection.execute(f"insert or replace into {log}_chapters values (0, 1, ?)", (count,))
    return removed


def last_of(connection: apsw.Connection, log: str, stream: int) -> tuple[int, int] | None:
    """Version and position of a stream's last entry in the chapters.

    Raises `Damaged` where another stream, or nothing, stands there.
    """
    row = connection.execute(
        f"select c.position, f.stream, f.version from {log}_chapters c left join {log} f on f.position = c.position "
        "where c.stream = ? order by c.chapter desc limit 1",
        (stream,),
    ).fetchone()
    if row is None:
        return None
    if row[1] != stream:
        raise Damaged(f"stream {stream} of {log} does not end at position {row[0]}, as it should: run cauce verify")
    return row[2], row[0]


def write_chapters(connection: apsw.Connection, log: str, position: int) -> None:
    """Bring the chapters up to a position, the last of the log."""
    connection.execute(
        f"insert or replace into {log}_chapters select stream, version >> {CHAPTER_BITS}, max(position) from {log} "
        "where position > ? group by 1, 2",
        (written_upto(connection, log),),
    )
    connection.execute(f"insert or replace into {log}_chapters values (0, 0, ?)", (position,))


def wrong_chapters(connection: apsw.Connection, log: str, upto: int) -> Iterator[Any]:
    """Each chapter that does not end where it is said: stream, chapter, where it ends, what is said."""
    # By the key of the chapters, and by an index that SQLite makes of the ends: a full join would compare all with all.
    return connection.execute(
        f"with ends as materialized (select stream, version >> {CHAPTER_BITS} as chapter, max(position) as position from {log} "
        f"where position <= ? group by 1, 2) select e.stream, e.chapter, e.position, c.position from ends e "
        f"left join {log}_chapters c on c.stream = e.stream and c.chapter = e.chapter where c.position is not e.position "
        f"union all select c.stream, c.chapter, null, c.position from {log}_chapters c left join ends e "
        "on e.stream = c.stream and e.chapter = c.chapter where c.stream > 0 and e.position is null",
        (upto,),
    )


class Chain:
    """The streams of one log as a connection that reads sees them. Used within one state of the file at a time."""

    def __init__(self, connection: apsw.Connection, log: str) -> None:
        self._connection, self._log = connection, log
        self._tail: dict[int, int] = {}
        self._upto = self._seen = self._forgot = 0

    def walk(self, columns: str) -> str:
        """A query for entries of a stream in order; its values are `end`, a position, and how many behind that."""
        there = f" and exists (select 1 from {self._log} p where p.position = f.previous)" if self.forgets else ""
        return (
            f"with recursive chain(at) as (values (?1) union all select f.previous from chain join {self._log} f on f.position = at "
            f"where f.previous > ?2 and f.previous < at{there}) select {columns} from (select at from chain where at > ?2 order by at limit ?3) "
            f"join {self._log} on position = at order by at"
        )

    @property
    def forgets(self) -> bool:
        """Whether entries may be gone on purpose, as of the last `end`."""
        return self._forgot > 0

    def back(self, columns: str) -> str:
        """A query for all entries of a stream behind a position, the last first; its values are `end` and the position.

        It sorts nothing, so it is quicker than `walk`, which stops at a number of entries.
        """
        return (
            f"with recursive chain(at) as (values (?1) union all select f.previous from chain join {self._log} f on f.position = at "
            f"where f.previous > ?2 and f.previous < at) select {columns} from chain cross join {self._log} f on f.position = at"
        )

    def before(self, position: int) -> tuple[int, int | None, int | None]:
        """Where the entry at a position says that its stream's one before it lies, and the stream and version there."""
        row: Any = self._connection.execute(
            f"select f.previous, p.stream, p.version from {self._log} f left join {self._log} p "
            "on p.position = f.previous where f.position = ?",
            (position,),
        ).fetchone()
        found: tuple[int, int | None, int | None] = row
        return found

    def end(self, stream: int, after: int, limit: int) -> tuple[int, bool]:
        """The position from which a walk back to `after` meets so many entries, or all (0: there is none).

        And whether it is a place on the way, so that there must be as many.
        """
        forgot = forgotten(self._connection, self._log)
        if forgot != self._forgot:
            self._forgot, self._upto = forgot, -1
        ends: list[Any] = self._connection.execute(
            f"select position from {self._log}_chapters where stream = ? and position >= ? order by chapter limit ?",
            (stream, after, (limit >> CHAPTER_BITS) + 4),
        ).fetchall()
        # Behind the end of a chapter lie whole ones; at the beginning one of 255, as versions count from 1. Else the
        # first may have a single entry left.
        # If some were forgotten, the first that is left may have lost any of its own.
        whole = not self.forgets and (not after or (bool(ends) and ends[0][0] == after))
        ends = ends[1:] if ends and ends[0][0] == after else ends
        chapters = ((limit if whole else limit + (1 << CHAPTER_BITS) - 1) >> CHAPTER_BITS) + 1
        # The last one may have grown since it was written.
        if len(ends) > chapters:
            found: int = ends[chapters - 1][0]
            return found, True
        self._catch_up()
        return self._tail.get(stream, ends[-1][0] if ends else 0), False

    def _catch_up(self) -> None:
        upto = written_upto(self._connection, self._log)
        if upto != self._upto:
            self._tail.clear()
            self._upto = self._seen = upto
        rows: Any = self._connection.execute(
            f"select position, stream from {self._log} where position > ? order by position", (self._seen,)
        )
        for position, stream in rows:
            self._tail[stream] = self._seen = position
