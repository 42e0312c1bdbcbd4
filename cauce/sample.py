"""Bodies made from a message class alone: the least, a full one, and one of edge values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from msgspec import inspect

from cauce.errors import CauceError
from cauce.messages import Message, declared
from cauce.schema import encode, key_of

__all__ = ["KEY", "samples"]

KEY = "sample-1"
"""The key of all of them: what one event makes, the next can be folded upon."""

How = Literal["least", "full", "edge"]
_DEEP = 5
_ODD = 'Ñandú ẞ 漢字 😀 "quoted" \\ two\nlines'


class _NoSample(Exception):
    """There is a type for which no value is known here."""


def samples(message: type[Message]) -> list[bytes]:
    """Bodies as the class itself writes them; none if the class takes none of what is made here.

    Of a field with `Meta(examples=[…])` the values are these.
    """
    found = dict[bytes, None]()
    for how in ("least", "full", "edge"):
        try:
            plain = _struct(inspect.type_info(message), how, 0)
            key = declared(message).domain.key
            if key in plain and isinstance(plain[key], str) and plain[key] in _TEXTS:
                plain[key] = KEY
            made = msgspec.json.Decoder(message).decode(msgspec.json.encode(plain))
            if key is not None and hasattr(made, key):
                key_of(made)
            found[encode(made)] = None
        except (_NoSample, CauceError, msgspec.MsgspecError, ArithmeticError, TypeError, ValueError):
            # A rule of the class that no type tells: what a person takes from a bus will keep it.
            continue
    return list(found)


def _struct(info: Any, how: How, depth: int) -> dict[str, Any]:
    made = {} if getattr(info, "tag_field", None) is None else {info.tag_field: info.tag}
    for each in info.fields:
        if each.required or how != "least":
            made[getattr(each, "encode_name", each.name)] = _value(each.type, how, depth + 1)
    return made


def _value(info: Any, how: How, depth: int) -> Any:
    if depth > _DEEP:
        how = "least"
    if depth > 2 * _DEEP:
        raise _NoSample
    if isinstance(info, inspect.Metadata):
        examples = (info.extra_json_schema or {}).get("examples")
        return examples[-1 if how == "edge" else 0] if examples else _value(info.type, how, depth)
    make = _MAKERS.get(type(info))
    if make is None:
        raise _NoSample
    return make(info, how, depth)


def _pick(least: Any, full: Any, edge: Any) -> Callable[[Any, How, int], Any]:
    values = {"least": least, "full": full, "edge": edge}
    return lambda info, how, depth: values[how]


def _number(info: Any, how: How, depth: int) -> Any:
    whole = isinstance(info, inspect.IntType)
    value: Any = {"least": 0, "full": 7, "edge": 2**53 - 1 if whole else -1234.5}[how]
    step = info.multiple_of or 1
    if info.ge is not None or info.gt is not None:
        value = max(value, info.ge if info.ge is not None else info.gt + step)
    if info.le is not None or info.lt is not None:
        value = min(value, info.le if info.le is not None else info.lt - step)
    return value if info.multiple_of is None else value // step * step


def _text(info: Any, how: How, depth: int) -> str:
    text = _TEXTS[("least", "full", "edge").index(how)]
    least, most = info.min_length or 0, info.max_length
    return (text * (least // len(text) + 1) if len(text) < least else text)[:most]


_TEXTS = ("a", "Ana Gil", _ODD)


def _moment(info: Any, how: How, depth: int) -> str:
    text = {"least": "1970-01-01T00:00:00", "full": "2017-01-02T03:04:05", "edge": "2024-02-29T23:59:59.999999"}[how]
    return text if info.tz is False else text + "Z"


def _time(info: Any, how: How, depth: int) -> str:
    return {"least": "00:00:00", "full": "12:34:56", "edge": "23:59:59.999999"}[how] + ("Z" if info.tz else "")


def _list(info: Any, how: How, depth: int) -> list[Any]:
    number = max(info.min_length or 0, 0 if how == "least" else 1)
    if info.max_length is not None:
        number = min(number, info.max_length)
    return [_value(info.item_type, how, depth + 1)] * number


def _mapping(info: Any, how: How, depth: int) -> dict[Any, Any]:
    if how == "least" and not info.min_length:
        return {}
    key = _value(info.key_type, how, depth + 1)
    return {key: _value(info.value_type, how, depth + 1)}


def _union(info: Any, how: How, depth: int) -> Any:
    kinds = [each for each in info.types if not isinstance(each, inspect.NoneType)]
    if how == "least" and len(kinds) < len(info.types):
        return None
    return _value(kinds[-1 if how == "edge" else 0], how, depth)


def _object(info: Any, how: How, depth: int) -> Any:
    made = _struct(info, how, depth)
    return list(made.values()) if getattr(info, "array_like", False) else made


_MAKERS: dict[type, Callable[[Any, How, int], Any]] = {
    inspect.AnyType: _pick(None, {"any": [1, "a"]}, ["", 0.5]),
    inspect.NoneType: _pick(None, None, None),
    inspect.BoolType: _pick(False, True, True),
    inspect.IntType: _number,
    inspect.FloatType: _number,
    inspect.DecimalType: _pick("0", "12.34", "-0.001"),
    inspect.StrType: _text,
    inspect.BytesType: _pick("", "QW5h", "AP8="),
    inspect.DateTimeType: _moment,
    inspect.DateType: _pick("1970-01-01", "2017-01-02", "2024-02-29"),
    inspect.TimeType: _time,
    inspect.TimeDeltaType: _pick("PT0S", "PT90S", "-P1D"),
    inspect.UUIDType: _pick(*(f"0190a8c0-0000-7000-8000-00000000000{n}" for n in (0, 1, 2))),
    inspect.EnumType: lambda info, how, depth: list(info.cls)[-1 if how == "edge" else 0].value,
    inspect.LiteralType: lambda info, how, depth: info.values[-1 if how == "edge" else 0],
    inspect.ListType: _list,
    inspect.SetType: _list,
    inspect.FrozenSetType: _list,
    inspect.VarTupleType: _list,
    inspect.TupleType: lambda info, how, depth: [_value(each, how, depth + 1) for each in info.item_types],
    inspect.DictType: _mapping,
    inspect.UnionType: _union,
    inspect.StructType: _object,
    inspect.DataclassType: _object,
    inspect.TypedDictType: _object,
    inspect.NamedTupleType: lambda info, how, depth: list(_struct(info, how, depth).values()),
}
