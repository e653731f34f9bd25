"""Two parties and a dealer: the default deployment, and the fastest. The server holds the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from secure.cost.circuit_profile import embedding_price
from secure.cost.demand import WORD, Holding, kept_bytes, masked_bytes, table_elements, weight_bytes
from secure.cost.runnable import Deployed
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.deployment import (
    ALL,
    ANSWERS,
    CONNECT,
    NOTHING,
    OWN,
    SERVE,
    SHAPE,
    TEXTS,
    TIMES,
    WEIGHTS,
    Role,
    option,
    register,
)
from secure.deployments.in_process import TwoPartiesInProcess
from secure.models.tokens import TextTokenizer
from secure.mpc import compile as mpc
from secure.mpc.program import Program
from secure.session.link import Link

SERVER, CLIENT, DEALER = "server", "client", "dealer"


@register
@dataclass(frozen=True)
class TwoParty(CircuitDeployment):
    """A server that holds the weights, and a dealer of correlations that must not collude with server or client."""

    name: ClassVar[str] = "two-party"
    summary: ClassVar[str] = "a server and a dealer; secret sharing"
    trust: ClassVar[str] = "semi-honest, for trusted clients; the dealer must not collude with either"
    default: ClassVar[bool] = True
    takes_sizes: ClassVar[bool] = True

    server: str = option("127.0.0.1:50051", "The server's host:port.", CONNECT)
    dealer: str = option("127.0.0.1:50052", "The dealer's host:port.", CONNECT, SERVE)
    dealer_key: str | None = option(
        None, "The dealer's key: the path of its dealer.pub, or the fingerprint that it prints.", CONNECT, SERVE
    )

    def roles(self, *, token_table: bool = False) -> tuple[Role, ...]:
        shown = "the token table; of the rest nothing" if token_table else NOTHING
        return (
            Role(CLIENT, {TEXTS: OWN, WEIGHTS: shown, ANSWERS: OWN, SHAPE: ALL, TIMES: OWN}, (SERVER, DEALER)),
            Role(SERVER, {TEXTS: NOTHING, WEIGHTS: OWN, ANSWERS: NOTHING, SHAPE: ALL, TIMES: ALL}, (DEALER,)),
            Role(DEALER, {TEXTS: NOTHING, WEIGHTS: NOTHING, ANSWERS: NOTHING, SHAPE: ALL, TIMES: ALL}),
        )

    def deployed(self, program: Program) -> Deployed:
        """Return the Program's circuit unchanged, to run between server and client."""
        names = (SERVER, CLIENT)
        return Deployed(program.circuit, program.revealed, program.paths, program.weight_shapes, names, DEALER)

    def holdings(self, program: Program) -> Mapping[str, Holding]:
        weights, masked, rows = weight_bytes(program), masked_bytes(program), table_elements(program)
        return {
            CLIENT: Holding(weights + WORD * rows, masked + 4 * rows),
            SERVER: Holding(weights + masked + WORD * rows, kept_bytes(program)),
            DEALER: Holding(weights),
        }

    def remarks(self, program: Program) -> tuple[str, ...]:
        price = embedding_price(program)
        return (*super().remarks(program), *((price,) if price else ()))

    def insecure(self, model: mpc.MpcModel, tokenizer: TextTokenizer | None) -> Link:
        return TwoPartiesInProcess(model, tokenizer, self.name, self.deployed(model.program))
