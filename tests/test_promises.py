"""docs/promises.md says what the tests are: each promise has tests, and each test runs where a tick says so."""

from __future__ import annotations

import pytest

from tests import promises
from tests.conftest import WHOLE
from tests.promises import PROMISES, Promise, collected, held_by, page

IDS = [
    "tests/test_calls.py::test_a_call[nats]",
    "tests/test_calls.py::test_a_call[sqlite-7]",
    "tests/test_calls.py::test_of_a_file",
    "tests/test_conformance.py::test_each_backend_keeps_the_promise_that[nats-an append is all or nothing]",
    "tests/test_conformance.py::test_each_backend_keeps_the_promise_that[nats-another append is all or nothing]",
    "tests/test_messages.py::test_names",
    "tests/test_nats_store.py::test_a_bucket",
]


@pytest.fixture(scope="module")
def ids(request: pytest.FixtureRequest) -> list[str]:
    """All tests are collected already, or else those that are named are now, in another process."""
    return request.config.stash.get(WHOLE, None) or promises.ids_of_a_collection()


def test_the_page_of_promises_is_that_of_the_tests_that_are_here(ids: list[str]) -> None:
    assert promises.PAGE.read_text() == page(list(collected(ids))), "run python -m tests.promises --write"


def test_where_a_test_runs_is_told_by_its_parameters_or_else_by_its_module() -> None:
    assert [(each.test.partition("::")[2].partition("[")[0], sorted(each.on)) for each in collected(IDS)] == [
        ("test_a_call", ["nats"]),
        ("test_a_call", ["sqlite"]),
        ("test_of_a_file", ["sqlite"]),
        ("test_each_backend_keeps_the_promise_that", ["nats"]),
        ("test_each_backend_keeps_the_promise_that", ["nats"]),
        ("test_names", ["nats", "postgresql", "sqlite"]),
        ("test_a_bucket", ["nats"]),
    ]


def test_a_promise_is_held_where_one_of_its_tests_runs_and_by_none_that_is_not_there() -> None:
    tests = list(collected(IDS))
    one = Promise("one", "", [*promises.log("an append is all or nothing"), "test_calls::test_a_call"])
    assert held_by(one, tests) == {
        "test_conformance::test_each_backend_keeps_the_promise_that an append is all or nothing": {"nats"},
        "test_calls::test_a_call": {"nats", "sqlite"},
    }
    for nothing in (*promises.log("append is all"), "test_calls::test_no_more", "test_gone::*"):
        with pytest.raises(LookupError, match="mend tests/promises.py"):
            held_by(Promise("x", "", ["test_calls::test_a_call", nothing]), tests)


def test_what_no_test_holds_on_a_backend_has_its_reason_in_words(ids: list[str]) -> None:
    tests = list(collected(ids))
    assert len(PROMISES) == 12
    for promise in PROMISES:
        held = set[str]().union(*held_by(promise, tests).values())
        assert held | promise.missing.keys() >= promises.BACKENDS.keys(), promise.name
