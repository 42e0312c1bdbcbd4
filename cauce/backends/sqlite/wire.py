"""The wire inside one process: a question is a call. Between processes nobody answers yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

from cauce.clock import Clock
from cauce.deadline import Deadlines
from cauce.errors import NoAnswer, Refused
from cauce.wire import Handler, Instance

__all__ = ["LocalWire"]


class _Board:
    """What is served on one file in this process, shared by all who opened it here."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.instances: dict[str, Instance] = {}


_boards: WeakValueDictionary[Path, _Board] = WeakValueDictionary()


class LocalWire:
    """See `cauce.wire.Wire` for what each method promises."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._board = _boards.setdefault(path.resolve(), _Board())
        self._clock = clock
        self._deadlines = Deadlines()

    async def ask(self, address: str, payload: bytes, deadline: float) -> bytes:
        handler = self._board.handlers.get(address)
        if handler is None:
            raise NoAnswer(
                f"nobody serves {address} in this process: run the service that owns it here, or send a command instead"
            )
        return await self._deadlines.within(deadline - self._clock.monotonic(), handler(payload))

    async def serve(self, address: str, handler: Handler) -> Callable[[], None]:
        handlers = self._board.handlers
        if address in handlers:
            raise Refused(f"{address} is served already: run a service once in a process")
        handlers[address] = handler

        def leave() -> None:
            if handlers.get(address) is handler:
                del handlers[address]

        return leave

    async def announce(self, instance: Instance) -> Callable[[], None]:
        instances = self._board.instances
        instances[instance.id] = instance

        def leave() -> None:
            instances.pop(instance.id, None)

        return leave

    async def instances(self) -> list[Instance]:
        return list(self._board.instances.values())
