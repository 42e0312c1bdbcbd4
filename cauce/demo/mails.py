"""The mails: told only "users/42 registered", they ask the owner for the rest. Written as a team would write it."""

import asyncio
import smtplib
from email.message import EmailMessage

from cauce import Context, Notice, Service
from cauce.demo.story import Story
from cauce.demo.users import User, UserRegistered

__all__ = ["mails"]


def mails(smtp_port: int, story: Story) -> Service:
    """The service, delivering to a local SMTP port and telling the story of what it does."""
    service = Service("mails")

    @service.on
    async def welcome(notice: Notice[UserRegistered], ctx: Context) -> None:
        story.tell("mails", f"told only: {notice.type} users/{notice.key}", f"fact at position {ctx.position}")
        user = await ctx.fetch(User, notice.key)
        story.tell("mails", f"asked users for users/{notice.key}: {user.name}, {user.email}", "a notice has no body")
        await asyncio.to_thread(deliver, smtp_port, user, ctx.idempotency_key)

    return service


def deliver(port: int, user: User, id: str) -> None:
    """Send the welcome. The same id each time lets the other side see a repetition."""
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "shop@example.org", user.email, f"Welcome, {user.name}"
    mail["Message-ID"] = f"<{id}@shop.example.org>"
    mail.set_content(f"Dear {user.name},\n\nyour account {user.user_id} is ready.\n")
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as smtp:
        smtp.send_message(mail)
