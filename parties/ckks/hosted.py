"""The server of ciphertexts and its client's link, as ``parties.deployments`` starts them."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import save

from parties.ckks.client import CkksLink
from parties.ckks.evaluators import Evaluators
from parties.ckks.prescribed import prescribed
from parties.ckks.server import CkksService
from parties.net.network import Network
from parties.proto.unseen_pb2_grpc import add_CkksServicer_to_server, add_ModelServicer_to_server
from parties.receipts.receipt import Receipt
from parties.served.described import ConnectOptions
from parties.served.files import TOKEN_TABLE, state_directory
from parties.served.published import Publication, Published
from parties.services.hosting import HostOptions, Parts
from secure.ckks.compile import CkksModel
from secure.ckks.profile import summary
from secure.ckks.program import CkksProgram
from secure.deployments.ckks import SERVER, Ckks
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import Deployment
from secure.session.link import Link
from secure.units import in_units

KEY_MEMORY = 8 << 30  # bytes of evaluation keys held decoded, at most


class CkksHosted:
    """The service of ``Ckks``, and its link."""

    deployment: type[Deployment] = Ckks
    takes: Mapping[str, frozenset[str]] = {SERVER: frozenset({"state", "deadline", "workers"})}
    forked: frozenset[str] = frozenset()  # its workers are other processes, and one alone talks to clients

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        assert isinstance(deployment, Ckks)
        return CkksLink(deployment, options)

    def prescribed(self, receipt: Receipt, programs: Mapping[str, bytes]) -> int:
        return prescribed(receipt, {digest: CkksProgram.from_bytes(encoded) for digest, encoded in programs.items()})

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        """Start the process that evaluates, and wait until it has encoded the weights: seconds to minutes.

        That process is a program of its own and no fork of this one, so it may be started at any time, even after this
        process has started threads, channels and other services.
        """
        compiled: Compiled = held
        model: CkksModel = compiled.model
        # a name for the weights that tells nothing about them; clients only compare it between calls
        name = hmac.digest(secrets.token_bytes(32), model.weights_digest.encode(), "sha256").hex()
        files = {TOKEN_TABLE: save(dict(model.client_tables))} if model.client_tables else {}
        offered = Publication(
            compiled.deployment, model.program, name, files, compiled.tokenizer, compiled.tokenizer_json
        )
        published = Published(SERVER, [offered], deadline=options.deadline, log=logging.getLogger("unseen.server"))
        options.told(0, 0, "encoding the weights")
        evaluators = Evaluators(model, workers=options.workers, key_memory=KEY_MEMORY)
        try:
            state = options.state or state_directory()
            service = CkksService(
                model.program, name, evaluators, state, deadline=options.deadline, events=options.events
            )
        except BaseException:
            evaluators.close()
            raise

        def add(server: grpc.Server) -> None:
            add_ModelServicer_to_server(published, server)
            add_CkksServicer_to_server(service, server)

        encoded = f"weights encoded in {evaluators.seconds:.1f} s, {in_units(evaluators.bytes)} in memory"
        permissions, about = {**published.permissions, **service.permissions}, (summary(model), encoded)
        digest, readings = model.program.digest, service.readings
        return Parts([add], permissions, evaluators.close, about, program=digest, readings=readings)

    def shared(self, role: str, held: Any, options: HostOptions) -> Any:
        return held

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        return ()

    def tries(
        self, role: str, deployment: Deployment, network: Network, state: Path | None
    ) -> Mapping[str, Callable[[], str]]:
        return {}

    def command(self, role: str, compiling: Sequence[str], directory: Path, peers: Mapping[str, str]) -> Sequence[str]:
        options = ("--deployment", self.deployment.name, "--state", str(directory / "server"), "--threads", "0")
        return ("serve", *compiling, *options)
