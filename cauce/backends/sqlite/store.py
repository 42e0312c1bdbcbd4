"""The store of a service in one SQLite file: see `cauce.store.Store` for what each method promises."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import apsw
import msgspec

from cauce.backends.sqlite.file import connect, forget, guard, translate
from cauce.backends.sqlite.turnstile import Turnstile, describe, who_locks
from cauce.backends.sqlite.writer import Writer
from cauce.clock import Clock
from cauce.errors import Busy, Fenced, Refused
from cauce.store import BadStatement, Inventory, Place, Share, Standing, Unit, Waiting, check_places, write_places

__all__ = ["SQLiteStore"]

_KNOWN = 1000
_PATIENCE = 5.0

_SCHEMA = """
create table if not exists cauce_store (id text not null, service text not null, migrations text not null);
create table if not exists cauce_instances (owner text primary key, beat integer not null) without rowid;
create table if not exists cauce_claims (name text primary key, owner text not null, fence integer not null) without rowid;
create table if not exists cauce_places (
    consumer text, domain text, slot integer, log text not null, position integer not null,
    primary key (consumer, domain, slot)) without rowid;
create table if not exists cauce_waiting (
    consumer text, position integer, stream text not null, slot integer not null, attempts integer not null, due integer not null,
    dead integer not null, error text not null, trace text not null, raw blob not null,
    primary key (consumer, position)) without rowid;
create table if not exists cauce_outbox (
    number integer primary key autoincrement, consumer text not null, slot integer not null, said blob not null);
create table if not exists cauce_timers (name text primary key, due integer not null) without rowid;
create table if not exists cauce_later (
    number integer primary key, id text not null unique, share text not null, handler text not null, due integer not null, said blob not null);
create index if not exists cauce_later_due on cauce_later (share, due, number);
"""

_LATER = "insert or replace into cauce_later (id, share, handler, due, said) values (?, ?, ?, ?, ?)"
_DUE = """select number, handler, said from cauce_later where share = ? and due <= ? order by due, number limit ?"""

# Numbers of the outbox are never used again: a relay that is under way takes them for an order, and deletes by them.

_OURS = "cauce_"
_FORBIDDEN = {
    apsw.SQLITE_ATTACH,
    apsw.SQLITE_DETACH,
    apsw.SQLITE_PRAGMA,
    apsw.SQLITE_TRANSACTION,
    apsw.SQLITE_SAVEPOINT,
}
_CHANGES = {apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE}
_READS = {apsw.SQLITE_SELECT, apsw.SQLITE_READ, apsw.SQLITE_FUNCTION, apsw.SQLITE_RECURSIVE}
_STATEMENT_ERRORS = (
    apsw.SQLError, apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError, apsw.RangeError, apsw.BindingsError,
    apsw.AuthError, apsw.MisuseError, TypeError, ValueError, OverflowError,
)  # fmt: skip


class _Journal:
    """The store as the writer sees it."""

    def __init__(self) -> None:
        self.fences: dict[str, int] = {}
        self.moves: dict[tuple[str, str, int], tuple[Share | None, str, int]] = {}
        self.places: dict[tuple[str, str, int], tuple[Share | None, str, int]] = {}
        self.touched, self.told = True, False
        self.handler = self.migrating = False
        self.behind = False
        self._moving: dict[tuple[str, str, int], tuple[Share | None, str, int]] = {}
        self._seen = -1

    def open(self, connection: apsw.Connection) -> None:
        self.connection = connection
        connection.authorizer = self._may

    def begin(self) -> None:
        (version,) = self.connection.execute("pragma data_version").fetchone() or (0,)
        if version != self._seen:
            self.fences.clear()
            self.touched = True
            self._seen = version

    def flush(self) -> None:
        # The loop notes more meanwhile: one by one, so that none is noted in what has been looked through.
        while self.moves:
            place, noted = self.moves.popitem()
            self._moving[place] = noted
        for (consumer, domain, slot), (share, log, position) in (self._moving | self.places).items():
            if share is None or self.fence(share.name) == share.fence:
                self.connection.execute(
                    "insert or replace into cauce_places values (?, ?, ?, ?, ?)",
                    (consumer, domain, slot, log, position),
                )

    def is_due(self) -> bool:
        return self.behind

    def committed(self) -> Callable[[], None]:
        self._moving, self.places = {}, {}
        self.behind = False
        if self.told:
            self.touched = self.told = False
        return _nothing

    def rolled_back(self) -> None:
        self.told = False
        self.fences.clear()
        # What the units of this transaction changed is gone, and so are their places; those noted alone still hold.
        for place, noted in self._moving.items():
            self.moves.setdefault(place, noted)
        self._moving, self.places = {}, {}
        self.behind, self.touched = False, True

    def fence(self, name: str) -> int:
        """The standing fence of a name, 0 if nobody ever held it."""
        found = self.fences.get(name)
        if found is None:
            row = self.connection.execute("select fence from cauce_claims where name = ?", (name,)).fetchone()
            found = self.fences[name] = row[0] if row else 0
        return found

    def _may(self, action: int, one: str | None, two: str | None, _database: str | None, _inner: str | None) -> int:
        """A handler's SQL must not end our transaction, nor change what we keep about it."""
        if self.handler and (action in _FORBIDDEN or (one or "").startswith(_OURS) or (two or "").startswith(_OURS)):
            return apsw.SQLITE_DENY
        # The numbers of our outbox are kept there. A migration may drop or rename a table, which changes it, too.
        if self.handler and not self.migrating and action in _CHANGES and one == "sqlite_sequence":
            return apsw.SQLITE_DENY
        return apsw.SQLITE_OK


def _nothing() -> None:
    return


def _may_read(action: int, one: str | None, two: str | None, _database: str | None, _inner: str | None) -> int:
    """A handler's query must not hold a snapshot, reach other files, or show what we keep."""
    if action == apsw.SQLITE_PRAGMA and (one, two) == ("data_version", None):
        # So a full text index asks whether it has changed.
        return apsw.SQLITE_OK
    if action not in _READS or (action == apsw.SQLITE_READ and (one or "").startswith(_OURS)):
        return apsw.SQLITE_DENY
    return apsw.SQLITE_OK


class SQLiteStore:
    """One SQLite file of one service. Made by `open`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self._clock = path, clock
        self.id, self.place, self.is_fresh = "", f"{path.parent.name}/{path.name}", True
        self._journal = _Journal()
        self._moved = asyncio.Event()
        self._known: set[str] = set()
        self._writer: Writer
        self._reader: apsw.Connection
        self._fetcher: apsw.Connection

    @classmethod
    async def open(cls, folder: Path, service: str, clock: Clock, migrations: Sequence[str] | None = ()) -> SQLiteStore:
        """Open, and make if need be, the store in a folder.

        Parameters:
            migrations: SQL of the service, each run once, in this order; later ones may be added. None: none is due.

        Raises `Refused` for a store of another service, or migrations that are not those it was made by.
        """
        store = cls(folder / "store.db", clock)
        store._create(service, None if migrations is None else tuple(migrations))
        with ExitStack() as undo, ExitStack() as threads:
            inode = guard(store.path)
            threads.callback(forget, inode)
            store._reader = connect(store.path, flags=apsw.SQLITE_OPEN_READONLY, busy=_PATIENCE)
            undo.callback(store._reader.close)
            # Not ours: what a handler's query does to its connection must not befall what we read.
            store._fetcher = connect(store.path, flags=apsw.SQLITE_OPEN_READONLY, busy=_PATIENCE)
            undo.callback(store._fetcher.close)
            store._fetcher.authorizer = _may_read
            turnstile = Turnstile(folder)
            threads.callback(turnstile.close)
            store._writer = Writer(store.path, turnstile, store._journal, clock, _PATIENCE, threads.pop_all().close)
            undo.callback(store._writer.stop)
            await store._writer.start()
            store.is_fresh = not store._read("select 1 from cauce_claims limit 1", ())
            undo.pop_all()
        return store

    def _create(self, service: str, migrations: tuple[str, ...] | None) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = connect(self.path, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE, busy=_PATIENCE)
        try:
            self.path.chmod(0o600)
            connection.execute("begin immediate")
            connection.execute(_SCHEMA)
            row = connection.execute("select id, service, migrations from cauce_store").fetchone()
            if row is None:
                row = self._clock.id(), service, "[]"
                connection.execute("insert into cauce_store values (?, ?, ?)", row)
            self.id, owner, done = row
            if owner != service:
                raise Refused(f"{self.path} is the store of service {owner!r}, not of {service!r}: name another bus")
            before = msgspec.json.decode(done, type=list[str])
            migrations = tuple(before) if migrations is None else migrations
            if before != list(migrations[: len(before)]):
                raise Refused(
                    f"{self.path} was made by other SQL than service {service!r} has now: leave what ran as it was, and add what is new behind it"
                )
            for number, sql in enumerate(migrations[len(before) :], len(before) + 1):
                try:
                    self._journal.handler = self._journal.migrating = True
                    self._journal.open(connection)
                    connection.execute(sql)
                except apsw.Error as error:
                    raise Refused(
                        f"part {number} of the schema of service {service!r} cannot be run: {error}"
                    ) from None
                finally:
                    self._journal.handler = self._journal.migrating = False
            connection.execute(
                "update cauce_store set migrations = ?", (msgspec.json.encode(list(migrations)).decode(),)
            )
            connection.execute("commit")
        except apsw.BusyError:
            shm = self.path.with_name(self.path.name + "-shm")
            holders = describe(who_locks(shm.stat().st_ino) - {os.getpid()} if shm.exists() else set())
            raise Busy(f"{self.path} is being written by {holders}: wait, or stop it") from None
        except apsw.Error as error:
            raise translate(error, self.path) from error
        finally:
            connection.close()

    # ------------------------------------------------------------------------------------------------- who holds what

    async def tick(self, owner: str, dead: Sequence[tuple[str, int]], *, join: bool = False) -> Standing:
        """A sign of life, and what stands. Those whose beat was seen unchanged for long enough are struck off."""
        return await self._writer.submit(self._tick, owner, tuple(dead), join)

    def _tick(self, owner: str, dead: tuple[tuple[str, int], ...], join: bool) -> Standing:
        run = self._journal.connection.execute
        if join:
            run("insert or ignore into cauce_instances values (?, 0)", (owner,))
        run("update cauce_instances set beat = beat + 1 where owner = ?", (owner,))
        for each in dead:
            run("delete from cauce_instances where owner = ? and beat = ?", each)
        beats: list[Any] = run("select owner, beat from cauce_instances").fetchall()
        claims: list[Any] = run("select name, owner from cauce_claims where owner != ''").fetchall()
        instances, holders = dict(beats), dict(claims)
        self._journal.told = True
        return Standing(owner in instances, instances, holders, self._journal.touched)

    async def take(self, owner: str, names: Sequence[str]) -> list[Share]:
        """Of these names those that are free, or whose holder was struck off; the fence of each rises."""
        return await self._writer.submit(self._take, owner, tuple(names))

    def _take(self, owner: str, names: tuple[str, ...]) -> list[Share]:
        run = self._journal.connection.execute
        instances = {each for (each,) in run("select owner from cauce_instances")}
        taken = []
        for name in names if owner in instances else ():
            row: Any = run("select owner, fence from cauce_claims where name = ?", (name,)).fetchone()
            holder, fence = row or ("", 0)
            if holder not in instances:
                run("insert or replace into cauce_claims values (?, ?, ?)", (name, owner, fence + 1))
                self._journal.fences[name] = fence + 1
                taken.append(Share(name, fence + 1, not holder, holder))
        return taken

    async def release(self, shares: Sequence[Share], *, owner: str = "") -> None:
        """Let go of these; with `owner` it leaves the list of instances, too."""
        await self._writer.submit(self._release, tuple(shares), owner)

    def _release(self, shares: tuple[Share, ...], owner: str) -> None:
        run = self._journal.connection.execute
        for share in shares:
            run("update cauce_claims set owner = '' where name = ? and fence = ?", (share.name, share.fence))
        if owner:
            run("delete from cauce_instances where owner = ?", (owner,))

    # ------------------------------------------------------------------------------------------------------- places

    async def places(self, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
        """Where a consumer stands in a log, by domain and slot. Raises `Damaged` if that was another, or longer."""
        rows = self._read("select domain, slot, log, position from cauce_places where consumer = ?", (consumer,))
        return check_places(rows, consumer, log, head, self.path.parent.name)

    def move(self, share: Share | None, consumer: str, domain: str, slot: int, log: str, position: int) -> None:
        """Note a place. It is written with the next unit, or soon by `run`."""
        self._journal.moves[consumer, domain, slot] = share, log, position
        self._moved.set()

    async def commit(self, unit: Unit) -> None:
        """Write a unit with its place. Raises `BadStatement`, `Fenced`, and what a full or busy disk says."""
        await self._writer.submit(self._apply, unit, size=unit.size)

    def _apply(self, unit: Unit) -> None:
        share, journal = unit.share, self._journal
        if share is not None and journal.fence(share.name) != share.fence:
            raise Fenced(f"{share.name} of {self.path} has another holder by now: nothing of this message was stored")
        run = journal.connection.execute
        if unit.statements:
            self._run(unit.statements)
        if unit.parked is not None:
            consumer, waiting = unit.parked
            run(
                "insert or replace into cauce_waiting values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (consumer, *msgspec.structs.astuple(waiting)),
            )
        if unit.unparked is not None:
            run("delete from cauce_waiting where consumer = ? and position = ?", unit.unparked)
        for mark in unit.passed:
            run("delete from cauce_waiting where consumer = ? and position = ?", mark)
        for each in unit.said:
            run("insert into cauce_outbox (consumer, slot, said) values (?, ?, ?)", each)
        if unit.timer is not None:
            run("insert or replace into cauce_timers values (?, ?)", unit.timer)
        for id in unit.cancelled:
            run("delete from cauce_later where id = ?", (id,))
        for timer in unit.later:
            run(_LATER, msgspec.structs.astuple(timer))
        if unit.place is not None:
            consumer, domain, slot, log, position = unit.place
            journal.places[consumer, domain, slot] = share, log, position

    def _run(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> None:
        connection, sql = self._journal.connection, ""
        connection.execute("savepoint handler")
        self._journal.handler = True
        try:
            for sql, parameters in statements:
                known = sql in self._known
                # Statements of ours are in the cache, where nobody asks any more whether they are allowed.
                for _ in connection.execute(sql, parameters, can_cache=known):
                    # Not before all rows are taken the rest of the text is run.
                    pass
                if not known and len(self._known) < _KNOWN:
                    self._known.add(sql)
        except _STATEMENT_ERRORS as error:
            self._journal.handler = False
            connection.execute("rollback to handler")
            connection.execute("release handler")
            raise BadStatement(f"{sql!r} cannot be run on {self.path.parent.name}'s store: {error}") from None
        finally:
            self._journal.handler = False
        connection.execute("release handler")

    async def run(self) -> None:
        """Write places that no unit carries, for ever."""
        await write_places(self._moved, self.flush, self._clock)

    async def flush(self) -> None:
        """Write the places that wait."""
        if self._journal.moves:
            # No message waits for it, so the loop must not stand still for its flush.
            self._journal.behind = True
            await self._writer.submit(_nothing)

    # ------------------------------------------------------------------------------------------------------ waiting

    async def waiting(self, consumer: str) -> list[Waiting]:
        """The messages that wait, in order."""
        rows = self._read(
            "select position, stream, slot, attempts, due, dead, error, trace, raw from cauce_waiting where consumer = ? order by position",
            (consumer,),
        )
        return [
            Waiting(position, stream, slot, attempts, due, bool(dead), error, trace, raw)
            for position, stream, slot, attempts, due, dead, error, trace, raw in rows
        ]

    async def outbox(self, after: int, limit: int) -> list[tuple[int, str, int, bytes]]:
        """What was said and is not known to be in its log yet: number, consumer, slot, message."""
        return self._read(
            "select number, consumer, slot, said from cauce_outbox where number > ? order by number limit ?",
            (after, limit),
        )

    async def relayed(self, numbers: Sequence[int]) -> None:
        """These stand in their log."""
        await self._writer.submit(self._relayed, tuple(numbers))

    def _relayed(self, numbers: tuple[int, ...]) -> None:
        self._journal.connection.executemany(
            "delete from cauce_outbox where number = ?", [(number,) for number in numbers]
        )

    async def timer(self, name: str) -> int:
        """When something is due, in microseconds since 1970; 0 if that was never said."""
        rows = self._read("select due from cauce_timers where name = ?", (name,))
        return int(rows[0][0]) if rows else 0

    async def due(self, id: str) -> int:
        """When the message of a timer is due, in microseconds since 1970; 0 if no such timer waits."""
        rows = self._read("select due from cauce_later where id = ?", (id,))
        return int(rows[0][0]) if rows else 0

    async def fire(self, shares: Sequence[Share], now: int, limit: int) -> tuple[int, int]:
        """Let go what is due by now, and say when to look again."""
        fired, due = 0, self._next(shares)
        if due and due <= now:
            fired = await self._writer.submit(self._fire, tuple(shares), now, limit)
            due = self._next(shares)
        return fired, due

    def _next(self, shares: Sequence[Share]) -> int:
        first = (self._read("select min(due) from cauce_later where share = ?", (each.name,))[0][0] for each in shares)
        return min((due for due in first if due), default=0)

    def _fire(self, shares: tuple[Share, ...], now: int, limit: int) -> int:
        connection, left = self._journal.connection, limit
        for share in shares:
            if not left or self._journal.fence(share.name) != share.fence:
                continue
            rows: list[Any] = connection.execute(_DUE, (share.name, now, left)).fetchall()
            connection.executemany(
                "insert into cauce_outbox (consumer, slot, said) values (?, ?, ?)",
                [(handler, share.slot or 0, said) for _, handler, said in rows],
            )
            connection.executemany("delete from cauce_later where number = ?", [(number,) for number, _, _ in rows])
            left -= len(rows)
        return limit - left

    async def inventory(self) -> Inventory:
        """All that hangs on logs, whoever it is for."""
        consumers = self._read("select distinct consumer from cauce_waiting order by 1", ())
        ((said,),) = self._read("select count(*) from cauce_outbox", ())
        ((timers,),) = self._read("select (select count(*) from cauce_timers) + (select count(*) from cauce_later)", ())
        places = self._read("select consumer, domain, slot, log, position from cauce_places order by 1, 2, 3", ())
        waiting = [(consumer, each) for (consumer,) in consumers for each in await self.waiting(consumer)]
        return Inventory([Place(*row) for row in places], waiting, said, timers)

    # ---------------------------------------------------------------------------------------------------- the user's

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of what was last committed. Raises `Refused` for SQL that cannot be run, or does more than read."""
        try:
            rows: list[Any] = self._fetcher.execute(sql, parameters).fetchall()
            return rows
        except _STATEMENT_ERRORS as error:
            raise BadStatement(f"{sql!r} cannot be run on {self.path.parent.name}'s store: {error}") from None
        except apsw.Error as error:
            raise translate(error, self.path) from error

    def _read(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        try:
            rows: list[Any] = self._reader.execute(sql, parameters).fetchall()
            return rows
        except apsw.Error as error:
            raise translate(error, self.path) from error

    async def close(self) -> None:
        """Write what waits, then let go."""
        await self._writer.close()
        self._fetcher.close()
        self._reader.close()
