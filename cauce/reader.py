"""Who reads which field of a message: by the types of the parameters, and by what the functions do with them."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from cauce.messages import Copy, Message, copied
from cauce.service import Bound, Service

__all__ = ["Reader", "readers"]


class Reader(msgspec.Struct, frozen=True):
    """A function, or a replica, that takes a message: which fields of it are read.

    `whole`: it hands the message on, to where nobody looks here. `others`: what else the same parameter may be.
    """

    name: str
    message: type[Message]
    fields: frozenset[str]
    whole: bool = False
    others: tuple[type[Message], ...] = ()


def readers(services: Iterable[tuple[Service, list[Bound]]]) -> list[Reader]:
    """All that the functions and replicas of these services read."""
    return [each for service, bounds in services for bound in bounds for each in _of(service, bound)]


def _of(service: Service, bound: Bound) -> Iterator[Reader]:
    part = bound.part
    if part.kind == "replica":
        copy = typing.cast("type[Copy]", part.function)
        fields = frozenset(each.name for each in msgspec.structs.fields(copy))  # type: ignore[arg-type]
        yield Reader(f"replica {service.name}.{part.name}", copied(copy), fields)
        return
    if bound.notice or part.kind == "every":
        return
    where = f"{part.kind} {service.name}.{part.name}"
    if part.kind == "view":
        where = f"view {service.name}.{part.view} ({part.name})"
    told = [name for name in inspect.signature(part.function).parameters if name != bound.context]
    taken = {
        "decide": (bound.stands, bound.messages),
        "evolve": (bound.stands, bound.messages),
        "invert": (bound.stands, bound.messages),
        "unique": (bound.stands,),
    }.get(part.kind, (bound.messages,))
    # A view has its database behind the event.
    for name, messages in zip(told, taken, strict=False):
        yield from _taken(where, part.function, name, messages)


def _taken(
    where: str, function: Callable[..., Any], name: str, messages: tuple[type[Message], ...]
) -> Iterator[Reader]:
    fields, whole = _used(function, name)
    for message in messages:
        others = tuple(each for each in messages if each is not message)
        yield Reader(where, message, frozenset(fields), whole, others)


def _used(function: Callable[..., Any], parameter: str) -> tuple[set[str], bool]:
    """The attributes of a parameter that a function reads, and whether it hands the parameter on."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        # No source where it runs: all names in its bytecode, which are more.
        return set(_names(function.__code__)), False
    found, apart = set[str](), set[int]()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name) as base, attr=field) if name == parameter:
                found.add(field)
                apart.add(id(base))
            case ast.Call(
                func=ast.Name(id="getattr"), args=[ast.Name(id=name) as base, ast.Constant(value=str(field)), *_]
            ) if name == parameter:
                found.add(field)
                apart.add(id(base))
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name() as base, *_]):
                apart.add(id(base))
            case ast.Match(subject=ast.Name(id=name) as base) if name == parameter:
                patterns = [each for case in node.cases for each in ast.walk(case.pattern)]
                classes = [each for each in patterns if isinstance(each, ast.MatchClass)]
                found.update(name for each in classes for name in each.kwd_attrs)
                # By place it may take any field.
                apart |= set() if any(each.patterns for each in classes) else {id(base)}
            case ast.Compare(left=ast.Name() as base, ops=[ast.Is() | ast.IsNot()]):
                apart.add(id(base))
            case ast.If(test=ast.Name() as base) | ast.IfExp(test=ast.Name() as base):
                apart.add(id(base))
    handed = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == parameter)
    return found, any(id(node) not in apart for node in handed)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _names(each)
        elif isinstance(each, str):
            yield each
        elif isinstance(each, tuple):
            yield from (name for name in each if isinstance(name, str))
