"""Server, dealer and client of two parties, as ``parties.deployments`` starts them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from parties.limits.memory import GB, PreparedMemory, memory_budget, require_room
from parties.limits.quotas import Spend, unlimited
from parties.limits.turns import Turns
from parties.net.network import Network
from parties.served.described import ConnectOptions
from parties.served.files import state_directory
from parties.served.published import Published
from parties.services.hosting import HostOptions, Parts
from parties.services.repeating import Repeating
from parties.services.workers import share_of
from parties.traces.trace_file import TraceDirectory
from parties.two_party.client import TwoPartyLink
from parties.two_party.dealer import LARGEST, DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.masked_model import MaskedModel, mask_model
from parties.two_party.sealing import PUBLIC_FILE, SealingKey
from parties.two_party.server import MAXIMUM_SESSIONS, InferenceService
from proto.unseen_pb2_grpc import (
    add_DealerServicer_to_server,
    add_InferenceServicer_to_server,
    add_ModelServicer_to_server,
)
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import Deployment
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.session import Link

SWEEPING = 30.0  # seconds after which the dealer looks again for what it can forget


class TwoPartyHosted:
    """The two services of ``TwoParty``, and its link."""

    deployment: type[Deployment] = TwoParty
    takes: Mapping[str, frozenset[str]] = {
        SERVER: frozenset({"state", "traces", "deadline", "rotate_mask", "memory"}),
        DEALER: frozenset({"state", "budget"}),
    }
    forked: frozenset[str] = frozenset({SERVER})

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        assert isinstance(deployment, TwoParty)
        return TwoPartyLink(deployment, options)

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        assert isinstance(deployment, TwoParty)
        if role == DEALER:
            return self._dealer(options)
        return self._server(held, DealerPeer(peers[DEALER], options.network, deployment.dealer_key), options)

    def shared(self, role: str, held: Any, options: HostOptions) -> Any:
        """Return the weights, packed for the Program's products, and the masked weights."""
        compiled: Compiled = held
        made = _made(compiled, options)
        for use in (instruction.protocol.weight_use for instruction in made.model.program.circuit):
            if use is not None and use.multiplied:
                made.model.weights.packed(use.name, use.ring)
        return made

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        return ()

    def tries(self, role: str, deployment: Deployment, network: Network) -> Mapping[str, Callable[[], str]]:
        assert isinstance(deployment, TwoParty)

        def key() -> str:
            dealer = DealerPeer(deployment.dealer, network, deployment.dealer_key)
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
        dealer = DealerService(key, spend=spend_of(options), budget=options.budget)
        sweeping = Repeating(SWEEPING, dealer.sweep, logging.getLogger("unseen.dealer"))
        about = f"key {key.public.fingerprint}, in {state / PUBLIC_FILE}"
        add = [lambda server: add_DealerServicer_to_server(dealer, server)]
        return Parts(
            add, dealer.permissions, sweeping.close, [about], knows=dealer.knows, largest=LARGEST, left=dealer.is_asked
        )

    @staticmethod
    def _server(held: Compiled | _Made, dealer: DealerPeer, options: HostOptions) -> Parts:
        try:
            made = held if isinstance(held, _Made) else _made(held, options)
        except BaseException:
            dealer.close()
            raise
        model, published, memory = made.model, made.published, PreparedMemory(_memory(options))
        service = InferenceService(
            model,
            dealer,
            deadline=options.deadline,
            traces=TraceDirectory(options.traces) if options.traces else None,
            spend=spend_of(options),
            memory=memory,
            turns=Turns(share_of(os.cpu_count(), options.workers)),
        )

        def add(server: grpc.Server) -> None:
            add_ModelServicer_to_server(published, server)
            add_InferenceServicer_to_server(service, server)

        size = model.program.cost.dealt
        many = f"{memory.total // max(size, 1)} of {size / GB:.3g} GB"
        about = [f"memory for prepared queries: {memory.total / GB:.3g} GB, {many}"]
        if options.workers > 1:
            about = [f"{options.workers} workers; each has: {about[0]}, and {MAXIMUM_SESSIONS} sessions"]
        permissions = {**published.permissions, **service.permissions}
        return Parts([add], permissions, service.close, about, program=model.program.digest, drain=service.drain)


@dataclass(frozen=True, repr=False)
class _Made:
    """What a server has made before it listens, and several processes share."""

    model: MaskedModel
    published: Published


def _memory(options: HostOptions) -> int:
    """Return the bytes for prepared queries of one of the workers."""
    return memory_budget(options.memory) // options.workers


def _made(held: Compiled, options: HostOptions) -> _Made:
    """Mask a model. Raises InvalidInput if one query is more than the memory for prepared queries."""
    require_room(_memory(options), held.model.program.cost.dealt)
    options.told(0, 0, "masking the weights")
    model = mask_model(held.model, options.state or state_directory(), options.rotate_mask)
    published = Published(
        held.deployment,
        SERVER,
        model.program.encoded,
        model.weights_digest,
        model.files,
        held.tokenizer,
        held.tokenizer_json,
        deadline=options.deadline,
        log=logging.getLogger("unseen.server"),
    )
    return _Made(model, published)


def spend_of(options: HostOptions) -> Spend:
    """Return what counts the preparations and queries of callers."""
    return options.quotas.spend if options.quotas else unlimited
