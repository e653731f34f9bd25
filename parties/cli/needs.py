"""The things that a command will use, read from its own options: peers, directories, secrets, models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from parties.cli.compiled import fixed_of, require_fixed
from parties.cli.options import chosen, deployment_of, own_options
from parties.cli.party import addresses_of
from parties.cli.token import given_token
from parties.limits.memory import GB, available_memory
from parties.limits.tokens import Token, Tokens, WithToken
from parties.net.endpoints import Endpoint, is_loopback
from parties.net.network import Network
from parties.net.peer import Peer
from parties.proxy.hosted import check_stays
from parties.served.compiled_files import is_compiled, load_compiled
from parties.served.described import ConnectOptions, ask_description
from parties.served.files import cache_directory, state_directory
from parties.store.keys import read_store_key
from parties.telemetry.port import TelemetryPort, parse
from parties.telemetry.telemetry import check_telemetry, require_otlp
from parties.three_party.shared_model import load_share
from parties.tls.choice import network_of
from secure.deployments.compiled import task_of
from secure.deployments.deployment import COMPILE, CONNECT, SERVE, Deployment, deployments, find
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.deployments.two_party import DEALER, TwoParty
from secure.errors import Error, InvalidInput
from secure.models.index import check_index
from secure.models.text import model_directory

ASKING = 10.0  # seconds that a server may take to say what it offers

More = tuple[tuple[str, Callable[[], str]], ...]


@dataclass(frozen=True)
class Needs:
    """The things that a command will use.

    listen: where it listens; None for a client. peers: addresses by role. apart: they must not be run by this owner.
    writes: directories that it writes to, by what they are. state: that of them which is the role's own. secrets:
    directories and files that nobody else may read.
    program: the digest that every Program must have, if it is known. more: what else is tried, by name.
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
    state: Path | None = None


def who(role: str) -> str:
    """Return a role as messages have it."""
    return role if role in PARTIES else f"the {role}"


def starts(deployment: Deployment, role: str) -> str:
    """Return the command that starts a role."""
    if role in PARTIES:
        return f"unseen party --id {PARTIES.index(role)}"
    return f"unseen {'serve' if role == deployment.serves else role}"


def _network(given: Mapping[str, Any], role: str) -> Callable[[], Network]:
    return lambda: network_of(role, directory=given["tls"], insecure=given["insecure"])


def _deployment(given: Mapping[str, Any], *verbs: str) -> Deployment:
    chosen = find(str(getattr(given["deployment"], "value", given["deployment"])))
    return deployment_of(chosen, verbs, {name: given.get(name) for name in own_options(verbs, deployments())})


def _for_client(verb: str, given: Mapping[str, Any]) -> Needs:
    deployment = _deployment(given, CONNECT)
    client, *_ = deployment.roles()
    token = given_token(given["token_file"])

    def network() -> Network:
        found = _network(given, client.name)()
        return WithToken(found, Token(token)) if token else found

    return Needs(
        verb,
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
        peer = Peer(who(role), deployment.addresses()[role], used, role=role, start=starts(deployment, role))
        options = ConnectOptions(used, ASKING, None, given["program_digest"], name=given["model"])
        try:
            found = ask_description(peer, deployment, role, options)
        finally:
            peer.close()
        sizes = {offer.length for offer in found.offers if offer.model == given["model"]} - {0}
        return f"offered for {', '.join(map(str, sorted(sizes)))} tokens" if sizes else "offered"

    return () if given["model"] is None else ((f"the model {given['model']}", asked),)


def _for_proxy(given: Mapping[str, Any]) -> Needs:
    found, at = _for_client("proxy", given), given["listen"]

    def stays() -> str:
        addresses = check_stays(
            Endpoint.parse(at, what="--listen"), beyond_loopback=given["unencrypted_beyond_loopback"]
        )
        return "stays on this machine" if is_loopback(addresses) else "reached by other machines, unencrypted"

    return replace(found, more=(*found.more, (f"the address {at}", stays)))


def _for_serve(given: Mapping[str, Any]) -> Needs:
    deployment = _deployment(given, COMPILE, SERVE)
    if not deployment.serves:
        raise InvalidInput(f"nobody serves a whole model under {deployment.name}", deployment.how_to_serve)
    fixed, index = fixed_of(given), given["index"]

    def held(each: str) -> str:
        if not is_compiled(each):
            task = task_of(each, **chosen(given["task"], given["reveal"], index, given["top"], given["clusters"]))
            where = f"{model_directory(each)}, " if task.stored else ""
            if index is not None:
                where += f"with the index {index} of {sum(check_index(index, each).segments):,} passages, "
            return f"{where}to be compiled for the task {task.name}"
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
        state=state,
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


def _watched(plan: Callable[[Mapping[str, Any]], Needs], given: Mapping[str, Any]) -> Needs:
    """Return the needs of a role, and where its numbers are read and its spans go."""
    found, metrics, otlp = plan(given), given["metrics"], given["otlp"]

    def listens() -> str:
        check_telemetry(metrics, None)
        with TelemetryPort(parse(metrics), {}) as listening:
            return "free, on this machine alone" if listening.stays else "free, and others can read it"

    def goes() -> str:
        return f"{require_otlp(otlp)}; nothing was sent"

    own = () if metrics is None else ((f"the numbers' port {metrics}", listens),)
    return replace(found, more=(*found.more, *own, *(() if otlp is None else (("where spans go", goes),))))


PLANS: Mapping[str, Callable[[Mapping[str, Any]], Needs]] = {
    **{
        verb: partial(_for_client, verb)
        for verb in ("embed", "classify", "tag", "answer", "rerank", "search", "generate")
    },
    "proxy": _for_proxy,
    "serve": partial(_watched, _for_serve),
    "dealer": partial(_watched, _for_dealer),
    "party": partial(_watched, _for_party),
}
