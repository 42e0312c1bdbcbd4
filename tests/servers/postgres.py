"""A PostgreSQL server of our own, from the binaries of this machine."""

from __future__ import annotations

import functools
import os
import pwd
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Literal

from tests.servers.missing import Missing
from tests.servers.process import Process, free_port

__all__ = ["Postgres"]

USER = "postgres"
CURE = (
    "PostgreSQL 14 or newer is not on this machine (initdb and postgres, on PATH or in /usr/lib/postgresql): "
    "apt install postgresql, dnf install postgresql-server or brew install postgresql"
)
STOPS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class Postgres:
    """One server with the database `cauce`, superuser `postgres`, and no passwords on loopback.

    Raises `Missing` where there are no binaries.

    Parameters:
        settings: of the server, as `fsync="off"`.
    """

    def __init__(self, **settings: str) -> None:
        self.bin = binaries()
        self.port = free_port()
        # As root it refuses to run.
        self.process = Process("postgres", user=_unprivileged() if os.geteuid() == 0 else None)
        self.data = self.process.folder / "data"
        self.settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "on",
            "shared_buffers": "32MB",
            "max_connections": "200",
            "log_line_prefix": "%m [%p] %a ",
            **settings,
        }
        try:
            self._run(
                "initdb", "-D", str(self.data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"
            )
            self.start()
            self.sql("create database cauce", database="postgres")
        except BaseException:
            self.remove()
            raise

    def start(self) -> None:
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        command = [
            str(self.bin / "postgres"),
            "-D",
            str(self.data),
            *(part for each in settings for part in ("-c", each)),
        ]
        self.process.start(command, self._ready)

    def _ready(self) -> bool:
        """The last line of its own note says how far it is, the first who wrote it."""
        note = self.data / "postmaster.pid"
        lines = note.read_text().splitlines() if note.exists() else []
        return len(lines) > 7 and lines[0] == str(self.process.pid) and lines[7].strip() == "ready"

    def url(self, database: str = "cauce", *, schema: str | None = None, user: str = USER) -> str:
        """The address of a bus in a database; each schema is another bus."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}" + (f"?schema={schema}" if schema else "")

    def sql(self, *statements: str, database: str = "cauce") -> list[list[str]]:
        """Run statements, each by itself, from wherever; the rows of all of them, as text."""
        told = self._run(
            *("psql", "-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-d", self.url(database)),
            *(part for each in statements for part in ("-c", each)),
        )
        return [line.split("\t") for line in told.splitlines()]

    def drop(self, schema: str) -> None:
        """Take a bus away, with what its services keep; that there is none is fine."""
        names = self.sql(f"select quote_ident(nspname) from pg_namespace where nspname ~ '^{schema}(_|$)'")
        self.sql("set client_min_messages = error", *(f"drop schema {name} cascade" for (name,) in names))

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        self.process.stop(STOPS[mode])

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """`immediate` is what a crash leaves: nothing is finished, and the log is read back."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL to all its processes; `start` recovers."""
        self.process.kill()

    def pause(self) -> None:
        """All its processes hang, and its connections stay open."""
        self.process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.signal(signal.SIGCONT)

    def log(self) -> str:
        return self.process.log()

    def remove(self) -> None:
        self.process.remove()

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self.process.folder,
            user=self.process.user,
            extra_groups=None if self.process.user is None else [],
            env=os.environ | {"LC_ALL": "C", "TZ": "UTC"},
            timeout=60,
        )
        assert done.returncode == 0, f"{program} failed:\n{done.stdout}{done.stderr}\n{self.log()[-2000:]}"
        return done.stdout


@functools.cache
def binaries() -> Path:
    """The folder with initdb, postgres and psql: on PATH, else the newest of Debian's, else as pg_config says."""
    folders = [Path(found).resolve().parent for found in (shutil.which("postgres"), shutil.which("initdb")) if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    if config := shutil.which("pg_config"):
        told = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
        folders += [Path(told)] if told else []
    for folder in folders:
        if all(os.access(folder / each, os.X_OK) for each in ("initdb", "postgres", "psql")) and _major(folder) >= 14:
            return folder
    raise Missing(CURE)


def _version(folder: Path) -> float:
    try:
        return float(folder.parent.name)
    except ValueError:
        return 0.0


def _major(folder: Path) -> int:
    told = subprocess.run([str(folder / "postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)", told)
    return int(found[1]) if found else 0


def _unprivileged() -> str:
    names = {each.pw_name for each in pwd.getpwall()}
    return next(name for name in (USER, "nobody") if name in names)
