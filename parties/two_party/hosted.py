"""Server, dealer and client of two parties, as ``parties.deployments`` starts them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from parties.limits.memory import (
    DISK,
    GB,
    PreparedMemory,
    available_memory,
    disk_budget,
    memory_budget,
    require_room,
)
from parties.limits.quotas import Spend, unlimited
from parties.limits.turns import Turns
from parties.net.network import Network
from parties.proto.unseen_pb2_grpc import (
    add_DealerServicer_to_server,
    add_InferenceServicer_to_server,
    add_ModelServicer_to_server,
)
from parties.receipts.receipt import Receipt
from parties.served.described import ConnectOptions
from parties.served.files import state_directory
from parties.served.published import Publication, Published
from parties.services.hosting import HostOptions, Parts
from parties.services.repeating import Repeating
from parties.services.workers import share_of
from parties.store.database import DatabaseStore
from parties.store.files import FileStore
from parties.store.keys import read_store_key
from parties.traces.trace_file import TraceDirectory
from parties.two_party.client import TwoPartyLink
from parties.two_party.dealer import LARGEST, DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.masked_model import MaskedModel, mask_models
from parties.two_party.prescribed import prescribed
from parties.two_party.sealing import PUBLIC_FILE, SealingKey
from parties.two_party.server import MAXIMUM_SESSIONS, STREAMS, InferenceService
from parties.two_party.stocked import Stocked, memory_of, spooled_of
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import Deployment
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.errors import InvalidInput
from secure.mpc.budget import PARTS, Budget
from secure.mpc.program import Program
from secure.session.link import Link, digest_of_all
from secure.units import in_units

STORE = ("store", "store_key")  # what both roles take to keep entries on a disk
ENTRIES = "entries.sqlite"  # in the directory of the dealer's store
SWEEPING = 30.0  # seconds after which the dealer looks again for what it can forget


class TwoPartyHosted:
    """The two services of ``TwoParty``, and its link."""

    deployment: type[Deployment] = TwoParty
    takes: Mapping[str, frozenset[str]] = {
        SERVER: frozenset({"state", "traces", "deadline", "rotate_mask", "memory", *STORE, "store_gb"}),
        DEALER: frozenset({"state", "budget", "dealing", *STORE}),
    }
    forked: frozenset[str] = frozenset({SERVER})

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        assert isinstance(deployment, TwoParty)
        return TwoPartyLink(deployment, options)

    def prescribed(self, receipt: Receipt, programs: Mapping[str, bytes]) -> int:
        return prescribed(receipt, {digest: Budget().decode(encoded) for digest, encoded in programs.items()})

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        assert isinstance(deployment, TwoParty)
        if role == DEALER:
            return self._dealer(options)
        dealer = DealerPeer(peers[DEALER], options.network, deployment.dealer_key, state=options.state)
        return self._server(held, dealer, options)

    def shared(self, role: str, held: Any, options: HostOptions) -> Any:
        """Return the weights, packed for the Programs' products, and the masked weights."""
        made = _made(held, options)
        for model in made.models:
            model.weights.get_ready(model.program.circuit)
        return made

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        return ()

    def tries(
        self, role: str, deployment: Deployment, network: Network, state: Path | None
    ) -> Mapping[str, Callable[[], str]]:
        assert isinstance(deployment, TwoParty)

        def key() -> str:
            dealer = DealerPeer(deployment.dealer, network, deployment.dealer_key, state=state)
            try:
                return f"{dealer.key().fingerprint}"
            finally:
                dealer.close()

        return {} if role == DEALER else {"the dealer's key": key}

    def command(self, role: str, compiling: Sequence[str], directory: Path, peers: Mapping[str, str]) -> Sequence[str]:
        if role == DEALER:
            return ("dealer", "--state", str(directory / "dealer"))
        where = ("--dealer", peers[DEALER], "--state", str(directory / "server"), "--same-owner")
        return ("serve", *compiling, "--deployment", self.deployment.name, *where)

    @staticmethod
    def _dealer(options: HostOptions) -> Parts:
        state = options.state or state_directory()
        key = SealingKey.load(state)
        entries = DatabaseStore(options.store / ENTRIES, read_store_key(options.store_key)) if options.store else None
        dealer = DealerService(key, spend_of(options), options.budget, options.dealing, entries, options.events)
        sweeping = Repeating(SWEEPING, dealer.sweep, logging.getLogger("unseen.dealer"))
        about = f"key {key.public.fingerprint}, in {state / PUBLIC_FILE}"

        def close() -> None:
            sweeping.close()
            dealer.close()
            options.dealing.close()

        add = [lambda server: add_DealerServicer_to_server(dealer, server)]
        return Parts(
            add,
            dealer.permissions,
            close,
            [about, *options.dealing.about()],
            knows=dealer.knows,
            largest=LARGEST,
            left=dealer.is_asked,
            readings=dealer.readings,
        )

    @staticmethod
    def _server(held: Sequence[Compiled] | _Made, dealer: DealerPeer, options: HostOptions) -> Parts:
        try:
            made = held if isinstance(held, _Made) else _made(held, options)
            store = FileStore(options.store, read_store_key(options.store_key)) if options.store else None
        except BaseException:
            dealer.close()
            raise
        options.told(0, 0, f"registering Programs at {dealer}")
        models, memory = made.models, PreparedMemory(_memory(options))
        service = InferenceService(
            models,
            dealer,
            deadline=options.deadline,
            traces=TraceDirectory(options.traces) if options.traces else None,
            spend=spend_of(options),
            memory=memory,
            disk=PreparedMemory(disk_budget() // options.workers, *DISK),
            turns=Turns(share_of(os.cpu_count(), options.workers)),
            stocked=Stocked(store, options.store_size, dealer) if store is not None else None,
            events=options.events,
        )
        published = Published(
            SERVER,
            made.offered,
            deadline=options.deadline,
            log=logging.getLogger("unseen.server"),
            asked=lambda found: service.offer(found.program.digest, found.model),
        )

        def add(server: grpc.Server) -> None:
            add_ModelServicer_to_server(published, server)
            add_InferenceServicer_to_server(service, server)

        largest = max(memory_of(model.program) for model in models)
        many = f"{memory.total // max(largest, 1)} of {in_units(largest)}"
        about = [f"memory for prepared queries: {in_units(memory.total)}, {many}"]
        if options.workers > 1:
            about = [f"{options.workers} workers; each has: {about[0]}, and {MAXIMUM_SESSIONS} sessions"]
        if options.memory is not None and 0 < (free := available_memory()) < options.memory:
            about.append(f"warning: --memory gives {options.memory / GB:.3g} GB, and {free / GB:.3g} GB are free")
        return Parts(
            [add],
            {**published.permissions, **service.permissions},
            service.close,
            about,
            STREAMS,
            program=models[0].program.digest,
            knows=_digests(models).__contains__,
            drain=service.drain,
            readings=service.readings,
        )


@dataclass(frozen=True, repr=False)
class _Made:
    """The parts that a server has made before it listens, and several processes share."""

    models: Sequence[MaskedModel]
    offered: Sequence[Publication]


def _digests(models: Iterable[MaskedModel]) -> set[str]:
    """Return the digests of Programs, and those of all Programs of one model together."""
    found = dict[tuple[str, str], list[str]]()
    for model in models:
        name = model.weights_digest, model.program.labels.get("model", "")
        found.setdefault(name, []).append(model.program.digest)
    return {digest for digests in found.values() for digest in (*digests, digest_of_all(digests))}


def _memory(options: HostOptions) -> int:
    """Return the bytes for prepared queries of one of the workers."""
    return memory_budget(options.memory) // options.workers


def _needed(program: Program) -> int:
    """Return the bytes of memory that one prepared query needs, and the rows of the text in which it stands."""
    return memory_of(program) + PARTS * program.kept_bytes


def _made(held: Sequence[Compiled], options: HostOptions) -> _Made:
    """Mask models. Raises InvalidInput if one query is more than the memory for prepared queries."""
    sizes = [size for compiled in held for size in compiled.sizes]
    for budget, need, named in (
        (memory_budget(options.memory), _needed, ()),
        (disk_budget(), spooled_of, DISK),
    ):
        require_room(budget, max(need(size.program) for size in sizes), *named, workers=options.workers)
    options.told(0, 0, "masking the weights")
    models = mask_models([size.model for size in sizes], options.state or state_directory(), options.rotate_mask)
    names = {id(model.files): model.weights_digest for model in models}
    if len(set(names.values())) < len(names):  # they have one mask, and differ in their parts
        raise InvalidInput("two indices of one model", "serve each in a process of its own")
    offered = [
        Publication(size.deployment, size.program, m.weights_digest, m.files, size.tokenizer, size.tokenizer_json)
        for size, m in zip(sizes, models, strict=True)
    ]
    return _Made(models, offered)


def spend_of(options: HostOptions) -> Spend:
    """Return what counts the preparations and queries of callers."""
    return options.quotas.spend if options.quotas else unlimited
