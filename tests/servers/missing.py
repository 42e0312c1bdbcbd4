"""What happens where a server is not installed: a failure on CI, elsewhere a skip that says what to install."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

__all__ = ["Missing", "absent", "on_ci"]


class Missing(Exception):
    """A server is not on this machine; the message says which, and how it gets there."""


def on_ci() -> bool:
    """Whether these tests decide about a change: then none of them may be left out."""
    return any(os.environ.get(name, "") not in ("", "0", "false") for name in ("CI", "CAUCE_CI"))


def absent(missing: Missing, *, must: bool = True) -> NoReturn:
    """Ends a test that needs what is missing.

    Parameters:
        must: False for what a test only has where it happens to be.
    """
    if must and on_ci():
        pytest.fail(f"{missing}. On CI no test is left out.", pytrace=False)
    pytest.skip(str(missing))
