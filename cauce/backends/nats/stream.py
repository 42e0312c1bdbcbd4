"""One stream of JetStream that holds a log: made if it is missing, compared if it stands, and watched for damage."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from cauce.backends.nats.api import NAME_IN_USE, NO_MESSAGE, NOT_FOUND, ApiError, ask, refusal
from cauce.backends.nats.link import Link
from cauce.errors import CauceError, Damaged, Refused, Unreachable

__all__ = ["State", "Stored", "Stream"]

_ID = "cauce-id"

_LAGS = 30.0
"""Seconds in which a server that was cut off or stood still learns that it leads no more; it does so after 10."""


class State(msgspec.Struct, frozen=True):
    """How full a stream is."""

    messages: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _Config(msgspec.Struct, frozen=True):
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
    deny_delete: bool = False
    deny_purge: bool = False
    sealed: bool = False
    no_ack: bool = False
    mirror: Any = None
    metadata: dict[str, str] = {}


class _Info(msgspec.Struct, frozen=True):
    config: _Config
    created: str
    state: State


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
        wanted = self._wanted()
        try:
            info = await self._ask("INFO", None)
        except ApiError as error:
            if error.code != NOT_FOUND:
                raise self.refusal(error) from error
            if not make:
                raise Refused(
                    f"there is no bus at {self.link}: name another with --bus, or let a service or an import make this one"
                ) from None
            info = await self._make(wanted)
        self._compare(info.config)
        self.replicas = info.config.num_replicas
        self._created = info.created
        self.id = f"{info.config.metadata.get(_ID) or self.name}:{self.log}:{info.created}"
        self._note(info.state)

    async def _make(self, wanted: dict[str, Any]) -> _Info:
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

    def _compare(self, is_: _Config) -> None:
        wanted = self._wanted()
        for name in ("retention", "storage", "max_msgs", "max_bytes", "max_age", "max_msgs_per_subject"):
            self._must(name, getattr(is_, name), wanted[name])
        for name in ("allow_direct", "allow_atomic"):
            self._must(name, getattr(is_, name), True)
        for name in ("sealed", "no_ack"):
            self._must(name, getattr(is_, name), False)
        self._must("subjects", list(is_.subjects), wanted["subjects"])
        if is_.mirror is not None:
            raise Refused(f"stream {self.name} is a mirror, which cannot be written: open the bus at its origin")
        if 0 <= is_.max_msg_size < 1024 * 1024:
            raise Refused(
                f"stream {self.name} takes messages of {is_.max_msg_size:,} bytes only: set max_msg_size to -1"
            )

    def _must(self, name: str, is_: object, wanted: object) -> None:
        if is_ != wanted:
            raise Refused(
                f"stream {self.name} has {name} = {is_!r}, which would break what {self.log} promise without a word: "
                f"set it to {wanted!r} (nats stream edit {self.name}), or give the bus another name"
            )

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

    async def _ask(self, what: str, question: object) -> _Info:
        return await ask(self.link, f"STREAM.{what}.{self.name}", question, _Info)

    def refusal(self, error: ApiError) -> Exception:
        return refusal(error, self.link, f"stream {self.name}")
