"""The end that answers: takes what this process is asked, a task for each, and gives all answers of a turn at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from cauce.backends.postgres.asking import ANSWER, FAILED, NOT_SERVED
from cauce.backends.postgres.lane import Lane
from cauce.backends.postgres.parcel import packed
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.errors import CauceError, Refused
from cauce.wire import Handler

__all__ = ["MOST", "Answering"]

_log = logging.getLogger("cauce")

MOST = 4 << 20
"""Bytes of the longest question or answer."""

_POLL = 0.5
"""Seconds between two looks for questions: notifications may be lost, rows are not."""

_PAUSE = 0.2
"""Seconds before answers that could not be given are tried again."""

_FLUSH = 1.0
"""Seconds that the last statement, and then the last answers, get to come through."""

_ROWS, _BYTES = 500, 4 << 20
"""What goes into one statement at most, or a little more."""

# Whoever removes the row has the question; who asked may remove it, too. One clock, the server's, says what time is
# left, and a jump of it never gives more than there was.
_TAKE = f"""
delete from wire_questions where ctid = any(array(
    select ctid from (
        select ctid, sum(octet_length(payload)) over (rows between unbounded preceding and 1 preceding) as before
        from (select ctid, payload from wire_questions where asked = $1 limit {_ROWS}) asked
    ) first where before is null or before < {_BYTES}
))
returning asker, n, address, least(seconds, extract(epoch from until - clock_timestamp()))::float8 as seconds, payload
"""

_GIVE = """
with given as (
    insert into wire_answers (asker, n, kind, until, payload)
    select u.asker, u.n, u.kind, clock_timestamp() + u.seconds * interval '1 second', u.payload
    from unnest($1::text[], $2::int8[], $3::int2[], $4::float8[], $5::bytea[]) as u(asker, n, kind, seconds, payload)
    on conflict (asker, n) do nothing
)
select pg_notify(t.channel, t.text) from unnest($6::text[], $7::text[]) as t(channel, text)
"""


class _Answer(NamedTuple):
    asker: str
    n: int
    kind: int
    until: float
    payload: bytes


class Answering:
    """All questions of others to this process.

    Parameters:
        token: of this process.
        prefix: what the name of a process's channel begins with, before its token.
    """

    def __init__(
        self, lane: Lane, token: str, handlers: Mapping[str, Handler], deadlines: Deadlines, clock: Clock, prefix: str
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._lane, self._token, self._prefix = lane, token, prefix
        self._handlers, self._deadlines, self._clock = handlers, deadlines, clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._out: list[_Answer] = []
        self._wake = asyncio.Event()
        self._asked = self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._pump: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for questions from now on."""
        if self._pump is None:
            self._pump = self._loop.create_task(self._run())
            self._tick()

    def look(self) -> None:
        """There may be a question."""
        if self._pump is not None:
            self._asked = True
            self._wake.set()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_POLL, self._tick)
        self.look()

    async def _run(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            try:
                if self._asked:
                    self._asked = False
                    await self._take()
                if self._out:
                    await self._give()
            except (CauceError, ConnectionError) as error:
                _log.debug("questions are not taken, or answers not given, for now: %s", error)
                await self._clock.sleep(_PAUSE)
                self.look()

    # --------------------------------------------------------------------------------------------------- questions

    async def _take(self) -> None:
        rows = await self._lane.fetch(_TAKE, self._token)
        for row in rows:
            self._begin(row)
        if rows:
            # There may be more than go into one statement, or than a hint has told.
            self.look()

    def _begin(self, row: Any) -> None:
        seconds = row["seconds"]
        # What lay there while this process stood still may be pointless by now; what is no number is.
        if not seconds > 0:
            return
        until = self._loop.time() + seconds
        handler = None if self._closing else self._handlers.get(row["address"])
        if handler is None:
            self._answer(_Answer(row["asker"], row["n"], NOT_SERVED, until, b""))
            return
        task = self._loop.create_task(self._work(row["asker"], row["n"], handler, row["payload"], seconds, until))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, asker: str, n: int, handler: Handler, payload: bytes, seconds: float, until: float) -> None:
        try:
            answer = await self._deadlines.within(seconds, handler(payload))
            if len(answer) > MOST:
                raise Refused(f"the answer has {len(answer)} bytes: at most {MOST} can be given")
        except Exception as error:
            self._answer(_Answer(asker, n, FAILED, until, repr(error).encode()[:1000]))
        else:
            self._answer(_Answer(asker, n, ANSWER, until, answer))

    # ----------------------------------------------------------------------------------------------------- answers

    def _answer(self, answer: _Answer) -> None:
        self._out.append(answer)
        self._wake.set()

    async def _give(self) -> None:
        now = self._loop.time()
        # Nobody waits any more for what is late.
        self._out = [each for each in self._out if each.until > now]
        batch, size = list[_Answer](), 0
        for each in self._out[:_ROWS]:
            if batch and size > _BYTES:
                break
            size += len(each.payload)
            batch.append(each)
        if not batch:
            return
        channels, texts = self._notifications(batch)
        await self._lane.fetch(
            _GIVE, [each.asker for each in batch], [each.n for each in batch], [each.kind for each in batch],
            [each.until - now for each in batch], [each.payload for each in batch], channels, texts,
        )  # fmt: skip
        # Given away only now: what was not, is given again, and a second row for one question is none.
        del self._out[: len(batch)]
        if self._out:
            self._wake.set()

    def _notifications(self, batch: list[_Answer]) -> tuple[list[str], list[str]]:
        askers: dict[str, list[_Answer]] = {}
        for each in batch:
            askers.setdefault(each.asker, []).append(each)
        pairs = [
            (self._prefix + asker, text)
            for asker, answers in askers.items()
            for text in packed((each.n, each.kind, each.payload) for each in answers)
        ]
        return [channel for channel, _ in pairs], [text for _, text in pairs]

    # --------------------------------------------------------------------------------------------------------- end

    async def close(self) -> None:
        """Take nothing more, stop what is at work, and give the last answers."""
        if self._timer is not None:
            self._timer.cancel()
        self._closing = True
        self._wake.set()
        if self._pump is not None:
            await asyncio.wait((self._pump,), timeout=_FLUSH)
            self._pump.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        try:
            async with asyncio.timeout(_FLUSH):
                while self._out:
                    await self._give()
        except (CauceError, OSError, TimeoutError) as error:
            _log.warning("the last answers were not given: %s", error)
        self._lane.close()
