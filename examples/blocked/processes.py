"""Services of the shop in processes of their own, which can be stopped and go on."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from cauce import Bus

EXAMPLES = Path(__file__).parent.parent


class Processes:
    """A process for each of these services, until the block is left."""

    def __init__(self, url: str, *names: str) -> None:
        self._url, self._names = url, names
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Processes":
        path = os.pathsep.join((str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")))
        for name in self._names:
            # In a session of its own: Ctrl-C reaches us only, and we end them. Should we be killed, they notice.
            told = ("run", f"shop.{name}:service", "--bus", self._url, "--drain", "1", "--with-parent")
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-c", "from cauce.cli import main; main()", *told],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()

    async def until_all_run(self, bus: Bus) -> None:
        async with asyncio.timeout(60):
            while not set(self._names) <= {
                each.service for each in await bus.wire.instances() if each.state == "running"
            }:
                await bus.clock.sleep(0.02)

    def stop(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)
