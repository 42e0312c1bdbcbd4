"""The registry: which processes are on the wire of a bus, what each of them serves and announces, who has died."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from cauce.backends.sqlite.short import short
from cauce.clock import Clock
from cauce.identity import is_dead
from cauce.wire import Instance, as_seen

__all__ = ["BACKLOG", "Present", "Registry"]

_COARSE = 100_000_000
"""Nanoseconds within which two changes of a folder may have the same time."""

_OFTEN = 0.005
"""Seconds for which a look at a folder that has just changed is good enough."""

_CHUNK = 1 << 16

_OLD = 60 * 1_000_000_000
"""Nanoseconds after which what a process left behind half-made is removed."""

_QUIET = 6 * 1_000_000_000
"""Nanoseconds without a beat, three of them missed, after which others are asked first."""

BACKLOG = 128
"""Connections that wait to be accepted."""


class Present(msgspec.Struct, frozen=True):
    """What a process says of itself. `owner` is its `identity`."""

    owner: str
    addresses: tuple[str, ...] = ()
    instances: tuple[Instance, ...] = ()

    def answers_in(self, domain: str) -> bool:
        """Whether it serves, or will soon, or did until now, something in a domain."""
        said = (self.addresses, *(instance.addresses for instance in self.instances))
        return any(address.partition("/")[0] == domain for addresses in said for address in addresses)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Present).decode


class Registry:
    """A folder with two files for each process: `<token>.json` with what it says, `<token>.sock` where it listens.

    Both appear whole, by rename, the socket first and listening; so a socket that refuses is of a dead process.
    Raises `OSError` where there is no such folder, unless it may be made.
    """

    def __init__(self, folder: Path, clock: Clock, *, make: bool = True) -> None:
        self._folder, self._clock = folder, clock
        self._directory = self._open(make)
        self._listed, self._seen, self._fresh = -1, -1, 0.0
        self.present: dict[str, Present] = {}
        self._serving: dict[str, list[str]] = {}

    def _open(self, make: bool) -> int:
        if make:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        return os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    # ------------------------------------------------------------------------------------------------- the others

    def look(self) -> None:
        """Read the folder again if it has changed: costs one `fstat` if not.

        Whoever changes it again in the same tick of the file system's clock may be missed for a few milliseconds: call
        `doubt` before, where that matters.
        """
        changed = os.fstat(self._directory).st_mtime_ns
        if changed == self._listed or (changed == self._seen and self._clock.monotonic() < self._fresh):
            return
        self._seen, self._fresh = changed, self._clock.monotonic() + _OFTEN
        self._listed = changed if abs(self._clock.now() * 1000 - changed) > _COARSE else -1
        self.present, self._serving = {}, {}
        for name in sorted(os.listdir(self._directory)):
            token, dot, kind = name.rpartition(".")
            if dot and kind == "json" and (present := self._read(name)) is not None:
                self.present[token] = present
                for address in present.addresses:
                    self._serving.setdefault(address, []).append(token)

    def _read(self, name: str) -> Present | None:
        # What cannot be opened has just gone; what is no file of ours must not make us wait, either.
        with suppress(OSError, msgspec.MsgspecError):
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(name, flags, dir_fd=self._directory)
            try:
                data = b""
                while chunk := os.read(file, _CHUNK):
                    data += chunk
                return _decode(data)
            finally:
                os.close(file)
        return None

    def doubt(self) -> None:
        """Read the folder at the next look, whatever its time says."""
        self._listed = self._seen = -1

    def serving(self, address: str) -> Sequence[str]:
        """The tokens of the processes that serve an address."""
        return tuple(self._serving.get(address, ()))

    def connect(self, token: str) -> socket.socket:
        """A connection to a process. Raises `OSError`; the files of one that is dead are removed."""
        present = self.present.get(token)
        if present is not None and is_dead(present.owner):
            # A child that it forked may still hold its socket.
            self.bury(token)
            raise ConnectionRefusedError(f"{token} is dead")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(self._address(f"{token}.sock"))
        except OSError as error:
            connection.close()
            if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
                self.bury(token)
            raise
        return connection

    def is_alive(self, token: str) -> bool:
        """Whether a process is proved to be alive; the files of one that is dead are removed."""
        try:
            self.connect(token).close()
        except BlockingIOError:
            return True  # Its queue is full: it is slow, or stopped.
        except OSError:
            return False
        return True

    def is_quiet(self, token: str) -> bool:
        """Whether a process has given no sign of life for so long that its loop stands still, or it is stopped."""
        try:
            beat = os.stat(f"{token}.json", dir_fd=self._directory).st_mtime_ns
        except OSError:
            return True
        return self._clock.now() * 1000 - beat > _QUIET

    def instances(self, *, but: str = "") -> list[Instance]:
        """What all processes that are alive announce, but for one."""
        self.doubt()
        self.look()
        found: list[Instance] = []
        for token, present in list(self.present.items()):
            if token != but and self.is_alive(token):
                with suppress(OSError):
                    beat = os.stat(f"{token}.json", dir_fd=self._directory).st_mtime_ns // 1000
                    found += (as_seen(instance, beat, quiet=self.is_quiet(token)) for instance in present.instances)
        return found

    def bury(self, token: str) -> None:
        """Remove the files of a process: what it says first, so that nobody looks for its socket in vain."""
        for kind in ("json", "sock", "json-new", "sock-new"):
            self._remove(f"{token}.{kind}")
        self.present.pop(token, None)
        for tokens in self._serving.values():
            if token in tokens:
                tokens.remove(token)
        self.doubt()

    # ----------------------------------------------------------------------------------------------------- we

    def listen(self, token: str) -> socket.socket:
        """A socket that listens under a token's name."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        new = f"{token}.sock-new"
        try:
            self._reopen()
            listener.bind(self._address(new))
            listener.listen(BACKLOG)
            os.rename(new, f"{token}.sock", src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            listener.close()
            raise
        return listener

    def publish(self, token: str, present: Present) -> None:
        """Say this of the process with a token."""
        new = f"{token}.json-new"
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        with open(file, "wb") as opened:
            opened.write(_encode(present))
            opened.flush()
            os.utime(opened.fileno(), ns=self._now())
        os.rename(new, f"{token}.json", src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self.doubt()

    def beat(self, token: str) -> bool:
        """Give a sign of life. False: the files are gone, so somebody removed them."""
        try:
            os.stat(f"{token}.sock", dir_fd=self._directory)
            os.utime(f"{token}.json", ns=self._now(), dir_fd=self._directory)
        except OSError:
            return False
        return True

    def tidy(self, *, but: str) -> None:
        """Remove what dead processes left, also what they left half-made; `but` is our own token."""
        self.doubt()
        self.look()
        for token in list(self.present):
            if token != but:
                self.is_alive(token)
        # By the file system's own clock: the folder has just been changed by our own files.
        now = os.fstat(self._directory).st_mtime_ns
        for name in os.listdir(self._directory):
            if name.rpartition(".")[0] not in self.present:
                with suppress(OSError):
                    if now - os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_ctime_ns > _OLD:
                        self._remove(name)

    def _reopen(self) -> None:
        """Somebody may have removed the folder while we had it open."""
        opened = self._directory
        self._directory = self._open(make=True)
        os.close(opened)
        self.doubt()

    def _now(self) -> tuple[int, int]:
        now = self._clock.now() * 1000
        return now, now

    def _remove(self, name: str) -> None:
        # Not there, or not ours to remove: it is passed over by everybody in any case.
        with suppress(OSError):
            os.unlink(name, dir_fd=self._directory)

    def _address(self, name: str) -> str:
        return short(self._directory, self._folder, name)

    def close(self) -> None:
        os.close(self._directory)
        # The number may soon be another file's.
        self._directory = -1
