"""The three parties and their client, as ``parties.deployments`` starts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from parties.limits.memory import memory_said
from parties.net.caller import permit
from parties.net.network import Network
from parties.net.peer import Peer
from parties.proto.unseen_pb2_grpc import add_ModelServicer_to_server, add_PartyServicer_to_server
from parties.receipts.receipt import Receipt
from parties.served.described import ConnectOptions
from parties.served.published import Publication, Published
from parties.services.hosting import HostOptions, Parts
from parties.store.database import DatabaseStore
from parties.store.files import FileStore
from parties.store.keys import read_store_key
from parties.three_party.client import ThreePartyLink
from parties.three_party.party import STREAMS, PartyService
from parties.three_party.party_0 import Party0Service
from parties.three_party.party_1 import Party1Service
from parties.three_party.party_2 import Party2Service
from parties.three_party.prescribed import prescribed
from parties.three_party.shared_model import PartyShare, SharedProgram, load_share
from secure.deployments.deployment import Deployment
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.errors import InvalidInput
from secure.mpc.budget import Budget
from secure.session.link import Link, digest_of_all
from secure.units import in_units

SEEDS_FILE = "seeds.sqlite"  # in the directory of party 2's store


class ThreePartyHosted:
    """The three services of ``ThreeParty``, and its link. held: a party's directory, made by ``share_model``."""

    deployment: type[Deployment] = ThreeParty
    takes: Mapping[str, frozenset[str]] = {
        PARTIES[0]: frozenset({"deadline", "ahead", "store", "store_gb", "store_key"}),
        PARTIES[1]: frozenset({"deadline"}),
        PARTIES[2]: frozenset({"deadline", "store", "store_key"}),
    }
    forked: frozenset[str] = frozenset()

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        assert isinstance(deployment, ThreeParty)
        return ThreePartyLink(deployment, options)

    def prescribed(self, receipt: Receipt, programs: Mapping[str, bytes]) -> int:
        budget = Budget()  # of a client, who has no weights
        decoded = {digest: budget.decode(encoded, weights=False) for digest, encoded in programs.items()}
        return prescribed(receipt, decoded)

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        return parts_of(_service(_share(role, held, deployment), peers, options))

    def shared(self, role: str, held: Any, options: HostOptions) -> Any:
        return held

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        return ("share-model", *compiling, "--output", str(directory), "--threads", "1")

    def tries(
        self, role: str, deployment: Deployment, network: Network, state: Path | None
    ) -> Mapping[str, Callable[[], str]]:
        return {}

    def command(self, role: str, compiling: Sequence[str], directory: Path, peers: Mapping[str, str]) -> Sequence[str]:
        number = PARTIES.index(role)
        others = [word for name, at in peers.items() for word in (f"--{name.replace(' ', '-')}", at)]
        return ("party", "--id", str(number), "--share", str(directory / f"party-{number}"), *others, "--same-owner")


def parts_of(service: PartyService) -> Parts:
    """Return the parts of a party's service, with the public description of its model."""
    share = service.share
    model, text = share.manifest.model, (share.tokenizer, share.tokenizer_json)
    offered = [Publication(share.deployment, size.program, model, share.files, *text) for size in share.sizes]
    published = Published(share.role, offered, deadline=service.deadline, log=service.log)

    def add(server: grpc.Server) -> None:
        add_ModelServicer_to_server(published, server)
        add_PartyServicer_to_server(service, server)

    permissions = {**published.permissions, **service.permissions}
    standing = frozenset(permit("Party", Agree=()))
    about, digests = [_about(share, size) for size in share.sizes], [size.program.digest for size in share.sizes]
    whole = digest_of_all(digests)
    if len(digests) > 1:
        about.append(f"all {len(digests)} Programs together: {whole}")
    about.append(memory_said(*share.memory, share.role, "a machine with more memory"))
    return Parts(
        [add],
        permissions,
        service.close,
        about,
        STREAMS,
        digests[0],
        knows=frozenset({*digests, whole}).__contains__,
        standing=standing,
        readings=service.readings,
    )


def _share(role: str, held: Any, deployment: Deployment) -> PartyShare:
    """Load the share in a directory; raises InvalidInput if it is another role's or was made with other options."""
    if not isinstance(held, (str, Path)):
        raise InvalidInput(
            f"{role} serves its share of a model, not {'nothing' if held is None else type(held).__name__}",
            "give the directory that unseen share-model wrote for it",
        )
    share = load_share(held)
    if share.role != role:
        raise InvalidInput(f"{held} is the share of {share.role}, not of {role}", "give each party its own directory")
    if (name := deployment.differs(share.manifest.compiled_as)) is not None:
        raise InvalidInput(f"{name}: the share in {held} was made with {share.manifest.compiled_as[name]}")
    return share


def _service(share: PartyShare, peers: Mapping[str, str], options: HostOptions) -> PartyService:
    """Make the service of this share's party, with channels to the parties that it calls."""
    called = [
        Peer(role, peers[role], options.network, role=role, start=f"unseen party --id {number} --share DIRECTORY")
        for number, role in enumerate(PARTIES)
        if role in peers
    ]
    common: dict[str, Any] = {"deadline": options.deadline, "events": options.events}
    directory = options.store
    if directory and all(size.program.keeps for size in share.sizes):
        for each in called:
            each.close()
        raise InvalidInput("a model that generates text keeps nothing ready in a store", "leave --store out")
    if share.party == 0:
        store = FileStore(directory, read_store_key(options.store_key)) if directory else None
        return Party0Service(share, *called, ahead=options.ahead, **common, store=store, most=options.store_size)
    if share.party == 1:
        return Party1Service(share, *called, **common)
    seeds = DatabaseStore(directory / SEEDS_FILE, read_store_key(options.store_key)) if directory else None
    return Party2Service(share, **common, store=seeds)


def _about(share: PartyShare, size: SharedProgram) -> str:
    """Describe the cost of a query of one Program between the parties in one line."""
    cost, held = size.circuit.cost, "public weights" if share.deployment.public_weights else "shared weights"
    if share.deployment.trusted_clients:
        held += ", trusted clients: what they send is not checked"
    between = in_units(cost.to_second + cost.to_first)
    rows = f", {in_units(cost.brought)} of rows within it" if cost.brought else ""
    length = size.program.labels.get("length", "")
    which = f" of {length} tokens" if len(share.sizes) > 1 and length else ""
    return (
        f"{held}; a query{which} takes {cost.rounds} rounds, {between} between parties 0 and 1, "
        f"{in_units(cost.dealt)} from party 2 to party 0 ahead{rows}; Program {size.program.digest}"
    )
