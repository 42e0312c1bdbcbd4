"""What holds the house together, whatever is built in it: floors, one clock, a light front door, commands told of."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cauce"

# The floors, lowest first. A module imports from lower floors, or from what stands before it on its own.
# `x.*` is the package x and all in it, whose modules are among themselves and may import each other.
FLOORS = (
    (
        "errors",
        "accept",
        "clock",
        "identity",
        "deadline",
        "guarded",
        "messages",
        "fallback",
        "upcaster",
        "restored",
        "retry",
        "schema",
        "compatible",
        "sample",
        "codec",
        "letter",
        "said",
        "duration",
        "schedule",
    ),  # what travels, and its names; no I/O
    (
        "log",
        "wire",
        "sql",
        "task",
        "threads",
        "shelf",
        "store",
        "twice",
        "verify",
        "conformance",
    ),  # the seams and their contract
    ("backends.*",),  # what implements them
    (
        "folded",
        "fingerprint",
        "snapshot",
        "fold",
        "lease",
        "past",
        "receipt",
        "undone",
        "takes",
        "backlog",
        "lag",
        "meter",
        "agenda",
        "timers",
        "bus",
        "question",
        "shares",
        "aside",
        "portion",
        "lane",
        "abreast",
        "consumer",
        "outbox",
        "letters",
        "reset",
    ),  # delivery
    (
        "records",
        "audit",
        "undo",
        "tags",
        "rules",
        "commander",
        "derived",
        "replica",
        "view",
        "copies",
        "carried",
        "process",
        "history",
        "registry",
        "guards.*",
    ),  # the patterns
    (
        "service",
        "folding",
        "copying",
        "wanted",
        "runtime",
        "corpus",
        "reader",
        "replay",
        "finding",
    ),  # what a team writes against
    ("ext.*", "testing.*", "console.*", "demo.*", "cli.*"),  # faces
)

# Who may still touch time, chance or ids directly, as {(module, what): why}.
BESIDE_THE_CLOCK: dict[tuple[str, str], str] = {
    ("cauce.backends.sqlite", "uuid"): "turns the id of a bus into bytes and back; makes none",
    ("cauce.backends.sqlite.upkeep", "uuid"): "the same",
    ("cauce.backends.sqlite.verify", "uuid"): "the same",
    ("cauce.testing.clock", "random"): "is a clock itself",
    ("cauce.testing.clock", "asyncio.sleep"): "is a clock itself",
}

CLOCKWORK = {"random", "secrets", "time", "uuid"}
CLOCKWORK_CALLS = {"asyncio.sleep", "datetime.now", "datetime.today", "datetime.utcnow", "date.today", "os.urandom"}
HEAVY = ("apsw", "asyncpg", "click", "nats", "rich", "starlette")


# ------------------------------------------------------------------------------------------------------- floors


def test_every_module_has_a_place_in_the_house() -> None:
    homeless = [name for name in sources() if name != "cauce" and place(name) is None]
    assert not homeless, f"{homeless} stand on no floor: add each to FLOORS here, as low as it can be"


def test_imports_go_down_only() -> None:
    assert [wrong for name, tree in trees().items() for wrong in climbs(name, tree)] == []


def test_an_import_that_climbs_is_found_wherever_it_hides() -> None:
    for source in (
        "import cauce.runtime",
        "from cauce import runtime",
        "from cauce.runtime import running",
        "from . import runtime",
        "from .runtime import running",
        "def later():\n    from cauce.runtime import running",
        "if TYPE_CHECKING:\n    from cauce.runtime import running",
        "importlib.import_module('cauce.runtime')",
        "from cauce import Service",
    ):
        assert len(list(climbs("cauce.bus", ast.parse(source)))) == 1, source
    for source in (
        "import asyncio",
        "from cauce import errors",
        "from cauce.backends.sqlite import Log",
        "import caucel",
    ):
        assert list(climbs("cauce.bus", ast.parse(source))) == [], source


def climbs(module: str, tree: ast.AST) -> Iterator[str]:
    """Each import of this module that does not go down, as a sentence."""
    if module == "cauce":
        return  # the front door shows everything
    for line, target in imports(module, tree):
        if target == "cauce" and module.startswith("cauce.demo."):
            continue  # the demo is written as a user would write it
        if target == "cauce":
            yield f"{module}:{line} goes through the front door: import the module that has it (cauce.<module>)"
            continue
        here, there = place(module), place(target)
        if here is not None and there is not None and there > here:
            yield f"{module}:{line} imports {target}, which stands above it"
        elif there is None:
            yield f"{module}:{line} imports {target}, which stands on no floor: add it to FLOORS"


def place(module: str) -> int | None:
    """How far up the module stands, or None if it has no place."""
    name = module.removeprefix("cauce.")
    for height, entry in enumerate(entry for floor in FLOORS for entry in floor):
        package = entry.removesuffix(".*")
        if name == package or (package != entry and name.startswith(package + ".")):
            return height
    return None


def imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every module of Cauce that is imported, at the top, in a function or by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names if ours(alias.name))
            case ast.ImportFrom(names=names):
                origin = absolute(module, node)
                if ours(origin):
                    yield from {(node.lineno, submodule(origin, alias.name)) for alias in names}
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ) if ours(name):
                yield node.lineno, name


def ours(name: str) -> bool:
    return name == "cauce" or name.startswith("cauce.")


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = module in sources() and sources()[module].name == "__init__.py"
    parents = module.split(".")
    package = parents[: len(parents) - node.level + is_package]
    return ".".join([*package, node.module] if node.module else package)


def submodule(origin: str, name: str) -> str:
    """`from origin import name` imports the module `origin.name` if there is one, else what `origin` holds."""
    full = f"{origin}.{name}"
    return full if full in sources() or (origin == "cauce" and place(full) is not None) else origin


# -------------------------------------------------------------------------------------------------------- clock


def test_time_chance_and_ids_come_from_the_clock_alone() -> None:
    uses = {(name, what): line for name, tree in trees().items() for line, what in clockwork(tree)}
    others = {use: line for use, line in uses.items() if use[0] != "cauce.clock"}
    wrong = [
        f"{name}:{line} uses {what}" for (name, what), line in others.items() if (name, what) not in BESIDE_THE_CLOCK
    ]
    assert not wrong, f"{wrong}: take it from the Clock"
    stale = BESIDE_THE_CLOCK.keys() - others.keys()
    assert not stale, f"{stale} no longer happen: take them out of BESIDE_THE_CLOCK"


def test_a_second_clock_is_found_wherever_it_hides() -> None:
    for source in (
        "import time",
        "from time import monotonic",
        "def later():\n    import uuid as u",
        "import random, os",
        "from secrets import token_hex",
        "asyncio.sleep(1)",
        "from asyncio import sleep",
        "import asyncio as aio\naio.sleep(1)",
        "datetime.datetime.now(UTC)",
        "datetime.now(UTC)",
        "os.urandom(8)",
    ):
        assert len(list(clockwork(ast.parse(source)))) == 1, source
    for source in ("clock.sleep(1)", "loop.time()", "import timeit", "from datetime import datetime"):
        assert list(clockwork(ast.parse(source))) == [], source


def clockwork(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that tells the time, waits, or makes a number or an id out of nothing."""
    nodes = list(ast.walk(tree))
    imported = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    aliases = {alias.asname: alias.name for alias in imported if alias.asname}
    for node in nodes:
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names if alias.name in CLOCKWORK)
            case ast.ImportFrom(module=str(origin), level=0, names=names):
                if origin in CLOCKWORK:
                    yield node.lineno, origin
                yield from (
                    (node.lineno, f"{origin}.{alias.name}")
                    for alias in names
                    if f"{origin}.{alias.name}" in CLOCKWORK_CALLS
                )
            case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=attr):
                if (what := f"{aliases.get(name, name)}.{attr}") in CLOCKWORK_CALLS:
                    yield node.lineno, what


# --------------------------------------------------------------------------------------------------- front door


def test_importing_cauce_loads_no_backend_and_no_face() -> None:
    code = f"import sys, cauce; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_help_answers_before_one_wonders() -> None:
    """Under 200 ms of processor time, the least of five, or on a machine too slow for that, under six bare starts."""
    bare = [sys.executable, "-c", "pass"]
    asked = [sys.executable, "-c", "from cauce.cli import main; main()", "--help"]
    seconds(asked)  # the first one compiles
    rounds = [(seconds(bare), seconds(asked)) for _ in range(5)]
    start, answer = (min(column) for column in zip(*rounds, strict=True))
    assert answer < max(0.2, 6 * start), f"cauce --help took {answer:.3f} s, a bare interpreter {start:.3f} s"


def seconds(command: list[str]) -> float:
    """The processor time of a command: others who are at work beside it do not count."""
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_every_command_is_in_the_documentation() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "reference").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    missing = [command for command in commands() if not re.search(rf"\b{re.escape(command)}(?![\w-])", text)]
    assert missing == [], "tell of them in README.md or docs/reference/"


def commands() -> list[str]:
    """Every command as one types it: `cauce run`, `cauce dead list` ..."""
    import click

    from cauce.cli import main

    assert isinstance(main, click.Group), "cauce.cli.main is the click group that holds all commands"

    def below(group: click.Group, path: str, context: click.Context) -> Iterator[str]:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None, f"'{path} {name}' is listed but cannot be loaded"
            yield f"{path} {name}"
            if isinstance(command, click.Group):
                yield from below(command, f"{path} {name}", click.Context(command, context, name))

    found = list(below(main, "cauce", click.Context(main, info_name="cauce")))
    assert found, "cauce has no commands"
    return found


# -------------------------------------------------------------------------------------------------------- files


def test_no_file_names_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(?<![\w.~-])/(?:work|root)/|(?<![\w.~/-])/(?:work|root)\b|[.]pyenv/versions")
    registry = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|yarnpkg\.com|deb\.debian\.org)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if machine.search(line) or registry.search(line)
    ]
    assert found == []


def files() -> list[Path]:
    """What is tracked, and what would be if all were added now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    assert Path(__file__).resolve() in [path.resolve() for path in found], "this test needs a git checkout"
    return found


@cache
def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def trees() -> dict[str, ast.Module]:
    found = {name: ast.parse(path.read_bytes()) for name, path in sources().items()}
    assert found, f"no module in {PACKAGE}"
    return found


def test_every_name_of_the_front_door_is_where_the_table_says() -> None:
    """Type checkers read one list of the names, programs the other."""
    front = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = next(node for node in front.body if isinstance(node, ast.If))
    homes = {
        alias.name: str(node.module)
        for node in typed.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    script = "import sys, cauce; print(*(f'{n} {getattr(cauce, n) is getattr(sys.modules[sys.argv[1 + i]], n)}' for i, n in enumerate(dir(cauce))))"
    names = sorted(homes)
    done = subprocess.run(
        [sys.executable, "-c", script, *(homes[name] for name in names)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [word for name in names for word in (name, "True")]
    import cauce

    assert sorted(cauce.__all__) == names
