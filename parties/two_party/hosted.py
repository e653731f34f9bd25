"""Server, dealer and client of two parties, as ``parties.deployments`` starts them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from parties.limits.quotas import Spend, unlimited
from parties.net.network import Network
from parties.served.described import ConnectOptions
from parties.served.files import state_directory
from parties.served.published import Publication, Published
from parties.services.hosting import HostOptions, Parts
from parties.services.repeating import Repeating
from parties.traces.trace_file import TraceDirectory
from parties.two_party.client import TwoPartyLink
from parties.two_party.dealer import LARGEST, DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.masked_model import mask_models
from parties.two_party.sealing import PUBLIC_FILE, SealingKey
from parties.two_party.server import InferenceService
from proto.unseen_pb2_grpc import (
    add_DealerServicer_to_server,
    add_InferenceServicer_to_server,
    add_ModelServicer_to_server,
)
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import Deployment
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.session.link import Link

SWEEPING = 30.0  # seconds after which the dealer looks again for what it can forget


class TwoPartyHosted:
    """The two services of ``TwoParty``, and its link."""

    deployment: type[Deployment] = TwoParty
    takes: Mapping[str, frozenset[str]] = {
        SERVER: frozenset({"state", "traces", "deadline", "rotate_mask"}),
        DEALER: frozenset({"state", "budget", "dealing"}),
    }

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
        dealer = DealerService(key, spend_of(options), options.budget, options.dealing)
        sweeping = Repeating(SWEEPING, dealer.sweep, logging.getLogger("unseen.dealer"))
        about = f"key {key.public.fingerprint}, in {state / PUBLIC_FILE}"

        def close() -> None:
            sweeping.close()
            options.dealing.close()

        add = [lambda server: add_DealerServicer_to_server(dealer, server)]
        return Parts(
            add, dealer.permissions, close, [about, *options.dealing.about()], knows=dealer.knows, largest=LARGEST
        )

    @staticmethod
    def _server(held: Sequence[Compiled], dealer: DealerPeer, options: HostOptions) -> Parts:
        deadline, traces = options.deadline, TraceDirectory(options.traces) if options.traces else None
        options.told(0, 0, "masking the weights")
        sizes = [size for compiled in held for size in compiled.sizes]
        models = mask_models([size.model for size in sizes], options.state or state_directory(), options.rotate_mask)
        options.told(0, 0, f"registering Programs at {dealer}")
        service = InferenceService(models, dealer, deadline=deadline, traces=traces, spend=spend_of(options))
        offered = [
            Publication(size.deployment, size.program, m.weights_digest, m.files, size.tokenizer, size.tokenizer_json)
            for size, m in zip(sizes, models, strict=True)
        ]
        published = Published(
            SERVER,
            offered,
            deadline=deadline,
            log=logging.getLogger("unseen.server"),
            asked=lambda found: service.offer(found.program.digest, found.model),
        )
        digests = {model.program.digest for model in models}

        def add(server: grpc.Server) -> None:
            add_ModelServicer_to_server(published, server)
            add_InferenceServicer_to_server(service, server)

        return Parts(
            [add],
            {**published.permissions, **service.permissions},
            service.close,
            program=models[0].program.digest,
            knows=digests.__contains__,
        )


def spend_of(options: HostOptions) -> Spend:
    """Return what counts the preparations and queries of callers."""
    return options.quotas.spend if options.quotas else unlimited
