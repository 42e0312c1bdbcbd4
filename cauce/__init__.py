"""Cauce: event-driven systems in Python, from one process on one file to many on a bus.

A bus that remembers, producers that own their data, consumers that copy or ask for what they need.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cauce.bus import Bus, Context
    from cauce.clock import Clock, SystemClock
    from cauce.duration import days, hours, minutes
    from cauce.errors import (
        BreakerOpen,
        Busy,
        CauceError,
        Conflict,
        Damaged,
        Fenced,
        Gone,
        Held,
        IdReused,
        Inconsistent,
        NoAnswer,
        NotOwner,
        NotPermitted,
        OutcomeUnknown,
        Overloaded,
        Refused,
        Rejected,
        StorageFull,
        Unavailable,
        Unreachable,
        Unreadable,
    )
    from cauce.guards.breaker import Limits
    from cauce.guards.guard import Guards
    from cauce.messages import Command, Copy, Domain, Event, Notice, Query, Record, field, replace
    from cauce.past import Change
    from cauce.receipt import Receipt
    from cauce.restored import Restored
    from cauce.retry import ALWAYS, NEVER, Retry
    from cauce.runtime import connect, running
    from cauce.service import Service
    from cauce.sql import Store
    from cauce.undone import Fact, Undone
    from cauce.upcaster import upcast
    from cauce.wire import Instance
else:
    # A command line that only prints its help must not pay for asyncio and all messages: names are loaded when used.
    import importlib

    _HOMES = {
        "bus": ("Bus", "Context"),
        "clock": ("Clock", "SystemClock"),
        "duration": ("days", "hours", "minutes"),
        "errors": (
            "BreakerOpen",
            "Busy",
            "CauceError",
            "Conflict",
            "Damaged",
            "Fenced",
            "Gone",
            "Held",
            "IdReused",
            "Inconsistent",
            "NoAnswer",
            "NotOwner",
            "NotPermitted",
            "OutcomeUnknown",
            "Overloaded",
            "Refused",
            "Rejected",
            "StorageFull",
            "Unavailable",
            "Unreachable",
            "Unreadable",
        ),
        "guards.breaker": ("Limits",),
        "guards.guard": ("Guards",),
        "messages": ("Command", "Copy", "Domain", "Event", "Notice", "Query", "Record", "field", "replace"),
        "past": ("Change",),
        "receipt": ("Receipt",),
        "restored": ("Restored",),
        "retry": ("ALWAYS", "NEVER", "Retry"),
        "runtime": ("connect", "running"),
        "service": ("Service",),
        "sql": ("Store",),
        "undone": ("Fact", "Undone"),
        "upcaster": ("upcast",),
        "wire": ("Instance",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'cauce' has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(f"cauce.{_HOME[name]}"), name)
        return found

    def __dir__():
        return sorted(__all__)


__all__ = [
    "ALWAYS",
    "NEVER",
    "BreakerOpen",
    "Bus",
    "Busy",
    "CauceError",
    "Change",
    "Clock",
    "Command",
    "Conflict",
    "Context",
    "Copy",
    "Damaged",
    "Domain",
    "Event",
    "Fact",
    "Fenced",
    "Gone",
    "Guards",
    "Held",
    "IdReused",
    "Inconsistent",
    "Instance",
    "Limits",
    "NoAnswer",
    "NotOwner",
    "NotPermitted",
    "Notice",
    "OutcomeUnknown",
    "Overloaded",
    "Query",
    "Receipt",
    "Record",
    "Refused",
    "Rejected",
    "Restored",
    "Retry",
    "Service",
    "StorageFull",
    "Store",
    "SystemClock",
    "Unavailable",
    "Undone",
    "Unreachable",
    "Unreadable",
    "connect",
    "days",
    "field",
    "hours",
    "minutes",
    "replace",
    "running",
    "upcast",
]
