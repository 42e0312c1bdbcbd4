"""What code makes a record: a name that changes with what the code does, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MODULE = """
import functools
from cauce import Domain, Event, Record, Service, replace

users = Domain("users", key="user_id")
LIMIT = 10
KINDS = frozenset({"good", "bad", "neither", "odd"})

class User(Record, domain=users):
    user_id: str
    score: int = 0

    def raised(self, by: int) -> "User":
        return replace(self, score=self.score + by)

class Scored(Event, domain=users):
    user_id: str
    by: int
    kind: str = "good"

def capped(score: int, most: int = 5) -> int:
    return min(score, LIMIT + most)

def times(factor: int):
    return lambda by: by * factor

double = times(2)

@functools.lru_cache
def known(kind: str) -> bool:
    return kind in {"good", "bad", "neither", "odd"} or kind in KINDS

service = Service("users", owns=users)

@service.evolve
def scored(user: User | None, event: Scored) -> User:
    '''What it says of itself.'''
    if not known(event.kind):
        return user
    return User(event.user_id, capped(double(event.by))) if user is None else user.raised(event.by)
"""

PRINT = """
from cauce.folding import fold_of
from cauce.service import bind
{before}
print(fold_of(bind(service), users).fingerprint)
"""


def fingerprint(text: str, before: str = "", seed: int = 0) -> str:
    """As a process of its own finds it, whose sets have an order of their own."""
    found = subprocess.run(
        [sys.executable, "-c", text + textwrap.dedent(PRINT).format(before=before)],
        env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()


def test_it_is_the_same_in_every_process_wherever_the_code_stands_and_however_often_it_ran() -> None:
    moved = MODULE.replace("service = Service", "# moved down\n\n\nservice = Service").replace("of itself", "of others")
    run = "state = None\nfor _ in range(10_000): state = scored(state, Scored('a', 1))"
    told = [fingerprint(MODULE, seed=1), fingerprint(moved, seed=2), fingerprint(MODULE, run, seed=3)]
    assert len(told[0]) == 16
    assert told == told[:1] * 3


CHANGES: dict[str, Callable[[str], str]] = {
    "what evolve does": lambda text: text.replace("user.raised(event.by)", "user.raised(event.by + 1)"),
    "a function that it calls": lambda text: text.replace("min(score, LIMIT", "max(score, LIMIT"),
    "a default of that": lambda text: text.replace("most: int = 5", "most: int = 6"),
    "a constant of that": lambda text: text.replace("LIMIT = 10", "LIMIT = 11"),
    "a set of constants": lambda text: text.replace('KINDS = frozenset({"good"', 'KINDS = frozenset({"fine"'),
    "what a cached function does": lambda text: text.replace("or kind in KINDS", "and kind in KINDS"),
    "what a function closes over": lambda text: text.replace("times(2)", "times(3)"),
    "a method of the record": lambda text: text.replace("score=self.score + by", "score=self.score - by"),
    "a default of the record": lambda text: text.replace("score: int = 0", "score: int = 1"),
    "a field of the record": lambda text: text.replace("score: int = 0", 'score: int = 0\n    name: str = ""'),
    "the version of the record": lambda text: text.replace(
        "(Record, domain=users)", "(Record, domain=users, version=2)"
    ),
    "a default of the event": lambda text: text.replace('kind: str = "good"', 'kind: str = "bad"'),
}


@pytest.fixture(scope="module")
def before() -> str:
    return fingerprint(MODULE)


@pytest.mark.parametrize("what", CHANGES)
def test_it_changes_with(what: str, before: str) -> None:
    changed = CHANGES[what](MODULE)
    assert changed != MODULE
    assert fingerprint(changed) != before
