"""What messages look like is locked in a folder, and no change that somebody cannot read passes the check unseen."""

# mypy: disable-error-code="valid-type"

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pytest
from click.testing import CliRunner, Result

from cauce import Domain, Event, Service, connect, field
from cauce.cli import main
from cauce.codec import Meta, seal
from cauce.compatible import changes, described
from cauce.messages import Message
from cauce.reader import readers
from cauce.sample import samples
from cauce.schema import Schema
from cauce.service import bound_parts

LIBRARY = Path(__file__).parent.parent / "examples" / "library"
_numbers = itertools.count(1)

HEAD = """
from __future__ import annotations
from typing import Any
from cauce import Command, Context, Copy, Domain, Event, Query, Record, Service, Store, replace, upcast

users = Domain("users", key="user_id")
service = Service("users", owns=users)
"""
USER = """
class User(Record, domain=users):
    user_id: str
    name: str

@service.evolve
def joined(user: User | None, event: Joined) -> User:
    return User(event.user_id, event.name)
"""
ONE = (
    HEAD
    + """
class Joined(Event, domain=users):
    user_id: str
    name: str
    age: int = 0
"""
    + USER
)


class World:
    """A folder with modules and their lock folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock_folder = folder, folder / "schema"
        self.names: list[str] = []

    def module(self, text: str) -> str:
        """A module that nobody imported before."""
        name = f"declared_{next(_numbers)}"
        (self.folder / f"{name}.py").write_text(text)
        self.names.append(name)
        return name

    def lock(self, text: str, *more: str) -> Result:
        return self._run("lock", self.module(text), *more)

    def check(self, text: str, *more: str) -> Result:
        return self._run("check", self.module(text), *more)

    def findings(self, text: str, *more: str) -> list[dict[str, Any]]:
        """What a check finds; its exit code says the same."""
        result = self.check(text, "--json", *more)
        report = json.loads(result.stdout)
        found: list[dict[str, Any]] = report["findings"]
        assert (result.exit_code, report["compatible"]) == ((6, False) if found else (0, True))
        return found

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.lock_folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.lock_folder).as_posix(): path.read_bytes() for path in paths}

    @staticmethod
    def _run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["schema", *arguments], catch_exceptions=False)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = World(tmp_path)
    yield found
    for name in found.names:
        sys.modules.pop(name, None)


def locked(world: World, text: str = ONE, *more: str) -> None:
    result = world.lock(text, *more)
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------------------ the lock


def test_a_lock_is_one_schema_and_the_samples_of_each_type_and_version(world: World) -> None:
    result = world.lock(ONE, "--json")
    assert [(each["type"], each["version"], each["samples"]) for each in json.loads(result.stdout)["locked"]] == [
        ("Joined", 1, 3),
        ("User", 1, 3),
    ]
    files = world.files()
    assert sorted(files) == [
        "index.json",
        "users/Joined.1.samples.jsonl",
        "users/Joined.1.schema.json",
        "users/User.1.samples.jsonl",
        "users/User.1.schema.json",
    ]
    schema = json.loads(files["users/Joined.1.schema.json"])
    assert schema["$comment"] == "event Joined of users, version 1"
    assert schema["properties"]["age"] == {"type": "integer", "default": 0}
    assert schema["required"] == ["name", "user_id"]
    assert world.findings(ONE) == []


def test_what_was_locked_is_never_written_again(world: World) -> None:
    locked(world)
    before = world.files()
    assert "has all of it already" in world.lock(ONE).output
    assert world.files() == before
    locked(world, ONE.replace("Joined(Event, domain=users)", "Joined(Event, domain=users, version=2)"))
    after = world.files()
    assert set(after) - set(before) == {"users/Joined.2.samples.jsonl", "users/Joined.2.schema.json"}
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: data for name, data in before.items() if name != "index.json"
    }


def test_comments_names_of_classes_and_the_order_of_fields_change_no_schema(world: World) -> None:
    class Inner(msgspec.Struct):
        """Once."""

        a: int

    class Renamed(msgspec.Struct):
        a: int

    def declare(inner: type, turned: bool) -> type[Message]:
        things = Domain("things", key="name")
        first: type[Message]
        if turned:

            class Made(Event, domain=things):
                """Made."""

                parts: list[inner]
                name: str

            first = Made
        else:

            class Built(Event, domain=things, name="Made"):
                name: str
                parts: list[inner]

            first = Built
        return first

    assert described(declare(Inner, False)) == described(declare(Renamed, True))


def test_a_lock_refuses_fields_that_changed_without_a_new_version(world: World) -> None:
    locked(world)
    before = world.files()
    result = world.lock(ONE.replace("age: int = 0", "age: str = ''"))
    assert result.exit_code == 1
    assert "users/Joined version 1 is locked, and its fields changed: say version=2" in result.output
    assert world.files() == before


def test_a_lock_that_was_killed_before_its_index_is_made_by_the_next_one(world: World) -> None:
    locked(world)
    whole = world.files()
    (world.lock_folder / "index.json").unlink()
    (world.lock_folder / "users" / ".User.1.schema.json.new").write_text("{")
    (world.lock_folder / "users" / "Joined.1.schema.json").write_text("{")
    locked(world)
    assert {name: data for name, data in world.files().items() if not name.endswith(".new")} == whole
    assert world.findings(ONE) == []


def test_two_branches_that_both_locked_are_joined_by_another_lock(world: World) -> None:
    locked(world)
    mine = (world.lock_folder / "index.json").read_bytes()
    locked(world, version(ONE, 2))
    whole = world.files()
    (world.lock_folder / "index.json").write_bytes(mine)
    assert any("was not locked" in each["what"] for each in world.findings(version(ONE, 2)))
    locked(world, version(ONE, 2))
    assert world.files() == whole


@pytest.mark.parametrize("text", ["x = 1", "from cauce import Domain\nempty = Domain('empty')"])
def test_a_module_without_messages_is_refused(world: World, text: str) -> None:
    for result in (world.lock(text), world.check(text)):
        assert result.exit_code == 1
        assert "declares no messages" in result.output
    assert world.files() == {}


def test_a_module_that_is_not_there_is_refused(world: World) -> None:
    for name, why in (
        ("nowhere", "there is no module 'nowhere'"),
        ("a/b.py", "write a.b"),
        ("shop:service", "write shop"),
    ):
        result = CliRunner().invoke(main, ["schema", "check", name])
        assert (result.exit_code, why in result.output) == (1, True)


# ------------------------------------------------------------------------------------------------ a damaged folder


def _edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"string", b"number"))


@pytest.mark.parametrize(
    ("harm", "why", "repaired"),
    [
        (lambda at: _edit(at / "users/User.1.schema.json"), "somebody edited it", False),
        (lambda at: (at / "users/User.1.samples.jsonl").write_bytes(b"{}\n"), "somebody edited it", False),
        (lambda at: (at / "users/User.1.samples.jsonl").unlink(), "is missing", False),
        (lambda at: (at / "users/Extra.1.schema.json").write_text("{}"), "was not locked", False),
        (lambda at: _edit_index(at), "somebody edited it", False),
        (lambda at: (at / "index.json").write_text("nonsense"), "cannot be read", False),
        (lambda at: (at / "index.json").write_text('{"format":9,"digest":"","types":[]}'), "of format 9", False),
        (lambda at: (at / "index.json").unlink(), "is not there: run cauce schema lock", True),
        (lambda at: shutil.rmtree(at), "is not there: run cauce schema lock", True),
    ],
)
def test_a_lock_that_is_missing_or_was_edited_is_found_and_not_written_over(
    world: World, harm: Any, why: str, repaired: bool
) -> None:
    locked(world)
    whole = world.files()
    harm(world.lock_folder)
    harmed = world.files()
    assert any(why in each["what"] for each in world.findings(ONE))
    result = world.lock(ONE)
    if repaired:
        assert (result.exit_code, world.files()) == (0, whole)
    else:
        assert (result.exit_code, world.files()) == (1, harmed)
        assert why in result.output


def _edit_index(folder: Path) -> None:
    """Take a type out, as if it had never been locked."""
    index = json.loads((folder / "index.json").read_text())
    index["types"] = [each for each in index["types"] if each["type"] != "User"]
    (folder / "index.json").write_text(json.dumps(index))
    for path in folder.glob("users/User.*"):
        path.unlink()


# ------------------------------------------------------------------------------------------------ incompatible changes


def version(text: str, number: int, name: str = "Joined") -> str:
    return text.replace(f"{name}(Event, domain=users)", f"{name}(Event, domain=users, version={number})")


def only(found: list[dict[str, Any]]) -> dict[str, Any]:
    (one,) = found
    return one


def test_a_field_that_was_added_asks_for_a_new_version_only(world: World) -> None:
    locked(world)
    more = ONE.replace("    age: int = 0", "    age: int = 0\n    city: str = ''")
    found = only(world.findings(more))
    assert (found["type"], found["field"]) == ("Joined", "city")
    assert found["what"] == "is new, with a default, but the version was not raised: say version=2"
    assert only(world.findings(version(more, 2)))["what"].startswith("is not locked: run cauce schema lock")
    locked(world, version(more, 2))
    assert world.findings(version(more, 2)) == []


def test_a_new_required_field_needs_an_upcaster(world: World) -> None:
    locked(world)
    more = version(ONE.replace("    name: str\n    age", "    name: str\n    city: str\n    age"), 2)
    found = [each for each in world.findings(more) if each["field"] == "city"]
    assert [each["what"] for each in found] == [
        "is new, and required, and nothing lifts older bodies: add @upcast(Joined, from_version=1)"
    ]
    lifted = (
        more + "\n@upcast(Joined, from_version=1)\ndef anywhere(body: Any) -> Any:\n    return body | {'city': ''}\n"
    )
    locked(world, lifted)
    assert world.findings(lifted) == []


READERS = """
class Renamed(Event, domain=users):
    user_id: str
    name: str

class Rename(Command, domain=users):
    user_id: str
    name: str

@service.decide
def rename(user: User, command: Rename) -> Renamed:
    return Renamed(command.user_id, command.name)

@service.evolve
def renamed(user: User, event: Renamed) -> User:
    return replace(user, name=event.name)

other = Service("other")

class Card(Copy, of=User):
    user_id: str
    name: str

other.replica(Card)

@other.view("names", schema="create table names (name text)")
def view_name(event: Joined | Renamed, db: Store) -> None:
    db.execute("insert into names values (?)", (event.name,))

@other.on
async def greet(event: Joined) -> None:
    print(f"hello, {event.name}")

@other.on
async def count(event: Joined) -> None:
    print(event.user_id)

@other.on
async def hand_on(event: Joined) -> None:
    print(event)

@other.on
async def look(user: User | None) -> None:
    if user is not None:
        print(user.name)
"""


def test_a_finding_names_who_reads_the_field(world: World) -> None:
    text = ONE + READERS
    locked(world, text)
    gone = text.replace(
        "class Joined(Event, domain=users):\n    user_id: str\n    name: str",
        "class Joined(Event, domain=users):\n    user_id: str",
    )
    found = next(each for each in world.findings(gone) if each["field"] == "name")
    assert found["what"].startswith(
        "was removed, but the version was not raised: say version=2, and add @upcast(Joined"
    )
    assert sorted(found["readers"]) == ["evolve users.joined", "on other.greet", "view other.names (view_name)"]
    assert found["handed"] == ["on other.hand_on"]
    told = world.check(gone).output
    assert "users/Joined version 1, field name: was removed" in told
    assert "    read by evolve users.joined, view other.names (view_name), on other.greet" in told


def test_a_field_of_a_record_is_read_by_replicas_and_by_who_folds_and_decides(world: World) -> None:
    text = ONE + READERS
    locked(world, text)
    gone = text.replace(
        "class User(Record, domain=users):\n    user_id: str\n    name: str",
        "class User(Record, domain=users):\n    user_id: str",
    )
    findings = world.findings(gone)
    found = next(each for each in findings if each["field"] == "name")
    assert sorted(found["readers"]) == ["on other.look", "replica other.Card"]
    # The fold makes it, and hands it to a function that nobody looks into.
    assert found["handed"] == ["evolve users.renamed"]
    assert any("service other would not start: Card.name" in each["what"] for each in findings)


def test_a_field_that_upcasters_took_away_is_found_while_somebody_reads_it(world: World) -> None:
    text = ONE + READERS
    locked(world, text)
    gone = version(text.replace("    user_id: str\n    name: str\n    age", "    user_id: str\n    age"), 2)
    gone = gone.replace("User(event.user_id, event.name)", "User(event.user_id, '')")
    gone += (
        "\n@upcast(Joined, from_version=1)\ndef nameless(body: Any) -> Any:\n    del body['name']\n    return body\n"
    )
    locked(world, gone)
    found = only(world.findings(gone))
    assert (found["field"], found["what"]) == ("name", "was removed, and is still read")
    assert sorted(found["readers"]) == ["on other.greet", "view other.names (view_name)"]
    # A view of several events may read it of another one: that alone is no finding.
    assert world.findings(gone.replace("hello, {event.name}", "hello")) == []


def test_a_type_that_is_gone_is_found_unless_it_was_renamed(world: World) -> None:
    locked(world, ONE + READERS)
    without = (
        (ONE + READERS)
        .replace("class Rename(Command", "class Relabel(Command")
        .replace("command: Rename)", "command: Relabel)")
    )
    found = [each for each in world.findings(without) if each["type"] == "Rename"]
    assert "is declared no more: keep the class, or name it in was=" in only(found)["what"]
    renamed = without.replace("Relabel(Command, domain=users)", "Relabel(Command, domain=users, was=('Rename',))")
    assert [each["what"][:13] for each in world.findings(renamed)] == ["is not locked"]
    locked(world, renamed)
    assert world.findings(renamed) == []


def test_a_version_that_is_taken_back_is_found(world: World) -> None:
    locked(world, version(ONE, 2))
    found = world.findings(ONE)
    assert any("was locked, and the class says version=1" in each["what"] for each in found)


def test_a_gap_in_a_chain_is_found(world: World) -> None:
    locked(world)
    gap = version(ONE, 3) + "\n@upcast(Joined, from_version=1)\ndef same(body: Any) -> Any:\n    return body\n"
    assert any("has upcasters from 1, but none from 2" in each["what"] for each in world.findings(gap))
    result = world.lock(gap)
    assert (result.exit_code, "none from 2" in result.output) == (1, True)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "return body['nmae']",
            "samples 1, 2, 3 cannot be read: Joined of users, version 1, made broken fail: KeyError('nmae')",
        ),
        ("return None", "broken returned None: return the body"),
        ("return [body, body]", "one stored entry stays one message"),
        ("return broken(body)", "made broken fail: RecursionError"),
        ("return body | {'age': 'old'}", "lifted by broken, does not fit its class"),
    ],
)
def test_a_broken_upcaster_is_found_by_the_samples(world: World, body: str, why: str) -> None:
    locked(world)
    broken = version(ONE, 2) + f"\n@upcast(Joined, from_version=1)\ndef broken(body: Any) -> Any:\n    {body}\n"
    locked(world, broken)
    found = only(world.findings(broken))
    assert (found["type"], found["version"], found["readers"]) == ("Joined", 1, ["evolve users.joined"])
    assert why in found["what"]


# ------------------------------------------------------------------------------------------------ folds


def test_a_fold_that_fails_on_a_sample_is_found(world: World) -> None:
    locked(world)
    found = only(world.findings(ONE.replace("event.name)", "event.name.split(' ')[1])")))
    # Only one of them has two words.
    assert found["what"].startswith("sample 1 cannot be folded: IndexError")
    assert found["readers"] == ["evolve users.joined"]


def test_a_fold_that_needs_a_record_gets_one_that_other_samples_make(world: World) -> None:
    text = ONE + READERS
    locked(world, text)
    broken = text.replace("replace(user, name=event.name)", "replace(user, nmae=event.name)")
    assert "cannot be folded: TypeError" in only(world.findings(broken))["what"]
    alone = (
        HEAD
        + "class User(Record, domain=users):\n    user_id: str\n\nclass Left(Event, domain=users):\n    user_id: str\n"
    )
    alone += "\n@service.evolve\ndef left(user: User, event: Left) -> None:\n    raise KeyError\n"
    shutil.rmtree(world.lock_folder)
    locked(world, alone)
    assert "cannot be folded: KeyError" in only(world.findings(alone))["what"]


def test_a_fold_need_not_take_what_cannot_have_come_before(world: World) -> None:
    text = (ONE + READERS).replace("def renamed(user: User, event", "def renamed(user: User | None, event")
    locked(world, text)
    assert world.findings(text) == []


def test_what_cannot_be_folded_for_want_of_a_record_is_said_and_no_finding(world: World) -> None:
    alone = (
        HEAD
        + """
class User(Record, domain=users):
    user_id: str
    def __post_init__(self) -> None:
        raise ValueError("made of nothing")

class Left(Event, domain=users):
    user_id: str

@service.evolve
def left(user: User, event: Left) -> None:
    return None
"""
    )
    assert "locked users/User version 1, 0 samples" in world.lock(alone).output
    result = world.check(alone)
    assert result.exit_code == 0
    assert "note: users/User version 1 has no samples" in result.output
    assert (
        "note: users/Left version 1: sample 1 is not folded, for no sample makes a record that evolve users.left"
        in result.output
    )


# ------------------------------------------------------------------------------------------------ a bus, and others


async def test_samples_may_be_taken_from_a_bus_in_versions_that_no_class_has_any_more(
    world: World, each_bus: str
) -> None:
    world.module(ONE)
    users = Domain("users", key="user_id")

    class Joined(Event, domain=users):
        user_id: str
        label: str
        age: int | None = None

    async with connect(each_bus) as bus:
        for n in range(6):
            event = Joined(str(n), f"Ana {n}", n if n % 2 else None)
            await bus.facts.append(f"users/{n}", [seal(event, bus.clock.id(), Meta(1))])
        newer = seal(Joined("7", "Eva"), bus.clock.id(), Meta(1, schema=9))
        await bus.facts.append("users/7", [newer])
    text = (
        version(ONE, 2)
        + "\n@upcast(Joined, from_version=1)\ndef named(body: Any) -> Any:\n    return {'user_id': body['user_id'], 'name': body['label']}\n"
    )
    result = await asyncio.to_thread(world.lock, text, "--samples-from", each_bus)
    assert result.exit_code == 0, result.output
    assert "locked users/Joined version 1, 6 samples, from the bus only" in result.output
    files = world.files()
    assert files["users/Joined.1.samples.jsonl"].splitlines()[0] == b'{"user_id":"0","label":"Ana 0","age":null}'
    assert "users/Joined.1.schema.json" not in files
    assert not any(".9." in name for name in files)
    assert world.findings(text) == []
    broken = text.replace("body['label']", "body['name']")
    assert "samples 1, 2, 3, 4, 5, 6 cannot be read" in only(world.findings(broken))["what"]


def test_two_declarations_of_one_domain_are_compared(world: World) -> None:
    text = ONE + READERS
    locked(world, text, "--folder", "theirs")
    # Who knows fewer fields of an event than its owner reads it all the same.
    contract = HEAD.replace("owns=users", "") + "\nclass Joined(Event, domain=users):\n    user_id: str\n"
    contract += "\n@service.on\nasync def count(event: Joined) -> None:\n    print(event.user_id)\n"
    locked(world, contract)
    against = ("--against", "theirs")
    assert world.findings(contract, *against) == []
    report = json.loads(world.check(contract, "--json", *against).stdout)
    assert any("users/Rename version 1 is in theirs only: nobody here reads it" in each for each in report["notes"])
    other = contract.replace("user_id: str\n", "user_id: str\n    age: str = ''\n", 1)
    shutil.rmtree(world.lock_folder)
    locked(world, other)
    found = world.findings(other, *against)
    assert [each["what"] for each in found if each["field"] == "age"] == [
        "in theirs it was integer, and is string here"
    ]
    assert any("of theirs cannot be read" in each["what"] for each in found)


def test_what_others_send_in_a_newer_version_or_a_type_that_the_owner_does_not_know_is_found(world: World) -> None:
    newer = version(ONE + READERS, 2)
    locked(world, newer, "--folder", "theirs")
    locked(world, ONE)
    found = {(each["type"], each["what"].split(",")[0]): each for each in world.findings(ONE, "--against", "theirs")}
    assert found["Joined", "is in theirs"]["readers"] == ["evolve users.joined"]
    assert ("Rename", "is sent by theirs") in found
    assert ("Renamed", "is in theirs") in found
    missing = world.findings(ONE, "--against", "nowhere")
    assert "nowhere/index.json is not there" in only(missing)["what"]


# ------------------------------------------------------------------------------------------------ the example


def test_the_library_reads_what_version_1_of_it_wrote() -> None:
    from library.members import Join, Member, MemberJoined, members

    known = Schema(members.messages.values())
    first = (LIBRARY / "schema" / "members" / "MemberSignedUp.1.samples.jsonl").read_bytes().splitlines()
    assert [known.decode("members", "MemberSignedUp", 1, each) for each in first] == [
        MemberJoined("1", "Ana", "Álvarez Gil", "ana@example.org", "central"),
        MemberJoined("2", "Eva", "Paz", "eva@example.org", "central"),
        MemberJoined("3", "Bosé", "", "", "central"),
    ]
    (wish,) = (LIBRARY / "schema" / "members" / "Join.1.samples.jsonl").read_bytes().splitlines()
    assert known.decode("members", "Join", 1, wish) == Join("4", "Teo", "Rey", "teo@example.org", "central")
    record, *_ = (LIBRARY / "schema" / "members" / "Member.1.samples.jsonl").read_bytes().splitlines()
    assert isinstance(known.decode("members", "Member", 1, record), Member)


def test_removing_a_used_field_of_the_library_fails_its_check_naming_its_readers(world: World) -> None:
    result = CliRunner().invoke(main, ["schema", "check", "library", "--folder", str(LIBRARY / "schema")])
    assert (result.exit_code, "4 types and 25 samples looked at: all can be read" in result.output) == (0, True)
    shutil.copytree(LIBRARY, world.folder / "lending", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (world.folder / "lending").glob("*.py"):
        path.write_text(path.read_text().replace("from library.", "from lending."))
    members = world.folder / "lending" / "members.py"
    before, joined, after = members.read_text().partition("class MemberJoined")
    members.write_text(before + joined + after.replace("    email: str\n", "", 1))
    world.names += ["lending", "lending.members", "lending.desk"]
    result = CliRunner().invoke(main, ["schema", "check", "lending", "--folder", "lending/schema"])
    assert result.exit_code == 6
    assert "members/MemberJoined version 4, field email: was removed, but the version was not raised" in result.output
    assert "read by view desk.addresses (address), on desk.welcome, evolve members.joined" in result.output
    assert "members/MemberSignedUp version 1: samples 1, 2, 3 cannot be folded: AttributeError" in result.output
    assert "is still read" not in result.output, "said once"


# ------------------------------------------------------------------------------------------------ its parts


class Address(msgspec.Struct):
    city: str
    zip: str = ""


class Place(msgspec.Struct):
    city: str


@pytest.mark.parametrize(
    ("old", "new", "breaks"),
    [
        (int, float, False), (float, int, True), (int, str, True), (int, int | None, False), (int | None, int, True),
        (int | str, str | int | None, False), (Literal["a"], Literal["a", "b"], False), (Literal["a", "b"], Literal["a"], True),
        (Literal["a"], str, False), (Literal[1], str, True), (str, Any, False), (Any, str, True),
        (list[int], list[float], False), (list[float], list[int], True), (list[int], int, True),
        (dict[str, int], dict[str, float], False), (dict[str, float], dict[str, int], True),
        (Address, Place, True), (Place, Address, False), (Place | None, Address | None, False), (Address | None, Place | None, True),
        (Address, dict[str, str], True), (dict[str, str], Address, True), (Address, dict[str, Any], False),
        (tuple[int, str], tuple[int, str, str], True),
        (Annotated[str, msgspec.Meta(max_length=5)], str, False), (str, Annotated[str, msgspec.Meta(max_length=5)], True),
        (Annotated[int, msgspec.Meta(ge=5)], Annotated[int, msgspec.Meta(ge=1)], False),
        (Annotated[int, msgspec.Meta(ge=1)], Annotated[int, msgspec.Meta(ge=5)], True),
        (UUID, str, False), (str, UUID, True), (bytes, date, True),
        (datetime, str, False), (str, datetime, True), (datetime | None, str | None, False), (list[str], list[datetime], True),
    ],
)  # fmt: skip
def test_a_change_breaks_just_where_the_new_type_does_not_take_what_the_old_one_allowed(
    old: Any, new: Any, breaks: bool
) -> None:
    def declare(hint: Any) -> dict[str, Any]:
        class Made(Event, domain=Domain("things", key="name")):
            name: str
            value: hint

        return described(Made)

    found = changes(declare(old), declare(new))
    assert found, "a change that nobody is told of"
    assert any(change.breaks for change in found) is breaks
    assert changes(declare(old), declare(old)) == []


class Node(msgspec.Struct):
    children: list[Node] = []


def test_samples_are_bodies_that_the_class_itself_writes() -> None:
    class Rich(Event, domain=Domain("things", key="name")):
        name: str
        when: datetime
        day: date
        sum: Decimal
        id: UUID
        data: bytes
        tree: Node
        level: Annotated[int, msgspec.Meta(gt=3, lt=10)]
        code: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$", examples=["EUR", "CHF"])]
        pair: tuple[int, str]
        kind: Literal["a", "b"] = "a"
        maybe: int | None = None
        tags: frozenset[str] = frozenset()
        numbers: dict[int, float] = field(default_factory=dict)
        anything: Any = None

    made = samples(Rich)
    assert len(made) == 3
    assert samples(Rich) == made
    found = [msgspec.json.decode(each, type=Rich) for each in made]
    assert [each.maybe for each in found] == [None, 7, 2**53 - 1]
    assert [each.code for each in found] == ["EUR", "EUR", "CHF"]
    assert {each.name for each in found} == {"sample-1"}


def test_a_type_of_which_nothing_can_be_made_has_no_samples() -> None:
    class Coded(Event, domain=Domain("things", key="name")):
        name: str
        code: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")]

    assert samples(Coded) == []


def test_who_reads_which_field_is_seen_in_the_function() -> None:
    things = Domain("things", key="name")

    class Made(Event, domain=things):
        name: str
        a: int = 0
        b: int = 0
        c: int = 0

    class Other(Event, domain=things):
        name: str

    service = Service("looking")

    @service.on
    async def plain(event: Made) -> None:
        str((event.a, [event.b for _ in range(3)]))

    @service.on
    async def by_name(event: Made | Other) -> None:
        if isinstance(event, Made):
            str(getattr(event, "c", 0))

    @service.on
    async def matching(event: Made | Other) -> None:
        match event:
            case Made(a=found, b=0):
                str(found)

    @service.on
    async def by_place(event: Made) -> None:
        match event:
            case Made(_, found):
                str(found)

    @service.on
    async def handing_on(event: Made) -> None:
        str((event, event.a))

    text = "async def sourceless(event: Made) -> None:\n    str(event.c)\n"
    names: dict[str, Any] = {"Made": Made}
    exec(compile(text, "<nowhere>", "exec"), names)  # noqa: S102 - a function without a source
    service.on(names["sourceless"])
    found = {
        each.name.split(".")[1]: each for each in readers([(service, bound_parts(service))]) if each.message is Made
    }
    told = {name: (sorted(each.fields & {"a", "b", "c"}), each.whole) for name, each in found.items()}
    assert told == {
        "plain": (["a", "b"], False),
        "by_name": (["c"], False),
        "matching": (["a", "b"], False),
        "by_place": ([], True),
        "handing_on": (["a"], True),
        "sourceless": (["c"], False),
    }
