"""The table of who learns what in a deployment, for the terminal and as Markdown for README and SECURITY.md.

In a document the table stands between the lines ``<!-- who-learns:NAME -->`` and ``<!-- /who-learns -->``; NAME is a
deployment's, or that of one of its variants ("three-party-public-weights"). The tables are written anew by
``python -m parties.reports.who_learns FILE``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from secure.deployments.deployment import ROWS, Deployment, Role, variants
from secure.deployments.two_party import CLIENT
from secure.errors import InvalidInput

_BETWEEN = re.compile(r"(<!-- who-learns:([\w-]+) -->\n).*?(<!-- /who-learns -->)", re.DOTALL)


def columns(roles: Sequence[Role]) -> dict[str, Role]:
    """Roles by their headings; neighbours that learn the same share a column."""
    out: dict[str, Role] = {}
    for role in roles:
        last = next(reversed(out), None)
        if last is not None and out[last].learns == role.learns:
            out[f"{last}, {role.name}"] = out.pop(last)
        else:
            out[role.name] = role
    return out


def who_learns(deployment: Deployment, *, token_table: bool, drafted: bool = False) -> Table:
    """The table for the terminal. token_table: clients hold it. drafted: a client's guesses were checked in passes."""
    table = Table(title=f"who learnt what ({deployment.trust})", title_justify="left")
    found = columns(deployment.roles(token_table=token_table))
    for heading in ("", *found):
        table.add_column(heading)
    for row in ROWS:
        table.add_row(row, *(role.learns[row] for role in found.values()))
    if drafted:
        table.add_row("guesses that agree in each pass", *("its own" if name == CLIENT else "all" for name in found))
    return table


def markdown(deployment: Deployment) -> str:
    """The table as Markdown, without a token table at the clients."""
    found = columns(deployment.roles())
    lines = ["| " + " | ".join(("", *found)) + " |", "|" + " --- |" * (1 + len(found))]
    lines += ["| " + " | ".join((row, *(role.learns[row] for role in found.values()))) + " |" for row in ROWS]
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """A document with every marked table as the code has it."""
    known = variants(Deployment)

    def table(found: re.Match[str]) -> str:
        if found[2] not in known:
            raise InvalidInput(f"who-learns: unknown deployment {found[2]!r}", f"one of {', '.join(known)}")
        return f"{found[1]}{markdown(known[found[2]])}{found[3]}"

    return _BETWEEN.sub(table, text)


def main() -> None:
    """Write the tables of the documents that are named on the command line; refuse all if one is no file."""
    parser = argparse.ArgumentParser(description="Write the tables of who learns what into documents.")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a document with marked tables")
    files: list[Path] = parser.parse_args().files
    for file in files:
        if not file.is_file():
            parser.error(f"{file} is no file")
    for file in files:
        file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
