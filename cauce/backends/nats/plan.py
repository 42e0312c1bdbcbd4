"""What a group of appends comes to: messages with what each relies on, and verdicts of those that write nothing."""

from __future__ import annotations

from collections.abc import Sequence

from cauce.backends.nats.direct import fetch
from cauce.backends.nats.events import decode, encode, id_of, version_of
from cauce.backends.nats.heads import NOTHING, Head, Heads
from cauce.backends.nats.job import Job
from cauce.backends.nats.stream import Stream
from cauce.codec import Entry, digest
from cauce.errors import CauceError, Conflict, Damaged, Fenced, IdReused
from cauce.log import Appended, Claim, check_claim

__all__ = ["Plan", "draw"]


class Plan:
    """`jobs` are those taken in, in order; a group ends early before one that has to wait for what comes before it."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.messages: list[tuple[str, bytes, bytes]] = []
        self.verdicts: list[tuple[Job, Appended | CauceError]] = []
        self.written: list[tuple[Job, str, Sequence[Entry], int, int]] = []
        """Job, subject, entries, the version of the last of them, and the number of its message, from 1."""

        self.joint = False
        """Whether some job writes to several streams."""

        self.slots: dict[str, str] = {}
        """Pattern of a slot under a fence, and the subject's beginning by which its messages are known."""

    @property
    def single(self) -> bool:
        """Whether each job is one message, so that some may stand without the others."""
        return not self.joint and len(self.written) == len(self.messages)

    def settle(self, last: int, heads: Heads) -> None:
        """The messages stand, the last at this position."""
        base = last - len(self.messages)
        heads.wrote_up_to(last, len(self.messages))
        for job, subject, entries, version, number in self.written:
            position = base + number
            before = heads.head(subject) or NOTHING
            heads.note(subject, Head(version, position))
            if not job.version and heads.reads(subject):
                heads.wrote(subject, before.position, [entry.id for entry in entries], position)
            if subject == job.subject:
                self.verdicts.append((job, Appended(version, position)))
        for pattern, begin in self.slots.items():
            for number in range(len(self.messages), 0, -1):
                if self.messages[number - 1][0].startswith(begin):
                    heads.slots[pattern] = base + number
                    break

    def tell(self) -> None:
        for job, verdict in self.verdicts:
            job.over = True
            if job.future.done():
                continue
            if isinstance(verdict, Appended):
                job.future.set_result(verdict)
            else:
                job.future.set_exception(verdict)


async def draw(stream: Stream, heads: Heads, jobs: Sequence[Job], *, trusting: bool) -> Plan:
    """Plan as many of the jobs, in order, as go together.

    Parameters:
        trusting: whether a stream that is expected not to be yet is taken at the word; the server looks anyway.
    """
    return await _Drawing(stream, heads, trusting).draw(jobs)


class _Drawing:
    def __init__(self, stream: Stream, heads: Heads, trusting: bool) -> None:
        self._stream, self._heads, self._trusting = stream, heads, trusting
        self._plan = Plan()
        self._staged: dict[str, int] = {}
        self._ids: set[tuple[str, str]] = set()
        self._fresh: set[str] = set()
        self._checked: set[str] = set()
        self._sent: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}

    async def draw(self, jobs: Sequence[Job]) -> Plan:
        await self._learn_slots(jobs)
        await self._learn(jobs)
        for job in jobs:
            if self._waits(job):
                break
            self._plan.jobs.append(job)
            try:
                await self._take(job)
            except (Conflict, Fenced, IdReused, Damaged) as error:
                self._plan.verdicts.append((job, error))
        return self._plan

    def _waits(self, job: Job) -> bool:
        """Whether its verdict hangs on what a job before it writes."""
        if job.version:
            return job.subject in self._staged
        return (job.repeat or job.tried is not None) and (job.subject, job.entries[0].id) in self._ids

    def _head(self, subject: str) -> Head:
        return self._heads.head(subject) or NOTHING

    async def _learn_slots(self, jobs: Sequence[Job]) -> None:
        """Where the slots under a fence end. First where one ends, then who holds it and where its streams end: a
        change between the two makes the first one wrong, and the server refuses what relies on it."""
        for subject, given in {job.subject: job.fence for job in jobs if job.fence is not None}.items():
            try:
                check_claim(given)
            except Fenced:
                continue  # as its verdict will say
            claim = self._heads.claim(given.name)
            pattern = self._slot(subject, claim)
            if pattern is not None and pattern not in self._heads.slots:
                self._heads.enter(pattern, await self._heads.last(pattern))
                self._heads.fences[claim] = await self._heads.last(claim)

    async def _learn(self, jobs: Sequence[Job]) -> None:
        """Where all the streams end."""
        unknown = dict.fromkeys(
            job.subject
            for job in jobs
            if self._heads.head(job.subject) is None and not (self._trusting and self._new(job))
        )
        for job in jobs:
            for subject, also in job.others:
                new = self._trusting and job.tried is None and (self._heads.alone or also.expect == 0)
                if self._heads.head(subject) is None and not new:
                    unknown[subject] = None
        await self._heads.load(unknown)
        self._fresh.update(unknown)

    def _new(self, job: Job) -> bool:
        """Whether its stream is taken not to be there yet without a look."""
        if job.tried is not None or self._heads.alone:
            return job.tried is None
        # Under a fence the server looks at the slot, and not at the stream.
        return job.expect == 0 and not job.repeat and job.fence is None

    async def _take(self, job: Job) -> None:
        if await self._went_through(job):
            return
        if job.fence is not None:
            await self._check_fence(job.subject, job.fence)
        if await self._repeats(job):
            return
        if job.version:
            version = self._head(job.subject).version
            if job.version <= version:
                self._plan.verdicts.append((job, Appended(version, self._head(job.subject).position, True)))
                return
            first = job.version
        else:
            first = 1 + await self._expected(job.subject, job.stream, job.expect)
        lines = _lines(job.entries, first)
        others = [
            (subject, also.entries, 1 + await self._expected(subject, also.stream, also.expect))
            for subject, also in job.others
        ]
        checks = self._checks(job)
        while len(checks) > len(lines):
            # One message carries one check; where there are more of them, a message that nobody reads carries it.
            subject, last = checks.pop(0)
            self._message(self._stream.link.subject(self._stream.log, "$mark"), b"", b"", (subject, last))
        self._write(job, job.subject, job.entries, lines, first, checks)
        for subject, entries, version in others:
            self._plan.joint = True
            self._write(job, subject, entries, _lines(entries, version), version, self._own_check(subject))

    def _write(
        self,
        job: Job,
        subject: str,
        entries: Sequence[Entry],
        lines: Sequence[tuple[bytes, bytes]],
        first: int,
        checks: Sequence[tuple[str, int]],
    ) -> None:
        for number, (head, payload) in enumerate(lines):
            self._message(subject, head, payload, checks[number] if number < len(checks) else None)
        self._staged[subject] = version = first + len(lines) - 1
        for entry in entries:
            self._ids.add((subject, entry.id))
        self._plan.written.append((job, subject, entries, version, len(self._plan.messages)))

    # ------------------------------------------------------------------------------------------------- versions

    def _version(self, subject: str) -> int:
        staged = self._staged.get(subject)
        return self._head(subject).version if staged is None else staged

    async def _expected(self, subject: str, stream: str, expect: int | None) -> int:
        """The version of a stream, which is the one that is expected, if any is."""
        version = self._version(subject)
        known = subject in self._fresh or subject in self._staged
        if expect is not None and expect != version and not known:
            # What is remembered may be old; nobody is told of a conflict that is none.
            await self._heads.load((subject,))
            self._fresh.add(subject)
            version = self._version(subject)
        if expect is not None and expect != version:
            raise Conflict(stream, expect, version)
        return version

    # ------------------------------------------------------------------------------------------------- repeats

    async def _went_through(self, job: Job) -> bool:
        """Whether it stands because it was sent before, whatever has changed since."""
        head = self._head(job.subject)
        if job.tried is None or head.position <= job.tried:
            return False
        found = (await self._since(job.subject, job.tried, head.position)).get(job.entries[0].id)
        if found is None:
            return False
        # The entries of one append lie side by side.
        position, version, more = *found, len(job.entries) - 1
        self._plan.verdicts.append((job, Appended(job.version or version + more, position + more)))
        return True

    async def _repeats(self, job: Job) -> bool:
        """Whether it stands because somebody appended the same before."""
        head = self._head(job.subject)
        if not job.repeat or not head.position:
            return False
        position = await self._heads.first(job.subject, job.entries[0].id, head.position)
        entries = await self._entries(job, position) if position else []
        if position and (not entries or entries[0].position != position):
            # It was forgotten since, and perhaps stands again.
            self._heads.forget_ids(job.subject)
            position = await self._heads.first(job.subject, job.entries[0].id, head.position)
            entries = await self._entries(job, position) if position else []
        if not position:
            return False
        # The entries of one append lie side by side.
        if [each.position for each in entries] != list(range(position, position + len(job.entries))) or any(
            (one.type, one.meta.schema, one.body) != (two.type, two.meta.schema, two.body)
            for one, two in zip(entries, job.entries, strict=True)
        ):
            raise IdReused(
                f"{job.stream} holds id {job.entries[0].id} with another type, schema or body: "
                "use a fresh id for another message"
            )
        self._plan.verdicts.append((job, Appended(entries[-1].version, entries[-1].position, True)))
        return True

    async def _since(self, subject: str, after: int, upto: int) -> dict[str, tuple[int, int]]:
        """Position and version of each id behind a position, up to another: read once for all that were sent."""
        found = self._sent.get((subject, after))
        if found is None:
            found = self._sent[subject, after] = {}
            while after < upto:
                some = [(each.head, each.position) for each in await fetch(self._stream, subject, after, 1000)]
                if not some:
                    # A follower that answers for the leader may be a moment behind.
                    stored = await self._stream.next_of(subject, after + 1)
                    if stored is None:
                        break
                    some = [(stored.hdrs, stored.seq)]
                for head, position in some:
                    found.setdefault(id_of(head), (position, version_of(head)))
                after = some[-1][1]
        return found

    async def _entries(self, job: Job, position: int) -> list[Entry]:
        found = await fetch(self._stream, job.subject, position - 1, len(job.entries))
        return [decode(each.name, each.position, each.head, each.payload) for each in found]

    def _name(self, subject: str) -> str:
        return subject[len(self._stream.everything) - 1 :]

    # ------------------------------------------------------------------------------------------------- checks

    async def _check_fence(self, subject: str, given: Claim) -> None:
        check_claim(given)
        name, fence = given.name, given.fence
        claim = self._heads.claim(name)
        if self._heads.fences.get(claim) != fence:
            self._heads.fences[claim] = await self._heads.last(claim)
        stands = self._heads.fences[claim]
        if stands != fence:
            raise Fenced(f"{name} has another holder by now (fence {stands}, ours {fence}): stop writing")

    def _slot(self, subject: str, claim: str) -> str | None:
        """The pattern of the slot that a claim fences, if the subject lies in it.

        In a cluster a pattern is no check: what is on the way to its messages is not looked at there.
        """
        begin = claim.removesuffix("$claim")
        return f"{begin}>" if begin != claim and self._stream.replicas == 1 and subject.startswith(begin) else None

    def _checks(self, job: Job) -> list[tuple[str, int]]:
        checks = []
        own = (job.subject, self._head(job.subject).position)
        if job.fence is not None:
            claim = self._heads.claim(job.fence.name)
            pattern = self._slot(job.subject, claim)
            if pattern is not None:
                self._plan.slots[pattern] = pattern[:-1]
                if pattern not in self._checked:
                    checks.append((pattern, self._heads.slots[pattern]))
                self._checked.update((pattern, job.subject))
                return checks
            if claim not in self._checked:
                checks.append((claim, job.fence.fence))
        if job.subject not in self._checked:
            # A subject is checked before it is written.
            checks.insert(0, own) if len(job.entries) > 1 else checks.append(own)
        self._checked.update(subject for subject, _ in checks)
        return checks

    def _own_check(self, subject: str) -> list[tuple[str, int]]:
        """That a stream ends where it is thought to, unless something before in the plan says so."""
        if subject in self._checked or subject.startswith(tuple(self._plan.slots.values())):
            return []
        self._checked.add(subject)
        return [(subject, self._head(subject).position)]

    # ------------------------------------------------------------------------------------------------- messages

    def _message(self, subject: str, head: bytes, payload: bytes, check: tuple[str, int] | None) -> None:
        if check is not None:
            head += b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % check[1]
            if check[0] != subject:
                head += b"Nats-Expected-Last-Subject-Sequence-Subject: %b\r\n" % check[0].encode()
        self._plan.messages.append((subject, head, payload))


def _lines(entries: Sequence[Entry], first: int) -> list[tuple[bytes, bytes]]:
    """Header lines and payload of each of these entries, the first of which gets a version."""
    return [encode(entry, version, digest(entry, version)) for version, entry in enumerate(entries, first)]
