"""All parties in one process: for notebooks, tests and accuracy reports. It protects NOTHING, as its name says.

``InsecureInProcess`` runs the real protocols (dealer, server and client, real frames) in one memory.
``plain_reference`` runs the same Program on plain integers, without sharing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from protocols.circuit import Correlations, deal, execute, prepare, reference
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT, SERVER, Cost
from protocols.steps import Traffic, run_pair
from protocols.weights import ClientWeights, DealerWeights
from secure.compiler import Compiled


@dataclass(frozen=True)
class Report:
    """What one query took. ``cost`` is measured; times are of this process, which plays every role in turn."""

    cost: Cost
    dealer_seconds: float
    client_offline_seconds: float
    online_seconds: float


class InsecureInProcess:
    """Dealer, server and client of a compiled model in one process."""

    def __init__(self, compiled: Compiled) -> None:
        program = compiled.program
        self.program, self._tables = program, compiled.client_tables
        self._dealer = DealerWeights(_key(), program.weight_shapes)
        self._server = compiled.server_weights
        self._client = ClientWeights(dict(self._server.masked(self._dealer, program.weight_rings)))

    def query(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Report]:
        """The model's answer (float64) and what it took."""
        program, circuit = self.program, self.program.circuit
        server_key, client_key = _key(), _key()
        start = time.perf_counter()
        corrections = dict(deal(circuit, server_key, client_key, self._dealer))
        dealt = time.perf_counter()
        client_correlations = Correlations(CLIENT, client_key)
        prepare(circuit, client_correlations, self._client)
        ready = time.perf_counter()
        values = program.client_values(inputs, self._tables)
        outputs, traffic = [program.output], Traffic()
        _, (result,) = run_pair(
            execute(circuit, outputs, SERVER, Correlations(SERVER, server_key, corrections), self._server),
            execute(circuit, outputs, CLIENT, client_correlations, self._client, values),
            traffic,
        )
        done = time.perf_counter()
        cost = Cost(traffic.rounds, traffic.to_server, traffic.to_client, sum(map(len, corrections.values())))
        return program.decode(result), Report(cost, dealt - start, ready - dealt, done - ready)


def plain_reference(compiled: Compiled, inputs: Mapping[str, Tensor]) -> Tensor:
    """INSECURE: the Program in plain fixed-point arithmetic, for comparison."""
    program = compiled.program
    values = program.client_values(inputs, compiled.client_tables)
    (result,) = reference(program.circuit, [program.output], compiled.server_weights, values)
    return program.decode(result)


def _key() -> Key:
    return Key(fresh_seed()[:KEY_BYTES])
