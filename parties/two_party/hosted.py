"""Server, dealer and client of two parties, as ``parties.deployments`` starts them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from parties.net.hosting import HostOptions, Parts
from parties.served.described import ConnectOptions
from parties.served.files import state_directory
from parties.served.published import Published
from parties.traces.trace_file import TraceDirectory
from parties.two_party.client import TwoPartyLink
from parties.two_party.dealer import DealerService
from parties.two_party.masked_model import mask_model
from parties.two_party.server import InferenceService
from proto.unseen_pb2_grpc import (
    add_DealerServicer_to_server,
    add_InferenceServicer_to_server,
    add_ModelServicer_to_server,
)
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import Deployment
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.session import Link


class TwoPartyHosted:
    """The two services of ``TwoParty``, and its link."""

    deployment: type[Deployment] = TwoParty
    takes: Mapping[str, frozenset[str]] = {
        SERVER: frozenset({"state", "traces", "deadline"}),
        DEALER: frozenset({"budget"}),
    }

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        assert isinstance(deployment, TwoParty)
        return TwoPartyLink(deployment, options)

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        if role == DEALER:
            dealer = DealerService(options.budget)
            return Parts([lambda server: add_DealerServicer_to_server(dealer, server)], dealer.permissions)
        return self._server(held, peers[DEALER], options)

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        return ()

    def command(self, role: str, compiling: Sequence[str], directory: Path, peers: Mapping[str, str]) -> Sequence[str]:
        if role == DEALER:
            return ("dealer",)
        where = ("--dealer", peers[DEALER], "--state", str(directory / "server"))
        return ("serve", *compiling, "--deployment", self.deployment.name, *where)

    @staticmethod
    def _server(held: Compiled, dealer: str, options: HostOptions) -> Parts:
        deadline, traces = options.deadline, TraceDirectory(options.traces) if options.traces else None
        model = mask_model(held.model, options.state or state_directory())
        service = InferenceService(model, dealer, options.network, deadline=deadline, traces=traces)
        published = Published(
            held.deployment,
            SERVER,
            model.program.encoded,
            model.weights_digest,
            model.files,
            held.tokenizer,
            held.tokenizer_json,
            deadline=deadline,
            log=logging.getLogger("unseen.server"),
            before=service.register,  # once more, because the dealer may have been restarted since
        )

        def add(server: grpc.Server) -> None:
            add_ModelServicer_to_server(published, server)
            add_InferenceServicer_to_server(service, server)

        return Parts([add], {**published.permissions, **service.permissions}, service.close)
