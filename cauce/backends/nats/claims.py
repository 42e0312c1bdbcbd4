"""Who holds what: a message of the log for each change of holder, whose position is the fence, and leases that beat.

Signs of life lie in a stream of their own: the message that fences may change with the holder only.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec

from cauce.backends.nats.api import CHANGED, LATER, ApiError, refusal, told
from cauce.backends.nats.call import Lost
from cauce.backends.nats.heads import Heads
from cauce.backends.nats.names import token
from cauce.backends.nats.stream import Stored, Stream
from cauce.errors import Fenced, Held, Unreachable
from cauce.log import Claim, check_claim

__all__ = ["Claims", "Holder", "Lease"]

_TRIES = 8


class Holder(msgspec.Struct, frozen=True):
    """The body of a claim. `id` tells one try from another, `owner` is empty where the name was let go."""

    id: str
    name: str
    owner: str


class Lease(msgspec.Struct, frozen=True):
    """The body of a beat: under which fence it was."""

    fence: int


class _Ack(msgspec.Struct, frozen=True):
    seq: int


class Claims:
    """The claims of one log. Called by its writer, one at a time."""

    def __init__(self, stream: Stream, leases: Stream, heads: Heads) -> None:
        self._stream, self._leases, self._heads, self._link = stream, leases, heads, stream.link

    async def claim(self, name: str, owner: str, over: Claim | None) -> Claim:
        for _ in range(_TRIES):
            stands = await self._stands(name)
            if stands.owner and (over is None or (over.name, over.fence) != (name, stands.fence)):
                raise Held(f"{name} is held by {stands.owner}: wait, or stop it", stands)
            fence = await self._change(name, owner, stands.fence)
            if fence:
                return Claim(name, owner, fence)
        raise Unreachable(f"{name} changes hands faster than {self._link} answers: nothing was claimed; try again")

    async def beat(self, claim: Claim) -> Claim:
        check_claim(claim)
        stands = await self._heads.last(self._heads.claim(claim.name))
        if stands != claim.fence:
            raise Fenced(
                f"{claim.name} has another holder by now (fence {stands}, ours {claim.fence}): stop, claim again, read again"
            )
        beat = await self._publish(self._leases, self._lease(claim.name), Lease(claim.fence), None)
        if not beat:
            raise Unreachable(f"{self._link} did not take the beat of {claim.name}: it is tried again")
        return Claim(claim.name, claim.owner, claim.fence, beat)

    async def release(self, claim: Claim) -> None:
        with suppress(Fenced):
            check_claim(claim)
            if await self._heads.last(self._heads.claim(claim.name)) == claim.fence:
                await self._change(claim.name, "", claim.fence)

    async def _stands(self, name: str) -> Claim:
        stored = await self._stream.last_of(self._heads.claim(name))
        if stored is None:
            return Claim(name, "", 0)
        holder = msgspec.json.decode(stored.data, type=Holder)
        lease = await self._leases.last_of(self._lease(name)) if holder.owner else None
        beats = lease is not None and msgspec.json.decode(lease.data, type=Lease).fence == stored.seq
        return Claim(name, holder.owner, stored.seq, lease.seq if beats and lease is not None else 0)

    async def _change(self, name: str, owner: str, expected: int) -> int:
        """The new fence, 0 if another was faster."""
        subject, holder = self._heads.claim(name), Holder(self._link.clock.id(), name, owner)
        fence = await self._publish(self._stream, subject, holder, expected)
        if not fence:
            # It may have been our own try, whose answer was lost.
            stored = await self._stream.last_of(subject)
            fence = stored.seq if stored is not None and _is(stored, holder) else 0
        if fence:
            self._note(subject, fence)
        return fence

    def _note(self, subject: str, fence: int) -> None:
        self._heads.fences[subject] = fence
        self._heads.wrote_up_to(fence, 1)
        if not subject.startswith(self._link.subject(self._stream.log, "$claim")):
            self._heads.enter(f"{subject.removesuffix('$claim')}>", fence)

    async def _publish(self, stream: Stream, subject: str, body: object, expected: int | None) -> int:
        """The position of what was written, 0 where something else is the last by now, or may be."""
        headers = {"content-type": "application/json"}
        if expected is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected)
        try:
            reply = await self._link.request(subject, msgspec.json.encode(body), headers)
            return told(reply, _Ack).seq
        except ApiError as error:
            if error.code in CHANGED or error.code in LATER:
                return 0
            raise refusal(error, self._link, f"claim of {subject}") from None
        except (Lost, TimeoutError):
            return 0

    def _lease(self, name: str) -> str:
        return self._link.subject("leases", self._stream.log, token(name))


def _is(stored: Stored, holder: Holder) -> bool:
    return msgspec.json.decode(stored.data, type=Holder) == holder
