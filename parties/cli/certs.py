"""The command ``unseen certs``: an authority, and certificates for everybody who takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from parties.cli.console import OUT, say, write
from parties.tls.authority import AUTHORITY_DAYS, DAYS, Authority, Listed
from parties.tls.naming import DOMAIN, dashed
from secure.deployments.deployment import deployments
from secure.errors import InvalidInput


def known_roles() -> dict[str, str]:
    """All roles of all deployments, by their names in certificates."""
    return {dashed(role.name): role.name for deployment in deployments() for role in deployment().roles()}


def certs(
    directory: Annotated[Path, typer.Argument(help="The authority's directory; it is made if it is not there.")],
    roles: Annotated[
        list[str] | None,
        typer.Argument(help="Roles to make certificates for; all of them with a new authority."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The holder's name, such as alice, for one role; the role's own by default.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help=f"New authority: the domain in all names. {DOMAIN} by default.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="Days for which certificates are valid.")] = DAYS,
    authority_days: Annotated[
        int, typer.Option(min=1, help="New authority: days for which its own certificate is valid.")
    ] = AUTHORITY_DAYS,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make new keys and certificates for the roles or directories given, or all.")
    ] = False,
    revoke: Annotated[
        list[str] | None,
        typer.Option(metavar="WHICH", help="Revoke a certificate: its file, its directory, or its number."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List what was issued, and how long it is valid.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="List it as JSON.")] = False,
) -> None:
    """Make an authority and certificates for TLS, renew them, revoke them, list them.

    Give each role its own directory and nothing else. The directory "authority" can make any certificate: keep it away
    from all other machines.
    """
    is_new = not Authority.exists(directory)
    if is_new and (renew or revoke or show or as_json):
        raise InvalidInput(f"there is no authority in {directory}", f"make one with: unseen certs {directory}")
    if not is_new and domain is not None:
        raise InvalidInput("--domain is for a new authority", "give another directory")
    if name is not None and (renew or len(roles or ()) != 1):
        raise InvalidInput(
            "--name is for one new certificate", f"for example: unseen certs {directory} client --name a"
        )
    known = known_roles()
    if not renew:
        for role in roles or ():
            if role not in known:
                raise InvalidInput(f"unknown role {role!r}", f"one of {', '.join(known)}")
    authority = (
        Authority.make(directory, domain=domain or DOMAIN, days=authority_days) if is_new else Authority(directory)
    )
    if is_new:
        say(f"unseen certs: {directory / 'authority'}: the new authority, which can make any certificate; keep it away")
    for which in revoke or ():
        found = authority.revoke(which)
        say(f"unseen certs: revoked {found.role} {found.name}, number {found.certificate.serial}")
        say("unseen certs: copy the new revoked.pem into every party's directory; it is read at once")
    if renew:
        for where in [directory / each for each in roles or ()] or authority.holders():
            if not (where / "cert.pem").is_file():
                raise InvalidInput(f"there is no certificate in {where}", "give directories beside the authority's")
            if not roles and authority.is_revoked(where):
                say(f"unseen certs: {where}: revoked, so it is renewed only if it is named")
                continue
            authority.renew(where, days=days)
            say(f"unseen certs: {where}: renewed; copy key.pem and cert.pem to its holder, who reads them at once")
    elif roles or is_new:
        for role in roles or known:
            where = authority.issue(known[role], name or role, days=days)
            say(f"unseen certs: {where}: for {known[role]} alone, it holds a key")
    elif not revoke or show or as_json:
        show_list(authority, as_json=as_json)


def show_list(authority: Authority, *, as_json: bool) -> None:
    """Every certificate, how long it is valid, and whether it was revoked."""
    listed = authority.listed()
    if as_json:
        write(json.dumps([_row(each) for each in listed], indent=2) + "\n")
        return
    ends = f"{authority.certificate.ends:%Y-%m-%d %H:%M} UTC"
    title = f"authority of {authority.domain}, valid until {ends}"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("role", "name", "valid until (UTC)", "", "number"):
        table.add_column(heading, overflow="fold")
    for each in listed:
        row = _row(each)
        table.add_row(*(escape(row[key]) for key in ("role", "name", "until", "state", "number")))
    OUT.print(table)


def _row(each: Listed) -> dict[str, str]:
    left, soon = each.certificate.left()
    ended = left.total_seconds() < 0
    state = "revoked" if each.revoked else "expired" if ended else "renew it" if soon else "valid"
    until = f"{each.certificate.ends:%Y-%m-%d %H:%M}"
    return {"role": each.role, "name": each.name, "until": until, "state": state, "number": each.certificate.serial}
