"""The end of a log as it grows: pushed by the server, kept for a while in memory, read by all who wait in a process.

An ordered consumer that the server forgets when nobody listens: no acknowledgements, and a hole in its own count means
that something was missed, so it is made anew behind what was seen.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right

import msgspec

from cauce.backends.nats.api import ApiError, ask
from cauce.backends.nats.direct import Message
from cauce.backends.nats.stream import Stream
from cauce.errors import CauceError

__all__ = ["Tail"]

_KEPT = 20_000
_KEPT_BYTES = 32 * 1024 * 1024
_SILENCE = 5.0
_IDLE = 60.0
"""Seconds after which nobody waits any more, and the server need not send what nobody reads."""


class _Made(msgspec.Struct, frozen=True):
    name: str


class Tail:
    """`covered` is how far it has seen; `begin` is the position behind which it still holds all there was."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._link = stream, stream.link
        self.begin = self.covered = 0
        self.running = False
        self._positions: list[int] = []
        self._messages: list[Message] = []
        self._bytes = 0
        self._inbox, self._count, self._number = b"", 0, 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._skip = len(stream.everything) - 1
        self._starting: asyncio.Task[None] | None = None
        self._name = ""
        self._closed = False
        self._heard = self._used = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._unlisten = _nothing
        self._link.went_away.append(self._lost)

    async def start(self, after: int) -> None:
        """See to it that what comes behind a position is seen."""
        if not self.running and not self._closed:
            if self._starting is None:
                self._starting = asyncio.get_running_loop().create_task(self._start(after))
            await asyncio.shield(self._starting)

    async def _start(self, after: int) -> None:
        try:
            if self.covered == 0 or self.covered + _KEPT < after:
                # What lies between is read elsewhere, by who is behind.
                self._clear()
                self.begin = self.covered = after
            self._unlisten()
            self._number += 1
            inbox = f"{self._link.client.new_inbox()}.{self._number}"
            self._unlisten = await self._link.listen(inbox, self._take)
            self._inbox, self._count = inbox.encode(), 0
            await self._make(inbox)
            self._heard = self._used = asyncio.get_running_loop().time()
            self.running = True
            if self._watch is None:
                self._watch = asyncio.get_running_loop().call_later(_SILENCE, self._look)
        finally:
            self._starting = None

    async def _make(self, inbox: str) -> None:
        config = {
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.covered + 1,
            "ack_policy": "none",
            "replay_policy": "instant",
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
            "idle_heartbeat": int(_SILENCE / 3 * 1e9),
            "flow_control": True,
            "inactive_threshold": int(_SILENCE * 1e9),
        }
        try:
            question = {"stream_name": self._stream.name, "config": config}
            self._name = (await ask(self._link, f"CONSUMER.CREATE.{self._stream.name}", question, _Made)).name
        except ApiError as error:
            raise self._stream.refusal(error) from None

    def _take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        self._heard = asyncio.get_running_loop().time()
        if head[8:9] == b" ":
            self._control(reply, head)
            return
        # $JS.ACK.<stream>.<consumer>.<delivered>.<position>.<count>.<time>.<pending>, perhaps with a domain before.
        tokens = reply.rsplit(b".", 5)
        position, count = int(tokens[-4]), int(tokens[-3])
        if count != self._count + 1:
            self._lost()
            return
        self._count = count
        if position <= self.covered:
            return
        self._messages.append(Message(subject.decode()[self._skip :], position, head, data))
        self._positions.append(position)
        self._bytes += len(data) + len(head)
        self.covered = position
        if len(self._positions) > _KEPT or self._bytes > _KEPT_BYTES:
            self._drop()
        if self._waiters:
            self._wake()

    def _control(self, reply: bytes, head: bytes) -> None:
        if reply:
            self._link.publish(reply.decode(), b"")
            self._link.client.kick_soon()
        elif (begin := head.find(b"Nats-Last-Consumer: ")) >= 0:
            last = int(head[begin + 20 : head.index(b"\r\n", begin)])
            if last != self._count:
                self._lost()
        elif head[9:12] == b"409":
            self._lost()

    def _drop(self) -> None:
        half = len(self._positions) // 2 or 1
        self.begin = self._positions[half - 1]
        self._bytes -= sum(len(each.payload) + len(each.head) for each in self._messages[:half])
        del self._positions[:half], self._messages[:half]

    def forget(self) -> None:
        """Some of what was seen is gone: who waits begins anew."""
        if self._starting is None:
            self._lost()
            self._unlisten()
            self._clear()

    def _clear(self) -> None:
        self.begin = self.covered = self._bytes = 0
        self._positions, self._messages = [], []

    def after(self, position: int) -> tuple[list[Message], int]:
        """What was seen, and from which index on it lies behind a position."""
        return self._messages, bisect_right(self._positions, position)

    async def wait(self, position: int, until: float) -> None:
        """Until something is seen behind a position, or time is over, or the tail has to be started again."""
        loop = asyncio.get_running_loop()
        self._used = loop.time()
        if self.covered > position or not self.running:
            return
        future: asyncio.Future[None] = loop.create_future()
        timer = loop.call_at(until, _done, future)
        self._waiters.add(future)
        try:
            await future
        finally:
            timer.cancel()
            self._waiters.discard(future)

    def _wake(self) -> None:
        for future in self._waiters:
            _done(future)

    def _lost(self) -> None:
        self.running = False
        self._wake()

    def _look(self) -> None:
        self._watch = None
        if self._closed:
            return
        now = asyncio.get_running_loop().time()
        if now - self._heard > _SILENCE:
            self._lost()
        if now - self._used > _IDLE and not self._waiters:
            self._lost()
            self._unlisten()
            self._clear()
            return
        self._watch = asyncio.get_running_loop().call_later(_SILENCE / 2, self._look)

    async def close(self) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        self._lost()
        self._unlisten()
        if self._starting is not None:
            self._starting.cancel()
        if self._name and not self._link.is_away:
            try:
                self._link.publish(f"$JS.API.CONSUMER.DELETE.{self._stream.name}.{self._name}", b"")
                await self._link.client.kick()
            except CauceError:
                return


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _nothing() -> None:
    """Nobody listens yet."""
