"""All parties in one process: for notebooks, tests and accuracy reports. It protects NOTHING, as its name says.

``InsecureInProcess`` runs the real protocols (dealer, server and client, real frames) in one memory,
``InsecureThreeParties`` those of three servers.
``plain_reference`` runs the same Program on plain integers, without sharing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from protocols.circuit import Correlations, deal, execute, prepare, reference
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT, SERVER, CircuitCost
from protocols.steps import PairTraffic, run_pair
from protocols.three_party.endpoints import seeded_share
from protocols.three_party.sharing import HELPER, PARTIES
from protocols.three_party.weights import HelperWeights, PublicWeights, SharedWeights, masked
from protocols.weights import ClientWeights, DealerWeights
from secure.deployments.three_party import three_party
from secure.mpc.compile import Compiled


@dataclass(frozen=True)
class Report:
    """What one query took. ``cost`` is measured; times are of this process, which plays every role in turn."""

    cost: CircuitCost
    dealer_seconds: float
    client_offline_seconds: float
    online_seconds: float


class InsecureThreeParties:
    """The three servers of a compiled model, its owner and a client, all in one process.

    ``public_weights``: whether the owner lets all three know the weights.
    """

    def __init__(self, compiled: Compiled, *, public_weights: bool = False) -> None:
        program = compiled.program
        self.program, self._tables = program, compiled.client_tables
        self.translated = three_party(program, public=public_weights)
        rings = self.translated.weight_rings
        self._weights: list[SharedWeights | HelperWeights | PublicWeights]
        if public_weights:
            self._weights = [PublicWeights(party, compiled.integers) for party in range(PARTIES)]
            return
        zero, two = _key(), _key()
        common = dict(masked(compiled.integers, zero, two, rings))
        shapes = {name: tuple(w.shape) for name, w in common.items()}
        self._weights = [
            SharedWeights(0, zero, common),
            SharedWeights(1, two, common),
            HelperWeights(zero, two, shapes),
        ]

    def query(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Report]:
        """The model's answer (float64) and what it took: ``cost`` among the parties, ``dealer_seconds`` of party 2."""
        circuit, output = self.translated.circuit, [self.translated.output]
        streams, split = (_key(), _key()), _key()
        start = time.perf_counter()
        ahead = dict(deal(circuit, *streams, self._weights[HELPER]))
        dealt = time.perf_counter()
        values = self.program.client_values(inputs, self._tables)
        shares: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, (index, protocol) in self.translated.inputs.items():
            shares[1][name] = seeded_share(split, index, protocol.shape)
            shares[0][name] = values[name] - shares[1][name]
        for name, (index, found) in self.translated.lookups.items():
            keys = found.keys(values[found.source].argmax(-1))
            rows = [found.rows_of(party, own, self._weights[party]) for party, own in enumerate(keys)]
            zero_share = found.zero_share(streams[1], index)
            shares[1][name] = rows[1] + zero_share
            shares[0][name] = sum(rows[2:], rows[0]) - zero_share
        # what party 2 sends party 0 within the query
        rows_of_two = sum(p.cost().dealt for _, p in self.translated.lookups.values())
        traffic = PairTraffic()
        zero, one = (
            execute(
                circuit, output, party, Correlations(party, streams[party], supply), self._weights[party], shares[party]
            )
            for party, supply in ((0, ahead), (1, None))
        )
        (a,), (b,) = run_pair(zero, one, traffic)
        done = time.perf_counter()
        cost = CircuitCost(
            traffic.rounds, traffic.to_first, traffic.to_second, sum(map(len, ahead.values())) + rows_of_two
        )
        # (parties of a deployment add a zero share before they send these to a client)
        return self.program.decode(a + b), Report(cost, dealt - start, 0.0, done - dealt)


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
        outputs, traffic = [program.output], PairTraffic()
        _, (result,) = run_pair(
            execute(circuit, outputs, SERVER, Correlations(SERVER, server_key, corrections), self._server),
            execute(circuit, outputs, CLIENT, client_correlations, self._client, values),
            traffic,
        )
        done = time.perf_counter()
        cost = CircuitCost(traffic.rounds, traffic.to_first, traffic.to_second, sum(map(len, corrections.values())))
        return program.decode(result), Report(cost, dealt - start, ready - dealt, done - ready)


def plain_reference(compiled: Compiled, inputs: Mapping[str, Tensor]) -> Tensor:
    """INSECURE: the Program in plain fixed-point arithmetic, for comparison."""
    program = compiled.program
    values = program.client_values(inputs, compiled.client_tables)
    (result,) = reference(program.circuit, [program.output], compiled.server_weights, values)
    return program.decode(result)


def _key() -> Key:
    return Key(fresh_seed()[:KEY_BYTES])
