"""`cauce run`: services in a process of their own, until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

import click

from cauce.cli.each import run_each
from cauce.cli.signals import stopped
from cauce.errors import Refused
from cauce.runtime import DEFAULT_BUS, running
from cauce.service import Service

__all__ = ["find", "run"]


@click.command()
@click.argument("names", metavar="MODULE[:SERVICE]...", nargs=-1, required=True)
@click.option("--bus", default=DEFAULT_BUS, envvar="CAUCE_BUS", show_default=True, help="Address of the bus.")
@click.option("--drain", default=10.0, show_default=True, help="Seconds that handlers get to finish at the end.")
@click.option("--each", is_flag=True, help="Every service in a process of its own, started again when it dies.")
@click.option("--with-parent", is_flag=True, hidden=True, help="Stop when standard input closes.")
@click.pass_context
def run(ctx: click.Context, names: tuple[str, ...], bus: str, drain: float, each: bool, with_parent: bool) -> None:
    """Run services until SIGTERM or Ctrl-C.

    MODULE runs every service in a module, or in a package and its modules; MODULE:SERVICE runs one. The first signal
    drains and exits with 0, a second one stops at once.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s", stream=sys.stderr)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = {service: name for each_name in names for name, service in find(each_name).items()}
    if each:
        ctx.exit(asyncio.run(run_each(list(found.values()), bus, drain, with_parent=with_parent)))
    asyncio.run(_run(list(found), bus, drain, with_parent))


async def _run(services: list[Service], bus: str, drain: float, with_parent: bool) -> None:
    async with running(*services, bus=bus, drain=drain) as face:
        click.echo(f"running {', '.join(service.name for service in services)} on {bus}", err=True)
        await stopped(face, with_parent=with_parent)


def find(name: str) -> dict[str, Service]:
    """The services that a name on the command line means, by their own. Raises `Refused` if there are none."""
    module_name, colon, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise Refused(
            f"there is no module {error.name!r} here: run in the folder that holds it, or install it"
        ) from None
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


def _modules(module: ModuleType) -> Iterator[ModuleType]:
    yield module
    for part in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not part.ispkg and part.name != "__main__":
            yield importlib.import_module(f"{module.__name__}.{part.name}")


def _names(module: ModuleType) -> list[str]:
    return [f"{module.__name__}:{name}" for name, each in vars(module).items() if isinstance(each, Service)]
