"""The command ``unseen``: a few verbs, errors in words, no traceback for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import secure
from parties.cli.accuracy import accuracy
from parties.cli.asking import Asking, Connecting, Printing
from parties.cli.certs import certs
from parties.cli.check import check
from parties.cli.compare import compare
from parties.cli.compile import compile_model
from parties.cli.config import CommandSettings, ConfigOption, can_show, configured, read_file
from parties.cli.console import OUT, say_error
from parties.cli.demo import demo
from parties.cli.embed import embed
from parties.cli.generate import generate
from parties.cli.index import index
from parties.cli.options import for_deployments, spread
from parties.cli.party import party, share_model
from parties.cli.plan import plan
from parties.cli.profile import profile
from parties.cli.proxy import proxy
from parties.cli.serve import dealer, serve
from parties.cli.tasks import answer, classify, rerank, search, tag
from parties.cli.timeline import timeline
from parties.cli.token import token
from parties.cli.train import train
from parties.cli.verify import verify
from secure.deployments.deployment import COMPILE, CONNECT, SERVE
from secure.deployments.three_party import ThreeParty
from secure.errors import Error, InvalidInput

ASKING: tuple[Callable[..., None], ...] = (embed, classify, tag, answer, rerank, search)
"""The commands that ask a served model."""

CONTEXTS = {"check": {"allow_extra_args": True, "ignore_unknown_options": True}}
"""Settings of typer for single commands: check takes the options of another command."""


class Command(TyperCommand):
    """A command that refuses an option of one value that is given twice, as only the last would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise InvalidInput for such an option."""
        single = {name for p in self.params for name in p.opts if p.nargs == 1 and not getattr(p, "multiple", True)}
        given = args[: args.index("--")] if "--" in args else args
        said = [name for argument in given if (name := argument.partition("=")[0]) in single]
        if twice := next((name for name in said if said.count(name) > 1), None):
            raise InvalidInput(f"{twice} is given twice", "it takes one value")
        return super().parse_args(ctx, args)


def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
    config: ConfigOption = None,
) -> None:
    """Private transformer inference: servers never see the input, the client never gets the weights (semi-honest)."""
    if version:
        OUT.print(f"unseen {secure.__version__}")
        raise typer.Exit
    commands: dict[str, Any] = dict(context.command.commands)  # type: ignore[attr-defined]
    configured(context, CommandSettings(*read_file(config), commands))


def app() -> typer.Typer:
    """The commands, made anew: every deployment that is registered by now is among their choices and options."""
    made = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    made.callback(invoke_without_command=True)(start)
    verbs = {
        "demo": for_deployments(demo, COMPILE),
        "check": check,
        **{command.__name__: for_deployments(spread(command, Asking), CONNECT) for command in ASKING},
        "generate": for_deployments(spread(generate, Printing), CONNECT),
        "proxy": for_deployments(spread(proxy, Connecting), CONNECT),
        "serve": for_deployments(serve, COMPILE, SERVE),
        "index": index,
        "compile": for_deployments(compile_model, COMPILE),
        "dealer": dealer,
        "share-model": for_deployments(share_model, COMPILE, only=ThreeParty),
        "party": party,
        "certs": certs,
        "profile": for_deployments(profile, COMPILE),
        "plan": for_deployments(plan, COMPILE),
        "compare": compare,
        "train": train,
        "accuracy": accuracy,
        "timeline": timeline,
        "verify": verify,
        "token": token,
    }
    for name, function in verbs.items():
        made.command(name, cls=Command, context_settings=CONTEXTS.get(name))(can_show(function))
    return made


def app_main() -> None:
    """Entry point: errors that a user can cause end with a message and code 1."""
    try:
        app()()
    except (Error, ValueError, ImportError, OSError) as error:
        say_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
