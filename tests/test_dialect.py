"""SQL of services, as PostgreSQL takes it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cauce.backends.postgres.dialect import READS, _pieces, check, numbered, statements
from cauce.errors import Refused

OPAQUE = st.sampled_from(
    [
        "'a ? b'", "'it''s ?'", "E'\\'?'", "$$ ? ' $$", "$body$ ? $x$ ? $$ $body$", '"a ? ""b"""', "-- ? ' \"\n",
        "/* ? /* ' */ ? */", "''", "$$$$",
    ]
)  # fmt: skip
PLAIN = st.sampled_from(["select", "a1$2", "(", ")", ",", "=", "12", "1.5e3", "é", ".", "::text", "->>", "--\n", "/"])


@given(st.lists(st.one_of(OPAQUE, PLAIN, st.just("?"))))
def test_each_mark_outside_literals_names_and_comments_gets_its_number_and_nothing_else_changes(
    parts: list[str],
) -> None:
    count, expected = 0, []
    for part in parts:
        count += part == "?"
        expected.append(f"${count}" if part == "?" else part)
    assert numbered(" ".join(parts)) == " ".join(expected)


@given(st.text(alphabet="?'\"$e/*-;\\ \na1"))
def test_any_text_is_taken_apart_without_losing_a_character(sql: str) -> None:
    assert "".join(text for _, text in _pieces(sql)) == sql
    assert all(part in sql for part in statements(sql))


def test_numbers_count_as_in_sqlite_and_the_operator_is_written_twice() -> None:
    assert numbered("select ?2, ?, ?1") == "select $2, $3, $1"
    assert numbered("select a ?? 'b' and c ??| ?") == "select a ? 'b' and c ?| $1"
    assert numbered("select a ? $1 - '$2'".replace("?", "=")) == "select a = $1 - '$2'"
    with pytest.raises(Refused, match="both"):
        numbered("select $1, ?")


def test_a_text_is_cut_into_its_statements() -> None:
    body = "create function f() returns int as $$ begin; return 1; end $$ language plpgsql"
    assert statements(f"-- a; b\nselect ';' ;; {body}; /* ; */ ") == ["-- a; b\nselect ';' ", f" {body}"]


@pytest.mark.parametrize(
    "sql",
    [
        "commit", "/* x */ ROLLBACK", "set search_path = x", "begin", "savepoint x", "do $$ begin end $$", "listen x",
        "select 1; commit", "lock table x", "copy x from stdin", "create schema x", "drop role x", "create temp table x ()",
        "alter system set fsync = off", "select * from cauce_outbox", 'select * from "cauce_outbox"',
        "delete from x.CAUCE_places", 'select * from U&"\\0063auce_outbox"', "select * from bus.facts",
        'select * from "bus" . facts', "select set_config('a', 'b', false)", "select pg_advisory_unlock_all()", "", "?",
    ],
)  # fmt: skip
def test_what_is_no_business_of_a_handler_is_refused(sql: str) -> None:
    with pytest.raises(Refused, match="not authorized|more than one"):
        check(sql, "bus")


@pytest.mark.parametrize(
    "sql",
    [
        "insert into effects values (?, 'cauce_outbox; commit')", "(select 1) union (select 2);", "select bus from buses",
        "with x as (delete from y returning *) select * from x", "create table x (a int)", "truncate x -- commit",
        "update x set a = 'U&' where b = 1", "select u & 1 from x",
    ],
)  # fmt: skip
def test_what_is_a_handlers_business_is_not(sql: str) -> None:
    check(sql, "bus")


def test_a_query_begins_like_one() -> None:
    check("select 1", "bus", READS)
    with pytest.raises(Refused, match=re.escape("'insert' is not authorized")):
        check("insert into x values (1)", "bus", READS)


def test_a_migration_may_do_all_that_stays_in_its_transaction() -> None:
    check("do $$ begin perform 1; end $$", "bus", None)
    check("create extension citext", "bus", None)
    with pytest.raises(Refused, match="leave transactions"):
        check("commit", "bus", None)
