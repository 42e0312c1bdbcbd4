"""Plays the demo: starts everything, acts as the people, and shows what happened because of what."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from cauce.backends import look, read_all
from cauce.bus import Bus, Receipt
from cauce.clock import Clock, SystemClock
from cauce.demo.apart import apart, until_runs
from cauce.demo.ground import Ground, ground
from cauce.demo.inbox import Inbox, receiving
from cauce.demo.shop import cards, crm, mails, users
from cauce.demo.story import Story, listening
from cauce.demo.web import app, serving
from cauce.log import entries_of
from cauce.runtime import running

__all__ = ["play"]

_ANA = "Ana Álvarez"


async def play(
    console: Console,
    *,
    keep: Callable[[Bus], Awaitable[None]] | None,
    port: int,
    each: bool = False,
    bus: str | None = None,
    store: str | None = None,
) -> bool:
    """Run the demo; says whether all of it went well.

    Parameters:
        keep: leave it running for a browser until this returns.
        port: of the web form; 0 takes a free one.
        each: every service in a process of its own, of which one is killed.
        bus: a server on which it makes a bus of its own, and takes it away; None: a temporary file.
        store: where its services keep what is their own; None: at the bus, or in temporary files.
    """
    # SIGTERM ends it as Ctrl-C does: with all that it started.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    clock = SystemClock()
    story = Story(console, clock.monotonic, apart=each)
    async with ground(bus, store, clock) as place:
        well = await _plays(console, story, place, clock.id(), keep, port, each)
        await _tell_log(story, place, clock)
        return await _verified(story, place, clock) and well


async def _plays(
    console: Console, story: Story, place: Ground, token: str, keep: Callable[[Bus], Awaitable[None]] | None, port: int,
    each: bool,
) -> bool:  # fmt: skip
    services = apart if each else _together
    async with receiving(story) as inbox:
        async with services(place, story) as bus, serving(app(bus, story, token), port) as address:
            well = await _registers(story, inbox, address)
            changed = await _changes(story, bus)
            well = await _issues(story, bus, inbox, changed) and well
            if each:
                await _kills(story, bus, inbox)
            well = await _compares(story, bus, changed) and well
            if keep:
                where = f"The form is at [link={address}]{address}[/], the bus at {escape(place.shown)}."
                console.print(f"\n{where} Ctrl-C ends it.")
                await keep(bus)
        # All services have ended, so what would have gone out twice has.
        return _counts(story, inbox, each) and well


@asynccontextmanager
async def _together(place: Ground, story: Story) -> AsyncIterator[Bus]:
    """All services in this process."""
    with listening(story):
        services = users.service, mails.service, cards.service, crm.service
        async with running(*services, bus=place.url, store=place.store) as bus:
            yield bus


async def _registers(story: Story, inbox: Inbox, address: str) -> bool:
    """What a person does in a browser, and what comes of it."""
    story.headline("A user registers on a web form")
    async with httpx.AsyncClient(base_url=address, follow_redirects=True, trust_env=False, timeout=10) as browser:
        page = (await browser.get("/")).text
        found = re.search(r'name="token" value="([^"]+)"', page)
        assert found is not None
        fields = {"token": found[1], "user_id": "42", "name": _ANA, "email": "ana@example.org"}
        story.tell("browser", "fills in the form and presses Register")
        first = await browser.post("/users", data=fields, headers={"origin": address})
        mail = await inbox.next()
        text = f"To: {mail['to']}\nSubject: {mail['subject']}\n\n{mail.get_content()}".rstrip()
        story.show(Panel(text, title="the mail that arrived", expand=False))
        story.tell("browser", "presses Register again")
        second = await browser.post("/users", data=fields, headers={"origin": address})
    return first.status_code == 200 and second.status_code == 409


async def _changes(story: Story, bus: Bus) -> Receipt:
    """The CRM wishes by the same way as the web form, and reads from a view of its own."""
    story.headline("The CRM changes the address, through the same commander")
    story.tell("joe", "asks the commander: ChangeEmail(42)", "a call at the CRM")
    changed = await bus.call(users.ChangeEmail("42", "ana@example.net"), by="crm:joe")
    _recorded(story, "users", "EmailChanged", changed, "ChangeEmail by crm:joe")
    found = await bus.ask(crm.WhoHas("example.net"), after=changed)
    story.tell("crm", f"its view says who has example.net: {', '.join(found)}", "asked after that receipt")
    return changed


async def _issues(story: Story, bus: Bus, inbox: Inbox, changed: Receipt) -> bool:
    """The cards ask nobody: they keep a copy of what they need."""
    story.headline("A card is issued from a copy")
    for holder in await bus.ask(cards.Holders(), after=changed):
        story.tell("cards", f"its copy of users/{holder.user_id}: {holder.name}, {holder.email}", "the record changed")
    await _issue(story, bus, "A-1")
    mail = await inbox.next()
    return str(mail["to"]) == "ana@example.net"


async def _issue(story: Story, bus: Bus, card_id: str) -> None:
    story.tell("desk", f"asks the commander: IssueCard({card_id}, user 42)")
    issued = await bus.call(cards.IssueCard(card_id, "42"), by="desk")
    _recorded(story, "cards", "CardIssued", issued, "its own copy of users/42")


async def _kills(story: Story, bus: Bus, inbox: Inbox) -> None:
    """One service is killed, and the others go on: who has a copy works, who must ask waits."""
    story.headline("The users service is killed, and a card is issued all the same")
    killed = await until_runs(bus, "users")
    os.kill(killed, signal.SIGKILL)
    story.tell("demo", f"kill -9 {killed}", "to see who needs users")
    while any(instance.pid == killed for instance in await bus.wire.instances()):
        await bus.clock.sleep(0.01)
    story.tell("demo", "users does not run", "nobody announces it")
    await _issue(story, bus, "A-2")
    again = await until_runs(bus, "users", but=killed)
    story.tell("users", f"runs again, in process {again}", f"it took over what process {killed} held")
    await inbox.next()


async def _compares(story: Story, bus: Bus, changed: Receipt) -> bool:
    """Each row of the copy beside what its owner says."""
    story.headline("The copy beside its owner")
    copies = await bus.ask(cards.Holders(), after=changed)
    same = len(copies) == 1
    for copy in copies:
        user = await bus.fetch(users.User, copy.user_id)
        equal = (copy.user_id, copy.name, copy.email) == (user.user_id, user.name, user.email)
        story.tell("cards", f"users/{copy.user_id}: {copy.name}, {copy.email}", "its own copy")
        story.tell("users", f"users/{user.user_id}: {user.name}, {user.email}", "folded from the facts")
        story.tell("demo", "equal" if equal else "NOT equal")
        same = same and equal
    return same


def _counts(story: Story, inbox: Inbox, each: bool) -> bool:
    """Whether each mail went out once."""
    story.headline("What went out, and what the log keeps")
    cards = ["A-1", "A-2"] if each else ["A-1"]
    wanted = [("ana@example.org", f"Welcome, {_ANA}"), *(("ana@example.net", f"Your card {card}") for card in cards)]
    well = inbox.taken == wanted
    story.tell("smtp", f"{len(inbox.taken)} mails, each once" if well else f"NOT well: {inbox.taken}")
    return well


async def _tell_log(story: Story, place: Ground, clock: Clock) -> None:
    """The same story once more, as it is kept."""
    async with look(place.url, clock) as bus:
        for name, log in (("facts", bus.facts), ("commands", bus.commands), ("records", bus.records)):
            async for entry in entries_of(log):
                meta = entry.checked().meta
                if entry.stream.startswith("_"):
                    continue
                wished = f"{entry.wished.type} by {meta.by}" if entry.wished is not None else meta.verdict
                story.tell(
                    "log",
                    f"{name} {entry.position}: {entry.type} {entry.stream} version {entry.version}",
                    wished or f"fact …{entry.id[-12:]}",
                )


async def _verified(story: Story, place: Ground, clock: Clock) -> bool:
    report = await read_all(place.url, clock)
    story.tell("log", "verified: every entry is what was written" if report.ok else f"NOT well: {report}")
    return report.ok


def _recorded(story: Story, who: str, what: str, receipt: Receipt, because: str) -> None:
    story.tell(who, f"recorded {what}, {receipt.domain}/{receipt.key} version {receipt.version}", because)
