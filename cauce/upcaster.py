"""Upcasters lift a body that was stored in an older version of its type to the version of today, step by step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from cauce.errors import Refused, Unreadable
from cauce.messages import Declared, Message, declared

__all__ = ["Upcast", "check_chain", "lifted", "upcast", "upcasts"]

Upcast = Callable[[dict[str, Any]], dict[str, Any]]
F = TypeVar("F", bound=Upcast)


def upcast(message: type[Message], *, from_version: int) -> Callable[[F], F]:
    """Lift a stored body of this version to the next: `function(body: dict) -> dict`, plain and pure.

    What is stored stays as it is; the function runs each time an old body is read. A class without upcasters reads old
    bodies as they are; as soon as one step has an upcaster, each one needs one.

    Parameters:
        message: the class as it is today. Versions that it had under an earlier name (`was=`) count on.
        from_version: the version that the function gets; what it returns is the one after it.

    Raises `Refused`, at import, for a version that the class never passed, one that has an upcaster already, and what
    is no plain function.
    """
    kind = declared(message)
    what = f"an upcaster of {kind.name}"
    carried: type[Message] | None = getattr(message, "__record__", None)
    if carried is not None:
        raise Refused(f"{what}: it is lifted by those of the record in it: write @upcast({carried.__name__}, …)")
    if type(from_version) is not int or not 1 <= from_version < kind.version:
        raise Refused(
            f"{what} from version {from_version!r}: {kind.name} of {kind.domain.name} is version {kind.version}, so say from_version=1 to {kind.version - 1}, or raise version= in the class"
        )

    def decorate(function: F) -> F:
        _check_plain(what, function)
        before = _steps(message).setdefault(from_version, function)
        if before is not function:
            raise Refused(
                f"{kind.name} has two upcasters from version {from_version}, {_named(before)} and {_named(function)}: keep one"
            )
        return function

    return decorate


def upcasts(message: type[Message]) -> Mapping[int, Upcast]:
    """The upcasters of a class, by the version that each takes."""
    return _steps(message)


def check_chain(message: type[Message]) -> None:
    """Raises `Refused`, naming what is missing, for a class some of whose steps have an upcaster and some have none."""
    steps, kind = _steps(message), declared(message)
    missing = [version for version in range(1, kind.version) if version not in steps] if steps else []
    if missing:
        raise Refused(
            f"{kind.name} of {kind.domain.name} is version {kind.version} and has upcasters from {_listed(steps)}, but none from {_listed(missing)}: "
            f"add @upcast({message.__name__}, from_version={missing[0]}); one for a field that was added puts its default into the body"
        )


def lifted(message: type[Message], name: str, version: int, body: dict[str, Any]) -> dict[str, Any]:
    """A body of an older version as one of today. Raises `Unreadable`, naming the function that is to be mended."""
    kind, steps = declared(message), _steps(message)
    for step in range(version, kind.version):
        function = steps.get(step)
        if function is None:
            raise Unreadable(
                f"{_told(kind, name, step)}, has no upcaster: add @upcast({message.__name__}, from_version={step})"
            )
        try:
            body = function(body)
        except Exception as error:
            raise Unreadable(f"{_told(kind, name, step)}, made {_named(function)} fail: {error!r}: mend it") from error
        if not isinstance(body, dict):
            raise Unreadable(f"{_told(kind, name, step)}: {_named(function)} returned {_why(body)}")
    return body


def _why(result: Any) -> str:
    if result is None:
        return "None: return the body"
    if isinstance(result, (list, tuple)):
        return f"{type(result).__name__}: one stored entry stays one message, because its position and version name one fact; return one body"
    return f"{type(result).__name__}: return the body, a dict"


def _told(kind: Declared, name: str, version: int) -> str:
    today = "" if name == kind.name else f" (now {kind.name})"
    return f"{name} of {kind.domain.name}{today}, version {version}"


def _check_plain(what: str, function: Any) -> None:
    if not callable(function) or inspect.isclass(function):
        raise Refused(f"{what} is {function!r}: write a function (body) -> body")
    if inspect.iscoroutinefunction(function):
        raise Refused(f"{what}, {_named(function)}, is async: write it with def, it may wait for nothing")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise Refused(
            f"{what}, {_named(function)}, yields: one stored entry stays one message, because its position and version name one fact; return one body"
        )


def _steps(message: type[Message]) -> dict[int, Upcast]:
    found: dict[int, Upcast] = cast("Any", message).__upcasts__
    # What carries a record is in its version, and lifts it by its upcasters.
    record: type[Message] | None = getattr(message, "__record__", None)
    return found if record is None else {version: _inside(step) for version, step in _steps(record).items()}


def _inside(step: Upcast) -> Upcast:
    @functools.wraps(step)
    def carried(body: dict[str, Any]) -> dict[str, Any]:
        record = body.get("record")
        return body if record is None else body | {"record": step(record)}

    return carried


def _named(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _listed(versions: Any) -> str:
    return ", ".join(str(version) for version in sorted(versions))
