"""The command line. Commands are loaded when they are named, so that `cauce --help` answers at once."""

from __future__ import annotations

import sys

try:
    import importlib
    from collections.abc import Sequence
    from typing import Any

    import click

    from cauce.cli.endings import INTERRUPTED, UNREAD, ending, no_room, quietly
    from cauce.cli.streams import present
except KeyboardInterrupt:
    # Most of the time before a command runs is spent here, and Ctrl-C may come then, too.
    sys.exit(130)

__all__ = ["main"]

# Name: (module and command, what `cauce --help` says of it).
COMMANDS = {
    "run": ("run:run", "Run services until SIGTERM or Ctrl-C."),
    "services": ("services:services", "Who runs on a bus, what they answer, and how they are."),
    "consumers": ("consumers:consumers", "How far each consumer is behind, what waits, and how fast it goes."),
    "top": ("top:top", "Who runs and how far all consumers are, live."),
    "demo": ("demo:demo", "See it at work: a user registers on a form, and a mail arrives."),
    "tail": ("tail:tail", "The last entries of a log, and with --follow the next ones."),
    "show": ("show:show", "All entries of one stream, with bodies."),
    "state": ("state:state", "How one thing stands, or stood at a version or a time."),
    "history": ("history:history", "What changed of one thing, by which event and whose wish."),
    "undo": ("undo:undo", "Take one thing back, by facts that compensate."),
    "dead": ("dead:dead", "Messages that failed too often: list, show, retry, discard."),
    "timers": ("timers:timers", "Messages that wait for their time, and intervals: list, cancel."),
    "import": ("import_:import_", "Bring events from a file of JSON lines."),
    "export": ("export:export", "Write a log as JSON lines of CloudEvents."),
    "verify": ("verify:verify", "Read all of a log and say what is not as it was written."),
    "doctor": ("doctor:doctor", "Say whether a backend is set up so that the promises hold."),
    "migrate": ("migrate:migrate", "Make or upgrade the tables of a bus in PostgreSQL."),
    "backup": ("backup:backup", "Copy a log while it is written, and verify the copy."),
    "schema": ("schema:schema", "What messages look like in each version: lock it, and check what changed."),
    "rebuild": ("rebuild:rebuild", "Build a view or replica anew, beside the one in use."),
    "reset": ("reset:reset", "After a restore: let a service go on with the log that is."),
    "restore": ("restore:restore", "Put a backup in the place of a log, under a new id."),
}


class _Lazy(click.Group):
    """A group that loads a command when it is asked for it, and ends as `cauce.cli.endings` says."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"cauce.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with ending(ctx):
            return super().invoke(ctx)

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        present()
        code: Any
        out, err = sys.stdout, sys.stderr
        try:
            code = super().main(args, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (KeyboardInterrupt, click.Abort):
            code = INTERRUPTED
        except SystemExit:
            # Where the help is not read, click wraps what it prints to, and ends with 1.
            if sys.stdout is out:
                raise
            sys.stdout, sys.stderr, code = out, err, UNREAD
        except BrokenPipeError:
            code = UNREAD
        except OSError as error:
            code = no_room(error)
        with quietly():
            sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cauce", message="%(version)s")
def main() -> None:
    """Cauce: a bus that remembers, owners of data, and consumers that copy or ask.

    Ends with 0 if all went well, 1 if it was refused, 2 for wrong usage, 3 if a command was rejected, 4 if something
    is busy or absent for the moment, 5 if stored data is damaged, 6 if a check found something.
    """
