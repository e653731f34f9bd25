"""The commands: where each stands, and how it is made when it is used.

A command's module, and with it torch, is imported when the command is used, so that help, the version and errors about
commands come at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from parties.cli.config import can_show
from secure.errors import InvalidInput

Function = Callable[..., None]


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


CONTEXTS = {"check": {"allow_extra_args": True, "ignore_unknown_options": True}}
"""Settings of typer for single commands: check takes the options of another command."""


# the forms of commands


def as_it_is(command: Function) -> Any:
    """Make nothing else of a command that takes no deployment."""
    return command


def with_options(group: str) -> Callable[[Function], Any]:
    """Make a command that connects to a served model. group: the class of its options in ``parties.cli.asking``."""

    def form(command: Function) -> Any:
        from parties.cli import asking
        from parties.cli.options import for_deployments, spread
        from secure.deployments.deployment import CONNECT

        return for_deployments(spread(command, getattr(asking, group)), CONNECT)

    return form


def compiling(command: Function) -> Any:
    """Make a command that compiles a model."""
    from parties.cli.options import for_deployments
    from secure.deployments.deployment import COMPILE

    return for_deployments(command, COMPILE)


def serving(command: Function) -> Any:
    """Make a command that compiles a model and hosts it."""
    from parties.cli.options import for_deployments
    from secure.deployments.deployment import COMPILE, SERVE

    return for_deployments(command, COMPILE, SERVE)


def sharing(command: Function) -> Any:
    """Make a command that compiles a model for three parties."""
    from parties.cli.options import for_deployments
    from secure.deployments.deployment import COMPILE
    from secure.deployments.three_party import ThreeParty

    return for_deployments(command, COMPILE, only=ThreeParty)


@dataclass(frozen=True)
class Verb:
    """A command. place: its module in this package, and its function. form: makes of the function what typer takes.

    help: the first paragraph of the function's docstring, so that commands are listed without their modules.
    """

    place: str
    form: Callable[[Function], Any]
    help: str

    def command(self, name: str) -> Any:
        """Import it and make it anew: every deployment that is registered by now is among its choices and options."""
        module, function = self.place.split(".")
        found = getattr(import_module(f"parties.cli.{module}"), function)
        made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        made.command(name, cls=Command, context_settings=CONTEXTS.get(name))(can_show(self.form(found)))
        return typer.main.get_command(made)


VERBS: Mapping[str, Verb] = {
    "demo": Verb(
        "demo.demo",
        compiling,
        "Run everybody who takes part as processes on this machine, and embed a few sentences privately, or search.",
    ),
    "check": Verb(
        "check.check",
        as_it_is,
        "Try everything that a command needs: certificates, peers, clocks, Programs, port, disk. "
        "Give its own options too.",
    ),
    "embed": Verb(
        "embed.embed",
        with_options("Asking"),
        "Embed texts that the servers never see.",
    ),
    "classify": Verb(
        "tasks.classify",
        with_options("Asking"),
        "Classify texts, pairs of texts, or images that the servers never see.",
    ),
    "tag": Verb(
        "tasks.tag",
        with_options("Asking"),
        "Find entities in texts that the servers never see.",
    ),
    "answer": Verb(
        "tasks.answer",
        with_options("Asking"),
        "Answer a question by a part of a context. The servers see neither.",
    ),
    "rerank": Verb(
        "tasks.rerank",
        with_options("Asking"),
        "Sort documents by how well they answer a query. The servers see neither. A file has its scores in its order.",
    ),
    "search": Verb(
        "tasks.search",
        with_options("Asking"),
        "Find passages in a server's index. The servers learn neither the question nor what was found.",
    ),
    "generate": Verb(
        "generate.generate",
        with_options("Printing"),
        "Continue a text that the servers never see, and print what comes as it comes.",
    ),
    "proxy": Verb(
        "proxy.proxy",
        with_options("Connecting"),
        "Answer on this machine as OpenAI's endpoints do, by a served model that sees nothing of it.",
    ),
    "serve": Verb(
        "serve.serve",
        serving,
        "Serve models that nobody gets to see: to compile, or directories that `unseen compile` wrote.",
    ),
    "index": Verb(
        "index.index",
        as_it_is,
        "Divide documents into passages, embed them in the clear, and write an index for private search.",
    ),
    "compile": Verb(
        "compile.compile_model",
        compiling,
        "Compile a model once, into a directory that `unseen serve DIRECTORY` serves within seconds.",
    ),
    "dealer": Verb(
        "serve.dealer",
        as_it_is,
        "Hand out correlated randomness; sees no input, no weight, no share. Must not collude with either party.",
    ),
    "share-model": Verb(
        "party.share_model",
        sharing,
        "Share a model among three parties: one directory for each, to be given to it and to nobody else.",
    ),
    "party": Verb(
        "party.party",
        as_it_is,
        "Be one of three parties that compute on shares; must not collude with another. Start party 2 first.",
    ),
    "certs": Verb(
        "certs.certs",
        as_it_is,
        "Make an authority and certificates for TLS, renew them, revoke them, list them.",
    ),
    "profile": Verb(
        "profile.profile",
        compiling,
        "Say what a query will cost before anything runs: rounds, bytes, memory, and seconds on given networks.",
    ),
    "plan": Verb(
        "plan.plan",
        compiling,
        "Say what a number of clients takes: cores, memory, disk and bandwidth of each role, latency, and cost.",
    ),
    "compare": Verb(
        "compare.compare",
        as_it_is,
        "Compare variants of a model: cost, seconds and accuracy of each. Give an option again for one more value.",
    ),
    "train": Verb(
        "train.train",
        as_it_is,
        "Put a model into polynomial form, so that no private query compares anything. Run again, it goes on.",
    ),
    "accuracy": Verb(
        "accuracy.accuracy",
        as_it_is,
        "Compare a polynomial model with its original: in floating point, in fixed point, and under the protocol.",
    ),
    "timeline": Verb(
        "timeline.timeline",
        as_it_is,
        "Put both parties' traces of a query on one time line.",
    ),
    "verify": Verb(
        "verify.verify",
        as_it_is,
        "Compare a record of what left a client's machine with what the Programs prescribe.",
    ),
    "token": Verb(
        "token.token",
        as_it_is,
        "Make a token for a client. It is printed once; the file keeps its SHA-256. To revoke it, delete its line.",
    ),
}


class Commands(Mapping[str, Any]):
    """The commands by name, each made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = VERBS[name].command(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)
