"""The command ``unseen``: a few verbs, errors in words, no traceback for a user's mistake."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from parties.cli.config import CommandSettings, ConfigOption, configured, read_file
from parties.cli.console import OUT, say_error
from parties.cli.streams import settle_streams
from parties.cli.verbs import VERBS, Commands
from secure.errors import Error
from secure.version import __version__


class Verbs(TyperGroup):
    """The commands, of which the one that is asked for is made."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands: Any = Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with its help alone, for the list of commands."""
        return TyperCommand(cmd_name, help=VERBS[cmd_name].help) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is asked for as a whole."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and self.commands[name], rest


def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
    config: ConfigOption = None,
) -> None:
    """Private transformer inference: servers never see the input, the client never gets the weights (semi-honest)."""
    if version:
        OUT.print(f"unseen {__version__}")
        raise typer.Exit
    commands: Commands = context.command.commands  # type: ignore[attr-defined]
    configured(context, CommandSettings(*read_file(config), commands))


def app() -> typer.Typer:
    """The commands, made anew: every deployment that is registered by now is among their choices and options."""
    made = typer.Typer(cls=Verbs, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    made.callback(invoke_without_command=True)(start)
    return made


def app_main() -> None:
    """Entry point: errors that a user can cause end with a message and code 1."""
    settle_streams()
    try:
        app()()
    except (Error, ValueError, ImportError, OSError) as error:
        say_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
