"""Three servers with an honest majority. Weights and inputs are shared among them, and there is no dealer outside.

Parties 0 and 1 run the translation of a Program's circuit; party 2 deals its summand of every product ahead of a query.
Clients may send anything: the parties check look-up keys and inputs, unless the model is compiled for trusted clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from protocols.three_party import Translated, translate
from secure.cost.demand import Holding, kept_bytes, weight_bytes
from secure.cost.runnable import Deployed
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.deployment import (
    ALL,
    ANSWERS,
    COMPILE,
    CONNECT,
    NOTHING,
    OWN,
    SHAPE,
    TEXTS,
    TIMES,
    WEIGHTS,
    Role,
    option,
    register,
)
from secure.deployments.in_process import ThreePartiesInProcess
from secure.errors import InvalidProgram
from secure.models.tokens import TextTokenizer
from secure.mpc import compile as mpc
from secure.mpc.prices import DEFAULT, Prices
from secure.mpc.program import Program
from secure.session.link import Link

CLIENT, PARTIES = "client", ("party 0", "party 1", "party 2")
ADDRESSES = ("127.0.0.1:50060", "127.0.0.1:50061", "127.0.0.1:50062")


@register
@dataclass(frozen=True)
class ThreeParty(CircuitDeployment):
    """Three servers, of which no two may collude. The model's owner splits it into shares once and need not stay."""

    name: ClassVar[str] = "three-party"
    summary: ClassVar[str] = "three servers that share the model; secret sharing, no dealer"
    trust: ClassVar[str] = "semi-honest; no two parties may collude; clients are checked, unless compiled as trusted"
    serves: ClassVar[str] = ""
    how_to_serve: ClassVar[str] = "`unseen share-model`, then `unseen party` three times"
    untimed: ClassVar[tuple[str, ...]] = (
        "the client's work, one-hot look-ups of tokens and the encryption between parties are not timed; the bytes of "
        "clients are not counted",
    )
    shares_correlations: ClassVar[bool] = True

    parties: tuple[str, ...] = option(ADDRESSES, "host:port of parties 0, 1, 2, with commas.", CONNECT)
    public_weights: bool = option(False, "Let all parties know the weights: cheaper, inputs stay secret.", COMPILE)
    trusted_clients: bool = option(
        False, "Do not check what clients send, look-up keys and inputs: a little cheaper.", COMPILE
    )

    @property
    def prices(self) -> Prices:
        # party 2 may deal within the query, and one of the three waits for its bytes as for any other's
        return Prices(dealt_for_online=1, late_bytes=0 if self.public_weights else DEFAULT.late_bytes)

    def roles(self, *, token_table: bool = False) -> tuple[Role, ...]:
        shown = "the token table" if token_table else NOTHING  # the protocol tells clients no weights, even public ones
        held = ALL if self.public_weights else NOTHING
        learnt = {TEXTS: NOTHING, WEIGHTS: held, ANSWERS: NOTHING, SHAPE: ALL, TIMES: ALL}
        return (
            Role(CLIENT, {TEXTS: OWN, WEIGHTS: shown, ANSWERS: OWN, SHAPE: ALL, TIMES: OWN}, PARTIES),
            Role(PARTIES[0], learnt, (PARTIES[2],)),
            Role(PARTIES[1], learnt, (PARTIES[0], PARTIES[2])),
            Role(PARTIES[2], learnt),
        )

    def located(self, addresses: Mapping[str, str]) -> Self:
        return replace(self, parties=tuple(addresses[name] for name in PARTIES))

    def addresses(self) -> dict[str, str]:
        return dict(zip(PARTIES, self.parties, strict=False))

    def translated(self, program: Program) -> Translated:
        """Translate a Program's circuit for three servers; raises InvalidProgram if they cannot run it."""
        one_hot = {spec.name for spec in program.client_inputs if spec.encoding == "one-hot"}
        try:
            return translate(
                program.circuit,
                program.revealed,
                public=self.public_weights,
                one_hot=one_hot,
                trusted_clients=self.trusted_clients,
            )
        except ValueError as error:
            raise InvalidProgram(f"three parties cannot run this Program: {error}") from None

    def deployed(self, program: Program) -> Deployed:
        found = self.translated(program)
        paths = tuple(program.paths[i] for i in found.origin)
        return Deployed(found.circuit, found.outputs, paths, program.weight_shapes, PARTIES[:2], PARTIES[2])

    def holdings(self, program: Program) -> Mapping[str, Holding]:
        if self.public_weights:  # one file of narrow integers, mapped
            files = kept_bytes(program)
            return dict.fromkeys(PARTIES[:2], Holding(files, files))
        # parties 0 and 1: W_1, and two summands stacked for products
        share, both = Holding(weight_bytes(program, 3), weight_bytes(program)), PARTIES[:2]
        return {**dict.fromkeys(both, share), PARTIES[2]: Holding(weight_bytes(program))}

    def insecure(self, model: mpc.MpcModel, tokenizer: TextTokenizer | None) -> Link:
        running, translated = self.deployed(model.program), self.translated(model.program)
        return ThreePartiesInProcess(model, tokenizer, self.name, running, translated, public=self.public_weights)
