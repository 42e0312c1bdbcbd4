"""What a team writes against: a service is a table of functions, and binding it finds out what each of them takes."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar

import msgspec

from cauce.accept import check_domain
from cauce.audit import SHORTEST
from cauce.bus import Context, check_line, reply_type
from cauce.errors import Refused
from cauce.messages import (
    Command,
    Copy,
    Declared,
    Domain,
    Event,
    Message,
    Notice,
    Query,
    Record,
    alternatives,
    check_copy,
    copied,
    declared,
)
from cauce.retry import USUAL, Retries, check_retries
from cauce.schedule import Missed, Schedule, schedule_of
from cauce.sql import Store, Tables

__all__ = ["Bound", "Part", "Service", "bind", "bound_parts"]

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=Copy)
Kind = Literal["decide", "evolve", "invert", "unique", "on", "answer", "every", "view", "replica"]
Start = Literal["first", "now"]

AUDIT = 30 * 86_400.0

_RULE_BYTES = 63
_MOST_AT_ONCE = 10_000


AT_ONCE = 2_000
"""Questions that one answer function has in hand at a time: twice what 1,000 callers ask at once."""


PATIENCE = 60.0
"""Seconds that a handler gets when nothing else is said."""


class Part(msgspec.Struct, frozen=True):
    """One function of a service, as the decorator found it; of a replica, its class. `view`: for which it works;
    `most`: how many may bear what it finds; `at_once`: how many questions it has in hand at a time; `concurrency`: how
    many messages it handles at once, 0: as many as slots; `patience`: seconds that a call of it gets, None: as its
    service says."""

    kind: Kind
    function: Callable[..., Any]
    names: dict[str, Any]
    start: Start = "first"
    retry: Retries = USUAL
    schedule: Schedule | None = None
    missed: Missed = "once"
    view: str = ""
    most: int | Callable[[Any], int] = 1
    concurrency: int = 0
    at_once: int = AT_ONCE
    patience: float | None = None

    @property
    def name(self) -> str:
        return self.function.__name__


class Service:
    """A table of functions and the domains they own. It holds no connection and starts nothing.

    Parameters:
        name: names it on the bus; its places and claims hang on it.
        owns: the domain, or the domains, whose commands it decides and whose facts only it records.
        schema: SQL that makes the tables of `ctx.store`; several parts are run once each, in order, so that later
            versions of the service add parts behind. A part that reads differently in the databases that the service
            is run on is given for each: `{"sqlite": "…", "postgresql": "…"}`.
        audit: seconds for which commands of its domains are kept once they are decided, with those that were rejected
            or changed nothing; at least an hour, 30 days if not said, None: for ever. Facts are kept for ever.
        patience: seconds that a call of one of its handlers gets, where that says nothing else; 0: without end. What
            takes longer is given up: an async function is cancelled, a plain one is left to its thread; the log has its
            stack, and it counts as failed.
        version: of the service's code, as the registry is to show it, such as "1.4.2"; nothing hangs on it.
    """

    def __init__(
        self,
        name: str,
        *,
        owns: Domain | Iterable[Domain] = (),
        schema: Tables | Iterable[Tables] = (),
        audit: float | None = AUDIT,
        patience: float = PATIENCE,
        version: str = "",
    ) -> None:
        if audit is not None and not SHORTEST <= audit < 1e11:
            raise Refused(f"{name}: audit={audit}: say a number of seconds, {SHORTEST:g} or more, or None for ever")
        # A service's name goes where a domain's goes: into files, subjects and addresses.
        self.name = Domain(name).name
        self.owns = (owns,) if isinstance(owns, Domain) else tuple(owns)
        self.schema: tuple[Tables, ...] = (schema,) if isinstance(schema, (str, Mapping)) else tuple(schema)
        self.audit = audit
        self.patience = _patient(name, patience)
        self.version = check_line(version, "version")
        self.parts: list[Part] = []
        self.views: dict[str, Tables | None] = {}

    def __repr__(self) -> str:
        return f"Service({self.name!r}, owns={[domain.name for domain in self.owns]}, parts={[part.name for part in self.parts]})"

    def decide(self, function: F) -> F:
        """The commander: (what stands, what is wished) -> facts: one, several, or None. Pure.

        It says no by raising `Rejected`.
        """
        return self._add("decide", function)

    def evolve(self, function: F) -> F:
        """(what stands, what happened) -> what stands; None: it is gone. Pure, and all that a replay runs."""
        return self._add("evolve", function)

    def invert(self, function: F) -> F:
        """(what stood before, what happened) -> the facts that undo it: one, several, or None. Pure; see `Bus.undo`."""
        return self._add("invert", function)

    @typing.overload
    def unique(self, function: F) -> F: ...
    @typing.overload
    def unique(self, function: None = None, *, most: int | Callable[[Any], int] = 1) -> Callable[[F], F]: ...
    def unique(self, function: F | None = None, *, most: int | Callable[[Any], int] = 1) -> Any:
        """A rule over all things of an own domain: at most so many bear each tag that it finds in their record.

        `function(record)` is pure and gives a tag (text), several, or None. Who would be one too many is `Rejected`, in
        whatever process that is decided; what a thing no longer bears, or bore when it was deleted, is free with that.

        Parameters:
            most: how many, 1 if not said, or a pure function of the record that wants the tag.
        """
        if not callable(most) and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise Refused(f"{self.name}: most={most!r}: say a number of things, 1 or more, or a function of the record")
        if function is None:
            return lambda each: self._add("unique", each, most=most)
        return self._add("unique", function, most=most)

    @typing.overload
    def answer(self, function: F) -> F: ...
    @typing.overload
    def answer(
        self, function: None = None, *, at_once: int = AT_ONCE, patience: float | None = None
    ) -> Callable[[F], F]: ...
    def answer(self, function: F | None = None, *, at_once: int = AT_ONCE, patience: float | None = None) -> Any:
        """Answers a query of an own domain.

        Parameters:
            at_once: questions that it has in hand at a time in one instance; who asks beyond is told `Overloaded`.
            patience: seconds that a call of it gets; None: as the service says, 0: without end.
        """
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise Refused(f"{self.name}: at_once={at_once!r}: say a number of questions, 1 or more")
        if function is None:
            return lambda each: self._add("answer", each, at_once=at_once, patience=patience)
        return self._add("answer", function, at_once=at_once, patience=patience)

    @typing.overload
    def on(self, function: F) -> F: ...
    @typing.overload
    def on(
        self,
        function: None = None,
        *,
        start: Start = "first",
        retry: Retries = USUAL,
        concurrency: int = 0,
        patience: float | None = None,
    ) -> Callable[[F], F]: ...
    def on(
        self,
        function: F | None = None,
        *,
        start: Start = "first",
        retry: Retries = USUAL,
        concurrency: int = 0,
        patience: float | None = None,
    ) -> Any:
        """Reacts, told by the type of the parameter: to events (`UserRegistered`), to their thin form
        (`Notice[UserRegistered]`), or to each change of a record (`User`; with `User | None` also to its deletion).

        Runs at least once for each; what it returns is sent (commands) or recorded (events of an own domain). Of a
        record that changes faster than it reacts it gets the last.

        Parameters:
            start: where a reaction that never ran before begins: at the `first` event ever recorded, or with what
                comes from `now` on.
            retry: when a message is tried again, and how often before it is a dead letter: a `Retry`, or one for each
                class of errors, as `{TimeoutError: Retry(attempts=50), ValueError: NEVER}`.
            concurrency: how many messages an instance handles at once at most, never two of one thing; 1 to 10,000. 0:
                one in each slot of each domain, so at most 16 of a domain.
            patience: seconds that a call of it gets; None: as the service says, 0: without end.
        """
        check_retries(retry, self.name)
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 0 <= concurrency <= _MOST_AT_ONCE:
            raise Refused(
                f"{self.name}: concurrency={concurrency!r}: say how many messages at once, 1 to {_MOST_AT_ONCE:,}, or 0 for one in each slot"
            )
        settings = {"start": start, "retry": retry, "concurrency": concurrency, "patience": patience}
        if function is None:
            return lambda each: self._add("on", each, **settings)
        return self._add("on", function, **settings)

    def every(
        self,
        when: float | timedelta | str,
        *,
        zone: str = "",
        missed: Missed = "once",
        patience: float | None = None,
    ) -> Callable[[F], F]:
        """Runs a function every so often, in one instance of the service; it takes a context, or nothing.

        What it returns is sent or recorded like what a reaction returns. A run that was not committed, because its
        process died or it failed, is run again: `ctx.due` tells which one it is.

        Parameters:
            when: seconds or a timedelta from one run to the next, or a cron text such as `"0 3 * * *"`, which needs
                `pip install 'cauce[cron]'`.
            zone: whose times a cron text tells, such as `"Europe/Madrid"`; UTC if not said.
            missed: of runs that were missed, because nobody ran, `once` makes up for one, `all` for each, and `skip`
                for none that could not begin within a minute of its time.
            patience: seconds that a run gets; None: as the service says, 0: without end.
        """
        schedule = schedule_of(when, zone, f"{self.name}: every({when!r})")
        if missed not in typing.get_args(Missed):
            raise Refused(f"{self.name}: missed={missed!r}: say once, all or skip")
        return lambda function: self._add("every", function, schedule=schedule, missed=missed, patience=patience)

    def view(self, name: str, *, schema: Tables | None = None) -> Callable[[F], F]:
        """Builds a view: `function(event, db)` queues statements on the `Store` that it gets. Several may build one.

        Parameters:
            name: as a domain's; `ctx.view(name)` reads it.
            schema: the SQL that makes its tables, said once. A changed one builds the view anew, beside the old one.
                As for the service, it may be given for each database.
        """
        check_domain(name)
        before = self.views.get(name)
        if schema is not None and before is not None and schema != before:
            raise Refused(f"{self.name}: view {name!r} has two schemas: say it once")
        self.views[name] = before if schema is None else schema
        return lambda function: self._add("view", function, view=name)

    def replica(self, copy: type[C]) -> type[C]:
        """Keep the service's own copy of these fields of another domain's records: `ctx.get(copy, key)` reads it."""
        if not (isinstance(copy, type) and issubclass(copy, Copy)):
            raise Refused(f"{self.name}: {copy!r} is no copy: declare it with class …(Copy, of=SomeRecord)")
        copied(copy)
        self.parts.append(Part("replica", copy, {}))
        return copy

    def _add(self, kind: Kind, function: F, **settings: Any) -> F:
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise Refused(
                f"{self.name}: {function!r} is no function: write it with def or async def, and decorate that"
            )
        if settings.get("patience") is not None:
            _patient(f"{self.name}.{function.__name__}", settings["patience"])
        frame = sys._getframe(2)
        names = {} if frame.f_locals is frame.f_globals else dict(frame.f_locals)
        self.parts.append(Part(kind, function, names, **settings))
        return function


def _patient(where: str, seconds: float) -> float:
    if isinstance(seconds, bool) or not 0 <= seconds < 1e9:
        raise Refused(f"{where}: patience={seconds!r}: say a number of seconds, or 0 for without end")
    return seconds


class Bound(msgspec.Struct, frozen=True):
    """A part, and what its annotations say: the messages it takes, whether by notice, where the context goes,
    whether it takes None where no record stands, and the records that may stand for a function that is given what
    does."""

    part: Part
    messages: tuple[type[Message], ...]
    notice: bool
    context: str | None
    gone: bool = False
    stands: tuple[type[Record], ...] = ()
    is_async: bool = False

    @property
    def name(self) -> str:
        return self.part.name


_WANTED: dict[str, tuple[type, str]] = {
    "decide": (Command, "a command"),
    "evolve": (Event, "an event"),
    "invert": (Event, "an event"),
    "answer": (Query, "a query"),
    "on": (Event, "an event or Notice[event], or a record"),
    "view": (Event, "an event"),
}


def bind(service: Service) -> list[Bound]:
    """Find out what each function takes. Raises `Refused`, naming function and parameter, for what cannot be right."""
    bounds = bound_parts(service)
    _check_copies(service)
    for kind in ("decide", "evolve", "invert", "answer"):
        seen: dict[type[Message], Bound] = {}
        for bound in bounds:
            for message in bound.messages if bound.part.kind == kind else ():
                if message in seen:
                    raise Refused(
                        f"{service.name}: both {seen[message].name} and {bound.name} {kind} {message.__name__}: keep one"
                    )
                seen[message] = bound
                if declared(message).domain not in service.owns:
                    raise Refused(
                        f"{service.name}.{bound.name} would {kind} {message.__name__} of domain {declared(message).domain.name!r}, which it does not own: "
                        f"add it to owns=, or let the owner do it"
                    )
    for bound in bounds:
        if bound.part.kind == "unique" and declared(bound.stands[0]).domain not in service.owns:
            raise Refused(
                f"{service.name}.{bound.name} is a rule over domain {declared(bound.stands[0]).domain.name!r}, which it does not own: "
                f"let its owner have it"
            )
    for kind in ("on", "every", "unique"):
        names = [bound.name for bound in bounds if bound.part.kind == kind]
        for name in names:
            if names.count(name) > 1:
                raise Refused(
                    f"{service.name} has two `{kind}` functions named {name}: rename one, {'tags' if kind == 'unique' else 'places'} are kept by name"
                )
    return bounds


def bound_parts(service: Service) -> list[Bound]:
    """What each function takes by itself, whether or not it all fits together. Raises `Refused` as `bind`."""
    return [
        msgspec.structs.replace(_bind(service, part), is_async=inspect.iscoroutinefunction(part.function))
        for part in service.parts
    ]


def _check_copies(service: Service) -> None:
    names = {name.lower(): f"view {name!r}" for name in service.views}
    for name, schema in service.views.items():
        if schema is None:
            raise Refused(f"{service.name}: view {name!r} has no schema: say once what tables it has, with schema=")
        if not any(part.view == name for part in service.parts):
            raise Refused(f"{service.name}: view {name!r} has no function: decorate one with service.view({name!r})")
    for part in service.parts:
        if part.kind == "replica":
            check_copy(typing.cast("type[Copy]", part.function))
            if part.name.lower() in names:
                raise Refused(
                    f"{service.name} has a replica {part.name} beside {names[part.name.lower()]}: rename one, files are kept by name"
                )
            names[part.name.lower()] = f"replica {part.name}"


def _bind(service: Service, part: Part) -> Bound:
    if part.kind == "replica":
        return Bound(part, (), False, None)
    where = f"{service.name}.{part.name}"
    try:
        hints = typing.get_type_hints(part.function, localns=part.names)
    except (NameError, TypeError) as error:
        raise Refused(f"{where}: an annotation cannot be resolved: {error}") from None
    parameters = list(inspect.signature(part.function).parameters.values())
    context = next((each.name for each in parameters if hints.get(each.name) is Context), None)
    told = [each for each in parameters if each.name != context]
    takes = {"decide": 2, "evolve": 2, "invert": 2, "every": 0}.get(part.kind, 1)
    if part.kind == "view":
        _check_view(where, [hints.get(each.name) for each in parameters])
        told = parameters[:1]
    if len(told) != takes:
        shape = ("nothing", "(message)", "(what stands, message)")[takes]
        raise Refused(
            f"{where} has parameters ({', '.join(each.name for each in parameters)}): {part.kind} takes {shape}, and a Context if wanted"
        )
    for each in told:
        if each.name not in hints:
            raise Refused(
                f"{where}: parameter {each.name} has no annotation, and its type tells what is wanted: add it"
            )
    for each in parameters:
        by = (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY if each.name == context else each.POSITIONAL_ONLY)
        if each.kind not in by:
            raise Refused(f"{where}: parameter {each.name} is {each.kind.description}: make it a plain parameter")
    if inspect.isasyncgenfunction(part.function):
        raise Refused(f"{where} is an async generator, and what it yields would be lost: return a list")
    if part.kind == "every":
        return Bound(part, (), False, context)
    if part.kind == "unique":
        return _bind_rule(where, part, told[0].name, hints[told[0].name], context)
    if part.kind == "on" and (record := _record(where, told[0].name, hints[told[0].name])):
        return Bound(part, record, False, context, type(None) in typing.get_args(hints[told[0].name]))
    messages, notice = _messages(where, part.kind, told[-1].name, hints[told[-1].name])
    before = alternatives(hints[told[0].name]) if takes == 2 else ()
    stands = tuple(each for each in before if each is not type(None))
    for message in messages if takes == 2 else ():
        _check_records(where, told[0].name, stands, declared(message))
    if part.kind in ("evolve", "invert") and (inspect.iscoroutinefunction(part.function) or context):
        why = "a replay runs nothing else" if part.kind == "evolve" else "it looks at nothing else"
        raise Refused(f"{where}: {part.kind} is a plain function of state and event, without await and context: {why}")
    if part.kind == "answer":
        for message in messages:
            _check_reply(where, typing.cast("type[Query[Any]]", message))
    return Bound(part, messages, notice, context, type(None) in before, stands)


def _bind_rule(where: str, part: Part, name: str, hint: Any, context: str | None) -> Bound:
    if inspect.iscoroutinefunction(part.function) or context:
        raise Refused(f"{where}: a rule is a plain function of a record, without await and context")
    if len(part.name.encode()) > _RULE_BYTES:
        raise Refused(f"{where}: the name of a rule stands in that of each tag: at most {_RULE_BYTES} bytes")
    record = _record(where, name, hint)
    if not record or type(None) in typing.get_args(hint):
        raise Refused(
            f"{where}: parameter {name} is {hint}: annotate it with a record, without None: what is gone bears nothing"
        )
    return Bound(part, (), False, None, stands=typing.cast("tuple[type[Record], ...]", record))


def _check_view(where: str, hints: list[Any]) -> None:
    if len(hints) != 2 or hints[1] is not Store:
        raise Refused(f"{where}: a view function takes (event, db), and db is annotated with Store")


def _record(where: str, name: str, hint: Any) -> tuple[type[Message], ...]:
    """The record that a parameter asks for, alone or with None; nothing if it asks for something else."""
    told = [each for each in alternatives(hint) if each is not type(None)]
    records = [each for each in told if isinstance(each, type) and issubclass(each, Record)]
    if not records:
        return ()
    if len(told) > 1:
        raise Refused(f"{where}: parameter {name} mixes a record and something else: write two functions")
    _declared(where, name, records[0])
    return (records[0],)


def _check_reply(where: str, query: type[Query[Any]]) -> None:
    try:
        reply = reply_type(query)
    except Refused as error:
        raise Refused(f"{where}: {error}") from None
    try:
        msgspec.json.Decoder(reply)
    except (TypeError, NameError) as error:
        raise Refused(
            f"{where}: the answer to {query.__name__} has a type that cannot travel as JSON: {error}"
        ) from None


def _messages(where: str, kind: str, name: str, hint: Any) -> tuple[tuple[type[Message], ...], bool]:
    wanted, words = _WANTED[kind]
    kinds = alternatives(hint)
    notices = [typing.get_args(each)[0] for each in kinds if typing.get_origin(each) is Notice]
    if notices and kind == "on":
        if len(notices) != len(kinds):
            raise Refused(f"{where}: parameter {name} mixes notices and events: write two functions")
        flat = tuple(each for notice in notices for each in alternatives(notice))
        return _checked(where, name, flat, wanted, words), True
    return _checked(where, name, kinds, wanted, words), False


def _checked(where: str, name: str, classes: tuple[Any, ...], wanted: type, words: str) -> tuple[type[Message], ...]:
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, wanted)):
            raise Refused(f"{where}: parameter {name} is {getattr(cls, '__name__', cls)}: annotate it with {words}")
        _declared(where, name, cls)
    return classes


def _declared(where: str, name: str, cls: type) -> Declared:
    try:
        return declared(typing.cast("type[Message]", cls))
    except Refused as error:
        raise Refused(f"{where}: parameter {name}: {error}") from None


def _check_records(where: str, name: str, classes: Iterable[Any], message: Declared) -> None:
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, Record)):
            raise Refused(
                f"{where}: parameter {name} is {getattr(cls, '__name__', cls)}: annotate it with the record of {message.domain.name!r}, or None"
            )
        domain = _declared(where, name, cls).domain
        if domain is not message.domain:
            raise Refused(
                f"{where}: parameter {name} is a record of {domain.name!r}, {message.name} is of {message.domain.name!r}"
            )
