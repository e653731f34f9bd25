"""Measuring the offline phase of a Program on this machine: the dealer's work, and the client's.

Both walk through the circuit alone, with made-up masks of the right shapes. A repeated layer is computed
``OCCURRENCES`` times; after that its results stand in for those of its like, so that neither the time of measuring nor
its memory grows with a model's depth.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from protocols.circuit import Correlations, deal_one
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT
from protocols.weights import DealerWeights
from secure.cost.kernel_times import step_key
from secure.cost.runnable import Runnable

OCCURRENCES = 3  # of the same instruction, of which the first warms up

Step = Callable[[int, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class OfflineTimes:
    """Processor seconds of one query's offline phase, without messages: of the dealer, and of the second party."""

    dealing: float
    preparing: float


def measure_offline(program: Runnable) -> OfflineTimes:
    """Measure the offline phase of a Program, with torch's current number of threads."""
    circuit, weights = program.circuit, _MadeUpMasks(program)
    server, client = (Key(fresh_seed()[:KEY_BYTES]) for _ in range(2))
    correlations = Correlations(CLIENT, Key(fresh_seed()[:KEY_BYTES]))
    prepared = {index for index, i in enumerate(circuit) if i.protocol.works_offline}

    def deal(index: int, operands: tuple[Any, ...]) -> Any:
        return deal_one(index, circuit[index].protocol, operands, server, client, weights)[1]

    def prepare(index: int, operands: tuple[Any, ...]) -> Any:
        return correlations.prepare(index, circuit[index].protocol, operands, weights)

    return OfflineTimes(_walk(program, set(range(len(circuit))), deal), _walk(program, prepared, prepare))


def _walk(program: Runnable, chosen: set[int], step: Step) -> float:
    """Run ``step`` on the chosen instructions, the first few of each key, and add up the seconds of all of them."""
    keys: list[Hashable] = [step_key(program, instruction) for instruction in program.circuit]
    times: dict[Hashable, list[float]] = {}
    found: dict[Hashable, Any] = {}
    results: dict[int, Any] = {}
    seen = Counter[Hashable]()
    last = {i: index for index in sorted(chosen) for i in program.circuit[index].inputs}
    for index in sorted(chosen):
        key, inputs = keys[index], program.circuit[index].inputs
        if seen[key] < OCCURRENCES:
            operands = tuple(results[i] for i in inputs if i in results)
            start = time.process_time()
            found[key] = step(index, operands)
            times.setdefault(key, []).append(time.process_time() - start)
        seen[key] += 1
        results[index] = found[key]
        for i in inputs:
            if last[i] == index:
                results.pop(i, None)
    return sum(count * median(times[key][1:] or times[key]) for key, count in seen.items())


class _MadeUpMasks(DealerWeights):
    """A uniform mask for each shape of a weight."""

    def __init__(self, program: Runnable) -> None:
        super().__init__(Key(fresh_seed()[:KEY_BYTES]), {str(s): s for s in program.weight_shapes.values()})
        self._alike = {name: str(shape) for name, shape in program.weight_shapes.items()}

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        return super().multiply(x, self._alike[name], ring_bits, diagonal=diagonal)
