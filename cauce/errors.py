"""The errors, one name for each thing a caller can do about it.

Every message names the thing and the cure. Whatever is refused is refused before anything is written.
"""

from __future__ import annotations

__all__ = [
    "BreakerOpen",
    "Busy",
    "CauceError",
    "Conflict",
    "Damaged",
    "Fenced",
    "Gone",
    "Held",
    "IdReused",
    "Inconsistent",
    "NoAnswer",
    "NotOwner",
    "NotPermitted",
    "OutcomeUnknown",
    "Overloaded",
    "Overran",
    "Refused",
    "Rejected",
    "StorageFull",
    "Unavailable",
    "Unreachable",
    "Unreadable",
]


class CauceError(Exception):
    """The root of all errors that Cauce raises on purpose."""


class Refused(CauceError, ValueError):
    """The input is wrong and nothing was written: mend it as the message says, then try again."""


class Rejected(CauceError):
    """The commander said no. Raised by `decide` functions, and by `call` to the one who asked."""

    @property
    def reason(self) -> str:
        """Why, in the commander's words."""
        return str(self)


class NotOwner(CauceError):
    """Another service owns this domain: ask it (`call`, `send`) instead of recording its facts."""


class NotPermitted(CauceError):
    """The backend's own permissions do not allow this, and nothing was written: grant what the message names."""


class Fenced(CauceError):
    """This writer's claim was taken over, so the log refused the write: stop, claim again, read again."""


class Conflict(CauceError):
    """The stream is not at the version that was expected: read it again and decide again."""

    def __init__(self, stream: str, expected: int, actual: int) -> None:
        super().__init__(f"{stream} is at version {actual}, not {expected}: read it again and decide again")
        self.stream, self.expected, self.actual = stream, expected, actual


class IdReused(CauceError):
    """An id that the stream already holds came again with another type, schema or body: use a fresh id."""


class Gone(CauceError, LookupError):
    """The thing does not stand: it was deleted, or never was."""


class Unreadable(CauceError):
    """A message this program cannot read: unknown type, newer schema or broken bytes. Deploy the code that knows it."""


class Damaged(CauceError):
    """Stored bytes are not what was written: stop, run `cauce verify`, restore from a backup."""


class Inconsistent(CauceError):
    """A fact cannot follow what stands: its `evolve` needs a record, and there is none. Mend `evolve`, or `decide`."""


class Overran(CauceError):
    """A handler took longer than its patience, and was given up: see its stack in the log; mend it, or give it more."""


class Unavailable(CauceError):
    """The root of what is nobody's fault but the moment's: wait and try again. Never counts as an attempt."""


class NoAnswer(Unavailable):
    """Nobody serves this now, and nothing was stored: start the service, or `send` instead of `call`."""


class BreakerOpen(NoAnswer):
    """This callee has failed so often that it is left alone for a while, and nothing ran: wait, or use a fallback."""


class OutcomeUnknown(Unavailable):
    """The deadline passed, or the owner went away, before the outcome was known: call again with the same `id`."""

    def __init__(self, id: str, what: str) -> None:
        super().__init__(f"{what}: the outcome is not known; call again with id={id!r} to learn it")
        self.id = id


class Busy(Unavailable):
    """Somebody else holds what is needed, and is named: wait, or stop that process."""


class Overloaded(Unavailable):
    """Too much is waiting already, so this was not accepted: slow down, then try again."""


class StorageFull(Unavailable):
    """The disk took no more, nothing was written: make room, then try again."""


class Unreachable(Unavailable):
    """The server of the bus cannot be reached, and nothing was written: it is tried again by itself."""


class Held(Busy):
    """The name has a holder: `claim` says who. Wait, or take over what is known to be dead."""

    def __init__(self, message: str, claim: object) -> None:
        super().__init__(message)
        self.claim = claim
