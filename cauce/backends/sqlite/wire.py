"""The wire: in one process a question is a call, between processes it goes over a Unix socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from cauce.backends.board import announce, loaded, serve
from cauce.backends.candidates import answers_in, candidates
from cauce.backends.spread import Lost, NotServed, Spread
from cauce.backends.sqlite.file import folder_of
from cauce.backends.sqlite.line import Answering, Asking, Line, is_trusted
from cauce.backends.sqlite.registry import BACKLOG, Present, Registry
from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.errors import NoAnswer, Refused
from cauce.identity import identity
from cauce.wire import Handler, Instance, Load

__all__ = ["SocketWire", "present"]

_log = logging.getLogger("cauce")

_BEAT = 2.0
_MOVING = 2.0
"""Seconds for which an address that nobody serves may be on its way from one instance to another."""

_POLL = 0.02
_FLUSH = 1.0
"""Seconds that the last answers get to be read by who asked, who then closes the connection."""


class _Board:
    """What is served on one file in this process and loop, and its connections: shared by all who opened it here."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._loop, self._clock = asyncio.get_running_loop(), clock
        self.registry = Registry(folder, clock)
        self.token = f"{os.getpid()}-{clock.id()[-12:]}"
        self._owner = identity("wire", clock)
        self.deadlines = Deadlines()
        self.handlers: dict[str, Handler] = {}
        self.instances: dict[str, Instance] = {}
        self.loads: dict[str, Callable[[], Load]] = {}
        self.spread = Spread(clock)
        self.users = 0
        self._asking: dict[str, Asking] = {}
        self._answering: set[Answering] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None
        self._beating: asyncio.TimerHandle | None = None
        self._listener: socket.socket | None = None
        self._showing = asyncio.Lock()
        self._due = self._stale = self.closed = False

    # ------------------------------------------------------------------------------------------------ to be seen

    async def show(self) -> None:
        """Let the others see what is served and announced here. Raises `Refused` where the folder does not allow it."""
        try:
            await self._show()
        except OSError as error:
            raise Refused(f"the wire cannot be set up: {error}: mend the folder beside the bus") from None

    async def _show(self) -> None:
        async with self._showing:
            if self._server is None:
                self._listener = self.registry.listen(self.token)
                self._server = await self._loop.create_unix_server(self._accept, sock=self._listener, backlog=BACKLOG)
                self._publish()
                self.registry.tidy(but=self.token)
                if self._beating is None:
                    self._beating = self._loop.call_later(_BEAT, self._beat)
            else:
                self._publish()

    def hide(self) -> None:
        """Let the others see, soon, that something is served or announced here no more."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._hide)

    def _hide(self) -> None:
        self._due = False
        if self._server is None:
            return
        if not self.handlers and not self.instances:
            self._vanish()
            return
        try:
            self._publish()
        except OSError as error:
            # Who asks for it is told that it is not served, and the next beat tries again.
            _log.warning("the wire shows more than is served here: %s", error)

    def _publish(self) -> None:
        self._stale = True
        self.registry.publish(self.token, self._present())
        self._stale = False

    def _present(self) -> Present:
        return Present(self._owner, tuple(self.handlers), loaded(self.instances, self.loads))

    def all_instances(self, now: int) -> list[Instance]:
        """Those here, and those elsewhere."""
        here = [msgspec.structs.replace(instance, beat=now) for instance in loaded(self.instances, self.loads)]
        return here if self.closed else here + self.registry.instances(but=self.token)

    def _vanish(self) -> None:
        self.registry.bury(self.token)
        if self._server is not None:
            self._server.close()
            self._server = self._listener = None
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None

    def _beat(self) -> None:
        self._beating = None
        if self._server is not None:
            if self.registry.beat(self.token, {id: load() for id, load in self.loads.items()}):
                if self._stale:
                    self._hide()
            else:
                _log.warning("the files of this process at the wire were removed: they are made again")
                self._vanish()
        if self._server is None and (self.handlers or self.instances):
            self._start(self.show())  # And with the next beat again, if the folder does not allow it now.
        if (self._server is not None or self.handlers or self.instances) and not self.closed:
            self._beating = self._loop.call_later(_BEAT, self._beat)

    # ------------------------------------------------------------------------------------------------ connections

    def _accept(self) -> asyncio.Protocol:
        answering = Answering(self.handlers, self.deadlines, self._clock, self._answering.discard)
        self._answering.add(answering)
        return answering.line

    def _line_to(self, token: str) -> Asking:
        """The one connection to a process. Raises `OSError`."""
        asking = self._asking.get(token)
        if asking is not None:
            return asking
        connection = self.registry.connect(token)
        if not is_trusted(connection):
            connection.close()
            raise PermissionError(f"process {token} is not trusted")
        asking = Asking(f"process {token.partition('-')[0]}", self._clock, lambda: self._lost(token))
        self._asking[token] = asking
        # It is connected already: what is asked meanwhile waits in the line.
        self._start(self._connect(asking.line, connection))
        return asking

    async def _connect(self, line: Line, connection: socket.socket) -> None:
        try:
            await self._loop.create_unix_connection(lambda: line, sock=connection)
        except BaseException:
            connection.close()
            line.connection_lost(None)
            raise

    def _lost(self, token: str) -> None:
        # Told twice where it left in good order: by what it said, and when the connection was closed.
        self._asking.pop(token, None)
        self.registry.doubt()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("the wire could not be set up: %r", error)

    async def close(self) -> None:
        """Give the last answers, and let go of everything."""
        self.closed = True
        self._vanish()
        lines = [each.line for each in self._answering]
        for answering in self._answering:
            answering.leave()
        others = [each.line for each in self._asking.values()]
        for line in others:
            line.close(now=True)
        gone = [line.gone for line in (*lines, *others)]
        if gone:
            await asyncio.wait(gone, timeout=_FLUSH)
            for line in lines:
                line.close(now=True)
            await asyncio.wait(gone)
        if self._starting:
            await asyncio.wait(self._starting)
        self._vanish()
        self.registry.close()

    def filenos(self) -> list[int]:
        """The sockets."""
        numbers = [each.line.fileno() for each in self._answering]
        numbers += [each.line.fileno() for each in self._asking.values()]
        return [each for each in (*numbers, self._listener.fileno() if self._listener else -1) if each >= 0]

    # --------------------------------------------------------------------------------------------------- questions

    async def ask(self, address: str, payload: bytes, deadline: float, clock: Clock, safe: bool) -> bytes:
        """Ask those who serve the address elsewhere, until one of them takes the question."""

        async def one(token: str) -> bytes:
            try:
                asking = self._line_to(token)
            except OSError:
                raise NotServed from None  # Dead, or too busy to take a connection: nothing ran.
            left = deadline - clock.monotonic()
            return await self.deadlines.within(left, asking.ask(address, payload, left))

        moving, sure, lost = min(deadline, clock.monotonic() + _MOVING), False, None
        while not self.closed:
            late = clock.monotonic() + _POLL >= moving
            if order := self._candidates(address, late=late):
                try:
                    return await self.spread.ask(order, one, deadline - clock.monotonic(), safe=safe)
                except NotServed:
                    self.registry.doubt()
                except Lost as error:
                    if lost is not None or not safe:
                        raise
                    lost = error
                    self.registry.doubt()
                    continue
            handler = self.handlers.get(address)
            if handler is not None:
                return await self.deadlines.within(deadline - clock.monotonic(), handler(payload))
            if not sure:
                sure = True
                self.registry.doubt()
                continue
            if late or not self._answers_in(address):
                break
            await clock.sleep(_POLL)
        if lost is not None:
            raise lost
        raise NoAnswer(f"nobody serves {address}: run the service that owns it, or send a command instead")

    def _answers_in(self, address: str) -> bool:
        return answers_in(self.registry, self._present, address.partition("/")[0], but=self.token)

    def _candidates(self, address: str, *, late: bool) -> list[str]:
        self.registry.look()
        serving = [token for token in self.registry.serving(address) if token != self.token]
        domain = address.partition("/")[0]
        return candidates(self.registry, self.spread, serving, self._present, domain, late=late)


_boards: WeakValueDictionary[tuple[Path, asyncio.AbstractEventLoop], _Board] = WeakValueDictionary()


def _forked() -> None:
    """A child must not keep alive what its parent's death is known by."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for board in list(_boards.values()):
        for file in board.filenos():
            # Not closed: the number must stay taken, because objects that this process has inherited will close it.
            os.dup2(nowhere, file, inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_forked)


class SocketWire:
    """See `cauce.wire.Wire` for what each method promises."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._key = path.resolve(), asyncio.get_running_loop()
        board = _boards.get(self._key)
        if board is None:
            board = _boards[self._key] = _Board(folder_of(path.resolve()) / "wire", clock)
        board.users += 1
        self._board, self._clock, self._deadlines = board, clock, board.deadlines
        self._handlers = board.handlers
        self._closed = False

    async def ask(self, address: str, payload: bytes, deadline: float, *, safe: bool = False) -> bytes:
        handler = self._handlers.get(address)
        if handler is not None:
            return await self._deadlines.within(deadline - self._clock.monotonic(), handler(payload))
        return await self._board.ask(address, payload, deadline, self._clock, safe)

    async def serve(self, address: str, handler: Handler) -> Callable[[], None]:
        return await serve(self._board, address, handler)

    async def announce(self, instance: Instance, load: Callable[[], Load] | None = None) -> Callable[[], None]:
        return await announce(self._board, instance, load)

    async def instances(self) -> list[Instance]:
        return self._board.all_instances(self._clock.now())

    async def close(self) -> None:
        """Let go of it; the last one in the process closes its sockets and removes its files."""
        if self._closed:
            return
        self._closed = True
        self._board.users -= 1
        if not self._board.users:
            _boards.pop(self._key, None)
            await self._board.close()


def present(path: Path, clock: Clock) -> list[Instance]:
    """Who runs on the bus in a file, found out without opening it. Raises `Refused` if that may not be known."""
    folder = folder_of(path.resolve()) / "wire"
    try:
        registry = Registry(folder, clock, make=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refused(f"{folder} cannot be read: {error.strerror}: mend it, or ask as the user whose it is") from None
    try:
        return registry.instances()
    finally:
        registry.close()
