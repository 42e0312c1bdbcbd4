"""The example of a service that blocks: what it shows comes true, and it says so where it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from blocked.__main__ import compare
from blocked.load import Load

ROOT = Path(__file__).parent.parent


def test_the_example_of_a_stopped_service_shows_breaker_fallback_steady_others_and_recovery() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blocked", "--rounds", "2"],
        cwd=ROOT / "examples",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "users is stopped", "breaker of users: open, ", "users goes on", "breaker of users: closed, a call came through",
        "pages come from users again",
    ):  # fmt: skip
        assert done.stdout.count(line) >= 2, done.stdout
    pages, copied = re.search(r"while users was stopped: ([\d,]+) pages, ([\d,]+) of them", done.stdout).groups()  # type: ignore[union-attr]
    assert int(pages.replace(",", "")) >= int(copied.replace(",", "")) > 0


def test_the_example_says_where_the_others_were_held_up() -> None:
    well, stopped = Load(1), Load(1)
    well.p99 = {"cards": [0.03, 0.01], "crm": [0.01, 0.02]}
    stopped.p99 = {"cards": [0.02, 0.03], "crm": [0.05, 0.019]}
    assert compare(well, stopped) == ["the p99 of cards has doubled"]
