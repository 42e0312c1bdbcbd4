"""The registry: which processes are on the wire of a bus, what each of them serves and announces, who has died."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from cauce.backends.present import Present, read
from cauce.backends.sqlite.short import short
from cauce.clock import Clock
from cauce.errors import Unavailable
from cauce.identity import is_dead
from cauce.wire import QUIET, Instance, Load, as_seen

__all__ = ["BACKLOG", "Present", "Registry"]

_log = logging.getLogger("cauce")

_COARSE = 100_000_000
"""Nanoseconds within which two changes of a folder may have the same time."""

_OFTEN = 0.005
"""Seconds for which a look at a folder that has just changed is good enough."""

_CHUNK = 1 << 16

_OLD = 60 * 1_000_000_000
"""Nanoseconds after which what a process left behind half-made is removed."""

BACKLOG = 128
"""Connections that wait to be accepted."""


_encode = msgspec.json.Encoder().encode
_decode_loads = msgspec.json.Decoder(dict[str, Load]).decode


class Registry:
    """A folder with a few files for each process: `<token>.json` with what it says, `<token>.sock` where it listens.

    Both appear whole, by rename, the socket first and listening; so a socket that refuses is of a dead process.
    The first has the time of the last beat, since the machine started. `<token>.load` is written over with each beat,
    which does not change the folder: so nobody reads that again.
    While the folder cannot be read it is `stale`, and tells what it last knew.
    Raises `OSError` where there is no such folder, unless it may be made.
    """

    def __init__(self, folder: Path, clock: Clock, *, make: bool = True) -> None:
        self._folder, self._clock = folder, clock
        self._directory = self._open(make)
        self._listed, self._seen, self._fresh = -1, -1, 0.0
        self.present: dict[str, Present] = {}
        self.stale = self._known = False
        self._last: dict[str, list[Instance]] = {}
        self._serving: dict[str, list[str]] = {}

    def _open(self, make: bool) -> int:
        if make:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        return os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    # ------------------------------------------------------------------------------------------------- the others

    def look(self) -> None:
        """Read the folder again if it has changed: costs one `fstat` if not.

        Whoever changes it again in the same tick of the file system's clock may be missed for a few milliseconds: call
        `doubt` before, where that matters. Raises `Unavailable` if it cannot be read and never could.
        """
        changed = os.fstat(self._directory).st_mtime_ns
        if changed == self._listed or (changed == self._seen and self._clock.monotonic() < self._fresh):
            return
        self._seen, self._fresh = changed, self._clock.monotonic() + _OFTEN
        try:
            self._read_all()
        except OSError as error:
            self._listed = -1
            self._went_stale(error)
            return
        self._listed = changed if abs(self._clock.now() * 1000 - changed) > _COARSE else -1
        self._known = True
        if self.stale:
            self.stale = False
            _log.warning("the registry %s can be read again", self._folder)

    def _read_all(self) -> None:
        if not os.fstat(self._directory).st_nlink:
            # Removed while we had it open, and perhaps made again since.
            self._exchange(self._open(make=False))
        present, serving = dict[str, Present](), dict[str, list[str]]()
        for name in sorted(os.listdir(self._directory)):
            token, dot, kind = name.rpartition(".")
            if dot and kind == "json" and (said := self._said(name)) is not None:
                present[token] = said
                for address in said.addresses:
                    serving.setdefault(address, []).append(token)
        self.present, self._serving = present, serving

    def _went_stale(self, error: OSError) -> None:
        if not self._known:
            raise Unavailable(f"the registry {self._folder} cannot be read: {error}: mend the folder beside the bus")
        if not self.stale:
            self.stale = True
            _log.warning("the registry %s cannot be read, who runs is told as last known: %s", self._folder, error)

    def _said(self, name: str) -> Present | None:
        # What is no file of ours must not make us wait.
        try:
            data = self._content(name)
        except OSError:
            # Gone just now, or nothing of ours; but where not even that can be seen, the folder cannot be read.
            with suppress(FileNotFoundError):
                os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            return None
        with suppress(msgspec.MsgspecError):
            return read(data)
        return None

    def _content(self, name: str) -> bytes:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(name, flags, dir_fd=self._directory)
        try:
            data = b""
            while chunk := os.read(file, _CHUNK):
                data += chunk
            return data
        finally:
            os.close(file)

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
            if isinstance(error, (ConnectionRefusedError, FileNotFoundError)) and not self.stale:
                self.bury(token)
            raise
        return connection

    def is_alive(self, token: str) -> bool:
        """Whether a process is proved to be alive; the files of one that is dead are removed."""
        try:
            self.connect(token).close()
        except BlockingIOError:
            return True  # Its queue is full: it is slow, or stopped.
        except (ConnectionRefusedError, FileNotFoundError):
            return self.stale and self._may_live(token)
        except OSError:
            return self._may_live(token)  # The socket cannot be reached from here, for now.
        return True

    def _may_live(self, token: str) -> bool:
        present = self.present.get(token)
        return present is not None and is_dead(present.owner) is False

    def is_quiet(self, token: str) -> bool:
        """Whether a process has given no sign of life for so long that its loop stands still, or it is stopped."""
        try:
            beat = os.stat(f"{token}.json", dir_fd=self._directory).st_mtime_ns
        except OSError:
            # What cannot be looked at is no silence.
            return not (self.stale and self._may_live(token))
        return self._age(beat) > QUIET

    def instances(self, *, but: str = "") -> list[Instance]:
        """What all processes that are alive announce, but for one; as last known where the folder cannot be read."""
        self.doubt()
        self.look()
        found = dict[str, list[Instance]]()
        for token, present in list(self.present.items()):
            if token != but and self.is_alive(token):
                found[token] = self._stale_of(token) if self.stale else self._fresh_of(token, present)
        self._last = found
        return [instance for instances in found.values() for instance in instances]

    def _fresh_of(self, token: str, present: Present) -> list[Instance]:
        try:
            age = self._age(os.stat(f"{token}.json", dir_fd=self._directory).st_mtime_ns)
        except OSError:
            return []
        loads, now = self._loads(token), self._clock.now()
        beat = now - round(age * 1_000_000)
        return [
            as_seen(msgspec.structs.replace(each, beat=beat, load=loads.get(each.id, each.load)), now)
            for each in present.instances
        ]

    def _stale_of(self, token: str) -> list[Instance]:
        known = self._last.get(token, self.present[token].instances)
        return [msgspec.structs.replace(each, stale=True) for each in known]

    def _loads(self, token: str) -> Mapping[str, Load]:
        with suppress(OSError, msgspec.MsgspecError):
            return _decode_loads(self._content(f"{token}.load"))
        return {}

    def bury(self, token: str) -> None:
        """Remove the files of a process: what it says first, so that nobody looks for its socket in vain."""
        for kind in ("json", "sock", "load", "json-new", "sock-new"):
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

    def beat(self, token: str, loads: Mapping[str, Load]) -> bool:
        """Give a sign of life, and say how much each instance has to do. False: somebody removed the files."""
        try:
            os.stat(f"{token}.sock", dir_fd=self._directory)
            os.utime(f"{token}.json", ns=self._now(), dir_fd=self._directory)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # They cannot be looked at, for now: nobody can say that they are gone.
        self._write_loads(f"{token}.load", _encode(loads))
        return True

    def _write_loads(self, name: str, said: bytes) -> None:
        # In place and never shorter: who reads it meanwhile finds the old or the new, or for once nothing he can read.
        with suppress(OSError):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            try:
                os.pwrite(file, said.ljust(os.fstat(file).st_size), 0)
            finally:
                os.close(file)

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
        self._exchange(self._open(make=True))

    def _exchange(self, directory: int) -> None:
        opened, self._directory = self._directory, directory
        os.close(opened)
        self.doubt()

    def _now(self) -> tuple[int, int]:
        # Not by the wall clock: were it set back, one that is stopped would seem well until it had come to that time.
        now = round(self._clock.monotonic() * 1_000_000_000)
        return now, now

    def _age(self, beat: int) -> float:
        """Seconds since a beat."""
        return max(0.0, self._clock.monotonic() - beat / 1_000_000_000)

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
