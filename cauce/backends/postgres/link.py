"""The connections of one process to one database: a pool, one that listens, and those that somebody has for himself.

What is lost is made anew by itself. `NOTIFY` is a hint and no more: who listens looks for himself, too, only
slower.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from cauce.backends import without_password
from cauce.backends.postgres.faults import is_lost, translate
from cauce.clock import Clock
from cauce.errors import Refused, Unreachable

__all__ = ["SCHEMA", "Link", "Session", "Told", "is_lost", "split", "translate"]

T = TypeVar("T")

Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Told = Callable[[str], None]
"""Called on the loop with a notification's payload; with "" when some may have been missed, so that one looks again."""

SCHEMA = "cauce"
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")
_POOL = 8
_HINT_EVERY = 0.010
"""Seconds between two notifications: each takes a lock of the whole cluster of databases when it commits."""

_ALIVE_EVERY = 5.0
"""Seconds between two looks whether the connection that listens still has somebody at its other end."""

_LONGEST_PAUSE = 1.0
_SETTINGS = {
    "bytea_output": "hex",
    "client_encoding": "utf-8",
    "default_transaction_deferrable": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "idle_session_timeout": "0",
    "jit": "off",
    "statement_timeout": "0",
    "synchronous_commit": "on",
    # When our machine is gone, the server notices within 20 s, and lets go of what we held.
    "tcp_keepalives_count": "3",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "5",
    "timezone": "UTC",
}

_log = logging.getLogger("cauce")


def split(url: str) -> tuple[str, str]:
    """An address as the driver takes it, and the name of our schema in it. Raises `Refused` for a name that is none."""
    parts = urlsplit(url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    names = [value for name, value in pairs if name == "schema"]
    schema = names[0] if names else SCHEMA
    if len(names) > 1 or not _NAME.match(schema) or schema.startswith("pg_") or schema == "information_schema":
        raise Refused(
            f"schema {', '.join(names)!r} in {without_password(url)}: name one, of at most 63 letters a-z, digits and _, "
            "which does not begin with a digit or pg_"
        )
    rest = urlencode([pair for pair in pairs if pair[0] != "schema"])
    return urlunsplit(parts._replace(query=rest)), schema


class Link:
    """See the module. Belongs to the loop and the process that opened it.

    Parameters:
        patience: seconds to wait for a lock, or for a server that is away.

    Raises, wherever it talks to the server, what `translate` makes of the driver's errors.
    """

    def __init__(self, url: str, clock: Clock, patience: float = 5.0) -> None:
        self.url, self.clock, self.patience = without_password(url), clock, patience
        self._dsn, self.schema = split(url)
        self.id = clock.id()
        self._who = f"{socket.gethostname()[:30]}:{os.getpid()}"
        self._pid = os.getpid()
        self._listener = _Listener(self)
        self._hints: set[str] = set()
        self._hinting: asyncio.Task[None] | None = None
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    @property
    def pool(self) -> asyncpg.Pool[asyncpg.Record]:
        """For short statements. `fetch` is simpler where one statement is all, and may be said twice."""
        if self._pool is None or os.getpid() != self._pid:
            raise Refused(
                f"{self.url} is closed, or was opened before a fork: open it anew in this process (spawn instead of fork)"
            )
        return self._pool

    async def open(self) -> None:
        """Connect. Raises `Refused` for a server that is too old, or a database that does not hold Unicode."""
        pool = asyncpg.create_pool(
            self._dsn, min_size=0, max_size=_POOL, reset=_nothing, command_timeout=None, **self._options("pool", {})
        )
        try:
            _ = await pool
            async with asyncio.timeout(max(self.patience, 1.0)), pool.acquire() as session:
                await self._look(session)
        except (Exception, asyncio.CancelledError) as error:
            pool.terminate()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise translate(error, self.url) from error
        self._pool = pool

    async def another(self, role: str, size: int, first: Any = None, **settings: str) -> asyncpg.Pool[asyncpg.Record]:
        """A pool for sessions with other settings, which its owner closes; `again` takes it. It connects when used.

        Parameters:
            first: a coroutine function that is given each session before anybody has it, and may refuse it.
        """
        options = self._options(role, settings)
        return await asyncpg.create_pool(
            self._dsn, min_size=0, max_size=size, init=first, reset=_nothing, command_timeout=None, **options
        )

    async def _look(self, session: Any) -> None:
        if session.get_server_version().major < 14:
            raise Refused(f"{self.url} is PostgreSQL {session.get_server_version().major}: 14 and newer are supported")
        encoding = await session.fetchval("select current_setting('server_encoding')")
        if encoding != "UTF8":
            raise Refused(f"{self.url} keeps text as {encoding}: create a database with encoding UTF8")

    def _options(self, role: str, settings: dict[str, str]) -> dict[str, Any]:
        own = {
            "application_name": f"cauce {role} {self._who}"[:63],
            "lock_timeout": str(round(self.patience * 1000)),
            # What is named without a schema is ours or the server's own, and nobody else's.
            "search_path": f'"{self.schema}", pg_temp',
        }
        return {
            "server_settings": {**_SETTINGS, **own, **settings},
            "target_session_attrs": "primary",
            "timeout": max(self.patience, 1.0),
        }

    async def dedicated(self, role: str = "own", **settings: str) -> Session:
        """A connection for one purpose, which its owner closes, and makes anew when it is lost.

        Parameters:
            role: what it is for; a DBA reads it in pg_stat_activity.
            settings: parameters of its session.
        """
        if os.getpid() != self._pid:
            raise Refused(f"{self.url} was opened before a fork: open it anew in this process (spawn instead of fork)")
        try:
            return await asyncpg.connect(self._dsn, **self._options(role, settings))
        except Exception as error:
            raise translate(error, self.url) from error

    async def fetch(self, query: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of one statement that does no harm if it runs twice: it is said again when the server was away."""
        return await self.again(lambda session: session.fetch(query, *values))

    async def again(self, work: Callable[[Any], Awaitable[T]], pool: asyncpg.Pool[asyncpg.Record] | None = None) -> T:
        """Run work that does no harm if it runs twice on a connection of the pool, until it comes through.

        Parameters:
            pool: another one than the link's own.

        Raises `Unreachable` when the server was away for longer than `patience`.
        """
        until, pause = self.clock.monotonic() + self.patience, 0.02
        while True:
            try:
                return await self._once(work, until, pool or self.pool)
            except Exception as error:
                ours = translate(error, self.url)
                left = until - self.clock.monotonic()
                if not isinstance(ours, Unreachable) or left <= 0 or self._pool is None:
                    raise ours from error
            await self.clock.sleep(min(pause * (1 + self.clock.random()), left))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _once(self, work: Callable[[Any], Awaitable[T]], until: float, pool: asyncpg.Pool[asyncpg.Record]) -> T:
        session = await pool.acquire(timeout=max(until - self.clock.monotonic(), 0.1) + 1)
        try:
            async with asyncio.timeout(self.patience + 10):
                return await work(session)
        except TimeoutError:
            # Nobody is there, or nobody answers: to ask politely for a cancellation would wait as long again.
            session.terminate()
            raise
        finally:
            await pool.release(session)

    def listen(self, channel: str, told: Told) -> Callable[[], None]:
        """Be told of what others, not this link, notify on a channel of our schema, until what this returns is called.

        Told of "" as soon as it listens, and whenever something may have been missed.
        """
        return self._listener.add(f"{self.schema}:{channel}", told)

    def hint(self, channel: str) -> None:
        """Tell whoever listens to a channel that there is something new: at once, and then every 10 ms at most.

        Never waits, and never fails: who misses it finds the thing by looking.
        """
        self._hints.add(f"{self.schema}:{channel}")
        if self._hinting is None and self._pool is not None:
            self._hinting = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._hints and self._pool is not None:
                channels = list(self._hints)
                self._hints.clear()
                # The notification's own commit need not be on the disk.
                with suppress(Exception):
                    await self._pool.execute(
                        "select set_config('synchronous_commit', 'off', true), pg_notify(channel, $2)"
                        " from unnest($1::text[]) channel",
                        channels, self.id, timeout=self.patience,
                    )  # fmt: skip
                await self.clock.sleep(_HINT_EVERY)
        finally:
            self._hinting = None

    async def close(self) -> None:
        """Let go of all connections but those that were given away. In a process forked since, nothing is touched."""
        pool, self._pool = self._pool, None
        if pool is None or os.getpid() != self._pid:
            return
        await self._listener.close()
        if self._hinting is not None:
            await _ended(self._hinting)
        try:
            async with asyncio.timeout(self.patience):
                await pool.close()
        except Exception:
            pool.terminate()


class _Listener:
    """The one connection that listens, from the first channel on."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._told: dict[str, list[Told]] = {}
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Event = asyncio.Event()

    def add(self, channel: str, told: Told) -> Callable[[], None]:
        self._told.setdefault(channel, []).append(told)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

        def undo() -> None:
            with suppress(ValueError):
                self._told[channel].remove(told)

        return undo

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await _ended(self._task)

    async def _run(self) -> None:
        pause = 0.02
        while True:
            began = self._link.clock.monotonic()
            session: Session | None = None
            try:
                session = await self._link.dedicated("listen")
                await self._follow(session)
            except Exception as error:
                _log.debug("the connection that listens to %s is made anew: %r", self._link.url, error)
            finally:
                if session is not None:
                    session.terminate()
            quick = self._link.clock.monotonic() - began < _ALIVE_EVERY
            pause = min(pause * 2, _LONGEST_PAUSE) if quick else 0.02
            await self._link.clock.sleep(pause * (1 + self._link.clock.random()))

    async def _follow(self, session: Session) -> None:
        """Listen until the connection is lost."""
        session.add_termination_listener(self._lost)
        heard: set[str] = set()
        while not session.is_closed():
            self._changed.clear()
            async with asyncio.timeout(self._link.patience):
                for channel in self._told.keys() - heard:
                    await session.add_listener(channel, self._hear)
                    heard.add(channel)
                    self._tell(channel, "")
                await session.execute("select 1")
            with suppress(TimeoutError):
                async with asyncio.timeout(_ALIVE_EVERY):
                    await self._changed.wait()

    def _lost(self, session: object) -> None:
        self._changed.set()

    def _hear(self, session: object, pid: int, channel: str, payload: object) -> None:
        if payload != self._link.id:
            self._tell(channel, str(payload))

    def _tell(self, channel: str, payload: str) -> None:
        for told in list(self._told.get(channel, ())):
            try:
                told(payload)
            except Exception:
                _log.exception("whoever was told of %s failed", channel)


async def _nothing(session: object) -> None:
    """What is done to a connection that comes back to the pool: nobody changes what it is set to."""


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait((task,))
