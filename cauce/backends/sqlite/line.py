"""One connection between two processes, with many questions in flight: the asking end and the answering end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import cast

from cauce.backends.spread import Lost, NotServed
from cauce.backends.sqlite.frames import (
    ALL,
    ANSWER,
    FAILED,
    NOT_SERVED,
    Broken,
    Frames,
    answer,
    question,
    read_answer,
    read_question,
)
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.wire import Handler

__all__ = ["Answering", "Asking", "Line", "is_trusted"]

_log = logging.getLogger("cauce")
_CREDENTIALS = struct.Struct("3i")


def is_trusted(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as our own user, or as root. Else it is told in the log."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # Not Linux: the folder's permissions are what there is.
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid in (os.geteuid(), 0):
        return True
    _log.warning("process %d of user %d is at the wire, and is not talked to", pid, uid)
    return False


class Line(asyncio.Protocol):
    """Frames in, one by one; frames out, in one write for each round of the loop, and withdrawn as long as they wait.

    Parameters:
        received: called with each frame; what it raises as `Broken` closes the connection.
        lost: called once, when the connection is closed.
        deaf: whether it stops reading while the other does not read. One end only, or both might wait for each other.
    """

    def __init__(self, received: Callable[[bytes], None], lost: Callable[[], None], *, deaf: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._received, self._lost, self._deaf = received, lost, deaf
        self._frames = Frames()
        self._out: dict[int, bytes] = {}
        self._transport: asyncio.Transport | None = None
        self._due = self._paused = self._closing = False
        self.gone = self._loop.create_future()

    def send(self, id: int, frame: bytes) -> None:
        """Send a frame with the next write."""
        self._out[id] = frame
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def withdraw(self, id: int) -> None:
        """Do not send what was not sent yet: who does not read would else be waited for in memory."""
        self._out.pop(id, None)

    def _flush(self) -> None:
        self._due = False
        if self._out and self._transport is not None and not self._paused:
            frames = list(self._out.values())
            self._out.clear()
            self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._closing or not is_trusted(transport.get_extra_info("socket")):
            self._transport.abort()
        else:
            self._flush()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for frame in self._frames.feed(data):
                self._received(frame)
        except Broken as error:
            _log.warning("a connection is closed, because there came %s", error)
            self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True
        if self._deaf and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._deaf and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._out.clear()
        if not self.gone.done():
            self.gone.set_result(None)
            self._lost()

    def close(self, *, now: bool = False) -> None:
        """Close it when all is written, or now."""
        self._closing = True
        self._flush()
        if self._transport is not None:
            self._transport.abort() if now else self._transport.close()

    def fileno(self) -> int:
        """Its file descriptor, -1 if there is none."""
        if self._transport is None:
            return -1
        return int(self._transport.get_extra_info("socket").fileno())


def _micros(clock: Clock) -> int:
    """A time that both ends share, for they are on one machine; the wall clock may be set meanwhile."""
    return round(clock.monotonic() * 1_000_000)


class Asking:
    """The end that asks. `who` names the other one in errors."""

    def __init__(self, who: str, clock: Clock, lost: Callable[[], None]) -> None:
        self._who, self._clock, self._told = who, clock, lost
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._last = ALL
        self.line = Line(self._received, self._lost, deaf=False)

    async def ask(self, address: str, payload: bytes, seconds: float) -> bytes:
        """The answer. Raises `NotServed`, and `ConnectionError` if there will be none."""
        self._last = id = self._last + 1
        frame = question(id, seconds, _micros(self._clock), address, payload)
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting[id] = future
        self.line.send(id, frame)
        try:
            return await future
        finally:
            if self._waiting.pop(id, None) is not None:
                self.line.withdraw(id)

    def _received(self, frame: bytes) -> None:
        kind, id, payload = read_answer(frame)
        if kind == NOT_SERVED and id == ALL:
            self._end(NotServed)
            self.line.close(now=True)
            return
        future = self._waiting.pop(id, None)
        if future is None or future.done():
            return  # late: nobody waits for it any more
        if kind == ANSWER:
            future.set_result(payload)
        elif kind == NOT_SERVED:
            future.set_exception(NotServed())
        else:
            future.set_exception(ConnectionError(f"{self._who} failed: {payload.decode(errors='replace')}"))

    def _lost(self) -> None:
        self._end(lambda: Lost(f"{self._who} went away before it answered"))

    def _end(self, why: Callable[[], Exception]) -> None:
        self._told()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(why())
        self._waiting.clear()


class Answering:
    """The end that answers, a task for each question; it is cancelled when the asker's deadline has passed."""

    def __init__(
        self, handlers: Mapping[str, Handler], deadlines: Deadlines, clock: Clock, lost: Callable[[Answering], None]
    ) -> None:
        self._handlers, self._deadlines, self._clock, self._told = handlers, deadlines, clock, lost
        self._loop, self._leaving = asyncio.get_running_loop(), False
        self._tasks: set[asyncio.Task[None]] = set()
        self.line = Line(self._received, self._lost, deaf=True)

    def _received(self, frame: bytes) -> None:
        id, seconds, sent, address, payload = read_question(frame)
        # What lay in the socket while this process stood still may be pointless by now.
        left = seconds - max(0, _micros(self._clock) - sent) / 1_000_000
        if not left > 0:
            return
        handler = self._handlers.get(address)
        if handler is None or self._leaving:
            self.line.send(id, answer(NOT_SERVED, id, b""))
            return
        task = self._loop.create_task(self._answer(id, handler, payload, left))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def leave(self) -> None:
        """Begin nothing more, and let the other end close when it has the last answers.

        It may have asked what was not read here yet: it is told that this never began. What did begin is cancelled,
        and then the end of the connection says that nobody knows.
        """
        self._leaving = True
        working = [task for task in self._tasks if not task.done()]
        for task in working:
            task.cancel()
        if working:
            self.line.close()
        else:
            self.line.send(ALL, answer(NOT_SERVED, ALL, b""))

    async def _answer(self, id: int, handler: Handler, payload: bytes, seconds: float) -> None:
        try:
            frame = answer(ANSWER, id, await self._deadlines.within(seconds, handler(payload)))
        except Exception as error:
            # Also when the deadline has passed: then nobody waits for it, and it is dropped there.
            frame = answer(FAILED, id, repr(error).encode()[:1000])
        if not self.line.gone.done():
            self.line.send(id, frame)

    def _lost(self) -> None:
        self._told(self)
