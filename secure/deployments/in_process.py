"""INSECURE: all parties in one process, for notebooks, tests and accuracy reports. It protects NOTHING.

The links here run the real protocols, frames included, in one memory. A ``Session`` uses them like any other link.
``plain_reference`` runs a Program on plain integers, without sharing.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from protocols.circuit import Correlations, deal, execute, prepare, reference
from protocols.flow import Circuit
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT, SERVER, CircuitCost
from protocols.steps import PairTraffic, run_pair
from protocols.three_party import Translated
from protocols.three_party.endpoints import Coins, seeded_share
from protocols.three_party.sharing import HOLDERS, PARTIES, PARTY_2
from protocols.three_party.weights import Party2Weights, PublicWeights, SharedWeights, masked
from protocols.two_party import KeptRows, keepers
from protocols.weights import ClientWeights, DealerWeights
from secure.cost.runnable import Deployed
from secure.cost.traffic import links
from secure.models.tokens import TextTokenizer
from secure.mpc.compile import MpcModel
from secure.session.link import Ahead, Link, Report, only


class Conversation:
    """The rows that the computing parties and the dealer keep between the queries of one conversation."""

    def __init__(self, capacity: int) -> None:
        self.first, self.second, self.dealer = (KeptRows(capacity) for _ in range(3))

    def goes_on(
        self,
        circuit: Circuit,
        first: Sequence[Any],
        second: Sequence[Any],
        masks: Mapping[str, Tensor],
        rows: int | None,
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Keep what both parties and the dealer keep of a query, and return the parties' results alone.

        rows: those that the query read, behind which its own are kept; None for all.
        """
        names = list(keepers(circuit))
        end = len(first) - len(names)
        if names:
            self.first.append(dict(zip(names, first[end:], strict=True)), rows)
            self.second.append(dict(zip(names, second[end:], strict=True)), rows)
            self.dealer.append(masks, rows)
        return first[:end], second[:end]


class _InProcess(Link):
    """The base of both links: the model's own tables and tokenizer, and traffic named by the deployment's roles."""

    def __init__(self, model: MpcModel, tokenizer: TextTokenizer | None, deployment: str, running: Deployed) -> None:
        self.program, self.tables, self.tokenizer = model.program, model.client_tables, tokenizer
        self.deployment, self._running = deployment, running

    def converse(self, capacity: int) -> Conversation:
        return Conversation(capacity)

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Tensor], Report]:
        return self.go_on(self.converse(0), values, number)

    @abstractmethod
    def go_on(
        self,
        conversation: Conversation,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Tensor], Report]: ...

    def close(self) -> None:
        pass

    def _report(
        self, traffic: PairTraffic, dealt: int, times: Sequence[float], number: int, brought: int = 0
    ) -> Report:
        """Make the report of a query.

        dealt, brought: bytes of the dealer, before and within the query. times: seconds of dealing, of the client's own
        preparation, and online.
        """
        cost = CircuitCost(traffic.rounds, traffic.to_first, traffic.to_second, dealt, brought)
        dealing, preparing, online = times
        moved = links(cost, *self._running.names, self._running.dealer)
        return Report(traffic.rounds, moved, online, dealing + preparing, preparing + online, dealing, number)


class TwoPartiesInProcess(_InProcess):
    """INSECURE: dealer, server and client of a compiled model in one memory."""

    def __init__(self, model: MpcModel, tokenizer: TextTokenizer | None, deployment: str, running: Deployed) -> None:
        super().__init__(model, tokenizer, deployment, running)
        self._dealer = DealerWeights(_key(), model.program.weight_shapes)
        self._server = model.server_weights
        self._client = ClientWeights(dict(self._server.masked(self._dealer, model.program.weight_rings)))

    def go_on(
        self,
        conversation: Conversation,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Tensor], Report]:
        circuit, kept = self._running.circuit, conversation
        server_key, client_key, masks = _key(), _key(), dict[str, Tensor]()
        start = time.perf_counter()
        corrections = dict(deal(circuit, server_key, client_key, self._dealer, kept.dealer.given(circuit, rows), masks))
        dealt = time.perf_counter()
        client_correlations = Correlations(CLIENT, client_key)
        prepare(circuit, client_correlations, self._client)
        ready, traffic = time.perf_counter(), PairTraffic()
        correlations, given = (
            Correlations(SERVER, server_key, corrections),
            {**values, **kept.second.given(circuit, rows)},
        )
        outputs = (*self._running.revealed, *keepers(circuit).values())
        theirs, results = run_pair(
            execute(circuit, outputs, SERVER, correlations, self._server, kept.first.given(circuit, rows)),
            execute(circuit, outputs, CLIENT, client_correlations, self._client, given),
            traffic,
        )
        results = kept.goes_on(circuit, theirs, results, masks, rows)[1]
        times = (dealt - start, ready - dealt, time.perf_counter() - ready)
        return results, self._report(traffic, sum(map(len, corrections.values())), times, number)


class ThreePartiesInProcess(_InProcess):
    """INSECURE: the three servers of a compiled model, its owner and a client in one memory.

    public: all three servers know the weights.
    """

    def __init__(
        self,
        model: MpcModel,
        tokenizer: TextTokenizer | None,
        deployment: str,
        running: Deployed,
        translated: Translated,
        *,
        public: bool,
    ) -> None:
        super().__init__(model, tokenizer, deployment, running)
        self.translated = translated
        self._weights: list[SharedWeights | Party2Weights | PublicWeights]
        if public:
            self._weights = [PublicWeights(party, model.integers) for party in range(PARTIES)]
            return
        zero, two = _key(), _key()
        common = dict(masked(model.integers, zero, two, translated.weight_rings))
        shapes = {name: tuple(w.shape) for name, w in common.items()}
        self._weights = [
            SharedWeights(0, zero, common),
            SharedWeights(1, two, common),
            Party2Weights(zero, two, shapes),
        ]

    def go_on(
        self,
        conversation: Conversation,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Tensor], Report]:
        circuit, kept = self.translated.circuit, conversation
        streams, split, masks = (_key(), _key()), _key(), dict[str, Tensor]()
        start = time.perf_counter()
        supplied = dict(deal(circuit, *streams, self._weights[PARTY_2], kept.dealer.given(circuit, rows), masks))
        dealt = time.perf_counter()
        shares: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, (index, protocol) in self.translated.inputs.items():
            shares[1][name] = seeded_share(split, index, protocol.shape)
            shares[0][name] = values[name] - shares[1][name]
        pairs = {frozenset(pair): _key() for pair in HOLDERS}
        for index, lookup in self.translated.lookups.values():
            keys = lookup.keys(values[lookup.source].argmax(-1))
            found = [
                lookup.shares(party, own, self._weights[party], _coins(pairs, party), index)
                for party, own in enumerate(keys)
            ]
            for name in found[0]:
                at, p = self.translated.from_keys[name]
                zero_share = p.zero_share(streams[1], at)
                shares[1][name] = found[1][name] + zero_share
                shares[0][name] = sum((own[name] for own in found[2:]), found[0][name]) - zero_share
        # bytes that party 2 sends party 0 within the query
        rows_of_two = sum(p.cost().brought for _, p in self.translated.from_keys.values())
        traffic = PairTraffic()
        outputs = (*self.translated.outputs, *keepers(circuit).values())
        zero, one = (
            execute(
                circuit,
                outputs,
                party,
                Correlations(party, streams[party], supply),
                self._weights[party],
                {**shares[party], **own.given(circuit, rows)},
            )
            for party, supply, own in ((0, supplied, kept.first), (1, None, kept.second))
        )
        a, b = kept.goes_on(circuit, *run_pair(zero, one, traffic), masks, rows)
        times = (dealt - start, 0.0, time.perf_counter() - dealt)
        report = self._report(traffic, sum(map(len, supplied.values())), times, number, rows_of_two)
        # (parties of a deployment add a zero share before they send these to a client)
        return [x + y for x, y in zip(a, b, strict=True)], report


def plain_reference(model: MpcModel, inputs: Mapping[str, Tensor]) -> Any:
    """INSECURE: run the Program in plain fixed-point arithmetic, for comparison. Raises OutOfRange as clients do."""
    program = model.program
    values = program.client_values(inputs, model.client_tables)
    results = reference(program.circuit, program.revealed, model.server_weights, values)
    program.check_results(results)
    return only(program.decode(results))


def _coins(pairs: Mapping[frozenset[int], Key], party: int) -> Coins:
    """Return the keys of a party's pairs by the other party."""
    return {other: key for pair, key in pairs.items() for other in pair - {party} if party in pair}


def _key() -> Key:
    return Key(fresh_seed()[:KEY_BYTES])
