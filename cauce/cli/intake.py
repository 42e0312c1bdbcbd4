"""From lines of a file to entries: each is accepted or refused by the line, before it is written."""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Any

import msgspec

from cauce.accept import ENTRY_BYTES, check_body, check_domain, check_key, check_name, decode_value
from cauce.clock import uuid7
from cauce.codec import Entry, Meta, derive_id, micros, sealed
from cauce.errors import Refused

__all__ = ["LINE_BYTES", "Fields", "Intake"]

LINE_BYTES = ENTRY_BYTES + 2
"""What is read of a line before it is too long, with its line break."""


class Fields(msgspec.Struct, frozen=True):
    """Which fields of an object hold the key, the type and the time of its event."""

    key: str
    type: str
    time: str


class Intake:
    """One file on its way into one domain. The n-th line of a key becomes version n of its stream.

    An entry's id follows from its time, domain, key and n, so that the same file gives the same entries again.

    Parameters:
        name: of the file, for errors.
        service: as whom it is brought, kept in `by`.
    """

    def __init__(self, name: str, domain: str, fields: Fields, service: str) -> None:
        self._name, self._fields = name, fields
        self.domain = check_domain(domain)
        try:
            self.service = check_name(service)
        except Refused:
            raise Refused(
                f"service name {service!r}: give --as the name of the service that owns the domain, without spaces around it"
            ) from None
        self._versions: dict[str, int] = {}
        self.line = 0
        self.events = 0

    @property
    def streams(self) -> int:
        """How many keys were met."""
        return len(self._versions)

    def take(self, line: bytes) -> tuple[Entry, int] | None:
        """The entry of the next line and the version it has to get; None for an empty line.

        Raises `Refused` with file and line for what the acceptance rule does not take.
        """
        self.line += 1
        try:
            body = line.strip()
            if not body:
                return None
            entry, version = self._entry(body)
        except Refused as refused:
            raise self.refused(self.line, str(refused)) from None
        self.events += 1
        return entry, version

    def refused(self, line: int, why: str) -> Refused:
        """An error that says where."""
        return Refused(f"{self._name} line {line}: {why}")

    def _entry(self, body: bytes) -> tuple[Entry, int]:
        if len(body) > ENTRY_BYTES:
            raise Refused(f"it is longer than {ENTRY_BYTES:,} bytes: keep large things elsewhere and write their name")
        if body.startswith(b"\xef\xbb\xbf"):
            raise Refused("it begins with a byte order mark: save the file as UTF-8 without one")
        value = decode_value(body, "it")
        if not isinstance(value, dict):
            raise Refused(f"it is {_kind(value)}, not an object: write one JSON object a line")
        check_body(body, "it")
        key, type, time = self._text(value, self._fields.key), self._text(value, self._fields.type), self._time(value)
        for check, field, text in ((check_key, self._fields.key, key), (check_name, self._fields.type, type)):
            if not text.isascii() and not unicodedata.is_normalized("NFC", text):
                raise Refused(
                    f"field {field!r}: {text!r} is not in Unicode's NFC form: bring the file into it, as uconv -x nfc does"
                )
            try:
                check(text)
            except Refused as refused:
                raise Refused(f"field {field!r}: {refused}") from None
        version = self._versions.get(key, 0) + 1
        # The first 48 bits of the id are the event's own time in milliseconds, so that the index of ids stays cheap.
        cause = uuid7(max(0, time // 1000) << 12, 0)
        id = derive_id(cause, self.domain, key, str(version))
        entry = sealed(f"{self.domain}/{key}", type, id, Meta(time, by=self.service), body)
        self._versions[key] = version
        return entry, version

    def _text(self, value: dict[str, Any], field: str) -> str:
        found = value.get(field)
        if found is None:
            raise Refused(
                f"field {field!r} is missing; it has {', '.join(map(repr, value)) or 'none'}: name another, or mend the line"
            )
        if not isinstance(found, str):
            raise Refused(f"field {field!r} is {_kind(found)}, not text: write it in quotes")
        return found

    def _time(self, value: dict[str, Any]) -> int:
        field = self._fields.time
        text = self._text(value, field)
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            raise Refused(f"field {field!r}: {text!r} is no time: write it as 2010-10-02T09:20:39.266+02:00") from None
        if when.tzinfo is None:
            raise Refused(f"field {field!r}: {text!r} has no time zone: write one behind it, +02:00 or Z for UTC")
        try:
            return micros(when)
        except Refused as refused:
            raise Refused(f"field {field!r}: {refused}") from None


def _kind(value: Any) -> str:
    words = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return words[type(value)]
