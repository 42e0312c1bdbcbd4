"""`cauce schema`: what messages look like in each version, kept in a folder to commit, and checked against it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from cauce.cli.endings import FOUND
from cauce.cli.place import as_json, reading
from cauce.cli.run import modules
from cauce.cli.text import count, one_line, print_json
from cauce.compatible import described
from cauce.corpus import Corpus, Draft, Locked, read, write
from cauce.errors import Refused
from cauce.finding import Finding, Report, check
from cauce.log import Filter, entries_of
from cauce.messages import Domain, Message, declared
from cauce.sample import samples
from cauce.schema import Schema
from cauce.service import Service

__all__ = ["schema"]

_ALIKE, _MOST = 3, 12
"""Bodies of one type and version that are taken from a bus: of one shape, and in all."""

Key = tuple[str, str, int]


@click.group()
def schema() -> None:
    """What the messages of a module look like in each version: locked in a folder to commit, and checked against it."""


_folder = click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("schema"), show_default=True, help="The lock folder."
)


@schema.command()
@click.argument("module")
@_folder
@click.option("--samples-from", "url", help="Address of a bus whose bodies become samples. They are real data.")
@as_json
def lock(module: str, folder: Path, url: str | None, as_json: bool) -> None:
    """Write down what the messages of MODULE look like, each in its version, with sample bodies.

    What was locked before is never written again. Refused if fields changed and the version did not.
    """
    domains, _ = _declared(module)
    corpus = read(folder)
    classes = [cls for domain in domains for cls in domain.messages.values()]
    taken = {} if url is None else asyncio.run(_taken(url, classes, corpus))
    drafts = [draft for cls in classes if (draft := _draft(cls, corpus, taken)) is not None]
    drafts += [_met(key, bodies, classes) for key, bodies in taken.items()]
    rows = write(corpus, drafts)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "locked": [_row(row, len(each.samples)) for row, each in zip(rows, drafts, strict=True)],
            }
        )
        return
    for row, draft in zip(rows, drafts, strict=True):
        click.echo(
            one_line(
                f"locked {row.name}, {count(len(draft.samples), 'sample')}"
                + ("" if row.schema else ", from the bus only")
            )
        )
    click.echo(
        one_line(f"{count(len(rows), 'type')} locked in {folder}" if rows else f"{folder} has all of it already")
    )


@schema.command("check")
@click.argument("module")
@_folder
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The lock folder of another repository: what they send that this code cannot read.",
)
@as_json
@click.pass_context
def check_(ctx: click.Context, module: str, folder: Path, against: Path | None, as_json: bool) -> None:
    """Compare the messages of MODULE with what was locked, and read every locked sample with today's code.

    Ends with 6 if something is incompatible, and says who reads it.
    """
    domains, services = _declared(module)
    report = check(domains, services, read(folder), None if against is None else read(against))
    if as_json:
        print_json({"compatible": not report.findings, **msgspec.to_builtins(report)})
    else:
        _tell(report)
    if report.findings:
        ctx.exit(FOUND)


def _declared(module: str) -> tuple[list[Domain], list[Service]]:
    """The domains of which a module knows messages, and its services. Raises `Refused` where there is none."""
    domains, services = dict[Domain, None](), dict[Service, None]()
    for part in modules(module):
        for each in vars(part).values():
            if isinstance(each, Service):
                services[each] = None
                domains |= dict.fromkeys(each.owns)
            elif isinstance(each, Domain):
                domains[each] = None
            elif isinstance(each, type) and issubclass(each, Message) and getattr(each, "__declared__", None):
                domains[declared(each).domain] = None
    if not any(domain.messages for domain in domains):
        raise Refused(f"{module} declares no messages, and knows none: name the module that has them")
    return list(domains), list(services)


# ------------------------------------------------------------------------------------------------------------- lock


def _draft(cls: type[Message], corpus: Corpus, taken: dict[Key, list[bytes]]) -> Draft | None:
    """What is to be locked of a class; None if it is locked. Raises `Refused` if it is, and differs."""
    Schema([cls])
    kind, now = declared(cls), described(cls)
    key = kind.domain.name, kind.name, kind.version
    bodies = taken.pop(key, None)
    row = corpus.of(*key)
    then = None if row is None else corpus.schema(row)
    if row is not None and then is not None and then != now:
        raise Refused(
            f"{row.name} is locked, and its fields changed: say version={kind.version + 1} in the class; cauce schema check says what changed, and who reads it"
        )
    if row is not None:
        return None
    return Draft(*key, kind.kind, now, bodies or samples(cls))


def _met(key: Key, bodies: Sequence[bytes], classes: Sequence[type[Message]]) -> Draft:
    """What lies on a bus in a version that no class of today has."""
    kind = next(
        declared(cls) for cls in classes if declared(cls).domain.name == key[0] and key[1] in declared(cls).names
    )
    return Draft(*key, kind.kind, None, bodies)


async def _taken(url: str, classes: Sequence[type[Message]], corpus: Corpus) -> dict[Key, list[bytes]]:
    """Bodies that lie on a bus, of each type and version that is not locked: some of each shape."""
    known, found = Schema(classes), dict[Key, dict[object, list[bytes]]]()
    newest = {
        (declared(cls).domain.name, name): declared(cls).version for cls in classes for name in declared(cls).names
    }
    wanted = Filter(domains=frozenset(declared(cls).domain.name for cls in classes))
    async with reading(url) as bus:
        for log in (bus.facts, bus.commands, bus.records):
            async for entry in entries_of(log, wanted):
                if not entry.body or not known.knows(entry.domain, entry.type) or b"\n" in entry.body:
                    continue
                key = entry.domain, entry.type, entry.checked().meta.schema
                if corpus.of(*key) is None and key[2] <= newest[key[:2]]:
                    alike = found.setdefault(key, {}).setdefault(_shape(msgspec.json.decode(entry.body)), [])
                    if len(alike) < _ALIKE and entry.body not in alike:
                        alike.append(entry.body)
    return {key: [body for alike in shapes.values() for body in alike][:_MOST] for key, shapes in found.items()}


def _shape(value: object) -> object:
    """What kinds of values a body has where."""
    if isinstance(value, dict):
        return frozenset((name, _shape(each)) for name, each in value.items())
    return (list, *map(_shape, value[:1])) if isinstance(value, list) else type(value)


def _row(row: Locked, number: int) -> dict[str, object]:
    return {
        "domain": row.domain,
        "type": row.type,
        "version": row.version,
        "kind": row.kind,
        "samples": number,
        "schema": bool(row.schema),
    }


# ------------------------------------------------------------------------------------------------------------ check


def _tell(report: Report) -> None:
    for note in report.notes:
        click.secho(one_line(f"note: {note}"), dim=True)
    for each in report.findings:
        click.echo(_line(each))
    looked = f"{count(report.types, 'type')} and {count(report.samples, 'sample')} looked at"
    if report.findings:
        click.secho(f"{looked}: {count(len(report.findings), 'finding')}", fg="red")
    else:
        click.secho(f"{looked}: all can be read", fg="green")


def _line(found: Finding) -> str:
    where = f"{found.domain}/{found.type} version {found.version}" if found.type else ""
    where += f", field {found.field}" if found.field else ""
    read_by = f"\n    read by {', '.join(found.readers)}" if found.readers else ""
    handed = f"\n    handed on by {', '.join(found.handed)}" if found.handed else ""
    if found.field and not read_by:
        read_by = "\n    read by nobody here"
    head = click.style(one_line(where), bold=True) + ": " if where else ""
    return head + one_line(found.what) + "".join("\n" + one_line(line) for line in (read_by + handed).split("\n")[1:])
