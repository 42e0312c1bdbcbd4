"""What clients of NATS that know nothing of Cauce find: services by ADR-32, questions as JSON, facts as CloudEvents."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nats as plain
import pytest
from nats.aio.client import Client
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from cauce import Retry, Service, running
from shop import users
from tests.counters import Add, Added, owner
from tests.servers import Nats
from tests.test_instances import letters_of

ROOT = Path(__file__).parent.parent
ASK = '{"type": "User", "key": "42"}'
REGISTER = '{"type": "RegisterUser", "body": {"user_id": "42", "name": "Ana", "email": "ana@example.org"}}'

# The regular expression of semver.org, without names.
_SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-((0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
    r"(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?(\+([0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*))?\Z"
)
_NAME = re.compile(r"[A-Za-z0-9_-]+\Z")
_STANDARD = {"type": str, "name": str, "id": str, "version": str, "metadata": dict}
_ENDPOINT = {"name": str, "subject": str, "queue_group": str}
_COUNTS = {"num_requests": int, "num_errors": int, "processing_time": int, "average_processing_time": int}


@pytest.fixture
async def client(nats: Nats) -> AsyncIterator[Client]:
    """A client of the server that is not ours."""
    client = await plain.connect(nats.url())
    yield client
    await client.close()


async def told(client: Client, verb: str, *more: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await client.request(".".join(("$SRV", verb, *more)), timeout=5)).data)
    return answer


def fits(said: dict[str, Any], shape: Mapping[str, type]) -> None:
    """These fields are there, each of its type, and no field that is not in the specification."""
    assert {name: type(said.get(name)) for name in shape} == shape
    assert said.keys() == shape.keys()


# ----------------------------------------------------------------------------------------------------------- ADR-32


async def test_a_service_is_pinged_described_and_counted_as_the_services_api_says(
    nats_bus: str, bus_name: str, client: Client
) -> None:
    name = f"{bus_name}_users"
    async with running(users.service, bus=nats_bus):
        ping = await told(client, "PING", name)
        fits(ping, _STANDARD)
        assert (ping["type"], ping["name"]) == ("io.nats.micro.v1.ping_response", name)
        assert _NAME.match(ping["id"])
        assert _SEMVER.match(ping["version"])
        assert all(isinstance(value, str) for value in ping["metadata"].values())
        assert ping["metadata"]["domains"] == "users"

        info = await told(client, "INFO", name, ping["id"])
        fits(info, _STANDARD | {"description": str, "endpoints": list})
        assert info["type"] == "io.nats.micro.v1.info_response"
        for each in info["endpoints"]:
            fits(each, _ENDPOINT | {"metadata": dict})
            assert _NAME.match(each["name"])
            assert each["queue_group"] == "q"
        assert {each["subject"] for each in info["endpoints"]} == {
            f"{bus_name}.ask.users",
            *(f"{bus_name}.ask.users.{slot}" for slot in range(16)),
        }

        stats = await told(client, "STATS", name, ping["id"])
        fits(stats, _STANDARD | {"started": str, "endpoints": list})
        assert stats["type"] == "io.nats.micro.v1.stats_response"
        assert abs((datetime.now(UTC) - datetime.fromisoformat(stats["started"])).total_seconds()) < 60
        for each in stats["endpoints"]:
            fits(each, _ENDPOINT | _COUNTS | {"last_error": str, "data": dict})
            assert each["data"] == {"state": "running"}
        # What says who somebody is does not change.
        assert all(info[field] == stats[field] == ping[field] for field in ("name", "id", "version", "metadata"))


async def test_all_who_run_answer_who_asks_without_a_name(nats_bus: str, bus_name: str, client: Client) -> None:
    async with running(users.service, bus=nats_bus):
        name, inbox = "", client.new_inbox()
        subscription = await client.subscribe(inbox)
        await client.publish("$SRV.PING", reply=inbox)
        while name != f"{bus_name}_users":
            name = json.loads((await subscription.next_msg(timeout=5)).data)["name"]


async def test_the_client_of_nats_py_reads_what_services_say(nats_bus: str, bus_name: str, client: Client) -> None:
    name = f"{bus_name}_users"
    async with running(users.service, bus=nats_bus):
        ping = ServicePing.from_dict(await told(client, "PING", name))
        info = ServiceInfo.from_dict(await told(client, "INFO", name))
        stats = ServiceStats.from_dict(await told(client, "STATS", name))
    assert ping.id == info.id == stats.id
    assert {each.subject for each in info.endpoints} == {each.subject for each in stats.endpoints}


async def test_what_was_asked_and_went_wrong_is_counted_at_its_endpoint(
    nats_bus: str, bus_name: str, client: Client
) -> None:
    subject = f"{bus_name}.ask.users"
    async with running(users.service, bus=nats_bus):
        for question in (REGISTER, ASK, REGISTER, ASK):
            await client.request(subject, question.encode(), timeout=5)
        stats = await told(client, "STATS", f"{bus_name}_users")
    (asked,) = (each for each in stats["endpoints"] if each["subject"] == subject)
    assert (asked["num_requests"], asked["num_errors"]) == (4, 1)
    assert asked["last_error"] == "409:Rejected: already registered"
    assert asked["processing_time"] > 0
    assert asked["average_processing_time"] == asked["processing_time"] // 4
    others = [each for each in stats["endpoints"] if each["subject"] != subject]
    assert {each["num_requests"] for each in others} == {each["average_processing_time"] for each in others} == {0}


# -------------------------------------------------------------------------------------------------------- questions


async def test_what_goes_wrong_is_told_in_the_headers_of_the_services_api(
    nats_bus: str, bus_name: str, client: Client
) -> None:
    cases = {
        REGISTER: (409, "Rejected: already registered"),
        '{"type": "User", "key": "43"}': (404, "Gone: users/43 does not stand"),
        '{"type": "Usher", "key": "43"}': (400, "Refused: users is not asked 'Usher': name one of ChangeEmail, Reg"),
        '{"type": "RegisterUser", "body": {"user_id": 7}}': (400, "Unreadable: RegisterUser of users"),
        "no JSON": (400, "Refused: this is no question"),
    }
    async with running(users.service, bus=nats_bus):
        await client.request(f"{bus_name}.ask.users", REGISTER.encode(), timeout=5)
        for question, (code, message) in cases.items():
            reply = await client.request(f"{bus_name}.ask.users", question.encode(), timeout=5)
            assert reply.headers is not None
            assert reply.headers["Nats-Service-Error-Code"] == str(code)
            assert reply.headers["Nats-Service-Error"].startswith(message)
            said = json.loads(reply.data)
            assert f"{said['error']}: {said['message']}".startswith(message)


async def test_a_client_that_imports_nothing_of_cauce_finds_asks_and_reads(
    nats: Nats, nats_bus: str, bus_name: str, program: Callable[..., subprocess.Popen[str]]
) -> None:
    source = (ROOT / "examples" / "plain_nats" / "client.py").read_text()
    blocked = f"import sys; sys.modules['cauce'] = None\n{source}"
    async with running(users.service, bus=nats_bus):
        process = program(blocked, nats.url(), bus_name)
        printed, _ = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0
    assert re.sub(r"(?<='position': )\d+", "…", printed).splitlines() == [
        f"ping: {bus_name}_users {version('cauce')} users",
        f"info: 17 endpoints, asked at {bus_name}.ask.users",
        "command: {'version': 1, 'position': …, 'changed': True}",
        "command: {'code': 409, 'error': 'Rejected: already registered'}",
        "query: {'user_id': '42', 'name': 'Ana Álvarez', 'email': 'ana@example.org', 'address': ''}",
        "query: {'code': 404, 'error': 'Gone: users/43 does not stand: it was deleted, or never was'}",
        "stats: 4 requests, 2 errors",
        "fact: UserRegistered 42 1 {'user_id': '42', 'name': 'Ana Álvarez', 'email': 'ana@example.org'}",
    ]


_INSTANCE = """
import asyncio, sys
from cauce import running
from shop import users

async def main():
    async with running(users.service, bus=sys.argv[1]):
        print("runs", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


async def test_who_does_not_know_which_instance_holds_a_thing_asks_any(
    nats_bus: str, bus_name: str, client: Client, program: Callable[..., subprocess.Popen[str]]
) -> None:
    async with running(users.service, bus=nats_bus) as bus:
        other = program(_INSTANCE, nats_bus)
        assert other.stdout is not None
        assert (await asyncio.to_thread(other.stdout.readline)) == "runs\n"
        async with asyncio.timeout(20):
            while [len(each.addresses) for each in await bus.wire.instances()] != [9, 9]:
                await bus.clock.sleep(0.02)
        for n in range(32):
            question = {"type": "RegisterUser", "body": {"user_id": f"{n}", "name": "Ana", "email": "a@example.org"}}
            reply = await client.request(f"{bus_name}.ask.users", json.dumps(question).encode(), timeout=5)
            assert (reply.headers, json.loads(reply.data)["version"]) == (None, 1)
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox)
        await client.publish(f"$SRV.STATS.{bus_name}_users", reply=inbox)
        both = [json.loads((await subscription.next_msg(timeout=5)).data) for _ in range(2)]
        passed_on = [
            each["num_requests"] for stats in both for each in stats["endpoints"] if each["subject"].count(".") == 3
        ]
        assert (len(passed_on), sum(passed_on) > 0) == (16, True)
        other.terminate()


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("concurrency", [0, 5])
async def test_a_handler_that_says_more_than_a_bucket_takes_at_once_is_a_dead_letter_and_stops_nobody(
    concurrency: int, nats_bus: str
) -> None:
    service, handled = Service("saying"), set[str]()

    @service.on(concurrency=concurrency, retry=Retry(attempts=2, first=0.01))
    async def say(event: Added) -> list[Add] | None:
        handled.add(event.name)
        return [Add(f"said{n}") for n in range(1_000)] if event.name == "much" else None

    async with running(owner, service, bus=nats_bus) as bus:
        for name in ("much", *(f"thing{n}" for n in range(20))):
            await bus.call(Add(name))
        await bus.settled()
        assert not bus.failed.done()
    assert handled == {"much", *(f"thing{n}" for n in range(20))}
    (letter,) = await letters_of(nats_bus, "saying")
    assert (letter.stream, "say fewer" in letter.error) == ("counters/much", True)
