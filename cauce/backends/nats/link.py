"""One process's connection to NATS: it asks, listens, comes back by itself, and says in our errors what went wrong."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from weakref import WeakSet

from nats import errors

from cauce.backends.nats.address import Address, parse
from cauce.backends.nats.call import Call, Lost, Once, Reply
from cauce.backends.nats.client import Client, Tap
from cauce.clock import Clock
from cauce.errors import NoAnswer, NotPermitted, Refused, Unreachable

__all__ = ["OLDEST", "Link", "block", "connect"]

OLDEST = (2, 12)
"""The first version of the server that takes atomic batches."""

_log = logging.getLogger("cauce")

_RETRY = 0.25

_DOUBT = 2.0
"""Times `patience`, after which a server that does not answer is left. A cluster needs 4 to 9 s for a new leader."""


class Link:
    """What the logs and the wire of one bus share. `client` is connected, or trying to be, until `close`.

    `patience` is how many seconds an answer of the server is waited for.
    """

    def __init__(self, address: Address, clock: Clock, patience: float) -> None:
        self.address, self.clock, self.patience = address, clock, patience
        self.client = Client()
        self.came_back: list[Callable[[], None]] = []
        self.went_away: list[Callable[[], None]] = []
        self._calls: dict[bytes, Call] = {}
        self._number = 0
        self._inbox = b""
        self._denied: dict[str, str] = {}
        self._connected = asyncio.Event()
        self._reason = ""
        self._fatal: asyncio.Future[None] | None = None
        self._doubts = (0.0, -math.inf)
        _links.add(self)

    # ------------------------------------------------------------------------------------------------- names

    def subject(self, *tokens: str) -> str:
        """A subject of this bus; the tokens are encoded already, or wildcards."""
        return ".".join((self.address.bus, *tokens) if self.address.bus else tokens)

    def stream(self, name: str) -> str:
        """What a stream, a bucket or a service of this bus is called on the server."""
        return f"{self.address.bus}_{name}" if self.address.bus else name

    def __str__(self) -> str:
        return self.address.shown

    # ------------------------------------------------------------------------------------------------- asking

    async def request(
        self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> Reply:
        """Ask, and wait for one answer.

        Raises `Unreachable` if the server is away for all of `timeout` (then nothing was sent), `NoAnswer` if nobody
        listens there, `NotPermitted` as soon as the server says so, `Lost` if the connection broke before the answer,
        and `TimeoutError`.
        """
        timeout = self.patience if timeout is None else timeout
        until = asyncio.get_running_loop().time() + timeout
        await self.connected(timeout)
        async with asyncio.timeout_at(until):
            future = self.call(subject, payload, b"" if headers is None else block(headers))
            await self.client.kick()
            reply = await future
        if reply.status == 503 and not reply.data:
            raise NoAnswer(f"nobody listens at {subject} on {self}: start who serves it")
        return reply

    def call(
        self, subject: str, payload: bytes = b"", head: bytes = b"", also: Collection[str] = ()
    ) -> asyncio.Future[Reply]:
        """Put a question among what goes out with the next `client.kick`. A denial of `also` is its own, too."""
        once = Once(subject, also)
        self.publish(subject, payload, head, self.expect(once))
        return once.future

    def expect(self, call: Call) -> bytes:
        """An inbox whose messages a call takes, until it is done. Who is away, or may not listen, is told at once."""
        denied = self._denied.get(self._inbox.decode().lower() + "*")
        if denied is not None:
            raise NotPermitted(denied)
        if not self._connected.is_set():
            raise Unreachable(self._away())
        self._number += 1
        name = b"%d" % self._number
        self._calls[name] = call
        call.done(lambda: self._calls.pop(name, None))
        return self._inbox + name

    def publish(self, subject: str, payload: bytes, head: bytes = b"", reply: bytes = b"") -> None:
        """Put a message among what goes out with the next `client.kick`. The header block is sent as it is."""
        name = subject.encode()
        if head:
            self.client.send(
                b"HPUB %b %b %d %d\r\n%b%b\r\n" % (name, reply, len(head), len(head) + len(payload), head, payload)
            )
        else:
            self.client.send(b"PUB %b %b %d\r\n%b\r\n" % (name, reply, len(payload), payload))

    async def listen(self, subject: str, tap: Tap) -> Callable[[], None]:
        """Hand what comes in at a subject to a function, also after a reconnect, until the returned one is called."""
        return await self.client.tap(subject, tap)

    def may_listen(self, subject: str) -> None:
        """Raises `NotPermitted` if the server refused a subscription to this subject. It says so after it was made."""
        if (why := self._denied.get(subject.lower())) is not None:
            raise NotPermitted(why)

    async def connected(self, timeout: float) -> None:
        """Wait until there is a server. Raises `Unreachable` after so many seconds."""
        if self._connected.is_set():
            return
        try:
            async with asyncio.timeout(timeout):
                await self._connected.wait()
        except TimeoutError:
            raise Unreachable(self._away()) from None

    @property
    def turn(self) -> float:
        """Seconds after which it is better to ask again: in a cluster an answer dies with the server that had it."""
        return min(self.patience, max(0.5, self.patience / 5))

    @property
    def is_away(self) -> bool:
        return not self._connected.is_set()

    def doubt(self) -> None:
        """Note that something was not done. Where that goes on, another server is tried: this one hangs, or is cut off.

        Who is cut off from the others still answers much, for a while, but writes nothing: what it wrote is `trust`.
        """
        now, (first, last) = asyncio.get_running_loop().time(), self._doubts
        first = first if now - last < _DOUBT * self.patience else now
        self._doubts = first, now
        if len(self.address.servers) > 1 and now - first >= _DOUBT * self.patience:
            self.trust()
            _log.warning("%s: the server that was asked answers no more; another one is tried", self)
            self.client.leave()

    def trust(self) -> None:
        """Something was written: there is no doubt about the server any more."""
        self._doubts = 0.0, -math.inf

    def _away(self) -> str:
        why = f" ({self._reason})" if self._reason else ""
        return f"no NATS server at {self}{why}: nothing was written; start it, or mend the address"

    # ------------------------------------------------------------------------------------------------- life

    async def open(self) -> None:
        """Connect. Raises `Unreachable`, `NotPermitted` if the server knows no such user, `Refused` if it is old."""
        self._fatal = asyncio.get_running_loop().create_future()
        connecting = asyncio.ensure_future(self._connect())
        try:
            await asyncio.wait({connecting, self._fatal}, timeout=self.patience, return_when=asyncio.FIRST_COMPLETED)
            if self._fatal.done():
                self._fatal.result()
            if not connecting.done():
                raise Unreachable(self._away())
            await connecting
            self._check_version()
            self._inbox = f"{self.client.new_inbox()}.".encode()
            await self.client.tap(f"{self._inbox.decode()}*", self._take)
            self._connected.set()
        except BaseException:
            connecting.cancel()
            with suppress(BaseException):
                await connecting
            await self.close()
            raise
        finally:
            self._fatal.cancel()

    async def _connect(self) -> None:
        address = self.address
        # Each client goes through the servers in an order of its own, and never back to the one that it just left.
        servers = sorted(address.servers, key=lambda _: self.clock.random())
        await self.client.connect(
            servers,
            dont_randomize=True,
            user=address.user if address.password is not None else None,
            password=address.password,
            token=address.user if address.password is None else None,
            name="cauce",
            error_cb=self._wrong,
            disconnected_cb=self._gone,
            reconnected_cb=self._back,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RETRY,  # type: ignore[arg-type]
            connect_timeout=max(1.0, self.patience / len(servers)),  # type: ignore[arg-type]
            ping_interval=20,
        )

    def _check_version(self) -> None:
        version = self.client.connected_server_version
        if (version.major, version.minor) < OLDEST:
            raise Refused(
                f"{self} is NATS server {version.major}.{version.minor}.{version.patch}, which has no atomic batches and "
                f"drops settings it does not know without a word: run version {'.'.join(map(str, OLDEST))} or newer"
            )

    async def close(self) -> None:
        """Let go of the connection; what still waits for an answer is told that it is `Lost`."""
        self._connected.clear()
        self._lose()
        # A connection that breaks while it is closed has nothing left to lose.
        with suppress(OSError, errors.Error, asyncio.TimeoutError):
            await self.client.close()

    # ------------------------------------------------------------------------------------------------- what comes

    def _take(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        call = self._calls.get(subject[len(self._inbox) :])
        if call is not None:
            call.take(subject, reply, data, head)

    async def _gone(self) -> None:
        self._connected.clear()
        self._lose()
        for each in self.went_away:
            each()

    async def _back(self) -> None:
        self._denied.clear()
        self._connected.set()
        for each in self.came_back:
            each()

    def _lose(self) -> None:
        for call in list(self._calls.values()):
            call.fail(Lost(f"the connection to {self} broke before the answer"))

    async def _wrong(self, error: Exception) -> None:
        said = str(error) or type(error).__name__
        self._reason = said.removeprefix("nats: ")
        if "permissions violation" in said:
            self._not_permitted(said)
        elif "authorization" in said.lower() and self._fatal is not None and not self._fatal.done():
            self._fatal.set_exception(
                NotPermitted(f"{self} does not know this user: mend user and password in the address")
            )

    def _not_permitted(self, said: str) -> None:
        # The server names the subject in quotes; nats-py has made small letters of all of it.
        told = f"{self} says {self._reason}: grant it in the server's configuration"
        if " subscription to " in said:
            subject = said.partition(' subscription to "')[2].partition('"')[0]
            self._denied[subject] = told
            if subject == self._inbox.decode().lower() + "*":
                for call in list(self._calls.values()):
                    call.fail(NotPermitted(told))
        for call in list(self._calls.values()):
            if any(f'"{subject.lower()}"' in said for subject in call.subjects()):
                call.fail(NotPermitted(told))


_links: WeakSet[Link] = WeakSet()


def _forked() -> None:
    """A child must not keep alive what its parent's death is known by, nor speak in its name."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for link in list(_links):
        if (file := link.client.fileno()) >= 0:
            # Not closed: the number must stay taken, because objects that this process has inherited will close it.
            os.dup2(nowhere, file, inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_forked)


def block(headers: Mapping[str, str]) -> bytes:
    """A header block. Raises `Refused` for a value that would end its line."""
    for name, value in headers.items():
        if "\n" in value or "\r" in value or "\n" in name:
            raise Refused(f"header {name!r} holds a line break: encode it")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


async def connect(url: str, clock: Clock, patience: float = 5.0) -> Link:
    """A link to the bus at an address. Raises `Refused`, `Unreachable` or `NotPermitted`."""
    link = Link(parse(url), clock, patience)
    try:
        await link.open()
    except errors.Error as error:
        raise Unreachable(f"{link}: {error}") from error
    return link
