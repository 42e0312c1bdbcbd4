"""What the tests share: virtual time, a bus on a temporary file, and programs in processes of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cauce.testing import VirtualClock, VirtualLoop
from cauce.testing.fixtures import bus_url, running_bus

__all__ = ["bus_url", "clock", "program", "running_bus", "virtual"]

T = TypeVar("T")
ROOT = Path(__file__).parent.parent


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
