"""What a team declares: domains, and the events, commands, queries and records that belong to them.

Messages are frozen `msgspec` structs. Their type names and versions are data, never Python paths.
"""

from __future__ import annotations

import contextlib
import sys
import types
import typing
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, dataclass_transform

import msgspec

from cauce.accept import check_domain, check_name
from cauce.errors import Refused

__all__ = [
    "Command",
    "Copy",
    "Declared",
    "Domain",
    "Event",
    "Message",
    "Notice",
    "Query",
    "Record",
    "alternatives",
    "check_copy",
    "copied",
    "declared",
    "field",
    "replace",
]

field = msgspec.field
"""A field with a default made anew each time: `tags: list[str] = field(default_factory=list)`."""

Reply = TypeVar("Reply", covariant=True)
E = TypeVar("E", bound="Event")
M = TypeVar("M", bound="Message")


class Domain:
    """One kind of thing with one owner.

    Parameters:
        name: lower-case ASCII, at most 63 characters.
        key: the field that names a thing, in every event, command and record of the domain. Without it the domain
            has no facts and may only be asked.
    """

    def __init__(self, name: str, *, key: str | None = None) -> None:
        self.name = check_domain(name)
        self.key = key
        self.messages: dict[str, type[Message]] = {}
        self.renamed: dict[str, type[Message]] = {}

    def __repr__(self) -> str:
        return f"Domain({self.name!r}, key={self.key!r})"


class Declared(msgspec.Struct, frozen=True):
    """What a message class was declared as.

    `kind` is event, command, query or record, `was` are its earlier names, `irreversible`: no undo goes back over it.
    """

    kind: str
    domain: Domain
    name: str
    version: int
    was: tuple[str, ...] = ()
    irreversible: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Every name under which a log may hold it: what a filter asks for."""
        return frozenset((self.name, *self.was))


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class Message:
        """What events, commands, queries and records have in common."""

        def __init_subclass__(
            cls,
            *,
            domain: Domain | None = None,
            version: int = 1,
            name: str | None = None,
            was: tuple[str, ...] = (),
            irreversible: bool = False,
        ) -> None: ...

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class Copy:
        """Some fields of a record, as a service keeps them for itself: `class Holder(Copy, of=User)`."""

        def __init_subclass__(cls, *, of: type[Record]) -> None: ...

else:

    class _MessageType(msgspec.StructMeta):
        def __new__(
            mcls, cls_name, bases, namespace, *,
            domain=None, version=1, name=None, was=(), irreversible=False, **options,
        ):  # fmt: skip
            frame = sys._getframe(1)
            if frame.f_locals is not frame.f_globals and "__annotations__" in namespace:
                namespace["__annotations__"] = _resolved(namespace["__annotations__"], frame)
            cls = super().__new__(mcls, cls_name, bases, namespace, **options)
            cls.__declared__ = (
                None if domain is None else _declare(cls, domain, version, name or cls_name, was, irreversible)
            )
            cls.__upcasts__ = {}
            return cls

    class Message(msgspec.Struct, frozen=True, metaclass=_MessageType):
        """What events, commands, queries and records have in common."""

    class _CopyType(msgspec.StructMeta):
        def __new__(mcls, cls_name, bases, namespace, *, of=None, **options):
            frame = sys._getframe(1)
            if frame.f_locals is not frame.f_globals and "__annotations__" in namespace:
                namespace["__annotations__"] = _resolved(namespace["__annotations__"], frame)
            cls = super().__new__(mcls, cls_name, bases, namespace, **options)
            cls.__of__ = of
            if bases != (msgspec.Struct,) and not (isinstance(of, type) and issubclass(of, Record)):
                raise Refused(f"{cls_name} does not say of what it is a copy: class {cls_name}(Copy, of=SomeRecord)")
            return cls

    class Copy(msgspec.Struct, frozen=True, metaclass=_CopyType):
        """Some fields of a record, as a service keeps them for itself: `class Holder(Copy, of=User)`."""


class Event(Message):
    """A fact, in the past tense, recorded for ever. Only the owner of its domain may record it."""


class Record(Message):
    """How one thing of a domain stands now: the full copy that others may carry."""


class Command(Message):
    """A wish, in the imperative, addressed to the one owner that may fulfil or reject it."""


class Query(Message, Generic[Reply]):
    """A question, answered by the owner over the bus, then forgotten. `Query[list[str]]` tells the reply's type."""


class Notice(msgspec.Struct, Generic[E], frozen=True):
    """The thin form of an event: type, key, version; no body. Ask the owner for the rest."""

    type: str
    key: str
    version: int


_KINDS = {Event: "event", Record: "record", Command: "command", Query: "query"}


def _resolved(annotations: dict[str, Any], frame: FrameType) -> dict[str, Any]:
    """Annotations kept as text, while the names local to a function are still in sight; what is not stays text."""
    found = dict(annotations)
    for name, hint in annotations.items():
        if isinstance(hint, str):
            with contextlib.suppress(NameError, AttributeError, TypeError):
                # It is the text of this very program.
                found[name] = eval(hint, frame.f_globals, frame.f_locals)  # noqa: S307
    return found


def _declare(cls: Any, domain: Domain, version: int, name: str, was: Any, irreversible: bool) -> Declared:
    kind = next((word for base, word in _KINDS.items() if issubclass(cls, base)), None)
    if kind is None:
        raise Refused(f"{cls.__name__}: derive it from Event, Command, Query or Record")
    if type(version) is not int or version < 1:
        raise Refused(f"{cls.__name__}: version={version!r}; versions count 1, 2, 3 …")
    if kind != "query" and domain.key is None:
        raise Refused(f"{cls.__name__}: domain {domain.name!r} has no key, so it takes queries only; give it key=…")
    if kind != "query" and domain.key not in cls.__struct_fields__:
        raise Refused(f"{cls.__name__} lacks the field {domain.key!r}, the key of domain {domain.name!r}")
    if irreversible and kind != "event":
        raise Refused(f"{cls.__name__} is a {kind}: only an event is irreversible")
    if isinstance(was, str) or name in was:
        raise Refused(f"{cls.__name__}: was={was!r}; write its earlier names, was=('{cls.__name__}Before',)")
    before = domain.messages.get(name)
    if before is not None and not _again(before, cls):
        raise Refused(f"domain {domain.name!r} has two messages named {name!r}: {before!r} and {cls!r}; rename one")
    for old in (name, *was):
        check_name(old)
        other = domain.renamed.get(old) or domain.messages.get(old)
        if other is not None and not _again(other, cls):
            raise Refused(
                f"domain {domain.name!r}: {old!r} means {other!r}, so it cannot mean {cls!r} as well: rename one, or leave it out of was="
            )
    domain.messages[name] = cls
    domain.renamed = {old: each for old, each in domain.renamed.items() if not _again(each, cls)}
    domain.renamed |= dict.fromkeys(was, cls)
    return Declared(kind, domain, name, version, tuple(was), bool(irreversible))


def _again(before: Any, cls: Any) -> bool:
    """Whether a class takes the place of one: its module was read again."""
    return (before.__module__, before.__qualname__) == (cls.__module__, cls.__qualname__)


def declared(message: Message | type[Message]) -> Declared:
    """What a message, or its class, was declared as. Raises `Refused` for a class without a domain."""
    found: Declared | None = getattr(message, "__declared__", None)
    if found is None:
        cls = message if isinstance(message, type) else type(message)
        raise Refused(f"{cls.__name__} belongs to no domain: declare it with class {cls.__name__}(…, domain=…)")
    return found


def copied(copy: type[Copy]) -> type[Record]:
    """The record of which this is a copy. Raises `Refused` for what is none."""
    found: type[Record] | None = getattr(copy, "__of__", None)
    if found is None:
        raise Refused(
            f"{copy!r} is no copy: declare it with class {getattr(copy, '__name__', 'Holder')}(Copy, of=SomeRecord)"
        )
    return found


def check_copy(copy: type[Copy]) -> None:
    """Raises `Refused`, naming class and field, unless each field is one of the record's, and the key is among them."""
    record = copied(copy)
    kind = declared(record)
    try:
        whole = {each.name: each.type for each in msgspec.structs.fields(record)}  # type: ignore[arg-type]
        part = {each.name: each.type for each in msgspec.structs.fields(copy)}  # type: ignore[arg-type]
    except (NameError, TypeError) as error:
        raise Refused(f"{copy.__name__}: the type of a field cannot be resolved: {error}") from None
    for name, hint in part.items():
        if name not in whole:
            raise Refused(f"{copy.__name__}.{name}: {record.__name__} has no such field, only {', '.join(whole)}")
        if hint != whole[name]:
            raise Refused(
                f"{copy.__name__}.{name} is {_named(hint)}, in {record.__name__} it is {_named(whole[name])}: give it the same type"
            )
    if kind.domain.key not in part:
        raise Refused(
            f"{copy.__name__} lacks the field {kind.domain.key!r}, the key of domain {kind.domain.name!r}: add it"
        )


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: of a union each, else the one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)


if TYPE_CHECKING:

    def replace(message: M, /, **changes: Any) -> M:
        """A copy of the message with some fields changed."""

else:
    # No function of ours around it: it runs for each event of a replay.
    replace = msgspec.structs.replace
