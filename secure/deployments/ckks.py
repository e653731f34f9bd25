"""Homomorphic encryption: the client encrypts and decrypts, and the server computes on ciphertexts. There is no dealer.

It is for small models in polynomial form, as every product of ciphertexts costs tens of milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from protocols.ckks.circuit import Vector, clear
from protocols.ckks.evaluate import EncodedWeights, EncryptedRows, evaluate
from protocols.ckks.seal import Client, Context, EvaluationKeys
from secure.ckks import compile as ckks
from secure.ckks import kept
from secure.ckks.client import ClientQuery
from secure.ckks.profile import profile
from secure.ckks.program import CkksProgram
from secure.cost.demand import QueryDemand, RoleDemand, busy_machine
from secure.cost.outline import is_shape
from secure.cost.projection import Transport
from secure.cost.report import ProfileReport, ReportTable
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
    ProfileOptions,
    Role,
    batch_of,
    option,
    register,
)
from secure.errors import InvalidInput
from secure.lowering.client_inputs import check_tables, table_shapes
from secure.models.tokens import TextTokenizer
from secure.mpc.network import NetworkSpeed
from secure.progress import Told, silent
from secure.session.link import Ahead, Link, Report, only
from secure.tasks.digits import is_digits, layers_of, prepared, untrained
from secure.tasks.embed import Embed

SERVER, CLIENT = "server", "client"
CLIENT_TABLE = "client-table"  # the only way of looking tokens up on ciphertexts


@register
@dataclass(frozen=True)
class Ckks(Deployment):
    """One server that computes on ciphertexts, homomorphically (CKKS, 128-bit security)."""

    name: ClassVar[str] = "ckks"
    summary: ClassVar[str] = "one server, on ciphertexts; models in polynomial form"
    trust: ClassVar[str] = "semi-honest, for trusted clients; nobody else to trust"
    takes: ClassVar[frozenset[str]] = frozenset({"embedding"})
    profiled_by: ClassVar[frozenset[str]] = frozenset()
    runs_packaged: ClassVar[bool] = False
    stepwise: ClassVar[bool] = True

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", float(self.precision))  # "9" and "9.0" are one option

    def check(self, options: CompileOptions, *, tokens: bool = False) -> None:
        """Check options. Raises InvalidInput too if the model looks tokens up and clients may not hold the table."""
        super().check(options, tokens=tokens)
        if options.embedding not in (None, CLIENT_TABLE):
            raise InvalidInput(
                f"embedding {options.embedding!r} is not to be had under {self.name}",
                f"clients hold the token table here: {CLIENT_TABLE!r}, if they may see it",
            )
        if tokens and options.embedding is None:
            raise InvalidInput(
                f"under {self.name} clients hold the token table",
                f"--embedding {CLIENT_TABLE} (embedding={CLIENT_TABLE!r}), if they may see it",
            )

    def check_batch(self, batch: int) -> None:
        super().check_batch(batch)
        if batch > 1 and self.refresh:
            raise InvalidInput("a batch whose ciphertexts are refreshed", "leave --refresh out, or ask one by one")

    def build(
        self,
        model: nn.Module,
        samples: Sequence[Mapping[str, Tensor]],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told = silent,
    ) -> ckks.CkksModel:
        return self._encrypted(
            model, samples[0], options, labels, told, calibration=samples[1:], batch=int(labels.get("batch", 1))
        )

    def check_writing(self) -> None:
        if not self.refresh:
            raise InvalidInput(
                f"under {self.name} a text takes refreshes, also of what is kept",
                "--refresh (secure.Ckks(refresh=True))",
            )

    def build_step(
        self,
        model: nn.Module,
        example: Mapping[str, Tensor],
        whole: Sequence[Mapping[str, Tensor]],
        texts: Sequence[Sequence[Mapping[str, Tensor]]],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told = silent,
    ) -> ckks.CkksModel:
        return self._encrypted(model, example, options, labels, told, calibration=whole, texts=texts)

    def _encrypted(
        self,
        model: nn.Module,
        example: Mapping[str, Tensor],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told,
        **given: Any,
    ) -> ckks.CkksModel:
        return ckks.encrypt(
            model,
            example,
            mode="refresh" if self.refresh else "pure",
            precision_bits=self.precision,
            token_table=options.embedding == CLIENT_TABLE,
            labels=labels,
            told=told,
            **given,
        )

    def keep(self, model: ckks.CkksModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return kept.keep(model)

    def restore(
        self, program: bytes, tables: Mapping[str, Tensor], facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> ckks.CkksModel:
        public = CkksProgram.from_bytes(program)
        held = check_tables(tables, table_shapes(public.client_inputs), public.labels)
        return kept.restore(public, held, facts, tensors)

    def cost(self, model: ckks.CkksModel) -> Cost:
        return replace(self.price(model.program), error=model.predicted_error)

    def price(self, program: CkksProgram) -> Cost:
        """Count what a query takes, and the keys that a client uploads once."""
        traffic = (
            Traffic(CLIENT, SERVER, program.key_bytes, ONCE),
            Traffic(CLIENT, SERVER, program.to_server, ONLINE),
            Traffic(SERVER, CLIENT, program.to_client, ONLINE),
        )
        return Cost(program.rounds, traffic)

    def outline(
        self, model: str, length: int, options: CompileOptions, *, polynomial: bool = False, batch: int = 1
    ) -> ckks.CkksModel | None:
        """Load a text model, or make a digits model with random weights, for its profile.

        Shapes without weights are refused, as the levels of a model depend on its ranges. Texts need no ``embedding``
        here, as a profile gives nobody the token table.
        """
        if is_shape(model):
            known = "a directory that `unseen train` wrote; or digits, digits-2, digits-4"
            raise InvalidInput(f"{self.name} cannot profile the shape {model!r} without its weights", known)
        if not is_digits(model):
            loaded = Embed().load(model, length)
            options = replace(options, embedding=CLIENT_TABLE)
        elif length:
            raise InvalidInput("images take no length", "leave it out for a model on digits")
        else:
            loaded = prepared(untrained(layers_of(model)))
        labels = {"model": model} | ({"batch": str(batch)} if batch > 1 else {})
        return self.build(loaded.module, loaded.batched(batch).samples, options, labels)

    def profile(self, model: ckks.CkksModel, options: ProfileOptions) -> ProfileReport:
        cost, found = self.cost(model), profile(model, measured=options.transport is not None)
        about = {"deployment": self.name, "program_digest": model.program.digest, "labels": dict(model.program.labels)}
        columns, rows, lines = found.table()
        table = ReportTable("by module", tuple(columns), tuple(map(tuple, rows)))
        return ProfileReport(cost, {**about, **found.as_dict(), "total": cost.as_dict()}, [table], lines)

    def demand(self, model: ckks.CkksModel, network: NetworkSpeed, transport: Callable[[], Transport]) -> QueryDemand:
        cost, found, messages = self.cost(model), profile(model), transport()
        carried = messages.work(cost.rounds, cost.bytes(phase=ONLINE))
        server = RoleDemand(
            SERVER,
            found.seconds + carried,
            0.0,
            held=found.weight_memory,
            session=found.key_memory,
            running=2 * found.ciphertext_memory,
            files=found.weight_memory,
        )
        remarks = ("the client's encryption and decryption are not timed", *busy_machine())
        demand = QueryDemand(cost, (RoleDemand(CLIENT), server), batch_of(model), network, None, 0.0, remarks)
        return replace(demand, seconds=found.seconds + demand.waiting + cost.rounds * messages.message)

    def insecure(self, model: ckks.CkksModel, tokenizer: TextTokenizer | None) -> Link:
        return CkksInProcess(model, tokenizer, self.name)

    def reference(self, model: ckks.CkksModel, inputs: Mapping[str, Tensor]) -> Any:
        """Run the packed circuit on plain slots: the server's computation without the noise of encryption."""
        values = model.program.client_values(inputs, model.client_tables)
        return only(model.program.decode(clear(model.schedule.circuit, values)))


class CkksInProcess(Link):
    """INSECURE: client and server of a compiled model in one memory.

    Keys and ciphertexts are real; the keys are made when the link is.
    """

    def __init__(self, model: ckks.CkksModel, tokenizer: TextTokenizer | None, deployment: str) -> None:
        self.deployment, self.program = deployment, model.program
        self.tables, self.tokenizer = model.client_tables, tokenizer
        context, steps = Context(model.program.parameters), model.program.steps
        self._client = Client(context)
        keys = self._client.evaluation_keys(steps)
        self.once = (Traffic(CLIENT, SERVER, sum(map(len, keys.values())), ONCE),)
        self._keys, self._weights = EvaluationKeys(context, keys, steps), EncodedWeights(context, model.schedule)
        self._weights.prepare()

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Vector], Report]:
        return self.go_on(self.converse(0), values, number)

    def converse(self, capacity: int) -> EncryptedRows:
        return EncryptedRows()

    def go_on(
        self,
        conversation: Any,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Vector], Report]:
        assert isinstance(conversation, EncryptedRows)
        assert rows in (None, conversation.filled)
        start = time.perf_counter()
        exchange = ClientQuery(self.program, self._client)
        inputs = dict(zip(self.program.views, exchange.inputs(values), strict=True))
        running, answers = evaluate(self._weights, self._keys, inputs, kept=conversation), list[bytes]()
        while True:
            try:
                masked = running.send(answers) if answers else next(running)
            except StopIteration as end:
                results = exchange.results(end.value)
                return results, report(exchange, number, time.perf_counter() - start)
            answers = exchange.refreshed(masked)

    def close(self) -> None:
        pass


def report(exchange: ClientQuery, number: int, seconds: float) -> Report:
    """Make the report of a query that took ``seconds``. There is no offline phase, and nobody deals."""
    traffic = (
        Traffic(CLIENT, SERVER, exchange.sent, ONLINE),
        Traffic(SERVER, CLIENT, exchange.received, ONLINE),
    )
    return Report(exchange.rounds, traffic, seconds, 0.0, exchange.seconds, 0.0, number)
