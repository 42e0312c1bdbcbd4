"""The end that asks: the questions of one turn of the loop in one statement, and the answers to them."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from cauce.backends.postgres.lane import Lane
from cauce.backends.postgres.parcel import ASKED, LOOK, unpacked
from cauce.backends.postgres.registry import Registry
from cauce.backends.spread import Lost, NotServed
from cauce.errors import CauceError, Unreachable

__all__ = ["ANSWER", "FAILED", "NOT_SERVED", "Asking"]

_log = logging.getLogger("cauce")

ANSWER, NOT_SERVED, FAILED = 1, 2, 3

_POLL = 0.5
"""Seconds between two looks at what is awaited: notifications may be lost, rows are not."""

_LONG = 1e6
"""Seconds that a question may take; one may be asked without end, but no column holds that."""

_ROWS, _BYTES = 500, 4 << 20
"""What goes into one statement at most; a longer question goes alone."""

# A question to who has left is not written. What nobody waits for any more is removed on the way.
_SEND = f"""
with forgotten as (
    delete from wire_questions q using unnest($2::text[], $3::int8[]) as f(asked, n)
    where q.asked = f.asked and q.asker = $1 and q.n = f.n
), done as (
    delete from wire_answers where asker = $1 and n = any($4::int8[])
), sent as (
    insert into wire_questions (asked, asker, n, address, seconds, until, payload)
    select u.asked, $1, u.n, u.address, u.seconds,
        least(clock_timestamp() + u.seconds * interval '1 second', to_timestamp(u.until)), u.payload
    from unnest($5::text[], $6::int8[], $7::text[], $8::float8[], $9::bytea[], $11::float8[])
        as u(asked, n, address, seconds, payload, until)
    where exists (select from wire_processes p where p.token = u.asked)
    returning asked, n
)
select array_agg(n) as sent, extract(epoch from clock_timestamp())::float8 as time,
    pg_notify($10::text || asked, '{ASKED}') from sent group by asked
"""

_TAKE = "delete from wire_answers where asker = $1 returning n, kind, payload"

_RECALL = "delete from wire_questions where asker = $1 and asked = any($2::text[]) returning n"


class _Question(NamedTuple):
    asked: str
    address: str
    until: float
    payload: bytes


class _Waiting:
    """A question that has no answer yet. `made` says on which connection it was sent; 0: not yet."""

    __slots__ = ("asked", "future", "made")

    def __init__(self, asked: str, future: asyncio.Future[bytes]) -> None:
        self.asked, self.future, self.made = asked, future, 0


class Asking:
    """All questions of a process to others, numbered.

    Parameters:
        token: of this process.
        prefix: what the name of a process's channel begins with, before its token.
    """

    def __init__(self, lane: Lane, token: str, registry: Registry, prefix: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._lane, self._token, self._registry, self._prefix = lane, token, registry, prefix
        self._out: dict[int, _Question] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._forgotten: dict[int, str] = {}
        self._done: list[int] = []
        self._last = 0
        self._epoch = ""
        self._ahead: float | None = None
        self._measured = 0
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._poll_due = self._take_due = False
        self._pump: asyncio.Task[None] | None = None

    # --------------------------------------------------------------------------------------------------- questions

    async def ask(self, asked: str, address: str, payload: bytes, seconds: float) -> bytes:
        """The answer of a process. Raises `NotServed`, `Unreachable` if it was not sent, else `ConnectionError`."""
        if not self._waiting:
            self._epoch = self._registry.epoch
        self._last = n = self._last + 1
        waiting = self._waiting[n] = _Waiting(asked, self._loop.create_future())
        self._out[n] = _Question(asked, address, self._loop.time() + seconds, payload)
        self._start()
        try:
            return await waiting.future
        finally:
            if self._waiting.pop(n, None) is not None and self._out.pop(n, None) is None:
                self._forgotten[n] = asked

    def _start(self) -> None:
        if self._pump is None:
            self._pump = self._loop.create_task(self._run())
        if self._timer is None:
            self._timer = self._loop.call_later(_POLL, self._tick)
        self._wake.set()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_POLL, self._tick) if self._waiting else None
        self._poll_due = True
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._out:
                    await self._send()
                if self._poll_due:
                    self._poll_due = self._take_due = False
                    await self._poll()
                elif self._take_due:
                    self._take_due = False
                    await self._take()
            except (CauceError, ConnectionError) as error:
                # With the next tick it is tried again, for as long as somebody waits.
                _log.debug("answers were not looked for: %s", error)

    async def _send(self) -> None:
        batch = self._batch()
        forgotten, done = self._forgotten, self._done
        self._forgotten, self._done = {}, []
        now = self._loop.time()
        questions = batch.values()
        try:
            rows = await self._lane.fetch(
                _SEND, self._token, list(forgotten.values()), list(forgotten), done,
                [each.asked for each in questions], list(batch), [each.address for each in questions],
                [min(each.until - now, _LONG) for each in questions], [each.payload for each in questions],
                self._prefix, [self._server_time(each.until) for each in questions],
            )  # fmt: skip
        except Exception as error:
            self._forgotten = forgotten | self._forgotten
            self._done = done + self._done
            self._fail(batch, error)
            return
        for row in rows:
            self._measure(row["time"] - self._loop.time())
        sent = {n for row in rows for n in row["sent"]}
        for n in batch:
            waiting = self._waiting.get(n)
            if waiting is None:
                continue
            if n in sent:
                waiting.made = self._lane.made
            elif not waiting.future.done():
                waiting.future.set_exception(NotServed())

    def _server_time(self, until: float) -> float | None:
        """A moment of ours on the server's clock, or a little earlier; None if that is not known on this connection.

        What waits at a server that hangs is then over when it goes on. The reply that took the least time counts.
        """
        if self._ahead is None or self._measured != self._lane.made:
            return None
        return self._ahead + min(until, self._loop.time() + _LONG)

    def _measure(self, ahead: float) -> None:
        if self._ahead is None or self._measured != self._lane.made:
            self._measured, self._ahead = self._lane.made, ahead
        self._ahead = max(self._ahead, ahead)

    def _batch(self) -> dict[int, _Question]:
        """What goes out now: whose time is not over."""
        batch, size, now = dict[int, _Question](), 0, self._loop.time()
        for n, question in self._out.items():
            size += len(question.payload)
            if batch and (size > _BYTES or len(batch) == _ROWS):
                break
            batch[n] = question
        for n in batch:
            del self._out[n]
        return {n: question for n, question in batch.items() if question.until > now}

    def _fail(self, batch: dict[int, _Question], error: Exception) -> None:
        if isinstance(error, Unreachable):
            # What waits behind it would fare no better, and would have waited longer.
            batch = batch | self._out
            self._out.clear()
        for n in batch:
            waiting = self._waiting.get(n)
            if waiting is not None and not waiting.future.done():
                waiting.future.set_exception(_copied(error))

    # ----------------------------------------------------------------------------------------------------- answers

    def told(self, text: str) -> None:
        """Take what a notification says."""
        if text == LOOK:
            self._take_due = True
            self._wake.set()
            return
        try:
            for n, kind, payload in unpacked(text):
                self._done.append(n)
                self._answered(n, kind, payload)
        except ValueError as error:
            _log.warning("a notification is passed over: %s", error)

    def look(self) -> None:
        """Something may have been missed, or somebody may have gone."""
        if self._waiting:
            self._poll_due = True
            self._wake.set()

    def _answered(self, n: int, kind: int, payload: bytes) -> None:
        waiting = self._waiting.get(n)
        if waiting is None or waiting.future.done():
            return  # late: nobody waits for it any more
        if kind == ANSWER:
            waiting.future.set_result(payload)
        elif kind == NOT_SERVED:
            waiting.future.set_exception(NotServed())
        else:
            said = payload.decode(errors="replace")
            waiting.future.set_exception(ConnectionError(f"{_who(waiting.asked)} failed: {said}"))

    async def _poll(self) -> None:
        """Take what was missed, and give up those who were asked and are gone."""
        waiting = dict(self._waiting)
        if waiting:
            # By the same connection as the questions: those sent on it have come after whatever the server forgot.
            await self._registry.read(self._lane.fetch)
        # Who has gone in good order has answered before.
        await self._take()
        if self._registry.epoch != self._epoch:
            self._epoch = self._registry.epoch
            self._forgot()
        gone = {each.asked for each in waiting.values() if each.made and each.asked not in self._registry.present}
        if gone:
            await self._give_up(waiting, gone)

    async def _take(self) -> None:
        if self._forgotten or self._done:
            await self._send()
        for row in await self._lane.fetch(_TAKE, self._token):
            self._answered(row["n"], row["kind"], row["payload"])

    def _forgot(self) -> None:
        """The server has crashed, and lost what was on its way."""
        for each in self._waiting.values():
            if 0 < each.made < self._lane.made and not each.future.done():
                each.future.set_exception(Lost("the server crashed and lost what was asked or answered"))

    async def _give_up(self, waiting: dict[int, _Waiting], gone: set[str]) -> None:
        untouched = {row["n"] for row in await self._lane.fetch(_RECALL, self._token, list(gone))}
        for n, each in waiting.items():
            if each.made and each.asked in gone and not each.future.done():
                lost = Lost(f"{_who(each.asked)} went away before it answered")
                each.future.set_exception(NotServed() if n in untouched else lost)

    # --------------------------------------------------------------------------------------------------------- end

    async def close(self) -> None:
        """Ask nothing more. Who waits still is told."""
        if self._timer is not None:
            self._timer.cancel()
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait((self._pump,))
        for each in self._waiting.values():
            if not each.future.done():
                each.future.set_exception(ConnectionError("the bus was closed before there was an answer"))
        self._lane.close()


def _who(token: str) -> str:
    return f"process {token.partition('-')[0]}"


def _copied(error: Exception) -> Exception:
    """The same error once more: raised by several tasks, one object would gather all their tracebacks."""
    return type(error)(str(error)) if isinstance(error, (Unreachable, ConnectionError)) else error
