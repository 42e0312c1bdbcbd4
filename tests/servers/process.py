"""One server process with a folder of its own: started, stopped, killed, paused, and never left behind."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.servers import watcher

__all__ = ["Process", "free_port", "until"]

PATIENCE = 30.0

_MEMORY = Path("/dev/shm")
_ROOM = 4 << 30


class Process:
    """What runs is named by a command; what it says goes to `folder/log`.

    Parameters:
        user: as whom it runs, None for ourselves; the folder is that user's.
        prefix: a command that runs the command, as `ip netns exec` does.
    """

    def __init__(self, name: str, *, user: str | None = None, prefix: Sequence[str] = ()) -> None:
        self.name, self.user, self.prefix = name, user, prefix
        # No test takes the power away, so what a server keeps may lie in memory: a slow disk says nothing of us.
        roomy = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM
        self.folder = Path(tempfile.mkdtemp(prefix=f"cauce-{name}-", dir=_MEMORY if roomy else None))
        _tell(f"+folder {self.folder}")
        if user is not None:
            shutil.chown(self.folder, user)
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._running is not None, f"{self.name} does not run"
        return self._running.pid

    def alive(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def start(self, command: Sequence[str], ready: Callable[[], bool]) -> None:
        """Run the command; returns when `ready` says so. If it ends before, what it said is in the error."""
        assert not self.alive(), f"{self.name} runs already"
        with (self.folder / "log").open("ab") as log:
            self._running = subprocess.Popen(
                [*self.prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=self.user,
                extra_groups=None if self.user is None else [],
                start_new_session=True,  # Ctrl-C is for pytest, which then stops it in its own way
            )
        _tell(f"+pid {self.pid}")
        until(lambda: not self.alive() or ready(), f"{self.name} to start", lambda: self.log()[-4000:])
        assert self.alive(), f"{self.name} did not start:\n{self.log()[-4000:]}"

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and wait until it has; if it does not, it is killed."""
        if self._running is None:
            return
        if self.alive():
            self.signal(signal.SIGCONT)
            self._running.send_signal(by)
        try:
            self._running.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
        self._ended()

    def kill(self) -> None:
        """SIGKILL to it and all that descends from it, as when the machine loses power."""
        if self._running is not None:
            watcher.slay(self._running.pid)
            self._running.wait(PATIENCE)
            self._ended()

    def signal(self, which: signal.Signals) -> None:
        """To it and all that descends from it: SIGSTOP makes a server hang, and it does; SIGCONT lets it go on."""
        family = watcher.family(self.pid)
        for each in family:
            os.kill(each, which)
        if which == signal.SIGSTOP:
            # A signal takes its time, most of all with threads on several processors.
            until(lambda: all(map(watcher.is_stopped, family)), f"{self.name} to stop")

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def remove(self) -> None:
        """End it in no particular way, and take its folder away."""
        self.kill()
        watcher.clear(str(self.folder))
        _tell(f"-folder {self.folder}")

    def _ended(self) -> None:
        _tell(f"-pid {self.pid}")
        self._running = None


def free_port() -> int:
    """A port of loopback that is free, below those that the kernel gives to whoever connects somewhere."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def until(done: Callable[[], bool], what: str, told: Callable[[], str] = str, *, patience: float = PATIENCE) -> None:
    """Look again and again. Who waits in vain is told what was waited for, and what `told` has to say."""
    end = time.monotonic() + patience
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {patience} seconds for {what}. {told()}")
        time.sleep(0.01)


@functools.cache
def _watcher() -> subprocess.Popen[str]:
    """Started with the first server, ended by the end of this process, whatever that is."""
    return subprocess.Popen(
        [sys.executable, "-S", watcher.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        start_new_session=True,
    )


def _tell(line: str) -> None:
    pipe = _watcher().stdin
    assert pipe is not None
    pipe.write(line + "\n")
