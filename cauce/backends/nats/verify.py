"""Whether a bus on NATS still is what was written: its streams are read message by message, while others write."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from cauce.accept import slot_of
from cauce.backends.nats.claims import Holder, Lease
from cauce.backends.nats.direct import Message, fetch
from cauce.backends.nats.events import decode
from cauce.backends.nats.forgetting import Forgetting
from cauce.backends.nats.heads import Heads
from cauce.backends.nats.link import Link, connect
from cauce.backends.nats.names import text, token
from cauce.backends.nats.stream import Stream, streams_of
from cauce.clock import Clock
from cauce.codec import Entry
from cauce.errors import CauceError, Damaged
from cauce.verify import Fact, Findings, Repeats, Report, Walk, check_holder

__all__ = ["verify"]

_PAGE = 2_000


async def verify(url: str, clock: Clock) -> Report:
    """Read all of a bus and say what is not as it was written. Changes nothing, and nobody waits for it.

    Raises `Refused` where there is no bus, and what opening one raises; damage of any kind is a finding.
    """
    link = await connect(url, clock)
    try:
        *logs, leases = streams_of(link)
        for stream in (*logs, leases):
            await stream.open(make=False)
        return await _Search(link, logs, leases).run()
    finally:
        await link.close()


class _Search:
    """One run over one bus, and what it finds."""

    def __init__(self, link: Link, logs: Sequence[Stream], leases: Stream) -> None:
        self._link, self._logs, self._leases, self._found = link, logs, leases, Findings()

    async def run(self) -> Report:
        found, (facts, commands, records) = self._found, self._logs
        walk = Walk("facts", found)
        # Commands may be forgotten, and records move to the end, while they are read.
        self._forgetting = Forgetting(commands, self._leases)
        forgot = await self._forgetting.has_forgotten()
        walks = [walk, Walk("commands", found, forgot=forgot, moves=True), Walk("records", found, walk, moves=True)]
        for each, stream in zip(walks, (facts, commands, records), strict=True):
            with found.step("structure"):
                await self._walk(each, stream)
        with found.step("claims"):
            await self._beats()
        streams = set[str]().union(*(each.streams for each in walks))
        return Report(
            str(self._link), not found.listed, facts.id.partition(":")[0], {each.log: each.count for each in walks},
            {each.log: each.last for each in walks}, len(streams), found.listed, found.more,
        )  # fmt: skip

    async def _walk(self, walk: Walk, stream: Stream) -> None:
        head = (await stream.state()).last_seq
        heads = Heads(stream)
        async for messages in _pages(stream):
            for message in messages:
                self._see(walk, heads, message)
            walk.twice.tidy()
            await self._settle(walk, stream)
        walk.ended(head, "the stream")
        if walk.log == "commands":
            await self._count(stream, walk)
        if hashes := walk.twice.found():
            await self._repeated(walk.log, stream, hashes)

    def _see(self, walk: Walk, heads: Heads, message: Message) -> None:
        name, position = message.name, message.position
        if name[0] == "$" or name.rpartition(".")[2][0] == "$":
            if walk.passed(position):
                self._own(walk.log, heads, message)
            return
        domain, _, rest = name.partition(".")
        slot, _, key = rest.partition(".")
        try:
            stream = f"{domain}/{text(key)}"
            entry = decode(name, position, message.head, message.payload)
        except (CauceError, ValueError) as error:
            stream = f"{domain}/{key}"
            walk.unread(stream, position, f"{walk.log} position {position} ({stream}) cannot be read: {error}")
            return
        if slot != str(slot_of(entry.key)) or key != token(entry.key):
            self._found.add(
                "names", f"{walk.log} position {position} ({entry.stream} version {entry.version}) lies on {name}, "
                f"not in slot {slot_of(entry.key)}", walk.log, position,
            )  # fmt: skip
        walk.see((entry,))

    def _own(self, log: str, heads: Heads, message: Message) -> None:
        """A message of the log's own: a mark that carries a check, or a claim, whose position is its fence."""
        if message.name == "$mark":
            return
        where = f"{log} position {message.position} ({message.name})"
        try:
            claim = msgspec.json.decode(message.payload, type=Holder)
            fits = heads.claim(claim.name) == self._link.subject(log, message.name)
        except (msgspec.MsgspecError, CauceError):
            self._found.add("claims", f"{where} is no claim", log, message.position)
            return
        if not fits:
            self._found.add(
                "claims", f"{where} is the claim of {claim.name!r}, which lies elsewhere", log, message.position
            )
        check_holder(log, claim.name, claim.owner, message.position, 0, self._found)

    async def _settle(self, walk: Walk, stream: Stream) -> None:
        for doubt in walk.doubts:
            # What is forgotten is the beginning of a stream: whatever was between is gone with what was before.
            still = await _at(stream, doubt.before) if doubt.before else not await self._forgetting.has_forgotten()
            if still:
                each = doubt.finding
                self._found.add(each.kind, each.message, each.log, each.position)
        walk.doubts = []
        if walk.asked or walk.marks:
            there = {}
            for _, upto in walk.asked:
                entry = await _at(self._logs[0], upto)
                if entry is not None:
                    there[upto] = Fact(entry.stream, entry.version, entry.id)
            walk.settle(there, (await self._logs[0].state()).last_seq)

    async def _count(self, stream: Stream, walk: Walk) -> None:
        try:
            await self._forgetting.check(await stream.state())
        except Damaged as error:
            self._found.add("order", str(error), walk.log)

    async def _repeated(self, log: str, stream: Stream, hashes: set[int]) -> None:
        repeats = Repeats(log, hashes, self._found)
        async for messages in _pages(stream):
            repeats.see(entry for message in messages if (entry := _entry(message)) is not None)

    async def _beats(self) -> None:
        """A beat names the fence under which it was, which is a position of its log."""
        ends = {stream.log: (await stream.state()).last_seq for stream in self._logs}
        async for messages in _pages(self._leases):
            for message in messages:
                log, _, name = message.name.partition(".")
                if name == "$forgotten":
                    continue
                try:
                    fence = msgspec.json.decode(message.payload, type=Lease).fence
                except msgspec.MsgspecError:
                    fence = 0
                if not 0 < fence <= ends.get(log, 0):
                    self._found.add(
                        "claims",
                        f"the beat of {text(name)!r} of {log} is under fence {fence}, which nobody was given",
                        log,
                    )


async def _pages(stream: Stream) -> AsyncIterator[list[Message]]:
    """All messages of a stream, in order, with those that come meanwhile."""
    looked = 0
    while True:
        messages = await fetch(stream, stream.everything, looked, _PAGE)
        if not messages:
            # A follower of a cluster may have answered that has not all yet; the leader has.
            stored = await stream.next_of(stream.everything, looked + 1) if stream.replicas > 1 else None
            if stored is None:
                return
            skip = len(stream.everything) - 1
            messages = [Message(stored.subject[skip:], stored.seq, stored.hdrs, stored.data)]
        looked = messages[-1].position
        yield messages


async def _at(stream: Stream, position: int) -> Entry | None:
    """What stands at a position, if it is an entry."""
    found = await fetch(stream, stream.everything, position - 1, 1) if position > 0 else []
    return _entry(found[0]) if found and found[0].position == position else None


def _entry(message: Message) -> Entry | None:
    try:
        return decode(message.name, message.position, message.head, message.payload)
    except CauceError:
        return None
