"""Budgets: what the owner of a dealer, and of a client, lets one Program take on their machine.

A Program that is valid may still be too large to run. Its load follows from its circuit in closed form, by arithmetic
with Python's integers, before anything is allocated. The figures are upper bounds of a party's own arithmetic: memory
that torch, grpc and the interpreter take, and time on the network, come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from protocols.flow import Circuit
from protocols.protocol import Shape
from secure.errors import InvalidInput, InvalidProgram
from secure.mpc.program import Program

GB = 1e9
WORD = 8  # bytes of a ring element in memory
PARTS = 2  # tensors that a party keeps of an opening for later queries: z, and its share of r
PACKED = 32  # bytes that the packed form of a weight takes, once for each ring: four limbs at most
COPIES = 4  # of its operands, draws and result that one instruction holds while it runs
BYTE_SECONDS = 0.5e-9  # to draw, combine and encode one byte
PACKED_SECONDS = 6e-9  # to deal one byte of tables, or of products of bits, each of which is made of up to 15 others
FITTED_SECONDS = 25e-9  # of one term of the sums that a dealer computes in floating point
PRODUCT_SECONDS = 0.25e-9  # of one multiply-accumulate in a matrix product
STEP_SECONDS = 12e-9  # of one element in a pass over a tensor
INSTRUCTION_SECONDS = 100e-6


@dataclass(frozen=True)
class Load:
    """The most that one query of a Program takes at the dealer, and about as much at a client.

    weights: elements of the weights' masks, kept for as long as the model is. dealt: bytes of corrections. drawn: bytes
    from streams. products: multiply-accumulates. memory: bytes, the masks among them. seconds: on one core, some three
    times what is measured on one of 2024.
    """

    weights: int
    dealt: int
    drawn: int
    products: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Budget:
    """The most that one Program may take: bytes of memory, and seconds for a query's arithmetic on one core.

    The default admits BERT-base at 512 tokens. Raises InvalidInput unless both are positive numbers.
    """

    memory: float = 8 * GB
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory), ("seconds", self.seconds)):
            if not 0 < value < math.inf:
                raise InvalidInput(f"a budget of {value!r} as its {name}", "give a positive number")

    def decode(self, encoded: bytes, *, weights: bool = True) -> Program:
        """Decode, check and admit a Program that may come from anyone. Raises InvalidProgram."""
        return self.admit(Program.from_bytes(encoded), weights=weights)

    def admit(self, program: Program, *, weights: bool = True) -> Program:
        """Return the Program. Raises InvalidProgram, with both figures, if it would take more than this budget.

        weights: False at who neither holds masks of weights nor multiplies by them, such as a client of three parties.
        """
        load = load_of(program.circuit, program.weight_shapes, weights=weights)
        memory = load.memory + PARTS * program.kept_bytes
        for needed, most, unit, option in (
            (memory / GB, self.memory / GB, "GB of memory", "memory"),
            (load.seconds, self.seconds, "s of arithmetic", "seconds"),
        ):
            if needed > most:
                raise InvalidProgram(
                    f"the Program may take {needed:.3g} {unit} ({load.weights:.3g} elements of weights, "
                    f"{load.dealt:.3g} bytes of corrections a query); the budget is {most:g}\n"
                    f"hint: if you trust who made it, raise --budget-{option} at the dealer, "
                    f"secure.Budget({option}=...) at a client"
                )
        return program


def load_of(circuit: Circuit, weight_shapes: Mapping[str, Shape], *, weights: bool = True) -> Load:
    """Return the load of a checked circuit. It takes time in proportion to the number of instructions.

    weights: see ``Budget.admit``.
    """
    packed: dict[tuple[str, int], int] = {}
    last = {operand: index for index, instruction in enumerate(circuit) for operand in instruction.inputs}
    held = live = products = drawn = touched = of_bytes = fitted = steps = 0
    for index, instruction in enumerate(circuit):
        p, operands = instruction.protocol, [circuit[i].protocol for i in instruction.inputs]
        if weights and (use := p.weight_use) and use.multiplied:
            packed[use.name, use.ring] = math.prod(weight_shapes[use.name])
        own = sum(math.prod(d.shape) * (1 if d.wire.planes else WORD) for d in p.draws)
        work = own + p.memory() + p.scratch() + sum(o.memory() for o in operands)
        live = max(live, held + COPIES * work)
        held += p.memory() if index in last else 0
        held -= sum(circuit[i].protocol.memory() for i in set(instruction.inputs) if last[i] == index)
        drawn, touched = drawn + own, touched + work
        of_bytes += sum(d.wire.size for d in p.draws if d.wire.planes and d.derived)
        fitted, steps = fitted + p.fitted(), steps + p.repeated()
        products += 0 if p.weight_use and not weights else p.products(weight_shapes, [o.out.shape for o in operands])
    held_weights = sum(math.prod(weight_shapes[name]) for name in {name for name, _ in packed})
    return Load(
        weights=held_weights,
        dealt=sum(i.protocol.dealt_bytes for i in circuit),
        drawn=drawn,
        products=products,
        memory=WORD * held_weights + PACKED * sum(packed.values()) + live,
        seconds=touched * BYTE_SECONDS
        + of_bytes * PACKED_SECONDS
        + fitted * FITTED_SECONDS
        + steps * STEP_SECONDS
        + products * PRODUCT_SECONDS
        + len(circuit) * INSTRUCTION_SECONDS,
    )
