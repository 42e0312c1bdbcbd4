"""What the instances of a service share out among themselves: its slots, and the lead of what only one may do.

Nobody trusts a clock. An instance shows a beat in the store; who sees a beat unchanged for `TTL` seconds of its own
time, or can prove the process dead, strikes it off and takes what it held, under a fence that rises. Each takes its
fair share and no more, so a newcomer is given its part by those who have too much.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from cauce.accept import SLOTS
from cauce.clock import Clock
from cauce.errors import Fenced, Unavailable
from cauce.lease import BEAT, TTL, identity, is_dead
from cauce.store import Share, Standing, Store

__all__ = ["LEAD", "LEAVING", "NAMES", "Shares", "slot_name"]

_log = logging.getLogger("cauce")

LEAD = "lead"
"""Held by the one instance that feeds views and replicas, and runs intervals."""

LEAVING = "leaving"
"""Held by the one instance that is about to leave: the others count without it, and look out for what it gives."""

_SOON = 0.1
"""Seconds until the next look while something is on its way from one instance to another."""


def slot_name(slot: int) -> str:
    """What a slot is called among the claims of a store."""
    return f"slot/{slot}"


NAMES = (*(slot_name(slot) for slot in range(SLOTS)), LEAD)
"""All that there is to hold."""


class Shares:
    """What this instance holds.

    Parameters:
        gain: called with what was taken; work on it may begin. What it raises as `Unavailable` is tried again later.
        lose: called with what must be given up; when it returns nothing of it is worked on any more.
        forget: called when others have taken over, with the name under which this instance joins again; when it
            returns nothing of what was held is worked on any more. Without it `run` raises `Fenced` then.
    """

    def __init__(
        self,
        store: Store,
        owner: str,
        clock: Clock,
        gain: Callable[[Sequence[Share]], Awaitable[None]],
        lose: Callable[[Sequence[Share]], Awaitable[None]],
        forget: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._store, self.owner, self._clock = store, owner, clock
        self._gain, self._lose, self._forget = gain, lose, forget
        self.held: dict[str, Share] = {}
        self._gaining: list[Share] = []
        self._giving: list[Share] = []
        self._seen: dict[str, tuple[int, float]] = {}
        self._moving: asyncio.Task[None] | None = None
        self._beaten = float("-inf")
        self._lost: Fenced | None = None
        self._doubt = asyncio.Event()
        self._joined, self._is_settled, self._still, self._ends = False, True, True, False
        self._apart = False
        self._leaving: Share | None = None
        self._news = False
        self.touched: Callable[[], Awaitable[None]] = _nothing

    @property
    def is_fresh(self) -> bool:
        """Whether the last beat is recent enough to begin something new: a rival cannot have taken over yet."""
        return self._clock.monotonic() - self._beaten < TTL * 2 / 3

    async def start(self) -> None:
        """Join, and take what is free, also from those who are proved dead. Raises what stands in the way.

        Where others hold everything it joins when it may `go`: until then nobody should give it anything.
        """
        standing = await self._store.tick(self.owner, ())
        held = all(standing.holders.get(name, "") in standing.instances for name in NAMES)
        if held and not any(is_dead(each) for each in standing.instances):
            self._apart, self._is_settled = True, False
            self._watch(standing, self._clock.monotonic())
            return
        self._still = False
        await self._step()
        await self._finished()
        if self._dead(self._clock.monotonic()):
            await self._step()
            await self._finished()
        self._still = True

    async def _finished(self) -> None:
        """Wait until what was begun is done, and beat meanwhile: to take over may take long."""
        while self._moving is not None:
            done, _ = await asyncio.wait({self._moving}, timeout=BEAT)
            if done:
                await self._moved()
            else:
                await self._beat()

    def go(self) -> None:
        """Share out from now on: until then nothing was taken after the start, and nothing given."""
        self._still = self._apart = False

    async def run(self) -> None:
        """Beat, look, take and give, for ever; who was struck off forgets all and joins again as new."""
        while True:
            await self._next()
            try:
                if self._lost is None:
                    await self._step()
                else:
                    await self._join_again(self._lost)
            except Fenced as error:
                if self._forget is None:
                    raise
                self.fenced(error)
            except Unavailable as error:
                _log.warning("%s: the beat was missed: %s", self.owner.partition(" ")[0], error)

    async def _next(self) -> None:
        """Wait until it is time for the next step, or for joining again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT if self._is_settled else _SOON):
                await self._doubt.wait()

    def fenced(self, error: Fenced) -> None:
        """Somebody else has what this instance believes to hold: begin nothing more, and join again soon."""
        self._beaten = float("-inf")
        if self._lost is None:
            self._lost = error
        self._doubt.set()

    async def _join_again(self, why: Fenced) -> None:
        """Let go of everything at once, and be one of the instances again, under a name that nobody knows yet.

        Under the old name what nobody has taken yet would count as held, and nobody would take it.
        """
        assert self._forget is not None
        service, old = self.owner.partition(" ")[0], self.owner
        self._doubt.clear()
        _log.error(
            "%s: this instance stood still, or was cut off, and others may have taken over: all that it has in hand is "
            "dropped, and it %s: %s", service, "ends" if self._ends else "joins again", why,
        )  # fmt: skip
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)
            self._moving = None
        self.held.clear()
        self._gaining, self._giving, self._seen = [], [], {}
        new = identity(service, self._clock)
        await self._forget(new)
        await self._store.release([], owner=old)
        self.owner, self._joined = new, False
        self._lost, self._is_settled = None, False
        # Who is about to leave would only take part in the count, and others would leave alone what is its fair share.
        self._apart = self._ends
        await self._step()
        if not self._apart:
            _log.warning("%s: this instance has joined again", service)

    def close(self) -> None:
        """Take and give no more: the end is near, and until then the beat keeps what is held."""
        self._still = self._ends = True

    async def rest(self, within: float) -> None:
        """Wait until what is being taken or given is done, so many seconds; what takes longer is given up."""
        moving = self._moving
        if moving is None:
            return
        _, late = await asyncio.wait({moving}, timeout=within)
        if late:
            moving.cancel()
            await asyncio.wait(late)
        if self._moving is moving:
            # What could not be gained is nobody's, and what could not be given is given with the rest.
            with suppress(Unavailable, asyncio.CancelledError):
                await self._moved()

    @property
    def is_alone(self) -> bool:
        """Whether no other instance was seen at the last look, or this one never joined them."""
        return self._apart or not self._seen

    async def hand_over(self, within: float) -> None:
        """Give all that is held to the other instances, once they look out for it.

        Parameters:
            within: seconds to wait until they do; one that lives needs no more than a beat.

        Raises `Fenced` if they have taken over meanwhile.
        """
        self.close()
        await self.rest(within)
        # As any other step, so that it ends at once when this instance is struck off.
        moving = self._moving = asyncio.get_running_loop().create_task(self._hand_over(within))
        await asyncio.wait({moving})
        if self._moving is moving:
            self._moving = None
        if moving.cancelled():
            raise Fenced(f"{self.owner.partition(' ')[0]}: others have taken over what it was about to give")
        moving.result()

    async def _hand_over(self, within: float) -> None:
        until = self._clock.monotonic() + min(within, 2 * BEAT)
        try:
            await self._tell_the_others(until)
        except Unavailable as error:
            _log.warning("%s leaves without saying so: %s", self.owner.partition(" ")[0], error)
        await self._give([*self._giving, *self.held.values()])

    async def _tell_the_others(self, until: float) -> None:
        # One at a time: two that leave would each wait for the other to take what it has.
        while not (taken := await self._store.take(self.owner, [LEAVING])):
            if not await self._is_time_left(until):
                return
        self._leaving = taken[0]
        await self._beat()
        before = dict(self._seen)
        # Whose beat has changed since has looked since.
        while any(self._seen.get(owner) == seen for owner, seen in before.items()) and await self._is_time_left(until):
            await self._beat()

    async def _is_time_left(self, until: float) -> bool:
        if self._clock.monotonic() >= until:
            return False
        await self._clock.sleep(_SOON)
        return True

    async def stop(self) -> None:
        """Leave: all that is still held is let go of in good order.

        What was not yet gained is left as it is: who takes it must know that it was not left in good order.
        """
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)
        shares = [*self.held.values(), *self._giving, *([self._leaving] if self._leaving else [])]
        self.held.clear()
        await self._store.release(shares, owner=self.owner)

    async def _step(self) -> None:
        standing = await self._beat()
        if self._moving is not None and self._moving.done():
            await self._moved()
        if self._still or not self._joined:
            return
        fair, free = self._fair(standing)
        # Known before the next rest: who waits for this one to look must not wait for two beats.
        self._is_settled = (
            not free and len(self._slots) == fair and standing.holders.get(LEAVING, "") not in standing.instances
        )
        if self._moving is None:
            # What is given away may take long to finish, and the beat must not wait for that.
            self._moving = asyncio.get_running_loop().create_task(self._share_out(fair, free))

    async def _beat(self) -> Standing:
        began = self._clock.monotonic()
        apart = self._apart
        standing = await self._store.tick(self.owner, self._dead(began), join=not (self._joined or apart))
        if apart:
            self._watch(standing, began)
            return standing
        if not standing.alive:
            raise Fenced(f"{self.owner.partition(' ')[0]}: no beat of this instance was seen for {TTL:g} s")
        self._joined, self._beaten = True, began
        self._watch(standing, began)
        self._news = self._news or standing.touched
        if self._news:
            # The store tells it once; what fails now is looked at again at the next beat.
            await self.touched()
            self._news = False
        return standing

    async def _moved(self) -> None:
        """Raises what went wrong while slots were taken or given."""
        moving, self._moving = self._moving, None
        if moving is not None:
            await moving

    def _watch(self, standing: Standing, now: float) -> None:
        """Note since when each beat has not changed."""
        self._seen = {
            owner: self._seen[owner] if self._seen.get(owner, (-1, 0.0))[0] == beat else (beat, now)
            for owner, beat in standing.instances.items()
            if owner != self.owner
        }

    def _dead(self, now: float) -> list[tuple[str, int]]:
        return [(owner, beat) for owner, (beat, since) in self._seen.items() if now - since >= TTL or is_dead(owner)]

    @property
    def _slots(self) -> list[Share]:
        return [share for share in self.held.values() if share.slot is not None]

    def _fair(self, standing: Standing) -> tuple[int, list[str]]:
        """How many slots are this instance's part, and all names that nobody has."""
        leaving = standing.holders.get(LEAVING)
        instances = sorted(each for each in standing.instances if each != leaving)
        rank, many = instances.index(self.owner), len(instances)
        free = [name for name in NAMES if standing.holders.get(name, "") not in standing.instances]
        return SLOTS // many + (rank < SLOTS % many), free

    async def _share_out(self, fair: int, free: Sequence[str]) -> None:
        if self._giving:
            await self._give_on()
        if self._gaining:
            await self._gain_on()
        mine = self._slots
        if len(mine) > fair:
            await self._give(mine[fair:])
        wanted = [name for name in free if name != LEAD][: max(0, fair - len(mine))]
        if LEAD in free:
            wanted.append(LEAD)
        if wanted:
            await self._take(wanted)

    async def _take(self, names: Sequence[str]) -> None:
        self._gaining = await self._store.take(self.owner, names)
        if self._gaining:
            await self._gain_on()

    async def _gain_on(self) -> None:
        """Begin to work on what was taken. If that fails it is tried again: whose it was is known here only."""
        await self._gain(self._gaining)
        self.held.update((share.name, share) for share in self._gaining)
        self._gaining = []

    async def _give(self, shares: Sequence[Share]) -> None:
        self._giving = list(shares)
        for share in shares:
            self.held.pop(share.name, None)
        await self._give_on()

    async def _give_on(self) -> None:
        """Finish each and let go of it. What fails is tried again: until then nobody else may have it."""
        results = await asyncio.gather(*(self._give_one(share) for share in self._giving), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _give_one(self, share: Share) -> None:
        await self._lose([share])
        await self._store.release([share])
        self._giving.remove(share)


async def _nothing() -> None:
    return
