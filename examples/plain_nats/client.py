"""A client that knows NATS and nothing of Cauce: finds the users, registers one, asks for it, and reads the facts.

Usage: python client.py [nats://host:4222 [BUS]]

A bus that has a name begins its streams and services with `name_`, and its subjects with `name.`.
"""

import asyncio
import json
import sys
from typing import Any
from urllib.parse import unquote

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg


async def main(server: str = "nats://127.0.0.1:4222", bus: str = "") -> None:
    client = await nats.connect(server)
    try:
        service = f"{bus}_users" if bus else "users"
        subject = await discover(client, service, "users")
        await change(client, subject)
        await ask(client, subject)
        await statistics(client, service, subject)
        await facts(client, f"{bus}_facts" if bus else "facts", f"{bus}.facts.users.>" if bus else "facts.users.>")
    finally:
        await client.close()


async def discover(client: Client, name: str, domain: str) -> str:
    """The subject at which a service is asked about a domain, as it says (ADR-32, the services API of NATS)."""
    found = json.loads((await client.request(f"$SRV.PING.{name}", timeout=5)).data)
    print("ping:", found["name"], found["version"], found["metadata"]["domains"])
    info = json.loads((await client.request(f"$SRV.INFO.{name}.{found['id']}", timeout=5)).data)
    subject = next(each["subject"] for each in info["endpoints"] if each["name"] == domain)
    print("info:", len(info["endpoints"]), "endpoints, asked at", subject)
    return str(subject)


async def change(client: Client, subject: str) -> None:
    """A command. The owner decides; a rejection is an error of the services API."""
    ana = {"user_id": "42", "name": "Ana Álvarez", "email": "ana@example.org"}
    for _ in range(2):
        reply = await request(client, subject, {"type": "RegisterUser", "body": ana, "by": "plain"})
        print("command:", reply)


async def ask(client: Client, subject: str) -> None:
    """How a thing stands, by its owner."""
    for key in ("42", "43"):
        reply = await request(client, subject, {"type": "User", "key": key})
        print("query:", reply.get("body", reply))


async def request(client: Client, subject: str, question: dict[str, Any]) -> dict[str, Any]:
    """The answer, or what the headers of the services API say that went wrong."""
    reply = await client.request(subject, json.dumps(question).encode(), timeout=5)
    headers = reply.headers or {}
    if "Nats-Service-Error" in headers:
        return {"code": int(headers["Nats-Service-Error-Code"]), "error": headers["Nats-Service-Error"]}
    answer: dict[str, Any] = json.loads(reply.data)
    return answer


async def statistics(client: Client, name: str, subject: str) -> None:
    stats = json.loads((await client.request(f"$SRV.STATS.{name}", timeout=5)).data)
    for each in stats["endpoints"]:
        if each["subject"] == subject:
            print("stats:", each["num_requests"], "requests,", each["num_errors"], "errors")


async def facts(client: Client, stream: str, subjects: str) -> None:
    """All facts of a domain: CloudEvents in binary mode, each on `facts.<domain>.<slot>.<key>`."""
    subscription = await client.jetstream().subscribe(subjects, stream=stream, ordered_consumer=True)
    pending = 1
    while pending:
        message: Msg = await subscription.next_msg(timeout=5)
        pending = message.metadata.num_pending
        # Values of headers are percent-encoded where they are not plain; the bus's own notes have none of these.
        event = {name: unquote(value) for name, value in (message.headers or {}).items() if name.startswith("ce-")}
        if event:
            print("fact:", event["ce-type"], event["ce-subject"], event["ce-streamversion"], json.loads(message.data))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
