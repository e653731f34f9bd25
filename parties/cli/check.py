"""The command ``unseen check``: it tries what a command will need, before any query, and says what to do."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parties import deployments
from parties.cli.config import settings_of
from parties.cli.console import say, write
from parties.cli.installed import look_at_installation
from parties.cli.needs import PLANS, Needs, starts, who
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from parties.net.peer import Peer
from parties.net.secret_files import check_directory
from parties.net.versions import check_version
from parties.services import hosting
from parties.services.draining import going_away
from parties.services.status import Answered, ask_status
from secure.errors import Error, InvalidInput, printable

ROOM = 1 << 30  # bytes that a directory for state or once-per-model files should have free
SKEW = 60.0  # seconds by which two clocks may differ: certificates begin and end by them

Verb = StrEnum("Verb", {v: v for v in PLANS})  # type: ignore[misc]


@dataclass(frozen=True)
class Finding:
    """A thing that was tried, and how it went. hint: what to do; "" if nothing is wrong."""

    what: str
    said: str
    hint: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.hint)

    def lines(self) -> Iterator[str]:
        yield f"{'WRONG' if self.wrong else 'ok':<6}{self.what}: {self.said}"
        if self.wrong:
            yield f"      hint: {self.hint}"


def tried(what: str, act: Callable[[], str]) -> Finding:
    """Do something that returns what it found; an error in words is what is wrong."""
    try:
        return Finding(what, printable(act()))
    except (Error, OSError, ImportError) as error:
        said, _, hint = printable(str(error)).partition("\nhint: ")
        return Finding(what, said, hint or "see the message")


def check(
    context: typer.Context,
    command: Annotated[
        Verb | None,
        typer.Argument(help="The command to check for, with its own options after it; all of the settings."),
    ] = None,
) -> None:
    """Try everything that a command needs: certificates, peers, clocks, Programs, port, disk. Give its own options too.

    Without a command: those that the file of settings has a table for, or else ``embed``.
    """
    settings = settings_of(context)
    verbs = [str(v.value) for v in Verb]
    given = [str(command)] if command else [v for v in verbs if v in settings.tables] or verbs[:1]
    findings = list[Finding]()

    def note(finding: Finding) -> None:
        findings.append(finding)
        write("".join(f"{line}\n" for line in finding.lines()))

    note(tried("the installation", look_at_installation))
    for verb in given:
        say(f"unseen check: {verb}")
        for finding in findings_of(_needs(context, verb, context.args if command else [])):
            note(finding)
    wrong = sum(finding.wrong for finding in findings)
    say(f"unseen check: {wrong} of {len(findings)} wrong" if wrong else f"unseen check: all {len(findings)} are ok")
    raise typer.Exit(1 if wrong else 0)


def _needs(context: typer.Context, verb: str, arguments: list[str]) -> Needs:
    """Read a command's own options as that command does, and say what it will use."""
    settings, group = settings_of(context), context.parent
    assert group is not None
    defaults = {name: found.value for name, found in settings.of(verb).items()}
    with settings.commands[verb].make_context(verb, list(arguments), parent=group, default_map=defaults) as inner:
        return PLANS[verb](dict(inner.params))


# what is tried


def findings_of(needs: Needs) -> Iterator[Finding]:
    """Try everything that a command will use, and yield how each went."""
    networks = list[Network]()

    def own() -> str:
        networks.append(needs.network())
        return "; ".join(networks[0].about()) or "no certificates: channels stay on this machine"

    yield tried("own certificate", own)
    if needs.listen is not None:
        yield tried(f"port {needs.listen}", lambda: _port(needs, str(needs.listen), networks))
    for what, directory in needs.writes.items():
        yield tried(f"{what} {directory}", lambda at=directory: _room(at))  # type: ignore[misc]
    for place in needs.secrets:
        yield tried(f"secret files in {place}", lambda at=place: _closed(at))  # type: ignore[misc]
    for what, act in needs.more:
        yield tried(what, act)
    if networks:
        yield from _peers(needs, networks[0])


def _port(needs: Needs, listen: str, networks: list[Network]) -> str:
    at = Endpoint.parse(listen, what="--listen")
    if networks:
        hosting.check(at, {}, networks[0], what=f"the {needs.role}")
    return "free"


def _room(directory: Path) -> str:
    """Look whether files can be written in a directory, or where it will be made, and how much room there is."""
    there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InvalidInput(f"{there} cannot be written", f"make it yours: chown, or chmod u+w {there}; or give another")
    free = shutil.disk_usage(there).free
    if free < ROOM:
        raise InvalidInput(
            f"{free / 1e6:,.0f} MB are free, {ROOM / 1e6:,.0f} MB may be needed", "make room, or give another"
        )
    return f"{free / 1e9:,.1f} GB free"


def _closed(place: Path) -> str:
    """Look whether others can read or replace the secret files of a directory, without reading them."""
    if not place.exists():
        return "it is not there yet"
    check_directory(place)
    found = [p for p in sorted(place.rglob("*")) if p.is_symlink() or p.is_file()]
    for each in found:
        mode = each.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise InvalidInput(f"{each} is a link", "put the file itself there")
        if each.lstat().st_uid != os.geteuid():
            raise InvalidInput(f"{each} belongs to another user", f"chown {each}, or use a directory of your own")
        open_to = 0o077 if {each.name, each.suffix} & _SECRET else 0o022
        if mode & open_to:
            done = "read" if mode & 0o044 & open_to else "write"
            raise InvalidInput(f"others may {done} {each} (mode {stat.S_IMODE(mode):04o})", f"chmod go-rwx {each}")
    return f"{len(found)} files, closed to others"


_SECRET = frozenset({"seeds", ".seed", ".key", ".sqlite"})
"""Names and suffixes of files that nobody else may read."""


def _peers(needs: Needs, network: Network) -> Iterator[Finding]:
    answered = dict[str, Answered]()
    for name, at in needs.peers.items():
        yield tried(who(name), lambda n=name, a=at: _peer(needs, network, n, a, answered))  # type: ignore[misc]
    if not answered or len(answered) < len(needs.peers):
        return  # the rest compares what all of them say
    for what, act in (
        deployments.hosted(needs.deployment).tries(needs.role, needs.deployment, network, needs.state).items()
    ):
        yield tried(what, act)
    for name, found in answered.items():
        yield tried(f"the clock of {who(name)}", lambda n=name, s=found.skew: _clock(n, s))  # type: ignore[misc]
        if needs.apart:
            yield tried(f"the owner of {who(name)}", lambda n=name, f=found: _owner(n, f))  # type: ignore[misc]
    programs = {name: found.program_digest for name, found in answered.items() if found.program_digest}
    if not programs and needs.listen is not None and needs.program() is None:
        return
    yield tried("the Program", lambda: _program(needs, network, answered, programs))


def _peer(needs: Needs, network: Network, name: str, address: str, answered: dict[str, Answered]) -> str:
    peer = Peer(who(name), address, network, role=name, start=starts(needs.deployment, name))
    try:
        network.check(peer.at, what=peer.who)
        found = ask_status(peer)
    finally:
        peer.close()
    check_version("it", found.version, "this side")
    if (found.deployment, found.role) != (needs.deployment.name, name):
        raise InvalidInput(
            f"it is the {found.role} of {found.deployment}, not the {name} of {needs.deployment.name}",
            "check the addresses",
        )
    if found.draining:
        raise going_away("it")
    answered[name] = found
    return f"answers at {address}, version {found.version}"


def _clock(name: str, skew: float) -> str:
    if abs(skew) > SKEW:
        raise InvalidInput(
            f"it is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's", "set both clocks (NTP)"
        )
    return f"{abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"


def _owner(name: str, found: Answered) -> str:
    if found.same_owner:
        raise InvalidInput(
            "it is this user on this machine: who can read both knows every secret",
            "let another organisation run it; to try things out on one machine, add --same-owner",
        )
    return "another user or machine"


def _program(needs: Needs, network: Network, answered: Mapping[str, Answered], programs: Mapping[str, str]) -> str:
    """Compare the Programs of all peers with one another and with the one that is expected; ask those that deal it."""
    expected, whose, pinned = needs.program(), "this side", True
    for name, digest in programs.items():
        known = pinned and expected is not None and expected != digest and _knows(needs, network, name, expected)
        if expected not in (None, digest) and not known:  # a pin may be of another Program, or of all together
            raise InvalidInput(
                f"{who(name)} has {digest}, {whose} {expected}",
                "ask the owners which Program is right, and start all of them with it",
            )
        expected, whose, pinned = digest, who(name), False
    for name in answered.keys() - programs.keys():
        if expected and not _knows(needs, network, name, expected):
            raise InvalidInput(
                f"{who(name)} does not know the Program {expected}",
                f"start the {needs.deployment.serves} with this {name}'s address, and give this side the same one",
            )
    return f"{expected}, the same everywhere" if expected else "not known before the server answers"


def _knows(needs: Needs, network: Network, name: str, digest: str) -> bool:
    """Tell whether a peer serves or deals a Program, or all those of which a digest is."""
    peer = Peer(who(name), needs.peers[name], network, role=name, start=starts(needs.deployment, name))
    try:
        return ask_status(peer, digest).known
    finally:
        peer.close()
