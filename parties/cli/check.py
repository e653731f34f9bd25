"""The command ``unseen check``: it tries what a command will need, before any query, and says what to do."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from parties import deployments
from parties.cli.compiled import fixed_of, require_fixed
from parties.cli.config import settings_of
from parties.cli.console import say, write
from parties.cli.options import deployment_of, own_options
from parties.cli.party import addresses_of
from parties.cli.token import given_token
from parties.limits.memory import GB, available_memory
from parties.limits.tokens import Token, Tokens, WithToken
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from parties.net.peer import Peer
from parties.net.secret_files import check_directory
from parties.served.compiled_files import is_compiled, load_compiled
from parties.served.described import ConnectOptions, ask_description
from parties.served.files import cache_directory, state_directory
from parties.services import hosting
from parties.services.draining import going_away
from parties.services.status import Answered, ask_status
from parties.store.keys import read_store_key
from parties.three_party.shared_model import load_share
from parties.tls.choice import network_of
from secure.deployments.compiled import task_of
from secure.deployments.deployment import COMPILE, CONNECT, SERVE, Deployment, find
from secure.deployments.deployment import deployments as registered
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.deployments.two_party import DEALER, TwoParty
from secure.errors import Error, InvalidInput, printable
from secure.models.text import model_directory
from secure.tasks.embed import Embed
from secure.version import WIRE_VERSION

ASKING = 10.0  # seconds that a server may take to say what it offers
ROOM = 1 << 30  # bytes that a directory for state or once-per-model files should have free
SKEW = 60.0  # seconds by which two clocks may differ: certificates begin and end by them

Verb = StrEnum("Verb", {v: v for v in ("embed", "serve", "dealer", "party")})  # type: ignore[misc]


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
    """Do something that returns what it found; an Error is what is wrong."""
    try:
        return Finding(what, printable(act()))
    except (Error, OSError) as error:
        said, _, hint = printable(str(error)).partition("\nhint: ")
        return Finding(what, said, hint or "see the message")


More = tuple[tuple[str, Callable[[], str]], ...]


@dataclass(frozen=True)
class Needs:
    """The things that a command will use.

    listen: where it listens; None for a client. peers: addresses by role. apart: they must not be run by this owner.
    state, cache: directories that it writes to. secrets: directories and files that nobody else may read. program: the
    digest that every Program must have, if it is known.
    """

    verb: str
    role: str
    deployment: Deployment
    network: Callable[[], Network]
    listen: str | None = None
    peers: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False
    writes: Mapping[str, Path] = field(default_factory=dict)
    secrets: tuple[Path, ...] = ()
    program: Callable[[], str | None] = lambda: None
    more: More = ()


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
    for verb in given:
        say(f"unseen check: {verb}")
        for finding in findings_of(_needs(context, verb, context.args if command else [])):
            findings.append(finding)
            write("".join(f"{line}\n" for line in finding.lines()))
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


def _network(given: Mapping[str, Any], role: str) -> Callable[[], Network]:
    return lambda: network_of(role, directory=given["tls"], insecure=given["insecure"])


def _deployment(given: Mapping[str, Any], *verbs: str) -> Deployment:
    chosen = find(str(getattr(given["deployment"], "value", given["deployment"])))
    return deployment_of(chosen, verbs, {name: given.get(name) for name in own_options(verbs, registered())})


def _for_embed(given: Mapping[str, Any]) -> Needs:
    deployment = _deployment(given, CONNECT)
    client, *_ = deployment.roles()
    token = given_token(given["token_file"])

    def network() -> Network:
        found = _network(given, client.name)()
        return WithToken(found, Token(token)) if token else found

    return Needs(
        "embed",
        client.name,
        deployment,
        network,
        peers={name: at for name, at in deployment.addresses().items() if name in client.peers},
        writes={"the cache of once-per-model files": cache_directory()} if given["cache"] else {},
        program=lambda: given["program_digest"],
        more=_offered(given, deployment, network),
    )


def _offered(given: Mapping[str, Any], deployment: Deployment, network: Callable[[], Network]) -> More:
    """Ask the server whether it offers the model of --model, if that is given."""
    role = deployment.serves or deployment.roles()[0].peers[0]

    def asked() -> str:
        used = network()
        peer = Peer(who(role), deployment.addresses()[role], used, role=role, start=f"unseen {role}")
        options = ConnectOptions(used, ASKING, None, given["program_digest"], name=given["model"])
        try:
            found = ask_description(peer, deployment, role, options)
        finally:
            peer.close()
        sizes = {offer.length for offer in found.offers if offer.model == given["model"]} - {0}
        return f"offered{f' for {sorted(sizes)} tokens' if sizes else ''}"

    return () if given["model"] is None else ((f"the model {given['model']}", asked),)


def _for_serve(given: Mapping[str, Any]) -> Needs:
    deployment = _deployment(given, COMPILE, SERVE)
    if not deployment.serves:
        raise InvalidInput(f"nobody serves a whole model under {deployment.name}", deployment.how_to_serve)
    fixed = fixed_of(given)

    def held(each: str) -> str:
        if not is_compiled(each):
            return f"{model_directory(each)}, to be compiled" if isinstance(task_of(each), Embed) else "to be compiled"
        found = load_compiled(Path(each))
        require_fixed(found, each, fixed)
        return f"compiled on {found.made}, Program {found.program.digest}"

    more: More = tuple((f"the model {each}", partial(held, each)) for each in (given["model"], *(given["also"] or ())))
    if is_compiled(model := given["model"]) and deployment.untouched:
        with suppress(Error):  # which ``held`` says
            deployment = load_compiled(Path(model)).deployment
    if given["memory"] is not None:
        more = (*more, ("the memory for prepared queries", lambda: _memory(given["memory"] * GB)))
    role = {r.name: r for r in deployment.roles()}[deployment.serves]
    state = given["state"] or state_directory()
    return Needs(
        "serve",
        role.name,
        deployment,
        _network(given, role.name),
        given["listen"],
        {name: deployment.addresses()[name] for name in role.peers},
        not given["same_owner"],
        {"the state directory": state, **_store(given)},
        (state,),
        more=(*more, *_store_key(given), *_tokens(given)),
    )


def _memory(size: float) -> str:
    free = available_memory()
    if 0 < free < size:
        raise InvalidInput(f"{free / GB:.3g} GB are free, {size / GB:.3g} GB are given", "lower --memory")
    return f"{size / GB:.3g} GB of {free / GB:.3g} GB that are free" if free else f"{size / GB:.3g} GB"


def _store(given: Mapping[str, Any]) -> Mapping[str, Path]:
    return {} if given["store"] is None else {"the store": given["store"]}


def _store_key(given: Mapping[str, Any]) -> More:
    def read() -> str:
        read_store_key(given["store_key_file"])
        return "it can be read, and nobody else may read it"

    return () if given["store"] is None else (("the store's key", read),)


def _for_dealer(given: Mapping[str, Any]) -> Needs:
    state = given.get("state") or state_directory()
    return Needs(
        "dealer",
        DEALER,
        TwoParty(),
        _network(given, DEALER),
        given["listen"],
        writes={"the state directory": state, **_store(given)},
        secrets=(state,),
        more=(*_store_key(given), *_tokens(given)),
    )


def _for_party(given: Mapping[str, Any]) -> Needs:
    number, share = given["number"], given["share"]
    listen, peers = addresses_of(number, given["listen"], given["party_0"], given["party_2"])

    def held() -> str:
        found = load_share(share)
        if found.role != PARTIES[number]:
            raise InvalidInput(f"{share} is the share of {found.role}", f"give the directory of {PARTIES[number]}")
        return f"of {found.role}, Program {found.program.digest}"

    return Needs(
        "party",
        PARTIES[number],
        ThreeParty(),
        _network(given, PARTIES[number]),
        listen,
        peers,
        not given["same_owner"],
        {"the state directory": state_directory(), **_store(given)},
        (share,),
        lambda: load_share(share).program.digest,
        ((f"the share {share}", held), *_store_key(given), *_tokens(given)),
    )


def _tokens(given: Mapping[str, Any]) -> More:
    file = given.get("tokens")
    return () if file is None else ((f"tokens {file}", lambda: f"{len(Tokens(file).holders())} tokens"),)


PLANS: Mapping[str, Callable[[Mapping[str, Any]], Needs]] = {
    "embed": _for_embed,
    "serve": _for_serve,
    "dealer": _for_dealer,
    "party": _for_party,
}


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
    for what, act in deployments.hosted(needs.deployment).tries(needs.role, needs.deployment, network).items():
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
    peer = Peer(who(name), address, network, role=name, start=_start(needs, name))
    try:
        network.check(peer.at, what=peer.who)
        found = ask_status(peer)
    finally:
        peer.close()
    if found.version != WIRE_VERSION:
        raise InvalidInput(
            f"it speaks version {found.version}, this side {WIRE_VERSION}", "install the same version of unseen"
        )
    if (found.deployment, found.role) != (needs.deployment.name, name):
        raise InvalidInput(
            f"it is the {found.role} of {found.deployment}, not the {name} of {needs.deployment.name}",
            "check the addresses",
        )
    if found.draining:
        raise going_away("it")
    answered[name] = found
    return f"answers at {address}, version {found.version}"


def who(role: str) -> str:
    """Return a role as messages have it."""
    return role if role in PARTIES else f"the {role}"


def _start(needs: Needs, role: str) -> str:
    """Return the command that starts a role."""
    if role in PARTIES:
        return f"unseen party --id {PARTIES.index(role)}"
    return f"unseen {'serve' if role == needs.deployment.serves else role}"


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
    expected, whose = needs.program(), "this side"
    for name, digest in programs.items():
        if expected is not None and digest != expected:
            raise InvalidInput(
                f"{who(name)} has {digest}, {whose} {expected}",
                "ask the owners which Program is right, and start all of them with it",
            )
        expected, whose = digest, who(name)
    for name in answered.keys() - programs.keys():
        peer = Peer(who(name), needs.peers[name], network, role=name, start=_start(needs, name))
        try:
            known = ask_status(peer, expected or "").known
        finally:
            peer.close()
        if expected and not known:
            raise InvalidInput(
                f"{who(name)} does not know the Program {expected}",
                f"start the {needs.deployment.serves} with this {name}'s address, and give this side the same one",
            )
    return f"{expected}, the same everywhere" if expected else "not known before the server answers"
