"""What a process counted, and how far its services are, in the text format 0.0.4 of Prometheus.

Source: prometheus.io, "Exposition formats". No library is needed: it is lines of names, labels and numbers. Labels are
names of services, functions, domains and message types, so their number is that of the code, not of what happens.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import get_args

from cauce.ext.observer import Observer
from cauce.ext.pulse import Pulse
from cauce.guarded import State
from cauce.meter import BUCKETS, Meter, Times

__all__ = ["CONTENT_TYPE", "NAMES", "text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Samples = Iterable[tuple[Labels, float]]

NAMES: dict[str, tuple[str, str]] = {
    "cauce_build_info": ("gauge", "1, with the versions of Cauce and Python."),
    "cauce_instance_up": ("gauge", "1 for each instance of this process, with how it is."),
    "cauce_instance_start_seconds": ("gauge", "When the instance started, in seconds since 1970."),
    "cauce_loop_late_seconds": ("gauge", "By how much the loop was late at its last tick, or is by now."),
    "cauce_loop_latest_seconds": ("gauge", "By how much the loop was ever late."),
    "cauce_messages_handled_total": ("counter", "Messages that a handler was through with."),
    "cauce_messages_failed_total": ("counter", "Times that a handler failed, each attempt counted."),
    "cauce_messages_waited_total": ("counter", "Times that a handler could not go on by somebody else's trouble."),
    "cauce_messages_retried_total": ("counter", "Times that a handler was given a message again."),
    "cauce_messages_parked_total": ("counter", "Messages that became dead letters."),
    "cauce_messages_in_flight": ("gauge", "Messages that a handler is at."),
    "cauce_handler_seconds": ("histogram", "How long a handler took."),
    "cauce_questions_answered_total": ("counter", "What was asked of services of this process, by how it ended."),
    "cauce_questions_in_hand": ("gauge", "What is being answered."),
    "cauce_answer_seconds": ("histogram", "How long an answer took."),
    "cauce_questions_asked_total": ("counter", "What this process asked of a domain, by how it ended."),
    "cauce_questions_out": ("gauge", "What was asked and has no answer yet."),
    "cauce_question_seconds": ("histogram", "How long it took until it was answered or given up."),
    "cauce_breaker_state": ("gauge", "1 for the state of the breaker of each callee, as this process asks it."),
    "cauce_breaker_opened_total": ("counter", "How often the breaker of a callee has opened."),
    "cauce_breaker_refused_total": ("counter", "Questions that a breaker did not let through."),
    "cauce_callee_shed_total": ("counter", "Questions to a callee that were too many at once."),
    "cauce_bulkhead_under_way": ("gauge", "Questions in hand behind a bulkhead of what is answered here."),
    "cauce_bulkhead_shed_total": ("counter", "Questions that a bulkhead of what is answered here turned away."),
    "cauce_consumer_lag_messages": ("gauge", "Entries that a consumer wants behind its places, of the whole service."),
    "cauce_consumer_lag_seconds": ("gauge", "Age of the oldest that is neither handled nor dead."),
    "cauce_consumer_lag_is_more": ("gauge", "1: there are more than were counted."),
    "cauce_consumer_retrying": ("gauge", "Messages that are set aside and tried again."),
    "cauce_consumer_dead": ("gauge", "Messages that wait for a person."),
    "cauce_consumer_behind": ("gauge", "Messages that wait behind a dead one."),
    "cauce_outbox_messages": ("gauge", "What a service has said that is not in its log yet."),
    "cauce_timers": ("gauge", "Timers of a service."),
    "cauce_timers_due": ("gauge", "Timers of a service whose time is over."),
    "cauce_log_head": ("gauge", "Last position of a log; its increase is what was appended."),
    "cauce_look_age_seconds": ("gauge", "How old lags, outboxes, timers and heads are."),
}
"""The metrics by name: their type, and what they are."""

_BREAKER = get_args(State)
_STATES = ("starting", "running", "draining", "blocked")


def text(meter: Meter, pulse: Pulse, observer: Observer) -> str:
    """All metrics, each with its help and type, also those of which there is nothing yet."""
    samples = dict[str, Samples](
        [
            *_process(meter, pulse),
            *_messages(meter),
            *_answers(meter),
            *_questions(meter),
            *_guards(meter),
            *_lags(observer),
        ]
    )
    lines = list[str]()
    for name, (kind, help) in NAMES.items():
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        lines += [_line(name, labels, value) for labels, value in samples.get(name, ())]
        if kind == "histogram":
            lines += [
                _line(each, labels, value)
                for end in ("_bucket", "_sum", "_count")
                for each, found in [(name + end, samples.get(name + end, ()))]
                for labels, value in found
            ]
    return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(each)}"' for key, each in labels.items())
    number = str(value) if isinstance(value, int) else repr(float(value))
    return f"{name}{{{inside}}} {number}" if inside else f"{name} {number}"


def _escaped(value: str) -> str:
    value = value.encode("utf-8", "backslashreplace").decode()
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _process(meter: Meter, pulse: Pulse) -> Iterator[tuple[str, Samples]]:
    yield "cauce_build_info", [({"version": version("cauce"), "python": platform.python_version()}, 1)]
    here = sorted(meter.instances.values(), key=lambda each: each.service)
    yield (
        "cauce_instance_up",
        [({"service": each.service, "state": state}, int(each.state == state)) for each in here for state in _STATES],
    )
    yield "cauce_instance_start_seconds", [({"service": each.service}, each.since / 1_000_000) for each in here]
    yield "cauce_loop_late_seconds", [({}, max(pulse.late, pulse.silent))]
    yield "cauce_loop_latest_seconds", [({}, max(pulse.latest, pulse.silent))]


def _messages(meter: Meter) -> Iterator[tuple[str, Samples]]:
    found = [
        ({"service": service, "handler": handler}, each) for (service, handler), each in sorted(meter.handled.items())
    ]
    for what in ("handled", "failed", "waited", "retried", "parked"):
        yield f"cauce_messages_{what}_total", [(labels, getattr(each, what)) for labels, each in found]
    yield "cauce_messages_in_flight", [(labels, each.in_flight) for labels, each in found]
    yield from _histogram("cauce_handler_seconds", [(labels, each.times) for labels, each in found])


def _answers(meter: Meter) -> Iterator[tuple[str, Samples]]:
    names = ("service", "domain", "kind", "type")
    found = [(dict(zip(names, key, strict=True)), each) for key, each in sorted(meter.answered.items())]
    yield (
        "cauce_questions_answered_total",
        [
            ({**labels, "outcome": what}, getattr(each, what))
            for labels, each in found
            for what in ("answered", "rejected", "failed")
        ],
    )
    yield "cauce_questions_in_hand", [(labels, each.in_flight) for labels, each in found]
    yield from _histogram("cauce_answer_seconds", [(labels, each.times) for labels, each in found])


def _questions(meter: Meter) -> Iterator[tuple[str, Samples]]:
    found = [({"callee": domain}, each) for domain, each in sorted(meter.asked.items())]
    yield (
        "cauce_questions_asked_total",
        [
            ({**labels, "outcome": what}, getattr(each, what))
            for labels, each in found
            for what in ("answered", "nobody", "timeout", "lost")
        ],
    )
    yield "cauce_questions_out", [(labels, each.in_flight) for labels, each in found]
    yield from _histogram("cauce_question_seconds", [(labels, each.times) for labels, each in found])


def _guards(meter: Meter) -> Iterator[tuple[str, Samples]]:
    callees = [({"callee": name}, each) for name, each in sorted(meter.guards.items())]
    yield (
        "cauce_breaker_state",
        [({**labels, "state": state}, int(each.state == state)) for labels, each in callees for state in _BREAKER],
    )
    yield "cauce_breaker_opened_total", [(labels, each.opened) for labels, each in callees]
    yield "cauce_breaker_refused_total", [(labels, each.refused) for labels, each in callees]
    yield "cauce_callee_shed_total", [(labels, each.shed) for labels, each in callees]
    here = [({"bulkhead": name}, each) for name, each in sorted(meter.bulkheads.items())]
    yield "cauce_bulkhead_under_way", [(labels, each.under_way) for labels, each in here]
    yield "cauce_bulkhead_shed_total", [(labels, each.shed) for labels, each in here]


def _histogram(name: str, found: Iterable[tuple[Labels, Times]]) -> Iterator[tuple[str, Samples]]:
    buckets, sums, counts = list[tuple[Labels, float]](), list[tuple[Labels, float]](), list[tuple[Labels, float]]()
    for labels, times in found:
        total = 0
        for bound, number in zip((*BUCKETS, float("inf")), list(times.parts), strict=True):
            total += number
            buckets.append(({**labels, "le": "+Inf" if bound == float("inf") else f"{bound:g}"}, total))
        sums.append((labels, times.seconds))
        counts.append((labels, total))
    yield from ((f"{name}_bucket", buckets), (f"{name}_sum", sums), (f"{name}_count", counts))


def _lags(observer: Observer) -> Iterator[tuple[str, Samples]]:
    seen = observer.seen
    if seen is None:
        return
    found = [({"service": each.service, "kind": each.kind, "consumer": each.name}, each) for each in seen.readers]
    known = [(labels, each) for labels, each in found if each.lag is not None]
    yield "cauce_consumer_lag_messages", [(labels, each.lag or 0) for labels, each in known]
    yield "cauce_consumer_lag_seconds", [(labels, each.seconds or 0.0) for labels, each in known]
    yield "cauce_consumer_lag_is_more", [(labels, int(each.at_least)) for labels, each in known]
    for what in ("retrying", "dead", "behind"):
        yield f"cauce_consumer_{what}", [(labels, getattr(each, what)) for labels, each in found]
    yield "cauce_outbox_messages", [({"service": each.service}, each.outbox) for each in seen.services]
    yield "cauce_timers", [({"service": each.service}, each.timers) for each in seen.services]
    yield "cauce_timers_due", [({"service": each.service}, each.due) for each in seen.services]
    yield "cauce_log_head", [({"log": log}, head) for log, head in seen.heads.items()]
    yield "cauce_look_age_seconds", [({}, observer.age)]
