"""Ciphertexts alone: the client encrypts and decrypts, the server computes on what it cannot read. No dealer.

For models in polynomial form; small ones, as every product of ciphertexts costs tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from secure.ckks import compile as ckks
from secure.cost.traffic import ONCE, ONLINE, Cost, Traffic
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
    CompileOptions,
    Deployment,
    Role,
    option,
    register,
)
from secure.errors import InvalidInput
from secure.models.tokens import TextTokenizer
from secure.session import Link

SERVER, CLIENT = "server", "client"
CLIENT_TABLE = "client-table"  # the one way of looking tokens up here


@register
@dataclass(frozen=True)
class Ckks(Deployment):
    """One server that computes on ciphertexts, homomorphically (CKKS, 128-bit security)."""

    name: ClassVar[str] = "ckks"
    summary: ClassVar[str] = "one server, on ciphertexts; models in polynomial form"
    trust: ClassVar[str] = "semi-honest; nobody else to trust"
    takes: ClassVar[frozenset[str]] = frozenset({"embedding"})

    server: str = option("127.0.0.1:50051", "The server's host:port.", CONNECT)
    refresh: bool = option(False, "The client re-encrypts where the levels end.", COMPILE)
    precision: float = option(9.0, "Bits of the answer, of its largest value.", COMPILE)
    keys: Path | None = option(None, "Keep the secret key in this directory, so that keys are uploaded once.", CONNECT)

    def roles(self, *, token_table: bool = False) -> tuple[Role, ...]:
        shown = "the token table; of the rest nothing" if token_table else NOTHING
        return (
            Role(CLIENT, {TEXTS: OWN, WEIGHTS: shown, ANSWERS: OWN, SHAPE: ALL, TIMES: OWN}, (SERVER,)),
            Role(SERVER, {TEXTS: NOTHING, WEIGHTS: OWN, ANSWERS: NOTHING, SHAPE: ALL, TIMES: ALL}),
        )

    def build(
        self,
        model: nn.Module,
        samples: Sequence[Mapping[str, Tensor]],
        options: CompileOptions,
        labels: Mapping[str, str],
    ) -> ckks.Encrypted:
        if options.embedding not in (None, CLIENT_TABLE):
            raise InvalidInput(
                f"embedding {options.embedding!r} is not to be had under {self.name}",
                f"clients hold the token table here: {CLIENT_TABLE!r}, if they may see it",
            )
        mode = "refresh" if self.refresh else "pure"
        return ckks.encrypt(
            model, samples[0], calibration=samples[1:], mode=mode, precision_bits=self.precision, labels=labels
        )

    def cost(self, model: ckks.Encrypted) -> Cost:
        program, p = model.program, model.program.parameters
        refreshed = [level for stage in program.refreshes for level in stage]
        up = sum(p.polynomial_bytes(level) for _, level, _ in program.views.values())
        down = p.ciphertext_bytes(0) * len(program.output) + p.ciphertext_bytes(program.reserve) * len(refreshed)
        traffic = (
            Traffic(CLIENT, SERVER, p.key_bytes * (len(program.steps) + 1), ONCE),
            Traffic(CLIENT, SERVER, up + sum(map(p.polynomial_bytes, refreshed)), ONLINE),
            Traffic(SERVER, CLIENT, down, ONLINE),
        )
        return Cost(1 + len(program.refreshes), traffic, error=model.predicted_error)

    def insecure(self, model: ckks.Encrypted, tokenizer: TextTokenizer | None) -> Link:
        raise NotImplementedError
