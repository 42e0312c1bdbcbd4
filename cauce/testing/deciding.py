"""`given(service, *events).when(command).then(*events)`: what a decider makes of a wish, with no bus at all."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import Any

from cauce.errors import Refused, Rejected
from cauce.fold import messages_of
from cauce.folding import fold_of, rules_of
from cauce.messages import Command, Event, Record, declared
from cauce.schema import encode, key_of
from cauce.service import Service, bind

__all__ = ["Given", "Outcome", "given"]


def given(service: Service, *events: Event) -> Given:
    """What has happened so far to one thing of a domain that the service owns."""
    return Given(service, events)


class Given:
    """The facts so far; `when` gives the wish."""

    def __init__(self, service: Service, events: tuple[Event, ...]) -> None:
        self._parts = bind(service)
        self._service = service
        self._folders = {domain.name: fold_of(self._parts, domain) for domain in service.owns}
        self._rules = {
            domain.name: rules_of(self._parts, domain, self._folders[domain.name]) for domain in service.owns
        }
        self._things = {self._thing(event) for event in events}
        if len(self._things) > 1:
            raise Refused(f"given events of several things {sorted(self._things)}: give those of one")
        self._state: Record | None = None
        self._version = len(events)
        for version, event in enumerate(events, 1):
            self._state = self._step(self._state, event, version)

    def when(self, command: Command) -> Outcome:
        """Decide the wish. It must be one that could travel, so bad fields are `Refused` here, too."""
        thing = self._thing(command)
        if self._things and thing not in self._things:
            raise Refused(f"given events of {sorted(self._things)}, and a wish for {thing}: decide on one thing")
        bound = next(
            (each for each in self._parts if each.part.kind == "decide" and type(command) in each.messages), None
        )
        if bound is None:
            raise Refused(f"service {self._service.name!r} has no decide function for {type(command).__name__}")
        if bound.context is not None:
            raise Refused(f"{bound.name} reads its service's copies: test it on a bus")
        try:
            result = bound.part.function(self._state, command)
            if inspect.isawaitable(result):
                result = _finished(bound.name, result)
            events = messages_of(result, bound.name, "events, or None")
        except Rejected as rejected:
            return Outcome(self._state, [], rejected)
        state = self._state
        for version, event in enumerate(events, self._version + 1):
            if not isinstance(event, Event):
                raise Refused(f"{bound.name} returned {event!r}: return events, or None")
            if self._thing(event) != thing:
                raise Refused(f"{bound.name} returned {event!r} for another thing than {command!r}")
            state = self._step(state, event, version)
        return Outcome(state, events, None)

    def _thing(self, message: Event | Command) -> tuple[str, str]:
        encode(message)
        domain = declared(message).domain
        if domain not in self._service.owns:
            raise Refused(f"service {self._service.name!r} does not own {domain.name!r} of {type(message).__name__}")
        return domain.name, key_of(message)

    def _step(self, state: Record | None, event: Event, version: int) -> Record | None:
        after = self._folders[declared(event).domain.name].step(state, event, version)
        if after is not None:
            encode(after)
        for rule in self._rules[declared(event).domain.name]:
            # What other things bear is not known here; what it finds in this one must be a tag.
            rule.tags(after)
        return after


class Outcome:
    """What came of it. `state` is what stands afterwards."""

    def __init__(self, state: Record | None, events: list[Event], rejection: Rejected | None) -> None:
        self.state, self.events, self.rejection = state, events, rejection

    def then(self, *events: Event) -> Outcome:
        """The wish was accepted, and just these facts were recorded; none: nothing changed."""
        assert self.rejection is None, f"rejected: {self.rejection}"
        assert self.events == list(events), f"recorded {self.events}, expected {list(events)}"
        return self

    def rejected(self, reason: str) -> Outcome:
        """The wish was rejected with just this reason."""
        assert self.rejection is not None, f"accepted with {self.events}, expected the rejection {reason!r}"
        assert self.rejection.reason == reason, f"rejected with {self.rejection.reason!r}, expected {reason!r}"
        return self


def _finished(name: str, deciding: Awaitable[Any]) -> Any:
    """What an async decider returns. Without its service's copies there is nothing it could wait for."""
    try:
        next(steps := deciding.__await__())
    except StopIteration as stop:
        return stop.value
    steps.close()
    raise Refused(f"{name} waits for something outside: a decider reads its service's own copies, and nothing else")
