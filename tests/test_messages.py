"""Messages: how they are declared, what is accepted, and how they look in the world outside."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import unicodedata
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Generic, TypeVar
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cauce import (
    Command,
    Damaged,
    Domain,
    Event,
    Notice,
    Query,
    Record,
    Refused,
    SystemClock,
    Unreadable,
    field,
    replace,
)
from cauce.accept import BODY_DEPTH, ENTRY_BYTES, KEY_BYTES, check_domain, check_key, check_name, check_stream, slot_of
from cauce.codec import (
    Entry,
    Meta,
    Wish,
    derive_id,
    digest,
    from_cloudevent,
    micros,
    moment,
    seal,
    sealed,
    to_cloudevent,
)
from cauce.messages import Message, declared
from cauce.schema import Schema, encode, key_of

notes = Domain("notes", key="name")


class Noted(Event, domain=notes):
    name: str
    what: Any = None


class Measured(Event, domain=notes):
    name: str
    value: float = 0.0
    many: dict[str, float] = field(default_factory=dict)


class Tight(Event, domain=notes):
    name: str
    number: int = 0
    text: str = ""
    maybe: int | None = None
    at: datetime | None = None


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int


class Rich(Event, domain=notes):
    name: str
    colour: Colour = Colour.RED
    point: Point = Point(1, 2)
    points: tuple[Point, ...] = ()
    tags: frozenset[str] = frozenset()
    id: UUID = UUID(int=7)
    raw: bytes = b""
    took: timedelta = timedelta(0)


class Determined(Event, domain=notes, name="T10 Determine necessity to stop indication", version=3):
    name: str


class Note(Command, domain=notes):
    name: str


class NoteRecord(Record, domain=notes):
    name: str


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# -------------------------------------------------------------------------------------------------- declarations


def test_the_name_and_version_of_a_type_are_data_and_no_python_path() -> None:
    kind = declared(Determined)
    assert (kind.name, kind.version, kind.kind, kind.domain) == (
        "T10 Determine necessity to stop indication",
        3,
        "event",
        notes,
    )
    entry = seal(Determined("a"), "id", Meta(0, kind.version))
    assert entry.type == "T10 Determine necessity to stop indication"
    found = Schema([Determined]).decode("notes", entry.type, 3, entry.body or b"")
    assert found == Determined("a")
    assert declared(Note("a")).kind == "command"
    assert declared(NoteRecord).kind == "record"


def test_a_message_is_frozen_and_compared_by_its_values() -> None:
    message = Tight("a", 1)
    with pytest.raises(AttributeError):
        message.number = 2  # type: ignore[misc]
    assert replace(message, number=2) == Tight("a", 2)
    assert message == Tight("a", 1)
    another: object = Measured("a", 1)
    assert Tight("a", 1) != another


def test_a_declaration_that_cannot_be_right_is_refused_by_its_name() -> None:
    keyless = Domain("keyless")
    with pytest.raises(Refused, match="Keyless.*no key"):

        class Keyless(Event, domain=keyless):
            name: str

    with pytest.raises(Refused, match="Unkeyed lacks the field 'name'"):

        class Unkeyed(Event, domain=notes):
            other: str

    with pytest.raises(Refused, match="Zeroth: version=0"):

        class Zeroth(Event, domain=notes, version=0):
            name: str

    with pytest.raises(Refused, match="Truth: version=True"):

        class Truth(Event, domain=notes, version=True):
            name: str

    with pytest.raises(Refused, match="Shapeless.*Event, Command, Query or Record"):

        class Shapeless(Message, domain=notes):
            name: str

    with pytest.raises(Refused, match="type name"):

        class Hostile(Event, domain=notes, name="a\r\nb"):
            name: str

    with pytest.raises(Refused, match="two messages named 'Noted'"):

        class Again(Event, domain=notes, name="Noted"):
            name: str

    class Asked(Query[int], domain=keyless):
        pass

    assert declared(Asked).kind == "query"


def test_a_class_without_a_domain_says_how_to_give_it_one() -> None:
    class Homeless(Event):
        name: str

    class Child(Noted):
        more: int = 0

    for cls in (Homeless, Child):
        with pytest.raises(
            Refused, match=rf"{cls.__name__} belongs to no domain: .*class {cls.__name__}\(…, domain=…\)"
        ):
            declared(cls)
        with pytest.raises(Refused, match=cls.__name__):
            encode(cls("a"))


def test_a_field_of_a_type_that_cannot_travel_is_refused_by_the_name_of_its_message() -> None:
    class Odd(Event, domain=notes):
        name: str
        what: complex = 0j

    class Odder(Event, domain=notes):
        name: str
        what: asyncio.Event | None = None

    for message in (Odd("a"), Odder("a", asyncio.Event())):
        with pytest.raises(Refused, match=type(message).__name__):
            encode(message)


def test_types_local_to_a_function_are_found_though_annotations_are_text() -> None:
    here = Domain("here", key="name")

    class Part(msgspec.Struct, frozen=True):
        size: int

    class Built(Event, domain=here):
        name: str
        parts: list[Part] = field(default_factory=list)

    built = Built("a", [Part(1)])
    assert Schema([Built]).decode("here", "Built", 1, encode(built)) == built


T = TypeVar("T")


def test_rich_field_types_come_back_as_they_went() -> None:
    message = Rich(
        "a", Colour.RED, Point(3, 4), (Point(5, 6),), frozenset({"x"}), UUID(int=9), b"\x00\xff", timedelta(2)
    )
    assert Schema([Rich]).decode("notes", "Rich", 1, encode(message)) == message


# --------------------------------------------------------------------------------------------- the acceptance rule


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (float("nan"), "Noted holds nan"),
        (float("inf"), "Noted holds inf"),
        ([1, {"a": -float("inf")}], "Noted holds -inf"),
        ({float("nan"): 1}, "Noted holds nan"),
        ("a\0b", "Noted holds a NUL"),
        ({"a\0b": 1}, "Noted holds a NUL"),
        ([{"deep": {"er": "\0"}}], "Noted holds a NUL"),
        ("\ud800", "Noted"),
        ({"\udfff": 1}, "Noted"),
        (["a", ("b", {"c": "\ud83d"})], "Noted"),
        (nested(BODY_DEPTH), "Noted is nested"),
        (nested(1_000), "Noted is nested"),
        (nested(100_000), "Noted is nested"),
        ("x" * ENTRY_BYTES, "Noted is 750,0.. bytes: at most 750,000"),
        (object(), "Noted cannot be written"),
        (1j, "Noted cannot be written"),
        ({(1, 2): 3}, "Noted cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 and value.isprintable() else "",
)
def test_what_not_every_backend_could_give_back_is_refused_with_the_name_of_the_message(what: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        encode(Noted("a", what))


def test_what_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(Refused, match="Noted is nested"):
        encode(Noted("a", endless))


@pytest.mark.parametrize(
    "what",
    [
        None,
        True,
        0,
        -1,
        2**53 + 1,
        2**64,
        -(2**63) - 1,
        10**300,
        1.5,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        "",
        "\\u0000",
        "\u2028 \u0085 é 😀 \x7f \x1b[31m",
        "\ufeff\ufffe",
        nested(BODY_DEPTH - 1),
        {"": {"a.b": [1, "2", None, {}, []]}},
        list(range(100)),
        [[]] * 100,
    ],
    ids=repr,
)
def test_whatever_is_accepted_comes_back_the_same(what: Any) -> None:
    message = Noted("a", what)
    again = Schema([Noted]).decode("notes", "Noted", 1, encode(message))
    assert again == message
    assert isinstance(again, Noted)
    assert repr(again.what) == repr(what)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(json_values)
@settings(max_examples=100, deadline=None)
def test_any_value_is_either_refused_or_comes_back_the_same(value: Any) -> None:
    message = Noted("a", value)
    try:
        body = encode(message)
    except Refused:
        return
    assert Schema([Noted]).decode("notes", "Noted", 1, body) == message
    assert json.loads(body) == {"name": "a", "what": value}
    assert b"\\u0000" not in body or "\\u0000" in repr(value)


@pytest.mark.parametrize(
    "message",
    [
        Tight("a", "7"),  # type: ignore[arg-type]
        Tight("a", None),  # type: ignore[arg-type]
        Tight("a", float("nan")),  # type: ignore[arg-type]
        Tight("a", 1.5),  # type: ignore[arg-type]
        Tight("a", 1, None),  # type: ignore[arg-type]
        Tight("a", 1, b"x\xff", "3"),  # type: ignore[arg-type]
        Tight("a", 1, "", "3"),  # type: ignore[arg-type]
        Tight("a", 1, "", None, "yesterday"),  # type: ignore[arg-type]
        Measured("a", "1"),  # type: ignore[arg-type]
        Measured("a", 1.0, [1.0]),  # type: ignore[arg-type]
        Rich("a", "blue"),  # type: ignore[arg-type]
        Rich("a", Colour.RED, Tight("b")),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_a_value_that_its_own_class_could_not_read_again_is_refused(message: Message) -> None:
    with pytest.raises(Refused, match=f"{type(message).__name__} holds a value that its type does not allow"):
        encode(message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_without_end_is_refused_wherever_it_stands(value: float) -> None:
    for message in (Measured("a", value), Measured("a", 0.0, {"x": value})):
        with pytest.raises(Refused, match=f"Measured holds {value}"):
            encode(message)


def test_size_is_that_of_body_wish_and_envelope_together() -> None:
    body = encode(Noted("a", "x" * (ENTRY_BYTES - 100)))
    with pytest.raises(Refused, match="Noted for notes/a .*750,000"):
        sealed("notes/a", "Noted", "id", Meta(0, by="y" * 100), body)
    with pytest.raises(Refused, match="Noted for notes/a .*750,000"):
        sealed("notes/a", "Noted", "id", Meta(0), body, b"z" * 100)
    assert sealed("notes/a", "Noted", "id", Meta(0), body).body == body


# ------------------------------------------------------------------------------------------------ names and keys


@pytest.mark.parametrize(
    "key",
    [
        "",
        "\0",
        "a\nb",
        "a\r\nb",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\ud800",
        "x" * (KEY_BYTES + 1),
        "é" * (KEY_BYTES // 2 + 1),
    ],
    ids=ascii,
)
def test_a_key_that_not_every_backend_could_keep_is_refused(key: str) -> None:
    with pytest.raises(Refused, match="key"):
        check_key(key)
    with pytest.raises(Refused, match="key"):
        key_of(Noted(key))


@pytest.mark.parametrize("key", [7, None, b"a", 1.5, True, ["a"], type("S", (str,), {})("a")], ids=repr)
def test_a_key_that_is_no_text_is_refused(key: Any) -> None:
    with pytest.raises(Refused, match="text"):
        key_of(Noted(key))


def test_of_two_keys_that_look_the_same_only_the_composed_form_is_taken() -> None:
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    assert composed != decomposed
    assert check_key(composed) == composed
    with pytest.raises(Refused, match="NFC"):
        check_key(decomposed)
    with pytest.raises(Refused, match="NFC"):
        check_name(decomposed)


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "*", ">", "a.b", "a/b", " a ", "%2e", "a\u2028b", "😀", "$x", "'; --", "~"]
)
def test_a_hostile_key_is_a_name_like_any_other_and_collides_with_none(key: str) -> None:
    entry = seal(Noted(key), "id", Meta(0))
    assert (entry.domain, entry.key) == ("notes", key)
    assert check_stream(entry.stream) == f"notes/{key}"
    assert 0 <= slot_of(key) < 16
    again = from_cloudevent(msgspec.json.encode(to_cloudevent(entry)))
    assert again.key == key


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_text_is_either_no_key_or_kept_as_it_is(key: str) -> None:
    try:
        check_key(key)
    except Refused:
        return
    assert unicodedata.normalize("NFC", key) == key
    assert 0 < len(key.encode()) <= KEY_BYTES
    entry = seal(Noted(key), "id", Meta(0))
    assert entry.key == key


@pytest.mark.parametrize(
    "name",
    ["", "Users", "1a", "_users", "-a", "a/b", "a.b", "a*", "a>", "a b", "../a", "é", "a\n", "a" * 64, None, 7, b"a"],
)
def test_a_domain_whose_name_would_not_fit_everywhere_is_refused(name: Any) -> None:
    with pytest.raises(Refused, match="domain name"):
        check_domain(name)
    with pytest.raises(Refused, match="domain name"):
        Domain(name)


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "a\0", "\ud800", "x" * 129, "é" * 65, None, 7])
def test_a_type_name_that_is_no_line_of_text_is_refused(name: Any) -> None:
    with pytest.raises(Refused, match="type name"):
        check_name(name)


@pytest.mark.parametrize("stream", ["", "users", "/42", "users/", "Users/42", "__x/42", "users/a\0", "u s/1", "_/1"])
def test_a_stream_is_written_as_domain_and_key(stream: str) -> None:
    with pytest.raises(Refused):
        check_stream(stream)


def test_the_slot_of_a_key_never_changes() -> None:
    assert [slot_of(key) for key in ("42", "a", "é", "😀")] == [8, 3, 14, 4]


# ------------------------------------------------------------------------------------------------ reading again


def test_what_a_program_does_not_know_is_told_with_the_cure() -> None:
    schema = Schema([Noted, Determined])
    assert schema.knows("notes", "Noted")
    assert not schema.knows("notes", "Nodded")
    assert not schema.knows("others", "Noted")
    with pytest.raises(Unreadable, match="notes .*'Nodded'.*load"):
        schema.decode("notes", "Nodded", 1, b"{}")
    with pytest.raises(Unreadable, match="Noted of notes .*version 2.*knows 1.*deploy"):
        schema.decode("notes", "Noted", 2, b'{"name":"a"}')
    assert schema.decode("notes", declared(Determined).name, 1, b'{"name":"a"}') == Determined("a")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"[]", b"null", b"{}", b'{"name":7}', b'{"name":"\xff"}', b'{"name":"\\ud800"}', b"\xff\xfe",
     b'{"name":"a","what":' + b"[" * 100_000, b'{"name":"a","what":NaN}', b'{"name":"a"} x'],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_broken_bytes_are_unreadable_and_name_their_type(body: bytes) -> None:
    with pytest.raises(Unreadable, match="Noted of notes"):
        Schema([Noted]).decode("notes", "Noted", 1, body)


def test_fields_that_came_later_have_their_default_and_unknown_ones_are_passed_over() -> None:
    assert Schema([Tight]).decode("notes", "Tight", 1, b'{"name":"a","from":"the future"}') == Tight("a")


# ------------------------------------------------------------------------------------------------ the envelope


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)
keys = texts.map(lambda text: unicodedata.normalize("NFC", text)).filter(bool)
names = (
    keys.map(str.strip)
    .filter(lambda text: text and len(text.encode()) <= 128)
    .filter(lambda text: text == text.strip())
)
times = st.integers(0, 253_402_300_799_999_999)
metas = st.builds(
    Meta, time=times, schema=st.integers(1, 2**31 - 1), correlation=texts, causation=texts, by=texts,
    trace=st.just("") | st.just("00-" + "a" * 32 + "-" + "b" * 16 + "-01"), tracestate=texts,
    expires=times, verdict=texts, upto=st.integers(0, 2**63 - 1), again=st.booleans(), fold=texts,
)  # fmt: skip
wishes = st.none() | st.builds(
    lambda body: msgspec.json.encode(Wish("Note", msgspec.Raw(encode(Noted("a", body))))), texts
)


@st.composite
def stored(draw: st.DrawFn) -> Entry:
    what = draw(json_values)
    try:
        body = encode(Noted("a", what))
    except Refused:
        body = b""
    entry = sealed(f"notes/{draw(keys)}", draw(names), draw(names), draw(metas), body, draw(wishes))
    version = draw(st.integers(1, 2**63 - 1))
    return msgspec.structs.replace(
        entry, position=draw(st.integers(1, 2**63 - 1)), version=version, digest=digest(entry, version)
    )


@given(stored())
@settings(max_examples=100, deadline=None)
def test_an_entry_maps_one_to_one_onto_a_cloudevent(entry: Entry) -> None:
    text = msgspec.json.encode(to_cloudevent(entry))
    again = from_cloudevent(text)
    assert again == msgspec.structs.replace(entry, raw=again.raw)
    # An entry says nothing twice, so a correlation that is its own id is left out.
    assert again.meta == entry.meta or entry.meta.correlation == entry.id
    assert again.correlation == entry.correlation
    if entry.meta.correlation != entry.id:
        assert again.checked() == again


@given(stored())
@settings(max_examples=50, deadline=None)
def test_a_cloudevent_has_the_attributes_that_the_standard_asks_for(entry: Entry) -> None:
    event = json.loads(msgspec.json.encode(to_cloudevent(entry)))
    for required in ("specversion", "id", "source", "type"):
        assert event[required]
        assert isinstance(event[required], str)
    for name, value in event.items():
        assert name == "data" or (name.isascii() and name.isalnum() and name == name.lower() and len(name) <= 20)
        assert name == "data" or type(value) is not int or -(2**31) <= value < 2**31
    assert datetime.fromisoformat(event["time"]).tzinfo is not None


@pytest.mark.parametrize(
    "change",
    [
        {"specversion": "0.3"},
        {"source": "notes"},
        {"source": "/No tes"},
        {"source": "/../x"},
        {"subject": ""},
        {"subject": "a\0b"},
        {"subject": "e\u0301"},
        {"type": ""},
        {"type": "a\r\nb"},
        {"time": "yesterday"},
        {"time": "2026-01-01T00:00:00"},
        {"traceparent": "00-xyz"},
        {"digest": "xyz"},
        {"wish": "not base64!"},
        {"schemaversion": "many"},
        {"streamversion": -1},
        {"position": 2**64},
        {"data": {"a": "\0"}},
        {"data": nested(100)},
        {"id": "\ud800"},
        {"id": None},
    ],
    ids=ascii,
)
def test_a_cloudevent_that_is_none_or_breaks_the_rule_is_refused(change: dict[str, Any]) -> None:
    event = json.loads(msgspec.json.encode(to_cloudevent(seal(Noted("a", 1), "id", Meta(0)))))
    text = json.dumps(event | change)
    with pytest.raises(Refused):
        from_cloudevent(text)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff", b"null", b"[" * 100_000, b'{"specversion":"1.0"}'], ids=lambda b: repr(b[:9])
)
def test_what_is_no_cloudevent_is_refused(text: bytes) -> None:
    with pytest.raises(Refused):
        from_cloudevent(text)


def test_times_keep_their_microsecond_and_need_a_zone() -> None:
    for time in (0, 1, 999_999, 1_767_225_600_123_457, 253_402_300_799_999_999, -1):
        assert micros(moment(time)) == time
    with pytest.raises(Refused, match="time zone"):
        micros(datetime(2026, 1, 1))  # noqa: DTZ001 - that is the mistake
    east = datetime(2026, 1, 1, 2, tzinfo=UTC).astimezone()
    assert micros(east) == micros(datetime(2026, 1, 1, 2, tzinfo=UTC))


# ------------------------------------------------------------------------------------------------------- digest


def test_the_digest_finds_every_single_flipped_bit_of_envelope_wish_and_body() -> None:
    entry = seal(
        Noted("é", {"n": 1}), "0190-id", Meta(1_767_225_600_000_000, 2, by="joe", trace="t"), b'{"type":"Note"}'
    )
    entry = msgspec.structs.replace(entry, version=3, digest=digest(entry, 3))
    assert entry.checked() is entry
    flips = 0
    for name in ("stream", "type", "id", "raw", "wish", "body"):
        value = getattr(entry, name)
        data = value.encode() if isinstance(value, str) else value
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            # As from a damaged file: SQLite gives text that is no UTF-8 with the bytes that it found.
            other = bytes(flipped).decode(errors="surrogateescape") if isinstance(value, str) else bytes(flipped)
            with pytest.raises(Damaged, match="position"):
                msgspec.structs.replace(entry, **{name: other}).checked()
            flips += 1
    for bit in range(63):
        with pytest.raises(Damaged):
            msgspec.structs.replace(entry, version=entry.version ^ (1 << bit)).checked()
    for bit in range(32):
        with pytest.raises(Damaged):
            msgspec.structs.replace(entry, digest=entry.digest ^ (1 << bit)).checked()
    assert flips > 900


@pytest.mark.parametrize(
    "change", [{"body": None}, {"body": "text"}, {"body": 7}, {"wish": 7}, {"raw": "{}"}, {"raw": None}]
)
def test_damage_that_changes_the_kind_of_a_value_is_damage_too(change: dict[str, Any]) -> None:
    entry = seal(Noted("a", 1), "id", Meta(0), b"{}")
    entry = msgspec.structs.replace(entry, version=1, digest=digest(entry, 1))
    with pytest.raises(Damaged):
        msgspec.structs.replace(entry, **change).checked()


def test_what_moves_between_the_parts_of_an_envelope_changes_the_digest() -> None:
    one = Entry(0, "notes/a", 0, "b", "c", b"{}", None, b"{}", 0)
    others = (
        msgspec.structs.replace(one, stream="notes/ab", type=""),
        msgspec.structs.replace(one, raw=b"{}{}", body=b""),
        msgspec.structs.replace(one, raw=b"", wish=b"{}"),
    )
    assert len({digest(each, 1) for each in (one, *others)}) == 4


def test_an_envelope_that_cannot_be_read_is_damaged_and_named() -> None:
    for raw in (b"", b"{", b'{"time":"x"}', b"\xff", b"[]"):
        with pytest.raises(Damaged, match=r"position 7 \(notes/a\)"):
            _ = Entry(7, "notes/a", 1, "Noted", "id", raw, None, b"{}", 0).meta


# ---------------------------------------------------------------------------------------------------------- ids


def test_a_derived_id_is_always_the_same_and_keeps_the_time_of_its_cause_in_front() -> None:
    cause = SystemClock().id()
    derived = derive_id(cause, "mails", "welcome", "users/42", "1")
    assert derived == derive_id(cause, "mails", "welcome", "users/42", "1")
    assert UUID(derived).version == 8
    assert derived[:13] == cause[:13]
    other_causes = [derive_id(SystemClock().id(), "mails", "welcome", "users/42", "1") for _ in range(3)]
    assert len({derived, *other_causes}) == 4


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.lists(st.text(max_size=5), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_two_derived_ids_are_the_same_only_if_all_their_parts_are(one: list[str], two: list[str]) -> None:
    cause = "01936b3f-8a5c-7000-8000-000000000000"
    plain = [[part.replace("\0", "") for part in parts] for parts in (one, two)]
    assert (derive_id(cause, *plain[0]) == derive_id(cause, *plain[1])) == (plain[0] == plain[1])


def test_fresh_ids_rise_and_are_uuids_of_version_7() -> None:
    clock = SystemClock()
    ids = [clock.id() for _ in range(5_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {UUID(id).version for id in ids} == {7}


def test_a_notice_is_thin() -> None:
    assert Notice.__struct_fields__ == ("type", "key", "version")
    assert issubclass(Notice, Generic)
