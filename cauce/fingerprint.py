"""What code makes a record: a name for the classes and `evolve` functions of a domain that changes when they do.

It holds what a function does, and not where it stands: bytecode, constants, names, defaults, what it closes over, and
the functions and constants of its own module that it names. It is the same in every process of one version of Python;
another version folds anew. That a function of another module was changed is not seen: raise the record's version then.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType
from typing import Any

import msgspec

from cauce.messages import Message, declared
from cauce.upcaster import upcasts

__all__ = ["code_of", "fingerprint"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_METHODS = (FunctionType, staticmethod, classmethod, property, functools.cached_property)


def fingerprint(records: Iterable[type[Message]], evolve: Mapping[type[Message], Callable[..., Any]]) -> str:
    """16 hexadecimal digits that name these records and events, their methods and upcasters, and what evolves each."""
    told, seen = blake2b(sys.implementation.cache_tag.encode(), digest_size=8), set[int]()
    for cls in sorted({*records, *evolve}, key=lambda each: (declared(each).kind, declared(each).name)):
        for word in _of_message(cls, seen):
            told.update(word.encode("utf-8", "surrogatepass") + b"\0")
        for function in (*([evolve[cls]] if cls in evolve else []), *upcasts(cls).values()):
            for word in _of(function, function.__module__, seen):
                told.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return told.hexdigest()


def code_of(*values: Any) -> str:
    """16 hexadecimal digits that name what these functions and values do, as far as `fingerprint` sees it."""
    told, seen = blake2b(sys.implementation.cache_tag.encode(), digest_size=8), set[int]()
    for value in values:
        for word in _of(value, getattr(value, "__module__", ""), seen):
            told.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return told.hexdigest()


def _of_message(cls: type[Message], seen: set[int]) -> Iterator[str]:
    kind = declared(cls)
    yield f"{kind.kind} {kind.name} {kind.version}"
    shape = msgspec.json.schema(cls, schema_hook=lambda each: {"type": f"{each.__module__}.{each.__qualname__}"})
    yield msgspec.json.encode(shape, order="deterministic").decode()
    for name, member in sorted(vars(cls).items()):
        if isinstance(member, _METHODS):
            yield name
            yield from _of(member, cls.__module__, seen)


def _of(value: Any, home: str, seen: set[int]) -> Iterator[str]:
    """What is told of a value. Addresses and the order of sets are not: they differ from process to process."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, CodeType):
        yield from _of_code(value, home, seen)
    elif isinstance(value, FunctionType):
        yield from _of_function(value, home, seen)
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
    else:
        yield f"a {type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, (set, frozenset)):
            yield from sorted(" ".join(_of(each, home, seen)) for each in value)
        else:
            for each in _parts(value):
                yield from _of(each, home, seen)


def _parts(value: Any) -> tuple[Any, ...]:
    """What a value is made of; nothing, where that cannot be known."""
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if isinstance(value, dict):
        return tuple(value.items())
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, enum.Enum):
        return (value.name, value.value)
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.astuple(value)
    # A cache around a function, and the like.
    return (inspect.unwrap(value),) if callable(value) and hasattr(value, "__wrapped__") else ()


def _of_code(code: CodeType, home: str, seen: set[int]) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_exceptiontable.hex()} {code.co_flags}"
    yield f"{code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}"
    for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        yield " ".join(names)
    yield from _of(code.co_consts, home, seen)


def _of_function(function: FunctionType, home: str, seen: set[int]) -> Iterator[str]:
    yield function.__name__
    if id(function) in seen:
        return
    seen.add(id(function))
    yield from _of(_undocumented(function), home, seen)
    yield from _of((function.__defaults__, function.__kwdefaults__), home, seen)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty while its function is still being defined
            yield from _of(cell.cell_contents, home, seen)
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        if _is_at_home(value, home):
            yield name
            yield from _of(value, home, seen)


def _undocumented(function: FunctionType) -> CodeType:
    """Its code, without what it says of itself."""
    code = function.__code__
    if code.co_consts and function.__doc__ is not None and code.co_consts[0] == function.__doc__:
        return code.replace(co_consts=(None, *code.co_consts[1:]))
    return code


def _names(code: CodeType) -> set[str]:
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def _is_at_home(value: Any, home: str) -> bool:
    """Whether a global is a constant, or a function of the module: what is imported has a version of its own."""
    if isinstance(value, (*_PLAIN, tuple, frozenset, enum.Enum)):
        return value is not None
    return callable(value) and not isinstance(value, type) and getattr(value, "__module__", None) == home
