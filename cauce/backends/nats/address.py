"""The address of a bus on NATS: which servers, who asks, what the bus is called, how often it is stored."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlencode

import msgspec

from cauce.backends import without_password
from cauce.errors import Refused

__all__ = ["Address", "parse", "renamed"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_SHAPE = re.compile(r"(nats|tls)://(?:([^@/]*)@)?([^@/?]+)(?:/([^?]*))?(?:\?(.*))?\Z")


class Address(msgspec.Struct, frozen=True):
    """`shown` is the address as anybody may see it. `bus` is empty where subjects have no prefix.

    `files` is the folder for those stores that are files, empty for one that is named after the bus. `sync` is what the
    operator says of the servers' `sync_interval`, empty where nothing is said.
    """

    servers: tuple[str, ...]
    shown: str
    user: str | None = None
    password: str | None = None
    bus: str = ""
    replicas: int = 1
    files: str = ""
    sync: str = ""


def parse(url: str) -> Address:
    """The parts of `nats://user:password@host:4222,host2:4222/shop?replicas=3`. Raises `Refused` for anything else.

    The path is the name of the bus: its streams and subjects begin with it, so that one server carries several.
    A user without a password is a token.
    """
    found = _SHAPE.match(url)
    if found is None:
        raise Refused(
            f"bus address {without_password(url)!r}: write nats://host:4222, or nats://user:password@host,host2/shop?replicas=3"
        )
    scheme, user, hosts, bus, query = found.groups()
    if bus and not _NAME.match(bus):
        raise Refused(f"bus name {bus!r} in the address: use letters, digits, - and _ (at most 64)")
    name, colon, password = (user or "").partition(":")
    return Address(
        tuple(f"{scheme}://{host}" for host in hosts.split(",") if host),
        without_password(url),
        unquote(name) if user else None,
        unquote(password) if colon else None,
        bus or "",
        *_options(query or ""),
    )


def renamed(url: str, bus: str, files: str) -> str:
    """The same servers and user, but another bus, whose stores that are files lie in this folder."""
    found = _SHAPE.match(url)
    assert found is not None
    scheme, user, hosts, _, query = found.groups()
    options = {**dict(parse_qsl(query or "")), "files": files}
    return f"{scheme}://{'' if user is None else f'{user}@'}{hosts}/{bus}?{urlencode(options)}"


def _options(query: str) -> tuple[int, str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    replicas, files, sync = options.pop("replicas", "1"), options.pop("files", ""), options.pop("sync", "")
    if options:
        raise Refused(
            f"the address of a bus on NATS takes no {', '.join(sorted(options))}: it takes replicas (1, 3 or 5), files (a folder) "
            "and sync=always"
        )
    if replicas not in ("1", "2", "3", "4", "5"):
        raise Refused(f"replicas={replicas} in the address of the bus: 1, 3 or 5 servers can hold each entry")
    if sync not in ("", "always"):
        raise Refused(
            f"sync={sync} in the address of the bus: say sync=always where all servers have sync_interval: always, else nothing"
        )
    return int(replicas), files, sync
