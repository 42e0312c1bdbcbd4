"""Under which fence a share is written now. It rises where a write got no answer: what comes late is refused then."""

from __future__ import annotations

from collections.abc import Iterable

from cauce.backends.nats.bucket import Bucket, Put, Stale
from cauce.backends.nats.names import token
from cauce.store import Share

__all__ = ["Fences", "claim_of"]


class Fences:
    """The fences of one handle of a store; each is the sequence of the claim of its share.

    A write that was under way when its connection broke may reach the server after a later one, and would be right
    under the same fence. So the claim is written again, as it stands, before anything else is.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._now: dict[Share, int] = {}
        self._bodies: dict[Share, bytes] = {}
        self._doubtful: set[Share] = set()

    def of(self, share: Share) -> int:
        return self._now.get(share, share.fence)

    def doubt(self, shares: Iterable[Share]) -> None:
        """Nobody knows whether something was written under the fences of these, or will be."""
        self._doubtful.update(shares)

    async def settle(self) -> None:
        """Let the fences rise that are in doubt. Raises `Unreachable`."""
        for share in list(self._doubtful):
            while await self.holds(share):
                put = Put(claim_of(share.name), self._bodies[share], expected=self.of(share))
                try:
                    self._now[share] = await self._bucket.write([put])
                except Stale:
                    continue
                break
            self._doubtful.discard(share)

    async def holds(self, share: Share) -> bool:
        """Whether the share still has this holder; a rise of its fence that got no answer is found out."""
        stands = await self._bucket.one(claim_of(share.name))
        if stands is None or (stands.sequence != self.of(share) and stands.payload != self._bodies.get(share)):
            return False
        self._now[share], self._bodies[share] = stands.sequence, stands.payload
        return True

    def forget(self, share: Share) -> None:
        """It was let go of."""
        self._now.pop(share, None)
        self._bodies.pop(share, None)
        self._doubtful.discard(share)


def claim_of(name: str) -> str:
    return f"claim.{token(name)}"
