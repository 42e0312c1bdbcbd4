"""A fact that takes a thing back to how it stood: what an undo records where facts have no inverse of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from cauce.errors import Refused
from cauce.messages import Event, Record, declared

__all__ = ["Restored", "restored"]

R = TypeVar("R", bound=Record)

if TYPE_CHECKING:

    class Restored(Event, Generic[R]):
        """A thing stands again as it stood: `Restored[User]`, an event of the record's domain.

        Recorded by `Bus.undo`, folded by itself; views and reactions take it like any other event.

        Attributes:
            key: which thing; it has it under the name that the domain gives it, too.
            record: what stood; None: nothing did.
            to: the version of the thing at which it stood so.
        """

        key: str
        record: R | None
        to: int

        def __init__(self, key: str, /, record: R | None, to: int) -> None: ...

else:

    class Restored(Event):
        """A thing stands again as it stood: `Restored[User]`, an event of the record's domain.

        Recorded by `Bus.undo`, folded by itself; views and reactions take it like any other event.

        Attributes:
            key: which thing; it has it under the name that the domain gives it, too.
            record: what stood; None: nothing did.
            to: the version of the thing at which it stood so.
        """

        @property
        def key(self):
            return getattr(self, declared(self).domain.key)

        def __class_getitem__(cls, record):
            if isinstance(record, TypeVar):
                return cls
            if not (isinstance(record, type) and issubclass(record, Record)):
                raise Refused(f"Restored[{record!r}]: name a record, as Restored[User]")
            return _made(record)


def _made(record: type[Record]) -> type[Event]:
    """The event class for a record, made once: named after it, in its version, and under its earlier names, too."""
    found: type[Event] | None = vars(record).get("__restored__")
    if found is None:
        kind = declared(record)
        make: Any = type(Restored)
        found = make(
            f"Restored{kind.name}",
            (Restored,),
            {
                "__module__": record.__module__,
                "__qualname__": f"Restored[{record.__qualname__}]",
                "__annotations__": {str(kind.domain.key): str, "record": record | None, "to": int},
                "__doc__": f"A thing stands again as it stood, with its {kind.name}.",
                "__record__": record,
            },
            domain=kind.domain,
            version=kind.version,
            was=tuple(f"Restored{name}" for name in kind.was),
        )
        # The name is taken, but it is none of the messages that the domain's owner declared, locks and reviews.
        kind.domain.renamed[found.__name__] = kind.domain.messages.pop(found.__name__)
        record.__restored__ = found  # type: ignore[attr-defined]
    return found


def restored(record: type[R], key: str, stood: R | None, to: int) -> Event:
    """The fact that a thing stands again as it stood at a version. Raises `Refused` where it has no place for a key."""
    domain = declared(record).domain
    if domain.key in ("record", "to"):
        raise Refused(
            f"the key of {domain.name} is named {domain.key}, as a field of Restored[{record.__name__}] is: give each event an inverse with @service.invert"
        )
    made = cast("Any", _made(record))
    return cast("Event", made(key, stood, to))
