"""The wire on NATS: in one process a question is a call, between processes it is a request to a service of NATS."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakValueDictionary

import msgspec

from cauce.backends.board import loaded
from cauce.backends.nats.address import Address
from cauce.backends.nats.answering import Answering, Endpoint
from cauce.backends.nats.asking import Asking
from cauce.backends.nats.client import Tapped
from cauce.backends.nats.frames import HEADERS, publication
from cauce.backends.nats.link import Link
from cauce.backends.nats.names import token
from cauce.backends.nats.registry import BEAT, Registry
from cauce.backends.nats.services import Services
from cauce.backends.nats.whom import Whom
from cauce.backends.spread import Lost, NotServed, Spread
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.errors import CauceError, NoAnswer, Refused, Unavailable, Unreachable
from cauce.wire import Handler, Instance, Load

__all__ = ["NatsWire"]

_log = logging.getLogger("cauce")

_MOVING = 2.0
"""Seconds for which an address that nobody serves may be on its way, and the server be away."""

_POLL, _SELDOM = 0.02, 0.2


class _Here(dict[str, Handler]):
    """What is served on one bus in this process and loop, whoever opened it: asked without the server."""


_here: WeakValueDictionary[tuple[Address, asyncio.AbstractEventLoop], _Here] = WeakValueDictionary()


class NatsWire:
    """See `cauce.wire.Wire` for what each method promises.

    Who asks hears at once from the server that nobody has subscribed, so no list of who serves what is kept: an address
    is the subject `ask.users` or `ask.users.3`, that somebody answers in a domain at all is a subscription to
    `in.users`, and that a process lives one to `wire.<pid>-<chance>`. What may be asked twice, and what the holder of a
    slot is asked, is asked by name, at `ask.users.<pid>-<chance>` or `ask.users.3-<pid>-<chance>`, of those whom the
    registry says to be well: the server gives a question also to one that stands still, for minutes.
    """

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link, self._clock = link, clock
        self._handlers = _here.setdefault((link.address, asyncio.get_running_loop()), _Here())
        self._name = f"{os.getpid()}-{clock.id()[-12:]}"
        self._deadlines = Deadlines()
        self._asking = Asking(link, clock, self._deadlines)
        self._answering = Answering(link, self._name, clock, self._deadlines, self._barrier)
        self._services = Services(link, lambda: self._answering.endpoints.values(), self._send)
        self._registry = Registry(link, clock)
        self._spread = Spread(clock)
        self._whom = Whom(self._registry.read, self._name, self._spread, clock)
        self._loads: dict[str, Callable[[], Load]] = {}
        self._subjects: dict[str, str] = {}
        self._taps: dict[str, Tapped] = {}
        self._tapping = asyncio.Lock()
        self._beating: asyncio.TimerHandle | None = None
        self._showing = asyncio.Lock()
        self._closed = False
        link.came_back.append(self._show)

    # --------------------------------------------------------------------------------------------------- questions

    async def ask(self, address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
        handler = self._handlers.get(address)
        if handler is None:
            return await self._ask(address, payload, deadline, safe)
        return await self._deadlines.within(deadline - self._clock.monotonic(), handler(payload))

    async def _ask(self, address: str, payload: bytes, deadline: float, safe: bool) -> bytes:
        """Ask the server, and again as long as the address may be on its way from one instance to another."""
        most = self._link.client.max_payload - HEADERS
        if len(payload) > most:
            raise Refused(f"a question of {len(payload)} bytes to {address}: the NATS server takes at most {most}")
        moving, pause, lost = min(deadline, self._clock.monotonic() + _MOVING), _POLL, None
        while not self._closed:
            left = deadline - self._clock.monotonic()
            if self._link.is_away:
                await self._link.connected(min(left, _MOVING))
                continue
            try:
                if safe or "/" in address:
                    return await self._ask_by_name(address, payload, deadline, safe)
                return await self._ask_anyone(address, payload, deadline)
            except NotServed:
                pass
            except Lost as error:
                if lost is not None or not safe:
                    raise
                lost = error
                self._whom.doubt()
                continue
            handler = self._handlers.get(address)
            if handler is not None:
                return await self._deadlines.within(deadline - self._clock.monotonic(), handler(payload))
            left = moving - self._clock.monotonic()
            if left <= 0 or not await self._asking.is_there(self._domain_subject(address)):
                break
            await self._clock.sleep(min(pause, left))
            pause = min(pause * 1.5, _SELDOM)
            if deadline - self._clock.monotonic() < _POLL:
                break  # No time is left for an answer, and it is still known that nothing ran.
        if lost is not None:
            raise lost
        raise NoAnswer(f"nobody serves {address}: run the service that owns it, or send a command instead")

    async def _ask_anyone(self, address: str, payload: bytes, deadline: float) -> bytes:
        """Let the server choose. Raises `NotServed`."""
        left = deadline - self._clock.monotonic()
        return await self._deadlines.within(left, self._asking.ask(self._subject_of(address), payload, left))

    async def _ask_by_name(self, address: str, payload: bytes, deadline: float, safe: bool) -> bytes:
        """Ask one that is well, or two; whom the server chooses if none is known, or none of them serves it."""

        async def one(name: str) -> bytes:
            left = deadline - self._clock.monotonic()
            return await self._deadlines.within(left, self._asking.ask(self._own_subject(address, name), payload, left))

        left, is_slot = deadline - self._clock.monotonic(), "/" in address
        well, others = await self._deadlines.within(left, self._whom.order(address))
        order = well if is_slot else well + others
        if others and not well:
            # Another may take over any moment.
            self._whom.doubt()
        if order:
            try:
                return await self._spread.ask(order, one, deadline - self._clock.monotonic(), safe=safe and not is_slot)
            except NotServed:
                self._whom.doubt()
                if is_slot and others:
                    # The server might choose one that stands still, and has lost it.
                    raise
        return await self._ask_anyone(address, payload, deadline)

    def _subject_of(self, address: str) -> str:
        subject = self._subjects.get(address)
        if subject is None:
            self._subjects[address] = subject = self._link.subject("ask", *map(token, address.split("/")))
        return subject

    def _own_subject(self, address: str, name: str) -> str:
        """Where one process is asked that serves an address, as others do or did."""
        domain, _, slot = address.partition("/")
        return self._link.subject("ask", token(domain), token(f"{slot}-{name}" if slot else name))

    def _domain_subject(self, address: str) -> str:
        return self._link.subject("in", token(address.partition("/")[0]))

    def _process_subject(self, name: str) -> str:
        return self._link.subject("wire", token(name))

    # ------------------------------------------------------------------------------------------------- to be asked

    async def serve(self, address: str, handler: Handler) -> Callable[[], None]:
        handlers = self._handlers
        if address in handlers:
            raise Refused(f"{address} is served already: run a service once in a process")
        handlers[address] = handler
        subject = self._subject_of(address)
        endpoint = self._answering.endpoint(address, subject, handler)

        def leave() -> None:
            if handlers.get(address) is handler:
                del handlers[address]
            if self._answering.leave(endpoint):
                self._answering.aside(self._left(endpoint))

        try:
            await self._answering.listen(endpoint, self._own_subject(address, self._name))
            await self._tap_domains()
            await self._barrier()
            self._link.may_listen(subject)
        except BaseException:
            leave()
            raise
        return leave

    async def _left(self, endpoint: Endpoint) -> None:
        await self._answering.left(endpoint)
        await self._tap_domains()

    async def announce(self, instance: Instance, load: Callable[[], Load] | None = None) -> Callable[[], None]:
        if load is not None:
            self._loads[instance.id] = load
        await self._services.show(instance)

        def leave() -> None:
            self._loads.pop(instance.id, None)
            if self._services.hide(instance.id):
                self._answering.aside(self._tap_domains())
                self._show()

        try:
            await self._tap_domains()
            await self._say()
        except (Unavailable, OSError) as error:
            _log.warning("%s is announced with the next beat: %s", instance.service, error)
        except BaseException:
            leave()
            raise
        return leave

    async def _tap_domains(self) -> None:
        """Subscribe to what says that this process lives, and that it answers in a domain or will soon."""
        async with self._tapping:
            served = [*self._answering.endpoints]
            said = [address for each in self._services.instances.values() for address in each.addresses]
            subjects = {self._domain_subject(address) for address in (*served, *said)}
            if subjects or self._services.instances:
                subjects.add(self._process_subject(self._name))
            for subject in self._taps.keys() - subjects:
                self._taps.pop(subject)()
            for subject in subjects - self._taps.keys():
                self._taps[subject] = await self._tap(subject)
            await self._link.client.kick()

    async def _tap(self, subject: str) -> Tapped:
        return await self._link.client.tap(subject, lambda _, reply, data, head: self._send(reply, b""))

    def _send(self, reply: bytes, payload: bytes) -> None:
        self._answering.aside(self._answering.send(publication(reply, b"", payload)))

    async def _barrier(self) -> None:
        """Return when the server has taken all that was sent, and all has come that it had sent before."""
        # Nobody is there, and that it says so proves it: what goes over one connection keeps its order.
        # (The client's own `flush` may overtake what waits to be sent.)
        subject, seconds = self._link.subject("wire", token(self._name), "barrier"), self._link.patience
        try:
            await self._deadlines.within(seconds, self._asking.ask(subject, b"", seconds))
        except NotServed:
            pass
        except TimeoutError:
            raise Unreachable(f"{self._link} did not answer within {seconds:g} s") from None

    # ------------------------------------------------------------------------------------------------ who runs

    async def instances(self) -> list[Instance]:
        here = loaded(self._services.instances, self._loads)
        if self._closed:
            return []
        found = await self._registry.instances(self._is_there)
        now = self._clock.now()
        others = [instance for name, said in found.items() if name != self._name for instance in said]
        return [msgspec.structs.replace(instance, beat=now) for instance in here] + others

    async def _is_there(self, name: str) -> bool:
        return name == self._name or await self._asking.is_there(self._process_subject(name))

    async def _say(self) -> None:
        """Say who runs here, now and with each beat as long as there is somebody."""
        async with self._showing:
            if self._beating is not None:
                self._beating.cancel()
                self._beating = None
            if self._services.instances:
                self._beating = asyncio.get_running_loop().call_later(BEAT, self._show)
            await self._registry.publish(token(self._name), loaded(self._services.instances, self._loads))

    def _show(self) -> None:
        """Say soon, anew, who runs here, and that nobody does any more."""
        if not self._closed:
            self._answering.aside(self._say())

    async def close(self) -> None:
        """Answer nothing more, say so, and leave the link as it was."""
        if self._closed:
            return
        self._closed = True
        self._link.came_back.remove(self._show)
        for address, endpoint in list(self._answering.endpoints.items()):
            if self._handlers.get(address) is endpoint.handler:
                del self._handlers[address]
            if self._answering.leave(endpoint):
                self._answering.aside(self._left(endpoint))
        announced = [self._services.hide(id) for id in list(self._services.instances)]
        await self._answering.close()
        if any(announced):
            with suppress(CauceError, OSError):
                await self._say()
                await self._tap_domains()
        await self._whom.close()
        await self._asking.close()
