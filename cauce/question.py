"""A question as it came over the wire, and as it is meant: who writes one by hand leaves out what only we need."""

from __future__ import annotations

import msgspec

from cauce.accept import check_key
from cauce.bus import Ask, check_line
from cauce.clock import Clock
from cauce.errors import Refused
from cauce.messages import Domain, declared
from cauce.schema import Schema, encode, key_of

__all__ = ["completed", "read"]

_HOW = {"command": "call", "query": "ask", "record": "fetch"}
"""By the kind of a message what it asks for."""

_LINES = ("by", "correlation", "causation", "trace", "tracestate")
_decode = msgspec.json.Decoder(Ask).decode


def read(payload: bytes) -> Ask:
    """The question in a payload. Raises `Refused` for what is none."""
    try:
        return _decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f'this is no question ({error}): write {{"type": "…", "body": {{…}}}}') from None


def completed(ask: Ask, domain: Domain, schema: Schema, clock: Clock) -> Ask:
    """A question that does not say its kind, as our own askers put it.

    Its kind is that of its type, its key that in its body, and it is looked at as it would have been before it was
    sent. One that names its own id may come again.

    Raises `Refused` and `Unreadable`.
    """
    how = _HOW.get(declared(found).kind) if (found := domain.messages.get(ask.type)) is not None else None
    if how is None:
        known = sorted(name for name, cls in domain.messages.items() if declared(cls).kind in _HOW)
        raise Refused(f"{domain.name} is not asked {ask.type!r}: name one of {', '.join(known) or 'none'} as type")
    lines = {name: check_line(getattr(ask, name), name) for name in _LINES}
    id = check_line(ask.id, "id") if ask.id else clock.id()
    if how == "fetch":
        return msgspec.structs.replace(ask, kind=how, id=id, key=check_key(ask.key), **lines)
    message = schema.decode(domain.name, ask.type, ask.schema, bytes(ask.body))
    return msgspec.structs.replace(
        ask,
        kind=how,
        id=id,
        key=key_of(message) if how == "call" else "",
        schema=declared(message).version,
        body=msgspec.Raw(encode(message)),
        again=how == "call" and bool(ask.id),
        **lines,
    )
