"""`cauce top`: who runs, and how far all consumers are, again and again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from cauce.cli.place import Seconds, as_json, bus, store
from cauce.cli.services import COLOURS, summary
from cauce.cli.sight import Sight, Sights, age, lines, notes, plain, row, sights
from cauce.cli.text import one_line, print_json
from cauce.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

__all__ = ["top"]

_QUIT = frozenset(b"qQ\x03\x04")


@click.command()
@bus
@store
@as_json
@click.option("--interval", default=1.0, show_default=True, type=Seconds(0.1, 3600), help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Two looks, an interval apart, then the end: for scripts.")
@click.argument("services", nargs=-1)
def top(url: str, store: str | None, as_json: bool, interval: float, once: bool, services: tuple[str, ...]) -> None:
    """Show who runs, and how far the consumers of SERVICES, or of all, are, until q or Ctrl-C.

    With --json each look is one line. What is no terminal is told once, as text.
    """
    if as_json:
        asyncio.run(_print(url, store, services, interval, once=once))
    elif once or not sys.stdout.isatty():
        asyncio.run(_once(url, store, services, interval))
    else:
        asyncio.run(_live(url, store, services, interval))


async def _print(url: str, store: str | None, services: tuple[str, ...], interval: float, *, once: bool) -> None:
    async with sights(url, store, services) as found:
        sight = await _next(found)
        while True:
            await found.clock.sleep(interval)
            sight = await _next(found)
            if sight is not None:
                print_json(plain(sight))
            if once:
                return


async def _once(url: str, store: str | None, services: tuple[str, ...], interval: float) -> None:
    async with sights(url, store, services) as found:
        await found.look()
        await found.clock.sleep(interval)
        sight = await found.look()
    for each in _running(sight):
        click.echo("  ".join(each))
    for line in lines(sight):
        click.echo(line)


async def _next(found: Sights) -> Sight | None:
    """A bus that is away for a while does not end what watches it."""
    with suppress(Unavailable):
        return await found.look()
    return None


async def _live(url: str, store: str | None, services: tuple[str, ...], interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    quit = asyncio.Event()
    async with sights(url, store, services) as found:
        # Whoever names a service that is not there is told so before the screen is taken.
        sight: Sight | None = await found.look()
        with _keys(quit.set), Live(_screen(sight), console=Console(), screen=True, auto_refresh=False) as live:
            while not quit.is_set():
                live.update(_screen(sight), refresh=True)
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval):
                        await quit.wait()
                if not quit.is_set():
                    sight = await _next(found) or sight


def _running(sight: Sight) -> list[tuple[str, ...]]:
    """The cells of each instance."""
    return [
        (
            one_line(each.service), each.state, f"process {each.pid}", one_line(summary(each.addresses)) or "-",
            f"up {age(max(0, sight.seen.time - each.since) / 1_000_000)}",
        )
        for each in sight.instances
    ]  # fmt: skip


def _screen(sight: Sight | None) -> Group:
    from rich.console import Group
    from rich.text import Text

    assert sight is not None
    heads = ", ".join(f"{log} {head}" for log, head in sight.seen.heads.items())
    return Group(
        Text(f"{len(sight.instances)} instances   {heads}   q quits", style="bold"),
        Text(),
        _instances(sight),
        Text(),
        _consumers(sight),
        *(Text(each, style="yellow") for each in notes(sight)),
    )


def _instances(sight: Sight) -> Table:
    table = _table("service", "state", "process", "answers", "up")
    for service, state, *rest in _running(sight):
        table.add_row(*_texts([service]), *_texts([state], COLOURS.get(state, "red")), *_texts(rest))
    return table


def _consumers(sight: Sight) -> Table:
    names = ("service", "consumer", "kind")
    table = _table(
        *names, *(f">{each}" for each in ("lag", "oldest", "in flight", "retrying", "dead", "behind", "rate/s"))
    )
    kept = {each.service: each for each in sight.seen.services}
    for each in sight.seen.readers:
        style = "red" if each.dead or each.note else "yellow" if each.retrying or each.lag else ""
        table.add_row(*_texts(row(each, sight), style))
    for service, said in kept.items():
        if said.outbox or said.due:
            table.add_row(
                *_texts([one_line(service), "(outbox)", "", str(said.outbox), "", "", "", "", "", ""], "yellow")
            )
    return table


def _table(*names: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def _texts(cells: Iterable[str], style: str = "") -> list[Text]:
    """What others named is no markup."""
    from rich.text import Text

    return [Text(cell, style=style) for cell in cells]


@contextmanager
def _keys(quit: Callable[[], None]) -> Iterator[None]:
    """Call it at q, Ctrl-C and SIGTERM. The terminal is given back as it was."""
    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, quit)
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)

    def pressed() -> None:
        typed = os.read(number, 64)
        if not typed or not _QUIT.isdisjoint(typed):
            quit()

    tty.setcbreak(number)
    loop.add_reader(number, pressed)
    try:
        yield
    finally:
        loop.remove_reader(number)
        termios.tcsetattr(number, termios.TCSADRAIN, before)
