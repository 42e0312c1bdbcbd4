"""`cauce run`: services in a process of their own, until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from types import ModuleType

import click

from cauce.backends import scheme_of, without_password
from cauce.cli.each import run_each
from cauce.cli.logs import FORMATS, begin, tell
from cauce.cli.place import Seconds
from cauce.cli.place import store as store_option
from cauce.cli.probes import options, probed
from cauce.cli.signals import stopped
from cauce.errors import Refused
from cauce.ext.http import parse_address
from cauce.runtime import DEFAULT_BUS, running
from cauce.service import Service
from cauce.task import ended
from cauce.threads import at_work

__all__ = ["find", "modules", "run"]


_OTHERS = (__file__, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
"""Where the code of others lies."""

_PATIENCE = 1.0
"""Seconds for what is cancelled at the end."""


def _address(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            parse_address(value)
        except Refused as error:
            raise click.BadParameter(str(error)) from None
    return value


@click.command()
@click.argument("names", metavar="MODULE[:SERVICE]...", nargs=-1, required=True)
@click.option("--bus", default=DEFAULT_BUS, envvar="CAUCE_BUS", show_default=True, help="Address of the bus.")
@store_option
@click.option(
    "--drain",
    default=10.0,
    show_default=True,
    type=Seconds(0),
    help="Seconds that handlers get to finish at the end.",
)
@click.option(
    "--http",
    metavar="[HOST:]PORT",
    callback=_address,
    help="Answer /livez, /readyz and /metrics there, on loopback where no host is said; port 0 takes a free one.",
)
@click.option(
    "--log-format", type=click.Choice(FORMATS), default="text", show_default=True, help="json: one object a line."
)
@click.option("--each", is_flag=True, help="Every service in a process of its own, started again when it dies.")
@click.option("--with-parent", is_flag=True, hidden=True, help="Stop when standard input closes.")
@click.pass_context
def run(
    ctx: click.Context, names: tuple[str, ...], bus: str, store: str | None, drain: float, http: str | None,
    log_format: str, each: bool, with_parent: bool,
) -> None:  # fmt: skip
    """Run services until SIGTERM or Ctrl-C.

    MODULE runs every service in a module, or in a package and its modules; MODULE:SERVICE runs one. The first signal
    drains and exits with 0; a second one stops at once, with 143, or 130 for Ctrl-C.
    """
    scheme_of(bus)
    begin(log_format)
    found = {service: name for each_name in names for name, service in find(each_name).items()}
    if each:
        more = options(http, log_format)
        ctx.exit(asyncio.run(run_each(list(found.values()), bus, store, drain, more=more, with_parent=with_parent)))
    with asyncio.Runner() as runner:
        runner.run(_run(list(found), bus, store, drain, with_parent, http))
        if at_work() or asyncio.all_tasks(runner.get_loop()):
            # What hangs was told of. Neither the end of the loop nor that of the interpreter must wait for it.
            logging.shutdown()
            os._exit(0)


async def _run(
    services: list[Service], bus: str, store: str | None, drain: float, with_parent: bool, http: str | None
) -> None:
    names = [service.name for service in services]
    async with (
        probed(names, bus, store, http) as probes,
        running(*services, bus=bus, store=store, drain=drain, meter=probes.meter) as face,
    ):
        probes.started(face)
        tell(f"running {', '.join(names)} on {without_password(bus)}")
        await stopped(face, with_parent=with_parent, drain=drain)
    await ended(asyncio.all_tasks() - {asyncio.current_task()}, _PATIENCE)


def find(name: str) -> dict[str, Service]:
    """The services that a name on the command line means, by their own. Raises `Refused` if there are none."""
    module_name, colon, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *([attribute] if colon else ()))):
        raise Refused(f"{name!r} is no name of a module: {_hint(module_name, attribute)}")
    module = _imported(module_name)
    if colon:
        found = getattr(module, attribute, None)
        if not isinstance(found, Service):
            raise Refused(f"{name} is no service: {module_name} has {', '.join(_names(module)) or 'none'}")
        return {name: found}
    services: dict[Service, str] = {}
    for part in _modules(module):
        for attribute, each in vars(part).items():
            if isinstance(each, Service):
                services.setdefault(each, f"{part.__name__}:{attribute}")
    if not services:
        raise Refused(f"{module_name} has no service: make one with Service(…), or name another module")
    return {name: service for service, name in services.items()}


def _imported(name: str) -> ModuleType:
    """The module of this name, from the folder of the call, too.

    What keeps it from being imported is told by the line of the user's own code.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except SyntaxError as error:
        raise Refused(
            f"{name} cannot be imported: {error.msg} in {error.filename} line {error.lineno}: mend that"
        ) from None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            hint = _hint(name) if name.endswith(".py") else "run in the folder that holds it, or install it"
            raise Refused(f"there is no module {error.name!r} here: {hint}") from None
        frames = traceback.extract_tb(error.__traceback__)
        mine = [frame for frame in frames if not frame.filename.startswith(("<", *_OTHERS))] or frames
        raise Refused(
            f"{name} cannot be imported: {error} in {mine[-1].filename} line {mine[-1].lineno}: mend that, or install what is missing"
        ) from None


def _hint(name: str, attribute: str = "") -> str:
    """What was meant by the name of a file or a folder."""
    meant = re.sub(r"[/\\]+", ".", name.strip().removesuffix(".py")).strip(".")
    if all(part.isidentifier() for part in meant.split(".")):
        return f"write {meant}:{attribute}" if attribute.isidentifier() else f"write {meant}"
    return "write MODULE or MODULE:SERVICE, such as shop or shop.mails:mails"


def _modules(module: ModuleType) -> Iterator[ModuleType]:
    yield module
    for part in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not part.ispkg and part.name != "__main__":
            yield _imported(f"{module.__name__}.{part.name}")


def modules(name: str) -> list[ModuleType]:
    """The module of this name, and those of a package. Raises `Refused` for what cannot be imported."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise Refused(f"{name!r} is no name of a module: {_hint(name.partition(':')[0])}")
    return list(_modules(_imported(name)))


def _names(module: ModuleType) -> list[str]:
    return [f"{module.__name__}:{name}" for name, each in vars(module).items() if isinstance(each, Service)]
