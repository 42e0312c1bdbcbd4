"""The contract of `cauce.log.Log` as code that runs: what a backend must keep, promise by promise.

It needs no test framework, and nothing in it can skip. A backend's own test is ten lines:

    @pytest.mark.parametrize("promise", conformance.PROMISES, ids=str)
    async def test_our_log_keeps(promise: Promise, tmp_path: Path) -> None:
        @asynccontextmanager
        async def open(keeps: Keeps) -> AsyncIterator[Log]:
            bus = await our_backend.open(tmp_path / "bus")
            try:
                yield {"all": bus.facts, "undecided": bus.commands, "last": bus.records}[keeps]
            finally:
                await bus.close()

        await promise(open)

Each promise starts on three empty logs: one that keeps all, one that keeps all until it is decided and old, and one
that keeps the last of each stream. What is opened
twice is the same log again, with a second handle such as another process would have. This file is long because the
contract is: it is a list, to be read from anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import product
from typing import Literal, ParamSpec, Protocol, TypeVar

import msgspec

from cauce.accept import APPEND_BYTES, APPEND_ENTRIES, ENTRY_BYTES, ID_BYTES, slot_of
from cauce.clock import SystemClock
from cauce.codec import Entry, Meta, derive_id, sealed
from cauce.errors import CauceError, Conflict, Fenced, Held, IdReused, Refused
from cauce.log import EVERYTHING, Also, Appended, Claim, Filter, Log, Page

__all__ = ["HOSTILE", "ILLEGAL", "PROMISES", "Broken", "Keeps", "Open", "Promise"]

Keeps = Literal["all", "undecided", "last"]
"""What a log keeps of each stream: facts all, commands what is not decided and old, records the last."""


class Open(Protocol):
    """Opens a log; what was opened before stays open."""

    def __call__(self, keeps: Keeps, /) -> AbstractAsyncContextManager[Log]: ...


class Broken(AssertionError):
    """The log does not keep its promise. An error of its own, so that `python -O` takes nothing away."""


class Promise(msgspec.Struct, frozen=True):
    """One sentence of the contract. Calling it proves it, or raises `Broken` or whatever the log raised."""

    name: str
    why: str
    proof: Callable[[Open], Awaitable[None]]

    def __str__(self) -> str:
        return self.name

    async def __call__(self, open: Open) -> None:
        async with asyncio.timeout(_LONG):
            await self.proof(open)


_LONG = 60.0
_SOON = 20.0
_SHORT = 0.3
_promises: list[Promise] = []

E = TypeVar("E", bound=CauceError)
P = ParamSpec("P")


def _promise(proof: Callable[[Open], Awaitable[None]]) -> Callable[[Open], Awaitable[None]]:
    _promises.append(Promise(proof.__name__.replace("_", " "), proof.__doc__ or "", proof))
    return proof


# --------------------------------------------------------------------------------------------------- a few tools


def _holds(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Broken(otherwise)


def _same(got: object, wanted: object, what: str) -> None:
    if got != wanted:
        raise Broken(f"{what}: {_short(got)} instead of {_short(wanted)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 400 else f"{text[:300]}… ({len(text)} characters)"


async def _raises(error: type[E], call: Callable[P, Awaitable[object]], *arguments: P.args, **options: P.kwargs) -> E:
    """The error that must come, whether the call raises it or the future that it returns."""
    try:
        answer = await call(*arguments, **options)
    except error as raised:
        return raised
    except CauceError as raised:
        raise Broken(f"{raised!r} instead of {error.__name__}") from raised
    raise Broken(f"{_short(answer)} instead of {error.__name__}")


async def _all(calls: Sequence[Awaitable[Appended]]) -> list[Appended | BaseException]:
    return await asyncio.gather(*calls, return_exceptions=True)


def _fact(
    stream: str, n: int, *, type: str = "Counted", schema: int = 1, body: bytes | None = None, time: int = 0
) -> Entry:
    """The n-th entry made for a stream: same stream and n, same id and body."""
    id = derive_id("01890a5d-ac96-774b-bcce-b302099a8057", ascii(stream), str(n))
    return sealed(
        stream, type, id, Meta(time or 1_700_000_000_000_000 + n, schema), b'{"n":%d}' % n if body is None else body
    )


def _facts(stream: str, *numbers: int) -> list[Entry]:
    return [_fact(stream, n) for n in numbers]


def _add(
    log: Log, stream: str, *numbers: int, expect: int | None = None, fence: Claim | None = None, repeat: bool = False
) -> asyncio.Future[Appended]:
    """Append the facts of these numbers."""
    return log.append(stream, _facts(stream, *numbers), expect=expect, fence=fence, repeat=repeat)


def _put(log: Log, stream: str, version: int) -> asyncio.Future[Appended]:
    return log.put(stream, version, _fact(stream, version))


def _content(entry: Entry) -> tuple[object, ...]:
    """What the log may not touch."""
    return (entry.stream, entry.type, entry.id, entry.raw, entry.wish, entry.body)


def _places(entries: Sequence[Entry]) -> list[tuple[str, int, int]]:
    return [(entry.stream, entry.version, entry.position) for entry in entries]


async def _read(log: Log, filter: Filter = EVERYTHING, *, after: int = 0, limit: int = 1000) -> list[Entry]:
    """All that the filter wants, up to the head as it is now, checked on the way."""
    head, found = await log.head(), list[Entry]()
    while after < head:
        page = await log.read(filter, after=after, limit=limit)
        _check_page(page, after, limit)
        _holds(page.looked > after, f"a read after {after} did not get on, though the head is {head}")
        found += [entry.checked() for entry in page.entries]
        after = page.looked
    return found


def _check_page(page: Page, after: int, limit: int) -> None:
    positions = [entry.position for entry in page.entries]
    _holds(positions == sorted(set(positions)), f"positions of a page do not rise: {_short(positions)}")
    _holds(len(positions) <= limit, f"{len(positions)} entries where {limit} were asked for")
    _holds(
        all(after < position <= page.looked for position in positions),
        f"a page after {after} that looked to {page.looked} holds {_short(positions)}",
    )
    _holds(page.looked >= after, f"a read after {after} looked back to {page.looked}")


async def _nothing_but(log: Log, *appended: Entry) -> None:
    """The log holds these, in this order, and no more."""
    _same([_content(entry) for entry in await _read(log)], [_content(entry) for entry in appended], "the log holds")


async def _waiting(log: Log, filter: Filter = EVERYTHING, *, after: int = 0, wait: float = _SOON) -> asyncio.Task[Page]:
    """A reader that has begun to wait."""
    task = asyncio.create_task(log.read(filter, after=after, wait=wait))
    await SystemClock().sleep(_SHORT / 10)
    _holds(not task.done(), f"a reader of {filter} did not wait")
    return task


# ------------------------------------------------------------------------------------------------------- append


@_promise
async def an_append_is_all_or_nothing(open: Open) -> None:
    """Many entries of one append stand together, next to each other in their stream, or none of them stands."""
    async with open("all") as log:
        await _add(log, "things/1", 1)
        good = _facts("things/1", 2, 3, 4)
        await _raises(Conflict, log.append, "things/1", good, expect=0)
        await _raises(Refused, log.append, "things/1", [*good[:2], _fact("things/2", 4)])
        await _nothing_but(log, _fact("things/1", 1))
        await log.append("things/1", good, expect=1)
        await _nothing_but(log, *_facts("things/1", 1, 2, 3, 4))


@_promise
async def an_append_says_where_its_last_entry_stands(open: Open) -> None:
    """Version and position of the result are those under which the last entry is read, and `repeated` is False."""
    async with open("all") as log:
        before = 0
        for count in (1, 3, 2):
            done = await _add(log, "things/1", *range(before, before + count))
            before += count
            entries = await _read(log)
            _same(len(entries), before, "the number of entries")
            _same(done, Appended(entries[-1].version, entries[-1].position, False), "the result")
            _same(done.version, before, "the version")


@_promise
async def versions_of_a_stream_count_without_holes(open: Open) -> None:
    """1, 2, 3 in each stream, whatever was refused between, and whatever other streams do."""
    async with open("all") as log:
        for n in range(1, 13):
            await _add(log, f"things/{n % 3}", n)
            await _raises(Conflict, _add, log, "things/0", 99, expect=77)
            await _raises(Refused, log.append, "things/0", [])
        for key in range(3):
            versions = [entry.version for entry in await _read(log, Filter(f"things/{key}"))]
            _same(versions, [1, 2, 3, 4], f"the versions of things/{key}")


@_promise
async def positions_rise_from_1_and_fit_64_bits(open: Open) -> None:
    """Whole numbers, of which no two are the same."""
    async with open("all") as log:
        results = [await _add(log, f"things/{n}", 1, 2) for n in range(5)]
        positions = [entry.position for entry in await _read(log)]
        _same(len(positions), 10, "the number of entries")
        _holds(positions == sorted(set(positions)), f"positions do not rise: {positions}")
        _holds(positions[0] >= 1 and positions[-1] < 2**63, f"positions leave their bounds: {positions}")
        _same([done.position for done in results], positions[1::2], "the positions told")


@_promise
async def appends_take_place_in_the_order_of_the_calls(open: Open) -> None:
    """Whoever does not wait for one future before the next call still gets them in a row, in one stream and across."""
    async with open("all") as log:
        calls = [_add(log, f"things/{n % 4}", n) for n in range(200)]
        results = await asyncio.gather(*calls)
        _same([done.version for done in results], [n // 4 + 1 for n in range(200)], "the versions")
        _same([done.position for done in results], sorted({done.position for done in results}), "the positions")
        await _nothing_but(log, *(_fact(f"things/{n % 4}", n) for n in range(200)))


@_promise
async def to_stop_waiting_does_not_take_an_append_back(open: Open) -> None:
    """A future that is cancelled, or forgotten, changes nothing about what was asked for."""
    async with open("all") as log:
        futures = [_add(log, "things/1", n) for n in range(1, 4)]
        futures[0].cancel()
        futures[2].cancel()
        done = await _add(log, "things/1", 4)
        _same(done.version, 4, "the version after three appends that nobody waited for")
        await _nothing_but(log, *_facts("things/1", 1, 2, 3, 4))


@_promise
async def what_is_acknowledged_is_read_at_once_through_every_handle(open: Open) -> None:
    """Nobody who was told of an append looks and misses it: read, head and filters show it, here and elsewhere."""
    async with open("all") as log, open("all") as other:
        for n in range(1, 21):
            writer, reader = (log, other) if n % 2 else (other, log)
            done = await _add(writer, "things/1", n)
            for each in (reader, writer):
                _holds(await each.head() >= done.position, f"the head is below {done.position}, which was acknowledged")
                page = await each.read(Filter("things/1", types=frozenset({"Counted"})), after=done.position - 1)
                _same([entry.version for entry in page.entries], [n], "the versions read back")


@_promise
async def appends_through_two_handles_interleave_without_loss(open: Open) -> None:
    """However many are on the way at once, each stands once, and each stream counts on."""
    async with open("all") as log, open("all") as other:
        calls = [_add((log, other)[n % 2], f"things/{n % 7}", n, 1000 + n) for n in range(300)]
        results = await asyncio.gather(*calls)
        entries = await _read(log)
        _same(len({done.position for done in results}), 300, "different positions told")
        _same(
            sorted(entry.id for entry in entries),
            sorted(entry.id for n in range(300) for entry in _facts(f"things/{n % 7}", n, 1000 + n)),
            "the ids that stand",
        )
        for key in range(7):
            own = [entry for entry in entries if entry.key == str(key)]
            _same([entry.version for entry in own], list(range(1, len(own) + 1)), f"the versions of things/{key}")
            pairs = [(first.body, second.body) for first, second in zip(own[::2], own[1::2], strict=True)]
            _holds(
                all((b'{"n":1%03d}' % msgspec.json.decode(one or b"")["n"]) == two for one, two in pairs),
                f"appends to things/{key} were torn apart",
            )


@_promise
async def there_is_one_order_the_same_for_every_reader(open: Open) -> None:
    """Whoever reads, when, through which handle, in pages of which size: the same entries at the same positions."""
    async with open("all") as log, open("all") as other:
        await asyncio.gather(*(_add((log, other)[n % 2], f"things/{n}", n) for n in range(60)))
        early = _places(await _read(log))
        await asyncio.gather(*(_add((log, other)[n % 2], f"things/{n}", n + 60) for n in range(60)))
        whole = _places(await _read(other, limit=7))
        _same(len(whole), 120, "the number of entries")
        _same(whole[:60], early, "what was read before")
        for each, limit in product((log, other), (1, 13, 1000)):
            _same(_places(await _read(each, limit=limit)), whole, f"what is read in pages of {limit}")


@_promise
async def nothing_appears_below_a_place_already_read(open: Open) -> None:
    """Who follows the end of the log while others append never has to look back."""
    async with open("all") as log, open("all") as other, open("all") as third:

        async def write(log: Log, name: str) -> None:
            for n in range(0, 60, 3):
                await asyncio.gather(*(_add(log, f"{name}/{m % 5}", m) for m in range(n, n + 3)))

        async def follow() -> list[tuple[str, int, int]]:
            seen, looked = list[Entry](), 0
            while len(seen) < 120:
                page = await third.read(after=looked, limit=11, wait=_SOON)
                _check_page(page, looked, 11)
                _holds(bool(page.entries), f"the reader waited {_SOON} seconds after {len(seen)} of 120 entries")
                seen, looked = seen + page.entries, page.looked
            return _places(seen)

        followed, *_ = await asyncio.gather(follow(), write(log, "apples"), write(other, "pears"))
        _same(followed, _places(await _read(log)), "what the follower saw")


# ------------------------------------------------------------------------------------------------------- expect


@_promise
async def expecting_0_means_that_the_stream_must_not_be_yet(open: Open) -> None:
    """The first append may expect 0, no later one may; other streams do not count."""
    async with open("all") as log:
        await _add(log, "things/other", 1)
        _same((await _add(log, "things/1", 1, expect=0)).version, 1, "the version")
        error = await _raises(Conflict, _add, log, "things/1", 2, expect=0)
        _same((error.stream, error.expected, error.actual), ("things/1", 0, 1), "stream, expected and actual")
        await _nothing_but(log, _fact("things/other", 1), _fact("things/1", 1))


@_promise
async def expecting_another_version_than_stands_is_a_conflict_that_tells_which(open: Open) -> None:
    """Too old and too new alike, through every handle; expecting the right one succeeds."""
    async with open("all") as log, open("all") as other:
        await _add(log, "things/1", 1, 2, 3, expect=0)
        for handle, wrong in product((log, other), (0, 1, 2, 4, 2**40)):
            error = await _raises(Conflict, _add, handle, "things/1", 9, expect=wrong)
            _same((error.stream, error.expected, error.actual), ("things/1", wrong, 3), "stream, expected and actual")
        error = await _raises(Conflict, _add, log, "things/2", 1, expect=1)
        _same(error.actual, 0, "the version of a stream that is not yet")
        _same((await _add(other, "things/1", 4, 5, expect=3)).version, 5, "the version")
        _same((await _add(log, "things/1", 6, expect=5)).version, 6, "the version")


@_promise
async def of_many_that_expect_the_same_version_one_wins(open: Open) -> None:
    """And each loser learns the version that the winner made."""
    async with open("all") as log, open("all") as other:
        for round in range(3):
            calls = [_add((log, other)[n % 2], "things/1", round * 100 + n, expect=round) for n in range(20)]
            results = await _all(calls)
            won = [done for done in results if isinstance(done, Appended)]
            lost = [error.actual for error in results if isinstance(error, Conflict)]
            _same((len(won), lost), (1, [round + 1] * 19), "winners and what the losers were told")
        _same([entry.version for entry in await _read(log)], [1, 2, 3], "the versions that stand")


@_promise
async def the_verdicts_of_concurrent_appends_are_their_own(open: Open) -> None:
    """A bad append among good ones takes none of them with it, whatever is wrong with it."""
    async with open("all") as log:
        await _add(log, "things/1", 1)
        old = await log.claim("slot", "a")
        new = await log.claim("slot", "b", over=old)
        bad = {"e\u0301": "NFD", "\ud800": "a lone surrogate", "a\0b": "NUL"}
        calls: list[Callable[[], Awaitable[Appended]]] = [
            lambda: _add(log, "things/2", 1, expect=0),
            lambda: _add(log, "things/1", 2, expect=7),
            lambda: _add(log, "things/2", 2, expect=1, fence=new),
            lambda: _add(log, "things/2", 3, fence=old),
            lambda: log.append("things/1", [_fact("things/1", 1, body=b"1")], repeat=True),
            *(lambda s=f"things/{key}": log.append(s, _facts(s, 1)) for key in bad),
            lambda: log.append("things/2", [_fact("things/2", 3), msgspec.structs.replace(_fact("things/2", 4), type="\ud800")]),
            lambda: log.append("things/2", [_fact("things/2", 3), msgspec.structs.replace(_fact("things/2", 4), id="\udfff")]),
            lambda: _add(log, "things/2", 4, expect=2),
        ]  # fmt: skip
        results = await asyncio.gather(*(_verdict(call) for call in calls))
        wanted = [Appended, Conflict, Appended, Fenced, IdReused, Refused, Refused, Refused, Refused, Refused, Appended]
        _same([type(result).__name__ for result in results], [kind.__name__ for kind in wanted], "the verdicts")
        await _nothing_but(log, _fact("things/1", 1), *_facts("things/2", 1, 2, 4))


async def _verdict(call: Callable[[], Awaitable[Appended]]) -> Appended | CauceError:
    try:
        return await call()
    except CauceError as error:
        return error


@_promise
async def after_every_refusal_the_next_append_works(open: Open) -> None:
    """No verdict leaves anything behind, neither an entry nor a log that has stopped."""
    async with open("all") as log:
        old = await log.claim("slot", "a")
        await log.release(old)
        await _add(log, "things/1", 0)
        wrong: list[tuple[type[CauceError], Callable[[], Awaitable[object]]]] = [
            (Conflict, lambda: _add(log, "things/1", 99, expect=99)),
            (Fenced, lambda: _add(log, "things/1", 99, fence=old)),
            (IdReused, lambda: log.append("things/1", [_fact("things/1", 0, type="Other")], repeat=True)),
            (Refused, lambda: log.append("things/1", [])),
            (Refused, lambda: _add(log, "things/1", *range(APPEND_ENTRIES + 1))),
            (Refused, lambda: log.append("things/1", _facts("things/2", 99))),
            (Refused, lambda: _add(log, "things", 99)),
            (Refused, lambda: _add(log, "things/a\r\nb", 99)),
            (Refused, lambda: log.append("things/1", [msgspec.structs.replace(_fact("things/1", 99), body=None)])),
            (Refused, lambda: log.read(Filter("things"))),
            (Refused, lambda: log.claim("", "a")),
            (Refused, lambda: log.claim("\ud800", "a")),
            (Fenced, lambda: log.beat(old)),
        ]
        for n, (error, call) in enumerate(wrong, start=1):
            await _raises(error, call)
            _same(
                (await _add(log, "things/1", n, expect=n)).version,
                n + 1,
                f"the version after {error.__name__}",
            )
        await _nothing_but(log, *_facts("things/1", *range(len(wrong) + 1)))


@_promise
async def of_several_things_that_are_wrong_the_first_is_told(open: Open) -> None:
    """What no log takes, then a stale fence, then an id that is used, then the version; a put asks the first only."""
    async with open("all") as log, open("last") as last:
        await _add(log, "things/1", 1)
        await _put(last, "things/1", 5)
        old = await log.claim("slot", "a")
        await log.claim("slot", "b", over=old)
        used = _fact("things/1", 1, body=b"1")
        unlawful: list[dict[str, object]] = [
            {"stream": "things"}, {"stream": "things/a\nb"}, {"type": ""}, {"type": " a"}, {"id": ""}, {"id": "a\0b"},
            {"body": b"x" * (ENTRY_BYTES + 1)},
        ]  # fmt: skip
        for change in unlawful:
            entry = msgspec.structs.replace(used, **change)
            await _raises(Refused, log.append, entry.stream, [entry], expect=7, fence=old, repeat=True)
            await _raises(Refused, last.put, entry.stream, 4, entry)
        await _raises(Fenced, log.append, "things/1", [used], expect=7, fence=old, repeat=True)
        await _raises(IdReused, log.append, "things/1", [used], expect=7, repeat=True)
        await _raises(Conflict, log.append, "things/1", [used], expect=7)
        await _nothing_but(log, _fact("things/1", 1))
        await _nothing_but(last, _fact("things/1", 5))


# ------------------------------------------------------------------------------------------------------- repeat


@_promise
async def a_repeat_gives_the_first_result_again(open: Open) -> None:
    """The same entry once more is told where it stands, and nothing is written: through every handle, after later
    entries, and even when what it expects is long past. Time and trace of the envelope may differ."""
    async with open("all") as log, open("all") as other:
        first = await _add(log, "things/1", 1, expect=0, repeat=True)
        _same(first.repeated, False, "repeated")
        await _add(log, "things/1", 2, 3)
        again = [_fact("things/1", 1, time=1_800_000_000_000_000)]
        for handle, expect in product((log, other), (0, None, 77)):
            result = await handle.append("things/1", again, expect=expect, repeat=True)
            _same(result, Appended(first.version, first.position, True), "the result of a repeat")
        await _nothing_but(log, *_facts("things/1", 1, 2, 3))


@_promise
async def a_repeat_of_many_entries_is_a_unit(open: Open) -> None:
    """All of them are compared, and the result is that of the last one."""
    async with open("all") as log:
        await _add(log, "things/1", 0)
        first = await _add(log, "things/1", 1, 2, 3, repeat=True)
        _same(
            await _add(log, "things/1", 1, 2, 3, repeat=True),
            Appended(4, first.position, True),
            "the repeat",
        )
        for others in (
            [*_facts("things/1", 1, 2), _fact("things/1", 3, body=b"{}")],
            [_fact("things/1", 1), _fact("things/1", 2, type="Other"), _fact("things/1", 3)],
            _facts("things/1", 1, 2, 3, 4),
        ):
            await _raises(IdReused, log.append, "things/1", others, repeat=True)
        await _nothing_but(log, *_facts("things/1", 0, 1, 2, 3))


@_promise
async def an_id_with_another_body_type_or_schema_is_refused(open: Open) -> None:
    """It is no repeat but a mistake; the stream stays as it is, also where `expect` would be right."""
    async with open("all") as log:
        await _add(log, "things/1", 1, 2)
        for other in (
            _fact("things/1", 1, body=b'{"n":2}'),
            _fact("things/1", 1, body=b'{"n": 1}'),
            _fact("things/1", 1, body=b""),
            _fact("things/1", 1, type="counted"),
            _fact("things/1", 1, schema=2),
        ):
            await _raises(IdReused, log.append, "things/1", [other], expect=2, repeat=True)
        await _nothing_but(log, *_facts("things/1", 1, 2))


@_promise
async def an_id_is_looked_for_in_its_own_stream_only_and_only_when_asked(open: Open) -> None:
    """The scope of a repeat is the stream; and no server's window of time takes away what is not to be looked up."""
    async with open("all") as log:
        one = _fact("things/1", 1)
        two = msgspec.structs.replace(one, stream="things/2")
        await _add(log, "things/2", 2)
        for entry in (one, two):
            _same(
                await _version(log.append(entry.stream, [entry], repeat=True)),
                (1 + (entry is two), False),
                f"the first in {entry.stream}",
            )
        _same(await _version(log.append("things/1", [one])), (2, False), "an append that is no repeat")
        _same(await _version(log.append("things/1", [one], repeat=True)), (1, True), "a repeat of what stands twice")
        await _nothing_but(log, _fact("things/2", 2), one, two, one)


async def _version(call: Awaitable[Appended]) -> tuple[int, bool]:
    done = await call
    return done.version, done.repeated


@_promise
async def a_repeat_is_found_behind_others_on_their_way(open: Open) -> None:
    """What stands is not written again because something else of its stream is asked for just before it."""
    async with open("all") as log:
        first = await _add(log, "things/1", 1, repeat=True)
        second, again = await asyncio.gather(_add(log, "things/1", 2), _add(log, "things/1", 1, repeat=True))
        _same(again, Appended(first.version, first.position, True), "the result of the repeat")
        _same(second.version, 2, "the version of the other")
        await _nothing_but(log, *_facts("things/1", 1, 2))


@_promise
async def repeats_on_the_way_at_once_are_written_once(open: Open) -> None:
    """The second may come before the first is done, in the same turn, or through another handle."""
    async with open("all") as log, open("all") as other:
        for n in range(1, 4):
            calls = [_add((log, other)[m % 2], "things/1", n, n + 100, repeat=True) for m in range(12)]
            calls += [_add(log, "things/1", n, n + 100, repeat=True) for _ in range(6)]
            results = await asyncio.gather(*calls)
            _same({done.version for done in results}, {2 * n}, "the versions told")
            _same(sum(not done.repeated for done in results), 1, "results that say they were written")
        await _nothing_but(log, *_facts("things/1", 1, 101, 2, 102, 3, 103))


# ------------------------------------------------------------------------------------------------ claims, fences


@_promise
async def a_fence_rises_with_every_holder(open: Open) -> None:
    """By taking over, and by claiming what was released; through every handle; each name for itself."""
    async with open("all") as log, open("all") as other:
        claims = [await log.claim("slot/1", "a")]
        claims.append(await other.claim("slot/1", "b", over=claims[-1]))
        await other.release(claims[-1])
        claims.append(await log.claim("slot/1", "c"))
        claims.append(await log.claim("slot/1", "c", over=claims[-1]))
        fences = [claim.fence for claim in claims]
        _holds(fences == sorted(set(fences)) and fences[0] > 0, f"fences do not rise: {fences}")
        _same(
            [(claim.name, claim.owner) for claim in claims], [("slot/1", owner) for owner in "abcc"], "names and owners"
        )
        _same((await log.claim("slot/2", "d")).owner, "d", "the owner of another name")
        await _add(log, "things/1", 1, fence=claims[-1])
        await _raises(Fenced, _add, log, "things/1", 2, fence=claims[0])


@_promise
async def a_name_that_is_held_is_held_against_all(open: Open) -> None:
    """Whoever else claims it, its holder too, learns of the claim that stands, and nothing changes."""
    async with open("all") as log, open("all") as other:
        stands = await log.claim("slot", "a")
        for handle, owner in product((log, other), "ab"):
            error = await _raises(Held, handle.claim, "slot", owner)
            _same(error.claim, stands, "the claim that Held carries")
        await _add(other, "things/1", 1, fence=stands)
        async with open("last") as elsewhere:
            _same((await elsewhere.claim("slot", "b")).owner, "b", "who holds the name in another log")


@_promise
async def only_the_standing_fence_takes_a_name_over(open: Open) -> None:
    """An older fence, a newer one, or the right one of another name does not."""
    async with open("all") as log, open("all") as other:
        first = await log.claim("slot", "a")
        stands = await other.claim("slot", "b", over=first)
        wrong = [
            first,
            Claim("slot", "b", stands.fence + 1),
            Claim("slot", "b", 0),
            Claim("elsewhere", "b", stands.fence),
        ]
        for over in wrong:
            error = await _raises(Held, log.claim, "slot", "c", over=over)
            _same(error.claim, stands, "the claim that Held carries")
        _holds((await log.claim("slot", "c", over=stands)).fence > stands.fence, "the fence did not rise")
        await _raises(Fenced, _add, other, "things/1", 1, fence=stands)


@_promise
async def a_stale_fence_writes_nothing(open: Open) -> None:
    """From the moment of the take-over, through every handle, whatever else the append says; the new holder writes."""
    async with open("all") as log, open("all") as other:
        old = await log.claim("slot", "a")
        await _add(log, "things/1", 1, fence=old)
        new = await other.claim("slot", "b", over=old)
        for handle, expect, repeat in product((log, other), (None, 1), (False, True)):
            for n in (1, 2):
                await _raises(
                    Fenced, handle.append, "things/1", _facts("things/1", n), expect=expect, fence=old, repeat=repeat
                )
        await _add(log, "things/1", 2, expect=1, fence=new)
        await _raises(Fenced, _add, log, "things/1", 3, fence=Claim("never claimed", "a", 1))
        await _nothing_but(log, *_facts("things/1", 1, 2))


@_promise
async def a_claim_that_no_log_gave_is_fenced(open: Open) -> None:
    """Whatever it names and counts: nothing is written under it, it does not beat, and to let go of it does nothing."""
    async with open("all") as log:
        stands = await log.claim("slot", "a")
        await _add(log, "things/1", 1, fence=stands)
        names = ("", "a\0b", "a\nb", "\ud800", "e\u0301", "x" * 257, "x" * 100_000, "slot/1", "things/1", *HOSTILE[:20])
        numbers = (0, -1, stands.fence + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1)
        forged = [Claim(name, "a", stands.fence) for name in names] + [Claim("slot", "a", number) for number in numbers]
        for claim in (*forged, Claim("slot", "a", stands.fence, 2**63 - 1), Claim("slot", "a", stands.fence, -1)):
            await _raises(Fenced, log.beat, claim)
            await log.release(claim)
            if claim.fence != stands.fence or claim.name != "slot":
                await _raises(Fenced, _add, log, "things/1", 2, fence=claim)
        await _add(log, "things/1", 2, expect=1, fence=stands)
        _same((await _raises(Held, log.claim, "slot", "b")).claim, stands, "the claim that stands")


@_promise
async def a_fence_takes_nothing_away_from_what_is_expected(open: Open) -> None:
    """Under a fence versions count, and expectations are checked, as without one; also where others write, too."""
    async with open("all") as log, open("all") as other:
        claim = await log.claim("things/3", "a")
        await _add(log, "things/1", 0, expect=0, fence=claim)
        await _add(other, "things/1", 1)
        error = await _raises(Conflict, _add, log, "things/1", 2, expect=1, fence=claim)
        _same(error.actual, 2, "the version that the conflict tells")
        await _add(other, "things/1", 2, expect=2, fence=claim)
        _same((await _add(log, "things/1", 3, fence=claim)).version, 4, "the version")
        calls = [_add((log, other)[n % 2], f"things/{n % 3}", n, fence=claim if n % 5 else None) for n in range(10, 70)]
        await asyncio.gather(*calls)
        for key, before in enumerate((0, 4, 0)):
            versions = [entry.version for entry in await _read(log, Filter(f"things/{key}"))]
            _same(versions, list(range(1, before + 21)), f"the versions of things/{key}")


@_promise
async def claims_and_beats_take_their_place_among_the_appends(open: Open) -> None:
    """In the order of the calls: what was asked for before has its verdict by then, and is fenced by none of them."""
    async with open("all") as log:
        claim, last, numbers = await log.claim("slot", "a"), Claim("slot", "a", 0), iter(range(1000))

        def some() -> list[asyncio.Future[Appended]]:
            return [_add(log, f"things/{n % 4}", n, fence=claim) for _, n in zip(range(30), numbers, strict=False)]

        for step in ("beat", "take over", "beat", "release"):
            futures, last = some(), claim
            if step == "beat":
                await log.beat(claim)
            elif step == "take over":
                claim = await log.claim("slot", "b", over=claim)
            else:
                await log.release(claim)
            _same([future.done() for future in futures], [True] * 30, f"verdicts that are there after: {step}")
            _holds(all(done.position > 0 for done in await asyncio.gather(*futures)), "an append has no position")
        await _raises(Fenced, _add, log, "things/0", 1000, fence=last)
        _same(len(await _read(log)), 120, "the number of entries")


@_promise
async def after_the_first_entry_of_a_new_holder_none_of_the_old_one_follows(open: Open) -> None:
    """Also for what was on the way when the name changed hands."""
    async with open("all") as log, open("all") as other:
        old = await log.claim("slot", "a")
        before = [_add(log, "things/1", n, fence=old) for n in range(100)]
        new = await other.claim("slot", "b", over=old)
        after = [other.append("things/1", [_fact("things/1", n, type="New")], fence=new) for n in range(100, 110)]
        late = [_add(log, "things/1", n, fence=old) for n in range(200, 220)]
        results = await _all([*before, *late])
        _holds(all(isinstance(done, Fenced | Appended) for done in results), f"other verdicts: {_short(results)}")
        _same([type(done) for done in results[100:]], [Fenced] * 20, "the verdicts of what came after the take-over")
        await asyncio.gather(*after)
        types = [entry.type for entry in await _read(log)]
        _same(types, sorted(types), "the old holder's entries, then the new one's")
        _same(
            types.count("Counted"),
            sum(isinstance(done, Appended) for done in results),
            "the old holder's entries that were acknowledged",
        )


@_promise
async def a_released_name_is_free_and_its_last_holder_fenced(open: Open) -> None:
    """To release twice, or what another holds by now, does nothing."""
    async with open("all") as log, open("all") as other:
        first = await log.claim("slot", "a")
        await log.release(first)
        await _raises(Fenced, _add, log, "things/1", 1, fence=first)
        await _raises(Fenced, other.beat, first)
        second = await other.claim("slot", "b")
        await log.release(first)
        await other.release(first)
        await _add(other, "things/1", 1, fence=second)
        _same((await _raises(Held, log.claim, "slot", "c")).claim, second, "the claim that stands")
        await log.release(second)
        await log.release(second)
        _holds((await log.claim("slot", "a", over=first)).fence > second.fence, "the fence did not rise")


@_promise
async def a_beat_is_seen_by_the_rivals(open: Open) -> None:
    """It rises, the fence stays; the claim stays good whichever beat it was taken from."""
    async with open("all") as log, open("all") as other:
        claim = await log.claim("slot", "a")
        beats = [claim.beat]
        for _ in range(3):
            later = await log.beat(claim)
            _same(
                (later.name, later.owner, later.fence),
                (claim.name, claim.owner, claim.fence),
                "what a beat leaves alone",
            )
            _same((await _raises(Held, other.claim, "slot", "b")).claim, later, "the claim that Held carries")
            beats.append(later.beat)
            claim = later
        _holds(beats == sorted(set(beats)), f"beats do not rise: {beats}")
        await _add(log, "things/1", 1, fence=Claim("slot", "a", claim.fence))
        new = await other.claim("slot", "b", over=Claim("slot", "a", claim.fence))
        await _raises(Fenced, log.beat, claim)
        await _add(other, "things/1", 2, fence=await other.beat(new))


@_promise
async def of_many_that_claim_a_name_one_gets_it(open: Open) -> None:
    """When it is free, and when all take over from the same holder."""
    async with open("all") as log, open("all") as other:
        over: Claim | None = None
        for _ in range(4):
            tries = [(log, other)[n % 2].claim("slot", str(n), over=over) for n in range(10)]
            results = await asyncio.gather(*tries, return_exceptions=True)
            won = [claim for claim in results if isinstance(claim, Claim)]
            _same((len(won), sum(isinstance(error, Held) for error in results)), (1, 9), "winners and losers")
            _holds(over is None or won[0].fence > over.fence, "the fence did not rise")
            over = won[0]
            _same((await _raises(Held, log.claim, "slot", "x")).claim, over, "the claim that stands")


@_promise
async def claims_outlive_their_handle_and_are_no_entries(open: Open) -> None:
    """They stand until released or taken over; a reader never meets them."""
    async with open("all") as log:
        claim = await log.beat(await log.claim("slot", "a"))
        await _add(log, "things/1", 1, fence=claim)
        await log.claim("$claim", "a")
        await log.release(await log.claim("things/1", "a"))
    async with open("all") as log:
        _same((await _raises(Held, log.claim, "slot", "b")).claim, claim, "the claim that stands")
        await _add(log, "things/1", 2, expect=1, fence=claim)
        await _nothing_but(log, *_facts("things/1", 1, 2))


# --------------------------------------------------------------------------------------------------------- also


def _also(stream: str, *numbers: int, expect: int | None = None) -> Also:
    return Also(stream, _facts(stream, *numbers), expect)


@_promise
async def what_an_append_also_writes_stands_with_it_or_not_at_all(open: Open) -> None:
    """Right behind its own entries, in the order in which it is named; of one wrong expectation nothing is left."""
    async with open("all") as log, open("all") as other:
        first = await log.append(
            "things/1", _facts("things/1", 1, 2), also=[_also("_tags/a", 1, expect=0), _also("more/b", 1, 2)]
        )
        stands = [*_facts("things/1", 1, 2), _fact("_tags/a", 1), *_facts("more/b", 1, 2)]
        await _nothing_but(log, *stands)
        _same((first.version, first.position), (2, (await _read(log))[1].position), "where the own entries end")
        for handle, wrong in product((log, other), ("things/1", "_tags/a", "more/b", "more/new")):
            expected = {"things/1": 2, "_tags/a": 1, "more/b": 2, "more/new": 0}
            actual = expected[wrong]
            expected[wrong] += 1
            own = expected.pop("things/1")
            also = [_also(stream, 9, expect=version) for stream, version in expected.items()]
            error = await _raises(Conflict, handle.append, "things/1", _facts("things/1", 9), expect=own, also=also)
            _same((error.stream, error.expected, error.actual), (wrong, actual + 1, actual), "what the conflict tells")
        await _nothing_but(log, *stands)
        also = [_also("more/b", 3, expect=2), _also("_tags/a", 2, 3, expect=1)]
        done = await other.append("things/1", _facts("things/1", 3), expect=2, also=also)
        await _nothing_but(log, *stands, _fact("things/1", 3), _fact("more/b", 3), *_facts("_tags/a", 2, 3))
        entries = await _read(other)
        _same([each.version for each in entries], [1, 2, 1, 1, 2, 3, 3, 2, 3], "the versions")
        _same(done.position, entries[5].position, "the position told")
        _same([each.version for each in await _read(log, Filter("_tags/a"))], [1, 2, 3], "the other stream by itself")
        _same((await _add(log, "_tags/a", 4, expect=3)).version, 4, "an append to the other stream")


@_promise
async def of_several_streams_that_are_wrong_the_first_is_told(open: Open) -> None:
    """What no log takes, a stale fence, a used id, the own version, then those of the others in their order."""
    async with open("all") as log:
        await log.append("things/1", _facts("things/1", 1), also=[_also("_tags/a", 1)])
        old = await log.claim("slot", "a")
        await log.claim("slot", "b", over=old)
        used, also = [_fact("things/1", 1, body=b"1")], [_also("_tags/a", 2, expect=7), _also("_tags/b", 1, expect=8)]
        unlawful = [*also, _also("things", 1)]
        await _raises(Refused, log.append, "things/1", used, expect=7, fence=old, repeat=True, also=unlawful)
        await _raises(Fenced, log.append, "things/1", used, expect=7, fence=old, repeat=True, also=also)
        await _raises(IdReused, log.append, "things/1", used, expect=7, repeat=True, also=also)
        for own, others, told in (
            (7, also, "things/1"),
            (1, also, "_tags/a"),
            (1, also[::-1], "_tags/b"),
            (None, also[1:], "_tags/b"),
        ):
            error = await _raises(Conflict, log.append, "things/1", _facts("things/1", 2), expect=own, also=others)
            _same(error.stream, told, "the stream of the conflict")
        await _nothing_but(log, _fact("things/1", 1), _fact("_tags/a", 1))


@_promise
async def of_many_that_also_expect_one_version_one_wins(open: Open) -> None:
    """Through every handle, whatever they write to themselves; a loser has written to neither stream."""
    async with open("all") as log, open("all") as other:
        for round in range(3):
            calls = [
                (log, other)[n % 2].append(
                    f"things/{n}", _facts(f"things/{n}", round), also=[_also("_tags/a", round * 100 + n, expect=round)]
                )
                for n in range(20)
            ]
            results = await _all(calls)
            lost = [(error.stream, error.actual) for error in results if isinstance(error, Conflict)]
            _same(lost, [("_tags/a", round + 1)] * 19, "what the losers were told")
        entries = await _read(log)
        _same(len(entries), 6, "the number of entries")
        for own, tag in zip(entries[::2], entries[1::2], strict=True):
            _same((tag.stream, own.domain), ("_tags/a", "things"), "what stands side by side")


@_promise
async def what_is_also_written_takes_its_place_among_the_appends(open: Open) -> None:
    """In the order of the calls, without waiting: what one also writes the next may expect, and the other way round."""
    async with open("all") as log, open("all") as other:
        claim = await log.claim("things/3", "a")
        calls = list[asyncio.Future[Appended]]()
        for n in range(0, 40, 2):
            # "a" and "1" may lie in one slot or in two; a fence changes nothing about what is expected.
            also = [_also("things/a", n, expect=n)]
            fence = claim if n % 4 else None
            calls.append(log.append("things/1", _facts("things/1", n), expect=n, fence=fence, also=also))
            also = [_also("things/1", n + 1, expect=n + 1)]
            calls.append(log.append("things/a", _facts("things/a", n + 1), expect=n + 1, fence=fence, also=also))
        results = await asyncio.gather(*calls)
        _same([done.version for done in results], list(range(1, 41)), "the versions")
        for key in ("1", "a"):
            versions = [entry.version for entry in await _read(other, Filter(f"things/{key}"))]
            _same(versions, list(range(1, 41)), f"the versions of things/{key}")
        both = [
            (log, other)[n % 2].append(f"more/{n % 3}", _facts(f"more/{n % 3}", n), also=[_also("_tags/a", n)])
            for n in range(60)
        ]
        await asyncio.gather(*both)
        tags = [entry.version for entry in await _read(log, Filter("_tags/a"))]
        _same(tags, list(range(1, 61)), "the versions where all write and expect nothing")


@_promise
async def a_repeat_finds_the_first_result_whatever_it_also_says(open: Open) -> None:
    """What it also writes is neither compared nor written again; new ids are written under their own expectations."""
    async with open("all") as log, open("all") as other:
        done = await log.append(
            "things/1", _facts("things/1", 1), expect=0, repeat=True, also=[_also("_tags/a", 1, expect=0)]
        )
        for handle, also in product(
            (log, other), ([], [_also("_tags/a", 1, expect=0)], [_also("_tags/b", 5, expect=3)])
        ):
            again = await handle.append("things/1", _facts("things/1", 1), expect=0, repeat=True, also=also)
            _same(again, Appended(1, done.position, True), "the repeat")
        await _raises(
            Conflict, log.append, "things/1", _facts("things/1", 2), repeat=True, also=[_also("_tags/a", 2, expect=0)]
        )
        # An id of the other stream is no repeat.
        await log.append("things/1", _facts("things/1", 2), repeat=True, also=[_also("_tags/a", 1, expect=1)])
        await _nothing_but(
            log, *(_fact(stream, n) for stream, n in (("things/1", 1), ("_tags/a", 1), ("things/1", 2), ("_tags/a", 1)))
        )


@_promise
async def a_stale_fence_also_writes_nothing_else(open: Open) -> None:
    """Neither where its name is that of a slot nor where it is not; the new holder writes to both."""
    for name in ("slot", f"things/{slot_of('1')}"):
        stream = f"_tags/{name.replace('/', '.')}"
        async with open("all") as log, open("all") as other:
            before = [_content(entry) for entry in await _read(log)]
            old = await log.claim(name, "a")
            await log.append("things/1", _facts("things/1", 1), fence=old, also=[_also(stream, 1, expect=0)])
            new = await other.claim(name, "b", over=old)
            for handle in (log, other):
                await _raises(
                    Fenced, handle.append, "things/1", _facts("things/1", 2), fence=old, also=[_also(stream, 2)]
                )
            await other.append("things/1", _facts("things/1", 3), fence=new, also=[_also(stream, 3, expect=1)])
            await _add(log, stream, 4, expect=2)
            stands = [
                _content(_fact(each, n))
                for each, n in (("things/1", 1), (stream, 1), ("things/1", 3), (stream, 3), (stream, 4))
            ]
            _same([_content(entry) for entry in await _read(log)], before + stands, "what stands")


@_promise
async def what_no_log_takes_is_not_taken_beside_either(open: Open) -> None:
    """A stream named twice or wrongly, nothing to write, another's entry, too many or too much in all."""
    async with open("all") as log:
        wrong: list[list[Also]] = [
            [_also("things/1", 9)],
            [_also("_tags/a", 1), _also("_tags/a", 2)],
            [Also("_tags/a", [])],
            [Also("_tags/a", [_fact("_tags/b", 1)])],
            [_also("_tags/a\nb", 1)],
            [_also("tags", 1)],
            [Also("_tags/a", [_fact("_tags/a", 1, type=" a")])],
            [_also("_tags/a", *range(APPEND_ENTRIES))],
            [Also(f"_tags/{n}", [_fact(f"_tags/{n}", 1, body=b"x" * (ENTRY_BYTES - 1000))]) for n in range(24)],
        ]
        for also in wrong:
            await _raises(Refused, log.append, "things/1", _facts("things/1", 1), also=also)
        await log.append("things/1", _facts("things/1", 1), also=[_also("_tags/a", *range(APPEND_ENTRIES - 1))])
        _same(len(await _read(log)), APPEND_ENTRIES, "the number of entries of the longest append")


# ---------------------------------------------------------------------------------------------------------- put


@_promise
async def put_keeps_the_last_of_each_stream_and_moves_it_to_the_end(open: Open) -> None:
    """Versions are the writer's own and may leap; every stream is read once, in the order of the last puts."""
    async with open("last") as log, open("last") as other:
        first = await _put(log, "things/1", 3)
        second = await _put(log, "things/2", 1)
        third = await _put(other, "things/1", 70)
        _same(
            [(done.version, done.repeated) for done in (first, second, third)],
            [(3, False), (1, False), (70, False)],
            "the results",
        )
        _holds(first.position < second.position < third.position, "positions do not rise")
        for handle in (log, other):
            _same(
                _places(await _read(handle)),
                [("things/2", 1, second.position), ("things/1", 70, third.position)],
                "the places",
            )
            await _nothing_but(handle, _fact("things/2", 1), _fact("things/1", 70))
            _same(await handle.head(), third.position, "the head")


@_promise
async def what_is_not_newer_is_not_put_and_told_what_stands(open: Open) -> None:
    """The same version, with whatever body, and any older one: no error, no change, `repeated`."""
    async with open("last") as log, open("last") as other:
        await _put(log, "things/1", 4)
        stands = await _put(log, "things/1", 5)
        await _put(log, "things/2", 9)
        for handle, version in product((log, other), (1, 4, 5)):
            done = await handle.put("things/1", version, _fact("things/1", version, body=b'"late"'))
            _same(done, Appended(5, stands.position, True), f"the result of version {version}")
        await _nothing_but(log, _fact("things/1", 5), _fact("things/2", 9))


@_promise
async def of_many_puts_the_newest_stands(open: Open) -> None:
    """In whatever order, and through whichever handle, they come in at once."""
    async with open("last") as log, open("last") as other:
        order = [n * 7 % 20 + 1 for n in range(20)]
        calls = [_put((log, other)[n % 2], f"things/{m}", version) for n, version in enumerate(order) for m in range(3)]
        results = await asyncio.gather(*calls)
        _holds(
            all(done.version >= version for done, version in zip(results[::3], order, strict=True)),
            "a put was told of an older version than its own",
        )
        entries = await _read(other)
        _same(
            sorted((entry.stream, entry.version) for entry in entries),
            [(f"things/{m}", 20) for m in range(3)],
            "what stands",
        )
        _same([entry.body for entry in entries], [b'{"n":20}'] * 3, "the bodies")


@_promise
async def a_tombstone_is_kept_and_read_like_any_other_entry(open: Open) -> None:
    """An empty body says that the thing is gone; something newer may bring it back."""
    async with open("last") as log:
        await _put(log, "things/1", 1)
        await log.put("things/1", 2, _fact("things/1", 2, body=b""))
        await _put(log, "things/2", 1)
        _same(
            [(entry.key, entry.version, entry.body) for entry in await _read(log)],
            [("1", 2, b""), ("2", 1, b'{"n":1}')],
            "what stands",
        )
    async with open("last") as log:
        _same(
            (await _put(log, "things/1", 1)).repeated,
            True,
            "an older version after a tombstone is a no-op",
        )
        await _put(log, "things/1", 3)
        await _nothing_but(log, _fact("things/2", 1), _fact("things/1", 3))


@_promise
async def a_reader_misses_nothing_while_puts_move(open: Open) -> None:
    """Who has looked to P holds what stands at or below P. Who has looked to the head, as it is after that look, holds
    something of every stream that ever was."""
    async with open("last") as log, open("last") as other:
        await asyncio.gather(*(_put(log, f"things/{n}", 1) for n in range(40)))
        held, stands, looked, version = dict[str, int](), dict[str, tuple[int, int]](), 0, 1
        while looked < await other.head():
            page = await other.read(after=looked, limit=5)
            _check_page(page, looked, 5)
            _holds(page.looked > looked, f"a read after {looked} did not get on")
            for entry in page.entries:
                _holds(
                    entry.version > held.get(entry.stream, 0),
                    f"{entry.stream} went from {held.get(entry.stream)} to {entry.version}",
                )
                held[entry.stream] = entry.version
            looked = page.looked
            if version < 12:
                # What has been read, and what has not, moves on under the reader.
                version += 1
                await asyncio.gather(*(_put(log, f"things/{n}", version) for n in range(version, 40, version)))
            stands = {entry.stream: (entry.version, entry.position) for entry in await _read(log)}
            missing = [
                stream for stream, (v, position) in stands.items() if position <= looked and held.get(stream) != v
            ]
            _same(missing, [], f"streams missed by a reader that looked to {looked}")
        _same(held, {stream: v for stream, (v, _) in stands.items()}, "what the reader holds in the end")
        _same(len(held), 40, "the number of streams")


@_promise
async def a_thing_that_stands_is_found_while_it_moves(open: Open) -> None:
    """Who asks for one stream gets its entry, however fast it is put anew: at no moment does it stand nowhere."""
    clock = SystemClock()
    async with open("last") as log, open("last") as other:
        await _put(log, "things/1", 1)

        async def move() -> None:
            for version in range(2, 300, 3):
                await asyncio.gather(*(_put(log, f"things/{n}", version + n) for n in (0, 1, 2)))

        moving, seen = asyncio.create_task(move()), 1
        while not moving.done():
            page = await other.read(Filter("things/1"))
            _same(len(page.entries), 1, "the number of entries of a stream that stands")
            _holds(page.looked >= page.entries[0].position, "an entry is above how far was looked")
            _holds(page.entries[0].version >= seen, f"version {page.entries[0].version} after {seen}")
            seen = page.entries[0].version
            await clock.sleep(0)
        await moving
        _same([entry.version for entry in await _read(other, Filter("things/1"))], [300], "the version in the end")


@_promise
async def what_keeps_all_takes_no_put_and_what_keeps_the_last_no_append(open: Open) -> None:
    """Each would break what the other promises: versions without holes, and one entry of each stream."""
    async with open("all") as everything, open("last") as last:
        await _raises(Refused, _put, everything, "things/1", 5)
        await _raises(Refused, _add, last, "things/1", 1)
        await _add(everything, "things/1", 1, expect=0)
        _same((await _put(last, "things/1", 5)).version, 5, "the version")
        await _raises(Refused, last.put, "things/1", 2**63, _fact("things/1", 6))
        await _raises(Refused, _put, last, "things/2", 0)
        await _nothing_but(everything, _fact("things/1", 1))
        await _nothing_but(last, _fact("things/1", 5))


# ------------------------------------------------------------------------------------------------------- forget

_BEGAN = 1_700_000_000_000_000


async def _wishes(log: Log) -> list[Entry]:
    """Ninety entries of two domains and nine keys, each a second after the one before it."""
    for n in range(90):
        stream = f"{('apples', 'pears')[n % 2]}/{n % 9}"
        await log.append(stream, [_fact(stream, n, time=_BEGAN + n * 1_000_000)])
    return await _read(log)


def _in_slot(entry: Entry, domain: str, slot: int) -> bool:
    return entry.domain == domain and slot_of(entry.key) == slot


@_promise
async def what_is_decided_and_old_is_forgotten_and_nothing_else(open: Open) -> None:
    """Of one domain and slot, at or below a place and older than a time; the rest stands as and where it stood."""
    async with open("undecided") as log, open("undecided") as other:
        entries = await _wishes(log)
        _same(len(entries), 90, "the number of entries")
        head, slot = await log.head(), slot_of("3")
        cases = ((70, 30), (40, 60), (70, 60), (70, 60))
        for (upto, old), forgets in zip(cases, (log, other, log, other), strict=True):
            place, before = entries[upto].position, _BEGAN + old * 1_000_000
            left = [
                entry
                for n, entry in enumerate(entries)
                if not (_in_slot(entry, "apples", slot) and n <= upto and entry.meta.time < before)
            ]
            stood = await _read(other)
            removed = await forgets.forget("apples", slot, place, before)
            kept = await _read(other)
            _same(removed, len(stood) - len(kept), "what was removed")
            _same([entry for entry in stood if entry not in left], [e for e in stood if e not in kept], "what is gone")
        kept = await _read(log)
        _holds(0 < len(kept) < 90, f"{len(kept)} of 90 entries are left")
        for handle, limit in product((log, other), (1, 7, 1000)):
            _same(await _read(handle, limit=limit), kept, f"what is left, in pages of {limit}")
            _same(await handle.head(), head, "the head")
            for stream in sorted({entry.stream for entry in entries}):
                own = [entry for entry in kept if entry.stream == stream]
                _same(await _read(handle, Filter(stream), limit=limit), own, f"what is left of {stream}")
            for after in (entries[20].position, entries[50].position):
                rest = [entry for entry in kept if entry.position > after]
                _same(await _read(handle, after=after, limit=limit), rest, f"what is left behind {after}")


@_promise
async def what_lies_behind_the_first_that_is_not_old_stays(open: Open) -> None:
    """Whatever a clock said: a stream loses its beginning only, so that its versions have no holes."""
    async with open("undecided") as log:
        times = (10, 20, 90, 30, 95, 40)
        for n, time in enumerate(times):
            await log.append("things/1", [_fact("things/1", n, time=time)])
        await _add(log, "things/2", 1)
        _same(await log.forget("things", slot_of("1"), 100, 50), 2, "what was removed")
        _same([entry.version for entry in await _read(log, Filter("things/1"))], [3, 4, 5, 6], "the versions")
        _same((await _add(log, "things/1", 9, expect=6)).version, 7, "the version of the next")


@_promise
async def a_stream_of_which_nothing_is_left_begins_again(open: Open) -> None:
    """At version 1, for every handle, whatever it knew; and an id that is gone may be given again."""
    async with open("undecided") as log, open("undecided") as other:
        for handle, n in product((log, other), (1, 2)):
            await _add(handle, "things/1", n, repeat=True)
        await _add(other, "things/1", 1, repeat=True)
        await _add(log, "pears/1", 1, 2)
        _same(await other.forget("things", slot_of("1"), await log.head(), 2**62), 2, "what was removed")
        for n, handle in enumerate((log, other, log, other)):
            done = await _add(handle, "things/1", (2, 2, 1, 1)[n], repeat=True)
            _same((done.version, done.repeated), (n // 2 + 1, bool(n % 2)), "what is appended again")
        _same((await _add(other, "things/1", 3, expect=2)).version, 3, "the version of the next")
        for handle in (log, other):
            await _nothing_but(handle, *_facts("pears/1", 1, 2), *_facts("things/1", 2, 1, 3))
            _same([entry.version for entry in await _read(handle, Filter("things/1"))], [1, 2, 3], "the versions")
    async with open("undecided") as log:
        await _nothing_but(log, *_facts("pears/1", 1, 2), *_facts("things/1", 2, 1, 3))
        _same((await _add(log, "things/1", 4)).version, 4, "the version after a new start")


@_promise
async def the_last_entry_is_never_forgotten(open: Open) -> None:
    """It holds the place of the head: positions go on from there, also after a new start."""
    async with open("undecided") as log:
        await _add(log, "things/1", 1, 2)
        done = await _add(log, "things/1", 3)
        _same(await log.forget("things", slot_of("1"), 2**63 - 1, 2**62), 2, "what was removed")
        _same(await log.forget("things", slot_of("1"), 2**63 - 1, 2**62), 0, "what was removed again")
        await _nothing_but(log, _fact("things/1", 3))
    async with open("undecided") as log:
        _same(await log.head(), done.position, "the head after a new start")
        waiting = await _waiting(log, after=done.position)
        later = await _add(log, "things/1", 4)
        _same((later.version, later.position > done.position), (4, True), "what is appended then")
        _same([entry.position for entry in (await waiting).entries], [later.position], "what woke the reader")
        _same(await log.forget("things", slot_of("1"), 2**63 - 1, 2**62), 1, "what was removed then")
        await _nothing_but(log, _fact("things/1", 4))


@_promise
async def facts_and_records_are_never_forgotten(open: Open) -> None:
    """They are kept for good, whoever asks; of commands nothing goes where domain or slot cannot be."""
    async with open("all") as everything, open("last") as last, open("undecided") as log:
        await _add(log, "things/1", 1, 2)
        for domain, slot in (
            ("*", slot_of("1")),
            (">", 1),
            ("", 1),
            ("Things", 1),
            ("th/ings", 1),
            ("things", 16),
            ("things", -1),
        ):
            await _raises(Refused, log.forget, domain, slot, 2**63 - 1, 2**62)
        await _nothing_but(log, *_facts("things/1", 1, 2))
        await _add(everything, "things/1", 1, 2)
        await _put(last, "things/1", 1)
        await _put(last, "things/1", 2)
        for kept in (everything, last):
            await _raises(Refused, kept.forget, "things", slot_of("1"), 2**63 - 1, 2**62)
        await _nothing_but(everything, *_facts("things/1", 1, 2))
        await _nothing_but(last, _fact("things/1", 2))


# --------------------------------------------------------------------------------------------------------- read


async def _filled(log: Log) -> list[Entry]:
    """Sixty entries of three domains, four types and ten keys."""
    for n in range(60):
        stream = f"{('apples', 'pears', '_plums')[n % 3]}/{n % 10}"
        await log.append(stream, [_fact(stream, n, type=("Picked", "Eaten", "Rotten *>.", "Ge\u00e4rgert")[n * 7 % 4])])
    return await _read(log)


def _wanted(filter: Filter, entry: Entry) -> bool:
    return (
        filter.stream in (None, entry.stream)
        and (not filter.domains or entry.domain in filter.domains)
        and (not filter.types or entry.type in filter.types)
        and (not filter.slots or slot_of(entry.key) in filter.slots)
    )


@_promise
async def a_filter_gives_what_it_wants_and_no_more(open: Open) -> None:
    """By stream, domains, types and slots, and by all of them together, in the order of the log."""
    async with open("all") as log, open("all") as other:
        entries = await _filled(log)
        _same(len(entries), 60, "the number of entries")
        streams = (None, "apples/0", "pears/1", "apples/nobody", "nowhere/1")
        domains = (frozenset[str](), frozenset({"apples"}), frozenset({"pears", "_plums"}), frozenset({"nowhere"}))
        types = (
            frozenset[str](),
            frozenset({"Picked"}),
            frozenset({"Rotten *>.", "Ge\u00e4rgert"}),
            frozenset({"picked", "*"}),
        )
        slots = (
            frozenset[int](),
            frozenset({slot_of("0")}),
            frozenset(range(8)),
            frozenset(range(16)) - {slot_of(str(n)) for n in range(10)},
        )
        for parts in product(streams, domains, types, slots):
            filter = Filter(*parts)
            found = await _read(other if filter.stream is None else log, filter)
            _same(_places(found), _places([entry for entry in entries if _wanted(filter, entry)]), f"{filter} gives")


@_promise
async def pages_put_together_are_the_whole(open: Open) -> None:
    """`after` begins behind a position, `limit` bounds the page, and a page says how far it looked."""
    async with open("all") as log:
        entries = await _filled(log)
        _same(len(entries), 60, "the number of entries")
        for filter, limit in product(
            (EVERYTHING, Filter("apples/0"), Filter(types=frozenset({"Eaten"})), Filter(slots=frozenset(range(5)))),
            (1, 2, 7, 60, 10**9),
        ):
            wanted = [entry for entry in entries if _wanted(filter, entry)]
            _same(_places(await _read(log, filter, limit=limit)), _places(wanted), f"{filter} in pages of {limit}")
            for after in (entries[20].position, entries[-1].position):
                rest = [entry for entry in wanted if entry.position > after]
                _same(
                    _places(await _read(log, filter, after=after, limit=limit)),
                    _places(rest),
                    f"{filter} after {after}",
                )


@_promise
async def a_reader_of_what_is_rare_gets_on(open: Open) -> None:
    """Where nothing more matches `looked` goes on to the head, never beyond, so that nobody scans the rest again."""
    async with open("all") as log:
        await _filled(log)
        head = await log.head()
        _holds(head > 0, "the head of a log with entries is 0")
        for filter in (
            EVERYTHING,
            Filter("nowhere/1"),
            Filter(domains=frozenset({"nowhere"})),
            Filter(types=frozenset({"Nothing"})),
            Filter("apples/0"),
        ):
            looked, rounds = 0, 0
            while looked < head:
                page = await log.read(filter, after=looked)
                _holds(
                    looked < page.looked <= head, f"{filter} looked from {looked} to {page.looked}, the head is {head}"
                )
                looked, rounds = page.looked, rounds + 1
            _holds(rounds < 10, f"{filter} took {rounds} reads for 60 entries")
            _same(await log.read(filter, after=head), Page([], head), "what is read after the head")


@_promise
async def without_bodies_all_else_is_the_same(open: Open) -> None:
    """`bodies=False` leaves body and wish None, so that nobody mistakes what was not read for a tombstone."""
    async with open("all") as log:
        entries = [
            sealed(
                "things/1", "Counted", f"id{n}", Meta(n + 1), b'{"n":1}' if n else b"", b'{"type":"Count","body":{}}'
            )
            for n in range(3)
        ]
        await log.append("things/1", entries)
        whole = await _read(log)
        _same(
            [(entry.wish, entry.body) for entry in whole],
            [(entry.wish, entry.body) for entry in entries],
            "wishes and bodies",
        )
        for filter in (EVERYTHING, Filter("things/1"), Filter(types=frozenset({"Counted"}))):
            page = await log.read(filter, bodies=False)
            _same(
                page.entries,
                [msgspec.structs.replace(entry, wish=None, body=None) for entry in whole],
                "entries without bodies",
            )


@_promise
async def envelope_and_body_come_back_byte_for_byte(open: Open) -> None:
    """Now, through another handle, and after a new start; and the digest is right."""
    metas = (
        Meta(1), Meta(2**62, 2**31, "correlation", "causation", "shop:joe", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "k=v,é=ü", 2**62, "Rejected: \U0001f980", 2**62),
    )  # fmt: skip
    bodies = (
        b"{}", b"", b"null", b'{ "a" :\t1.0 , "b":1e2,"a":2 }\n', '{"\U0001f980":"é\u2028\\u0041\\ud83e\\udd80"}'.encode(), b'"' + bytes(range(32, 127)).replace(b'"', b"").replace(b"\\", b"") + b'"',
        b"[" * 64 + b"]" * 64, b"123456789012345678901234567890.10",
    )  # fmt: skip
    wishes = (None, b'{"type":"Do","body":{ "x":1 }}')
    cases = list(product(metas, bodies, wishes))
    entries = [sealed("things/ü *>.", 'T10 Determine … "it" 100 %', f"id-{n}", *case) for n, case in enumerate(cases)]
    async with open("all") as log, open("all") as other:
        await log.append("things/ü *>.", entries)
        first = await _read(log)
        _same([_content(entry) for entry in first], [_content(entry) for entry in entries], "what was written")
        _same(
            [(entry.version, entry.meta) for entry in first],
            [(n + 1, case[0]) for n, case in enumerate(cases)],
            "versions and envelopes",
        )
        _same(await _read(other), first, "what another handle reads")
    async with open("all") as log:
        _same(await _read(log), first, "what is read after a new start")


@_promise
async def the_largest_is_taken_whole_and_nothing_larger(open: Open) -> None:
    """An entry of all the bytes, and an append of all the entries, that the acceptance rule allows; and no more."""
    async with open("all") as log, open("last") as last:
        entry = _fact("things/1", 1)
        big = msgspec.structs.replace(entry, body=b'"%s"' % (b"x" * (ENTRY_BYTES - len(entry.raw) - 2)))
        bigger = msgspec.structs.replace(big, wish=b"1")
        await _raises(Refused, log.append, "things/1", [entry, bigger])
        await _raises(Refused, last.put, "things/1", 1, bigger)
        await _raises(Refused, _add, log, "things/2", *range(APPEND_ENTRIES + 1))
        whole, part = divmod(APPEND_BYTES, ENTRY_BYTES)
        rest = msgspec.structs.replace(big, body=b"1" * (part - len(entry.raw)))
        await _raises(Refused, log.append, "things/3", [*[big] * whole, rest, entry])
        await log.append("things/1", [big], expect=0)
        await last.put("things/1", 1, big)
        many = _facts("things/2", *range(APPEND_ENTRIES))
        _same((await log.append("things/2", many, expect=0)).version, APPEND_ENTRIES, "the version")
        await _nothing_but(log, big, *many)
        await _nothing_but(last, big)
        heaviest = [msgspec.structs.replace(each, stream="things/3") for each in (*[big] * whole, rest)]
        _same((await log.append("things/3", heaviest, expect=0)).version, whole + 1, "the version")
        found = await _read(log, Filter("things/3"), limit=1)
        _same([_content(each) for each in found], [_content(each) for each in heaviest], "the heaviest append")


@_promise
async def an_id_is_any_text_within_its_bound(open: Open) -> None:
    """Kept as it is and found by a repeat, however hostile; refused where it is no text, empty or too long."""
    legal = (
        *HOSTILE,
        "a\nb",
        "\x1b[31m",
        "e\u0301",
        "x" * ID_BYTES,
        "\u00fc" * (ID_BYTES // 2),
        "\U0001f980" * (ID_BYTES // 4),
    )
    illegal = ("", "\0", "a\0b", "\ud800", "a\udfff", "x" * (ID_BYTES + 1), "\u00fc" * (ID_BYTES // 2) + "x")
    entries = [msgspec.structs.replace(_fact("things/1", n), id=id) for n, id in enumerate(legal)]
    async with open("all") as log, open("last") as last:
        done = await log.append("things/1", entries)
        for n, entry in enumerate(entries, 1):
            again = await log.append("things/1", [entry], repeat=True)
            _same((again.version, again.repeated), (n, True), f"the repeat of {entry.id!r}")
        for id in illegal:
            wrong = msgspec.structs.replace(entries[0], id=id)
            await _raises(Refused, log.append, "things/1", [entries[0], wrong])
            await _raises(Refused, log.append, "things/1", [wrong], repeat=True)
            await _raises(Refused, last.put, "things/1", 1, wrong)
        await last.put("things/1", 1, entries[-1])
        _same((await log.head(), [each.id for each in await _read(log)]), (done.position, list(legal)), "what stands")
        await _nothing_but(last, entries[-1])


@_promise
async def the_head_is_the_last_position(open: Open) -> None:
    """0 in an empty log; after that, what the last append was told, whatever was refused since."""
    async with open("all") as log, open("last") as last:
        for each in (log, last):
            _same((await each.head(), await each.read()), (0, Page([], 0)), "head and first page of an empty log")
        done = await _add(log, "things/1", 1, 2)
        await _raises(Conflict, _add, log, "things/1", 3, expect=0)
        put = await _put(last, "things/1", 1)
        await _put(last, "things/1", 1)
        _same((await log.head(), await last.head()), (done.position, put.position), "the heads")
        async with open("all") as other:
            _same(await other.head(), done.position, "the head for another handle")


@_promise
async def the_id_of_a_log_stays(open: Open) -> None:
    """The same through every handle and after a new start, and another for another log."""
    async with open("all") as log, open("all") as other, open("last") as last:
        id = log.id
        _holds(bool(id) and id == other.id, f"the handles say {id!r} and {other.id!r}")
        _holds(id != last.id, f"two logs have the id {id!r}")
        await _add(log, "things/1", 1)
        _same((log.id, other.id), (id, id), "the id after an append")
    async with open("all") as log:
        _same(log.id, id, "the id after a new start")
        await _nothing_but(log, _fact("things/1", 1))


# --------------------------------------------------------------------------------------------------------- wait


@_promise
async def who_waits_is_woken_by_what_is_wanted(open: Open) -> None:
    """Through the same handle and another, by any filter, also for a stream and a type that were not yet."""
    async with open("all") as log, open("all") as other:
        filters = (
            EVERYTHING,
            Filter("things/new"),
            Filter(types=frozenset({"New"})),
            Filter(domains=frozenset({"things"})),
            Filter(slots=frozenset({slot_of("new")})),
            Filter("things/new", frozenset({"things"}), frozenset({"New"})),
        )
        for reader, writer in product((log, other), (log, other)):
            after = await log.head()
            waiting = [await _waiting(reader, filter, after=after) for filter in filters]
            done = await writer.append("things/new", [_fact("things/new", 1, type="New")])
            for page in await asyncio.gather(*waiting):
                _same(
                    ([entry.position for entry in page.entries], page.looked),
                    ([done.position], done.position),
                    "what woke the reader",
                )


@_promise
async def who_waits_is_not_troubled_by_what_is_not_wanted(open: Open) -> None:
    """Others come and go; the reader gets the entry that it waits for, alone."""
    async with open("all") as log, open("all") as other:
        waiting = [
            await _waiting(log, Filter("things/1")),
            await _waiting(log, Filter(types=frozenset({"Rare"}))),
            await _waiting(other, Filter(domains=frozenset({"things"}), types=frozenset({"Rare"}))),
        ]
        for n in range(30):
            await _add((log, other)[n % 2], "things/2", n)
        _same([task.done() for task in waiting], [False] * 3, "readers that came back for nothing")
        done = await other.append("things/1", [_fact("things/1", 1, type="Rare")])
        for page in await asyncio.gather(*waiting):
            _same([entry.position for entry in page.entries], [done.position], "what the reader got")


@_promise
async def who_waits_in_vain_is_told_how_far_the_log_was_looked_through(open: Open) -> None:
    """Not before the time is over, and with `looked` at the head."""
    clock = SystemClock()
    async with open("all") as log:
        done = await _add(log, "things/1", 1)
        for filter, after in (
            (EVERYTHING, done.position),
            (Filter("things/2"), 0),
            (Filter(types=frozenset({"Rare"})), 0),
        ):
            began = clock.monotonic()
            _same(await log.read(filter, after=after, wait=_SHORT), Page([], done.position), "the page")
            took = clock.monotonic() - began
            _holds(took > _SHORT * 0.9, f"it waited {took:.3f} of {_SHORT} seconds")


@_promise
async def who_need_not_wait_does_not(open: Open) -> None:
    """What is there already is given at once, however long one would wait."""
    clock = SystemClock()
    async with open("all") as log:
        done = await _add(log, "things/1", 1)
        began = clock.monotonic()
        for filter in (
            EVERYTHING,
            Filter("things/1"),
            Filter(types=frozenset({"Counted"})),
            Filter(slots=frozenset({slot_of("1")})),
        ):
            page = await log.read(filter, wait=_SOON)
            _same([entry.position for entry in page.entries], [done.position], "what is read")
        _holds(clock.monotonic() - began < _SOON / 2, "it waited for what was there")


@_promise
async def a_put_wakes_who_waits_for_it(open: Open) -> None:
    """As an append does, through the same handle and another; a put that changes nothing wakes nobody."""
    async with open("last") as log, open("last") as other:
        for version, (reader, writer) in enumerate(product((log, other), (log, other)), start=1):
            task = await _waiting(reader, Filter("things/1"), after=await log.head())
            await _put(writer, "things/2", version)
            await writer.put("things/1", version - 1 or 1, _fact("things/1", 1)) if version > 1 else None
            done = await _put(writer, "things/1", version)
            page = await task
            _same(
                [(entry.version, entry.position) for entry in page.entries],
                [(version, done.position)],
                "what woke the reader",
            )


# -------------------------------------------------------------------------------------------------------- names

HOSTILE = (
    "..", ".", "../x", "../../etc/passwd", "/", "//", "a/b", "a//b", "*", ">", "a.*", "a.>", "a.b", "a.b.", ".a", "a..b", "$claim", "$claim.1", "$JS.API.INFO", "_INBOX.1",
    " ", "  ", " a", "a ", "a  b", "%", "%2E", "a%2Eb", "a%20b", "=", "a=b", "=2E", "a:b", "a?b", "a#b", "~", "@", "-", "--", "-- drop", "'", '"', "''", "a\\b", "\\", "\\n", "a;b", "`id`", "$(id)",
    "'; drop table facts; --", "' or '1'='1", "$$", "$mark", "$claim.x", "a_b", "a%b", "_", "%s", "{0}", "?", ":1", "$1", "a,b", "a|b", "a&b", "(a)", "[a]", "^", "..a", "a..", "> *",
    "null", "None", "true", "0", "00", "-1", "+1", "1e3", "1_000", "\u0660", "a", "A", "aa", "AA", "\u00e4", "\u00c4", "\u00df", "ss", "\ufb01", "fi", "\u00e9", "\u00e9\u0301",
    "\u4e2d\u6587", "\U0001f980", "\U0001f469\u200d\U0001f680", "\u200b", "\u200bx", "x\u200b", "\u202ex", "\u2028", "\ufeff", "\ufeffa", "a\u00a0b", "\u3000", "\uffff", "\U0010ffff", "\ue000", "\u1ea1\u0307",
    "x" * 255, "x" * 256, "x" * 255 + "y", "." * 256, "*" * 256, " " * 256, "\u00fc" * 128, "\U0001f980" * 64, "\uffff" * 85,
)  # fmt: skip
"""Keys that are legal: each must stay what it is, and differ from all others."""

ILLEGAL = (
    "", "a\nb", "a\r\nb", "\r\n\r\n", "a\tb", "a\0b", "\0", "\x01", "\x1b[31m", "\x7f", "\x85", "\x9b", "e\u0301", "\u212a", "\u2126", "a\u0307\u0323", "\u1100\u1161", "\ud800", "a\udfff", "\ud83e\udd80",
    "x" * 257, "\u00fc" * 128 + "x", "\U0001f980" * 65, "x" * 100_000,
)  # fmt: skip
"""Keys that no log takes: control characters, other forms than NFC, lone surrogates, nothing, too much."""


@_promise
async def two_names_never_collide(open: Open) -> None:
    """However hostile a legal key is, its stream is its own: in reading, counting, expecting, slots; in both kinds."""
    async with open("all") as log, open("last") as last:
        streams = [f"things/{key}" for key in HOSTILE] + [
            "_things/1",
            "things_/1",
            "things-/1",
            "t/1",
            "thing/s/1",
            f"{'x' * 63}/{'x' * 256}",
        ]
        _same(len(set(streams)), len(streams), "the number of different names tried")
        await asyncio.gather(*(_add(log, stream, 1, expect=0) for stream in streams))
        await asyncio.gather(*(_add(log, stream, 2, expect=1) for stream in streams))
        again = await asyncio.gather(*(_add(log, stream, 1, repeat=True) for stream in streams))
        _same({(done.version, done.repeated) for done in again}, {(1, True)}, "the repeats")
        await asyncio.gather(*(_put(last, stream, 1) for stream in streams))
        for stream in streams:
            _same(
                [_content(entry) for entry in await _read(log, Filter(stream))],
                [_content(entry) for entry in _facts(stream, 1, 2)],
                f"what {stream!r} holds",
            )
            _same(
                [_content(entry) for entry in await _read(last, Filter(stream))],
                [_content(_fact(stream, 1))],
                f"what {stream!r} holds last",
            )
        for slot in range(16):
            wanted = [stream for stream in streams if slot_of(stream.partition("/")[2]) == slot]
            _same(
                [entry.stream for entry in await _read(last, Filter(slots=frozenset({slot})))],
                wanted,
                f"the streams of slot {slot}",
            )
        _same(
            len(await _read(log, Filter(domains=frozenset({"things"})))), 2 * len(HOSTILE), "the entries of the domain"
        )


@_promise
async def who_waits_for_a_hostile_name_is_woken_by_it_alone(open: Open) -> None:
    """Each waits for a thing of its own, in both kinds of log; what others write does not come to it."""
    streams = [f"things/{key}" for key in HOSTILE]
    async with open("all") as log, open("last") as last:
        waits = [each.read(Filter(stream), wait=_SOON) for stream in streams for each in (log, last)]
        waiting = [asyncio.create_task(each) for each in waits]
        await SystemClock().sleep(_SHORT / 10)
        _holds(not any(task.done() for task in waiting), "a reader of what is not yet did not wait")
        await asyncio.gather(*(_add(log, stream, 1) for stream in streams))
        await asyncio.gather(*(_put(last, stream, 1) for stream in streams))
        pages = await asyncio.gather(*waiting)
        for stream, found, held in zip(streams, pages[::2], pages[1::2], strict=True):
            _same([entry.stream for entry in (*found.entries, *held.entries)], [stream] * 2, f"what {stream!r} woke")


@_promise
async def hostile_names_of_types_and_claims_never_collide(open: Open) -> None:
    """A type is found by its own name only; a claim is held under its own name only."""
    names = [name for name in HOSTILE if name == name.strip() and len(name.encode()) <= 128]
    async with open("all") as log:
        await asyncio.gather(
            *(log.append(f"things/{n % 5}", [_fact(f"things/{n % 5}", n, type=name)]) for n, name in enumerate(names))
        )
        claims = await asyncio.gather(*(log.claim(name, "a") for name in HOSTILE))
        await asyncio.gather(
            *(log.append("other/1", [_fact("other/1", n)], fence=claim) for n, claim in enumerate(claims))
        )
        for name in names:
            _same(
                [entry.type for entry in await _read(log, Filter(types=frozenset({name})))],
                [name],
                f"what the type {name!r} gives",
            )
        for claim in claims:
            await log.release(claim)
            await _raises(Fenced, _add, log, "other/1", 9, fence=claim)
        _same(len(await _read(log)), len(names) + len(HOSTILE), "the number of entries")


@_promise
async def illegal_names_are_refused_before_anything_is_written(open: Open) -> None:
    """As key, as type, as the name of a claim, in an append, a put and a filter; and the log goes on."""
    async with open("all") as log, open("last") as last:
        streams = [f"things/{key}" for key in ILLEGAL] + [
            "",
            "things",
            "/1",
            "Things/1",
            "th ings/1",
            "things./1",
            "1things/1",
            "th\u00efngs/1",
            "x" * 64 + "/1",
            "../1",
            "*/1",
            ">/1",
            "$claim/1",
        ]
        await _add(log, "things/1", 1)
        await _put(last, "things/1", 1)
        plain = _fact("things/1", 2)
        for stream in streams:
            entry = msgspec.structs.replace(plain, stream=stream)
            await _raises(Refused, log.append, stream, [entry])
            await _raises(Refused, last.put, stream, 2, entry)
            await _raises(Refused, log.read, Filter(stream))
        for name in (*ILLEGAL, " a", "a ", "x" * 129):
            entry = msgspec.structs.replace(plain, type=name)
            await _raises(Refused, log.append, "things/1", [entry])
            await _raises(Refused, last.put, "things/1", 2, entry)
            await _raises(Refused, log.read, Filter(types=frozenset({name})))
        for name in ILLEGAL:
            await _raises(Refused, log.claim, name, "a")
            await _raises(Refused, log.claim, "slot", name)
        await log.append("things/1", [plain], expect=1)
        await _nothing_but(log, _fact("things/1", 1), plain)
        await _nothing_but(last, _fact("things/1", 1))


PROMISES: tuple[Promise, ...] = tuple(_promises)
"""The whole contract, in the order in which it reads best."""
