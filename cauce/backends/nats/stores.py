"""Where the services of a bus keep what is their own, on NATS: a bucket for each, or files of its machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from cauce.backends.nats.bucket import Bucket, Message, Put, Stale, Unsure, buckets
from cauce.backends.nats.link import Link
from cauce.backends.nats.names import text, token
from cauce.backends.nats.store import NatsStore, bucket_of, place_of, unpacked
from cauce.backends.nats.timers import cancelled, timers_in
from cauce.backends.nats.units import packed
from cauce.backends.sqlite.stores import SQLiteStores
from cauce.clock import Clock
from cauce.errors import Refused, Unavailable
from cauce.shelf import Shelf
from cauce.store import Letter, Outline, Store, Timer, Waiting, no_letter, no_timer, pending_of

__all__ = ["NatsStores"]

_TRIES = 10


class NatsStores:
    """See `cauce.store.Stores` for what each method promises.

    A service that keeps tables, views or replicas needs a database, which a bucket is not: it gets files in a folder of
    this machine, and the catalogue refuses an instance on another one.

    Parameters:
        files: the stores in that folder.
    """

    dialect = "sqlite"

    def __init__(self, link: Link, clock: Clock, files: SQLiteStores) -> None:
        self._link, self._clock, self._files = link, clock, files

    async def open(self, service: str, migrations: Sequence[str] | None = (), *, keeps: bool = True) -> Store:
        if migrations is None:
            keeps = not await self._is_bucket(service)
        if not keeps and not migrations:
            return await NatsStore.open(self._link, service)
        store = await self._files.open(service, migrations, keeps=keeps)
        return cast(Store, _Here(store, self._files.place / service))

    def shelf(self, service: str) -> Shelf:
        return self._files.shelf(service)

    async def services(self) -> list[str]:
        return sorted({*await self._services(), *await self._files.services()})

    async def outline(self, service: str, now: int) -> Outline:
        if not await self._is_bucket(service):
            return await self._files.outline(service, now)
        bucket = bucket_of(self._link, service)
        # Places first: what is set aside after them is counted twice for a moment, none is missed.
        places = sorted(
            map(place_of, await bucket.read("place.>")), key=lambda each: (each.consumer, each.domain, each.slot)
        )
        waiting = [(text(each.tokens[1]), unpacked(each)) for each in await bucket.read("waiting.>")]
        latest = {(consumer, each.position): each for consumer, each in waiting}
        rows = ((consumer, position, latest[consumer, position]) for consumer, position in sorted(latest))
        due = [int(each.payload) for each in await bucket.read("timer.*")]
        due += [each.due for each in await timers_in(bucket)]
        return Outline(
            places, pending_of((consumer, position, each.stream, each.dead) for consumer, position, each in rows if not each.mark),
            len(await bucket.read("outbox.>")), len(due), sum(each <= now for each in due),
        )  # fmt: skip

    async def letters(self, service: str = "") -> list[Letter]:
        names = await self._services()
        found = []
        for each in names if not service else [service] if service in names else []:
            found += await self._letters(each)
        if not service or service not in names:
            try:
                found += await self._files.letters(service)
            except Refused:
                raise self._unknown(service, names) from None
        return sorted(found, key=lambda letter: (letter.service, letter.position))

    async def _letters(self, service: str) -> list[Letter]:
        waiting = [
            (text(each.tokens[1]), unpacked(each)) for each in await bucket_of(self._link, service).read("waiting.>")
        ]
        # One that was written again while all were read is found twice.
        latest = {(consumer, each.position): each for consumer, each in waiting}
        return [
            Letter(
                service, consumer, each.position, each.stream, each.attempts, each.error, each.trace,
                msgspec.Raw(each.raw or b"null"), _behind(latest, consumer, each), each.due,
            )
            for (consumer, _), each in latest.items()
            if each.dead
        ]  # fmt: skip

    async def retry(self, service: str, consumer: str, position: int) -> None:
        if await self._is_bucket(service):
            await self._decide(service, consumer, position, discard=False)
        else:
            await self._files.retry(service, consumer, position)

    async def edit(self, service: str, consumer: str, position: int, before: bytes, after: bytes) -> None:
        if await self._is_bucket(service):
            await self._decide(service, consumer, position, discard=False, edit=(before, after))
        else:
            await self._files.edit(service, consumer, position, before, after)

    async def discard(self, service: str, consumer: str, position: int) -> None:
        if await self._is_bucket(service):
            await self._decide(service, consumer, position, discard=True)
        else:
            await self._files.discard(service, consumer, position)

    async def _decide(
        self, service: str, consumer: str, position: int, *, discard: bool, edit: tuple[bytes, bytes] | None = None
    ) -> None:
        bucket, name = bucket_of(self._link, service), f"waiting.{token(consumer)}.{position}"
        for _ in range(_TRIES):
            stands = await bucket.one(name)
            waiting = None if stands is None else unpacked(stands)
            if stands is None or waiting is None or not waiting.dead or (edit and waiting.raw not in edit):
                raise no_letter(service, consumer, position)
            if edit:
                again = msgspec.structs.replace(waiting, raw=edit[1])
            else:
                again = msgspec.structs.replace(waiting, dead=False, attempts=0, due=0)
            put = Put(name, b"" if discard else packed(again), gone=discard, expected=stands.sequence)
            if await _written(bucket, put, stands):
                return
        raise Unavailable(f"dead letter {position} of {service} changes all the time: try again")

    async def timers(self, service: str = "", limit: int = 1_000) -> list[tuple[str, Timer]]:
        names, found = await self._services(), list[tuple[str, Timer]]()
        for each in names if not service else [service] if service in names else []:
            bucket = bucket_of(self._link, each)
            due = {text(one.tokens[1]): int(one.payload) for one in await bucket.read("timer.*")}
            found += [
                (each, Timer(name, "lead", name, due[name])) for name in sorted(due, key=lambda one: (due[one], one))
            ]
            found += [(each, timer) for timer in (await timers_in(bucket))[:limit]]
        if not service or service not in names:
            try:
                found += await self._files.timers(service, limit)
            except Refused:
                raise self._unknown(service, names) from None
        return found

    async def cancel(self, service: str, id: str) -> None:
        if not await self._is_bucket(service):
            return await self._files.cancel(service, id)
        bucket = bucket_of(self._link, service)
        for _ in range(_TRIES):
            stands = await bucket.one(cancelled(id).name)
            if stands is None:
                raise no_timer(service, id)
            put = cancelled(id)
            put.expected = stands.sequence
            if await _written(bucket, put, stands):
                return None
        raise Unavailable(f"timer {id} of {service} changes all the time: try again")

    async def _is_bucket(self, service: str) -> bool:
        names = await self._services()
        if service not in names:
            try:
                await self._files.letters(service)
            except Refused:
                raise self._unknown(service, names) from None
        return service in names

    async def _services(self) -> list[str]:
        # No service's name holds what parts the name of the stream.
        prefix = self._link.stream("store_")
        return [name.removeprefix(prefix) for name in await buckets(self._link, "store") if name.startswith(prefix)]

    def _unknown(self, service: str, names: Sequence[str]) -> Refused:
        known = ", ".join(names) or "none"
        return Refused(
            f"service {service!r} has no store here: in buckets of {self._link} there are {known}, and files of services "
            f"that keep data lie in {self._files.place} of the machine they run on"
        )


class _Here:
    """A store in files of this machine: another machine has another one at the same path, and says so."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self.place = f"{folder.absolute()} on {platform.node()}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def _written(bucket: Bucket, put: Put, before: Message) -> bool:
    try:
        await bucket.write([put])
    except Stale:
        return False
    except Unsure:
        # It says the same if it is written twice, but the second time it would find itself.
        stands = await bucket.one(put.name)
        return stands is None or stands.sequence != before.sequence
    return True


def _behind(latest: dict[tuple[str, int], Waiting], consumer: str, dead: Waiting) -> int:
    return sum(
        1
        for (other, position), each in latest.items()
        if other == consumer and each.stream == dead.stream and position > dead.position
    )
