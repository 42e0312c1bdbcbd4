"""Starting services on a bus, keeping them going, and stopping them in good order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from cauce.accept import check_body, check_value
from cauce.backends import Backend, open_backend
from cauce.bus import Ask, Bus, Cause, Context, Reply, error_name, own, owned
from cauce.carried import LastOfEach, carried
from cauce.clock import Clock, SystemClock
from cauce.codec import Entry
from cauce.commander import Commander, Decider
from cauce.errors import CauceError, NoAnswer, NotOwner, Refused
from cauce.fold import Folder, messages_of
from cauce.lease import Leases, identity
from cauce.messages import Command, Domain, Event, Message, Notice, Record, declared
from cauce.schema import Schema, encode
from cauce.service import Bound, Service, bind
from cauce.wire import Instance

if TYPE_CHECKING:
    from cauce.consumer import Consumer
    from cauce.copies import Copies
    from cauce.store import Store

__all__ = ["DEFAULT_BUS", "connect", "running"]

DEFAULT_BUS = "sqlite:///.cauce/bus.db"

_log = logging.getLogger("cauce")
_encode = msgspec.json.Encoder().encode
_decode_ask = msgspec.json.Decoder(Ask).decode


@asynccontextmanager
async def connect(bus: str = DEFAULT_BUS, *, clock: Clock | None = None) -> AsyncIterator[Bus]:
    """A client that serves nothing: it calls, sends, asks and reads.

    Parameters:
        bus: the address, `sqlite:///shop.db` for a relative and `sqlite:////var/shop.db` for an absolute path.
    """
    clock = clock or SystemClock()
    backend = await open_backend(bus, clock)
    try:
        yield _bus(backend, clock)
    finally:
        await backend.close()


@asynccontextmanager
async def running(
    *services: Service, bus: str = DEFAULT_BUS, clock: Clock | None = None, drain: float = 10.0
) -> AsyncIterator[Bus]:
    """Run services in this process, and a bus to talk to them. They are drained when the block is left.

    Parameters:
        bus: the address, `sqlite:///shop.db` for a relative and `sqlite:////var/shop.db` for an absolute path.
        drain: seconds that handlers get to finish at the end.

    Raises, before anything runs: `Refused` for functions that cannot be right, `NotOwner` for a domain that another
    service owns, `Held` if services run on this bus already. What stops a service while it runs is in `bus.failed`, and
    raised at the end of the block.
    """
    clock = clock or SystemClock()
    bounds = [(service, bind(service)) for service in services]
    _check(services)
    async with AsyncExitStack() as stack:
        backend = await open_backend(bus, clock)
        stack.push_async_callback(backend.close)
        face = _bus(backend, clock)
        leases = Leases(backend.facts, identity("+".join(service.name for service in services), clock), clock)
        stack.push_async_callback(leases.release)
        await leases.take("runner")
        tasks = _Tasks(face.failed)
        each = [_Running(service, parts, backend, face, leases, tasks) for service, parts in bounds]
        stack.push_async_callback(_stop, each, tasks, drain)
        tasks.start("leases", leases.beat())
        # Each step for all, before the next for any: nobody owns half of what it says, or reacts before others answer.
        for step in (_Running.look, _Running.own, _Running.lead, _Running.copy, _Running.serve, _Running.consume):
            for service in each:
                await step(service)
        yield face
    if face.failed.done():
        face.failed.result()


async def _stop(services: Sequence[_Running], tasks: _Tasks, drain: float) -> None:
    """First nothing new comes in; then what is in hand is finished while all still answer each other; then all ends."""
    await tasks.stop("tail")
    await asyncio.gather(*(service.drain(drain) for service in services))
    for service in services:
        service.leave()
    await tasks.stop()
    for service in services:
        await service.close()


def _bus(backend: Backend, clock: Clock) -> Bus:
    return Bus(backend.id, backend.facts, backend.commands, backend.records, backend.wire, clock)


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
        tasks = [task for task, each in self._tasks.items() if name in (None, each)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Running:
    """One service on one bus."""

    def __init__(
        self, service: Service, parts: list[Bound], backend: Backend, bus: Bus, leases: Leases, tasks: _Tasks
    ) -> None:
        self._service, self._parts, self._backend, self._bus = service, parts, backend, bus
        self._leases, self._tasks = leases, tasks
        self._commanders: dict[str, Commander] = {}
        self._folders: dict[str, Folder] = {}
        self._schemas: dict[str, Schema] = {}
        self._consumers: list[Consumer] = []
        self._served: list[Callable[[], None]] = []
        self._copies: Copies | None = None
        self._store: Store | None = None

    async def look(self) -> None:
        """Raises `NotOwner` before anything is written."""
        for domain in self._service.owns:
            await owned(self._bus.facts, domain.name, self._service.name)
        if any(bound.part.kind in ("view", "replica") for bound in self._parts):
            from cauce.copying import copies_of

            self._copies = copies_of(self._service, self._parts, self._backend.store(self._service.name), self._bus)

    async def own(self) -> None:
        for domain in self._service.owns:
            await own(self._bus.facts, domain.name, self._service.name, self._bus.clock)

    async def lead(self) -> None:
        """Become the one who decides, with all records written that a predecessor left behind."""
        for domain in self._service.owns:
            await self._lead(domain)

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
        wire, domains = self._bus.wire, self._service.owns
        for domain in domains:
            self._served.append(await wire.serve(domain.name, self._answer(domain)))
        addresses = tuple(domain.name for domain in domains)
        self._served.append(await wire.announce(Instance(self._service.name, self._leases.owner, addresses)))

    async def consume(self) -> None:
        """React, and decide what was sent."""
        from cauce.store import Store  # Opens SQLite; who only imports cauce must not pay for that.

        self._store = store = Store(self._backend.store(self._service.name) / "store.db", self._bus.clock)
        self._tasks.start("store", store.run())
        await self._consume(store)
        _log.info("%s runs: %s", self._service.name, ", ".join(bound.name for bound in self._parts))

    async def drain(self, seconds: float) -> None:
        """Let handlers finish and records be written, within so many seconds each."""
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(consumer.drain() for consumer in self._consumers))
        except TimeoutError:
            _log.warning(
                "%s: handlers did not finish within %g s; what they handle is handled again",
                self._service.name,
                seconds,
            )
            for consumer in self._consumers:
                consumer.stop()
        for commander in self._commanders.values():
            try:
                async with asyncio.timeout(seconds):
                    await commander.settled()
            except (CauceError, TimeoutError) as error:
                _log.warning("records of %s wait for the next start: %r", commander.domain, error)

    def leave(self) -> None:
        """Answer no more."""
        for undo in self._served:
            undo()

    async def close(self) -> None:
        """Write the last places, and let go of the store."""
        if self._copies is not None:
            await self._copies.close()
        if self._store is not None:
            try:
                await self._store.flush()
            except CauceError as error:
                _log.warning(
                    "%s: the last places were not written, these messages are handled again: %s",
                    self._service.name,
                    error,
                )
            self._store.close()

    async def _lead(self, domain: Domain) -> None:
        schema = self._schemas[domain.name] = Schema(domain.messages.values())
        evolve = self._functions("evolve")
        folder = self._folders[domain.name] = Folder(
            domain.name, {cls: bound.part.function for cls, bound in evolve.items()}, schema
        )
        if domain.key is None:
            return
        deciders = {
            cls: Decider(bound.part.function, bound.context) for cls, bound in self._functions("decide").items()
        }
        commander = Commander(self._service.name, domain.name, deciders, folder, schema, self._bus, self._leases)
        await commander.take_over()
        self._commanders[domain.name] = commander
        self._tasks.start(f"records of {domain.name}", commander.records.run())
        self._bus.settles(commander.settled)

    def _functions(self, kind: str) -> dict[type[Message], Bound]:
        return {cls: bound for bound in self._parts if bound.part.kind == kind for cls in bound.messages}

    async def _consume(self, store: Store) -> None:
        from cauce.consumer import Consumer, Tail

        bus = self._bus
        head = await bus.facts.head()
        reactions = [
            Consumer(
                bound.name, _wants(bound), self._reaction(bound), bus.facts, store, bus.clock,
                begin=head if bound.part.start == "now" else 0, head=head, bodies=not bound.notice,
            )
            for bound in self._parts if bound.part.kind == "on" and not _is_record(bound)
        ]  # fmt: skip
        head = await bus.records.head()
        changes = [
            Consumer(
                bound.name, {declared(bound.messages[0]).domain.name: frozenset()}, self._reaction(bound),
                LastOfEach(bus.records), store, bus.clock, begin=head if bound.part.start == "now" else 0, head=head,
            )
            for bound in self._parts if bound.part.kind == "on" and _is_record(bound)
        ]  # fmt: skip
        head = await bus.commands.head()
        wishes = [
            Consumer(
                f"decide {domain}",
                {domain: frozenset()},
                commander.handle,
                bus.commands,
                store,
                bus.clock,
                begin=0,
                head=head,
            )
            for domain, commander in self._commanders.items()
        ]
        for log, consumers in ((bus.facts, reactions), (bus.records, changes), (bus.commands, wishes)):
            if consumers:
                self._tasks.start("tail", Tail(log, consumers, bus.clock).run())
        self._consumers = [*reactions, *changes, *wishes]
        for consumer in self._consumers:
            bus.settles(consumer.settled, behind=consumer in changes)
            consumer.failed.add_done_callback(self._stopped)

    def _stopped(self, consumer: asyncio.Future[None]) -> None:
        if not consumer.cancelled() and (error := consumer.exception()) is not None:
            self._tasks.fail(error)

    def _reaction(self, bound: Bound) -> Callable[[Entry], Coroutine[Any, Any, None]]:
        service, bus = self._service.name, self._bus
        schema = Schema(bound.messages)

        async def handle(entry: Entry) -> None:
            meta = entry.meta if bound.notice else entry.checked().meta
            message: Any
            if bound.notice:
                message = Notice(entry.type, entry.key, entry.version)
            elif _is_record(bound):
                message = carried(bound.messages[0], schema, entry)
                if message is None and not bound.gone:
                    return
            else:
                message = schema.decode(entry.domain, entry.type, meta.schema, entry.body or b"")
            cause = Cause(entry.id, meta.correlation or entry.id, "", meta.trace, meta.tracestate)
            context = Context(bus, service, bound.name, entry, cause)
            await self._say(bound, context, await _run(bound, message, context))

        return handle

    async def _say(self, bound: Bound, context: Context, result: Any) -> None:
        """Send the commands and record the events that a reaction returned."""
        where = f"{self._service.name}.{bound.name}"
        said = messages_of(result, where, "commands, own events, or None")
        for message in said:
            # All are looked at before any is said.
            if isinstance(message, Event) and declared(message).domain.name not in self._commanders:
                raise NotOwner(
                    f"{where} returned {type(message).__name__}, which only the owner of {declared(message).domain.name!r} records; send it a command"
                )
            if not isinstance(message, (Command, Event)):
                raise Refused(f"{where} returned {message!r}: return commands, own events, or None")
            encode(message)
        for message in said:
            if isinstance(message, Event):
                commander = self._commanders[declared(message).domain.name]
                await commander.publish([message], [context.id_of(message)], context.cause)
            elif isinstance(message, Command):
                await context.send(message)

    def _answer(self, domain: Domain) -> Callable[[bytes], Coroutine[Any, Any, bytes]]:
        answers = {cls: bound for cls, bound in self._functions("answer").items() if declared(cls).domain is domain}

        async def handler(payload: bytes) -> bytes:
            ask = _decode_ask(payload)
            try:
                reply = await self._reply(domain, ask, answers)
            except CauceError as error:
                reply = Reply(error_name(error), str(error))
            except Exception as error:
                _log.exception("%s failed on %s", self._service.name, ask.type)
                reply = Reply("CauceError", f"{self._service.name} failed on {ask.type}: {error!r}")
            return _encode(reply)

        return handler

    async def _reply(self, domain: Domain, ask: Ask, answers: dict[type[Message], Bound]) -> Reply:
        if ask.kind == "call":
            commander = self._commanders.get(domain.name)
            if commander is None:
                raise NoAnswer(f"{domain.name} has no things, so nothing can be wished of it")
            receipt = await commander.call(ask)
            return Reply("", "", receipt.version, receipt.position, receipt.changed)
        if ask.kind == "ask":
            return await self._answered(domain, ask, answers)
        folded = await self._folders[domain.name].fold(
            self._bus.facts, ask.key, at_version=ask.at_version, at_time=ask.at_time
        )
        body = b"" if folded.state is None else encode(folded.state)
        return Reply(
            version=folded.version, position=folded.position, body=msgspec.Raw(body or b'""'), changed=bool(body)
        )

    async def _answered(self, domain: Domain, ask: Ask, answers: dict[type[Message], Bound]) -> Reply:
        query = self._schemas[domain.name].decode(domain.name, ask.type, ask.schema, bytes(ask.body))
        bound = answers.get(type(query))
        if bound is None:
            raise NoAnswer(f"service {self._service.name!r} does not answer {ask.type}: add an answer function for it")
        if ask.after is not None and self._copies is not None:
            await self._copies.passed(ask.after)
        cause = Cause(ask.id, ask.correlation or ask.id, ask.by, ask.trace, ask.tracestate)
        answer = await _run(bound, query, Context(self._bus, self._service.name, bound.name, None, cause))
        what = f"the answer of {self._service.name}.{bound.name}"
        check_value(msgspec.to_builtins(answer), what)
        return Reply(body=msgspec.Raw(check_body(_encode(answer), what)))


def _is_record(bound: Bound) -> bool:
    return issubclass(bound.messages[0], Record)


def _wants(bound: Bound) -> dict[str, frozenset[str]]:
    wants: dict[str, set[str]] = {}
    for cls in bound.messages:
        kind = declared(cls)
        wants.setdefault(kind.domain.name, set()).add(kind.name)
    return {domain: frozenset(types) for domain, types in wants.items()}


async def _run(bound: Bound, message: Any, context: Context) -> Any:
    """Call a handler: a plain one in a thread, because it may block."""
    named = {} if bound.context is None else {bound.context: context}
    if bound.is_async:
        return await bound.part.function(message, **named)
    return await asyncio.to_thread(bound.part.function, message, **named)
