"""The other processes of the crash tests: a server that forks them quickly, and what each of them does.

Run as a program it reads requests from the socket that is its standard input: a role with its arguments, and the pipe
to report on. The server itself never opens a log, so its forks are as good as fresh processes.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import apsw  # noqa: E402 - the path comes first

from cauce.backends import sqlite  # noqa: E402
from cauce.backends.sqlite import log, table, wake  # noqa: E402
from cauce.clock import SystemClock  # noqa: E402
from cauce.codec import Entry, Meta, sealed  # noqa: E402
from cauce.errors import CauceError  # noqa: E402
from cauce.log import Also, Appended, Filter  # noqa: E402

Report = Callable[..., None]


def fact(stream: str, body: Any = None, id: str = "") -> Entry:
    """A fact with any plain value as its body."""
    return sealed(stream, "Counted", id or SystemClock().id(), Meta(1), json.dumps(body).encode())


async def verdict(call: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    """What came of it, as plain values."""
    try:
        answer = await call()
    except CauceError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"version": answer.version} if isinstance(answer, Appended) else {"answer": str(answer)}


def gate(path: str) -> None:
    """Wait until the test lets go of this file."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


# ------------------------------------------------------------------------------------------------------- roles


async def write(report: Report, path: str, name: str, seed: int) -> None:
    """Append to shared streams, some to two at once, and put own records; tell of each that was acknowledged."""
    random, bus = Random(seed), await sqlite.open(path)

    async def caller(me: str) -> None:
        for n in count():
            stream, many = f"things/{random.randrange(5)}", random.choice((1, 1, 1, 3))
            tag, beside = f"{me}.{n}", random.choice(([], [], ["_tags/shared"]))
            whole = many + len(beside)
            entries = [fact(stream, [tag, part, whole], f"{tag}.{part}") for part in range(many)]
            also = [Also(other, [fact(other, [tag, many, whole], f"{tag}.{many}")]) for other in beside]
            done = await bus.facts.append(stream, entries, also=also)
            report(stream=stream, version=done.version, position=done.position, tag=tag, many=many)
            if n % 5 == 4:
                await bus.records.put(f"things/{me}", n, fact(f"things/{me}", n))
                report(record=f"things/{me}", version=n)

    await asyncio.gather(*(caller(f"{name}.{n}") for n in range(3)))


async def stop(report: Report, path: str, where: str, forks: bool = False) -> None:
    """Append once, then stop like one who was sent SIGSTOP: inside the transaction, in turn, or next in turn.

    If it forks, it leaves a child behind that inherited the open log.
    """
    bus = await sqlite.open(path)
    await bus.facts.append("things/stopped", [fact("things/stopped")])
    if forks:
        if not (child := os.fork()):
            signal.pause()
        report(child=child)
    armed = [True]

    def halt() -> None:
        if armed:
            armed.clear()
            report(pid=os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)
            # Another thread may take the signal: this one must not get on before it is stopped, too.
            time.sleep(0.05)

    flush, flock = table.Table.flush, fcntl.flock

    def flushed(self: table.Table) -> None:
        flush(self)
        halt()

    def flocked(file: int, how: int) -> None:
        flock(file, how)
        name = os.readlink(f"/proc/self/fd/{file}")
        if how == fcntl.LOCK_EX and name.endswith({"next": "turn.next", "turn": "turn.main"}[where]):
            halt()

    if where == "transaction":
        table.Table.flush = flushed  # type: ignore[method-assign]
    else:
        fcntl.flock = flocked  # type: ignore[assignment]
    report(**await verdict(lambda: bus.facts.append("things/stopped", [fact("things/stopped")])))


async def foreign(report: Report, path: str) -> None:
    """A program that is not Cauce, and holds the write lock until it is killed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("begin immediate")
    report(pid=os.getpid())
    signal.pause()


async def tail(report: Report, path: str, wanted: int) -> None:
    """Wait for entries, and tell when each arrived. The slow look is put off, so that only the wake-up brings them."""
    log._POLL = 600.0
    bus = await sqlite.open(path)
    looked = await bus.facts.head()
    report(ready=True)
    for _ in range(wanted):
        page = await bus.facts.read(Filter(domains=frozenset({"things"})), after=looked, wait=60)
        report(position=page.entries[0].position, at=time.monotonic())
        looked = page.looked
    await bus.close()


async def silent(report: Report, path: str, go: str) -> None:
    """Append without waking anybody, once told so."""
    wake.Wake.tell = lambda self: None  # type: ignore[method-assign]
    bus = await sqlite.open(path)
    report(ready=True)
    gate(go)
    report(**await verdict(lambda: bus.facts.append("things/1", [fact("things/1")])))
    await bus.close()


async def share(report: Report, path: str, name: str, go: str, appends: int) -> None:
    """One caller that appends as fast as it can once told so; tells when each was acknowledged."""
    bus = await sqlite.open(path)
    await bus.facts.append(f"things/{name}", [fact(f"things/{name}")])
    report(ready=True)
    gate(go)
    began, times = time.monotonic(), []
    for _ in range(appends):
        await bus.facts.append(f"things/{name}", [fact(f"things/{name}")])
        times.append(time.monotonic())
    report(began=began, times=times)
    await bus.close()


async def make(report: Report, path: str, go: str) -> None:
    """Open, and so perhaps make, the log once told so."""
    report(ready=True)
    gate(go)
    bus = await sqlite.open(path)
    report(id=bus.facts.id, **await verdict(lambda: bus.facts.append("things/1", [fact("things/1")])))
    await bus.close()


async def nobody(report: Report, path: str) -> None:
    """Open as a user whom the permissions bind."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    report(**await verdict(lambda: sqlite.open(path)))


async def fill(report: Report, path: str, ballast: str) -> None:
    """Append until the disk is full, make room, and go on. Without ballast the limit on file sizes is the disk."""
    if not ballast:
        limit_files(1_000_000)
    bus = await sqlite.open(path)
    acknowledged, refused = 0, list[dict[str, Any]]()
    while len(refused) < 5:
        entries = [fact("things/1", ["x" * 10_000, part]) for part in range(3)]
        said = await verdict(lambda entries=entries: bus.facts.append("things/1", entries))  # type: ignore[misc]
        if "error" in said:
            refused.append(said)
        else:
            acknowledged = said["version"]
    meanwhile = (await bus.facts.read(limit=5000)).entries
    claim = await verdict(lambda: bus.facts.claim("slot", "a"))
    make_room(ballast)
    after = await verdict(lambda: bus.facts.append("things/1", [fact("things/1")]))
    await bus.close()
    bus = await sqlite.open(path)
    versions = [entry.checked().version for entry in (await bus.facts.read(limit=5000)).entries]
    await bus.close()
    report(
        acknowledged=acknowledged, refused=refused, meanwhile=len(meanwhile), claim=claim, after=after, versions=versions,
        check=check(path),
    )  # fmt: skip


async def start_full(report: Report, path: str, ballast: str) -> None:
    """Make a log where there is no room at all, then where there is."""
    if not ballast:
        limit_files(1000)
    said = await verdict(lambda: sqlite.open(path))
    make_room(ballast)
    bus = await sqlite.open(path)
    after = await verdict(lambda: bus.facts.append("things/1", [fact("things/1")]))
    await bus.close()
    report(said=said, after=after, check=check(path))


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def make_room(ballast: str) -> None:
    if ballast:
        os.unlink(ballast)
    else:
        limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])


class Still(SystemClock):
    """A clock by which every flush is short."""

    def monotonic(self) -> float:
        return 0.0


async def unflushed(report: Report, path: str, written: int) -> None:
    """Append while the disk fails to flush, after so many appends, of which the last may be made on the loop."""
    failing = [False]

    class File(apsw.VFSFile):
        def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's own name
            if failing[0]:
                error = apsw.IOError("injected")
                error.extendedresult = apsw.SQLITE_IOERR_FSYNC  # type: ignore[attr-defined]
                raise error
            super().xSync(flags)

    class Disk(apsw.VFS):
        def __init__(self) -> None:
            super().__init__("failing", "unix", makedefault=True)

        def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802 - SQLite's own name
            return File("unix", name, flags)

    disk = Disk()
    bus = await sqlite.open(path, clock=Still())
    before = {}
    for _ in range(written):
        before = await verdict(lambda: bus.facts.append("things/1", [fact("things/1")]))
    failing[0] = True
    said = [await verdict(lambda: bus.facts.append("things/1", [fact("things/1")])) for _ in range(2)]
    failing[0] = False
    after = await verdict(lambda: bus.facts.append("things/1", [fact("things/1")]))
    report(before=before, said=said, after=after, disk=disk is not None)
    os._exit(0)


def check(path: str) -> str:
    """SQLite's own opinion."""
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return str(connection.pragma("integrity_check"))
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------------------ server


def play(out: int, role: str, arguments: list[Any]) -> None:
    def report(**what: Any) -> None:
        data = json.dumps(what).encode() + b"\n"
        while data:
            data = data[os.write(out, data) :]

    asyncio.run(globals()[role](report, *arguments))


def serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, files, _, _ = socket.recv_fds(requests, 65536, 1)
        if not data:
            return
        role, arguments = json.loads(data)
        pid = os.fork()
        if not pid:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                play(files[0], role, arguments)
            except BaseException as error:
                os.write(2, f"{role}: {error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        os.close(files[0])
        requests.send(str(pid).encode())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        play(1, sys.argv[1], sys.argv[2:])
    else:
        serve(socket.socket(fileno=0))
