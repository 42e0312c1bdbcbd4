"""`python -m blocked`: users, cards and the CRM in processes of their own; users is stopped again and again."""

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from blocked import desk
from blocked.load import Load
from blocked.processes import Processes
from cauce import Bus, Guards, Limits, Rejected, SystemClock, running
from shop.cards import IssueCard
from shop.users import RegisterUser

USERS = 20
GUARDS = Guards(breaker=Limits(window=1.0, rest=0.2, longest=0.5))
"""Where thousands of good answers a second are remembered for long, a few bad ones weigh little."""

CLOCK = SystemClock()
BEGAN = CLOCK.monotonic()


def tell(text: str) -> None:
    print(f"{CLOCK.monotonic() - BEGAN:6.2f} s  {text}", flush=True)


class Told(logging.Handler):
    """What the breaker says, as it says it."""

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("breaker"):
            tell(text)


async def prepare(bus: Bus) -> None:
    """Some users, each with a card, once they have come to the copies of the desk and of the cards."""
    for n in range(USERS):
        await bus.call(RegisterUser(f"{n}", f"User {n}", f"{n}@example.org"))
    async with asyncio.timeout(30):
        while await bus.copies["desk"].count(desk.Known, {}) < USERS:
            await CLOCK.sleep(0.02)
        for n in range(USERS):
            while not await has_card(bus, f"{n}"):
                await CLOCK.sleep(0.02)


async def has_card(bus: Bus, key: str) -> bool:
    try:
        return (await bus.call(IssueCard(key, key))).changed
    except Rejected:
        return False


async def round_of(bus: Bus, processes: Processes, seconds: float, well: Load, stopped: Load) -> list[str]:
    """Ask while all is well, while users is stopped, and until it is well again. Returns what did not come true."""
    wrong = list[str]()
    await well.during(bus, seconds)
    opened = bus.guards["users"].opened
    processes.stop("users")
    tell("users is stopped")
    await stopped.during(bus, seconds)
    if bus.guards["users"].opened == opened:
        wrong.append("the breaker did not open")
    if not stopped.fallen_back:
        wrong.append("nobody fell back")
    processes.go_on("users")
    tell("users goes on")
    try:
        async with asyncio.timeout(30):
            while not (await bus.ask(desk.Page("7")))[1]:
                await CLOCK.sleep(0.02)
    except TimeoutError:
        wrong.append("users goes on, and is not asked again")
    else:
        tell("pages come from users again")
    return wrong


async def main(seconds: float, rounds: int) -> list[str]:
    """Returns what did not come true."""
    log = logging.getLogger("cauce")
    log.addHandler(told := Told())
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cauce-blocked-"))
            url = f"sqlite:///{Path(folder) / 'bus.db'}"
            processes = stack.enter_context(Processes(url, "users", "cards", "crm"))
            bus = await stack.enter_async_context(running(desk.service, bus=url, guards=GUARDS))
            await processes.until_all_run(bus)
            tell(f"users, cards and crm run in processes of their own, the desk in {os.getpid()}")
            await prepare(bus)
            well, stopped, wrong = Load(USERS), Load(USERS), list[str]()
            for n in range(3 * rounds):
                # What else the machine does may last for rounds: only then there are more than were asked for.
                if n >= rounds and not compare(well, stopped):
                    break
                wrong += await round_of(bus, processes, seconds, well, stopped)
            for callee, (before, meanwhile) in both(well, stopped).items():
                tell(f"p99 of {callee}: {before * 1000:.2f} ms, meanwhile {meanwhile * 1000:.2f} ms")
            tell(f"while users was stopped: {stopped.pages:,} pages, {stopped.fallen_back:,} of them from the copy")
            wrong += stopped.failed + well.failed + compare(well, stopped)
            return wrong
    finally:
        log.removeHandler(told)


def both(well: Load, stopped: Load) -> dict[str, tuple[float, float]]:
    """The p99 of the others in seconds, while all was well and while users was stopped.

    Of each the best round counts: what else the machine does only makes it worse.
    """
    return {callee: (min(p99), min(stopped.p99[callee])) for callee, p99 in well.p99.items()}


def compare(well: Load, stopped: Load) -> list[str]:
    """Returns what did not come true."""
    return [
        f"the p99 of {callee} has doubled"
        for callee, (before, meanwhile) in both(well, stopped).items()
        if meanwhile >= 2 * before
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m blocked", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each half of a round; %(default)s if not said")
    parser.add_argument("--rounds", type=int, default=3, help="how often users is stopped; %(default)s if not said")
    options = parser.parse_args()
    found = asyncio.run(main(options.seconds, options.rounds))
    for each in found:
        tell(f"not so: {each}")
    sys.exit(1 if found else 0)
