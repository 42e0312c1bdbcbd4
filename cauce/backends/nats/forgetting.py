"""What was removed from a log on purpose, counted, so that what anybody else removes is a loss that is noticed."""

from __future__ import annotations

import msgspec

from cauce.backends.nats.api import CHANGED, ApiError, ask, away, told
from cauce.backends.nats.call import Lost
from cauce.backends.nats.stream import State, Stream
from cauce.errors import Busy, Damaged, NotPermitted

__all__ = ["Forgetting"]

_LONG = 60.0
"""Seconds for which somebody may be at it; after that he is taken for dead."""


class _Note(msgspec.Struct, frozen=True):
    """How many messages were removed; `busy` while one is at it, and for good if it died over it, until the next."""

    count: int = 0
    busy: str = ""


class _Ack(msgspec.Struct, frozen=True):
    seq: int


class _Purged(msgspec.Struct, frozen=True):
    purged: int


class Forgetting:
    """The removals of one log; their count lies beside its leases."""

    def __init__(self, stream: Stream, leases: Stream) -> None:
        self._stream, self._leases, self._link = stream, leases, stream.link
        self._subject = self._link.subject("leases", stream.log, "$forgotten")
        self._count = 0
        self._seen = ("", 0.0)

    async def check(self, state: State) -> None:
        """Raises `Damaged` if more is missing than was removed on purpose."""
        missing = _missing(state)
        if missing <= self._count:
            return
        note, _ = await self._note()
        self._count = max(self._count, note.count)
        if not note.busy and missing > self._count:
            raise Damaged(
                f"stream {self._stream.name} on {self._link} has lost {missing - self._count:,} entries that were not read: "
                "somebody removed them, or a limit did; restore them from a backup"
            )

    async def has_forgotten(self) -> bool:
        """Whether anything was removed on purpose, or just is."""
        note, _ = await self._note()
        return bool(note.count or note.busy)

    async def forget(self, pattern: str, upto: int) -> int:
        """Remove what lies on a pattern at or below a position; gives how much that was.

        Raises `Busy` while another does so, and `Damaged` if something is missing already: after this it would be
        counted as removed on purpose, as it is where whoever was at it died.
        """
        note, place = await self._note()
        self._check_alone(note)
        state = await self._stream.state()
        if not note.busy:
            await self.check(state)
        before = _missing(state)
        count = max(note.count, before) if note.busy else note.count
        place = await self._write(_Note(count, self._link.clock.id()), place)
        try:
            question = {"filter": pattern, "seq": upto + 1}
            await ask(self._link, f"STREAM.PURGE.{self._stream.name}", question, _Purged)
        except (ApiError, NotPermitted) as error:
            await self._write(_Note(count), place)
            raise self._stream.refusal(error) if isinstance(error, ApiError) else error from None
        # The answer does not count what an earlier one did that was lost.
        after = _missing(await self._stream.state())
        await self._write(_Note(max(count, after)), place)
        self._count = max(self._count, after)
        return after - before

    def _check_alone(self, note: _Note) -> None:
        """Nobody trusts a clock of others: whose note does not change for long is not at it any more."""
        now = self._link.clock.monotonic()
        if self._seen[0] != note.busy:
            self._seen = note.busy, now
        if note.busy and now - self._seen[1] < _LONG:
            raise Busy(f"another removes entries of {self._stream.name} now: try again later")

    async def _note(self) -> tuple[_Note, int]:
        stored = await self._leases.last_of(self._subject)
        return (_Note(), 0) if stored is None else (msgspec.json.decode(stored.data, type=_Note), stored.seq)

    async def _write(self, note: _Note, expected: int) -> int:
        headers = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        try:
            return told(await self._link.request(self._subject, msgspec.json.encode(note), headers), _Ack).seq
        except ApiError as error:
            if error.code in CHANGED:
                raise Busy(f"another removes entries of {self._stream.name} now: try again later") from None
            raise self._stream.refusal(error) from None
        except (Lost, TimeoutError):
            raise away(self._link) from None


def _missing(state: State) -> int:
    return state.last_seq - state.messages
