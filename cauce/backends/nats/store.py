"""The store of a service in a bucket of the bus: see `cauce.store.Store` for what each method promises.

It is for services that keep no tables, and run on several machines. One message stands on each subject: on `meta` whose
the bucket is, on `instance.<owner>` who lives, on `claim.<name>` who holds what, then
`place.<consumer>.<domain>.<slot>`, `waiting.<consumer>.<position>`, `outbox.<slot>.<consumer>.<id>`, `timer.<name>`;
and for each message that waits for its time `later.<id>` and `due.<share>.<second>.<id>`.
The fence of a share is the sequence of its claim, the beat of an instance is that of its message, and so is the number
of what was said.

If the connection breaks between a write and its answer, and what was said has been relayed before that is looked up, it
is said twice: its log knows its id and keeps it once. So may a timer be set again
that another instance has cancelled in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from cauce.backends.nats.bucket import Bucket, Message, Put, Stale, Unsure
from cauce.backends.nats.fences import claim_of
from cauce.backends.nats.link import Link
from cauce.backends.nats.names import text, token
from cauce.backends.nats.units import Place as Stands
from cauce.backends.nats.units import Units
from cauce.errors import Refused, Unavailable
from cauce.store import BadStatement, Inventory, Place, Share, Standing, Unit, Waiting, check_places, write_places

__all__ = ["NatsStore", "bucket_of", "place_of", "unpacked"]

_log = logging.getLogger("cauce")

_PAUSE = 0.05
"""Seconds between two writings of places alone: each costs the server a flush or two."""

_TRIES = 10


class _Meta(msgspec.Struct, frozen=True):
    id: str
    service: str


class _Claim(msgspec.Struct, frozen=True):
    """Who holds a name; `turn` tells one taking from another."""

    owner: str
    turn: str


class NatsStore:
    """One bucket of one service. Made by `open`."""

    def __init__(self, link: Link, service: str) -> None:
        self.service, self._clock = service, link.clock
        self._bucket = bucket_of(link, service)
        self.id, self.place, self.is_fresh = "", f"bucket {self._bucket.name}", True
        self._units: Units
        self._moved = asyncio.Event()
        self._beats: dict[str, int] = {}
        self._others = -1

    @classmethod
    async def open(cls, link: Link, service: str) -> NatsStore:
        """Open, and make if need be, the bucket of a service."""
        store = cls(link, service)
        await store._bucket.open()
        store.id = await store._name()
        store.is_fresh = not await store._bucket.read("claim.*", limit=1)
        store._units = Units(store._bucket)
        return store

    async def _name(self) -> str:
        for _ in range(_TRIES):
            found = await self._bucket.one("meta")
            if found is not None:
                return msgspec.json.decode(found.payload, type=_Meta).id
            meta = _Meta(self._clock.id(), self.service)
            try:
                await self._bucket.write([Put("meta", msgspec.json.encode(meta), expected=0)])
            except (Stale, Unsure):
                continue
            return meta.id
        raise Unavailable(f"{self.place} could not be given an id: try again")

    # ------------------------------------------------------------------------------------------------- who holds what

    async def tick(self, owner: str, dead: Sequence[tuple[str, int]], *, join: bool = False) -> Standing:
        """A sign of life, and what stands. Those whose beat was seen unchanged for long enough are struck off."""
        return await self._units.alone(lambda: self._tick(owner, dead, join))

    async def _tick(self, owner: str, dead: Sequence[tuple[str, int]], join: bool) -> Standing:
        for other, beat in dead:
            await self._try([Put(_instance(other), gone=True, expected=beat)])
        alive = await self._beat(owner, join)
        instances = await self._instances()
        if alive:
            # It may be written again while the others are read.
            instances[owner] = self._beats[owner]
        holders = {name: claim.owner for name, (claim, _) in (await self._claims()).items() if claim.owner}
        touched, self._others = self._others != self._bucket.others, self._bucket.others
        return Standing(alive, instances, holders, touched)

    async def _beat(self, owner: str, join: bool) -> bool:
        """Whether it is one of the instances still, or again."""
        if join:
            self._beats[owner] = await self._bucket.write([Put(_instance(owner), owner.encode())])
            return True
        for _ in range(_TRIES):
            if known := self._beats.get(owner, 0):
                try:
                    self._beats[owner] = await self._bucket.write(
                        [Put(_instance(owner), owner.encode(), expected=known)]
                    )
                    return True
                except Unsure:
                    continue
                except Stale:
                    pass
            # It never joined or was struck off; or an answer got lost, or another handle beats under this name.
            stands = await self._bucket.one(_instance(owner))
            if stands is None:
                return False
            self._beats[owner] = stands.sequence
        raise Unavailable(f"{owner} could not beat in {self.place}: it is tried again")

    async def _instances(self) -> dict[str, int]:
        return {text(each.tokens[1]): each.sequence for each in await self._bucket.read("instance.*")}

    async def _claims(self) -> dict[str, tuple[_Claim, int]]:
        return {
            text(each.tokens[1]): (msgspec.json.decode(each.payload, type=_Claim), each.sequence)
            for each in await self._bucket.read("claim.*")
        }

    async def take(self, owner: str, names: Sequence[str]) -> list[Share]:
        """Of these names those that are free, or whose holder was struck off; the fence of each rises."""
        return await self._units.alone(lambda: self._take(owner, names))

    async def _take(self, owner: str, names: Sequence[str]) -> list[Share]:
        turn = self._clock.id()
        body = msgspec.json.encode(_Claim(owner, turn))
        before: dict[str, str] = {}
        for _ in range(_TRIES):
            claims, instances = await self._claims(), await self._instances()
            if mine := [(name, seq) for name, (claim, seq) in claims.items() if claim.turn == turn]:
                # Taken, and the answer got lost.
                return [Share(name, fence, not before[name], before[name]) for name, fence in mine]
            if owner not in instances:
                return []
            found = {name: claims.get(name, (_Claim("", ""), 0)) for name in dict.fromkeys(names)}
            free = {name: stands for name, stands in found.items() if stands[0].owner not in instances}
            if not free:
                return []
            before = {name: claim.owner for name, (claim, _) in free.items()}
            # Two things must stand when it is written: this one lives, and each holder before it is dead.
            puts = [Put(_instance(owner), owner.encode(), expected=instances[owner])]
            gone = {each: await self._bucket.last(_instance(each)) for each in set(before.values()) - {""}}
            if gone.keys() & (await self._instances()).keys():
                continue
            puts += [Put(_instance(each), gone=True, expected=last) for each, last in gone.items()]
            puts += [Put(claim_of(name), body, expected=fence) for name, (_, fence) in free.items()]
            if (last := await self._try(puts)) is not None:
                self._beats[owner] = last - len(puts) + 1
                first = last - len(free) + 1
                return [Share(name, first + n, not before[name], before[name]) for n, name in enumerate(free)]
        return []

    async def release(self, shares: Sequence[Share], *, owner: str = "") -> None:
        """Let go of these; with `owner` it leaves the list of instances, too."""
        await self._units.alone(lambda: self._release(shares, owner))

    async def _release(self, shares: Sequence[Share], owner: str) -> None:
        free, fences = msgspec.json.encode(_Claim("", "")), self._units.fences
        await fences.settle()
        puts = [Put(claim_of(share.name), free, expected=fences.of(share)) for share in shares]
        leave = [Put(_instance(owner), gone=True)] if owner else []
        if (puts or leave) and await self._try([*puts, *leave]) is None:
            # One has another holder by now.
            for put in (*puts, *leave):
                await self._try([put])
        for share in shares:
            fences.forget(share)

    async def _try(self, puts: Sequence[Put]) -> int | None:
        """The sequence of the last one; None if they were not written, or nobody knows."""
        try:
            return await self._bucket.write(puts)
        except (Stale, Unsure):
            return None

    # ------------------------------------------------------------------------------------------------- places

    async def places(self, consumer: str, log: str, head: int) -> dict[tuple[str, int], int]:
        """Where a consumer stands in a log, by domain and slot. Raises `Damaged` if that was another, or longer."""
        rows = []
        for each in await self._bucket.read(f"place.{token(consumer)}.>"):
            place = msgspec.json.decode(each.payload, type=Stands)
            rows.append((each.tokens[2], int(each.tokens[3]), place.log, place.position))
        return check_places(rows, consumer, log, head, self.service)

    def move(self, share: Share | None, consumer: str, domain: str, slot: int, log: str, position: int) -> None:
        """Note a place. It is written with the next unit, or soon by `run`."""
        self._units.moves[consumer, domain, slot] = share, log, position
        self._moved.set()

    async def commit(self, unit: Unit) -> None:
        """Write a unit with its place. Raises `BadStatement`, `Fenced`, and what a full or absent server says."""
        if unit.statements:
            self._no_sql(unit.statements[0][0])
        await self._units.write(unit)

    async def run(self) -> None:
        """Write places that no unit carries, for ever."""
        await write_places(self._moved, self.flush, self._clock, pause=_PAUSE)

    async def flush(self) -> None:
        """Write the places that wait."""
        while self._units.moves:
            await self._units.write(None)

    # ------------------------------------------------------------------------------------------------- waiting

    async def waiting(self, consumer: str) -> list[Waiting]:
        """The messages that wait, in order."""
        found = {
            int(each.tokens[2]): unpacked(each) for each in await self._bucket.read(f"waiting.{token(consumer)}.*")
        }
        return [found[position] for position in sorted(found)]

    async def outbox(self, after: int, limit: int) -> list[tuple[int, str, int, bytes]]:
        """What was said and is not known to be in its log yet: number, consumer, slot, message."""
        return [
            (each.sequence, text(each.tokens[2]), int(each.tokens[1]), each.payload)
            for each in await self._bucket.read("outbox.>", after, limit)
        ]

    async def relayed(self, numbers: Sequence[int]) -> None:
        """These stand in their log. A number that comes back because this was not written is relayed once more."""
        await self._bucket.delete(numbers)

    async def timer(self, name: str) -> int:
        """When something is due, in microseconds since 1970; 0 if that was never said."""
        found = await self._bucket.one(f"timer.{token(name)}")
        return int(found.payload) if found is not None else 0

    async def due(self, id: str) -> int:
        """When the message of a timer is due, in microseconds since 1970; 0 if no such timer waits."""
        return await self._units.timers.due(id)

    async def fire(self, shares: Sequence[Share], now: int, limit: int) -> tuple[int, int]:
        """Let go what is due by now, and say when to look again."""
        return await self._units.timers.fire(shares, now, limit)

    async def inventory(self) -> Inventory:
        """All that hangs on logs, whoever it is for."""
        places = [place_of(each) for each in await self._bucket.read("place.>")]
        waiting = [(text(each.tokens[1]), unpacked(each)) for each in await self._bucket.read("waiting.>")]
        said, timers = len(await self._bucket.read("outbox.>")), len(await self._bucket.read("timer.*"))
        timers += len(await self._bucket.read("later.*"))
        return Inventory(
            sorted(places, key=lambda each: (each.consumer, each.domain, each.slot)),
            sorted(waiting, key=lambda each: (each[0], each[1].position)), said, timers,
        )  # fmt: skip

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Raises `BadStatement`: there is no SQL here."""
        self._no_sql(sql)

    def _no_sql(self, sql: str) -> NoReturn:
        raise BadStatement(
            f"{sql!r} cannot be run: the store of {self.service} is a bucket of the bus, which has no SQL: give the service "
            "a schema, and a store with --store sqlite:///folder (one machine) or --store postgresql://… (several)"
        )

    async def close(self) -> None:
        """Write what waits, then let go."""
        try:
            await self.flush()
        except (Unavailable, Refused) as error:
            _log.warning("the last places of %s were not written: %s", self.service, error)
        await self._units.close()


def bucket_of(link: Link, service: str) -> Bucket:
    """The bucket that is the store of a service."""
    return Bucket(link, f"store_{service}", "store", service)


def place_of(message: Message) -> Place:
    """A place, as it was stored."""
    stands, (_, consumer, domain, slot) = msgspec.json.decode(message.payload, type=Stands), message.tokens
    return Place(text(consumer), domain, int(slot), stands.log, stands.position)


def unpacked(message: Message) -> Waiting:
    """A message that waits, as it was stored."""
    line, _, raw = message.payload.partition(b"\n")
    return msgspec.structs.replace(msgspec.json.decode(line, type=Waiting), raw=raw)


def _instance(owner: str) -> str:
    return f"instance.{token(owner)}"
