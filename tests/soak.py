"""`make soak`: the tests of faults, round after round, each with a seed of its own, until the time is over.

`CAUCE_SOAK_SECONDS` says for how long, 600 if not said; `CAUCE_SOAK_SEED` with which seed to begin. At a failure it
prints the line that repeats it, and ends with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

__all__ = ["main", "rounds"]

ROOT = Path(__file__).parent.parent
FAULTS = (
    ("tests/test_history.py", ""),
    ("tests/test_churn.py", "sqlite"),
    ("tests/test_churn.py", "postgresql"),
    ("tests/test_churn.py", "nats"),
    ("tests/test_kills.py", ""),
    ("tests/test_concurrency.py", "taken_over or takes_over or order"),
    ("tests/test_instances.py", "kills or dies or stopped or hand_over"),
)
"""The files, and which tests of them."""


def rounds(seed: int) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """For ever: the seed of each round, its command, and what it sets in the environment."""
    number = 0
    while True:
        file, wanted = FAULTS[number % len(FAULTS)]
        mine = Random(f"{seed} {number}").randrange(1, 1_000_000)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "600", file]
        settings = {"CAUCE_CHAOS_SEED": str(mine), "CAUCE_CHAOS_SECONDS": "20", "CAUCE_CHURN_SECONDS": "20"}
        yield mine, [*command, *(["-k", wanted] if wanted else [])], settings
        number += 1


def main() -> int:
    """Run rounds until the time is over; 1 at the first that fails."""
    seconds = float(os.environ.get("CAUCE_SOAK_SECONDS", "600"))
    seed = int(os.environ.get("CAUCE_SOAK_SEED") or Random().randrange(1, 1_000_000))
    until = time.monotonic() + seconds
    say(f"soaking for {seconds:g} s from CAUCE_SOAK_SEED={seed}")
    for mine, command, settings in rounds(seed):
        if time.monotonic() >= until:
            say("all held")
            return 0
        began = time.monotonic()
        say(f"seed {mine}: {' '.join(command[-3:] if '-k' in command else command[-1:])}")
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
        # 5: nothing of that name is there, which is no success either.
        if done.returncode:
            say(done.stdout + done.stderr)
            line = " ".join(f"{name}={value}" for name, value in settings.items())
            words = " ".join(f"'{each}'" if " " in each else each for each in command[3:])
            say(f"FAILED with seed {mine}. Again: {line} .venv/bin/pytest {words}")
            return 1
        say(f"  held, in {time.monotonic() - began:.0f} s: {done.stdout.strip().splitlines()[-1]}")
    return 0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
