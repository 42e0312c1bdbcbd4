"""`python -m loans FILE`: feeds the bank's log to a bus, then asks what became of the loans."""

import argparse
import asyncio
from pathlib import Path

from cauce import running
from loans import applications, offers, outcomes, work
from loans.feed import LogClock, feed
from loans.lines import lines

SERVICES = (applications.service, offers.service, work.service, outcomes.service)


async def main(file: Path, url: str) -> None:
    clock = LogClock()
    async with running(*SERVICES, bus=url, clock=clock) as bus:
        began = clock.monotonic()
        count = await feed(bus, lines(file))
        seconds = clock.monotonic() - began
        await bus.settled(timeout=600)
        print(f"{count:,} lines in {seconds:.1f} s, {count / seconds:,.0f} a second")
        standing, requested = await bus.ask(outcomes.Standing()), await bus.ask(outcomes.Requested())
        for step, many in standing.items():
            print(f"{many:11,} {step}")
        print(f"{requested:11,} asked for")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m loans", description=__doc__)
    parser.add_argument("file", type=Path, help="the log: one JSON object a line, plain or gzip")
    parser.add_argument("--bus", default="sqlite:///.cauce/loans.db", help="its address; %(default)s if not said")
    told = parser.parse_args()
    asyncio.run(main(told.file, told.bus))
