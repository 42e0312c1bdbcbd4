"""What a process serves and announces on a wire: noted first, then shown to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from cauce.errors import Refused
from cauce.wire import Handler, Instance, Load

__all__ = ["Board", "announce", "loaded", "serve"]


class Board(Protocol):
    """What is served and announced here, by all who opened the bus in this process."""

    handlers: dict[str, Handler]
    instances: dict[str, Instance]
    loads: dict[str, Callable[[], Load]]

    async def show(self) -> None:
        """Let the others see it as it is now."""
        ...

    def hide(self) -> None:
        """Let the others see, soon, that something is there no more."""
        ...


async def serve(board: Board, address: str, handler: Handler) -> Callable[[], None]:
    """See `cauce.wire.Wire.serve`."""
    handlers = board.handlers
    if address in handlers:
        raise Refused(f"{address} is served already: run a service once in a process")
    handlers[address] = handler

    def leave() -> None:
        if handlers.get(address) is handler:
            del handlers[address]
            board.hide()

    return await _shown(board, leave)


async def announce(board: Board, instance: Instance, load: Callable[[], Load] | None) -> Callable[[], None]:
    """See `cauce.wire.Wire.announce`."""
    instances = board.instances
    instances[instance.id] = instance
    if load is not None:
        board.loads[instance.id] = load

    def leave() -> None:
        board.loads.pop(instance.id, None)
        if instances.pop(instance.id, None) is not None:
            board.hide()

    return await _shown(board, leave)


def loaded(instances: dict[str, Instance], loads: dict[str, Callable[[], Load]]) -> tuple[Instance, ...]:
    """What is announced here, with what each has to do now."""
    return tuple(replace(instance, load=loads[id]()) if id in loads else instance for id, instance in instances.items())


async def _shown(board: Board, leave: Callable[[], None]) -> Callable[[], None]:
    try:
        await board.show()
    except BaseException:
        leave()
        raise
    return leave
