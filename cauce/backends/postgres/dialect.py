"""SQL of services as PostgreSQL takes it: `?` becomes `$1`, and what is no business of a handler's is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from cauce.errors import Refused

__all__ = ["CHANGES", "READS", "check", "numbered", "statements"]

_PIECES = re.compile(
    r"""
      (?P<literal>
          [eE]'(?:[^'\\]|''|\\.)*(?:'|\Z)               # E'it\'s'
        | '(?:[^']|'')*(?:'|\Z)                         # 'it''s'
        | (?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$ .*? (?:\$(?P=tag)\$|\Z)     # $body$ … $body$
      )
    | (?P<comment> --[^\n]*  | /\* )
    | (?P<name> (?:[uU]&)?"(?:[^"]|"")*(?:"|\Z) )         # "a name", U&"with \\0041 in it"
    | (?P<word> [^\W\d][\w$]* )
    | (?P<number> \d[\w$.]* )
    | (?P<dollar> \$\d+ )
    | (?P<mark> \?\? | \?\d* )
    | (?P<space> \s+ )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_END = re.compile(r"/\*|\*/")
_MOST = 32_767

READS = frozenset({"select", "values", "table", "with"})
"""How a query begins."""

CHANGES = READS | {"insert", "update", "delete", "merge", "truncate", "create", "alter", "drop"}
"""How a statement of a handler may begin."""

_ENDS = frozenset(
    [
        "abort",
        "begin",
        "commit",
        "discard",
        "end",
        "listen",
        "notify",
        "prepare",
        "release",
        "reset",
        "rollback",
        "savepoint",
        "set",
        "start",
        "unlisten",
    ]
)
_SHARED = frozenset({"system", "database", "role", "user", "group", "schema", "temp", "temporary", "tablespace"})
_COLUMNS = frozenset({"cauce_gone", "cauce_version"})
"""Of replicas, whose statements we make ourselves."""

_FUNCTIONS = re.compile(
    r"set_config|pg_advisory_\w+|pg_terminate_backend|pg_cancel_backend|pg_notify|dblink\w*", re.IGNORECASE
)


def _pieces(sql: str) -> Iterator[tuple[str, str]]:
    """All of the text, piece by piece, each with its kind. What is left open reaches to the end."""
    at = 0
    while at < len(sql):
        found = _PIECES.match(sql, at)
        assert found is not None
        kind, end = found.lastgroup or "other", found.end()
        if kind == "tag":
            kind = "literal"
        if found[0] == "/*":
            end = _nested(sql, end)
        yield kind, sql[at:end]
        at = end


def _nested(sql: str, at: int) -> int:
    """Where a comment ends: they lie in each other, other than in SQLite."""
    depth = 1
    while depth:
        found = _COMMENT_END.search(sql, at)
        if found is None:
            return len(sql)
        depth += 1 if found[0] == "/*" else -1
        at = found.end()
    return at


@lru_cache(maxsize=1000)
def numbered(sql: str) -> str:
    """With `$1`, `$2`… for each `?`, and `$3` for `?3`, as SQLite counts them; `??` is PostgreSQL's operator `?`.

    What lies in literals, names and comments is left as it is, and so is a text that counts in PostgreSQL's way. Raises
    `Refused` for one that does both.
    """
    most, found, theirs = 0, list[str](), False
    for kind, text in _pieces(sql):
        theirs = theirs or kind == "dollar"
        if kind != "mark":
            found.append(text)
        elif text == "??":
            found.append("?")
        else:
            number = int(text[1:]) if len(text) > 1 else most + 1
            most = max(most, number)
            found.append(f"${number}")
    if theirs and most:
        raise Refused(f"{sql!r} has both ? and $1: write one of them, and ?? for the operator")
    if most > _MOST:
        raise Refused(f"{sql!r} has more than {_MOST} values: pass them as an array, or write several statements")
    return "".join(found)


def statements(sql: str) -> list[str]:
    """The statements of a text, apart."""
    parts = [""]
    for kind, text in _pieces(sql):
        if text == ";" and kind == "other":
            parts.append("")
        else:
            parts[-1] += text
    return [part for part in parts if any(kind not in ("space", "comment") for kind, _ in _pieces(part))]


@lru_cache(maxsize=1000)
def check(sql: str, schema: str, may: frozenset[str] | None = CHANGES) -> None:
    """Raises `Refused` for what would end the transaction, change the session, or reach what is not the service's.

    It guards against mistakes: who means harm is held back by the rights of the role that he connects as.

    Parameters:
        schema: of the bus, which services reach in no other way than over it.
        may: how it may begin; None for all that stays within the transaction, as for a migration.
    """
    words = [(kind, text) for kind, text in _pieces(sql) if kind not in ("literal", "comment", "space")]
    if any(text == ";" and kind == "other" for kind, text in words[:-1]):
        raise Refused(f"{sql!r} is more than one statement: execute each by itself")
    # A bracket may stand before a query: `(select …) union (select …)`.
    first = next((text.lower() for _, text in words if text != "("), "")
    if first in _ENDS or (may is not None and first not in may):
        allowed = f"begin with {', '.join(sorted(may))}" if may is not None else "leave transactions and settings alone"
        raise Refused(f"{first!r} is not authorized in {sql!r}: {allowed}")
    second = [text.lower() for kind, text in words[1:2] if kind == "word"]
    if may is not None and first in ("create", "alter", "drop") and second and second[0] in _SHARED:
        raise Refused(f"{first} {second[0]} is not authorized in {sql!r}: it is not of this service alone")
    names = [(text[1:-1].replace('""', '"') if kind == "name" else text.lower()) for kind, text in words]
    for (kind, text), name, after in zip(words, names, [*names[1:], ""], strict=True):
        if kind not in ("word", "name"):
            continue
        if (
            (name.startswith("cauce_") and name not in _COLUMNS)
            or (name == schema and after == ".")
            or text[:2] in ("u&", "U&")
        ):
            raise Refused(f"{text} is not authorized in {sql!r}: what begins with cauce_ is kept for Cauce itself")
        if kind == "word" and after == "(" and _FUNCTIONS.fullmatch(name):
            raise Refused(f"{text} is not authorized in {sql!r}: it reaches beyond this transaction")
