"""The log on NATS JetStream, where the server is killed, changed, or set up so that a promise would break."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import nats as plain
import pytest
from nats.aio.client import Client as PlainClient
from nats.protocol.parser import Parser

from cauce.accept import ENTRY_BYTES, slot_of
from cauce.backends import nats as backend
from cauce.backends.nats import forgetting
from cauce.backends.nats.client import Client
from cauce.backends.nats.link import OLDEST
from cauce.backends.nats.names import text, token
from cauce.codec import Meta, sealed
from cauce.conformance import HOSTILE
from cauce.errors import Busy, Damaged, NotPermitted, OutcomeUnknown, Overloaded, Refused, Unreachable
from cauce.log import Appended, Filter
from tests.cluster_load import CLOCK, all_of, fact, opened
from tests.servers import Missing, Nats, absent


@pytest.fixture
def own_nats() -> Iterator[Nats]:
    """A server that a test may hurt."""
    try:
        server = Nats(name="own")
    except Missing as missing:
        absent(missing)
    yield server
    server.remove()


def configured(config: str, **more: Any) -> Nats:
    try:
        return Nats(name="own", config=config, **more)
    except Missing as missing:
        absent(missing)


# ------------------------------------------------------------------------------------------------------- going away


async def test_nothing_acknowledged_is_lost_or_doubled_when_the_server_is_killed_under_load(own_nats: Nats) -> None:
    acknowledged: list[tuple[Appended, str]] = []
    stop = asyncio.Event()

    async with opened(own_nats.url("b"), patience=20.0) as bus:

        async def write(name: str) -> None:
            n = 0
            while not stop.is_set():
                n += 1
                entry = fact(f"things/{name}-{n % 5}", n)
                acknowledged.append((await bus.facts.append(entry.stream, [entry]), entry.id))

        writers = [asyncio.create_task(write(str(n))) for n in range(20)]
        for _ in range(3):
            before = len(acknowledged)
            while len(acknowledged) < before + 200:
                await CLOCK.sleep(0.01)
            await asyncio.to_thread(own_nats.kill)
            await asyncio.to_thread(own_nats.start)
        stop.set()
        await asyncio.gather(*writers)
        entries = {entry.id: entry for entry in await all_of(bus)}
        assert len(entries) == len(await all_of(bus)) == len(acknowledged)
        assert len(acknowledged) > 600
        for done, id in acknowledged:
            assert (entries[id].position, entries[id].version) == (done.position, done.version)
        for stream, count in Counter(entry.stream for entry in entries.values()).items():
            versions = [entry.version for entry in entries.values() if entry.stream == stream]
            assert versions == list(range(1, count + 1))


async def test_who_writes_while_the_server_is_away_is_told_in_time_and_all_goes_on_when_it_is_back(
    own_nats: Nats,
) -> None:
    async with opened(own_nats.url("b"), patience=0.5) as bus:
        await bus.facts.append("things/1", [fact("things/1")])
        await asyncio.to_thread(own_nats.kill)
        began = CLOCK.monotonic()
        tries = [bus.facts.append("things/1", [fact("things/1", n)]) for n in range(50)]
        verdicts = await asyncio.gather(*tries, return_exceptions=True)
        assert {type(verdict) for verdict in verdicts} <= {Unreachable, OutcomeUnknown}
        assert CLOCK.monotonic() - began < 5.0
        with pytest.raises(Unreachable, match="no NATS server"):
            await bus.facts.read()
        waiting = [fact("things/1", n) for n in range(20_001)]
        with pytest.raises(Overloaded, match="is away"):
            tries.extend(bus.facts.append("things/1", [entry]) for entry in waiting)
        await asyncio.to_thread(own_nats.start)
        await asyncio.wait(tries)
        for each in tries:
            each.exception()
        while bus.link.is_away:
            await CLOCK.sleep(0.01)
        done = await bus.facts.append("things/1", [fact("things/1")])
        assert [entry.version for entry in await all_of(bus)] == list(range(1, done.version + 1))


async def test_what_waits_while_the_server_restarts_is_written_when_it_is_back(own_nats: Nats) -> None:
    async with opened(own_nats.url("b"), patience=20.0) as bus:
        await bus.facts.append("things/1", [fact("things/1")])
        reader = asyncio.create_task(bus.facts.read(after=1, wait=20.0))
        await asyncio.to_thread(own_nats.kill)
        done = bus.facts.append("things/1", [fact("things/1", 2)])
        await asyncio.to_thread(own_nats.start)
        assert (await done).version == 2
        assert [entry.version for entry in (await reader).entries] == [2]


async def test_an_answer_that_does_not_come_is_an_unknown_outcome_and_the_repeat_stands_once(own_nats: Nats) -> None:
    async with opened(own_nats.url("b"), patience=1.0) as bus:
        await bus.facts.append("things/1", [fact("things/1")])
        own_nats.pause()
        entries = [fact("things/1", n) for n in range(2, 5)]
        try:
            with pytest.raises(OutcomeUnknown):
                await bus.facts.append("things/1", entries)
        finally:
            own_nats.resume()
        done = await bus.facts.append("things/1", entries, repeat=True)
        assert done.version == 4
        assert [entry.id for entry in await all_of(bus)][1:] == [entry.id for entry in entries]


async def test_the_same_entry_again_after_the_servers_window_for_duplicates_stands_once(
    nats: Nats, nats_bus: str
) -> None:
    entry = fact("things/1")
    async with opened(nats_bus) as bus, opened(nats_bus) as other:
        config = nats.request(f"$JS.API.STREAM.INFO.{bus.link.stream('facts')}")["config"]
        assert config["duplicate_window"] == 1_000_000_000
        first = await bus.facts.append("things/1", [entry], repeat=True)
        await CLOCK.sleep(1.2)
        for each in (bus, other):
            again = await each.facts.append("things/1", [entry], repeat=True)
            assert again == Appended(first.version, first.position, True)
        assert len(await all_of(bus)) == 1


# ------------------------------------------------------------------------------------------------------- permissions

USERS = """
authorization { users = [
  { user: admin, password: secret }
  { user: app, password: secret, permissions: { publish: { deny: ["b.facts.users.>", "$JS.API.DIRECT.GET.b_commands"] } } }
] }
"""


async def test_what_the_server_does_not_permit_is_said_at_once() -> None:
    server = configured(USERS, login=("admin", "secret"))
    try:
        async with opened(server.url("b", login=("app", "secret"))) as bus:
            began = CLOCK.monotonic()
            with pytest.raises(NotPermitted, match=r"b\.facts\.users"):
                await bus.facts.append("users/1", [fact("users/1")])
            await bus.commands.append("users/1", [fact("users/1")])
            with pytest.raises(NotPermitted, match=r"direct\.get"):
                await bus.commands.read()
            verdicts = await asyncio.gather(
                *(bus.facts.append(s, [fact(s)]) for s in ("cards/1", "users/1", "cards/2")), return_exceptions=True
            )
            assert [type(each) for each in verdicts] == [Appended, NotPermitted, Appended]
            assert CLOCK.monotonic() - began < 2.0
        with pytest.raises(NotPermitted, match="user and password") as error:
            await backend.open(server.url("b", login=("app", "guessed")))
        assert "guessed" not in str(error.value)
    finally:
        server.remove()


# ------------------------------------------------------------------------------------------------------- the server


async def test_an_entry_over_the_limit_is_refused_before_it_is_sent(nats_bus: str) -> None:
    async with opened(nats_bus) as bus:
        entry = fact("things/1", wish=b'{"type":"T","body":{}}')
        sent = bus.link.client.stats["out_msgs"]
        with pytest.raises(Refused, match="at most 750,000"):
            await bus.facts.append("things/1", [msgspec.structs.replace(entry, body=b"1" * ENTRY_BYTES)])
        assert bus.link.client.stats["out_msgs"] == sent
        for wish in (30_000, 600_000):
            long = fact("things/2", wish=b'{"type":"T","body":"%s"}' % (b"x" * wish))
            await bus.facts.append("things/2", [long])
            (found,) = (await bus.facts.read(Filter("things/2"), after=await bus.facts.head() - 1)).entries
            assert (found.checked().wish, found.raw, found.body) == (long.wish, long.raw, long.body)
            (bare,) = (await bus.facts.read(Filter("things/2"), after=found.position - 1, bodies=False)).entries
            assert bare == msgspec.structs.replace(found, wish=None, body=None)


async def test_a_server_that_takes_too_little_is_refused_with_the_cure() -> None:
    server = configured("max_payload: 512KB")
    try:
        with pytest.raises(Refused, match="set max_payload to 1MB"):
            await backend.open(server.url("b"))
    finally:
        server.remove()


async def test_a_server_that_is_too_old_is_refused_with_its_version_and_the_cure(old_nats: Nats) -> None:
    with pytest.raises(Refused, match=rf"NATS server 2\.\d+\.\d+, .* run version {OLDEST[0]}\.{OLDEST[1]} or newer"):
        await backend.open(old_nats.url("b"))


async def test_a_server_nobody_started_is_unreachable_and_no_password_is_told() -> None:
    with pytest.raises(Unreachable, match="no NATS server at nats://joe:…@127.0.0.1:9,") as error:
        await backend.open("nats://joe:secret@127.0.0.1:9,127.0.0.1:10/b", patience=0.3)
    assert "secret" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the streams


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_age", 3_600_000_000_000), ("max_msgs", 1000), ("max_bytes", 10**6), ("allow_atomic", False)],
)
async def test_a_stream_that_would_lose_what_it_holds_is_refused(
    nats: Nats, nats_bus: str, name: str, value: object
) -> None:
    async with opened(nats_bus) as bus:
        stream = bus.link.stream("facts")
    config = nats.request(f"$JS.API.STREAM.INFO.{stream}")["config"]
    assert "error" not in nats.request(f"$JS.API.STREAM.UPDATE.{stream}", config | {name: value})
    with pytest.raises(Refused, match=f"{name} of stream"):
        await backend.open(nats_bus)


async def test_what_was_recorded_cannot_be_deleted_nor_purged(nats: Nats, nats_bus: str) -> None:
    async with opened(nats_bus) as bus:
        await bus.facts.append("things/1", [fact("things/1")])
        stream = bus.link.stream("facts")
        for question in ("DELETE", "PURGE"):
            subject = f"$JS.API.STREAM.{'MSG.DELETE' if question == 'DELETE' else question}.{stream}"
            assert "error" in nats.request(subject, {"seq": 1} if question == "DELETE" else None)
        assert len(await all_of(bus)) == 1


async def test_a_stream_that_is_made_anew_while_it_is_open_stops_all_loudly(nats: Nats, nats_bus: str) -> None:
    async with opened(nats_bus) as bus, opened(nats_bus) as other:
        await bus.facts.append("things/1", [fact("things/1", n) for n in range(3)])
        waiting = asyncio.create_task(other.facts.read(after=3, wait=10.0))
        await CLOCK.sleep(0.1)
        stream = bus.link.stream("facts")
        config = nats.request(f"$JS.API.STREAM.INFO.{stream}")["config"]
        nats.request(f"$JS.API.STREAM.DELETE.{stream}")
        nats.request(f"$JS.API.STREAM.CREATE.{stream}", config)
        with pytest.raises(Damaged, match="made anew"):
            await waiting
        with pytest.raises(Damaged, match="made anew"):
            await bus.facts.append("things/1", [fact("things/1")])
        for each in (bus, other):
            with pytest.raises(Damaged):
                await each.facts.read()
            with pytest.raises(Damaged):
                await each.facts.append("things/2", [fact("things/2")])
        before = bus.facts.id
    async with opened(nats_bus) as bus:
        assert bus.facts.id != before


async def test_a_stream_that_is_deleted_while_it_is_open_stops_all_loudly(nats: Nats, nats_bus: str) -> None:
    async with opened(nats_bus) as bus:
        await bus.facts.append("things/1", [fact("things/1")])
        nats.request(f"$JS.API.STREAM.DELETE.{bus.link.stream('facts')}")
        with pytest.raises(Damaged, match="was deleted"):
            await bus.facts.append("things/1", [fact("things/1")])
        with pytest.raises(Damaged, match="was deleted"):
            await bus.facts.read()


async def test_entries_that_were_removed_before_they_were_read_are_a_gap_with_its_count(
    nats: Nats, nats_bus: str
) -> None:
    async with opened(nats_bus) as bus:
        await bus.facts.append("things/1", [fact("things/1", n) for n in range(10)])
        stream = bus.link.stream("facts")
        config = nats.request(f"$JS.API.STREAM.INFO.{stream}")["config"]
        nats.request(f"$JS.API.STREAM.UPDATE.{stream}", config | {"max_msgs": 3, "discard": "old"})
        for filter in (Filter(), Filter("things/1"), Filter(domains=frozenset({"things"}))):
            with pytest.raises(Damaged, match="lost 5 entries behind position 2"):
                await bus.facts.read(filter, after=2)
        assert [entry.position for entry in (await bus.facts.read(after=7)).entries] == [8, 9, 10]


async def test_decided_commands_are_forgotten_when_they_are_old_and_what_others_remove_is_a_gap(
    nats: Nats, nats_bus: str
) -> None:
    async with opened(nats_bus) as bus, opened(nats_bus) as other:
        streams = [f"things/{n}" for n in range(40)]
        done = [await bus.commands.append(stream, [fact(stream)]) for stream in streams]
        slots = [slot_of(stream.partition("/")[2]) for stream in streams]
        decided, later = done[29].position, CLOCK.now() + 60_000_000
        assert await bus.commands.forget("things", slots[0], decided, 1) == 0
        assert await bus.commands.forget("things", slots[0], decided, later) == slots[:30].count(slots[0])
        wanted = [stream for n, stream in enumerate(streams) if n >= 30 or slots[n] != slots[0]]
        for each in (bus, other):
            assert [entry.stream for entry in (await each.commands.read()).entries] == wanted
        assert (await bus.commands.append("things/0", [fact("things/0")])).position == 41
        with pytest.raises(Refused, match="forget nothing"):
            await bus.facts.forget("things", 0, 1, later)
        nats.request(f"$JS.API.STREAM.PURGE.{bus.link.stream('commands')}", {"seq": 36})
        for each in (bus, other):
            with pytest.raises(Damaged, match=f"lost {35 - (40 - len(wanted))} entries"):
                await each.commands.read()


async def test_two_that_forget_at_once_are_told_apart_and_who_died_over_it_is_followed(
    nats_bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(nats_bus) as bus, opened(nats_bus) as other:
        for n in range(64):
            await bus.commands.append(f"things/{n}", [fact(f"things/{n}")])
        forgets = [(bus, other)[slot % 2].commands.forget("things", slot, 64, 2**62) for slot in range(16)]
        told = await asyncio.gather(*forgets, return_exceptions=True)
        assert all(isinstance(each, int | Busy) for each in told), told
        assert any(isinstance(each, int) for each in told)
        for each in (bus, other):
            left = [entry.stream for entry in (await each.commands.read()).entries]
            assert "things/63" in left
        # There is something to remove, and somebody says that he is at it, and dies.
        for _ in range(2):
            await bus.commands.append("things/63", [fact("things/63")])
        subject = bus.link.subject("leases", "commands", "$forgotten")
        assert b'"seq"' in (await bus.link.request(subject, b'{"count":0,"busy":"another"}')).data
        with pytest.raises(Busy, match="another removes"):
            await bus.commands.forget("things", slot_of("63"), 65, 2**62)
        monkeypatch.setattr(forgetting, "_LONG", 0.0)
        for slot in range(16):
            await bus.commands.forget("things", slot, 65, 2**62)
        for each in (bus, other):
            assert [entry.stream for entry in (await each.commands.read()).entries] == ["things/63"]


# ------------------------------------------------------------------------------------------------------- others


def test_the_tokens_of_hostile_keys_are_tokens_and_differ() -> None:
    tokens = [token(key) for key in HOSTILE]
    assert len(set(tokens)) == len(tokens)
    assert [text(each) for each in tokens] == list(HOSTILE)
    for each in tokens:
        assert each.isprintable()
        assert not set(each) & set(".*> \t\r\n")
        assert not each.startswith("$")
    assert [token(key) for key in ("42", "ana@corp-1_x", "\u4e2d\u6587", "a.b", "$claim")] == [
        "42", "ana@corp-1_x", "\u4e2d\u6587", "a%2Eb", "%24claim",
    ]  # fmt: skip


async def test_a_plain_client_reads_facts_as_cloudevents_in_binary_mode(nats: Nats, nats_bus: str) -> None:
    async with opened(nats_bus) as bus:
        wish = b'{"type":"Do","body":{}}'
        meta = Meta(1_700_000_000_000_001, causation="c", by="crm:jo\u00e9")
        entry = sealed("users/4 2", 'T\u00fcr "auf"', CLOCK.id(), meta, b'{"n":1}', wish)
        await bus.facts.append("users/4 2", [entry])
        client = await plain.connect(nats.url())
        try:
            prefix = bus.link.address.bus
            message = await client.jetstream().get_last_msg(f"{prefix}_facts", f"{prefix}.facts.users.*.4%202")
        finally:
            await client.close()
        assert message.data == b'{"n":1}'
        headers = message.headers or {}
        assert headers["content-type"] == "application/json"
        assert {name: value for name, value in headers.items() if name.startswith("ce-")} == {
            "ce-specversion": "1.0", "ce-id": entry.id, "ce-source": "/users", "ce-type": "T%C3%BCr%20%22auf%22",
            "ce-subject": "4%202", "ce-time": "2023-11-14T22:13:20.000001Z", "ce-schemaversion": "1",
            "ce-streamversion": "1", "ce-digest": headers["ce-digest"], "ce-correlation": entry.id,
            "ce-causation": "c", "ce-by": "crm:jo%C3%A9", "ce-wish": "eyJ0eXBlIjoiRG8iLCJib2R5Ijp7fX0=",
        }  # fmt: skip


def test_nats_py_still_calls_what_our_client_changes_in_it() -> None:
    source = inspect.getsource(PlainClient) + inspect.getsource(Parser)
    changed = [name for name in vars(Client) if name.startswith("_process") or name == "_attempt_reconnect"]
    assert len(changed) == 4
    for name in changed:
        assert inspect.iscoroutinefunction(getattr(PlainClient, name))
        assert (
            inspect.signature(getattr(PlainClient, name)).parameters.keys()
            == inspect.signature(getattr(Client, name)).parameters.keys()
        )
        assert re.search(rf"(self|self\.nc)\.{name}\(", source)


async def test_without_a_name_of_the_bus_subjects_have_no_prefix(own_nats: Nats) -> None:
    async with opened(own_nats.url()) as bus:
        await bus.facts.append("users/42", [fact("users/42")])
        assert sorted(own_nats.streams()) == ["commands", "facts", "leases", "records"]
        found = own_nats.request("$JS.API.STREAM.MSG.GET.facts", {"seq": 1})["message"]["subject"]
        assert found == "facts.users.8.42"


async def test_the_record_of_one_thing_is_the_last_also_for_who_follows_all_of_them(nats_bus: str) -> None:
    bus = await backend.open(nats_bus)
    followed = asyncio.create_task(bus.records.read(wait=10.0))
    async with asyncio.timeout(10):
        while not bus.records._tail.running:  # noqa: ASYNC110 - it runs once somebody waits
            await asyncio.sleep(0.001)
    for version in (1, 2, 3):
        await bus.records.put("users/a", version, fact("users/a"))
        assert (await bus.records.read(after=version - 1, wait=10.0)).entries
        page = await bus.records.read(Filter("users/a"))
        assert [each.version for each in page.entries] == [version]
    await followed
    await bus.close()
