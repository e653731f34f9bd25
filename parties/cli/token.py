"""The command ``unseen token``, and how a client's command is given one."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parties.cli.console import say, write
from parties.limits.tokens import Token, Tokens, new_holder
from parties.net.secret_files import read_secret
from secure.errors import InvalidInput

VARIABLE = "UNSEEN_TOKEN"
DAYS = 365

Action = StrEnum("Action", {a: a for a in ("new", "list")})  # type: ignore[misc]
NEW = Action["new"]

TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="FILE", help=f"A file with the token that the service asks for; ${VARIABLE} by default."
    ),
]


def token(
    action: Annotated[Action, typer.Argument(help="new: make a token; list: show who has one, and until when.")],
    name: Annotated[str | None, typer.Argument(help="The name under which its holder is counted.")] = None,
    tokens: Annotated[Path, typer.Option(help="The service's file of tokens, to which a line is added.")] = Path(
        "tokens"
    ),
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help=f"Days for which the token is valid; {DAYS} by default.")
    ] = None,
) -> None:
    """Make a token for a client. It is printed once; the file keeps its SHA-256. To revoke it, delete its line."""
    if action != NEW:
        for what, given in (("NAME", name), ("--days", days)):
            if given is not None:
                raise InvalidInput(f"{what} means nothing to unseen token {action}", "leave it out")
        for each in Tokens(tokens).holders():
            write(f"{each.name} until {each.until}\n")
        return
    if name is None:
        raise InvalidInput("a token needs a name", "unseen token new NAME")
    fresh = Token.fresh()
    holder = new_holder(fresh, name, days or DAYS)
    if tokens.exists() and any(each.name == name for each in Tokens(tokens).holders()):
        raise InvalidInput(f"{tokens} has a token of the name {name!r}", "delete its line first, or take another name")
    try:
        with os.fdopen(os.open(tokens, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a+b") as file:
            if file.tell() and not tokens.read_bytes().endswith(b"\n"):
                file.write(b"\n")
            file.write(f"{holder.line()}\n".encode())
    except OSError as error:
        raise InvalidInput(
            f"--tokens: {tokens} cannot be written: {error.strerror}", "give a file of your own"
        ) from None
    say(f"unseen token: {name}, valid until {holder.until}; the service knows it by {tokens}. This is shown once:")
    write(f"{fresh.text}\n")


def given_token(file: Path | None) -> str | None:
    """Return the token in a file, else that of the variable; None if neither is given. Raises InvalidInput."""
    if file is None:
        return os.environ.get(VARIABLE) or None
    try:
        return read_secret(file, most=1000).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput(f"--token-file: {file} cannot be read: {reason}", "a file with one token") from None
