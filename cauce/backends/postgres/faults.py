"""What goes wrong between us and the server, told in our errors, each with its cure."""

from __future__ import annotations

import asyncpg
from asyncpg.exceptions import InternalClientError, TargetServerAttributeNotMatched

from cauce.errors import (
    Busy,
    CauceError,
    Damaged,
    NotPermitted,
    Refused,
    StorageFull,
    Unreachable,
)

__all__ = ["GRACE", "SLOWEST", "blamed", "is_lost", "translate"]

SLOWEST = 30
"""Seconds that one statement of a service may take: others wait for it."""

GRACE = 5.0
"""Seconds beyond what the server itself allows, after which one that does not answer counts as gone."""

_THEIRS = {"0A", "21", "22", "23", "24", "25", "26", "27", "2B", "2D", "2F", "34", "38", "39", "3B", "3D", "3F", "42", "44", "54", "P0"}  # fmt: skip
"""Classes of SQLSTATE that say that the statement is wrong, or what it was given."""

_LOST = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.DatabaseDroppedError,
    TargetServerAttributeNotMatched,
)
_NO_PRIMARY = (
    "the server is a replica, or takes no writes: name its primary, or all hosts (host1,host2), in the address"
)
_CURES: tuple[tuple[tuple[type[BaseException], ...], type[CauceError], str], ...] = (
    ((TargetServerAttributeNotMatched, asyncpg.ReadOnlySQLTransactionError), Unreachable, _NO_PRIMARY),
    ((asyncpg.TooManyConnectionsError,), Busy, "close connections, or raise max_connections on the server"),
    (
        (asyncpg.InvalidAuthorizationSpecificationError,),
        NotPermitted,
        "mend the user or password in the address, or let the user in (pg_hba.conf)",
    ),
    (
        (asyncpg.InsufficientPrivilegeError,),
        NotPermitted,
        "grant it (cauce migrate --sql says which rights are needed)",
    ),
    ((asyncpg.InvalidCatalogNameError,), Refused, "create the database (createdb), or name another one"),
    (
        (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.UndefinedColumnError),
        Refused,
        "bring the schema up to date: cauce migrate",
    ),
    ((asyncpg.InvalidSchemaNameError,), Refused, "make the schema: cauce migrate"),
    (
        (
            asyncpg.LockNotAvailableError,
            asyncpg.QueryCanceledError,
            asyncpg.DeadlockDetectedError,
            asyncpg.SerializationError,
        ),
        Busy,
        "somebody else holds it: wait, or end that session",
    ),
    ((asyncpg.DiskFullError, asyncpg.OutOfMemoryError), StorageFull, "make room on the server, then try again"),
    (
        (asyncpg.DataCorruptedError, asyncpg.IndexCorruptedError, asyncpg.InternalServerError),
        Damaged,
        "look into the server's log, run cauce verify, restore from a backup",
    ),
)


def is_lost(error: BaseException) -> bool:
    """Whether the connection is gone, or was never made: to connect anew may help."""
    if isinstance(error, asyncpg.InterfaceError):
        # asyncpg has no class for it: a statement on a connection that was closed under it.
        return "closed" in str(error) or "closing" in str(error)
    return isinstance(error, _LOST)


def blamed(error: BaseException) -> str | None:
    """What is wrong with a statement of a service, in words; None where the moment is to blame."""
    if isinstance(error, asyncpg.QueryCanceledError):
        return f"it took longer than {SLOWEST} s, and all others wait for it: make it shorter"
    if isinstance(error, asyncpg.PostgresError):
        return str(error) if str(error.sqlstate)[:2] in _THEIRS else None
    if isinstance(error, asyncpg.InterfaceError):
        return None if is_lost(error) else str(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error}: text that is not Unicode cannot be stored"
    return str(error) if isinstance(error, (TypeError, ValueError, OverflowError, Refused)) else None


def translate(error: BaseException, what: str) -> CauceError:
    """Our error for one of asyncpg's or the system's. `what` names the thing: the server, the statement, the store."""
    if isinstance(error, CauceError):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    for kinds, ours, cure in _CURES:
        if isinstance(error, kinds):
            return ours(f"{what}: {text}; {cure}")
    if is_lost(error) or isinstance(error, InternalClientError):
        return Unreachable(f"{what}: {text}; start the server or mend the address: it is tried again by itself")
    return Refused(f"{what}: {text}")
