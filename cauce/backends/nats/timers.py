"""The timers in a bucket: what waits for its time, and in which seconds something of a share is due.

A timer is two messages, written together: `due.<share>.<second>.<id>` holds it, and `later.<id>` in front of it says
that it stands. One that was cancelled, or set anew elsewhere, has no such message right in front of it any more, and is
taken away in its time. Which seconds of a share have timers is read once, when the share is new here, and then noted:
under its fence nobody else sets any.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from heapq import heappop, heappush

import msgspec

from cauce.backends.nats.bucket import MOST, Bucket, Message, Put, Stale, Unsure
from cauce.backends.nats.fences import Fences, claim_of
from cauce.backends.nats.names import token
from cauce.store import Share, Timer

__all__ = ["Timers", "cancelled", "puts_of", "timers_in"]

_SECOND = 1_000_000
_SECONDS = 256
"""So many are read at once."""

_AT_ONCE = (MOST - 1) // 3
"""So many are let go in one batch: each takes three messages."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Timer).decode

Held = tuple[Timer, Message]
"""A timer, and the message that holds it."""


def puts_of(timer: Timer) -> list[Put]:
    """What sets a timer. A batch has them one behind the other."""
    name = f"due.{token(timer.share)}.{timer.due // _SECOND}.{token(timer.id)}"
    return [Put(f"later.{token(timer.id)}", b"%d" % timer.due), Put(name, _encode(timer))]


def cancelled(id: str) -> Put:
    """What takes a timer away."""
    return Put(f"later.{token(id)}", gone=True)


async def timers_in(bucket: Bucket) -> list[Timer]:
    """All that wait, the next one first."""
    stand = {each.sequence for each in await bucket.read("later.*")}
    held = {each.sequence: each for each in await bucket.read("due.>") if each.sequence - 1 in stand}
    found = [(_decode(each.payload), each.sequence) for each in held.values()]
    return [timer for timer, _ in sorted(found, key=lambda each: (each[0].due, each[1]))]


class _Share:
    """Of one share the seconds in which something is due, and what was read of those that have come."""

    __slots__ = ("fence", "heap", "known", "page", "read")

    def __init__(self) -> None:
        self.fence = -1
        self.heap: list[int] = []
        self.known: set[int] = set()
        self.read: list[int] = []
        self.page: deque[Held] = deque()

    def add(self, second: int) -> None:
        if second not in self.known:
            self.known.add(second)
            heappush(self.heap, second)

    def come(self, now: int) -> list[int]:
        """Take out the first seconds that have begun."""
        come = list[int]()
        while self.heap and self.heap[0] * _SECOND <= now and len(come) < _SECONDS:
            come.append(heappop(self.heap))
            self.known.discard(come[-1])
        return come

    def again(self) -> None:
        """Let be read again what was read."""
        for second in self.read:
            self.add(second)
        self.read, self.page = [], deque()

    @property
    def next(self) -> int:
        """When something is due, or may be; 0 if nothing waits."""
        if self.page:
            return self.page[0][0].due
        return self.heap[0] * _SECOND if self.heap else 0


class Timers:
    """The timers of the shares that one handle of a store holds.

    Parameters:
        alone: does something in its turn, while nothing else is written. What only reads needs none: others beat, and
            write, while much is read.
    """

    def __init__(
        self, bucket: Bucket, fences: Fences, alone: Callable[[Callable[[], Awaitable[bool]]], Awaitable[bool]]
    ) -> None:
        self._bucket, self._fences, self._alone = bucket, fences, alone
        self._shares: dict[str, _Share] = {}
        self._one = asyncio.Lock()

    def note(self, timers: Iterable[Timer]) -> None:
        """These were set, or nobody knows."""
        for timer in timers:
            mine, second = self._shares.setdefault(timer.share, _Share()), timer.due // _SECOND
            mine.add(second)
            if mine.page and second <= mine.read[-1]:
                mine.again()

    async def due(self, id: str) -> int:
        """When a timer is due, in microseconds since 1970; 0 if there is none."""
        found = await self._bucket.one(f"later.{token(id)}")
        return 0 if found is None else int(found.payload)

    async def fire(self, shares: Sequence[Share], now: int, limit: int) -> tuple[int, int]:
        """See `cauce.store.Store.fire`."""
        fired, following = 0, list[int]()
        async with self._one:
            for share in shares:
                many, due = await self._fire(share, await self._known(share), now, limit - fired)
                fired += many
                following += [due] if due else []
        return fired, min(following, default=0)

    async def _known(self, share: Share) -> _Share:
        """What is known of a share: first of all in which seconds something is due."""
        mine = self._shares.setdefault(share.name, _Share())
        if mine.fence != share.fence:
            subjects = await self._bucket.subjects(f"due.{token(share.name)}.>")
            mine.again()
            for tokens in subjects:
                mine.add(int(tokens[2]))
            mine.fence = share.fence
        return mine

    async def _fire(self, share: Share, mine: _Share, now: int, limit: int) -> tuple[int, int]:
        fired = 0
        while fired < limit:
            if not mine.page:
                if not (come := mine.come(now)):
                    break
                await self._look(share, mine, come)
                continue
            page, many = mine.page, min(_AT_ONCE, limit - fired)
            ready = [each for each, _ in zip(page, range(many), strict=False) if each[0].due <= now]
            if not ready:
                break
            if await self._alone(partial(self._let_go, share, ready)):
                for _ in ready:
                    page.popleft()
                fired += len(ready)
                continue
            mine.again()
            if not await self._alone(partial(self._fences.holds, share)):
                return fired, 0
            await self._weed(ready)
        return fired, mine.next

    async def _look(self, share: Share, mine: _Share, seconds: list[int]) -> None:
        """Read what is due in these seconds, in order."""
        try:
            subjects = await asyncio.gather(
                *(self._bucket.subjects(f"due.{token(share.name)}.{second}.*") for second in seconds)
            )
            found = await self._bucket.stand([".".join(tokens) for some in subjects for tokens in some])
        except BaseException:
            for second in seconds:
                mine.add(second)
            raise
        mine.page = deque(sorted(((_decode(each.payload), each) for each in found), key=_order))
        mine.read = seconds

    async def _let_go(self, share: Share, ready: Sequence[Held]) -> bool:
        """Write all as said, and take the timers away; False if nothing was written.

        Then one was cancelled meanwhile, and is left out the next time; or the share has another holder.
        """
        await self._fences.settle()
        fence, puts = (claim_of(share.name), self._fences.of(share)), list[Put]()
        for n, (timer, message) in enumerate(ready):
            name = f"outbox.{share.slot or 0}.{token(timer.handler)}.{self._bucket.link.clock.id()}"
            # The server checks a fence once in a batch.
            puts.append(Put(name, timer.said, fence=None if n else fence))
            puts.append(Put(f"later.{token(timer.id)}", gone=True, expected=message.sequence - 1))
            puts.append(Put(".".join(message.tokens), gone=True))
        try:
            await self._bucket.write(puts)
        except Stale:
            return False
        except Unsure:
            # If it was written, they are gone from where they are read again.
            self._shares[share.name].again()
            self._fences.doubt([share])
            raise
        return True

    async def _weed(self, held: Sequence[Held]) -> None:
        """Take away those that do not stand any more."""
        stand = await self._bucket.stand([f"later.{token(timer.id)}" for timer, _ in held])
        right = {each.sequence + 1 for each in stand}
        await self._bucket.delete([message.sequence for _, message in held if message.sequence not in right])


def _order(held: Held) -> tuple[int, int]:
    return held[0].due, held[1].sequence
