"""Rules over several things: a tag that at most one bears, or so many, in whatever process that is decided."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cauce import (
    Bus,
    Command,
    Fenced,
    Gone,
    Held,
    Inconsistent,
    Refused,
    Rejected,
    Service,
    Unavailable,
    connect,
    running,
)
from cauce.bus import Ask
from cauce.cli import main
from cauce.codec import derive_id
from cauce.commander import _PATIENCE
from cauce.folding import fold_of
from cauce.log import Filter, Log
from cauce.rules import _Building, are_coming, build
from cauce.rules import standing as bound
from cauce.service import bind
from cauce.tags import Tags
from cauce.testing import given
from tests.people import (
    Gift,
    Join,
    Joined,
    Leave,
    Move,
    Moved,
    Other,
    Person,
    Redeem,
    Seat,
    made,
    people,
)
from tests.servers import Nats
from tests.test_instances import close, standing, until_shared

Program = Callable[..., subprocess.Popen[str]]


async def verdicts(*calls: Any) -> Counter[str]:
    """How often each kind of answer came."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return Counter("accepted" if not isinstance(each, BaseException) else type(each).__name__ for each in answers)


async def audited(bus: Bus) -> list[str]:
    return [each.meta.verdict for each in (await bus.commands.read()).entries]


PROCESS = """
import asyncio, sys
from cauce import running
from tests import people

async def main():
    async with running(eval(sys.argv[2], vars(people)), bus=sys.argv[1]) as bus:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@asynccontextmanager
async def instances(
    program: Program, url: str, count: int, what: str = "made()", service: str = "people"
) -> AsyncIterator[list[subprocess.Popen[str]]]:
    """So many processes of an owner, each with its share of the slots."""
    processes = [program(PROCESS, url, what) for _ in range(count)]
    async with standing(url, service) as holders:
        await until_shared(holders, *sorted(len(range(n, 16, count)) for n in range(count)))
    yield processes
    for process in processes:
        if process.poll() is None:
            await asyncio.to_thread(close, process)


# ------------------------------------------------------------------------------------------------- at most one


async def test_of_two_that_claim_one_e_mail_at_once_one_wins(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        for n in range(5):
            calls = [bus.call(Join(f"{who}{n}", f"{spelt}@{n}.example")) for who, spelt in (("ana", "x"), ("bob", "X"))]
            assert await verdicts(*calls) == {"accepted": 1, "Rejected": 1}
        await bus.settled()
        people = [await bus.record(Person, f"{who}{n}") for who in ("ana", "bob") for n in range(5)]
        assert sum(each is not None for each in people) == 5
        assert all(each.startswith("rejected: mail 'x@") for each in await audited(bus))
        assert len(await audited(bus)) == 5


async def test_who_is_rejected_is_told_rule_tag_and_who_has_it(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        await bus.call(Join("ana", "Ana@x.example"))
        with pytest.raises(Rejected, match=r"^mail 'ana@x.example' is borne by people/ana already$"):
            await bus.call(Join("bob", "ana@X.example"))
        await bus.send(Join("bob", "ana@x.example"))
        await bus.settled()
        assert await bus.record(Person, "bob") is None
        assert (await audited(bus)).count("rejected: mail 'ana@x.example' is borne by people/ana already") == 2
        await bus.call(Join("cid", "x" * 1_000))
        with pytest.raises(Rejected, match=r"^mail 'x{199} is borne by people/cid already$"):
            await bus.call(Join("dan", "x" * 1_000))


async def test_a_tag_is_free_when_its_thing_changes_or_goes(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        await bus.call(Join("ana", "a@x"))
        await bus.call(Join("bob", "b@x"))
        with pytest.raises(Rejected, match="people/bob"):
            await bus.call(Move("ana", "b@x"))
        # Two change places by way of a third one.
        for name, email in (("ana", "c@x"), ("bob", "a@x"), ("ana", "b@x")):
            await bus.call(Move(name, email))
        await bus.call(Leave("bob"))
        await bus.call(Join("cid", "a@x"))
        await bus.call(Leave("cid"))
        await bus.call(Join("cid", "a@x"))
        await bus.call(Move("cid", "A@x"))
        with pytest.raises(Rejected, match="people/cid"):
            await bus.call(Join("dan", "a@x"))
    async with running(made(), bus=each_bus) as bus:
        with pytest.raises(Rejected, match="people/ana"):
            await bus.call(Join("eve", "b@x"))
        await bus.call(Join("eve", "c@x"))


async def test_what_is_decided_ahead_of_the_disk_keeps_the_rule(each_bus: str) -> None:
    """Changes of one thing and of many, all on the way at once, over a few tags."""
    async with running(made(), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Join(f"p{n}", f"{n}@x")) for n in range(6)))
        calls = [bus.call(Move(f"p{n % 6}", f"{n * 5 % 9}@x")) for n in range(90)]
        kinds = await verdicts(*calls)
        assert set(kinds) == {"accepted", "Rejected"}
        await bus.settled()
        stand = [await bus.fetch(Person, f"p{n}") for n in range(6)]
        assert len({each.email for each in stand}) == 6
        for each in stand:
            with pytest.raises(Rejected, match=f"people/{each.name} "):
                await bus.call(Join("other", each.email))
        await counts_are_right(bus)
        free = {f"{n}@x" for n in range(9)} - {each.email for each in stand}
        for n, email in enumerate(sorted(free)):
            await bus.call(Join(f"new{n}", email))


async def test_two_instances_give_one_e_mail_once_and_a_third_when_one_is_killed(
    each_bus: str, program: Program
) -> None:
    async with instances(program, each_bus, 2) as (first, _), connect(each_bus) as bus:
        for n in range(10):
            calls = [bus.call(Join(f"{who}-{n}", f"{n}@x")) for who in "abcd"]
            assert await verdicts(*calls) == {"accepted": 1, "Rejected": 3}
        # What it had in hand is known to nobody.
        calls = [bus.call(Join(f"{who}-{n}", f"{n}@x"), timeout=2.0) for n in range(10, 20) for who in "abcd"]
        answers = asyncio.gather(*calls, return_exceptions=True)
        first.kill()
        await answers
        async with running(made(), bus=each_bus), asyncio.timeout(60.0):
            for n in range(20):
                for who in "abcd":
                    await decided(bus, Join(f"{who}-{n}", f"{n}@x"))
                stand = [await bus.fetch(Person, f"{who}-{n}") for who in "abcd" if await stands(bus, f"{who}-{n}")]
                assert len(stand) == 1
            await counts_are_right(bus)


async def counts_are_right(bus: Bus) -> None:
    """What the tags say is what things bear, by their facts alone."""
    said, borne, looked, head = dict[str, int](), Counter[str](), 0, await bus.facts.head()
    folder = fold_of(bind(made()), people)
    while looked < head:
        page = await bus.facts.read(Filter(domains=frozenset({"_tags"})), after=looked)
        said |= {each.key.partition("/")[2]: msgspec.json.decode(each.body or b"").get("n", 0) for each in page.entries}
        looked = page.looked
    looked, names = 0, set[str]()
    while looked < head:
        page = await bus.facts.read(Filter(domains=frozenset({"people"})), after=looked)
        names |= {each.key for each in page.entries}
        looked = page.looked
    for name in names:
        person = (await folder.fold(bus.facts, name)).state
        if isinstance(person, Person):
            borne.update(tag for tag in (person.email.casefold(), person.show) if tag)
    assert {tag: n for tag, n in said.items() if n} == borne


async def decided(bus: Bus, command: Command) -> bool:
    """Whether it was accepted, asked as often as it takes for somebody to answer."""
    while True:
        try:
            await bus.call(command, timeout=5.0)
            return True
        except Rejected:
            return False
        except Unavailable:
            await asyncio.sleep(0.1)


async def stands(bus: Bus, name: str) -> bool:
    try:
        await bus.fetch(Person, name)
    except Gone:
        return False
    return True


# -------------------------------------------------------------------------------------------------- so many


async def test_just_so_many_get_a_seat_whichever_instance_decides(each_bus: str, program: Program) -> None:
    async with instances(program, each_bus, 3, "made(seats=20)"), connect(each_bus) as bus:
        calls = [bus.call(Seat(f"p{n}", "hamlet")) for n in range(50)]
        assert await verdicts(*calls) == {"accepted": 20, "Rejected": 30}
        with pytest.raises(Rejected, match=r"show 'hamlet' is borne by 20 of people already, and no more may"):
            await bus.call(Seat("late", "hamlet"))
        seated = [n for n in range(50) if await stands(bus, f"p{n}")]
        assert len(seated) == 20
        await counts_are_right(bus)
        await bus.call(Seat(f"p{seated[0]}", "macbeth"))
        calls = [bus.call(Seat(name, "hamlet")) for name in ("x", "y")]
        assert await verdicts(*calls) == {"accepted": 1, "Rejected": 1}


async def test_a_gift_card_of_100_is_redeemed_10_times_by_10_whoever_asks(each_bus: str, program: Program) -> None:
    """One thing decides for itself: that needs no rule."""
    async with instances(program, each_bus, 2, "giving", "gifts"), connect(each_bus) as one, connect(each_bus) as two:
        for card in ("a", "b", "c"):
            calls = [(one, two)[n % 2].call(Redeem(card, 10)) for n in range(50)]
            assert await verdicts(*calls) == {"accepted": 10, "Rejected": 40}
            assert (await one.fetch(Gift, card)).left == 0


async def test_the_record_may_say_how_many(bus_url: str) -> None:
    async with running(made(email=False, seats=lambda person: 2 if person.show == "small" else 4), bus=bus_url) as bus:
        calls = [bus.call(Seat(f"{show}{n}", show)) for show in ("small", "large") for n in range(6)]
        assert await verdicts(*calls) == {"accepted": 6, "Rejected": 6}


async def test_a_limit_that_is_no_number_is_refused_and_one_that_fails_names_its_rule(bus_url: str) -> None:
    wrong: list[Any] = ["2", None, True, 2.0]
    async with running(made(email=False, seats=lambda person: wrong[int(person.show)]), bus=bus_url) as bus:
        for n, said in enumerate(wrong):
            with pytest.raises(Refused, match=f"rule show of people gave {said!r} as the most: return a number"):
                await bus.call(Seat("ana", str(n)))
        with pytest.raises(Refused, match="gave '2' as the most"):
            await bus.call(Seat("ana", "0"))


async def test_what_is_remembered_of_tags_is_bounded(bus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cauce.tags._CACHED", 3)
    async with running(made(), bus=bus_url) as one:
        for n in range(9):
            await one.call(Join(f"p{n}", f"{n}@x"))
    remembered = list[int]()
    also = Tags.also

    async def watched(tags: Tags, *arguments: Any) -> Any:
        try:
            return await also(tags, *arguments)
        finally:
            remembered.append(len(tags._counts))

    monkeypatch.setattr("cauce.tags.Tags.also", watched)
    async with running(made(), bus=bus_url) as bus:
        calls = [bus.call(Join(f"q{n}", f"{n}@x")) for n in range(9)]
        assert await verdicts(*calls) == {"Rejected": 9}
    assert max(remembered) == 3


# ------------------------------------------------------------------------------------------------ rules that change


async def test_a_rule_that_comes_later_counts_what_stands(each_bus: str) -> None:
    async with running(made(email=False), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Join(f"p{n}", f"{n}@x")) for n in range(20)))
        await asyncio.gather(*(bus.call(Seat(f"s{n}", "hamlet")) for n in range(8)))
        await bus.call(Leave("p3"))
    async with running(made(seats=10), bus=each_bus) as bus:
        with pytest.raises(Rejected, match="people/p7 already"):
            await bus.call(Join("new", "7@x"))
        await bus.call(Join("new", "3@x"))
        calls = [bus.call(Seat(f"t{n}", "hamlet")) for n in range(5)]
        assert await verdicts(*calls) == {"accepted": 2, "Rejected": 3}
        stands, _ = await bound(bus.facts, "people")
        assert {name: (each.since, each.built) for name, each in stands.items()} == {
            "mail": (1, True),
            "show": (1, True),
        }


async def test_a_rule_that_is_written_otherwise_is_counted_anew_and_the_others_are_not(each_bus: str) -> None:
    async with running(made(seats=2, fold=False), bus=each_bus) as bus:
        await bus.call(Join("ana", "A@x"))
        await bus.call(Join("bob", "b@x"))
    async with running(made(seats=2), bus=each_bus) as bus:
        with pytest.raises(Rejected, match="people/ana"):
            await bus.call(Join("cid", "a@x"))
        stands, _ = await bound(bus.facts, "people")
        assert {name: each.since for name, each in stands.items()} == {"mail": 3, "show": 1}


async def test_a_rule_that_is_dropped_and_comes_back_is_counted_anew(each_bus: str) -> None:
    async with running(made(), bus=each_bus) as bus:
        await bus.call(Join("ana", "a@x"))
    async with running(made(email=False), bus=each_bus) as bus:
        await bus.call(Move("ana", "b@x"))
        await bus.call(Join("bob", "a@x"))
    async with running(made(), bus=each_bus) as bus:
        for email, who in (("a@x", "bob"), ("b@x", "ana")):
            with pytest.raises(Rejected, match=f"people/{who}"):
                await bus.call(Join("cid", email))


async def test_a_start_is_refused_where_what_stands_is_against_a_rule(each_bus: str) -> None:
    async with running(made(email=False), bus=each_bus) as bus:
        for name, email in (("ana", "a@x"), ("bob", "b@x"), ("cid", "A@x")):
            await bus.call(Join(name, email))
    for _ in range(2):
        with pytest.raises(
            Refused,
            match=r"rule mail of people: 'a@x' is borne by 2 \(people/ana and people/cid\), and at most 1 may: start",
        ):
            async with running(made(), bus=each_bus):
                pass
    async with running(made(email=False), bus=each_bus) as bus:
        await bus.call(Move("cid", "c@x"))
    async with running(made(), bus=each_bus) as bus:
        assert await verdicts(*(bus.call(Join("dan", f"{tag}@x")) for tag in "abc")) == {"Rejected": 3}


@pytest.mark.parametrize("stop", [1, 2, 3])
async def test_a_build_that_broke_off_is_gone_on_with_and_counts_nothing_twice(
    stop: int, each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.rules._PAGE", 4)
    async with running(made(email=False), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Join(f"p{n}", f"{n}@x")) for n in range(10)))
        await asyncio.gather(*(bus.call(Seat(f"p{n}", "hamlet")) for n in range(10)))
    pages, page = 0, _Building._page

    async def broken(building: _Building, entries: Any) -> None:
        nonlocal pages
        pages += 1
        await page(building, entries)
        if pages == stop:
            raise ConnectionError("the lights went out")

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr("cauce.rules._Building._page", broken)
        async with running(made(seats=12), bus=each_bus):
            pass
    async with running(made(seats=12), bus=each_bus) as bus:
        calls = [bus.call(Seat(f"q{n}", "hamlet")) for n in range(5)]
        assert await verdicts(*calls) == {"accepted": 2, "Rejected": 3}
        assert await verdicts(*(bus.call(Join("new", f"{n}@x")) for n in range(10))) == {"Rejected": 10}
        page_ = await bus.facts.read(Filter("_rules/people"))
        assert [entry.version for entry in page_.entries] == [1, 2], "begun once, ended once"


async def test_what_was_accepted_is_counted_anew_in_any_order_where_the_record_says_how_many(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wanted little room came first, and its record was written last."""
    monkeypatch.setattr("cauce.rules._PAGE", 2)

    def room(person: Person) -> int:
        return 1 if person.name == "ana" else 9

    async with running(made(email=False, seats=room), bus=bus_url) as bus:
        for name in ("ana", "bob", "cid", "dan", "eve"):
            await bus.call(Seat(name, "hamlet"))
        await bus.settled()
        await bus.call(Move("ana", "a@x"))
    async with running(made(email=False, seats=lambda person: room(person)), bus=bus_url) as bus:
        await bus.call(Seat("fay", "hamlet"))
        await bus.call(Seat("ana", "macbeth"))
        with pytest.raises(Rejected, match="'hamlet' is borne by 5 of people already"):
            await bus.call(Seat("ana", "hamlet"))


async def test_a_build_that_broke_off_is_begun_anew_where_the_records_were_removed_meanwhile(
    nats: Nats, nats_bus: str, bus_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written anew in another order, so how far it had counted says nothing any more."""
    monkeypatch.setattr("cauce.rules._PAGE", 2)
    async with running(made(email=False), bus=nats_bus) as bus:
        for n in range(6):
            await bus.call(Seat(f"p{n}", "hamlet"))
            await bus.settled()
        await bus.call(Move("p0", "0@x"))
    page = _Building._page

    async def broken(building: _Building, entries: Any) -> None:
        await page(building, entries)
        raise ConnectionError("the lights went out")

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr("cauce.rules._Building._page", broken)
        async with running(made(seats=8), bus=nats_bus):
            pass
    assert nats.request(f"$JS.API.STREAM.DELETE.{bus_name}_records")["success"]
    async with running(made(seats=8), bus=nats_bus) as bus:
        calls = [bus.call(Seat(f"q{n}", "hamlet")) for n in range(5)]
        assert await verdicts(*calls) == {"accepted": 2, "Rejected": 3}


async def test_instances_with_other_rules_do_not_run_side_by_side(
    each_bus: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cauce.commander._PATIENCE", 0.1)
    async with instances(program, each_bus, 1, "made(email=False)"):
        with pytest.raises(
            Held, match=r"is held by people \(process \d+\): stop it first, because people gets other rules"
        ):
            async with running(made(), bus=each_bus):
                pass
    async with running(made(), bus=each_bus) as bus:
        await bus.call(Join("ana", "a@x"))


async def test_nothing_is_counted_while_another_holds_a_slot_that_was_taken_over(
    each_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who counts stood still for so long that somebody on another machine took it for dead."""
    async with running(made(email=False), bus=each_bus) as bus:
        await bus.call(Join("ana", "a@x"))

    async def taken_over(facts: Log, records: Log, folder: Any, rules: Any, fences: Any, clock: Any) -> None:
        await facts.claim(fences[5].name, "other", over=fences[5])
        await build(facts, records, folder, rules, fences, clock)

    with monkeypatch.context() as patched, pytest.raises(Fenced, match="people/5"):
        patched.setattr("cauce.commander.build", taken_over)
        async with running(made(), bus=each_bus):
            pass
    async with connect(each_bus) as bus:
        assert [each.stream for each in (await bus.facts.read(Filter(domains=frozenset({"_tags"})))).entries] == []


async def test_of_many_that_start_at_once_with_a_new_rule_one_counts(each_bus: str, program: Program) -> None:
    async with running(made(email=False), bus=each_bus) as bus:
        await asyncio.gather(*(bus.call(Join(f"p{n}", f"{n}@x")) for n in range(30)))
    async with instances(program, each_bus, 3), connect(each_bus) as bus:
        assert await verdicts(*(bus.call(Join(f"q{n}", f"{n}@x")) for n in range(40))) == {
            "accepted": 10,
            "Rejected": 30,
        }
        assert [entry.version for entry in (await bus.facts.read(Filter("_rules/people"))).entries] == [1, 2]


SLOW = """
import asyncio, sys
from cauce import rules, running
from tests import people

page = rules._Building._page

async def slow(building, entries):
    print("begun", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await page(building, entries)

async def main():
    rules._Building._page = slow
    async with running(people.made(), bus=sys.argv[1]):
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


async def test_who_counts_for_long_is_waited_for_by_those_with_the_same_rules(
    each_bus: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = _PATIENCE
    monkeypatch.setattr("cauce.commander._PATIENCE", 0.0)
    monkeypatch.setattr("cauce.commander._PAUSE", 0.01)
    async with running(made(email=False), bus=each_bus) as bus:
        await bus.call(Join("ana", "a@x"))
    slow = program(SLOW, each_bus)
    stdin, stdout = slow.stdin, slow.stdout
    assert stdin is not None
    assert stdout is not None
    assert await asyncio.to_thread(stdout.readline) == "begun\n"
    looks = list[bool]()

    async def looked(*arguments: Any) -> bool:
        looks.append(await are_coming(*arguments))
        if len(looks) == 3:
            # What it holds while it looks is waited for as ever.
            monkeypatch.setattr("cauce.commander._PATIENCE", patience)
            stdin.write("go on\n")
            stdin.flush()
        return looks[-1]

    monkeypatch.setattr("cauce.commander.are_coming", looked)
    async with running(made(), bus=each_bus):
        assert looks[:3] == [True] * 3
        await asyncio.to_thread(close, slow)


async def test_who_has_other_rules_than_those_that_bind_takes_no_slot(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*_: Any) -> None:
        """It looked before the others changed the rules, and takes slots after that."""

    async with running(made(), bus=bus_url) as bus:
        await bus.call(Join("ana", "a@x"))
    monkeypatch.setattr("cauce.commander.Commander.bind", late)
    with pytest.raises(
        Refused, match="people is bound by the rules mail as they were written, and this code has no rules"
    ):
        async with running(made(email=False), bus=bus_url):
            pass


async def test_what_is_imported_is_counted_at_the_next_start(bus_url: str, tmp_path: Path) -> None:
    async with running(made(), bus=bus_url) as bus:
        await bus.call(Join("ana", "a@x"))
    lines = [
        {"name": name, "email": email, "type": "Joined", "at": "2020-01-01T00:00:00Z"}
        for name, email in (("bob", "b@x"), ("cid", "A@x"))
    ]
    for count, refused in ((1, False), (2, True)):
        (tmp_path / "f").write_text("\n".join(json.dumps(line) for line in lines[:count]))
        words = f"import {tmp_path / 'f'} --bus {bus_url} --domain people --key name --type type --time at --as people"
        done = await asyncio.to_thread(CliRunner().invoke, main, words.split())
        assert done.exit_code == 0, done.output
        if refused:
            with pytest.raises(Refused, match=r"'a@x' is borne by 2 \(people/ana and people/cid\)"):
                async with running(made(), bus=bus_url):
                    pass
        else:
            async with running(made(), bus=bus_url) as bus:
                with pytest.raises(Rejected, match="people/bob"):
                    await bus.call(Join("dan", "b@x"))


async def test_more_tags_than_a_log_lets_wait_are_counted(bus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cauce.backends.sqlite.writer._MOST_WAITING", 1_200)

    def words(person: Person) -> list[str]:
        return [f"{person.email}-{n}" for n in range(500)]

    async with running(made(email=False), bus=bus_url) as bus:
        await asyncio.gather(*(bus.call(Join(f"p{n}", f"{n}")) for n in range(4)))
    service = made(email=False)
    service.unique(words)
    async with running(service, bus=bus_url) as bus:
        for n in range(4):
            with pytest.raises(Rejected, match=f"'{n}-[0-9]+' is borne by people/p{n} already"):
                await bus.call(Join("new", f"{n}"))


# ------------------------------------------------------------------------------------------------ beside commands


async def test_an_event_that_a_handler_records_keeps_the_rule_and_waits(each_bus: str) -> None:
    service = made()

    @service.on
    async def rename(event: Joined) -> Moved | None:
        return Moved(event.name, "boss@x") if event.email.startswith("boss-") else None

    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("ana", "boss-1@x"))
        await bus.settled()
        await bus.call(Join("bob", "boss-2@x"))
        with pytest.raises(TimeoutError):
            await bus.settled(0.5)
        assert [(await bus.fetch(Person, name)).email for name in ("ana", "bob")] == ["boss@x", "boss-2@x"]
        await bus.call(Leave("ana"))
        await bus.settled()
        assert (await bus.fetch(Person, "bob")).email == "boss@x"


async def test_an_event_that_is_recorded_again_is_found_whatever_the_tags_say_by_now(bus_url: str) -> None:
    async with running(made(), bus=bus_url) as bus:
        receipt = await bus.call(Join("ana", "a@x"))
        (joined,) = (await bus.facts.read(Filter("people/ana"))).entries
        ask = Ask(
            "publish",
            "Moved",
            derive_id(joined.id, "x"),
            "ana",
            1,
            msgspec.Raw(b'{"name":"ana","email":"b@x"}'),
            causation=joined.id,
        )
        await bus.publish("people", ask)
        await bus.call(Move("ana", "c@x"))
        await bus.call(Join("bob", "b@x"))
        await bus.publish("people", ask)
        assert (await bus.fetch(Person, "ana")).email == "c@x"
        assert [each.version for each in (await bus.facts.read(Filter("people/ana"))).entries] == [1, 2, 3]
        again = await bus.call(Join("ana", "a@x"), id=receipt.id)
        assert (again.version, again.changed) == (1, True)


async def test_a_thing_may_bear_several_tags_and_any_text_is_one(each_bus: str) -> None:
    service = made(email=False)

    @service.unique
    def words(person: Person) -> list[str]:
        return person.email.split("|")

    strange = ["a/b", "=", "=x", "\u212a", "e\u0301", "a\nb", "x" * 300, "x" * 301, "\U0001f980" * 60, " "]
    async with running(service, bus=each_bus) as bus:
        await bus.call(Join("ana", "|".join(strange)))
        for tag in strange:
            with pytest.raises(Rejected, match="people/ana already"):
                await bus.call(Join("bob", f"fresh|{tag}"))
        await bus.call(Move("ana", "a/b|=x"))
        await bus.call(Join("bob", "|".join(set(strange) - {"a/b", "=x"})))
        with pytest.raises(Rejected, match="people/ana already"):
            await bus.call(Join("cid", "=x"))
        await bus.call(Join("cid", "fresh"))


async def test_what_changes_no_tag_costs_no_look_and_no_entry(bus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("a tag was looked at")

    async with running(made(seats=3), bus=bus_url) as bus:
        await bus.call(Join("ana", "a@x"))
        before = await bus.facts.head()
        monkeypatch.setattr("cauce.tags.Tags.also", never)
        for _ in range(3):
            await bus.call(Move("ana", "A@x"))
        assert await bus.facts.head() == before + 3


async def test_code_that_changed_unseen_is_told_when_a_tag_is_given_back(bus_url: str) -> None:
    way = {"how": str.lower}
    service = made(email=False)

    @service.unique
    def mail(person: Person) -> str:
        return way["how"](person.email)

    async with running(service, bus=bus_url) as bus:
        await bus.call(Join("ana", "a@x"))
        way["how"] = str.upper
        with pytest.raises(
            Inconsistent, match=r"people/ana gives mail 'A@X' back, which was never counted.*rename the rule"
        ):
            await bus.call(Move("ana", "b@x"))


# ------------------------------------------------------------------------------------------------------ how it is said


def test_without_a_bus_a_rule_is_only_tried_on_the_thing_itself() -> None:
    service = made()
    given(service).when(Join("ana", "a@x")).then(Joined("ana", "a@x"))

    @service.unique
    def wrong(person: Person) -> int:
        return 1

    with pytest.raises(Refused, match="rule wrong of people gave 1: return a tag"):
        given(service).when(Join("ana", "a@x"))

    service = made(email=False)

    @service.unique
    def breaks(person: Person) -> str:
        return person.email.split("@")[1]

    with pytest.raises(IndexError) as error:
        given(service).when(Join("ana", "nothing"))
    assert error.value.__notes__[0].startswith("in rule breaks of people, for Person(name='ana'")


def test_a_rule_that_cannot_be_right_is_refused() -> None:
    def refused(function: Any, why: str) -> None:
        service = Service("people", owns=people)
        service.unique(function)
        with pytest.raises(Refused, match=why):
            bind(service)

    def of_other(thing: Other) -> str:
        return thing.name

    def of_event(event: Joined) -> str:
        return event.email

    def of_none(person: Person | None) -> str:
        return ""

    async def waits(person: Person) -> str:
        return ""

    def two(person: Person, event: Joined) -> str:
        return ""

    refused(of_other, "'others', which it does not own")
    refused(of_event, "annotate it with a record")
    refused(of_none, "without None")
    refused(waits, "without await")
    refused(two, "takes \\(message\\)")
    wrong: list[Any] = [0, -1, True, "2"]
    for most in wrong:
        with pytest.raises(Refused, match="say a number of things"):
            Service("people", owns=people).unique(most=most)


def test_what_the_how_to_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parent.parent / "docs" / "how-to" / "unique.md"
    names: dict[str, Any] = {"__name__": "how_to"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)  # noqa: S102 - it is ours, and what is tested
    asyncio.run(names["main"]())
    asyncio.run(names["shared"]())
    assert capsys.readouterr().out.splitlines() == [
        "email 'ana@example.org' is borne by users/42 already",
        "ana@example.org is reserved by users/42",
    ]
