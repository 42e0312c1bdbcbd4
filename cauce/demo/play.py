"""Plays the demo: starts everything, acts as the browser, and shows what happened because of what."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import httpx
from aiosmtpd.smtp import SMTP
from rich.console import Console
from rich.panel import Panel

from cauce.backends.sqlite.verify import verify
from cauce.bus import Bus
from cauce.clock import SystemClock
from cauce.demo import users
from cauce.demo.mails import mails
from cauce.demo.story import Story
from cauce.demo.web import app, serving
from cauce.runtime import running

__all__ = ["play"]


class _Inbox:
    """What the SMTP server does with mail: keeps it, and says so."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self.mails: asyncio.Queue[bytes] = asyncio.Queue()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        self._story.tell("smtp", f"took a mail for {', '.join(envelope.rcpt_tos)}", "mails delivered it")
        self.mails.put_nowait(envelope.content)
        return "250 OK"


async def play(console: Console, folder: Path, *, keep: Callable[[Bus], Awaitable[None]] | None, port: int) -> bool:
    """Run the demo in a folder; says whether all of it went well.

    Parameters:
        keep: leave it running for a browser until this returns.
        port: of the web form; 0 takes a free one.
    """
    clock = SystemClock()
    story = Story(console, clock.monotonic)
    inbox = _Inbox(story)
    smtp = await asyncio.get_running_loop().create_server(lambda: SMTP(inbox), "127.0.0.1", 0)
    smtp_port: int = smtp.sockets[0].getsockname()[1]
    path = folder / "bus.db"
    try:
        async with (
            running(users.service, mails(smtp_port, story), bus=f"sqlite:///{path}") as bus,
            serving(app(bus, story, clock.id()), port) as address,
        ):
            well = await _act(console, story, bus, inbox, address)
            well = _verified(story, path) and well
            if keep:
                console.print(f"\nThe form is at [link={address}]{address}[/], the log in {path}. Ctrl-C ends it.")
                await keep(bus)
    finally:
        smtp.close()
    return well


async def _act(console: Console, story: Story, bus: Bus, inbox: _Inbox, address: str) -> bool:
    """What a person does in a browser, and what comes of it."""
    story.headline("A user registers on a web form")
    async with httpx.AsyncClient(base_url=address, follow_redirects=True, trust_env=False, timeout=10) as browser:
        page = (await browser.get("/")).text
        found = re.search(r'name="token" value="([^"]+)"', page)
        assert found is not None
        fields = {"token": found[1], "user_id": "42", "name": "Ana Álvarez", "email": "ana@example.org"}
        story.tell("browser", "fills in the form and presses Register")
        first = await browser.post("/users", data=fields, headers={"origin": address})
        mail = message_from_bytes(await asyncio.wait_for(inbox.mails.get(), 10), policy=policy.default)
        await bus.settled()
        story.headline("The mail that arrived")
        console.print(
            Panel(f"To: {mail['to']}\nSubject: {mail['subject']}\n\n{mail.get_content()}".rstrip(), expand=False)
        )
        story.headline("The same user once more")
        story.tell("browser", "presses Register again")
        second = await browser.post("/users", data=fields, headers={"origin": address})
    await bus.settled()
    await _tell_log(story, bus)
    return first.status_code == 200 and second.status_code == 409 and inbox.mails.empty()


async def _tell_log(story: Story, bus: Bus) -> None:
    """The same story once more, as it is kept."""
    story.headline("What the log keeps")
    for name, log in (("facts", bus.facts), ("commands", bus.commands), ("records", bus.records)):
        for entry in (await log.read()).entries:
            meta = entry.meta
            if entry.stream.startswith("_"):
                continue
            wished = f"{entry.wished.type} by {meta.by}" if entry.wished is not None else meta.verdict
            story.tell(
                "log",
                f"{name} {entry.position}: {entry.type} {entry.stream} version {entry.version}",
                wished or f"fact …{entry.id[-12:]}",
            )


def _verified(story: Story, path: Path) -> bool:
    report = verify(path)
    story.tell("log", "verified: every entry is what was written" if report.ok else f"NOT well: {report}")
    return report.ok
