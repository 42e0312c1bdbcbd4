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

__all__ = ["is_lost", "translate"]

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
