"""The timers in a bucket: what waits for its time, and in which seconds something of a share is due.

A timer is two messages, written together: `due.<share>.<second>.<id>` holds it, and `later.<id>` in front of it says
that it stands. One that was cancelled, or set anew elsewhere, has no such message right in front of it any more, and is
taken away in its time. Which seconds of a share have timers is read once, when the share is new here, and then noted:
under its fence nobody else sets any.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cauce.backends.nats.bucket import MOST, Bucket, Message, Put, Stale, Unsure
from cauce.backends.nats.fences import Fences, claim_of
from cauce.backends.nats.names import token
from cauce.store import Share, Timer

__all__ = ["Timers", "cancelled", "puts_of", "timers_in"]

_SECOND = 1_000_000
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


class Timers:
    """The timers of the shares that one handle of a store holds.

    Parameters:
        fresh: makes ids.
    """

    def __init__(self, bucket: Bucket, fences: Fences, fresh: Callable[[], str]) -> None:
        self._bucket, self._fences, self._fresh = bucket, fences, fresh
        self._seconds: dict[str, set[int]] = {}
        self._looked: dict[str, int] = {}
        self._page: dict[str, tuple[int, deque[Held]]] = {}
        self._noted = 0

    def note(self, timers: Iterable[Timer]) -> None:
        """These are about to be set."""
        for timer in timers:
            self._noted += 1
            second = timer.due // _SECOND
            self._seconds.setdefault(timer.share, set()).add(second)
            if self._page.get(timer.share, (-1,))[0] == second:
                self._page.pop(timer.share)

    async def due(self, id: str) -> int:
        """When a timer is due, in microseconds since 1970; 0 if there is none."""
        found = await self._bucket.one(f"later.{token(id)}")
        return 0 if found is None else int(found.payload)

    async def fire(self, shares: Sequence[Share], now: int, limit: int) -> tuple[int, int]:
        """See `cauce.store.Store.fire`. Nothing else may be written meanwhile."""
        fired, following = 0, list[int]()
        for share in shares:
            many, due = await self._fire(share, now, limit - fired)
            fired += many
            following += [due] if due else []
        return fired, min(following, default=0)

    async def _fire(self, share: Share, now: int, limit: int) -> tuple[int, int]:
        seconds, fired = await self._known(share), 0
        while seconds and (second := min(seconds)) * _SECOND <= now:
            page = await self._of(share, second)
            if not page:
                seconds.discard(second)
                continue
            many = min(_AT_ONCE, limit - fired)
            ready = [each for each, _ in zip(page, range(many), strict=False) if each[0].due <= now]
            if not ready:
                return fired, page[0][0].due
            if not await self._let_go(share, ready):
                if not await self._fences.holds(share):
                    return fired, 0
                continue
            for _ in ready:
                page.popleft()
            fired += len(ready)
        return fired, min(seconds, default=0) * _SECOND

    async def _known(self, share: Share) -> set[int]:
        """The seconds in which something of a share is due, or was until it was cancelled."""
        seconds = self._seconds.setdefault(share.name, set())
        if self._looked.get(share.name) != share.fence:
            self._page.pop(share.name, None)
            seconds.update(int(each.tokens[2]) for each in await self._bucket.read(f"due.{token(share.name)}.>"))
            self._looked[share.name] = share.fence
        return seconds

    async def _of(self, share: Share, second: int) -> deque[Held]:
        """What is due in a second, in order; read once, as long as nothing is set in it."""
        read, page = self._page.get(share.name, (-1, deque[Held]()))
        if read != second or not page:
            noted, found = self._noted, await self._bucket.read(f"due.{token(share.name)}.{second}.*")
            # One that is written again meanwhile is found twice.
            latest = {each.tokens: each for each in found}
            page = deque(sorted(((_decode(each.payload), each) for each in latest.values()), key=_order))
            # What is being set meanwhile is not in it.
            if page and noted == self._noted:
                self._page[share.name] = second, page
        return page

    async def _let_go(self, share: Share, ready: Sequence[Held]) -> bool:
        """Write all as said, and take the timers away; False if nothing was written.

        Then one was cancelled meanwhile, and is left out the next time; or the share has another holder.
        """
        await self._fences.settle()
        fence, puts = (claim_of(share.name), self._fences.of(share)), list[Put]()
        for n, (timer, message) in enumerate(ready):
            name = f"outbox.{share.slot or 0}.{token(timer.handler)}.{self._fresh()}"
            # The server checks a fence once in a batch.
            puts.append(Put(name, timer.said, fence=None if n else fence))
            puts.append(Put(f"later.{token(timer.id)}", gone=True, expected=message.sequence - 1))
            puts.append(Put(".".join(message.tokens), gone=True))
        try:
            await self._bucket.write(puts)
        except Stale:
            self._page.pop(share.name, None)
            await self._weed(ready)
            return False
        except Unsure:
            # If it was written, they are gone from where they are read again.
            self._page.pop(share.name, None)
            self._fences.doubt([share])
            raise
        return True

    async def _weed(self, held: Sequence[Held]) -> None:
        """Take away those that do not stand any more."""
        stand = await asyncio.gather(*(self._bucket.one(f"later.{token(timer.id)}") for timer, _ in held))
        await self._bucket.delete(
            [
                message.sequence
                for (_, message), each in zip(held, stand, strict=True)
                if each is None or each.sequence != message.sequence - 1
            ]
        )


def _order(held: Held) -> tuple[int, int]:
    return held[0].due, held[1].sequence
