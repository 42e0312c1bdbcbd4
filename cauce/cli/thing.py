"""Which thing a command looks back at, and what folds it: the functions of a module, its service need not run."""

from __future__ import annotations

import unicodedata
from contextlib import suppress
from datetime import datetime

import click

from cauce.accept import check_stream
from cauce.cli.run import find
from cauce.codec import micros, moment
from cauce.errors import CauceError, Refused
from cauce.fold import Folder
from cauce.folding import fold_of
from cauce.messages import Domain
from cauce.service import Service, bind

__all__ = ["exact_time", "owner_of", "thing", "time_given", "version_or_time"]


def thing(module: str, stream: str) -> tuple[Folder, str]:
    """What folds a stream, and the key. Raises `Refused` as `owner_of`."""
    service, domain, key = owner_of(module, stream)
    return fold_of(bind(service), domain), key


def owner_of(module: str, stream: str) -> tuple[Service, Domain, str]:
    """The service and domain of a stream, and the key. Raises `Refused` where no service of the module owns it."""
    # As keys are stored, whatever form a keyboard or a file system gives them.
    name, _, key = check_stream(unicodedata.normalize("NFC", stream)).partition("/")
    owned = {domain.name: (service, domain) for service in find(module).values() for domain in service.owns}
    if name not in owned:
        raise Refused(
            f"no service in {module} owns {name!r}, only {', '.join(sorted(owned)) or 'none'}: "
            "name the module that has its evolve functions"
        )
    return *owned[name], key


def version_or_time(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | datetime | None:
    """A version, or a time as in RFC 3339; without a zone it is that of the machine, without a time it is midnight."""
    if value is None:
        return None
    if value.isascii() and value.isdecimal():
        return int(value)
    if (when := _moment(value)) is not None:
        return when
    raise click.BadParameter(f"{value!r} is neither a version nor a time: write 3, {_TIMES}")


def time_given(ctx: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    """A time, as `version_or_time` takes it."""
    when = None if value is None else _moment(value)
    if value is not None and when is None:
        raise click.BadParameter(f"{value!r} is no time: write {_TIMES}")
    return when


_TIMES = "2026-01-31, 2026-01-31T12:30 or 2026-01-31T12:30:00+01:00"


def _moment(value: str) -> datetime | None:
    with suppress(ValueError, OverflowError, OSError, CauceError):
        when = datetime.fromisoformat(value)
        return moment(micros(when if when.tzinfo is not None else when.astimezone()))
    return None


def exact_time(when: datetime) -> str:
    """A moment on the clock of whoever reads it, with all that it needs to be given as `--at` again."""
    with suppress(OverflowError, ValueError, OSError):
        when = when.astimezone()
    fine = "microseconds" if when.microsecond % 1000 else "milliseconds"
    return when.replace(tzinfo=None).isoformat(" ", fine)
