"""Starting services on a bus, keeping them going, and stopping them in good order."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from types import CodeType
from typing import Any

import msgspec

from cauce.accept import SLOTS, check_body, check_value, slot_of
from cauce.aside import Handle
from cauce.audit import Audit
from cauce.backends import Backend, open_backend, stores_at
from cauce.backends.health import warn
from cauce.bus import Ask, Bus, Cause, Context, Reply, correlation, error_name, handling, keep, other_record, own, owned
from cauce.carried import LastOfEach, Superseded, carried
from cauce.clock import Clock, SystemClock, uuid7
from cauce.codec import Entry, Meta, derive_id, seal
from cauce.commander import Commander, Decider
from cauce.consumer import Consumer, Tail
from cauce.copies import Copies
from cauce.copying import copies_of
from cauce.errors import CauceError, Fenced, Gone, NoAnswer, NotOwner, Refused, Unavailable, Unreadable
from cauce.fold import Folder, messages_of
from cauce.folding import fold_of, rules_of
from cauce.guards.bulkhead import Bulkhead
from cauce.guards.guard import Callees, Guards
from cauce.guards.patience import Patience
from cauce.guards.watchdog import Watchdog
from cauce.history import page, stood
from cauce.lease import Leases, identity
from cauce.letter import Mended
from cauce.messages import Command, Domain, Event, Message, Notice, Record, declared
from cauce.meter import Meter
from cauce.outbox import Outbox
from cauce.question import completed, read
from cauce.said import packed
from cauce.schedule import LATE, Missed, Schedule, behind
from cauce.schema import Schema, encode, is_about
from cauce.service import Bound, Service, bind
from cauce.shares import Shares
from cauce.sql import Store as Sql
from cauce.sql import spoken
from cauce.store import Share, Store, Stores, Timer, Unit
from cauce.takes import enter
from cauce.task import ended, given_up
from cauce.threads import Threads
from cauce.timers import Timers, until
from cauce.undo import part
from cauce.undone import Asked
from cauce.wanted import reads_of, wants_of
from cauce.wire import Handler, Instance, Load, State

__all__ = ["DEFAULT_BUS", "connect", "running"]

DEFAULT_BUS = "sqlite:///.cauce/bus.db"

_log = logging.getLogger("cauce")
_encode = msgspec.json.Encoder().encode
_decode_asked = msgspec.json.Decoder(Asked).decode
_MOMENT = 0.05
_LAST = 1.0
"""Seconds for each of the last steps of a stop, when handlers have used up their time."""
_GUARDS = Guards()
_REST = 1.0
_WISHES_AT_ONCE = 10_000
_LOOKS_AT_ONCE = 2_000
"""How much a domain is wished, and how often its things are looked at, at a time in one instance."""


@asynccontextmanager
async def connect(
    bus: str = DEFAULT_BUS, *, clock: Clock | None = None, guards: Guards = _GUARDS
) -> AsyncIterator[Bus]:
    """A client that serves nothing: it calls, sends, asks and reads.

    Parameters:
        bus: the address, `sqlite:///shop.db` for a relative and `sqlite:////var/shop.db` for an absolute path,
            `postgresql://host/database` or `nats://host:4222`.
        guards: what stands before each callee, so that one that is blocked is not waited for again and again.
    """
    clock = clock or SystemClock()
    backend = await open_backend(bus, clock)
    try:
        yield _bus(backend, clock, guards)
    finally:
        await backend.close()


@asynccontextmanager
async def running(
    *services: Service,
    bus: str = DEFAULT_BUS,
    store: str | None = None,
    clock: Clock | None = None,
    drain: float = 10.0,
    guards: Guards = _GUARDS,
    meter: Meter | None = None,
) -> AsyncIterator[Bus]:
    """Run services in this process, and a bus to talk to them. They are drained when the block is left.

    Parameters:
        bus: the address, `sqlite:///shop.db` for a relative and `sqlite:////var/shop.db` for an absolute path,
            `postgresql://host/database` or `nats://host:4222`.
        store: where these services keep what is their own, `sqlite:///folder` or `postgresql://host/database`; None: at
            the bus. All instances of a service must be given the same.
        drain: seconds that handlers get to finish at the end.
        guards: what stands before each callee, so that one that is blocked is not waited for again and again.
        meter: counts what these services do.

    The same service may run in any number of processes: its instances share its slots out among themselves.

    Raises, before anything runs: `Refused` for functions that cannot be right, `NotOwner` for a domain that another
    service owns, `Held` if somebody else, such as an import, writes there. What stops a service while it runs is in
    `bus.failed`, and raised at the end of the block.
    """
    clock = clock or SystemClock()
    bounds = [(service, bind(service)) for service in services]
    _check(services)
    async with AsyncExitStack() as stack:
        backend = await open_backend(bus, clock)
        stack.push_async_callback(backend.close)
        await warn(backend)
        stores = backend.stores if store is None else await stack.enter_async_context(stores_at(store, clock))
        face = _bus(backend, clock, guards, meter)
        tasks = _Tasks(face.failed)
        tails = Tails(face)
        each = [_Running(service, parts, stores, face, tasks, tails, drain) for service, parts in bounds]
        if isinstance(clock, SystemClock):
            # A clock that tests drive says nothing of how long the loop really takes.
            stack.callback(_watched(bounds, clock).stop)
        stack.push_async_callback(_stop, each, tasks, clock, drain)
        # Each step for all, before the next for any: nobody owns half of what it says, or reacts before others answer.
        for step in (
            _Running.look,
            _Running.open,
            _Running.own,
            _Running.bind,
            _Running.copy,
            _Running.join,
            _Running.serve,
        ):
            for service in each:
                await step(service)
        await tails.start(tasks)
        for service in each:
            await service.consume()
        yield face
    if face.failed.done():
        face.failed.result()


async def _stop(services: Sequence[_Running], tasks: _Tasks, clock: Clock, drain: float) -> None:
    """First nothing new comes in; then what is in hand is finished while all still answer each other; then all ends.

    Handlers have until the time is over. What remains to be done then takes a few seconds more, whatever they do.
    """
    until = clock.monotonic() + drain

    def left() -> float:
        return until - clock.monotonic()

    for service in services:
        service.begin_no_more()
    await tasks.stop("tail")
    await asyncio.gather(*(service.drain(left) for service in services))
    for service in services:
        service.leave()
    await asyncio.gather(*(service.answered(max(_LAST, left())) for service in services))
    await asyncio.gather(*(service.finish(max(_LAST, left())) for service in services))
    await tasks.stop()
    for service in services:
        await service.close()


def _watched(bounds: Sequence[tuple[Service, list[Bound]]], clock: Clock) -> Watchdog:
    """Watch this loop, and what runs beside it and cannot be given up, from now on."""
    names, aside, patience = dict[CodeType, str](), dict[CodeType, str](), 0.0
    for service, parts in bounds:
        for bound in parts:
            if bound.part.kind != "replica" and (code := getattr(bound.part.function, "__code__", None)) is not None:
                names[code] = f"{service.name}.{bound.name}"
                if bound.part.kind == "view":
                    aside[code], patience = names[code], max(patience, service.patience)
    watchdog = Watchdog(names, aside, clock, patience)
    watchdog.start()
    return watchdog


def _bus(backend: Backend, clock: Clock, guards: Guards, meter: Meter | None = None) -> Bus:
    wire = backend.wire if meter is None else meter.wire(backend.wire)
    bus = Bus(backend.id, backend.facts, backend.commands, backend.records, wire, clock)
    bus.guards = callees = Callees(clock, guards, bus.asking)
    bus.asking = callees.ask
    bus.meter = meter
    if meter is not None:
        meter.guards, meter.bulkheads = bus.guards, bus.bulkheads
    return bus


def _check(services: Sequence[Service]) -> None:
    names, owners = set[str](), dict[str, str]()
    for service in services:
        if service.name in names:
            raise Refused(f"two services are named {service.name!r}: rename one")
        names.add(service.name)
        for domain in service.owns:
            if domain.name in owners:
                raise Refused(
                    f"domain {domain.name!r} is owned by {owners[domain.name]!r} and {service.name!r}: a domain has one owner"
                )
            owners[domain.name] = service.name


class _Tasks:
    """The background tasks of a run. The first that fails says so."""

    def __init__(self, failed: asyncio.Future[None]) -> None:
        self._failed = failed
        self._tasks: dict[asyncio.Task[None], str] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"cauce {name}")
        self._tasks[task] = name
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        name = self._tasks.pop(task, "?")
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("%s stopped: %s", name, error, exc_info=error)
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def stop(self, name: str | None = None) -> None:
        """Cancel those of a name, or all, and wait for them."""
        await ended([task for task, each in self._tasks.items() if name in (None, each)], _LAST)


class Tails:
    """One reader for each log in this process, shared by all services."""

    def __init__(self, bus: Bus) -> None:
        self.facts, self.commands, self.records = (
            Tail(log, bus.clock) for log in (bus.facts, bus.commands, bus.records)
        )

    async def start(self, tasks: _Tasks) -> None:
        for tail in (self.facts, self.commands, self.records):
            await tail.start()
            if tail.consumers:
                tasks.start("tail", tail.run())


class _Running:
    """One instance of one service on one bus."""

    def __init__(
        self,
        service: Service,
        parts: list[Bound],
        stores: Stores,
        bus: Bus,
        tasks: _Tasks,
        tails: Tails,
        drain: float,
    ) -> None:
        self._service, self._parts, self._stores, self._bus = service, parts, stores, bus
        self._left: Callable[[], float] = lambda: drain
        self._state: State = "running"
        self._tasks, self._tails = tasks, tails
        self._owner = identity(service.name, bus.clock)
        self._leases = Leases(bus.facts, self._owner, bus.clock)
        self._commanders: dict[str, Commander] = {}
        self._folders: dict[str, Folder] = {}
        self._schemas: dict[str, Schema] = {}
        self._handlers: dict[str, Handler] = {}
        self._bulkheads: dict[str, Bulkhead] = {}
        self._consumers: list[tuple[Consumer, Tail]] = []
        self._served: dict[str, Callable[[], None]] = {}
        self._copies: Copies | None = None
        self._since = bus.clock.now()
        self._in_hand = 0
        self._empty: asyncio.Future[None] | None = None
        self._store: Store | None = None
        self._shares: Shares | None = None
        self._running = False
        self._outbox: Outbox | None = None
        self._threads = Threads()
        self._patience = Patience(self._threads, self._hanging_changed)
        self._guarded = {
            bound.part.function: self._guard(bound)
            for bound in parts
            if bound.part.kind in ("on", "every", "answer") or (bound.part.kind == "decide" and bound.is_async)
        }
        self._leading: list[asyncio.Task[None]] = []
        self._timers: Timers | None = None

    # ------------------------------------------------------------------------------------------------------ starting

    async def look(self) -> None:
        """Raises `NotOwner`, and `Refused` for messages that cannot be right, before anything is written."""
        for domain in self._service.owns:
            await owned(self._bus.facts, domain.name, self._service.name)
            self._prepare(domain)
        if any(bound.part.kind in ("view", "replica") for bound in self._parts):
            self._copies = copies_of(self._service, self._parts, self._stores.shelf(self._service.name), self._bus)

    async def open(self) -> None:
        """Open the store, and prepare all that this instance may be given to do."""
        bus, name = self._bus, self._service.name
        migrations = [spoken(each, self._stores.dialect, f"service {name}") for each in self._service.schema]
        keeps = bool(migrations or self._copies is not None)
        store = await self._stores.open(name, migrations, keeps=keeps)
        self._store = store = store if bus.meter is None else bus.meter.store(name, store)
        await keep(bus.facts, name, store.id, store.place, store.is_fresh, bus.clock)
        self._shares = shares = Shares(store, self._owner, bus.clock, self._gain, self._lose, self._forget)
        shares.touched = self._touched
        self._outbox = outbox = Outbox(
            name, store, bus, lambda: self._slots, self._record, lambda: shares.is_fresh, self._outbox_stops
        )
        self._timers = Timers(name, store, bus.clock, lambda: list(shares.held.values()), outbox.look)
        caution = asyncio.Lock()
        self._consumers = [
            (consumer, tail)
            for consumer, tail in (
                (self._reaction(bound, caution), self._tails.records if _is_record(bound) else self._tails.facts)
                for bound in self._of("on")
            )
        ]
        self._consumers += [
            (self._decider(domain, commander, caution), self._tails.commands)
            for domain, commander in self._commanders.items()
        ]
        for consumer, tail in self._consumers:
            tail.consumers.append(consumer)
            consumer.failed.add_done_callback(self._stopped)
        bus.settles(self._settled)
        bus.settles(self._settled_behind, behind=True)

    async def own(self) -> None:
        await enter(self._bus.facts, self._service.name, reads_of(self._parts), self._bus.clock)
        for domain in self._service.owns:
            await own(self._bus.facts, domain.name, self._service.name, self._bus.clock)

    async def bind(self) -> None:
        """Have its rules bind its domains. Raises `Refused` where what stands is against them."""
        for commander in self._commanders.values():
            await commander.bind()

    async def join(self) -> None:
        """Become one of the instances, and take what is free, with all records written that a predecessor left."""
        assert self._shares is not None
        await self._announce("starting")
        await self._shares.start()
        self._tasks.start("shares", self._shares.run())
        self._tasks.start("leases", self._keep_claims())
        for commander in self._commanders.values():
            self._tasks.start(f"records of {commander.domain}", commander.records.run())

    async def copy(self) -> None:
        """Have all replicas complete, and feed them and the views from now on."""
        if self._copies is None:
            return
        self._bus.copies[self._service.name] = self._copies
        await self._copies.start(self._tasks.fail)
        self._tasks.start(f"copies of {self._service.name}", self._copies.run())
        self._bus.settles(self._copies.settled_views)
        self._bus.settles(self._copies.settled_replicas, behind=True)

    async def serve(self) -> None:
        """Answer from now on."""
        for domain in self._service.owns:
            handler = self._answer(domain)
            if self._bus.meter is not None:
                handler = self._bus.meter.answers(self._service.name, domain.name, domain.messages, handler)
            self._handlers[domain.name] = handler
            self._served[domain.name] = await self._bus.wire.serve(domain.name, handler)
        await self._serve_slots(self._slots)
        await self._announce("running")

    async def _announce(self, state: State) -> None:
        """Say how this instance is, and what it answers."""
        if state == "running" and self._patience.hanging:
            state = "blocked"
        domains = tuple(domain.name for domain in self._service.owns)
        slots = tuple(address for address in self._served if "/" in address)
        self._served[""] = await self._bus.wire.announce(
            Instance(
                self._service.name, self._owner, domains + slots, os.getpid(), state, self._since,
                version=self._service.version, host=socket.gethostname(), answers=self._names("answer"),
                decides=self._names("decide"),
            ),
            self._load,
        )  # fmt: skip

    def _names(self, kind: str) -> tuple[str, ...]:
        """The messages that it has functions of a kind for."""
        return tuple(sorted({declared(cls).name for cls in self._functions(kind)}))

    def _load(self) -> Load:
        return Load(self._in_hand, sum(consumer.held for consumer, _ in self._consumers))

    def _hanging_changed(self) -> None:
        """A handler was given up and runs on, or has ended after all."""
        if self._running and self._state == "running":
            self._tasks.start("state", self._announce_again())

    async def _announce_again(self) -> None:
        try:
            await self._announce(self._state)
        except (CauceError, OSError) as error:
            _log.warning("%s does not show how it is: %s", self._service.name, error)

    async def consume(self) -> None:
        """React, and decide what was sent."""
        assert self._store is not None
        assert self._shares is not None
        assert self._outbox is not None
        assert self._timers is not None
        for consumer, tail in self._consumers:
            consumer.begin_now(tail.looked)
        self._running = True
        await self._hold(list(self._shares.held.values()))
        self._tasks.start("store", self._store.run())
        self._tasks.start("outbox", self._outbox.run())
        self._tasks.start("timers", self._timers.run())
        if self._service.audit is not None and self._commanders:
            audit = Audit(
                self._bus.commands, self._store, self._bus.clock, self._service.audit,
                {domain: _deciding(domain) for domain in self._commanders}, lambda domain: self._commanders[domain].slots,
            )  # fmt: skip
            self._tasks.start("audit", audit.run())
        self._shares.go()
        self._outbox.look()
        _log.info("%s runs: %s", self._service.name, ", ".join(bound.name for bound in self._parts))

    # ---------------------------------------------------------------------------------------------- what it may work on

    @property
    def _slots(self) -> list[int]:
        assert self._shares is not None
        return _slots_of(self._shares.held.values())

    async def _gain(self, shares: Sequence[Share]) -> None:
        slots, before = _slots_of(shares), frozenset(share.before for share in shares if share.before)
        try:
            for commander in self._commanders.values():
                await commander.take_over(slots, before)
            if self._running:
                await self._serve_slots(slots)
                await self._announce(self._state)
                await self._hold(shares)
        except Exception:
            # One domain without the other is nobody's: who holds a slot holds it in all.
            with suppress(Unavailable):
                await self._lose(shares)
            raise

    def _outbox_stops(self, error: BaseException) -> None:
        if given_up():
            return  # Others do its work.
        if isinstance(error, Fenced) and self._shares is not None:
            self._shares.fenced(error)
        else:
            self._tasks.fail(error)

    async def _keep_claims(self) -> None:
        """Beat for ever. A claim that was taken over is that of a slot that another instance has."""
        assert self._shares is not None
        while True:
            try:
                await self._leases.beat()
            except Fenced as error:
                self._shares.fenced(error)

    async def _forget(self, owner: str) -> None:
        """Drop all that is in hand, because others have it, and be somebody else from now on.

        Nothing is written on the way: what was is refused by its fence. Views and replicas go on: who feeds them holds
        a lock of its own, and their writes tell by themselves if another has written.
        """
        await self._stop_leading()
        await asyncio.gather(*(consumer.abandon(max(0.0, self._left())) for consumer, _ in self._consumers))
        for commander in self._commanders.values():
            commander.abandon()
        for address in [each for each in self._served if "/" in each or not each]:
            self._leave(address)
        await self._leases.forget(owner)
        self._owner = owner
        if self._outbox is not None:
            await self._outbox.abandon(max(0.0, self._left()))
        if self._running:
            await self._announce(self._state)

    async def _hold(self, shares: Sequence[Share]) -> None:
        """Begin to work on what was taken."""
        by_slot = {share.slot: share for share in shares if share.slot is not None}
        if by_slot:
            for consumer, tail in self._consumers:
                await consumer.hold(tail, by_slot)
            assert self._outbox is not None
            await self._outbox.hold(by_slot)
        for share in shares:
            if share.slot is None:
                self._leading = [
                    asyncio.get_running_loop().create_task(self._interval(bound, share)) for bound in self._of("every")
                ]
        assert self._timers is not None
        self._timers.look()

    async def _lose(self, shares: Sequence[Share]) -> None:
        """Finish what is in hand, for another instance to go on."""
        slots = _slots_of(shares)
        within = max(0.0, self._left())
        # Handlers may take long, and meanwhile wishes are still decided here.
        await asyncio.gather(*(consumer.drop(slots, within) for consumer, _ in self._consumers))
        if self._outbox is not None:
            await self._outbox.drop(slots, max(_LAST, self._left()))
        for domain in self._handlers:
            for slot in slots:
                self._leave(f"{domain}/{slot}")
        if self._running:
            await self._announce(self._state)
        within = max(_LAST, self._left())
        for commander in self._commanders.values():
            await commander.let_go(slots, within)
        if any(share.slot is None for share in shares):
            await self._stop_leading()
        assert self._store is not None
        await self._store.flush()

    async def _serve_slots(self, slots: Iterable[int]) -> None:
        for domain, commander in self._commanders.items():
            for slot in commander.slots.intersection(slots):
                address = f"{domain}/{slot}"
                self._served[address] = await self._bus.wire.serve(address, self._handlers[domain])

    def _leave(self, address: str) -> None:
        undo = self._served.pop(address, None)
        if undo is not None:
            undo()

    async def _touched(self) -> None:
        """Another process has changed the store: perhaps somebody decided about a dead letter."""
        assert self._outbox is not None
        assert self._timers is not None
        await self._outbox.reload()
        self._timers.look()
        for consumer, _ in self._consumers:
            await consumer.reload()

    # ------------------------------------------------------------------------------------------------------- stopping

    def begin_no_more(self) -> None:
        """Take nothing more, neither slots nor messages."""
        if self._shares is not None:
            self._shares.close()
        for consumer, _ in self._consumers:
            consumer.begin_no_more(range(SLOTS))

    async def drain(self, left: Callable[[], float]) -> None:
        """Let handlers finish, give all slots to other instances if there are any, and what was said to its log.

        Parameters:
            left: the seconds that handlers still have.
        """
        if not self._running or self._outbox is None:
            return
        assert self._shares is not None
        self._left, self._state = left, "draining"
        if not self._shares.is_alone:
            # Those answer by now. Who is alone is asked by what is in hand here.
            for domain in self._handlers:
                self._leave(domain)
        try:
            await self._announce("draining")
        except Refused as error:
            _log.warning("%s ends without saying so: %s", self._service.name, error)
        await self._stop_leading()
        try:
            # Or it would begin to work on what it is given when all that is in hand here has been dropped.
            await self._shares.rest(max(0.0, left()))
        except CauceError as error:
            _log.warning("%s does not know what it holds: %s", self._service.name, error)
        if not self._shares.is_alone:
            try:
                await self._shares.hand_over(max(0.0, left()))
            except CauceError as error:
                _log.warning("%s could not give its slots to the others: %s", self._service.name, error)
        within = max(0.0, left())
        await asyncio.gather(*(consumer.drop(range(SLOTS), within) for consumer, _ in self._consumers))
        for consumer, _ in self._consumers:
            consumer.stop()
        try:
            async with asyncio.timeout(max(_LAST, left())):
                await self._outbox.relayed(patient=False)
        except (CauceError, TimeoutError) as error:
            _log.warning("what %s said waits in its outbox for the next start: %r", self._service.name, error)
        await self._outbox.drop(range(SLOTS), max(_LAST, left()))
        if many := self._outbox.put_off:
            _log.warning("what %s said of %d things waits in its outbox for the next start", self._service.name, many)

    def leave(self) -> None:
        """Answer no more."""
        for address in list(self._served):
            self._leave(address)

    async def finish(self, seconds: float) -> None:
        """Write the records that are due."""
        for commander in self._commanders.values():
            try:
                async with asyncio.timeout(seconds):
                    await commander.let_go(range(SLOTS), seconds)
            except (CauceError, TimeoutError) as error:
                _log.warning("records of %s wait for the next start: %r", commander.domain, error)

    async def answered(self, seconds: float) -> None:
        """Wait until what was asked is answered, within so many seconds."""
        if self._in_hand:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._empty}, timeout=seconds)

    async def close(self) -> None:
        """Write the last places, and let go of everything."""
        for name in self._threads.at_work:
            _log.warning("%s hangs in its thread: nobody waits for it any more", name)
        self._threads.shutdown()
        try:
            if self._copies is not None:
                await self._copies.close()
            if self._store is not None:
                try:
                    await self._store.flush()
                    if self._shares is not None:
                        await self._shares.stop()
                except CauceError as error:
                    _log.warning(
                        "%s: the last places were not written, these messages are handled again: %s",
                        self._service.name,
                        error,
                    )
                await self._store.close()
        finally:
            await self._leases.release(*self._leases.claims)

    async def _stop_leading(self) -> None:
        tasks, self._leading = self._leading, []
        await ended(tasks, _LAST)

    # ---------------------------------------------------------------------------------------------------------- parts

    def _guard(self, bound: Bound) -> Callable[..., Awaitable[Any]]:
        """The handler behind its patience; it takes its thing first."""
        seconds = self._service.patience if bound.part.patience is None else bound.part.patience
        name = f"{self._service.name}.{bound.name}"
        return self._patience.guard(name, seconds, bound.part.function, is_async=bound.is_async)

    def _run(self, bound: Bound, told: tuple[Any, ...], context: Context, thing: str = "") -> Awaitable[Any]:
        """Call a handler: a plain one in a thread, because it may block.

        Parameters:
            thing: of what only one is in hand at a time.
        """
        named = {} if bound.context is None else {bound.context: context}
        return self._guarded[bound.part.function](thing, *told, **named)

    def _of(self, kind: str) -> list[Bound]:
        return [bound for bound in self._parts if bound.part.kind == kind]

    def _prepare(self, domain: Domain) -> None:
        folder = self._folders[domain.name] = fold_of(self._parts, domain)
        schema = self._schemas[domain.name] = folder.schema
        if domain.key is None:
            return
        deciders = {
            cls: Decider(self._patient(bound), bound.context, bound.is_async)
            for cls, bound in self._functions("decide").items()
        }
        inverses = {cls: bound.part.function for cls, bound in self._functions("invert").items()}
        rules = rules_of(self._parts, domain, folder)
        commander = Commander(
            self._service.name, domain.name, deciders, inverses, folder, schema, self._bus, self._leases, rules
        )
        self._commanders[domain.name] = commander
        self._bus.settles(commander.settled)

    def _patient(self, bound: Bound) -> Callable[..., Any]:
        """A decide function that waits is given up like any handler; another one takes no time."""
        if not bound.is_async:
            return bound.part.function
        return functools.wraps(bound.part.function)(functools.partial(self._guarded[bound.part.function], ""))

    def _functions(self, kind: str) -> dict[type[Message], Bound]:
        return {cls: bound for bound in self._of(kind) for cls in bound.messages}

    def _decider(self, domain: str, commander: Commander, caution: asyncio.Lock) -> Consumer:
        async def handle(entry: Entry, unit: Unit) -> None:
            await commander.handle(entry)

        assert self._store is not None
        assert self._shares is not None
        shares = self._shares
        return Consumer(
            _deciding(domain), {domain: frozenset()}, self._metered(_deciding(domain), handle), self._bus.commands, self._store, self._bus.clock,
            may_begin=lambda: shares.is_fresh, caution=caution, fenced=shares.fenced,
        )  # fmt: skip

    def _reaction(self, bound: Bound, caution: asyncio.Lock) -> Consumer:
        service, bus = self._service.name, self._bus
        schema = Schema(bound.messages)
        log = LastOfEach(bus.records) if _is_record(bound) else bus.facts
        assert self._store is not None
        assert self._shares is not None
        store, shares = self._store, self._shares

        name, is_record = bound.name, _is_record(bound)
        wants = {domain: frozenset(types) for domain, types in wants_of(bound.messages).items()}

        async def handle(entry: Entry, unit: Unit) -> None:
            meta = entry.meta if bound.notice else entry.checked().meta
            domain, _, key = entry.stream.partition("/")
            message: Any
            if bound.notice:
                message = Notice(schema.today(domain, entry.type), key, entry.version)
            elif is_record:
                message = carried(bound.messages[0], schema, entry)
                if isinstance(entry, Superseded) or (message is None and not bound.gone):
                    return
            else:
                message = schema.decode(domain, entry.type, meta.schema, entry.body or b"")
            if isinstance(entry, Mended) and isinstance(message, Message):
                _check_key(message, key)
            began = meta.correlation or entry.id
            correlation.set(began)
            cause = Cause(entry.id, began, "", meta.trace, meta.tracestate)
            context = Context(bus, service, name, entry, cause, Sql(store.fetch), timers=store.due)
            handling.set(context)
            result = await self._run(bound, (message,), context, entry.stream)
            if result is not None or bound.context is not None:
                self._say(bound, context, unit, slot_of(key), result)

        return Consumer(
            name, wants, self._metered(name, handle), log, store, bus.clock, bodies=not bound.notice,
            retry=bound.part.retry, now=bound.part.start == "now", may_begin=lambda: shares.is_fresh, caution=caution,
            fenced=shares.fenced,
            concurrency=bound.part.concurrency,
        )  # fmt: skip

    def _metered(self, name: str, handle: Handle) -> Handle:
        meter = self._bus.meter
        return handle if meter is None else meter.handle(self._service.name, name, handle)

    # ------------------------------------------------------------------------------------------------- what it says

    def _say(self, bound: Bound, context: Context, unit: Unit, slot: int, result: Any) -> None:
        """Let what a handler did and returned be stored as one: statements, commands to send, own events to record."""
        unit.statements += context.store.queued
        later = {} if context.planned is None else context.planned.later
        unit.cancelled += () if context.planned is None else context.planned.cancelled
        if result is None and not later:
            return
        where = f"{self._service.name}.{bound.name}"
        said = messages_of(result, where, "commands, own events, or None")
        for message in (*said, *(message for _, message, _ in later.values())):
            # All are looked at before any is said.
            if isinstance(message, Event) and declared(message).domain.name not in self._commanders:
                raise NotOwner(
                    f"{where} said {type(message).__name__}, which only the owner of {declared(message).domain.name!r} records; send it a command"
                )
            if not isinstance(message, (Command, Event)):
                raise Refused(f"{where} returned {message!r}: return commands, own events, or None")
        now, cause = self._bus.clock.now(), context.cause
        for message in said:
            unit.said.append((bound.name, slot, _sealed(message, context.id_of(message), cause, now)))
        for timer, (due, message, id) in later.items():
            assert unit.share is not None
            unit.later.append(Timer(timer, unit.share.name, bound.name, due, _sealed(message, id, cause, due)))
        unit.committed = partial(self._stored, bool(said), [timer.due for timer in unit.later])

    def _stored(self, said: bool, later: Sequence[int]) -> None:
        """A unit was committed that said something, or for later."""
        assert self._outbox is not None
        assert self._timers is not None
        if said:
            self._outbox.look()
        for due in later:
            self._timers.note(due)

    async def _settled(self) -> None:
        """Wait until its consumers have passed the heads as they are now, and what they said is in its log."""
        await asyncio.gather(
            *(consumer.settled() for consumer, tail in self._consumers if tail is not self._tails.records)
        )
        await self._spoken()
        # What was decided or recorded meanwhile has its record, too.
        await asyncio.gather(*(commander.settled() for commander in self._commanders.values()))

    async def _settled_behind(self) -> None:
        """The same of those that react to records, which are written behind."""
        await asyncio.gather(*(consumer.settled() for consumer, tail in self._consumers if tail is self._tails.records))
        await self._spoken()

    async def _spoken(self) -> None:
        """Wait until what was said, also for a time that is over, is in its log."""
        assert self._outbox is not None
        assert self._timers is not None
        await self._timers.fire()
        await self._outbox.relayed()

    async def _record(self, domain: str, ask: Ask) -> None:
        """Record an event that a handler said, here or where its slot is held."""
        commander = self._commanders[domain]
        if slot_of(ask.key) in commander.slots:
            await self._publish(commander, ask)
        else:
            await self._bus.publish(domain, ask)

    async def _publish(self, commander: Commander, ask: Ask) -> None:
        event = self._schemas[commander.domain].decode(commander.domain, ask.type, ask.schema, bytes(ask.body))
        assert isinstance(event, Event)
        _check_key(event, ask.key)
        cause = Cause(ask.causation, ask.correlation, ask.by, ask.trace, ask.tracestate)
        kind = declared(event)
        older = (ask.type, ask.schema) != (kind.name, kind.version)
        await commander.publish([event], [ask.id], cause, [ask] if older else ())

    async def _next_run(self, name: str, schedule: Schedule, missed: Missed, share: Share) -> int:
        """When a function is due, as it was noted; where that is not so, or too late, it is noted."""
        assert self._store is not None
        clock = self._bus.clock
        while True:
            try:
                due = await self._store.timer(name)
                if not due or (missed == "skip" and clock.now() - due > LATE * 1_000_000):
                    due = schedule.following(clock.now())
                    unit = Unit(share)
                    unit.timer = name, due
                    await self._store.commit(unit)
                return due
            except Unavailable as error:
                _log.warning("%s of %s waits: %s", name, self._service.name, error)
                await clock.sleep(_REST)

    async def _interval(self, bound: Bound, share: Share) -> None:
        """Run a function every so often, for ever; when it is due is kept in the store."""
        assert self._store is not None
        assert self._shares is not None
        assert bound.part.schedule is not None
        clock, store, schedule, missed = self._bus.clock, self._store, bound.part.schedule, bound.part.missed
        name = schedule.name_of(bound.name)
        due = await self._next_run(name, schedule, missed, share)
        while True:
            due = await until(due, schedule, clock)
            if missed == "skip" and clock.now() - due > LATE * 1_000_000:
                # The clock was set forward, or this machine slept.
                due = await self._next_run(name, schedule, missed, share)
                continue
            while not self._shares.is_fresh:
                await clock.sleep(_MOMENT)
            id = derive_id(uuid7(due * 4096 // 1000, 0), self._service.name, name)
            correlation.set(id)
            context = Context(
                self._bus, self._service.name, bound.name, None, Cause(id, id), Sql(store.fetch),
                timers=store.due, due=schedule.shown(due),
            )  # fmt: skip
            handling.set(context)
            unit = Unit(share)
            try:
                result = await self._run(bound, (), context, bound.name)
                if given_up():
                    return  # Whatever it made of that: another leads.
                self._say(bound, context, unit, 0, result)
                unit.timer = name, behind(due, clock.now(), schedule, missed)
                await store.commit(unit)
            except Fenced as error:
                self._shares.fenced(error)
                return
            except Exception as error:
                if given_up():
                    return
                _log.exception("%s.%s failed and is run again: %s", self._service.name, bound.name, error)
                # One that is due more often would not have to wait for long either.
                pause = (schedule.following(due) - due) / 1_000_000
                await clock.sleep(min(pause, 10.0))
                continue
            if unit.committed is not None:
                unit.committed()
            due = unit.timer[1]

    def _stopped(self, consumer: asyncio.Future[None]) -> None:
        if not consumer.cancelled() and (error := consumer.exception()) is not None:
            self._tasks.fail(error)

    def _answer(self, domain: Domain) -> Handler:
        wishes = self._bulkhead(f"{domain.name}: wishes", _WISHES_AT_ONCE, "run more instances")
        looks = self._bulkhead(f"{domain.name}: looks", _LOOKS_AT_ONCE, "run more instances")
        answers = {cls: each for cls, each in self._answers().items() if declared(cls).domain is domain}

        async def handler(payload: bytes) -> bytes:
            try:
                ask = read(payload)
            except Refused as error:
                return _encode(Reply("Refused", str(error)))
            self._in_hand += 1
            try:
                by_hand = not ask.kind
                if by_hand:
                    ask = completed(ask, domain, self._schemas[domain.name], self._bus.clock)
                if ask.kind == "ask":
                    reply = await self._answered(domain, ask, answers)
                elif ask.kind in ("call", "undo", "publish"):
                    reply = await wishes.call(self._granted, domain, ask)
                else:
                    reply = await looks.call(self._looked_up, domain, ask, by_hand)
            except CauceError as error:
                reply = Reply(error_name(error), str(error))
            except Exception as error:
                _log.exception("%s failed on %s", self._service.name, ask.type)
                reply = Reply("CauceError", f"{self._service.name} failed on {ask.type}: {error!r}")
            finally:
                self._in_hand -= 1
                if not self._in_hand and self._empty is not None and not self._empty.done():
                    self._empty.set_result(None)
            return _encode(reply)

        return handler

    def _answers(self) -> _Answers:
        """Its answer functions by query, each behind its own bulkhead."""
        return {
            cls: (bound, self._bulkhead(f"{self._service.name}.{bound.name}", bound.part.at_once, "raise its at_once"))
            for bound in self._of("answer")
            for cls in bound.messages
        }

    def _bulkhead(self, name: str, most: int, cure: str) -> Bulkhead:
        """The bulkhead of this name, made when it is first wanted, and seen from then on."""
        bulkhead = self._bulkheads.get(name)
        if bulkhead is None:
            bulkhead = Bulkhead(name, most, cure, self._bus.clock)
            self._bus.bulkheads[name] = self._bulkheads[name] = bulkhead
        return bulkhead

    async def _granted(self, domain: Domain, ask: Ask) -> Reply:
        commander = self._commanders.get(domain.name)
        if commander is None:
            raise NoAnswer(f"{domain.name} has no things, so nothing can be wished of it")
        if slot_of(ask.key) not in commander.slots:
            # Who asks by hand need not know which instance holds what, and a slot may have gone just now.
            return await self._bus.wish(domain.name, ask)
        if ask.kind == "call":
            receipt = await commander.call(ask)
            return Reply("", "", receipt.version, receipt.position, receipt.changed)
        if ask.kind == "undo":
            return await self._undo(domain, commander, ask)
        await self._publish(commander, ask)
        return Reply()

    async def _looked_up(self, domain: Domain, ask: Ask, by_hand: bool) -> Reply:
        folder, facts, records = self._folders[domain.name], self._bus.facts, self._bus.records
        if ask.kind in ("history", "states"):
            return await page(folder, facts, records, ask)
        if ask.kind not in ("fetch", "state"):
            raise Refused(f"{domain.name} knows no question of kind {ask.kind!r}: run newer code there")
        folded = await stood(folder, facts, ask.key, records=records, at_version=ask.at_version, at_time=ask.at_time)
        _check_record(folder.schema, ask, folded.state)
        body = b"" if folded.state is None else encode(folded.state)
        if by_hand and not body:
            raise Gone(f"{domain.name}/{ask.key} does not stand: it was deleted, or never was")
        return Reply(
            version=folded.version, position=folded.position, body=msgspec.Raw(body or b'""'), changed=bool(body),
            schema=0 if folded.state is None else declared(folded.state).version,
        )  # fmt: skip

    async def _undo(self, domain: Domain, commander: Commander, ask: Ask) -> Reply:
        record = domain.messages.get(ask.type) or domain.renamed.get(ask.type)
        if record is None or not issubclass(record, Record):
            raise Refused(f"{domain.name} has no record {ask.type!r}: name one that it has")
        if ask.schema < declared(record).version:
            # Nothing is recorded of which the asker could not be told.
            raise Unreadable(
                f"{ask.type} of {domain.name} is version {declared(record).version}, who asks knows {ask.schema}: deploy the newer code there first"
            )
        try:
            asked = _decode_asked(ask.body)
        except msgspec.MsgspecError as error:
            raise Refused(f"what is to be undone of {domain.name}/{ask.key} cannot be read: {error}") from None
        told = await commander.undo(ask, asked, record)
        return Reply(body=msgspec.Raw(_encode(part(told, ask.since))))

    async def _answered(self, domain: Domain, ask: Ask, answers: _Answers) -> Reply:
        query = self._schemas[domain.name].decode(domain.name, ask.type, ask.schema, bytes(ask.body))
        if type(query) not in answers:
            raise NoAnswer(f"service {self._service.name!r} does not answer {ask.type}: add an answer function for it")
        bound, bulkhead = answers[type(query)]
        return await bulkhead.call(self._answered_by, bound, query, ask)

    async def _answered_by(self, bound: Bound, query: Message, ask: Ask) -> Reply:
        if ask.after is not None and self._copies is not None:
            await self._copies.passed(ask.after)
        cause = Cause(ask.id, ask.correlation or ask.id, ask.by, ask.trace, ask.tracestate)
        before = correlation.set(cause.correlation)
        context = Context(self._bus, self._service.name, bound.name, None, cause)
        before_it = handling.set(context)
        try:
            answer = await self._run(bound, (query,), context)
        finally:
            correlation.reset(before)
            handling.reset(before_it)
        what = f"the answer of {self._service.name}.{bound.name}"
        check_value(msgspec.to_builtins(answer), what)
        return Reply(body=msgspec.Raw(check_body(_encode(answer), what)))


_Answers = dict[type[Message], tuple[Bound, Bulkhead]]
"""By query, who answers it."""


def _sealed(message: Command | Event, id: str, cause: Cause, time: int) -> bytes:
    """What is said, as it lies in the outbox, or waits for the time when it is."""
    kind = declared(message)
    meta = Meta(time, kind.version, cause.correlation, cause.id, cause.by, cause.trace, cause.tracestate)
    return packed(kind.kind, seal(message, id, meta))


def _check_key(message: Message, key: str) -> None:
    """Raises `Refused` for what was mended to be about another thing: that one's order would be broken."""
    if not is_about(message, key):
        raise Refused(
            f"{declared(message).name} is about another thing than {key!r}: leave the key as it was, or discard it"
        )


def _check_record(schema: Schema, ask: Ask, state: Record | None) -> None:
    if state is None:
        return
    kind = declared(state)
    name = kind.domain.name
    if schema.knows(name, ask.type) and schema.today(name, ask.type) != kind.name:
        raise other_record(f"{name}/{ask.key}", kind.name, ask.type)


def _deciding(domain: str) -> str:
    """The name of the consumer that decides what was sent."""
    return f"decide {domain}"


def _slots_of(shares: Iterable[Share]) -> list[int]:
    return [share.slot for share in shares if share.slot is not None]


def _is_record(bound: Bound) -> bool:
    return issubclass(bound.messages[0], Record)
