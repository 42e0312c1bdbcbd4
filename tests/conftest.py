"""What the tests share: virtual time, a bus on a temporary file, and programs in processes of their own."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cauce.testing import VirtualClock, VirtualLoop
from cauce.testing.fixtures import bus_url, running_bus
from tests.kept import hurry
from tests.servers import Missing, Nats, NatsCluster, Postgres, absent

__all__ = ["bus_url", "clock", "program", "running_bus", "virtual"]

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
BACKENDS = ("sqlite", "postgresql", "nats")
_numbers = itertools.count(1)


LONGEST = (
    "churn",
    "standing_still",
    "wire_promises",
    "instances",
    "failure",
    "unique",
    "concurrency",
    "owner",
    "servers",
    "draining",
    "kills",
    "backlog",
)
"""Files that take long begin first: what begins last is waited for with the other processor idle."""

WHOLE = pytest.StashKey[list[str]]()
"""The ids of all tests, where all were collected, whichever of them are run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("lf", False):
        config.stash[WHOLE] = [item.nodeid for item in items]
        order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again soon, and what a person decided is seen soon, where time is real."""
    hurry(monkeypatch)
    monkeypatch.setattr("cauce.shares.BEAT", 0.1)


@pytest.fixture
def clock() -> VirtualClock:
    """A clock that jumps ahead whenever nothing else is to be done."""
    return VirtualClock()


@pytest.fixture
def virtual(clock: VirtualClock) -> Callable[[Callable[[], Awaitable[T]]], T]:
    """Runs a coroutine function in the virtual time of `clock`."""

    def run(main: Callable[[], Awaitable[T]]) -> T:
        async def body() -> T:
            return await main()

        with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
            return runner.run(body())

    return run


@pytest.fixture
def program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program in a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, *arguments: str) -> subprocess.Popen[str]:
        path = os.pathsep.join((str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")))
        process = subprocess.Popen(
            [sys.executable, "-c", text, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------------- servers
# Each starts with the first test that asks for it, and serves all of them. Who kills or pauses one, starts one of its
# own, or leaves it running as it was.


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The PostgreSQL server of this run."""
    yield from _served(Postgres)


@pytest.fixture(scope="session")
def nats() -> Iterator[Nats]:
    """The NATS server of this run: JetStream, flushing before it acknowledges."""
    yield from _served(Nats)


@pytest.fixture(scope="session")
def old_nats() -> Iterator[Nats]:
    """A NATS server that is too old for us, where the machine has one; no test may rest on it alone."""
    yield from _served(lambda: Nats(name="old", old=True), must=False)


@pytest.fixture(scope="session")
def three_nats() -> Iterator[NatsCluster]:
    """The three NATS servers of this run."""
    yield from _served(NatsCluster)


@pytest.fixture
def nats_cluster(three_nats: NatsCluster) -> NatsCluster:
    """Three NATS servers that are one, whatever the test before did to them. Who hurts one heals it."""
    three_nats.whole()
    return three_nats


S = TypeVar("S", Postgres, Nats, NatsCluster)


def _served(start: Callable[[], S], *, must: bool = True) -> Iterator[S]:
    try:
        server = start()
    except Missing as missing:
        absent(missing, must=must)
    yield server
    server.remove()


@pytest.fixture
def bus_name() -> str:
    """A name that no other bus of this run has, nor begins with."""
    return f"t{os.getpid()}_{next(_numbers):05}"


@pytest.fixture
def postgres_bus(postgres: Postgres, bus_name: str) -> str:
    """The address of an empty bus on PostgreSQL: a schema of its own, which goes with the server; a drop takes long."""
    return postgres.url(schema=bus_name)


@pytest.fixture
def nats_bus(nats: Nats, bus_name: str) -> Iterator[str]:
    """The address of an empty bus on NATS: a name of its own."""
    yield nats.url(bus_name)
    nats.drop(bus_name)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn."""
    return str(request.param)


@pytest.fixture
def each_bus(backend: str, request: pytest.FixtureRequest) -> str:
    """The address of an empty bus on each backend in turn; what its services keep goes with it."""
    name = {"sqlite": "bus_url", "postgresql": "postgres_bus", "nats": "nats_bus"}[backend]
    url = str(request.getfixturevalue(name))
    return url if backend != "nats" else f"{url}?files={request.getfixturevalue('tmp_path')}"
