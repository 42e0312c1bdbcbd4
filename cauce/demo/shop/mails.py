"""The mails: event notification. Told only "users/42 registered", they ask the owner for the rest."""

import logging
import os
import smtplib
from asyncio import to_thread
from email.message import EmailMessage

from cauce import Context, Notice, Service
from cauce.demo.shop.cards import Card, CardIssued
from cauce.demo.shop.users import User, UserRegistered

service = Service("mails")
log = logging.getLogger(__name__)


@service.on
async def welcome(notice: Notice[UserRegistered], ctx: Context) -> None:
    log.info("mails: told only: %s users/%s ← fact at position %d", notice.type, notice.key, ctx.position)
    user = await ask(ctx, notice.key, notice.type)
    text = f"Dear {user.name},\n\nyour account {user.user_id} is ready.\n"
    await to_thread(deliver, user.email, f"Welcome, {user.name}", text, ctx.idempotency_key)


@service.on
async def card_ready(notice: Notice[CardIssued], ctx: Context) -> None:
    log.info("mails: told only: %s cards/%s ← fact at position %d", notice.type, notice.key, ctx.position)
    card = await ctx.fetch(Card, notice.key)
    user = await ask(ctx, card.user_id, f"{notice.type} {card.card_id}")
    text = f"Dear {user.name},\n\nyour card {card.card_id} is on its way.\n"
    await to_thread(deliver, user.email, f"Your card {card.card_id}", text, ctx.idempotency_key)


async def ask(ctx: Context, user_id: str, told: str) -> User:
    user = await ctx.fetch(User, user_id)
    log.info("mails: asked users for users/%s: %s, %s ← %s says no more", user_id, user.name, user.email, told)
    return user


def deliver(to: str, subject: str, text: str, message_id: str) -> None:
    """Send it over SMTP. The same message id each time lets the other side see a repetition."""
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "shop@example.org", to, subject
    mail["Message-ID"] = f"<{message_id}@shop.example.org>"
    mail.set_content(text)
    with smtplib.SMTP("127.0.0.1", int(os.environ["SMTP_PORT"]), timeout=10) as smtp:
        smtp.send_message(mail)
