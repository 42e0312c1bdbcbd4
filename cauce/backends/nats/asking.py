"""The end that asks: many questions in flight, and an eye on those who take long to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from cauce.backends.nats.frames import TAKEN, Failed, WentAway, outcome, question
from cauce.backends.nats.link import Link
from cauce.backends.nats.names import token
from cauce.backends.spread import Lost, NotServed
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.errors import NotPermitted, Unreachable

__all__ = ["Asking"]

_LOOK = 0.5
"""Seconds between two looks whether those who were asked are still there: one task looks for all questions."""

_PATIENCE = 0.25
"""Seconds in which the server says that somebody is not there."""


class _Question:
    """One that waits for its answer; see `Link.expect`."""

    def __init__(self, subject: str, *, is_look: bool) -> None:
        self.subject, self.is_look = subject, is_look
        self.taker = ""
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def subjects(self) -> tuple[str, ...]:
        return (self.subject,)

    def done(self, end: Callable[[], object]) -> None:
        self.forget = end

    def take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        if not self.answer.done():
            found = outcome(head, data) if head else data
            if isinstance(found, bytes):
                self.answer.set_result(found)
            else:
                self.answer.set_exception(found)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Asking:
    """What was asked from here and is not answered yet."""

    def __init__(self, link: Link, clock: Clock, deadlines: Deadlines) -> None:
        self._link, self._client, self._clock, self._deadlines = link, link.client, clock, deadlines
        self._waiting: dict[bytes, _Question] = {}
        self._listening = False
        self._watching: asyncio.Task[None] | None = None

    async def ask(self, subject: str, payload: bytes, seconds: float) -> bytes:
        """The answer.

        Raises `NotServed`, `NotPermitted`, `Unreachable` if the server is away, and `ConnectionError` if there will be
        no answer.
        """
        asked = _Question(subject, is_look=not seconds)
        reply = self._link.expect(asked)
        self._waiting[reply] = asked
        try:
            if not self._listening:
                await self._listen(reply)
            if self._watching is None:
                self._watching = asyncio.get_running_loop().create_task(self._watch())
            self._client.send(question(subject.encode(), reply, seconds, payload))
            await self._client.kick()
            return await asked.answer
        except Failed as error:
            raise (Lost if isinstance(error, WentAway) else ConnectionError)(str(error)) from None
        finally:
            asked.forget()
            del self._waiting[reply]

    # -------------------------------------------------------------------------------------- who will answer no more

    async def _listen(self, reply: bytes) -> None:
        self._listening = True
        await self._link.listen(f"{reply.rpartition(b'.')[0].decode()}.*{TAKEN.decode()}", self._took)

    def _took(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        """Somebody has had a question in hand for a while."""
        asked = self._waiting.get(subject.removesuffix(TAKEN))
        if asked is not None:
            asked.taker = token(data.decode(errors="replace"))

    async def _watch(self) -> None:
        """Look now and then whether those who were asked are there: the server knows at once who is not."""
        try:
            seen = set[_Question]()
            while self._waiting:
                await self._clock.sleep(_LOOK)
                waiting = {asked for asked in self._waiting.values() if not asked.is_look}
                await self._look([asked for asked in waiting if asked.taker or asked in seen])
                seen = waiting
        except (ConnectionError, NotPermitted, Unreachable):
            pass  # With the connection all questions are lost; what is not permitted is not known.
        finally:
            self._watching = None

    async def _look(self, waiting: Iterable[_Question]) -> None:
        """Fail what nobody will answer: who has it is gone, or nobody has said so and nobody serves the address."""
        there: dict[str, bool] = {}
        for asked in waiting:
            subject = self._link.subject("wire", asked.taker) if asked.taker else asked.subject
            if subject not in there:
                there[subject] = await self.is_there(subject)
            if not there[subject]:
                who = f"process {asked.taker.partition('-')[0]}" if asked.taker else "who was asked"
                asked.fail(Lost(f"{who} went away before it answered"))

    async def is_there(self, subject: str) -> bool:
        """Whether somebody has subscribed to a subject; who stands still has, too.

        As a question it has no time left, so it is not begun.
        """
        try:
            await self._deadlines.within(_PATIENCE, self.ask(subject, b"", 0.0))
        except NotServed:
            return False
        except TimeoutError:
            pass
        return True

    async def close(self) -> None:
        """Watch nobody any more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
