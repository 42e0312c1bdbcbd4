"""Which message types a program knows by name, and how each is written to bytes and read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from cauce.accept import ENTRY_BYTES, check_body, check_key, check_value
from cauce.errors import Refused, Unreadable
from cauce.messages import Declared, Message, declared
from cauce.upcaster import check_chain, lifted, upcasts

__all__ = ["Schema", "encode", "is_about", "key_of"]


class _Type:
    """What is worked out once for each message class."""

    __slots__ = ("cls", "declared", "decode", "key", "loose", "version")

    def __init__(self, cls: type[Message]) -> None:
        self.cls = cls
        self.declared: Declared = declared(cls)
        self.version = self.declared.version
        self.key = self.declared.domain.key
        try:
            self.decode = msgspec.json.Decoder(cls).decode
            info = msgspec.inspect.type_info(cls)
        except (TypeError, NameError) as error:
            raise Refused(f"{cls.__name__}: a field has a type that cannot travel as JSON: {error}") from None
        self.loose = _is_loose(info, frozenset())


_TYPES: dict[type[Message], _Type] = {}
_encode = msgspec.json.Encoder().encode
_TIGHT = (
    msgspec.inspect.NoneType, msgspec.inspect.BoolType, msgspec.inspect.IntType, msgspec.inspect.StrType,
    msgspec.inspect.BytesType, msgspec.inspect.DateTimeType, msgspec.inspect.DateType, msgspec.inspect.TimeType,
    msgspec.inspect.TimeDeltaType, msgspec.inspect.UUIDType, msgspec.inspect.EnumType, msgspec.inspect.LiteralType,
)  # fmt: skip


def _is_loose(info: Any, above: frozenset[type]) -> bool:
    """Whether values of this type may hold NaN or nest without end, so that each one must be looked at."""
    if isinstance(info, _TIGHT):
        return False
    if isinstance(info, msgspec.inspect.StructType):
        return info.cls in above or any(_is_loose(each.type, above | {info.cls}) for each in info.fields)
    if isinstance(info, msgspec.inspect.UnionType):
        return any(_is_loose(each, above) for each in info.types)
    if isinstance(info, (msgspec.inspect.ListType, msgspec.inspect.SetType, msgspec.inspect.VarTupleType)):
        return _is_loose(info.item_type, above)
    if isinstance(info, msgspec.inspect.DictType):
        return _is_loose(info.key_type, above) or _is_loose(info.value_type, above)
    return True


def _type(cls: type[Message]) -> _Type:
    found = _TYPES.get(cls)
    if found is None:
        found = _TYPES[cls] = _Type(cls)
    return found


def key_of(message: Message) -> str:
    """The key of the thing a message is about. Raises `Refused` where it is missing or no legal key."""
    cls = type(message)
    field = (_TYPES.get(cls) or _type(cls)).key
    if field is None:
        raise Refused(f"{type(message).__name__} is about no thing: its domain has no key")
    return check_key(getattr(message, field))


def is_about(message: Message, key: str) -> bool:
    """Whether a message is about the thing with this key, which was looked at before: cheaper than `key_of`."""
    field = declared(message).domain.key
    return field is not None and getattr(message, field) == key


def encode(message: Message) -> bytes:
    """The body of a message as JSON. Raises `Refused` by the one acceptance rule."""
    cls = type(message)
    kind = _TYPES.get(cls) or _type(cls)
    try:
        if kind.loose:
            check_value(msgspec.to_builtins(message), cls.__name__)
        body = _encode(message)
        # Constructors do not look at types, and what nobody could read again must never be a fact.
        kind.decode(body)
    except RecursionError:
        raise Refused(f"{cls.__name__} is nested too deeply: flatten it") from None
    except msgspec.ValidationError as error:
        raise Refused(f"{cls.__name__} holds a value that its type does not allow: {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise Refused(f"{cls.__name__} cannot be written as JSON: {error}") from None
    # What a tight type makes is as flat as the type; only NUL and size are left to look for.
    if kind.loose or len(body) > ENTRY_BYTES or (b"\\" in body and b"\\u0000" in body):
        return check_body(body, cls.__name__)
    return body


class Schema:
    """The types one program knows: what turns stored bytes into messages, and nothing else does.

    Raises `Refused` for a class whose chain of upcasters has a gap.
    """

    def __init__(self, classes: Iterable[type[Message]]) -> None:
        self._types: dict[tuple[str, str], _Type] = {}
        for cls in classes:
            check_chain(cls)
            kind = _type(cls)
            for name in kind.declared.names:
                self._types[kind.declared.domain.name, name] = kind

    def knows(self, domain: str, name: str) -> bool:
        """Whether this program has a class for the type."""
        return (domain, name) in self._types

    def today(self, domain: str, name: str) -> str:
        """What a type is called today; itself, where it was never renamed."""
        kind = self._types.get((domain, name))
        return name if kind is None else kind.declared.name

    def decode(self, domain: str, name: str, version: int, body: bytes) -> Message:
        """The message in a body, lifted to the version of today.

        Raises `Unreadable` for an unknown type, a newer schema, broken bytes, and what an upcaster cannot lift.
        """
        kind = self._types.get((domain, name))
        if kind is None:
            raise Unreadable(
                f"{domain} has a message of type {name!r}, which this program does not know: load the service that declares it"
            )
        if version != kind.version:
            return _decode_other(kind, name, version, body)
        try:
            message: Message = kind.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _misfit(kind, name, version, error) from None
        return message

    def quick(self) -> Iterator[tuple[type[Message], Callable[[bytes], Any]]]:
        """What reads bodies of the classes in their first version: as `decode`, but raises what msgspec does."""
        return ((kind.cls, kind.decode) for kind in self._types.values() if kind.declared.version == 1)


def _decode_other(kind: _Type, name: str, version: int, body: bytes) -> Message:
    """The message in a body that is not of the version of today."""
    domain = kind.declared.domain.name
    if version > kind.version:
        raise Unreadable(
            f"{name} of {domain} came in schema version {version}, this program knows {kind.version}: deploy the newer code here first"
        )
    try:
        steps = upcasts(kind.cls)
        if steps:
            plain = msgspec.json.decode(body)
            if not isinstance(plain, dict):
                raise Unreadable(f"{name} of {domain} (schema version {version}) is no JSON object")
            # Through JSON once more: the class then reads just what it would read if this had been stored.
            body = _encode(lifted(kind.cls, name, version, plain))
        message: Message = kind.decode(body)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _misfit(kind, name, version, error) from error
    return message


def _misfit(kind: _Type, name: str, version: int, error: Exception) -> Unreadable:
    by = [getattr(step, "__qualname__", repr(step)) for at, step in sorted(upcasts(kind.cls).items()) if at >= version]
    lifted_by = f", lifted by {', '.join(by)}," if by else ""
    return Unreadable(
        f"{name} of {kind.declared.domain.name} (schema version {version}){lifted_by} does not fit its class: {error}"
    )
