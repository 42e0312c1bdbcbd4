"""What a process counts of its own work, as plain numbers that any thread may read.

It stands around what is there, and nothing below knows of it: a handler is given back as a handler, a wire as a wire.
Without a meter nothing of this runs. Names in it are those of services, functions and message types, never of things.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Collection, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

import msgspec

from cauce.clock import Clock, SystemClock
from cauce.errors import NoAnswer, Unavailable, Unreachable
from cauce.guarded import Bounded, Guarded
from cauce.store import Store, Unit
from cauce.wire import Handler, Instance, Wire

if TYPE_CHECKING:
    from cauce.codec import Entry

__all__ = ["BUCKETS", "Answered", "Asked", "Handled", "Meter", "Told", "Work", "address_of"]

BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
"""Seconds: into these parts the times of handlers and questions fall."""

_KINDS = frozenset({"call", "ask", "fetch", "state", "history", "states", "undo", "publish"})
_OTHER = "other"
_encode = msgspec.json.Encoder().encode


class Times:
    """How long something took, by `BUCKETS`, the last part for all that took longer."""

    __slots__ = ("parts", "seconds")

    def __init__(self) -> None:
        self.parts, self.seconds = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.parts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class Handled:
    """What one handler did.

    `waited`: it could not go on by somebody else's trouble, and no attempt was counted. `retried` of all times it ran
    because it had failed before; `parked` messages became dead letters.
    """

    __slots__ = ("failed", "handled", "in_flight", "parked", "retried", "times", "waited")

    def __init__(self) -> None:
        self.handled = self.failed = self.waited = self.retried = self.parked = self.in_flight = 0
        self.times = Times()


class Answered:
    """What was asked of one type: answered, rejected by a decision, or failed."""

    __slots__ = ("answered", "failed", "in_flight", "rejected", "times")

    def __init__(self) -> None:
        self.answered = self.rejected = self.failed = self.in_flight = 0
        self.times = Times()


class Asked:
    """What was asked of one domain: answered, nobody was there, the time was over, who was asked or the way lost."""

    __slots__ = ("answered", "in_flight", "lost", "nobody", "timeout", "times")

    def __init__(self) -> None:
        self.answered = self.nobody = self.timeout = self.lost = self.in_flight = 0
        self.times = Times()


class Work(msgspec.Struct, frozen=True):
    """What one handler is at, as it is told over the wire."""

    handler: str
    in_flight: int
    handled: int
    failed: int
    waited: int
    retried: int
    parked: int


class Told(msgspec.Struct, frozen=True):
    """What an instance says when it is asked at `address_of` it: of its handlers, and of each callee of its process
    how the breaker stands."""

    service: str
    work: list[Work]
    breakers: dict[str, str] = {}


def address_of(instance: str) -> str:
    """Where an instance that has a meter is asked for what it counted, by its id."""
    return f"_meter/{blake2b(instance.encode(), digest_size=8).hexdigest()}"


class Meter:
    """Counts what the services of one process do.

    `instances` are those that were announced, by id; `guards` and `bulkheads` are those of the bus.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._now = (clock or SystemClock()).monotonic
        self.handled: dict[tuple[str, str], Handled] = {}
        self.answered: dict[tuple[str, str, str, str], Answered] = {}
        self.asked: dict[str, Asked] = {}
        self.instances: dict[str, Instance] = {}
        self.guards: Mapping[str, Guarded] = {}
        self.bulkheads: Mapping[str, Bounded] = {}

    # ------------------------------------------------------------------------------------------------- messages

    def handle(
        self, service: str, name: str, inner: Callable[[Entry, Unit], Awaitable[None]]
    ) -> Callable[[Entry, Unit], Awaitable[None]]:
        """The same handler, counted."""
        counts, now = self.handled.setdefault((service, name), Handled()), self._now
        add = counts.times.add

        async def handle(entry: Entry, unit: Unit) -> None:
            if unit.unparked is not None:
                counts.retried += 1
            counts.in_flight += 1
            began = now()
            try:
                await inner(entry, unit)
                counts.handled += 1
            except Unavailable:
                counts.waited += 1
                raise
            except Exception:
                counts.failed += 1
                raise
            finally:
                counts.in_flight -= 1
                add(now() - began)

        return handle

    def store(self, service: str, store: Store) -> Store:
        """The same store; what becomes a dead letter in it is counted."""
        return cast(Store, _Store(store, lambda name: self.handled.setdefault((service, name), Handled())))

    # ------------------------------------------------------------------------------------------------ questions

    def answers(self, service: str, domain: str, types: Collection[str], inner: Handler) -> Handler:
        """The same handler of questions, counted by their kinds and types.

        Parameters:
            types: those of the domain; what else is asked for is counted together.
        """
        now = self._now

        async def answer(payload: bytes) -> bytes:
            counts = self._answered(service, domain, types, payload)
            counts.in_flight += 1
            began = now()
            try:
                reply = await inner(payload)
            finally:
                counts.in_flight -= 1
                counts.times.add(now() - began)
            if not reply.startswith(b'{"error":'):
                counts.answered += 1
            elif reply.startswith(b'{"error":"Rejected"'):
                counts.rejected += 1
            else:
                counts.failed += 1
            return reply

        return answer

    def _answered(self, service: str, domain: str, types: Collection[str], payload: bytes) -> Answered:
        try:
            asked = _decode_asked(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            asked = _NOTHING
        kind = asked.kind if asked.kind in _KINDS else _OTHER
        key = service, domain, kind, asked.type if asked.type in types else _OTHER
        counts = self.answered.get(key)
        if counts is None:
            counts = self.answered[key] = Answered()
        return counts

    def wire(self, wire: Wire) -> Wire:
        """The same wire: what is asked is counted, and every instance that is announced tells what it counted."""
        return cast(Wire, _Wire(wire, self))

    def told(self, instance: Instance) -> Told:
        """What the handlers of a service do in this process."""
        work = [
            Work(handler, each.in_flight, each.handled, each.failed, each.waited, each.retried, each.parked)
            for (service, handler), each in sorted(self.handled.items())
            if service == instance.service
        ]
        return Told(instance.service, work, {callee: guard.state for callee, guard in sorted(self.guards.items())})


class _Asking(msgspec.Struct, frozen=True):
    kind: str = ""
    type: str = ""


_NOTHING = _Asking()
_decode_asked = msgspec.json.Decoder(_Asking).decode


class _Store:
    """A store whose units are looked at as they go by."""

    def __init__(self, store: Store, counts: Callable[[str], Handled]) -> None:
        self._store, self._counts = store, counts
        # Called for each message: not looked for again each time.
        self.move = store.move

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, unit: Unit) -> Awaitable[None]:
        if unit.parked is not None and unit.parked[1].dead:
            return self._parked(unit, unit.parked[0])
        return self._store.commit(unit)

    async def _parked(self, unit: Unit, consumer: str) -> None:
        await self._store.commit(unit)
        self._counts(consumer).parked += 1


class _Wire:
    """A wire whose questions are looked at as they go by."""

    def __init__(self, wire: Wire, meter: Meter) -> None:
        self._wire, self._meter, self._now = wire, meter, meter._now
        self._telling: dict[str, Callable[[], None]] = {}
        self.serve = wire.serve

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    async def ask(self, address: str, payload: bytes, deadline: float, **options: Any) -> bytes:
        domain = address.partition("/")[0]
        counts = self._meter.asked.get(domain)
        if counts is None:
            counts = self._meter.asked[domain] = Asked()
        counts.in_flight += 1
        began = self._now()
        try:
            reply: bytes = await self._wire.ask(address, payload, deadline, **options)
            counts.answered += 1
            return reply
        except NoAnswer:
            counts.nobody += 1
            raise
        except TimeoutError:
            counts.timeout += 1
            raise
        except (ConnectionError, Unreachable):
            counts.lost += 1
            raise
        finally:
            counts.in_flight -= 1
            counts.times.add(self._now() - began)

    async def announce(self, instance: Instance, *options: Any, **more: Any) -> Callable[[], None]:
        meter, id = self._meter, instance.id
        if id not in self._telling:

            async def tell(payload: bytes) -> bytes:
                return _encode(meter.told(instance))

            self._telling[id] = await self._wire.serve(address_of(id), tell)
        undo: Callable[[], None] = await self._wire.announce(instance, *options, **more)
        meter.instances[id] = instance

        def leave() -> None:
            meter.instances.pop(id, None)
            telling = self._telling.pop(id, None)
            if telling is not None:
                telling()
            undo()

        return leave
