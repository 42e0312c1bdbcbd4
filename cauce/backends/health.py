"""What a backend says of itself, against what the promises need."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import msgspec

__all__ = ["DURABLE", "NOTHING_LOST", "ONE_ORDER", "ONE_WRITER", "PRIVATE", "Finding", "Health", "warn"]

_log = logging.getLogger("cauce")
_PATIENCE = 3.0
"""Seconds that a start spends on this at most."""

# The promises, in the words that a finding says them.
DURABLE = "what is acknowledged survives a crash and a power loss"
ONE_ORDER = "all or nothing per append, and one order for all readers"
ONE_WRITER = "only the owner of a domain writes its facts"
NOTHING_LOST = "nothing is dropped in silence"
PRIVATE = "what is kept is only for the user whose services run here"


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not as a promise needs it.

    `what` is the setting, file or table, `found` how it is, `needed` how it has to be, `promise` what does not hold
    until then, and `cure` what to do.
    """

    what: str
    found: str
    needed: str
    promise: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what} is {self.found}, needed is {self.needed}. At stake: {self.promise}. Cure: {self.cure}"


class Health(msgspec.Struct, frozen=True):
    """What was looked at, and what was found wrong. `bus` is the address as anybody may see it."""

    bus: str
    backend: str
    seen: dict[str, str | int]
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings


class _Examined(Protocol):
    async def health(self) -> Health: ...


async def warn(backend: _Examined) -> None:
    """Log a warning for each finding. Never raises: whatever goes wrong here is no reason not to start."""
    try:
        async with asyncio.timeout(_PATIENCE):
            health = await backend.health()
    except Exception as error:
        _log.warning("how the backend is set up could not be seen (%s): run cauce doctor", str(error) or "no answer")
        return
    for finding in health.findings:
        _log.warning("%s", finding)
