"""nats-py's client, changed in three things: what we tap skips its queues, it never gives up, it leaves no ghosts.

The methods overridden here are its own (`_process_msg`, `_process_err`, `_process_connect_init`,
`_attempt_reconnect`): tests/test_nats.py holds
that they are still called. Everything else is used by its public face.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from nats import errors
from nats.aio.client import Client as PlainClient
from nats.aio.subscription import Subscription

__all__ = ["Client", "Tap", "Tapped"]

Tap = Callable[[bytes, bytes, bytes, bytes], None]
"""Takes subject, reply, payload and the raw header block (or nothing) of a message, at once, and never waits."""


class Client(PlainClient):
    """`taps` says by the number of a subscription who takes its messages."""

    def __init__(self) -> None:
        super().__init__()
        self.taps: dict[int, Tap] = {}

    async def tap(self, subject: str, tap: Tap, queue: str = "") -> Tapped:
        """Hand what comes in at a subject to a function, past all queues, until the returned object is called."""
        # The number is given before the subscription is sent, so nothing slips past.
        number = self._sid + 1
        self.taps[number] = tap
        return Tapped(self, number, await self.subscribe(subject, queue, cb=_nobody))

    def send(self, command: bytes) -> None:
        """Put a command of the protocol among what goes out with the next flush. `kick` makes it go."""
        self._pending.append(command)
        self._pending_data_size += len(command)

    def kick_soon(self) -> None:
        """Let go out what was sent, from where nothing can be waited for."""
        if self._flush_queue is not None and self._flush_queue.empty() and self.is_connected:
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    async def kick(self) -> None:
        """Let go out what was sent."""
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    def leave(self) -> None:
        """Break the connection: the next server is tried. What was not sent yet is not waited for."""
        if (writer := getattr(self._transport, "_io_writer", None)) is not None:
            writer.transport.abort()

    def fileno(self) -> int:
        """The file descriptor of the connection, -1 if there is none."""
        writer = getattr(self._transport, "_io_writer", None)
        connection = None if writer is None else writer.get_extra_info("socket")
        return -1 if connection is None else int(connection.fileno())

    @property
    def told(self) -> Mapping[str, Any]:
        """What the server said of itself when it was connected."""
        return self._server_info

    @property
    def peer(self) -> str:
        """The address at the other end of the connection, empty if there is none."""
        writer = getattr(self._transport, "_io_writer", None)
        found = None if writer is None else writer.get_extra_info("peername")
        return str(found[0]) if found else ""

    @property
    def is_encrypted(self) -> bool:
        """Whether what goes over the connection is."""
        writer = getattr(self._transport, "_io_writer", None)
        return writer is not None and writer.get_extra_info("ssl_object") is not None

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        tap = self.taps.get(sid)
        if tap is None:
            await super()._process_msg(sid, subject, reply, data, headers)  # type: ignore[arg-type]
        else:
            tap(subject, reply, data, headers or b"")

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
        else:
            # It would close for good, for reasons that pass: too many connections, a password that is being changed.
            await self._error_cb(errors.Error(f"nats: {err_msg}"))
            await self._process_op_err(errors.Error(err_msg))

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except BaseException:
            # It would be forgotten open: who accepts connections and says nothing, hangs.
            self.leave()
            raise

    async def _attempt_reconnect(self) -> None:
        # What waited to be sent when the connection broke was given up, or is sent again, by those who asked for it.
        self._pending.clear()
        self._pending_data_size = 0
        await super()._attempt_reconnect()


class Tapped:
    """A subscription whose messages are handed to a tap."""

    def __init__(self, client: Client, number: int, subscription: Subscription) -> None:
        self._client, self._number, self._subscription = client, number, subscription

    def quit(self) -> None:
        """Let the server send nothing more; what is on its way is still handed on."""
        # Not again after a reconnect, either.
        self._client._remove_sub(self._number)
        if self._client.is_connected:
            self._client.send(b"UNSUB %d\r\n" % self._number)

    def __call__(self) -> None:
        """Let the server send nothing more, and hand nothing on."""
        if self._client.taps.pop(self._number, None) is not None:
            self._subscription._stop_processing()
            self.quit()


async def _nobody(message: Any) -> None:
    """Takes the place of a callback that is never called."""
