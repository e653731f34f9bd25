"""Host the roles of a deployment as services, and connect a client to them.

``secure.serve`` and ``secure.connect`` are these functions. To add a deployment, register its hosted form here and the
deployment itself in ``secure.deployments.deployment``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from parties.ckks.hosted import CkksHosted
from parties.limits.memory import memory_budget
from parties.limits.quotas import Limits, Quotas
from parties.limits.tokens import Token, Tokens, WithToken
from parties.net.caller import CLIENT
from parties.net.directories import check_writable
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from parties.net.recorded import Record, Recorded
from parties.receipts.receipt import Receipt
from parties.served.described import ConnectOptions
from parties.served.files import cache_directory, state_directory
from parties.services.allocator import reuse_memory
from parties.services.draining import DRAIN, Draining
from parties.services.health import HealthService
from parties.services.hosting import HostOptions, Parts, Service, settle
from parties.services.status import StatusService
from parties.services.workers import Ready, require_single_thread, reserved, supervise
from parties.telemetry.events import Reading
from parties.telemetry.telemetry import Telemetry
from parties.three_party.hosted import ThreePartyHosted
from parties.tls.choice import network_of
from parties.two_party.hosted import TwoPartyHosted
from protocols import warm
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import Deployment, Role
from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE, TASK
from secure.mpc.budget import Budget
from secure.progress import Told, silent
from secure.session.link import Link, digest_of_all
from secure.session.session import PACE, Session, check_options


class Hosted(Protocol):
    """A deployment's services and its link. takes: by role, the HostOptions (beside ``network``) that it accepts.

    forked: the roles that several processes may host at one address.
    """

    deployment: type[Deployment]
    takes: Mapping[str, frozenset[str]]
    forked: frozenset[str]

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link: ...
    def prescribed(self, receipt: Receipt, programs: Mapping[str, bytes]) -> int:
        """Compare a receipt with what a client of these Programs sends; return the queries that were sent whole.

        programs: the encoded Programs that the receipt offers, by digest, as far as its messages name them. Raises
        ReceiptError at the first difference, InvalidProgram.
        """

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        """Make the parts of one role's service. held: what it serves, a Compiled or a directory; None for nothing."""

    def shared(self, role: str, held: Any, options: HostOptions) -> Any:
        """Make what several processes of a role share, before they are forked; ``parts`` takes it as ``held``."""

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        """The ``unseen`` command line that a model's owner runs once before the roles start, if there is one.

        compiling: the model and its options, as command-line arguments. directory: a place for files to keep.
        """

    def tries(
        self, role: str, deployment: Deployment, network: Network, state: Path | None
    ) -> Mapping[str, Callable[[], str]]:
        """Return what ``unseen check`` tries for a role beside the usual, by name: each returns what it found.

        state: the directory in which the role will keep its state, if it has one.
        """

    def command(self, role: str, compiling: Sequence[str], directory: Path, peers: Mapping[str, str]) -> Sequence[str]:
        """The ``unseen`` command line that hosts a role, without --listen. peers: addresses by role."""


_HOSTED: dict[str, Hosted] = {}


def host(hosted: Hosted) -> None:
    """Register a deployment's hosted form."""
    _HOSTED[hosted.deployment.name] = hosted


def hosted(deployment: Deployment | type[Deployment]) -> Hosted:
    """Return the hosted form of a deployment; raises InvalidInput if it has none."""
    found = _HOSTED.get(deployment.name)
    if found is None:
        raise InvalidInput(f"{deployment.name} has no hosted form", f"those that have: {', '.join(_HOSTED)}")
    return found


for each in (TwoPartyHosted(), ThreePartyHosted(), CkksHosted()):
    host(each)


def connect(
    deployment: Deployment,
    *,
    network: Network | None = None,
    deadline: float = 60.0,
    cache: bool | Path = True,
    program_digest: str | None = None,
    model: str | None = None,
    fixed_length: bool = False,
    budget: Budget | None = None,
    threads: int = 1,
    pace: float = PACE,
    keep_memory: bool = True,
    token: str | None = None,
    receipts: bool = False,
    told: Told | None = None,
) -> Session:
    """Connect to the services of a model; the deployment holds their addresses.

    network: the protection of channels; by default TLS, with the certificates in the directory that UNSEEN_TLS names or
    in ~/.config/unseen/tls/client, and if there are none, unencrypted on this machine alone. deadline: seconds to wait
    for any one message before PeerLost. cache: a directory for once-per-model files; True: the user's own directory;
    False: keep none. program_digest: refuse a service with another Program; of one that offers several sizes, none but
    this is used, or all of them if it is ``Compiled.programs_digest``, as a text needs. model: the name of the model
    that is meant, where a service offers several. fixed_length: use the greatest length alone, so that a service that
    offers several does not see how long texts are. budget: refuse a Program that may take more memory or time on this
    machine; by default ``Budget()``. threads: threads of this client while it computes. pace: seconds from a call to
    its first message, see ``secure.Session``. keep_memory: let glibc keep memory that queries free, in one arena for
    all threads of the process, which saves a client about a tenth of its processor time. token: what the service's
    owner gave, if it asks for one; it crosses TLS or loopback only. receipts: record what leaves this machine, for
    ``Session.receipt``. told: called with (done, total, what is being done)
    while something takes long. Raises EndpointError, TlsError, HandshakeError, PeerLost, DownloadError, InvalidInput.
    """
    if not isinstance(deployment, Deployment):
        raise InvalidInput(f"{deployment!r} is no deployment", 'give one, such as secure.TwoParty(server="host:port")')
    if network is not None and not isinstance(network, Network):
        raise InvalidInput(f"the network is {network!r}", 'give one, such as secure.Tls("DIRECTORY")')
    check_options(threads, pace)
    if keep_memory:
        reuse_memory()
    directory = cache_directory() if cache is True else (cache or None)
    used = network or network_of(CLIENT)
    used = WithToken(used, Token(token)) if token else used
    record = Record() if receipts else None
    options = ConnectOptions(
        used if record is None else Recorded(used, record),
        deadline,
        directory,
        program_digest,
        name=model,
        budget=budget or Budget(),
        told=told,
    )
    found = hosted(deployment)
    link = found.connect(deployment, options)

    def open(digest: str) -> Link:
        if link.program.labels.get(TASK) == GENERATE:  # a text goes through several Programs, in one session
            return link.beside(digest)
        return found.connect(deployment, replace(options, program_digest=digest, model=link.model, told=None))

    whole = digest_of_all(offer.program_digest for offer in link.offers)
    offers = link.offers if program_digest in (None, whole) else ()

    def recorded(session: Session) -> Receipt:
        assert record is not None
        return Receipt.of(session, record, token=bool(token))

    return Session(
        link,
        threads=threads,
        pace=pace,
        open=open,
        offers=offers,
        fixed_length=fixed_length,
        recorded=recorded if receipts else None,
    )


def serve(
    held: Compiled | Sequence[Compiled] | str | Path | None = None,
    *,
    role: str,
    listen: str = "127.0.0.1:0",
    peers: Mapping[str, str] | None = None,
    deployment: Deployment | None = None,
    network: Network | None = None,
    quotas: Limits | None = None,
    tokens: Path | None = None,
    told: Told = silent,
    metrics: str | None = None,
    otlp: str | None = None,
    one_of: int = 0,
    **given: Any,
) -> Service:
    """Host one role of a deployment; returns once it listens. Use it as a context manager, and call its ``wait()``.

    held: what the role serves: a compiled model (which knows its deployment), or several, which clients tell by their
    names; a directory that ``unseen share-model`` wrote (parties), or nothing (dealers). listen: host:port; port 0
    chooses any free one. peers: by role, the addresses of the roles that this one connects to. network: as for
    ``connect``, with certificates of this role. quotas: how much each client may use in a day, counted in a file of the
    state directory. tokens: a file of ``unseen token``, one of which each client must show. told: hears of progress
    until it listens. metrics: where numbers for Prometheus are read over HTTP, host:port, or a port of the loopback
    alone; None: nowhere. otlp: the URL of a collector of OpenTelemetry, to which spans of every query are sent; None:
    to none. one_of: this is one of so many processes that serve at one address (``serve_together`` gives
    it). given: deadline, state, traces, workers, ahead, budget, if the role takes them; see ``HostOptions``. Raises
    EndpointError, TlsError, HandshakeError, PeerLost, InvalidInput.
    """
    if isinstance(held, Compiled):
        held = [held]
    if isinstance(held, list | tuple):
        deployment = _together(held)
    if deployment is None:
        raise InvalidInput("serve does not know which deployment", "give deployment=secure.TwoParty(), or another")
    found, peers = hosted(deployment), dict(peers or {})
    roles = {r.name: r for r in deployment.roles()}
    if role not in found.takes:
        raise InvalidInput(f"{deployment.name} has no service of role {role!r}", f"one of {', '.join(found.takes)}")
    if missing := [name for name in roles[role].peers if name not in peers]:
        raise InvalidInput(
            f"the {role} needs the address of the {missing[0]}", f'peers={{"{missing[0]}": "host:port"}}'
        )
    if unknown := sorted(set(peers) - set(roles[role].peers)):
        raise InvalidInput(
            f"the {role} connects to no {unknown[0]}", f"peers: {', '.join(roles[role].peers) or 'none'}"
        )
    if refused := sorted(set(given) - found.takes[role]):
        known = ", ".join(sorted(found.takes[role])) or "none"
        raise InvalidInput(f"{refused[0]} means nothing to the {role} of {deployment.name}", f"it takes {known}")
    if not held and role == deployment.serves:
        raise InvalidInput(f"the {role} has nothing to serve", "give what secure.compile returned")
    at = Endpoint.parse(listen, what=f"the {role}")
    shown = Tokens(tokens) if tokens else None
    check_state(deployment, role, given.get("state"), counts=bool(quotas))
    if one_of:
        given["workers"] = one_of
    with ExitStack() as until_it_serves:
        telemetry = Telemetry(deployment.name, role, metrics=metrics, ports=max(1, one_of), otlp=otlp)
        until_it_serves.callback(telemetry.close)
        counted = Quotas(quotas, _state(given) / f"quotas-{role.replace(' ', '-')}.sqlite") if quotas else None
        used = network or network_of(role)
        options = HostOptions(used, counted, told=told, events=telemetry.events, **given)
        options.network.check(at, what=f"the {role}")
        warm.warm_up()
        one = held[0] if isinstance(held, list | tuple) and not deployment.takes_sizes else held
        made = found.parts(role, one, deployment, peers, options)
        draining = Draining(made.permissions, made.standing)
        made = _with_common(made, deployment.name, role, roles, options, draining)
        settle()
        service = Service(
            made,
            at,
            options.network,
            what=f"the {role}",
            role=role,
            quotas=options.quotas,
            tokens=shown,
            draining=draining,
            shared=bool(one_of),
            telemetry=telemetry,
        )
        until_it_serves.pop_all()
    return service


def _with_common(
    made: Parts, deployment: str, role: str, roles: Iterable[str], options: HostOptions, draining: Draining
) -> Parts:
    """Return the parts of a role, with what every role has: its status, its health, and when its certificates end."""
    knows = made.knows or (lambda digest: digest == made.program)
    status = StatusService(deployment, role, roles, made.program, knows, lambda: draining.begun)
    health = HealthService(roles, made.permissions, lambda: not draining.begun)

    def readings() -> Iterator[Reading]:
        yield Reading("unseen_draining", "Whether this role takes no new clients.", draining.begun)
        for what, ends in options.network.ends().items():
            said = "When a certificate ends that this role needs, in seconds since 1970."
            yield Reading("unseen_certificate_ends_timestamp_seconds", said, ends, {"certificate": what})
        yield from made.readings()

    return replace(
        made,
        add=[*made.add, status.add, health.add],
        permissions={**made.permissions, **status.permissions, **health.permissions},
        readings=readings,
    )


def _state(given: Mapping[str, Any]) -> Path:
    return given.get("state") or state_directory()


def check_state(deployment: Deployment, role: str, state: Path | None, *, counts: bool) -> None:
    """Raise InvalidInput unless a role can write its state, if it keeps any. counts: it counts what callers use."""
    if counts or "state" in hosted(deployment).takes[role]:
        hint = "give another directory: --state (state=), or XDG_STATE_HOME"
        check_writable(state or state_directory(), "the state directory", hint)


def serve_together(
    held: Sequence[Compiled],
    *,
    workers: int,
    role: str,
    listen: str,
    network: Network,
    announce: Callable[[str, Sequence[str]], None],
    begin: Callable[[], None] = lambda: None,
    drain: float = DRAIN,
    told: Told = silent,
    **given: Any,
) -> None:
    """Host one role in several processes at one address, until a signal ends them.

    They are forked from this one, which must not have used gRPC, and have in common what the role takes most memory
    for. announce: called with the address and lines about it when all listen. begin: called in each process first.
    drain: seconds that work may take after SIGTERM. given: what ``serve`` takes besides. The memory of queries is
    divided among them. Raises what ``serve`` raises, and Error if processes keep dying.
    """
    deployment, at = _together(held), Endpoint.parse(listen, what=f"the {role}")
    assert deployment is not None  # there is a model
    found = hosted(deployment)
    if role not in found.forked:
        raise InvalidInput(f"the {role} of {deployment.name} is hosted by one process", "leave --workers out")
    network.check(at, what=f"the {role}")
    check_state(deployment, role, given.get("state"), counts=bool(given.get("quotas")))
    given["memory"] = memory_budget(given.get("memory"))
    own = {name: value for name, value in given.items() if name in found.takes[role]}
    require_single_thread()
    warm.warm_up()
    shared = found.shared(role, held, HostOptions(network, told=told, workers=workers, **own))
    gc.collect()
    gc.freeze()  # the garbage collector writes into what it looks at, and so would copy it
    with reserved(at, what=f"the {role}") as address:

        def work(ready: Ready) -> None:
            begin()
            with serve(
                shared,
                role=role,
                listen=str(address),
                deployment=deployment,
                network=network,
                one_of=workers,
                **given,
            ) as service:
                service.wait_announced(lambda: ready(service.about), drain)

        supervise(workers, work, lambda lines: announce(str(address), lines))


def _together(held: Sequence[Compiled]) -> Deployment | None:
    """Return the deployment of models that one service offers; None if there is none.

    Raises InvalidInput if they cannot be offered together: two have one name, or are for different deployments.
    """
    kinds = {compiled.deployment.name: compiled.deployment for compiled in held}
    if len(kinds) > 1:
        raise InvalidInput(f"the models were compiled for {' and '.join(sorted(kinds))}", "serve each on its own")
    deployment = next(iter(kinds.values()), None)
    names = [str(compiled.program.labels.get("model", "")) for compiled in held]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput(
            f"two models of the name {twice[0]!r}",
            "compile one model for several lengths at once; a compiled one keeps the name of what it was made from",
        )
    if deployment is not None and not deployment.takes_sizes and sum(len(each.sizes) for each in held) > 1:
        raise InvalidInput(f"a service of {deployment.name} offers one model", "serve each on its own")
    return deployment


def starting_order(deployment: Deployment) -> list[Role]:
    """List the roles that are hosted, each after those that it connects to."""
    served = set(hosted(deployment).takes)
    waiting = [role for role in deployment.roles() if role.name in served]
    out: list[Role] = []
    while waiting:
        ready = next(role for role in waiting if not {r.name for r in waiting} & set(role.peers))
        waiting.remove(ready)
        out.append(ready)
    return out
