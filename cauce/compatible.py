"""What a message class looks like as JSON Schema, and what changed between two of them for who reads old bodies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from cauce.errors import Refused
from cauce.messages import Message

__all__ = ["Change", "changes", "described", "fields_of"]

Node = Mapping[str, Any]
What = Literal["removed", "added", "required", "type", "default"]

_REFS = "#/$defs/"
# Words for people, and what only helps code generators: who changes them changes no body.
_IDLE = {"title", "description", "examples", "discriminator"}
_NAMED = {"properties", "patternProperties"}
_LISTED = {"anyOf", "prefixItems", "allOf", "oneOf"}
_LEAST = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_MOST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}


class Change(msgspec.Struct, frozen=True):
    """What differs in one field, by its path (`address.city`). `breaks`: old bodies cannot be read as they are."""

    field: str
    what: What
    text: str
    breaks: bool


def described(message: type[Message]) -> dict[str, Any]:
    """The JSON Schema of a class, the same for the same fields, however its classes and comments are called.

    Raises `Refused` for a field whose type has no JSON Schema.
    """
    try:
        whole = msgspec.json.schema(message)
    except (TypeError, NameError) as error:
        raise Refused(f"{message.__name__} has a field that JSON Schema has no word for: {error}") from None
    defined = whole.get("$defs", {})
    kept: dict[str, Any] = {}
    found: dict[str, Any] = _plain(whole, defined, (), kept)
    _mark(found, msgspec.inspect.type_info(message))
    return found | ({"$defs": kept} if kept else {})


def fields_of(schema: Node) -> dict[str, Any]:
    """The fields of a described class, by name."""
    return dict(schema.get("properties", {}))


def changes(old: Node, new: Node) -> list[Change]:
    """What changed from one description to another, in the order of the fields' names."""
    return list(_changes(old, new, ""))


def _plain(node: Any, defined: Node, above: tuple[str, ...], kept: dict[str, Any]) -> Any:
    """A node without idle words, with what it refers to put in its place; `kept`: what refers to itself."""
    if not isinstance(node, dict):
        return node
    name = str(node.get("$ref", "")).removeprefix(_REFS)
    if name:
        if name in above:
            kept.setdefault(name, {})
            return {"$ref": _REFS + name}
        inner = _plain(defined[name], defined, (*above, name), kept)
        if name in kept:
            kept[name] = inner
        rest = {key: value for key, value in node.items() if key not in _IDLE | {"$ref", "$defs"}}
        return inner | rest
    return {key: _part(key, value, defined, above, kept) for key, value in node.items() if key not in _IDLE}


def _part(key: str, value: Any, defined: Node, above: tuple[str, ...], kept: dict[str, Any]) -> Any:
    if key in _NAMED:
        return {name: _plain(each, defined, above, kept) for name, each in value.items()}
    if key in _LISTED:
        return [_plain(each, defined, above, kept) for each in value]
    if key == "required":
        return sorted(value)
    return _plain(value, defined, above, kept) if key in {"items", "additionalProperties"} else value


def _mark(node: Any, info: Any) -> None:
    """Say of text that is a moment or a time that it is: msgspec does so only where a zone is asked for."""
    if not isinstance(node, dict):
        return
    if isinstance(info, (msgspec.inspect.DateTimeType, msgspec.inspect.TimeType)):
        if node.get("type") == "string":
            node.setdefault("format", "date-time" if isinstance(info, msgspec.inspect.DateTimeType) else "time")
    elif isinstance(info, msgspec.inspect.Metadata):
        _mark(node, info.type)
    elif isinstance(info, msgspec.inspect.UnionType):
        for part, each in zip(node.get("anyOf", ()), info.types, strict=False):
            _mark(part, each)
    elif "properties" in node:
        for each in info.fields:
            _mark(node["properties"].get(getattr(each, "encode_name", each.name)), each.type)
    elif hasattr(info, "item_type"):
        _mark(node.get("items"), info.item_type)
    elif hasattr(info, "value_type"):
        _mark(node.get("additionalProperties"), info.value_type)


def _changes(old: Node, new: Node, path: str) -> Iterator[Change]:
    if "properties" in old and "properties" in new:
        yield from _fields(old, new, f"{path}." if path else "")
    elif "items" in old and "items" in new and isinstance(old["items"], dict) and isinstance(new["items"], dict):
        yield from _changes(old["items"], new["items"], f"{path}[]")
        if _bare(old, "items") != _bare(new, "items"):
            yield _retyped(path, old, new)
    elif _bare(old) != _bare(new):
        yield _retyped(path, old, new)


def _fields(old: Node, new: Node, prefix: str) -> Iterator[Change]:
    before, after = fields_of(old), fields_of(new)
    needed, needs = set(old.get("required", ())), set(new.get("required", ()))
    for name in sorted(before.keys() | after.keys()):
        path = prefix + name
        if name not in after:
            yield Change(path, "removed", "was removed", True)
        elif name not in before:
            required = name in needs
            text = "is new, and required" if required else "is new, with a default"
            yield Change(path, "required" if required else "added", text, required)
        else:
            yield from _changes(before[name], after[name], path)
            if name in needs - needed:
                yield Change(path, "required", "is required, and was not", True)
            elif name in needed - needs:
                yield Change(path, "default", "has a default, and had none", False)
            elif before[name].get("default") != after[name].get("default"):
                yield Change(path, "default", "has another default", False)


def _retyped(path: str, old: Node, new: Node) -> Change:
    return Change(path, "type", f"was {_words(old)}, and is {_words(new)}", not _takes(new, old))


def _bare(node: Node, *but: str) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "default" and key not in but}


def _takes(new: Node, old: Node) -> bool:
    """Whether every value that the old type allowed is one of the new type."""
    return all(any(_takes_one(each, other) for each in _alternatives(new)) for other in _alternatives(old))


def _alternatives(node: Node) -> list[dict[str, Any]]:
    if "anyOf" in node:
        return [each for one in node["anyOf"] for each in _alternatives(one)]
    if isinstance(node.get("type"), list):
        return [_bare(node) | {"type": each} for each in node["type"]]
    return [_bare(node)]


def _takes_one(new: dict[str, Any], old: dict[str, Any]) -> bool:
    if not new or new == old:
        return True
    if "enum" in old and ("enum" in new or set(new) == {"type"}):
        return set(map(repr, old["enum"])) <= set(map(repr, new["enum"])) if "enum" in new else _all_are(old, new)
    wider = (old.get("type"), new.get("type")) == ("integer", "number")
    if old.get("type") != new.get("type") and not wider:
        return False
    if "properties" in new:
        return "properties" in old and not any(change.breaks for change in _changes(old, new, ""))
    return all(_allows(key, limit, old.get(key)) for key, limit in new.items() if key != "type")


def _all_are(old: dict[str, Any], new: dict[str, Any]) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {"string": str, "integer": int, "number": (int, float)}
    return all(isinstance(each, kinds.get(new["type"], ())) for each in old["enum"])


def _allows(key: str, limit: Any, before: Any) -> bool:
    if before is None or limit == before:
        return before is not None
    if key in _LEAST:
        return bool(limit <= before)
    if key in _MOST:
        return bool(limit >= before)
    return isinstance(limit, dict) and isinstance(before, dict) and _takes(limit, before)


def _words(node: Node) -> str:
    """A type in few words."""
    kinds = []
    for each in _alternatives(node):
        if "enum" in each:
            kinds.append("one of " + ", ".join(map(repr, each["enum"])))
        elif "items" in each and isinstance(each["items"], dict):
            kinds.append(f"array of {_words(each['items'])}")
        else:
            more = {key: value for key, value in each.items() if key not in {"type", *_NAMED, "required"}}
            kinds.append(str(each.get("type", "anything")) + (f" {msgspec.json.encode(more).decode()}" if more else ""))
    return " or ".join(kinds)
