"""The server that `--bus` names, and the places on it where contenders work: nobody used them before, gone afterwards.

An address names a server, `nats://host:4222`, or a database, `postgresql://user:password@host/database`. `nats://`
alone means servers of our own, one for each turn, from the extra `bench`, with their store in a folder of the run: one
as it comes, which acknowledges what lies in the page cache and flushes every two minutes, or one with
`sync_interval: always`, which flushes before it acknowledges.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nats
import psycopg
from psycopg.sql import SQL, Identifier

from cauce.backends import scheme_of
from cauce.backends.nats.address import parse

__all__ = ["NATS", "kind_of", "nats_bus", "nats_server", "postgres_bus", "told"]

NATS = "nats://"
"""Servers of our own."""

_PATIENCE = 10.0
_numbers = itertools.count(1)


def kind_of(bus: str) -> str:
    """`postgres` or `nats`. Raises `ValueError` for what names no server alone."""
    if bus == NATS:
        return "nats"
    try:
        kind = scheme_of(bus)
        if kind == "nats" and parse(bus).bus:
            raise ValueError("name the server alone: the benchmark makes buses of its own there")
    except ConnectionError as error:
        raise ValueError(str(error)) from None
    if kind == "sqlite":
        raise ValueError("SQLite is what is measured without --bus, on files of its own")
    return {"postgresql": "postgres"}.get(kind, kind)


def _name() -> str:
    return f"bench_{os.getpid()}_{next(_numbers)}"


# ----------------------------------------------------------------------------------------------------- PostgreSQL


@contextmanager
def postgres_bus(url: str) -> Iterator[str]:
    """The address of a schema that is not there yet. It is dropped afterwards, with the stores beside it."""
    name = _name()
    try:
        yield f"{url}{'&' if '?' in url else '?'}schema={name}"
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            for (schema,) in connection.execute(
                "select nspname from pg_namespace where nspname = %s or starts_with(nspname, %s)", (name, f"{name}_")
            ).fetchall():
                connection.execute(SQL("drop schema {} cascade").format(Identifier(schema)))


def told(url: str) -> str:
    """What the database says of itself, as far as it decides what a commit costs."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "select name, setting from pg_settings where name = any(%s)",
            (["fsync", "server_version", "synchronous_commit", "wal_sync_method"],),
        ).fetchall()
    return ", ".join(f"{name} = {setting}" for name, setting in rows)


# ----------------------------------------------------------------------------------------------------------- NATS


@contextmanager
def nats_bus(url: str, folder: Path, *, flushed: bool = False) -> Iterator[str]:
    """The address of a bus that is not there yet.

    Parameters:
        flushed: whether a server of our own flushes before it acknowledges; one that was named does as it is set.
    """
    if url == NATS:
        with nats_server(folder, flushed=flushed) as address:
            yield f"{address}/bench"
        return
    name = _name()
    try:
        yield f"{url.rstrip('/')}/{name}"
    finally:
        asyncio.run(_remove(url, name))


async def _remove(url: str, name: str) -> None:
    client = await nats.connect(url)
    streams = client.jetstream()
    for info in await streams.streams_info():
        stream = str(info.config.name)
        if stream.startswith((f"{name}_", f"KV_{name}_")):
            await streams.delete_stream(stream)
    await client.close()


@contextmanager
def nats_server(folder: Path, *, flushed: bool = False) -> Iterator[str]:
    """A server with a store of its own, gone afterwards. Gives its address."""
    with TemporaryDirectory(dir=folder) as store:
        settings = Path(store) / "server.conf"
        settings.write_text(
            f'listen: "127.0.0.1:-1"\nports_file_dir: "{store}"\n'
            f'jetstream {{ store_dir: "{store}"{", sync_interval: always" if flushed else ""} }}\n'
        )
        process = subprocess.Popen(
            [str(Path(sysconfig.get_path("scripts")) / "nats-server"), "-c", str(settings)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield _address(Path(store) / f"nats-server_{process.pid}.ports")
        finally:
            process.terminate()
            process.wait(timeout=_PATIENCE)


def _address(ports: Path) -> str:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            address: str = json.loads(ports.read_text())["nats"][0]
            return address
        except (OSError, ValueError):
            time.sleep(0.01)
    raise RuntimeError("the NATS server did not start")
