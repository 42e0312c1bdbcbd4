"""Who holds a name, without trusting clocks: the dead are proved dead, the others are watched."""

from __future__ import annotations

import asyncio
import logging

from cauce.clock import Clock
from cauce.errors import Fenced, Held, Unavailable
from cauce.identity import identity, is_dead
from cauce.log import Claim, Log

__all__ = ["BEAT", "TTL", "Leases", "identity", "is_dead", "take"]

_log = logging.getLogger("cauce")

TTL = 10.0
"""Seconds for which a rival watches an unchanged beat before it takes over."""

BEAT = TTL / 5


async def take(log: Log, name: str, owner: str, clock: Clock, superseded: frozenset[str] = frozenset()) -> Claim:
    """Claim a name, over a holder that is dead: at once if that can be proved, else after `TTL` seconds without a beat.

    Parameters:
        superseded: owners that have lost what the name stands for already, dead or not.

    Raises `Held` if the holder lives.
    """
    try:
        return await log.claim(name, owner)
    except Held as held:
        stands = held.claim
    assert isinstance(stands, Claim)
    # What this very owner holds it has lost sight of, when it could not let go.
    dead = True if stands.owner in superseded or stands.owner == owner else is_dead(stands.owner)
    if dead is False:
        raise Held(_held(stands), stands)
    if dead is None:
        await clock.sleep(TTL)
    try:
        return await log.claim(name, owner, over=stands if dead else await _unchanged(log, stands, owner))
    except Held as held:
        raise Held(_held(stands), held.claim) from None


async def _unchanged(log: Log, before: Claim, owner: str) -> Claim | None:
    """The claim, if it has not beaten since."""
    try:
        free = await log.claim(before.name, owner)
    except Held as held:
        return before if held.claim == before else None
    await log.release(free)
    return None


def _held(claim: Claim) -> str:
    service, _, where = claim.owner.partition(" ")
    pid = where.split(":")[2] if where.count(":") == 4 else "?"
    return f"{claim.name} is held by {service} (process {pid}): stop it first"


class Leases:
    """The claims of this process, and the beat that keeps them."""

    def __init__(self, log: Log, owner: str, clock: Clock) -> None:
        self._log, self.owner, self._clock = log, owner, clock
        self.claims: dict[str, Claim] = {}
        self._leaving: set[str] = set()

    async def take(self, *names: str, superseded: frozenset[str] = frozenset()) -> None:
        """Take all of the names, or raise `Held` for one of them and keep none of these."""
        results = await asyncio.gather(
            *(take(self._log, name, self.owner, self._clock, superseded) for name in names), return_exceptions=True
        )
        taken = [each for each in results if isinstance(each, Claim)]
        self.claims.update((claim.name, claim) for claim in taken)
        failed = next((each for each in results if isinstance(each, BaseException)), None)
        if failed is not None:
            await self.release(*(claim.name for claim in taken))
            raise failed

    async def beat(self) -> None:
        """Beat for ever. Raises `Fenced` when a claim was taken over. A beat that cannot be written now is missed."""
        while True:
            await self._clock.sleep(BEAT)
            await asyncio.gather(*(self._beat(claim) for claim in list(self.claims.values())))

    async def _beat(self, claim: Claim) -> None:
        try:
            later = await self._log.beat(claim)
        except Unavailable as error:
            _log.warning("%s was not beaten: %s", claim.name, error)
            return
        except Fenced:
            held = self.claims.get(claim.name)
            if claim.name in self._leaving or held is None or held.fence != claim.fence:
                return  # It was let go of here, before this beat had its turn.
            raise
        if claim.name in self.claims:
            self.claims[claim.name] = later

    async def forget(self, owner: str) -> None:
        """Let go of all claims that nobody has taken over yet, and take others under another name from now on."""
        await self.release(*self.claims)
        self.owner = owner

    async def release(self, *names: str) -> None:
        """Let go of these names."""
        gone = [self.claims[name] for name in names if name in self.claims]
        self._leaving.update(claim.name for claim in gone)
        try:
            await asyncio.gather(*(self._log.release(claim) for claim in gone))
        finally:
            self._leaving.difference_update(claim.name for claim in gone)
        for claim in gone:
            self.claims.pop(claim.name, None)
