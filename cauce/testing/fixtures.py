"""The pytest fixtures: `bus_url`, an address on a temporary file, and `running_bus`, which runs services there.

```python
async def test_a_user_is_registered(running_bus):
    async with running_bus(users.service) as bus:
        await bus.call(RegisterUser("42", "Ana", "ana@example.org"))
```
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cauce.bus import Bus

__all__ = ["bus_url", "running_bus"]


@pytest.fixture
def bus_url(tmp_path: Path) -> str:
    """The address of a bus on a temporary file of this test."""
    return f"sqlite:///{tmp_path / 'bus.db'}"


@pytest.fixture
def running_bus(bus_url: str) -> Callable[..., AbstractAsyncContextManager[Bus]]:
    """`running` on the bus of this test: pass services, and `clock=` to drive time."""
    # Every pytest of an environment loads this module, whether it uses Cauce or not.
    from functools import partial

    from cauce.runtime import running

    return partial(running, bus=bus_url)
