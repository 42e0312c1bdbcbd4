"""Where the mails of the demo arrive: a real SMTP server on loopback."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

from aiosmtpd.smtp import SMTP

from cauce.demo.story import Story

__all__ = ["Inbox", "receiving"]

_PATIENCE = 30.0
"""Seconds in which a mail must have come. What waits is tried again with growing pauses."""


class Inbox:
    """Keeps what comes, and says so."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._new: asyncio.Queue[EmailMessage] = asyncio.Queue()
        self.taken: list[tuple[str, str]] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        mail = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(mail, EmailMessage)
        self._story.tell("smtp", f"took a mail for {mail['to']}: {mail['subject']}", "mails delivered it")
        self.taken.append((str(mail["to"]), str(mail["subject"])))
        self._new.put_nowait(mail)
        return "250 OK"

    async def next(self) -> EmailMessage:
        """The next mail. Raises `TimeoutError` if none comes."""
        async with asyncio.timeout(_PATIENCE):
            return await self._new.get()


@asynccontextmanager
async def receiving(story: Story) -> AsyncIterator[Inbox]:
    """Take mail until the block is left; the mails service finds the port in `SMTP_PORT`."""
    inbox = Inbox(story)
    server = await asyncio.get_running_loop().create_server(lambda: SMTP(inbox), "127.0.0.1", 0)
    before = os.environ.get("SMTP_PORT")
    os.environ["SMTP_PORT"] = str(server.sockets[0].getsockname()[1])
    try:
        yield inbox
    finally:
        server.close()
        if before is None:
            del os.environ["SMTP_PORT"]
        else:
            os.environ["SMTP_PORT"] = before
