"""A replica: a service's own lasting copy of some fields of another domain's records. It never goes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgspec

from cauce.codec import Entry, schema_of
from cauce.derived import Failed
from cauce.errors import CauceError, Damaged, Refused
from cauce.messages import Copy, alternatives, copied, declared
from cauce.schema import Schema
from cauce.sql import Fetch, Row, Run, Statement, spoken

__all__ = ["Replica"]

C = TypeVar("C", bound=Copy)

_encode = msgspec.json.Encoder(order="deterministic").encode
_BIG = 2**63
_VERSION, _GONE = "cauce_version", "cauce_gone"

# What columns are in each dialect. SQLite keeps each value as what it is, unless it is told a type.
_KEY = {"sqlite": "text not null primary key", "postgresql": 'text collate "C" not null primary key'}
_TEXT = {"sqlite": "", "postgresql": "text"}
_REAL = {"sqlite": "", "postgresql": "double precision"}
_WHOLE = {"sqlite": "", "postgresql": "numeric"}
_BIT = {"sqlite": "", "postgresql": "bigint"}
_NUMBER = {"sqlite": "integer", "postgresql": "bigint"}


class Replica(Generic[C]):
    """The table of one copy; see `cauce.derived.Shape` for what each method promises.

    Text, numbers and truth values are columns that SQL can compare; all else is kept as JSON. A deleted thing stays
    as a row that is gone, with its version, so that an older record does not revive it.
    """

    def __init__(self, service: str, copy: type[C], dialect: str = "sqlite") -> None:
        self.copy, self.name = copy, copy.__name__
        self.what = f"replica {self.name} of {service}"
        record = copied(copy)
        self._record, kind = record, declared(record)
        self.domain, self._key = kind.domain.name, str(kind.domain.key)
        # All types: one of them says that a thing is gone.
        self.wants = {self.domain: frozenset[str]()}
        self._fields = {each.name: _Column(each.type) for each in msgspec.structs.fields(copy)}  # type: ignore[arg-type]
        lower = {name.lower() for name in self._fields}
        if len(lower) < len(self._fields) or lower & {_VERSION, _GONE}:
            raise Refused(f"{self.what}: two of {', '.join(self._fields)} are one name to SQL: rename a field")
        self._known = Schema([record])
        self._types = kind.names
        names = [f'"{name}"' for name in self._fields]
        key = f'"{self._key}"'
        columns = [
            f'"{name}" {spoken(_KEY if name == self._key else each.type, dialect, self.what)}'
            for name, each in self._fields.items()
        ]
        number = spoken(_NUMBER, dialect, self.what)
        self.schema = f'create table "{self.name}" ({", ".join(columns)}, {_VERSION} {number} not null, {_GONE} {number} not null)'
        self._put = (
            f'insert into "{self.name}" ({", ".join(names)}, {_VERSION}, {_GONE}) '
            f"values ({', '.join('?' * (len(names) + 2))}) on conflict ({key}) do update set "
            f"{', '.join(f'{name} = excluded.{name}' for name in (*names, _VERSION, _GONE))} "
            f'where excluded.{_VERSION} > "{self.name}".{_VERSION}'
        )
        self._select = f'select {", ".join(names)} from "{self.name}" where {_GONE} = 0'
        self._take: Callable[[Any], Any] = attrgetter(*self._fields)
        self._single = len(self._fields) == 1
        self._writers = [(n, each.write) for n, each in enumerate(self._fields.values()) if each.write is not None]
        self._nothing = tuple(None for _ in self._fields)
        self._at = list(self._fields).index(self._key)
        told = [self.name, self.domain, kind.name, *(f"{name} {each.hint}" for name, each in self._fields.items())]
        self.fingerprint = blake2b("\0".join(told).encode(), digest_size=16).hexdigest()

    # ------------------------------------------------------------------------------------------------------ writing

    async def ready(self, entries: Sequence[Entry], fetch: Fetch) -> Sequence[Any]:
        return entries

    def runs(self, ready: Sequence[Any]) -> Iterable[Run]:
        return [(self._put, [self._row(entry) for entry in ready])]

    def blamed(self, ready: Any) -> Sequence[tuple[str, Statement]]:
        entry: Entry = ready
        try:
            row = self._row(entry)
        except Damaged:
            raise
        except CauceError as error:
            raise Failed(f"position {entry.position} ({entry.stream}): {error}") from error
        return [(f"position {entry.position} ({entry.stream})", (self._put, row))]

    def _row(self, entry: Entry) -> Row:
        entry.checked()
        if not entry.body or entry.type not in self._types:
            nothing: list[Any] = list(self._nothing)
            nothing[self._at] = entry.key
            return (*nothing, entry.version, 1)
        values = self._take(self._known.decode(entry.domain, entry.type, schema_of(entry), entry.body))
        if self._single:
            values = (values,)
        if self._writers:
            changed = list(values)
            for n, write in self._writers:
                changed[n] = write(changed[n])
            return (*changed, entry.version, 0)
        return (*values, entry.version, 0)

    # ------------------------------------------------------------------------------------------------------ reading

    def by_key(self, key: str) -> tuple[str, Row]:
        """The query for one thing."""
        return f'{self._select} and "{self._key}" = ?', (key,)

    def version_of(self, key: str) -> tuple[str, Row]:
        """The query for the version of one thing, gone or not."""
        return f'select {_VERSION} from "{self.name}" where "{self._key}" = ?', (key,)

    def equal(self, equals: Mapping[str, Any], limit: int) -> tuple[str, Row]:
        """The query for things whose fields have these values, in the order of their keys."""
        where, values = self._where(equals)
        return f'{self._select}{where} order by "{self._key}" limit ?', (*values, limit)

    def number(self, equals: Mapping[str, Any]) -> tuple[str, Row]:
        """The query that counts them."""
        where, values = self._where(equals)
        return f'select count(*) from "{self.name}" where {_GONE} = 0{where}', values

    def made(self, row: Row) -> C:
        """The copy in a row."""
        return self.copy(
            **{
                name: value if each.read is None else each.read(value)
                for (name, each), value in zip(self._fields.items(), row, strict=True)
            }
        )

    def _where(self, equals: Mapping[str, Any]) -> tuple[str, Row]:
        text, values = "", []
        for name, value in equals.items():
            column = self._fields.get(name)
            if column is None:
                raise Refused(f"{self.what} has no field {name!r}, only {', '.join(self._fields)}")
            if not column.has(value):
                text += " and false"
                continue
            # SQL compares numbers as loosely as Python does.
            values.append(value if column.write is None else column.write(value))
            text += f' and "{name}" is not distinct from ?'
        return text, tuple(values)


class _Column:
    """How the values of one field go into a column and come out; None: as they are.

    `type`: what the column is declared as. `fits`: what a value must be of to be found in it.
    """

    def __init__(self, hint: Any) -> None:
        self.hint = hint
        self.write: Callable[[Any], Any] | None = None
        self.read: Callable[[Any], Any] | None = None
        self.type = _TEXT
        self.fits: tuple[type[Any], ...] = (object,)
        kinds = [each for each in alternatives(hint) if each is not type(None)]
        plain = kinds[0] if len(kinds) == 1 else None
        if plain is str:
            self.fits = (str,)
        elif plain is float:
            self.type, self.fits, self.write = _REAL, (int, float), _real
        elif plain is bool:
            self.type, self.fits = _BIT, (int, float)
            self.write, self.read = _number, lambda value: None if value is None else bool(value)
        elif plain is int:
            self.type, self.fits = _WHOLE, (int, float)
            self.write, self.read = _number, lambda value: None if value is None else int(value)
        else:
            decode = msgspec.json.Decoder(hint).decode
            self.write, self.read = lambda value: _encode(value).decode(), lambda text: decode(text)

    def has(self, value: Any) -> bool:
        """Whether it may hold a value; another one is found nowhere, and no database need be asked."""
        return value is None or isinstance(value, self.fits)


def _number(value: Any) -> Any:
    """A number that SQLite's 64 bits cannot hold is kept as its digits."""
    return str(value) if type(value) is int and not -_BIG <= value < _BIG else value


def _real(value: Any) -> Any:
    return float(value) if type(value) is int else value
