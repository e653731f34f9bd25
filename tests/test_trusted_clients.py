"""The reason why two parties are for trusted clients: one that deviates reads weights (MUSE, USENIX Security 2021).

It adds an error to one message of a query, and the answer changes by a multiple of a row of the last layer's integer
weights. SECURITY.md has the figures from here; a change that stops this attack should fail this test, and change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import secure
from protocols import ring
from protocols.circuit import Correlations, deal, execute, prepare
from protocols.prg import Key, fresh_seed
from protocols.protocol import CLIENT, SERVER, Exchange, Step
from protocols.steps import run_pair
from protocols.two_party import Linear
from protocols.weights import ClientWeights, DealerWeights
from protocols.wire import Wire

INNER, OUTPUTS = 64, 10
LIFT = 3  # bits by which the error is larger than a unit of the answer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, INNER), nn.Linear(INNER, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(x)))
        return result


def deviating(step: Step[Any], form: Wire, error: Tensor) -> Step[Any]:
    """The client's step, with an error added to what it delivers in this form."""
    answer: tuple[Tensor, ...] | None = None
    while True:
        try:
            exchange = next(step) if answer is None else step.send(answer)
        except StopIteration as end:
            return end.value
        sent = tuple((x + error if wire == form and x.shape == form.shape else x, wire) for x, wire in exchange.send)
        answer = yield Exchange(sent, exchange.receive)


def test_a_deviating_client_reads_a_row_of_the_last_layer_a_query() -> None:
    torch.manual_seed(3)
    batch = [{"x": torch.randn(1, 16)} for _ in range(20)]
    compiled = secure.compile(Net().eval(), batch[0], calibration=batch, checked=False).model
    program, weights = compiled.program, compiled.server_weights
    dealer = DealerWeights(Key(fresh_seed()[:16]), program.weight_shapes)
    masked = ClientWeights(dict(weights.masked(dealer, program.weight_rings)))
    values: Mapping[str, Tensor] = program.client_values({"x": torch.zeros(1, 16)}, {})
    last = next(i for i in reversed(program.circuit) if isinstance(i.protocol, Linear))
    assert isinstance(last.protocol, Linear)
    form = program.circuit[last.inputs[0]].protocol.out
    bits = program.circuit[program.revealed[0]].protocol.out.bits
    lost = last.protocol.ring - bits  # bits that are truncated before the answer

    def query(error: Tensor) -> Tensor:
        server, client = Key(fresh_seed()[:16]), Key(fresh_seed()[:16])
        corrections = dict(deal(program.circuit, server, client, dealer))
        mine = Correlations(CLIENT, client)
        prepare(program.circuit, mine, masked)
        honest = execute(program.circuit, program.revealed, SERVER, Correlations(SERVER, server, corrections), weights)
        step = execute(program.circuit, program.revealed, CLIENT, mine, masked, values)
        _, (answer,) = run_pair(honest, deviating(step, form, error))
        return ring.signed(answer.reshape(-1), bits)

    base, rows = query(torch.zeros(form.shape, dtype=torch.int64)), []
    for at in range(INNER):
        error = torch.zeros(form.shape, dtype=torch.int64)
        error.view(-1)[at] = 1 << lost + LIFT
        rows.append(query(error) - base + (1 << LIFT - 1) >> LIFT)
    true = compiled.integers[last.protocol.weight]
    assert torch.equal(torch.stack(rows), true)  # 64 queries, 640 of 640 integers
