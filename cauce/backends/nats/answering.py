"""The end that answers: an endpoint for each address, with its statistics, and a task for each question."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from cauce.backends.nats.client import Tapped
from cauce.backends.nats.frames import (
    HEADERS,
    QUEUE,
    TAKEN,
    WENT_AWAY,
    error_headers,
    not_served,
    publication,
    seconds_of,
)
from cauce.backends.nats.link import Link
from cauce.backends.nats.standstill import Standstill
from cauce.backends.nats.trouble import trouble
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.wire import Handler

__all__ = ["Answering", "Endpoint"]

_log = logging.getLogger("cauce")

_LONG = 0.1
"""Seconds after which a question takes so long that its asker is told who has it in hand."""

_PATIENCE = 60.0
"""Seconds in which a question is answered whose asker, no client of ours, does not say how long it will wait."""


class Endpoint:
    """One address: its handler, and what the services API tells of it. `time` is in seconds."""

    def __init__(self, address: str, subject: str, handler: Handler) -> None:
        self.address, self.subject, self.handler = address, subject, handler
        self.leaving = False
        self.tapped: list[Tapped] = []
        self.requests = self.errors = 0
        self.time = 0.0
        self.last_error = ""

    def failed(self, text: str, code: int) -> bytes:
        """Count an error. Returns the headers that tell it."""
        self.errors += 1
        self.last_error = f"{code}:{text[:500]}"
        return error_headers(text, code)


class Answering:
    """What is served from here, and what is in hand. `barrier` returns when the server has seen all that was sent."""

    def __init__(
        self, link: Link, name: str, clock: Clock, deadlines: Deadlines, barrier: Callable[[], Awaitable[None]]
    ) -> None:
        self._link, self._client, self._clock, self._deadlines = link, link.client, clock, deadlines
        self._name, self._who = name.encode(), f"process {name.partition('-')[0]}"
        self._loop = asyncio.get_running_loop()
        self._barrier = barrier
        self._standstill = Standstill(clock, barrier)
        self.endpoints: dict[str, Endpoint] = {}
        self._in_hand: dict[asyncio.Task[None], tuple[bytes, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._beside: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------ to be asked

    def endpoint(self, address: str, subject: str, handler: Handler) -> Endpoint:
        """An address that is served from now on, but for what `listen` does."""
        self.endpoints[address] = endpoint = Endpoint(address, subject, handler)
        return endpoint

    async def listen(self, endpoint: Endpoint, own: str) -> None:
        """Subscribe to it, and to a subject `own` for who wants to ask this process, if that is not empty.

        The server knows that only after a barrier.
        """

        def received(subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
            self._received(endpoint, reply, data, head)

        self._standstill.watch()
        endpoint.tapped.append(await self._client.tap(endpoint.subject, received, QUEUE))
        if own:
            endpoint.tapped.append(await self._client.tap(own, received))

    def leave(self, endpoint: Endpoint) -> bool:
        """Serve it no more here, and tell whom the server sends here that it is so. False: that was said before."""
        said, endpoint.leaving = endpoint.leaving, True
        if self.endpoints.get(endpoint.address) is endpoint:
            del self.endpoints[endpoint.address]
        return not said

    async def left(self, endpoint: Endpoint) -> None:
        """Have the server send nothing more for it, and wait until it does."""
        if endpoint.tapped:
            for tapped in endpoint.tapped:
                tapped.quit()
            try:
                await self._barrier()
            finally:
                for tapped in endpoint.tapped:
                    tapped()

    # ------------------------------------------------------------------------------------------------- questions

    def _received(self, endpoint: Endpoint, reply: bytes, payload: bytes, headers: bytes) -> None:
        if not reply:
            return
        if endpoint.leaving:
            self.aside(self.send(not_served(reply)))
            return
        now, seconds = self._clock.monotonic(), seconds_of(headers) if headers else None
        # What lay in the socket while this process stood still may be pointless by now.
        left = (_PATIENCE if seconds is None else seconds) - self._standstill.before(now)
        if not left > 0:
            return
        task = self._loop.create_task(self._answer(endpoint, reply, payload, left))
        self._in_hand[task] = b"" if seconds is None else reply, now
        task.add_done_callback(self._done)
        if self._timer is None:
            self._timer = self._loop.call_later(_LONG, self._look)

    async def _answer(self, endpoint: Endpoint, reply: bytes, payload: bytes, left: float) -> None:
        began, headers = self._clock.monotonic(), b""
        endpoint.requests += 1
        try:
            answer = await self._deadlines.within(left, endpoint.handler(payload))
            most = self._client.max_payload - HEADERS
            if len(answer) > most:
                raise ValueError(f"the answer is {len(answer)} bytes: at most {most}")
            if (found := trouble(answer)) is not None:
                headers = endpoint.failed(*found)
        except asyncio.CancelledError:
            answer, headers = b"", endpoint.failed(f"{self._who} went away before it answered", WENT_AWAY)
        except Exception as error:
            answer, headers = b"", endpoint.failed(f"{self._who} failed: {error!r}", 500)
        took = self._clock.monotonic() - began
        endpoint.time += took
        if took < left:  # Else nobody waits for it.
            await self.send(publication(reply, b"", answer, headers))

    async def send(self, command: bytes) -> None:
        """Send it, but not over a connection that comes later: then nobody waits for it."""
        if self._client.is_connected:
            self._client.send(command)
            await self._client.kick()

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._in_hand[task]

    # ------------------------------------------------------------------------------------- what takes long, and ends

    def _look(self) -> None:
        """Say what we have had in hand for long, for our end to be noticed where it was asked."""
        self._timer = self._loop.call_later(_LONG, self._look) if self._in_hand else None
        before, told = self._clock.monotonic() - _LONG, list[bytes]()
        for task, (reply, since) in self._in_hand.items():
            if reply and since <= before:
                self._in_hand[task] = b"", since
                told.append(publication(reply + TAKEN, b"", self._name))
        if told:
            self.aside(self.send(b"".join(told)))

    def aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for."""
        task = self._loop.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._was_beside)

    def _was_beside(self, task: asyncio.Task[None]) -> None:
        self._beside.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("the wire could not say something to the server: %r", error)

    async def close(self) -> None:
        """Say of what is in hand that it will not be answered, and wait for all that was begun aside."""
        for task in self._in_hand:
            task.cancel()
        while waiting := [*self._in_hand, *self._beside]:
            await asyncio.wait(waiting)
        if self._timer is not None:
            self._timer.cancel()
        await self._standstill.close()
