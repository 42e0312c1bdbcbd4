"""A service after its log was put back: what it keeps of the log that was, and how it goes on with the one that is.

What of its places, waiting messages and builds is of another log, or lies beyond the head of this one, stops it loudly.
A reset lets it go on. A place stays where it was as far as the log reaches, so that nothing is handled a second time:
what was handled of a lost end has had its effects. Or all places go to the first entry, and all is handled again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec

from cauce.clock import Clock
from cauce.errors import Busy
from cauce.identity import identity, is_dead
from cauce.lease import BEAT, TTL
from cauce.log import Filter, Log
from cauce.shares import NAMES
from cauce.shelf import Builds, Shelf, Unusable
from cauce.store import SAID, Inventory, Place, Share, Store, Unit, Waiting
from cauce.verify import LOGS

__all__ = ["Dropped", "Logs", "Move", "Plan", "planned", "reset"]

Logs = Mapping[str, Log]
"""The logs of a bus by their names: facts, commands and records."""


class Move(msgspec.Struct, frozen=True):
    """A place that is of another log, or beyond the head, and where it goes."""

    place: Place
    log: str
    to: int


class Dropped(msgspec.Struct, frozen=True):
    """A message that waits in vain: it is not in the log any more, or will be read again."""

    consumer: str
    position: int
    stream: str
    slot: int


class Plan(msgspec.Struct, frozen=True):
    """What a reset does. `waiting`, `outbox` and `timers` count what it leaves as it is."""

    service: str
    moves: list[Move]
    dropped: list[Dropped]
    builds: list[str]
    waiting: int
    outbox: int
    timers: int

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.moves or self.dropped or self.builds)


async def planned(service: str, logs: Logs, store: Store, shelf: Shelf, *, from_first: bool = False) -> Plan:
    """What a reset of a service would do. Nothing is changed."""
    kept, heads = await store.inventory(), {name: await log.head() for name, log in logs.items()}
    moves = [move for place in kept.places if (move := _move(place, logs, heads, from_first)) is not None]
    lost = [(consumer, each) for consumer, each in kept.waiting if not await _stands(consumer, each, kept, logs)]
    # What was said waits for its log, not from it: as the rest of the outbox, it is left as it is.
    dropped = [each for each in kept.waiting if each[0] != SAID] if from_first else lost
    names = await shelf.names()
    stray = [name for name in names if not await _are_sound(shelf.builds(name, name), logs, heads)]
    return Plan(
        service, moves, [Dropped(consumer, each.position, each.stream, each.slot) for consumer, each in dropped],
        # Where the log went back, a build that seems to fit may hold what was written anew since.
        names if moves or dropped or stray else [], len(kept.waiting) - len(dropped), kept.outbox, kept.timers,
    )  # fmt: skip


async def reset(
    service: str, logs: Logs, store: Store, shelf: Shelf, clock: Clock, *, from_first: bool = False
) -> Plan:
    """Let a service go on with the log that is. Gives what was done.

    What was interrupted is done by the next one. Raises `Busy` while an instance of the service lives, or another
    feeds or builds what it keeps; it takes up to ten seconds to find that out.
    """
    async with _alone(service, store, clock) as shares:
        plan = await planned(service, logs, store, shelf, from_first=from_first)
        await _clear(plan.builds, service, shelf)
        # Who was interrupted before the places moved is stopped again, and told what to do. But what waits and will be
        # read again goes only when that is sure.
        if from_first:
            await _moved(plan.moves, logs, store, shares)
        for each in plan.dropped:
            unit = Unit(shares[each.slot])
            unit.unparked = each.consumer, each.position
            await store.commit(unit)
        if not from_first:
            await _moved(plan.moves, logs, store, shares)
    return plan


def _move(place: Place, logs: Logs, heads: Mapping[str, int], from_first: bool) -> Move | None:
    name = _kind(place.log)
    here = place.log == logs[name].id
    to = 0 if from_first else min(place.position, heads[name])
    return None if here and to == place.position else Move(place, name, to)


def _kind(log: str) -> str:
    """Which of the three a log is, by its id."""
    return next((part for part in log.split(":") if part in LOGS), "facts")


async def _stands(consumer: str, waiting: Waiting, kept: Inventory, logs: Logs) -> bool:
    """Whether what waits is in its log still, or was never to be."""
    if consumer == SAID:
        return True
    name = next((_kind(each.log) for each in kept.places if each.consumer == consumer), "facts")
    page = await logs[name].read(Filter(waiting.stream), after=waiting.position - 1, limit=1, bodies=False)
    if not page.entries:
        return False
    entry = page.entries[0]
    # A record that has changed since is met further on.
    return name == "records" or (entry.position == waiting.position and _id(waiting) in ("", entry.id))


class _Identified(msgspec.Struct):
    id: str = ""


def _id(waiting: Waiting) -> str:
    """The id of a message, where it is a dead letter, and so kept whole."""
    try:
        return msgspec.json.decode(waiting.raw or b"{}", type=_Identified).id
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""


async def _are_sound(builds: Builds, logs: Logs, heads: Mapping[str, int]) -> bool:
    ids = {log.id: heads[name] for name, log in logs.items()}
    for number in await builds.numbers():
        try:
            build = await builds.open(number)
        except Unusable:
            return False
        sound = build.position <= ids.get(build.log, -1)
        await build.close()
        if not sound:
            return False
    return True


async def _moved(moves: Sequence[Move], logs: Logs, store: Store, shares: Mapping[int, Share]) -> None:
    for move in moves:
        place = move.place
        store.move(shares[place.slot], place.consumer, place.domain, place.slot, logs[move.log].id, move.to)
    await store.flush()


async def _clear(names: Sequence[str], service: str, shelf: Shelf) -> None:
    if not names:
        return
    if not await shelf.lead.take():
        raise Busy(f"the views and replicas of {service} are fed by another process: stop it first")
    try:
        for name in names:
            builds = shelf.builds(name, f"{name} of {service}")
            if not await builds.building.take():
                raise Busy(
                    f"{name} of {service} is being built by another process: wait until that is done, or stop it"
                )
            try:
                await builds.clear()
            finally:
                await builds.building.release()
    finally:
        await shelf.lead.release()


# ----------------------------------------------------------------------------------------------------------- alone


@asynccontextmanager
async def _alone(service: str, store: Store, clock: Clock) -> AsyncIterator[dict[int, Share]]:
    """As the only instance, with all that can be held. Raises `Busy` where another one lives."""
    owner = identity(service, clock)
    shares = list[Share]()
    try:
        await _outlive(service, owner, store, clock)
        shares = await store.take(owner, NAMES)
        if len(shares) < len(NAMES):
            raise Busy(f"service {service!r} was started meanwhile: stop it first")
        yield {share.slot: share for share in shares if share.slot is not None}
    finally:
        await store.release(shares, owner=owner)


async def _outlive(service: str, owner: str, store: Store, clock: Clock) -> None:
    """Strike off whoever is dead, be it that no beat of him comes for as long as any rival would watch."""
    standing = await store.tick(owner, (), join=True)
    seen, until = dict(standing.instances), clock.monotonic() + TTL
    while True:
        others = {other: beat for other, beat in standing.instances.items() if other != owner}
        for other, beat in others.items():
            if is_dead(other) is False or seen.get(other, beat) != beat:
                raise Busy(f"service {service!r} runs ({other}): stop it first")
        over = clock.monotonic() >= until
        dead = [(other, beat) for other, beat in others.items() if over or is_dead(other)]
        if not others:
            return
        if not dead:
            await clock.sleep(BEAT)
        seen = seen | others
        standing = await store.tick(owner, dead)
