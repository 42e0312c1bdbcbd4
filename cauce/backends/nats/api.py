"""Questions to JetStream's own API, and its errors in our words."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec

from cauce.backends.nats.call import Lost, Reply
from cauce.backends.nats.link import Link
from cauce.errors import NoAnswer, Refused, StorageFull, Unreachable

__all__ = [
    "CHANGED",
    "LATER",
    "NAME_IN_USE",
    "NOT_FOUND",
    "NO_MESSAGE",
    "ApiError",
    "Failure",
    "ask",
    "away",
    "refusal",
    "told",
]

T = TypeVar("T")

# Codes of errors (`err_code`) as the server's errors.json lists them.
NOT_FOUND = 10059
NO_MESSAGE = 10037
NAME_IN_USE = 10058
CONSUMER_NOT_FOUND = 10014
_PAUSE = 0.1
_DISABLED = {10039, 10076}
CHANGED = {10071, 10164}
"""What was expected to be the last is not, or not yet."""

LATER = {10008, 10009, 10118, 10176, 10210}
"""Nothing was written, and the same again may be, a moment later."""

_FULL = {10002, 10023, 10028, 10047, 10077, 10122}


class Failure(msgspec.Struct, frozen=True):
    """What went wrong, as JetStream says it."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class ApiError(Exception):
    """JetStream refused; what that means depends on what was asked."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.description)
        self.code = failure.err_code


class _Answer(msgspec.Struct, frozen=True):
    error: Failure | None = None


async def ask(link: Link, name: str, question: object, answer: type[T]) -> T:
    """The answer to a question that may be asked twice: it is, where none comes, or not now, as long as `patience`.

    Raises `ApiError` for what JetStream refuses, `Unreachable` when there is no answer.
    """
    payload = b"" if question is None else msgspec.json.encode(question)
    loop = asyncio.get_running_loop()
    until = loop.time() + link.patience
    while (left := until - loop.time()) > 0:
        try:
            await link.connected(left)
            reply = await link.request(f"$JS.API.{name}", payload, timeout=min(left, link.turn))
        except TimeoutError:
            link.doubt()
            continue
        except Lost:
            continue
        except NoAnswer:
            if until - loop.time() < _PAUSE:
                raise Unreachable(
                    f"{link} has no JetStream: start the server with -js, or enable it for the account of this user"
                ) from None
        else:
            try:
                return told(reply, answer)
            except ApiError as error:
                if error.code not in LATER or until - loop.time() < _PAUSE:
                    raise
        link.doubt()
        await link.clock.sleep(_PAUSE)
    raise away(link)


def told(reply: Reply, answer: type[T]) -> T:
    """The answer in a reply. Raises `ApiError` if it is none."""
    error = msgspec.json.decode(reply.data, type=_Answer).error
    if error is not None:
        raise ApiError(error)
    return msgspec.json.decode(reply.data, type=answer)


def away(link: Link) -> Unreachable:
    return Unreachable(f"{link} does not answer: it is away, or its servers have no majority; it is tried again")


def refusal(error: ApiError, link: Link, what: str) -> Exception:
    """Our word for an error that says nothing about the question itself."""
    if error.code in _DISABLED:
        return Refused(f"{link} has no JetStream for this account: enable it in the server's configuration")
    if error.code in _FULL:
        return StorageFull(f"{what}: {link} has no room for more ({error}): nothing was written; make room there")
    if error.code in LATER:
        return Unreachable(f"{what}: {link} says {error}; nothing was written; it is tried again")
    return Refused(f"{what}: {link} says {error} ({error.code})")
