"""The log seam on JetStream: writes go through one writer, reads are direct gets, or the tail where one waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from cauce.accept import check_key
from cauce.backends.nats.claims import Claims
from cauce.backends.nats.direct import Message, fetch
from cauce.backends.nats.events import decode, time_of, type_of
from cauce.backends.nats.forgetting import Forgetting
from cauce.backends.nats.heads import Heads
from cauce.backends.nats.job import Job
from cauce.backends.nats.names import text
from cauce.backends.nats.stream import State, Stream
from cauce.backends.nats.tail import Tail
from cauce.backends.nats.writer import Writer
from cauce.codec import Entry
from cauce.errors import Damaged, Refused
from cauce.log import (
    EVERYTHING,
    Also,
    Appended,
    Claim,
    Filter,
    Page,
    check_append,
    check_filter,
    check_forget,
    check_put,
)

__all__ = ["NatsLog"]

_OVERHEAD = 400
_WINDOW = 512
_LONGEST = 5_000
_POLL = 1.0


class NatsLog:
    """One of the three logs of a bus. See `cauce.log.Log` for what each method promises."""

    def __init__(self, stream: Stream, leases: Stream) -> None:
        self._stream, self._link = stream, stream.link
        self._heads = Heads(stream)
        self._writer = Writer(stream, self._heads)
        self._claims = Claims(stream, leases, self._heads)
        self._tail = Tail(stream)
        self._forgetting = Forgetting(stream, leases)

    @property
    def id(self) -> str:
        return self._stream.id

    # ------------------------------------------------------------------------------------------------- writing

    def append(
        self,
        stream: str,
        entries: Sequence[Entry],
        *,
        expect: int | None = None,
        fence: Claim | None = None,
        repeat: bool = False,
        also: Sequence[Also] = (),
    ) -> asyncio.Future[Appended]:
        if self._stream.last:
            raise Refused(f"{self._stream.log} keeps only the last of each stream: put there, do not append")
        size = check_append(stream, entries, also) + _OVERHEAD * (len(entries) + len(also))
        subject, others = self._heads.subject(stream), [(self._heads.subject(each.stream), each) for each in also]
        return self._writer.submit(
            Job(stream, subject, entries, expect=expect, fence=fence, repeat=repeat, others=others, size=size)
        )

    def put(self, stream: str, version: int, entry: Entry) -> asyncio.Future[Appended]:
        if not self._stream.last:
            raise Refused(f"{self._stream.log} keeps all of each stream: append there, do not put")
        size = check_put(stream, version, entry) + _OVERHEAD
        subject = self._heads.subject(stream)
        return self._writer.submit(Job(stream, subject, [entry], version=version, size=size))

    async def claim(self, name: str, owner: str, *, over: Claim | None = None) -> Claim:
        check_key(name)
        check_key(owner)
        return await self._writer.step(lambda: self._claims.claim(name, owner, over))

    async def beat(self, claim: Claim) -> Claim:
        return await self._writer.step(lambda: self._claims.beat(claim))

    async def release(self, claim: Claim) -> None:
        await self._writer.step(lambda: self._claims.release(claim))

    async def forget(self, domain: str, slot: int, upto: int, before: int) -> int:
        check_forget(self._stream.log, domain, slot)
        pattern = self._link.subject(self._stream.log, domain, str(slot), "*")
        upto = min(upto, await self.head() - 1)
        last = await self._old(pattern, upto, before)
        if not last:
            return 0
        removed = await self._writer.step(lambda: self._forgetting.forget(pattern, last))
        self._tail.forget()
        return removed

    async def _old(self, pattern: str, upto: int, before: int) -> int:
        """The position of the last of the old ones on a pattern; 0 where there are none."""
        last = 0
        while True:
            messages = await fetch(self._stream, pattern, last, _WINDOW)
            for message in messages:
                # Who holds the slot stays known.
                if message.position > upto or _ours(message.name) or time_of(message.head) >= before:
                    return last
                last = message.position
            if len(messages) < _WINDOW:
                return last

    # ------------------------------------------------------------------------------------------------- reading

    async def head(self) -> int:
        return (await self._stream.state()).last_seq

    async def read(
        self, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000, wait: float = 0.0, bodies: bool = True
    ) -> Page:
        check_filter(filter)
        limit = min(limit, _LONGEST)
        if limit < 1:
            return Page([], after)
        until = asyncio.get_running_loop().time() + wait
        while True:
            page = await self._look(filter, after, limit, bodies)
            left = until - asyncio.get_running_loop().time()
            if page.entries or left <= 0:
                return page
            after = page.looked
            await self._wait(after, min(until, asyncio.get_running_loop().time() + _POLL))

    async def _wait(self, after: int, until: float) -> None:
        if self._stream.head > after:
            return
        await self._tail.start(after)
        await self._tail.wait(after, until)

    async def _look(self, filter: Filter, after: int, limit: int, bodies: bool) -> Page:
        if filter.stream is not None and self._stream.last:
            # The tail has what came, and so what stands no more.
            state = await self._stream.state()
            await self._check_gap(state, after)
            return await self._record(filter, after, bodies, state.last_seq)
        if self._tail.running and self._tail.begin <= after < self._tail.covered:
            page = self._in_tail(filter, after, limit, bodies)
            if page.entries:
                if self._stream.broken is not None:
                    raise self._stream.broken
                return page
        state = await self._stream.state()
        await self._check_gap(state, after)
        if state.last_seq <= after:
            return Page([], after)
        if self._tail.running and self._tail.begin <= after and self._tail.covered >= state.last_seq:
            return self._in_tail(filter, after, limit, bodies)
        return await self._scan(filter, after, limit, bodies, state.last_seq)

    def _in_tail(self, filter: Filter, after: int, limit: int, bodies: bool) -> Page:
        messages, begin = self._tail.after(after)
        found = _wanted(filter, (messages[i] for i in range(begin, len(messages))), limit, bodies)
        if len(found) == limit:
            return Page(found, found[-1].position)
        return Page(found, max(after, self._tail.covered))

    async def _scan(self, filter: Filter, after: int, limit: int, bodies: bool, head: int) -> Page:
        pattern, exact = self._pattern(filter)
        batch = limit if exact else max(limit, _WINDOW)
        messages = await fetch(self._stream, pattern, after, batch)
        looked = messages[-1].position if messages else after
        if len(messages) < batch and looked < head:
            # A follower may have answered that has not all yet; the leader has.
            if self._stream.replicas > 1:
                stored = await self._stream.next_of(pattern, looked + 1)
                looked = head if stored is None else max(looked, min(head, stored.seq - 1))
            else:
                looked = head
        found = _wanted(filter, messages, limit, bodies)
        if len(found) == limit:
            looked = found[-1].position
        return Page(found, looked)

    async def _record(self, filter: Filter, after: int, bodies: bool, head: int) -> Page:
        """The one entry of a stream, asked for as such: a scan could pass it by while it moves to the end."""
        assert filter.stream is not None
        stored = await self._stream.last_of(self._heads.subject(filter.stream))
        if stored is None or stored.seq <= after:
            return Page([], max(after, head))
        message = Message(stored.subject[len(self._stream.everything) - 1 :], stored.seq, stored.hdrs, stored.data)
        return Page(_wanted(filter, [message], 1, bodies), max(head, stored.seq))

    def _pattern(self, filter: Filter) -> tuple[str, bool]:
        """The narrowest pattern of subjects that has all that is wanted, and whether it has nothing else."""
        if filter.stream is not None:
            return self._heads.subject(filter.stream), not (filter.types or filter.domains or filter.slots)
        one_domain, one_slot = len(filter.domains) == 1, len(filter.slots) == 1
        if not one_domain and not one_slot:
            return self._stream.everything, filter == EVERYTHING
        domain = next(iter(filter.domains)) if one_domain else "*"
        slot = str(next(iter(filter.slots))) if one_slot else "*"
        exact = not filter.types and len(filter.domains) < 2 and len(filter.slots) < 2
        return self._link.subject(self._stream.log, domain, slot, "*"), exact

    async def _check_gap(self, state: State, after: int) -> None:
        """Who has not read yet what was removed would miss it without a word."""
        if self._stream.last:
            return
        if not self._stream.lasting:
            await self._forgetting.check(state)
            return
        front = max(0, state.first_seq - 1 - after) if state.messages else max(0, state.last_seq - after)
        within = state.last_seq - max(state.first_seq - 1, 0) - state.messages if state.messages else 0
        if front or within > 0:
            raise Damaged(
                f"stream {self._stream.name} on {self._link} has lost {front + max(within, 0):,} entries behind position "
                f"{after:,} that were not read yet: somebody removed them, or a limit did; restore them from a backup"
            )

    async def close(self) -> None:
        """Write what waits."""
        await self._writer.close()
        await self._tail.close()


def _wanted(filter: Filter, messages: Iterable[Message], limit: int, bodies: bool) -> list[Entry]:
    found: list[Entry] = []
    everything = filter == EVERYTHING
    for message in messages:
        name = message.name
        if "$" in name and ("$claim" in name or "$mark" in name) and _ours(name):
            continue
        if everything or _wants(filter, message):
            found.append(decode(name, message.position, message.head, message.payload, bodies))
            if len(found) == limit:
                break
    return found


def _ours(name: str) -> bool:
    """Whether it is a message of the log's own: keys never begin with a plain `$`."""
    return name[0] == "$" or name.rpartition(".")[2][0] == "$"


def _wants(filter: Filter, message: Message) -> bool:
    domain, slot, key = message.name.split(".")
    return (
        (not filter.domains or domain in filter.domains)
        and (not filter.slots or int(slot) in filter.slots)
        and (filter.stream is None or filter.stream == f"{domain}/{text(key)}")
        and (not filter.types or type_of(message.head) in filter.types)
    )
