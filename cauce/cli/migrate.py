"""`cauce migrate`: the tables of a bus in PostgreSQL, made or upgraded before services run."""

from __future__ import annotations

import asyncio

import click

from cauce.backends import installed, scheme_of, without_password
from cauce.cli.place import as_json, bus
from cauce.cli.text import one_line, print_json
from cauce.clock import SystemClock
from cauce.errors import Refused

__all__ = ["migrate"]


@click.command()
@bus
@as_json
@click.option("--sql", "script", is_flag=True, help="Print the whole as a script for psql, and change nothing.")
def migrate(url: str, as_json: bool, script: bool) -> None:
    """Make or upgrade the schema of a bus in PostgreSQL, in one transaction; what is up to date is left alone.

    With --sql nothing is changed: a role that may make schemas runs the script, which ends with the rights that an
    ordinary role needs.
    """
    if scheme_of(url) != "postgresql":
        raise Refused(f"{without_password(url)} needs no migration: this is for a bus at postgresql://…")
    with installed("postgres"):
        from cauce.backends.postgres import link, migrations
    if script:
        click.echo(migrations.sql(link.Link(url, SystemClock()).schema))
        return
    done = asyncio.run(migrations.migrate(url, SystemClock()))
    if as_json:
        print_json({"steps": done})
    else:
        click.echo(f"{one_line(without_password(url))}: {', '.join(done) or 'nothing to do'}")
