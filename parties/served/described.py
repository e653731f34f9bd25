"""The client's side of a service's description: everything is checked before it is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import grpc
from torch import Tensor

from parties.limits.waiting import SLOWEST
from parties.net.network import Network, Plaintext
from parties.net.peer import Peer
from parties.net.versions import check_version
from parties.net.watchdog import Watchdog, check_deadline
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import ModelStub
from parties.served.files import TOKEN_TABLE, fetch, received_tokenizer, tables_size, unpack_tables
from secure.cost.traffic import ONCE, Traffic
from secure.deployments.deployment import Deployment
from secure.errors import HandshakeError, InvalidProgram, PeerLost, ProtocolError, printable
from secure.lowering.client_inputs import MAXIMUM_BATCH, ClientInput, table_shapes
from secure.models.settings import settings_of
from secure.models.tokens import TextTokenizer
from secure.mpc.budget import Budget
from secure.progress import Told
from secure.session.link import MAXIMUM_LENGTHS, Offer, digest_of_all

MAXIMUM_NAMES, MAXIMUM_NAME = 320, 512  # in a description, and the characters of each
MAXIMUM_OFFERS = 256


@dataclass(frozen=True)
class ConnectOptions:
    """Options that every client takes.

    network: the protection of channels. deadline: seconds to wait for any one message before PeerLost. cache: a
    directory for once-per-model files; None: keep none. program_digest: refuse a service whose Program has another
    digest; of a service that offers several, this one is meant, or all of them if it is ``digest_of_all``. model:
    refuse a service of other weights, by the name that ``Link.model`` had. name: the name of the model that is meant;
    None if the service offers only one. budget: refuse a Program that may take more on this machine. told: called with
    progress while something takes long. Raises InvalidInput for a deadline that is none.
    """

    network: Network = field(default_factory=Plaintext)
    deadline: float = 60.0
    cache: Path | None = None
    program_digest: str | None = None
    model: str | None = None
    name: str | None = None
    budget: Budget = field(default_factory=Budget)
    told: Told | None = None

    def __post_init__(self) -> None:
        check_deadline(self.deadline)


class Decoded(Protocol):
    """The part of a Program that a client needs."""

    @property
    def digest(self) -> str: ...
    @property
    def client_inputs(self) -> tuple[ClientInput, ...]: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


P = TypeVar("P", bound=Decoded)


@dataclass(frozen=True, eq=False, repr=False)
class Described(Generic[P]):
    """A service's description. model: names the weights; tables: the token tables that clients hold.

    offers: the sizes at which the service offers this model, the described one among them.
    """

    program: P
    model: str
    compiled_as: Mapping[str, str]
    files: Mapping[str, bytes]
    tables: Mapping[str, Tensor]
    tokenizer: TextTokenizer | None
    once: tuple[Traffic, ...]
    offers: tuple[Offer, ...]


def ask_description(peer: Peer, deployment: Deployment, role: str, options: ConnectOptions) -> pb.Description:
    """Ask a service for its description, and check its version, deployment, role and compiled options.

    Raises HandshakeError if one of them differs, PeerLost if the service cannot be reached.
    """
    request = pb.DescribeRequest(program_digest=options.program_digest or "", model=options.name or "")
    with peer.calling():
        found: pb.Description = ModelStub(peer.channel).Describe(request, timeout=options.deadline)
    check_version(peer.who, found.version, "this client")
    _check(found, peer.who)
    named, wanted = found.deployment, deployment.name
    if named != wanted:
        raise HandshakeError(
            f"deployment: {peer.who} is one of {printable(named)!r}, this client asks {wanted!r}",
            "use the same deployment on both sides (--deployment)",
        )
    if found.role != role:
        raise HandshakeError(
            f"{printable(found.role)} answers at {peer.at}, where {role} should", "check the order of the addresses"
        )
    _check_name(found, peer.who, options.name)
    if (name := deployment.differs(found.compiled_as)) is not None:
        theirs = printable(found.compiled_as[name]) if name in found.compiled_as else "nothing"
        raise HandshakeError(
            f"{name}: the model was compiled with {theirs}, this client wants {getattr(deployment, name)}",
            f"connect without {name}, or ask the server's owner",
        )
    return found


def _check_name(found: pb.Description, who: str, name: str | None) -> None:
    """Raise HandshakeError if it is open which model is meant, or another is described."""
    known = ", ".join(sorted({offer.model or "(no name)" for offer in found.offers}))
    if name is not None and name not in {offer.model for offer in found.offers}:
        raise HandshakeError(f"{who} offers no model {name!r}", f"it offers {known}")
    if not found.program:
        raise HandshakeError(f"{who} offers several models", f"name one: {known}: --model NAME (model=...)")


def _check(found: pb.Description, who: str) -> None:
    """Raise ProtocolError unless the names in a description are few, short and printable, as messages show them."""
    if len(found.offers) > MAXIMUM_OFFERS:
        raise ProtocolError(f"{who} offers {len(found.offers)} Programs, at most {MAXIMUM_OFFERS} are read")
    names = [found.deployment, found.role, found.model, *(f.name for f in found.files)]
    names += [*found.compiled_as, *found.compiled_as.values()]
    told = [text for offer in found.offers for text in (offer.model, offer.weights, offer.program_digest)]
    if len(names) > MAXIMUM_NAMES or any(len(name) > MAXIMUM_NAME or not name.isprintable() for name in names + told):
        raise ProtocolError(
            f"{who} describes itself by {len(names)} names; at most {MAXIMUM_NAMES} are read, each of {MAXIMUM_NAME} "
            "printable characters"
        )


def read_description(
    peer: Peer,
    found: pb.Description,
    role: str,
    decode: Callable[[bytes], P],
    options: ConnectOptions,
    wanted: Callable[[P], Mapping[str, int]] = lambda _: {},
) -> Described[P]:
    """Decode and check the Program, and fetch and check the ``wanted`` files and the token table.

    wanted: returns the most bytes of each file that the client of a Program needs, by name; more are never downloaded.
    Raises ProtocolError, HandshakeError, PeerLost, DownloadError.
    """
    try:
        program = decode(found.program)
        settings_of(program.labels)  # checks them
    except InvalidProgram as error:
        raise ProtocolError(f"the Program of {peer.who}: {error}") from None
    offers = _offers(found, program.labels.get("model", ""))
    pinned, whole = options.program_digest, digest_of_all(offer.program_digest for offer in offers)
    # the list is the server's word alone, so a digest of all counts only for a Program that the list names
    listed = program.digest in {offer.program_digest for offer in offers}
    if pinned is not None and pinned != program.digest and not (listed and pinned == whole):
        together = listed and whole != program.digest
        both = f"{whole!r} for all its Programs together" if together else f"{program.digest!r}"
        raise HandshakeError(
            f"Program digest: {peer.who} has {both}, this client expects {pinned!r}",
            "ask the server's owner which Program it serves",
        )
    if options.model is not None and options.model != found.model:
        raise HandshakeError(
            f"{peer.who} serves other weights than it did when this client connected",
            "connect again; answers of both models do not belong together",
        )

    downloaded = set[str]()  # what the cache has does not cross

    def download(sha256: str) -> Iterator[bytes]:
        downloaded.add(sha256)
        return _downloaded(peer, sha256, options.deadline)

    shapes, payloads = table_shapes(program.client_inputs), dict[str, bytes]()
    most = {**wanted(program), **({TOKEN_TABLE: tables_size(shapes)} if shapes else {})}
    for file in found.files:
        if file.name in payloads:
            raise ProtocolError(f"{peer.who} describes {file.name} twice")
        if file.name in most:
            with peer.calling(f"sending {file.name}", hint="try again"):
                payloads[file.name] = fetch(file, download, options.cache, most[file.name])
    tables = unpack_tables(payloads.get(TOKEN_TABLE), shapes, program.labels)
    tokenizer = received_tokenizer(found.tokenizer, found.pad_id, found.lowercase, program.labels)
    once = tuple(Traffic(role, "client", f.size, ONCE) for f in found.files if f.sha256 in downloaded)
    return Described(program, found.model, dict(found.compiled_as), payloads, tables, tokenizer, once, offers)


def _downloaded(peer: Peer, sha256: str, deadline: float) -> Iterator[bytes]:
    """Yield the parts of a file. Raises PeerLost if one does not come within the deadline, or all come too slowly.

    All that came in some time must be what comes at SLOWEST bytes a second, but for the first ``deadline`` seconds. So
    parts that hold little, or nothing, end a download as soon as silence does.
    """
    stream = ModelStub(peer.channel).Download(pb.DownloadRequest(sha256=sha256))
    watch, began, size = Watchdog(deadline, stream.cancel), time.monotonic(), 0
    try:
        for chunk in watch.receiving(stream):
            size += len(chunk.data)
            if (taken := time.monotonic() - began) > deadline + size / SLOWEST:
                slow = f"{peer} sent {size} bytes of a file in {taken:.0f} s"
                raise PeerLost(slow, f"a file comes at {SLOWEST} bytes a second or more; give a longer --deadline")
            yield chunk.data
    except grpc.RpcError:
        if watch.fired:
            raise PeerLost(f"{peer} sent nothing of a file for {deadline:g} s", "see its log") from None
        raise
    finally:
        watch.stop()
        stream.cancel()


def _offers(found: pb.Description, name: str) -> tuple[Offer, ...]:
    """Return the sizes at which the described model is offered: those of its name, with the same weights.

    Raises ProtocolError for more lengths than MAXIMUM_LENGTHS: a text's length is one of them, which the service sees.
    """
    same = [offer for offer in found.offers if (offer.weights, offer.model) == (found.model, name)]
    if len(lengths := {offer.length for offer in same}) > MAXIMUM_LENGTHS:
        raise ProtocolError(f"a model is offered for {len(lengths)} lengths, at most {MAXIMUM_LENGTHS} are used")
    for offer in same:  # before any of it decides how much is read and put together
        if not 1 <= offer.batch <= MAXIMUM_BATCH:
            raise ProtocolError(f"a model is offered for {offer.batch} inputs a query, 1 to {MAXIMUM_BATCH} are asked")
    if len({(offer.length, offer.batch) for offer in same}) < len(same):
        raise ProtocolError("a model is offered twice for one length and one batch")
    return tuple(Offer(offer.length, offer.batch, offer.program_digest) for offer in same)
