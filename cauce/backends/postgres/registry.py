"""The registry: which processes are on the wire of a database, what each of them serves and announces, who has died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import asyncpg
import msgspec

from cauce.backends.present import Present, read
from cauce.clock import Clock
from cauce.errors import Unavailable
from cauce.identity import is_dead
from cauce.wire import QUIET, Instance

__all__ = ["BEAT", "CHANGED", "LEASE", "Fetch", "Present", "Registry"]

_log = logging.getLogger("cauce")

BEAT = 2.0
"""Seconds between two signs of life."""

LEASE = 5 * BEAT
"""Seconds without a beat after which a process of another machine counts as dead."""

_UNWATCHED = LEASE - 1.5 * BEAT
"""Seconds of silence that count at most where nobody watched: the server may have been away, and not the process."""

_FRESH = 0.05
"""Seconds for which a process that was not proved dead is not looked at again."""

CHANGED = "wire"
"""The channel on which is told that a process says something else than before."""

Fetch = Callable[..., Awaitable[list[asyncpg.Record]]]
"""Runs a statement with its values, and gives its rows."""

# The row of the epoch goes with all the others when the server crashes: what comes after it is another epoch.
_LOOK = """
select e.epoch, p.token, p.beat, p.present,
    extract(epoch from clock_timestamp() - p.at)::float8 as age
from (select (select epoch from wire_epoch) as epoch) e left join wire_processes p on true
"""

_BEGIN = "insert into wire_epoch (epoch) values ($1) on conflict (one) do nothing"

_PUBLISH = """
with said as (
    insert into wire_processes (token, beat, at, present) values ($1, 1, clock_timestamp(), $2)
    on conflict (token) do update
        set beat = wire_processes.beat + 1, at = clock_timestamp(), present = excluded.present
)
select pg_notify($3, '')
"""

_BEAT = """
update wire_processes set beat = beat + 1, at = clock_timestamp(), present = $2 where token = $1 returning beat
"""

_BURY = """
with gone as (delete from wire_processes where token = $1 and ($2::int8 is null or beat = $2) returning token)
select pg_notify($3, '') from gone
"""

_SWEEP = """
with questions as (delete from wire_questions where until < clock_timestamp() - interval '30 seconds'),
    answers as (delete from wire_answers where until < clock_timestamp() - interval '30 seconds')
select
"""


class _Beat(NamedTuple):
    """The last beat of a process: its number, since when it stands on our clock, and how old it was on the server's."""

    number: int
    since: float
    age: float


_encode = msgspec.json.Encoder().encode


class Registry:
    """What is known of the others, read again when it is in doubt.

    A beat is a number that rises, watched on our own monotonic clock: two machines' clocks are never compared. Only
    for a process that is seen for the first time the server says how long ago it has beaten.

    Parameters:
        fetch: runs a statement that does no harm if it runs twice.
        channel: the full name of the channel for changes.
    """

    def __init__(self, fetch: Fetch, clock: Clock, channel: str) -> None:
        self._fetch, self._clock, self._channel = fetch, clock, channel
        self.present: dict[str, Present] = {}
        self._serving: dict[str, list[str]] = {}
        self._beats: dict[str, _Beat] = {}
        self._living: dict[str, float] = {}
        self._begun = self._applied = 0
        self._looked = float("-inf")
        self._doubted = True
        self._looking: asyncio.Task[None] | None = None
        self.epoch = ""
        self._since = float("-inf")
        self._stale = False
        self._last: dict[str, list[Instance]] = {}

    # ------------------------------------------------------------------------------------------------- the others

    def doubt(self) -> None:
        """Read it again at the next look."""
        self._doubted = True

    async def look(self) -> None:
        """Read it again if it is in doubt; all who want that at once do it with one statement."""
        while self._doubted or self._looking is not None:
            if self._looking is None:
                self._doubted = False
                self._looking = asyncio.get_running_loop().create_task(self._read())
                # Who asked may have stopped waiting.
                self._looking.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._looking)

    async def _read(self) -> None:
        try:
            await self.read(self._fetch)
        except BaseException:
            self._doubted = True
            raise
        finally:
            # Here and not in a callback, which comes a round of the loop later: who looks in between waits for nothing,
            # and so would keep the loop, and the callback, from going on.
            self._looking = None

    async def read(self, fetch: Fetch) -> None:
        """Read it now, with this connection."""
        self._begun = begun = self._begun + 1
        rows = await fetch(_LOOK)
        if rows[0]["epoch"] is None:
            await fetch(_BEGIN, self._clock.id())
            rows = await fetch(_LOOK)
        if begun < self._applied:
            return  # Somebody else has read it later, and was answered before.
        self._applied = begun
        now = self._clock.monotonic()
        if rows[0]["epoch"] != self.epoch:
            self._since = now if self.epoch else self._since
            self.epoch = rows[0]["epoch"]
        watched = now - self._looked < 1.5 * BEAT
        earliest = float("-inf") if watched else now - _UNWATCHED
        self._looked = now
        beats, present = dict[str, _Beat](), dict[str, Present]()
        for row in rows:
            if row["token"] is None:
                continue
            beats[row["token"]] = self._beat_of(row, now, earliest)
            # What cannot be read is of another version of ours, perhaps: it cannot be asked.
            with suppress(msgspec.MsgspecError):
                present[row["token"]] = read(row["present"])
        gone = [token for token in present if self._is_gone(present[token], beats[token], now)]
        for token in gone:
            del present[token]
        self._beats, self.present = beats, present
        self._living = dict.fromkeys(present, now)
        self._serving = {}
        for token, said in present.items():
            for address in said.addresses:
                self._serving.setdefault(address, []).append(token)
        for token in gone:
            await fetch(_BURY, token, beats[token].number, self._channel)

    def _beat_of(self, row: Any, now: float, earliest: float) -> _Beat:
        known = self._beats.get(row["token"])
        age = max(0.0, row["age"])
        since = now - age if known is None else now if known.number != row["beat"] else known.since
        return _Beat(row["beat"], max(since, earliest), age)

    def _is_gone(self, present: Present, beat: _Beat, now: float) -> bool:
        dead = is_dead(present.owner)
        return now - beat.since > LEASE if dead is None else dead

    def is_new(self) -> bool:
        """Whether the server has just lost all that was said, so that some may not have said it again yet."""
        return self._clock.monotonic() - self._since < BEAT

    def serving(self, address: str) -> Sequence[str]:
        """The tokens of the processes that serve an address."""
        return self._serving.get(address, ())

    def is_alive(self, token: str) -> bool:
        """Whether a process is not known to be dead."""
        present, now = self.present.get(token), self._clock.monotonic()
        if present is None:
            return False
        if now - self._living.get(token, float("-inf")) > _FRESH:
            self._living[token] = now
            if is_dead(present.owner):
                self.doubt()
                return False
        return True

    def is_quiet(self, token: str) -> bool:
        """Whether a process has given no sign of life for so long that its loop stands still, or it is stopped."""
        beat = self._beats.get(token)
        return beat is None or self._looked - beat.since > QUIET

    async def instances(self, *, but: str) -> list[Instance]:
        """What all processes that are alive announce, but for one; as last known where the server cannot be asked."""
        self.doubt()
        stale = False
        try:
            await self.look()
        except (Unavailable, OSError) as error:
            if not self._applied:
                raise
            stale = True
            if not self._stale:
                _log.warning("the registry cannot be read, who runs is told as last known: %s", error)
        if self._stale and not stale:
            _log.warning("the registry can be read again")
        self._stale = stale
        if not stale:
            now = self._clock.now()
            # Ages, not times: the server's clock is only compared with itself.
            beats = {token: now - round(self._beats[token].age * 1_000_000) for token in self.present}
            self._last = {
                token: [msgspec.structs.replace(each, beat=beats[token]) for each in present.instances]
                for token, present in self.present.items()
            }
        return [
            msgspec.structs.replace(each, stale=True) if stale else each
            for token, instances in self._last.items()
            if token != but
            for each in instances
        ]

    # ----------------------------------------------------------------------------------------------------- we

    async def publish(self, token: str, present: Present) -> None:
        """Say this of the process with a token."""
        await self._fetch(_PUBLISH, token, _encode(present), self._channel)
        self.doubt()

    async def beat(self, token: str, present: Present) -> bool:
        """Give a sign of life, and say anew how much there is to do. False: what was said is there no more."""
        return bool(await self._fetch(_BEAT, token, _encode(present)))

    async def bury(self, token: str) -> None:
        """Say nothing of a process any more."""
        await self._fetch(_BURY, token, None, self._channel)
        self.doubt()

    async def sweep(self) -> None:
        """Remove what the dead have asked and answered."""
        await self._fetch(_SWEEP)
