"""The golden corpus: a folder to commit, with the JSON Schema of each type and version, and bodies that were stored.

What was locked once is never written again: a diff of the folder shows new files, and the index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from cauce.errors import Refused

__all__ = ["Corpus", "Draft", "Locked", "read", "write"]

_INDEX = "index.json"
_FORMAT = 1
_STRANGE = re.compile(r'[\x00-\x1f\x7f/\\%:*?"<>|]|^\.')
_encode = msgspec.json.Encoder(order="sorted").encode


class Locked(msgspec.Struct, frozen=True):
    """One type in one version, with the digests of its files. Without a schema: met on a bus only."""

    domain: str
    type: str
    version: int
    kind: str
    samples: str
    schema: str = ""

    @property
    def name(self) -> str:
        """As it is told."""
        return f"{self.domain}/{self.type} version {self.version}"

    @property
    def stem(self) -> str:
        """The beginning of the names of its files."""
        return f"{self.domain}/{_STRANGE.sub(lambda found: f'%{ord(found[0]):02X}', self.type)}.{self.version}"

    @property
    def files(self) -> dict[str, str]:
        """The digests of its files, by name."""
        found = {f"{self.stem}.samples.jsonl": self.samples}
        return found | ({f"{self.stem}.schema.json": self.schema} if self.schema else {})


class Draft(msgspec.Struct, frozen=True):
    """What is to be locked."""

    domain: str
    type: str
    version: int
    kind: str
    schema: dict[str, Any] | None
    samples: Sequence[bytes]


class _Index(msgspec.Struct, frozen=True):
    format: int
    digest: str
    types: tuple[Locked, ...]


class Corpus:
    """A folder as it was read.

    `wrong`: what is not as it was locked, in sentences. `unknown`: files that were not locked. `is_there`: whether it
    has an index.
    """

    def __init__(
        self, folder: Path, rows: Sequence[Locked], wrong: Sequence[str], unknown: Sequence[str], is_there: bool
    ) -> None:
        self.folder, self.rows, self.wrong, self.is_there = folder, tuple(rows), tuple(wrong), is_there
        self.unknown = tuple(unknown)

    def of(self, domain: str, type: str, version: int) -> Locked | None:
        """What was locked under a name and version."""
        return next((row for row in self.rows if (row.domain, row.type, row.version) == (domain, type, version)), None)

    def schema(self, row: Locked) -> dict[str, Any] | None:
        """The description of a type in that version, as `cauce.compatible` makes it."""
        if not row.schema:
            return None
        found: dict[str, Any] = msgspec.json.decode((self.folder / f"{row.stem}.schema.json").read_bytes())
        return {key: value for key, value in found.items() if key not in {"$schema", "$comment"}}

    def samples(self, row: Locked) -> list[bytes]:
        """The bodies, as they were stored."""
        return (self.folder / f"{row.stem}.samples.jsonl").read_bytes().splitlines()


def read(folder: Path) -> Corpus:
    """A folder, with each file compared with its digest. Rows whose files are not whole are left out."""
    path, there = folder / _INDEX, _files(folder)
    if _INDEX not in there:
        return Corpus(
            folder, (), [f"{path} is not there: run cauce schema lock, and commit what it writes"], there, False
        )
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        return Corpus(folder, (), [f"{path} cannot be read: {error}: take it back from version control"], (), True)
    if index.format != _FORMAT:
        return Corpus(folder, (), [f"{path} is of format {index.format}, this program knows {_FORMAT}"], (), True)
    wrong = [] if index.digest == _digest(_encode(index.types)) else [_edited(path)]
    rows = []
    for row in index.types:
        bad = [found for name, digest in row.files.items() if (found := _compared(folder / name, digest))]
        wrong += bad
        if not bad:
            rows.append(row)
    known = {_INDEX, *(name for row in index.types for name in row.files)}
    return Corpus(folder, rows, wrong, [name for name in there if name not in known], True)


def write(corpus: Corpus, drafts: Iterable[Draft]) -> list[Locked]:
    """Add types to a folder that is as it was locked. The index comes last, so what fails half-way can be run again.

    Raises `Refused` for a folder that is not as it was locked, and where it takes no files.
    """
    drafts, rows = list(drafts), list[Locked]()
    _check_clean(corpus, drafts)
    try:
        for draft in drafts:
            files = _files_of(draft)
            row = _row(draft, _digest(files[0]), _digest(files[1]) if files[1] else "")
            rows.append(row)
            for name in row.files:
                path = corpus.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _replace(path, files[0] if name.endswith(".jsonl") else files[1])
        types = tuple(sorted((*corpus.rows, *rows), key=lambda row: (row.domain, row.type, row.version)))
        corpus.folder.mkdir(parents=True, exist_ok=True)
        _replace(corpus.folder / _INDEX, _readable(_Index(_FORMAT, _digest(_encode(types)), types)))
    except OSError as error:
        raise Refused(
            f"{corpus.folder} takes no files: {error}: name a folder that you may write, with --folder"
        ) from None
    return rows


def _check_clean(corpus: Corpus, drafts: Sequence[Draft]) -> None:
    if corpus.wrong and corpus.is_there:
        raise Refused(f"{corpus.wrong[0]}; nothing was locked")
    mine = {name for each in drafts for name in _row(each, "", "-").files}
    # What a run left behind that was killed before it wrote the index is written again.
    for name in corpus.unknown:
        if name not in mine:
            raise Refused(
                f"{corpus.folder / name} was not locked: remove it, or name another folder; nothing was locked"
            )


def _row(draft: Draft, samples: str, schema: str) -> Locked:
    return Locked(draft.domain, draft.type, draft.version, draft.kind, samples, schema)


def _files_of(draft: Draft) -> tuple[bytes, bytes]:
    lines = b"".join(each + b"\n" for each in draft.samples)
    if draft.schema is None:
        return lines, b""
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"{draft.kind} {draft.type} of {draft.domain}, version {draft.version}",
    }
    return lines, _readable(about | draft.schema)


def _readable(value: Any) -> bytes:
    return msgspec.json.format(_encode(value), indent=2) + b"\n"


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(data)
    os.replace(beside, path)


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _compared(path: Path, digest: str) -> str:
    """What is wrong with a file, or nothing."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return f"{path} is missing: take it back from version control"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return "" if _digest(data) == digest else _edited(path)


def _edited(path: Path) -> str:
    return f"{path} is not as it was locked, so somebody edited it: take it back from version control"


def _files(folder: Path) -> list[str]:
    """Its files but hidden ones, which belong to editors and version control."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
