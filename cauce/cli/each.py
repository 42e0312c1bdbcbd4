"""`cauce run --each`: every service in a process of its own, started again when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence

from cauce.cli.logs import tell
from cauce.cli.signals import LATEST, when_orphaned
from cauce.clock import Clock, SystemClock

__all__ = ["run_each"]

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_WELL = 60.0
"""Seconds after which a process that dies is started again at once, as if it had never died before."""

_MORE = 2.0
"""Seconds beyond those by which a process ends by itself, after which it is killed."""

_HOPELESS = {1, 2}
"""Exit codes for what another start would only repeat: refused, and wrong usage."""


async def run_each(
    names: Sequence[str],
    bus: str,
    store: str | None,
    drain: float,
    clock: Clock | None = None,
    *,
    more: Callable[[int], Sequence[str]] = lambda number: (),
    with_parent: bool = False,
) -> int:
    """Run each name in its own process until SIGTERM or Ctrl-C; the exit code is 0, or that of one that is hopeless.

    Children notice when this process is gone, however it ended: the other end of their standard input closes.

    Parameters:
        more: options of the nth process.
        with_parent: stop, too, when that of this process closes.
    """
    return await _Supervisor(names, bus, store, drain, clock or SystemClock(), more).run(with_parent)


class _Supervisor:
    def __init__(
        self, names: Sequence[str], bus: str, store: str | None, drain: float, clock: Clock,
        more: Callable[[int], Sequence[str]],
    ) -> None:  # fmt: skip
        self._more = more
        self._names, self._bus, self._store, self._drain, self._clock = names, bus, store, drain, clock
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self, with_parent: bool) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        if with_parent:
            when_orphaned(self._stopping.set)
        await asyncio.gather(*(self._keep(name) for name in self._names))
        return self._code

    def _signalled(self, number: int) -> None:
        if self._stopping.is_set():
            self._send(signal.SIGKILL)
            os._exit(128 + number)
        self._stopping.set()

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(number)

    async def _keep(self, name: str) -> None:
        """One process after the other, until all shall stop."""
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            began = self._clock.monotonic()
            code = await self._once(name)
            if self._stopping.is_set():
                break
            if code in _HOPELESS:
                tell(f"{name} ended with {code}, and would again: all stop")
                self._code = self._code or code
                self._stopping.set()
                break
            if self._clock.monotonic() - began > _WELL:
                pause = _FIRST_PAUSE
            how = f"by signal {-code}" if code < 0 else f"with {code}"
            tell(f"{name} ended {how}, and starts again in {pause:g} s")
            await self._rest(pause)
            pause = min(_LONGEST_PAUSE, pause * 2)

    async def _once(self, name: str) -> int:
        command = (sys.executable, "-c", "from cauce.cli import main; main()", "run", name)
        # Not among the arguments, which everybody on the machine may read: an address may hold a password.
        addresses = {"CAUCE_BUS": self._bus} | ({} if self._store is None else {"CAUCE_STORE": self._store})
        process = self._processes[name] = await asyncio.create_subprocess_exec(
            *command, "--drain", str(self._drain), "--with-parent", *self._more(self._names.index(name)),
            stdin=asyncio.subprocess.PIPE, start_new_session=True, env=os.environ | addresses,
        )  # fmt: skip
        tell(f"{name} runs in process {process.pid}")
        ended = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                process.terminate()
                done, _ = await asyncio.wait({ended}, timeout=self._drain + LATEST + _MORE)
                if not done:
                    tell(f"{name} did not end in time and is killed")
                    process.kill()
            return await ended
        finally:
            stopping.cancel()

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return
