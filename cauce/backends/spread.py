"""Which of several processes that serve an address is asked, and when one is asked beside or after another."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

from cauce.clock import Clock
from cauce.deadline import STILL

__all__ = ["Lost", "NotServed", "Spread"]

_PART, _LONGEST = 4, 1.0
"""After this part of its time, and at most so many seconds, a question is asked at a second process, too."""

_FEW, _PART_BESIDE = 2, 10
"""Where all are silent, so many questions, or one of so many, are asked at a second process: they may be overloaded."""

_SILENT = 2.0
"""Seconds for which a process that was silent is asked last."""

One = Callable[[str], Awaitable[bytes]]
"""Asks one process, by its token. Raises `NotServed`, `Lost`, other kinds of `ConnectionError`."""


class NotServed(Exception):
    """Who was asked does not serve the address any more, or has gone before it took the question. Nothing ran."""


class Lost(ConnectionError):
    """Who was asked went away before it answered: it is not known whether it ran."""


class Spread:
    """What this process knows of those it asks: how many of its questions each has under way, and who was silent.

    Of two, one by turns and one by chance, the one with fewer questions under way is asked. Two choices do nearly what
    a look at all would, and counts of our own are never old (Mitzenmacher, "The Power of Two Choices in Randomized
    Load Balancing", 2001; how old counts mislead: "How Useful Is Old Information?", 2000).
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._turn = self._beside = 0
        self._under_way: Counter[str] = Counter()
        self._heard: dict[str, float] = {}  # or since when something is under way there
        self._silent: dict[str, float] = {}

    def order(self, tokens: Sequence[str]) -> list[str]:
        """Processes in the order in which they are to be asked; who was silent just now comes last."""
        if len(tokens) < 2:
            return list(tokens)
        last = [token for token in tokens if self._is_silent(token)] if self._silent else []
        first = [token for token in tokens if token not in last] if last else list(tokens)
        return self._by_turns(first) + last

    def _by_turns(self, tokens: list[str]) -> list[str]:
        self._turn += 1
        many = len(tokens)
        if many < 2:
            return tokens
        at = self._turn % many
        order = tokens[at:] + tokens[:at]
        other = 1 + int(self._clock.random() * (many - 1))
        if self._under_way[order[other]] < self._under_way[order[0]]:
            order.insert(0, order.pop(other))
        return order

    def _is_silent(self, token: str) -> bool:
        until = self._silent.get(token)
        if until is None:
            return False
        if until <= self._clock.monotonic():
            del self._silent[token]
            return False
        return True

    async def ask(self, order: Sequence[str], one: One, seconds: float, *, safe: bool) -> bytes:
        """The answer of the first in this order who serves the address. Raises `NotServed` if nobody does.

        Parameters:
            safe: ask another one, once, too when nothing at all has come from who was asked for a part of these
                seconds: the first answer counts, and the other question is withdrawn (Dean and Barroso, "The Tail at
                Scale", 2013, section "Hedged requests"). Where all are silent few questions are: if
                they are overloaded it would double the load. Once more it is asked when who was asked went away. So a
                question that kills who answers it, or that takes everybody long, comes to two or three, not to all.
        """
        if safe and len(order) > 1:
            return await self._safely(deque(order), one, min(seconds / _PART, _LONGEST))
        for token in order:
            try:
                return await self._asked(token, one)
            except NotServed:
                continue
        raise NotServed

    async def _asked(self, token: str, one: One) -> bytes:
        self._under_way[token] += 1
        self._heard.setdefault(token, self._clock.monotonic())
        try:
            answer = await one(token)
            self._heard[token] = self._clock.monotonic()
            self._silent.pop(token, None)
            return answer
        finally:
            self._under_way[token] -= 1
            if not self._under_way[token]:
                # Who was heard when matters only to questions that are under way.
                del self._under_way[token]
                self._heard.pop(token, None)

    async def _safely(self, order: deque[str], one: One, patience: float) -> bytes:
        tries = dict[asyncio.Task[bytes], tuple[str, float]]()
        beside, failure = False, None
        try:
            while True:
                if not tries:
                    if not order:
                        raise failure or NotServed
                    self._begin(tries, order.popleft(), one)
                alone = not beside and bool(order)
                timeout = self._left(tries, patience) if alone else None
                until = self._clock.monotonic() + (timeout or 0.0)
                done, _ = await asyncio.wait(tries, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del tries[task]
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if isinstance(error, Lost):
                        if failure is not None:
                            raise ConnectionError(str(error))
                        failure = error
                    elif not isinstance(error, NotServed):
                        raise error
                now = self._clock.monotonic()
                if alone and not done and now - until > STILL:
                    # It was this process that stood still: what came meanwhile is heard first.
                    tries = {task: (token, now) for task, (token, _) in tries.items()}
                elif alone and not done and self._left(tries, patience) <= 0:
                    self._note_silence(token for token, _ in tries.values())
                    other = self._other(order, patience)
                    if other is None:
                        tries = {task: (token, now) for task, (token, _) in tries.items()}
                    else:
                        beside = True
                        self._beside += 1
                        order.remove(other)
                        self._begin(tries, other, one)
        finally:
            self._beside -= beside
            for task in tries:
                task.cancel()

    def _begin(self, tries: dict[asyncio.Task[bytes], tuple[str, float]], token: str, one: One) -> None:
        task = asyncio.get_running_loop().create_task(self._asked(token, one))
        tries[task] = token, self._clock.monotonic()
        # What the one says that was not waited for any more is nobody's affair.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _note_silence(self, tokens: Iterable[str]) -> None:
        now = self._clock.monotonic()
        self._silent = {token: until for token, until in self._silent.items() if until > now}
        self._silent |= dict.fromkeys(tokens, now + _SILENT)

    def _other(self, order: Iterable[str], patience: float) -> str | None:
        """Who is asked beside one that is silent: one that is not as silent itself; of those that are, not for all."""
        now = self._clock.monotonic()
        for token in order:
            if now - self._heard.get(token, now) < patience:
                return token
        few = max(_FEW, sum(self._under_way.values()) // _PART_BESIDE)
        return next(iter(order)) if self._beside < few else None

    def _left(self, tries: dict[asyncio.Task[bytes], tuple[str, float]], patience: float) -> float:
        """Seconds until who was asked counts as silent: since the question, or since it last answered another one."""
        now = self._clock.monotonic()
        return max(max(began, self._heard.get(token, began)) + patience - now for token, began in tries.values())
