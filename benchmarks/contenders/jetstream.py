"""FastStream on a NATS server of our own, as its documentation sets it up, at the best of its settings.

The server runs in a process of its own, listens on a free port of this machine, and keeps its stream in files on the
same disk as all others. Left alone it acknowledges what lies in the page cache and flushes every two minutes; with
`sync_interval: always` it flushes before it acknowledges, which is what all others here do.

`deliver`: publishers, each awaiting the acknowledgement of the stream, and one subscriber beside them on the same loop,
which gets messages one by one, as the typed event of the load, and acknowledges each after its handler, durably; the
clock stops when the server says that nothing is left to deliver or to acknowledge. `WAYS` are its push and pull
subscribers; each is tried, and the best one runs. Its log of each message is off. `ask`: request and reply without a
stream, by one caller, to a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nats
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, PullSub
from nats.errors import NoRespondersError

from benchmarks._load import NAME, Load, email
from benchmarks._run import Sample
from benchmarks.contenders.callers import WARM, drive
from benchmarks.contenders.child import child, ready, until_told

__all__ = ["WAYS", "ask", "best", "deliver"]

_STREAM, _DURABLE = "facts", "mirror"
_PATIENCE = 10.0

WAYS: dict[str, dict[str, Any]] = {
    "push": {"queue": _DURABLE},
    "push, 64 workers": {"queue": _DURABLE, "max_workers": 64},
    "pull of 64": {"durable": _DURABLE, "pull_sub": PullSub(batch_size=64)},
    "pull of 500": {"durable": _DURABLE, "pull_sub": PullSub(batch_size=500)},
}


@dataclass(frozen=True)
class EmailChanged:
    """The event of the load."""

    user_id: str
    name: str
    email: str


@dataclass(frozen=True)
class WhoIs:
    """The question of the load."""

    user_id: str


@contextmanager
def _server(folder: Path, *, flushed: bool = False) -> Iterator[str]:
    """A server with a store of its own, gone afterwards. Gives its address."""
    with TemporaryDirectory(dir=folder) as store:
        settings = Path(store) / "server.conf"
        settings.write_text(
            f'listen: "127.0.0.1:-1"\nports_file_dir: "{store}"\n'
            f'jetstream {{ store_dir: "{store}"{", sync_interval: always" if flushed else ""} }}\n'
        )
        process = subprocess.Popen(
            [str(Path(sysconfig.get_path("scripts")) / "nats-server"), "-c", str(settings)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield _address(Path(store) / f"nats-server_{process.pid}.ports")
        finally:
            process.terminate()
            process.wait(timeout=_PATIENCE)


def _address(ports: Path) -> str:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            address: str = json.loads(ports.read_text())["nats"][0]
            return address
        except (OSError, ValueError):
            time.sleep(0.01)
    raise RuntimeError("the NATS server did not start")


@asynccontextmanager
async def _started(broker: NatsBroker) -> AsyncIterator[None]:
    await broker.start()
    try:
        yield
    finally:
        await broker.stop()


def best(folder: Path, load: Load, callers: int, seconds: float, *, flushed: bool) -> str:
    """The way that gets most done, each tried twice, so that no hiccup of the machine decides."""
    tries = [
        (deliver(folder, load, callers, seconds, way, flushed=flushed).rate, way) for _ in range(2) for way in WAYS
    ]
    return max(tries)[1]


def deliver(folder: Path, load: Load, callers: int, seconds: float, way: str, *, flushed: bool) -> Sample:
    """So many publishers, and the subscriber beside them on the same loop."""
    with _server(folder, flushed=flushed) as address:
        return asyncio.run(_deliver(address, load, callers, seconds, WAYS[way]))


async def _deliver(address: str, load: Load, callers: int, seconds: float, way: dict[str, Any]) -> Sample:
    broker, turns, handled = NatsBroker(address, logger=None), load.turns(callers), 0

    async def handle(event: EmailChanged) -> None:
        nonlocal handled
        handled += 1

    stream = JStream(_STREAM, subjects=["users.*"])
    broker.subscriber("users.*", stream=stream, ack_policy=AckPolicy.NACK_ON_ERROR, **way)(handle)

    async def publish() -> None:
        number, key = next(turns)
        await broker.publish(EmailChanged(str(key), NAME, email(number)), f"users.{key}", stream=_STREAM)

    async with _started(broker):
        watching = await nats.connect(address)
        streams = watching.jetstream()

        async def acknowledged() -> None:
            while True:
                told = await streams.consumer_info(_STREAM, _DURABLE)
                if not told.num_pending and not told.num_ack_pending:
                    return
                await asyncio.sleep(0.002)

        await drive(publish, callers, seconds * WARM, acknowledged)
        handled = 0
        sample = await drive(publish, callers, seconds, acknowledged)
        assert handled >= sample.count
        await watching.close()
        return sample


def ask(folder: Path, seconds: float) -> Sample:
    """Ask another process, again and again."""
    with _server(folder) as address, child("benchmarks.contenders.jetstream", address):
        return asyncio.run(_ask(address, seconds))


async def _ask(address: str, seconds: float) -> Sample:
    broker = NatsBroker(address, logger=None)

    async def work() -> None:
        answer = await broker.request(WhoIs("42"), "who_is", timeout=_PATIENCE)
        assert await answer.decode() == "user42@example.org"

    async with _started(broker):
        await _answered(work)
        await drive(work, 1, seconds * WARM)
        return await drive(work, 1, seconds)


async def _answered(work: Callable[[], Awaitable[None]]) -> None:
    """The server may not yet know who answers."""
    async with asyncio.timeout(_PATIENCE):
        while True:
            try:
                await work()
                return
            except NoRespondersError:
                await asyncio.sleep(0.01)


async def _answer(address: str) -> None:
    """The other process."""
    broker = NatsBroker(address, logger=None)

    @broker.subscriber("who_is")
    async def answer(question: WhoIs) -> str:
        return email(int(question.user_id))

    async with _started(broker):
        ready()
        await until_told()


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1]))
