"""What a process serves and announces on a wire: noted first, then shown to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cauce.errors import Refused
from cauce.wire import Handler, Instance

__all__ = ["Board", "announce", "serve"]


class Board(Protocol):
    """What is served and announced here, by all who opened the bus in this process."""

    handlers: dict[str, Handler]
    instances: dict[str, Instance]

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


async def announce(board: Board, instance: Instance) -> Callable[[], None]:
    """See `cauce.wire.Wire.announce`."""
    instances = board.instances
    instances[instance.id] = instance

    def leave() -> None:
        if instances.pop(instance.id, None) is not None:
            board.hide()

    return await _shown(board, leave)


async def _shown(board: Board, leave: Callable[[], None]) -> Callable[[], None]:
    try:
        await board.show()
    except BaseException:
        leave()
        raise
    return leave
