"""One stream of JetStream that holds a log: made if it is missing, compared if it stands, and watched for damage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec

from cauce.backends import nothing_at
from cauce.backends.health import DURABLE, NOTHING_LOST, ONE_ORDER, Finding
from cauce.backends.nats.api import NAME_IN_USE, NO_MESSAGE, NOT_FOUND, ApiError, ask, refusal
from cauce.backends.nats.link import Link
from cauce.errors import CauceError, Damaged, Refused, Unreachable

__all__ = ["Cluster", "Config", "Info", "Peer", "State", "Stored", "Stream", "cure_of", "info_of", "streams_of"]

_ID = "cauce-id"
_LIMITS = ("retention", "max_msgs", "max_bytes", "max_age", "max_msgs_per_subject")
"""Settings by which a server drops what it took."""

_LAGS = 30.0
"""Seconds in which a server that was cut off or stood still learns that it leads no more; it does so after 10."""


class State(msgspec.Struct, frozen=True):
    """How full a stream is."""

    messages: int = 0
    first_seq: int = 0
    last_seq: int = 0


class Config(msgspec.Struct, frozen=True):
    """What of a stream's configuration our promises hang on."""

    name: str
    subjects: tuple[str, ...] = ()
    retention: str = "limits"
    storage: str = "file"
    discard: str = "old"
    num_replicas: int = 1
    max_msgs: int = -1
    max_bytes: int = -1
    max_age: int = 0
    max_msgs_per_subject: int = -1
    max_msg_size: int = -1
    allow_direct: bool = False
    allow_atomic: bool = False
    allow_msg_ttl: bool = False
    deny_delete: bool = False
    deny_purge: bool = False
    sealed: bool = False
    no_ack: bool = False
    mirror: Any = None
    metadata: dict[str, str] = {}


class Peer(msgspec.Struct, frozen=True):
    """Another server that holds a stream, beside its leader."""

    name: str
    offline: bool = False


class Cluster(msgspec.Struct, frozen=True):
    """Which servers hold a stream. `name` is empty where there is only one."""

    name: str = ""
    leader: str = ""
    replicas: tuple[Peer, ...] | None = None


class Info(msgspec.Struct, frozen=True):
    """What the server says of a stream."""

    config: Config
    created: str
    state: State
    cluster: Cluster = Cluster()

    @property
    def holders(self) -> tuple[str, ...]:
        """The names of the servers that hold it and are there."""
        leader = (self.cluster.leader,) if self.cluster.leader else ()
        return leader + tuple(peer.name for peer in self.cluster.replicas or () if not peer.offline)


class Stored(msgspec.Struct, frozen=True):
    """A message as `$JS.API.STREAM.MSG.GET` gives it."""

    subject: str
    seq: int
    hdrs: bytes = b""
    data: bytes = b""


class _Got(msgspec.Struct, frozen=True):
    message: Stored


class Stream:
    """`name` is the stream's on the server, `id` changes when it is made anew, `replicas` is how often it is stored.

    Once `broken` it stays so, and says why: whoever writes or reads stops loudly.
    """

    def __init__(self, link: Link, log: str, *, last: bool = False, lasting: bool = True) -> None:
        self.link, self.log, self.last, self.lasting = link, log, last, lasting
        self.name = link.stream(log)
        self.everything = link.subject(log, ">")
        self.id = ""
        self.replicas = 1
        self.broken: Damaged | None = None
        self.head = 0
        self._created = ""
        self._lags = 0.0
        self._asking: asyncio.Future[State] | None = None

    # ------------------------------------------------------------------------------------------------- opening

    async def open(self, *, make: bool = True) -> None:
        """Take the stream that stands, or make it.

        Raises `Refused` if it would break a promise without a word, with the setting and the cure.
        """
        info = await self.info(make=make)
        self._compare(info.config)
        self.replicas = info.config.num_replicas
        self._created = info.created
        self.id = f"{info.config.metadata.get(_ID) or self.name}:{self.log}:{info.created}"
        self._note(info.state)

    async def info(self, *, make: bool = False) -> Info:
        """What the server says of it. Raises `Refused` where there is none, and none is to be made."""
        try:
            return await self._ask("INFO", None)
        except ApiError as error:
            if error.code != NOT_FOUND:
                raise self.refusal(error) from error
        if not make:
            raise nothing_at(self.link)
        return await self._make(self._wanted())

    async def _make(self, wanted: dict[str, Any]) -> Info:
        try:
            return await self._ask("CREATE", wanted)
        except ApiError as error:
            if error.code != NAME_IN_USE:
                raise self.refusal(error) from error
        # Another process made it meanwhile, with an id of its own.
        return await self._ask("INFO", None)

    def _wanted(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subjects": [self.everything],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "num_replicas": self.link.address.replicas,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "max_msgs_per_subject": 1 if self.last else -1,
            "max_msg_size": -1,
            # Ids of messages are those of tries, not of entries: they hold a chain together while it is written.
            "duplicate_window": 1_000_000_000,
            "allow_direct": True,
            "allow_atomic": True,
            # What was recorded is there for ever; the commands are purged when their audit time is over.
            "deny_delete": self.lasting,
            "deny_purge": self.lasting,
            "metadata": {_ID: self.link.clock.id()},
        }

    def _compare(self, is_: Config) -> None:
        for wrong in self.breaches(is_):
            raise Refused(
                f"{wrong.what} is {wrong.found}, which would break what {self.log} promise without a word: {wrong.cure}"
            )

    def breaches(self, is_: Config) -> Iterator[Finding]:
        """What of its configuration would break a promise without a word."""
        wanted = self._wanted()
        must: list[tuple[str, object, str]] = [
            ("storage", "file", DURABLE),
            *((name, wanted[name], NOTHING_LOST) for name in _LIMITS),
            *((name, True, ONE_ORDER) for name in ("allow_direct", "allow_atomic")),
            *((name, False, DURABLE) for name in ("sealed", "no_ack")),
        ]
        for name, value, promise in must:
            if (found := getattr(is_, name)) != value:
                yield self._wrong(name, found, value, promise)
        if list(is_.subjects) != wanted["subjects"]:
            yield self._wrong("subjects", list(is_.subjects), wanted["subjects"], ONE_ORDER)
        if is_.mirror is not None:
            what = f"stream {self.name}"
            yield Finding(what, "a mirror", "written to", ONE_ORDER, "open the bus at the origin of the mirror")
        if 0 <= is_.max_msg_size < 1024 * 1024:
            yield self._wrong("max_msg_size", is_.max_msg_size, -1, NOTHING_LOST)

    def lapses(self, is_: Config) -> Iterator[Finding]:
        """What of its configuration lets somebody else break a promise later."""
        for name in ("deny_delete", "deny_purge") if self.lasting else ():
            if not getattr(is_, name):
                yield self._wrong(name, False, True, NOTHING_LOST)

    def _wrong(self, name: str, found: object, needed: object, promise: str) -> Finding:
        cure = cure_of(self.name, name, needed)
        return Finding(f"{name} of stream {self.name}", repr(found), repr(needed), promise, cure)

    # ------------------------------------------------------------------------------------------------- watching

    async def state(self) -> State:
        """How full it is, as the leader says. Raises `Damaged` if it is not the stream that was opened."""
        if self.broken is not None:
            raise self.broken
        # What is acknowledged to us while we wait may be more than the answer knows of.
        before = self.head
        try:
            info = await self._ask("INFO", None)
        except ApiError as error:
            if error.code == NOT_FOUND:
                raise self.stop("was deleted") from None
            raise self.refusal(error) from error
        if info.created != self._created:
            raise self.stop("was deleted and made anew")
        self.replicas = info.config.num_replicas
        if info.state.last_seq < before:
            raise self._behind(info.state.last_seq, before)
        self._lags = 0.0
        self._note(info.state)
        return info.state

    def _behind(self, last: int, known: int) -> CauceError:
        """What it means that fewer are there than were. In a cluster one may answer that leads no more, for a while."""
        now = asyncio.get_running_loop().time()
        self._lags = self._lags or now
        if self.replicas == 1 or now - self._lags > _LAGS:
            return self.stop(f"ends at {last:,}, but had {known:,} entries")
        self.link.doubt()
        return Unreachable(
            f"a server of {self.link} has {last:,} of {known:,} entries of {self.name}: it is tried again"
        )

    def _note(self, state: State) -> None:
        self.head = max(self.head, state.last_seq)

    def stop(self, what: str) -> Damaged:
        """From now on everything on this stream is refused."""
        if self.broken is None:
            self.broken = Damaged(
                f"stream {self.name} on {self.link} {what} while it was open: stop, restore it from a backup "
                "(nats stream restore), then open the bus again"
            )
        return self.broken

    # ------------------------------------------------------------------------------------------------- looking

    async def last_of(self, subject: str) -> Stored | None:
        """The last message on a subject or pattern, as the leader has it."""
        return await self._get({"last_by_subj": subject})

    async def next_of(self, subject: str, position: int) -> Stored | None:
        """The first message on a subject or pattern at or behind a position, as the leader has it."""
        return await self._get({"next_by_subj": subject, "seq": position})

    async def _get(self, question: dict[str, object]) -> Stored | None:
        try:
            return (await ask(self.link, f"STREAM.MSG.GET.{self.name}", question, _Got)).message
        except ApiError as error:
            if error.code == NOT_FOUND:
                raise self.stop("was deleted") from None
            if error.code == NO_MESSAGE:
                return None
            raise self.refusal(error) from error

    async def _ask(self, what: str, question: object) -> Info:
        return await ask(self.link, f"STREAM.{what}.{self.name}", question, Info)

    def refusal(self, error: ApiError) -> Exception:
        return refusal(error, self.link, f"stream {self.name}")


def cure_of(stream: str, setting: str, needed: object) -> str:
    """What to do about a setting of a stream. What it is stored on is settled when it is made."""
    edit = "" if setting == "storage" else f"set it to {needed!r} (nats stream edit {stream}), or "
    return f"{edit}give the bus another name"


async def info_of(link: Link, name: str) -> Info:
    """What the server says of any stream that is there."""
    try:
        return await ask(link, f"STREAM.INFO.{name}", None, Info)
    except ApiError as error:
        raise refusal(error, link, f"stream {name}") from error


def streams_of(link: Link) -> tuple[Stream, Stream, Stream, Stream]:
    """The streams of a bus: facts, commands, records, and leases, where claims live that are no messages."""
    return (
        Stream(link, "facts"),
        Stream(link, "commands", lasting=False),
        Stream(link, "records", last=True, lasting=False),
        Stream(link, "leases", last=True, lasting=False),
    )
