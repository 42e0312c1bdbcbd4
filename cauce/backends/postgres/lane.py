"""A connection of its own for statements that go one after the other, so that what comes meanwhile goes together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg

from cauce.backends.postgres.link import Link, Session, translate
from cauce.errors import Unreachable

__all__ = ["Lane"]

_LONGEST = 10.0
"""Seconds after which a statement that says nothing is given up, and its connection with it."""


class Lane:
    """Opened with its first statement, and again after it was lost. One statement at a time, which its user sees to.

    What it writes need not be on the disk.

    Parameters:
        link: whose connection it is, asked whenever one is made.
    """

    def __init__(self, link: Callable[[], Link], role: str) -> None:
        self._link, self._role = link, role
        self._session: Session | None = None
        self.made = 0
        """How many connections it has had."""

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """The rows of a statement.

        Raises `Unreachable` if there is no connection, so that the statement surely did nothing; `ConnectionError` if
        the connection was lost while it ran, so that it is not known whether it did.
        """
        session = await self._open()
        try:
            async with asyncio.timeout(_LONGEST):
                return await session.fetch(statement, *values)
        except Exception as error:
            await self._lost(session, error)
            raise
        except BaseException:
            session.terminate()
            raise

    async def _open(self) -> Session:
        if self._session is None or self._session.is_closed():
            try:
                self._session = await self._link().dedicated(self._role, synchronous_commit="off")
            except TimeoutError as error:
                raise Unreachable(f"{self._link().url} does not answer: {error}") from None
            self.made += 1
        return self._session

    async def _lost(self, session: Session, error: Exception) -> None:
        what = self._link().url
        if isinstance(error, TimeoutError):
            session.terminate()
            raise ConnectionError(f"{what} does not answer") from None
        ours = translate(error, what)
        if isinstance(ours, Unreachable):
            session.terminate()
            raise ConnectionError(str(ours)) from None
        raise ours from error

    def close(self) -> None:
        """Let go of the connection."""
        if self._session is not None:
            self._session.terminate()
            self._session = None
