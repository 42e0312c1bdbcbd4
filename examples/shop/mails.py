"""The mails: event notification. Told only "users/42 registered"; asks the owner for the rest, through the bus."""

import os
import smtplib
from asyncio import to_thread
from email.message import EmailMessage

from cauce import Context, Notice, Service
from shop.users import User, UserRegistered

service = Service("mails")


@service.on
async def welcome(notice: Notice[UserRegistered], ctx: Context) -> None:
    user = await ctx.fetch(User, notice.key)
    await to_thread(send, user.email, f"Welcome, {user.name}", ctx.idempotency_key)


def send(to: str, subject: str, message_id: str) -> None:
    """Deliver over SMTP. The same message id each time lets the receiving side see a repetition."""
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "shop@example.org", to, subject
    mail["Message-ID"] = f"<{message_id}@shop.example.org>"
    mail.set_content("Your account is ready.\n")
    with smtplib.SMTP(
        os.environ.get("SMTP_HOST", "127.0.0.1"), int(os.environ.get("SMTP_PORT", "1025")), timeout=10
    ) as smtp:
        smtp.send_message(mail)
