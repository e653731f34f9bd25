"""Programs. A Program is the public description of a computation on which all parties agree before they compute.

It holds no weights and no inputs. It is a circuit with its shapes, rings and approximations, the graph that the client
computes in the clear, and the scales of its results. It has one canonical encoding (sorted JSON, without floats that
JSON cannot write) and a SHA-256 digest of it. Decoding trusts nothing: every instruction is checked against its
protocol's fields, and its operands and sizes against the instructions before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any

from pydantic import ConfigDict, FailFast, Field, TypeAdapter, with_config
from torch import Tensor

from protocols import ring
from protocols.circuit import check, total_cost
from protocols.fields import MAXIMUM_ELEMENTS, Bits, Name, Operands, Shape, Whole
from protocols.fixedpoint import FixedPoint
from protocols.flow import Circuit, Flow, Instruction
from protocols.protocol import CircuitCost, Protocol
from protocols.two_party import Input, Publish, Recall, Reveal, keepers
from secure.capture.documents import read_document, what_is_wrong
from secure.capture.graph import POSITIONS, Graph
from secure.errors import InvalidProgram, OutOfRange, program_of_version
from secure.lowering.client_inputs import (
    GENERATE,
    MAXIMUM_INPUTS,
    MOST_ROWS,
    TASK,
    ClientInput,
    Labels,
    check_client_part,
    check_query,
    clear_values,
    dummy_values,
    encode_input,
)

VERSION = 4
MAXIMUM_INSTRUCTIONS = 1 << 14  # a decoder of 32 layers has 10,000
MAXIMUM_OUTPUTS = 1 << 10
MAXIMUM_PLACES = 1 << 8
MAXIMUM_WEIGHTS = 1 << 12
CALIBRATE = "ask the model's owner to calibrate on inputs like this one"


@dataclass(frozen=True)
class Output:
    """A result of the model by name: its Reveal instruction, and the scale (fraction bits) of the revealed integers."""

    name: str
    instruction: int
    fraction: int

    def check(self, revealed: Tensor, bits: int) -> None:
        """Raise OutOfRange for a number that takes the spare bit of its ring. Positions have no spare bit."""
        if self.fraction and revealed.numel() and int(ring.signed(revealed, bits).abs().max()) >> (bits - 2):
            raise OutOfRange(f"the answer left its range in {self.name}, so it could not be trusted", CALIBRATE)

    def decode(self, revealed: Tensor, bits: int) -> Tensor:
        """Decode residues of a ring of ``bits`` bits: float64, or int64 without fraction bits."""
        if not self.fraction:
            return ring.signed(revealed, bits)
        return ring.decode(revealed, bits, self.fraction)


@dataclass(frozen=True)
class Watched:
    """The Reveal of the numbers that tell whether values were in range, one for each of ``places``, in order.

    A number is zero if all values of this part of the model were, and else uniform.
    """

    instruction: int
    places: tuple[str, ...]

    def check(self, revealed: Tensor) -> None:
        """Raise OutOfRange, with the names of the parts, unless all numbers are zero."""
        wrong = [place for place, number in zip(self.places, revealed.tolist(), strict=True) if number]
        if wrong:
            more = len(wrong) - 1
            others = f" and {more} more {'parts' if more > 1 else 'part'} of the model" if more else ""
            raise OutOfRange(
                f"a value left its range in {wrong[0]}{others}, so there is no answer that could be trusted", CALIBRATE
            )


@dataclass(frozen=True, eq=False)
class Program:
    """A circuit and all that its parties must agree on; public to all of them.

    outputs: the results that the client learns, in the order of the model's results. paths: the module of each
    instruction. client_graph: computed by the client in the clear; ``client_inputs`` say how it feeds the circuit.
    """

    circuit: Circuit
    paths: tuple[str, ...]
    outputs: tuple[Output, ...]
    fixed: FixedPoint
    client_graph: Graph
    client_inputs: tuple[ClientInput, ...]
    weight_shapes: Mapping[str, tuple[int, ...]]  # of the weights that products read
    labels: Mapping[str, str]  # for people: model, embedding, approximations
    watched: Watched | None = None

    @property
    def revealed(self) -> tuple[int, ...]:
        """The Reveal instruction of each output, and the one that tells whether values were in range, if there is."""
        told = (self.watched.instruction,) if self.watched else ()
        return (*(output.instruction for output in self.outputs), *told)

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of the model's outputs, by name."""
        return {output.name: tuple(self.circuit[output.instruction].protocol.out.shape) for output in self.outputs}

    @cached_property
    def keeps(self) -> dict[str, int]:
        """The instructions whose openings are kept for later queries, by name; {} if queries are independent."""
        return keepers(self.circuit)

    @cached_property
    def _inputs(self) -> dict[str, Input]:
        """The instructions by which inputs of the client enter, by name."""
        return {p.name: p for i in self.circuit if isinstance(p := i.protocol, Input)}

    @cached_property
    def rows(self) -> int:
        """The rows of earlier queries that it reads; 0 if it reads none."""
        return next((i.protocol.shape[-2] for i in self.circuit if isinstance(i.protocol, Recall)), 0)

    @property
    def kept_rows(self) -> int:
        """The rows that it keeps for later queries; 0 if it keeps none."""
        return next((self.circuit[i].protocol.out.shape[-2] for i in self.keeps.values()), 0)

    @property
    def capacity(self) -> int:
        """The most rows that a conversation keeps of which this Program is a part; 0 if queries are independent."""
        return int(self.labels.get(MOST_ROWS, "0")) if self.keeps or self.rows else 0

    @property
    def kept_bytes(self) -> int:
        """The bytes of memory that all rows of a conversation take, as one tensor of words each."""
        shapes = (self.circuit[i].protocol.out.shape for i in self.keeps.values())
        return sum(ring.WORD // 8 * math.prod(shape) // shape[-2] * self.capacity for shape in shapes)

    @property
    def publishes(self) -> bool:
        """True if the client shows all parties the positions of its tokens."""
        return any(spec.encoding == "public" for spec in self.client_inputs)

    @cached_property
    def weight_rings(self) -> dict[str, int]:
        """The widest ring in which each weight is multiplied; the client's masked weights D must have it."""
        rings: dict[str, int] = {}
        for instruction in self.circuit:
            use = instruction.protocol.weight_use
            if use and use.multiplied:
                rings[use.name] = max(rings.get(use.name, 0), use.ring)
        return rings

    @cached_property
    def cost(self) -> CircuitCost:
        """The rounds and bytes of one query."""
        return total_cost(self.circuit)

    @property
    def failure_bound(self) -> float:
        """The probability that a query within its calibrated ranges goes wrong.

        It is zero, as no protocol of this family has a probabilistic step.
        """
        return 0.0

    # the client's side

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise InvalidInput unless names, types and shapes are those of the model's inputs, and none holds NaN."""
        check_query(self.client_graph, inputs)

    def clear_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the client's graph in the clear: all that depends on values, and every error before a query.

        Raises InvalidInput, and OutOfRange if values are checked.
        """
        values = clear_values(self.client_graph, self.client_inputs, inputs)
        if self.watched:
            self._check_clamps(values)
        return values

    def _check_clamps(self, values: Mapping[str, Tensor]) -> None:
        """Raise OutOfRange for numbers that the caller gave and that would be clamped, but for a mask's lowest ones.

        As in ``check_ids``, what a graph from somebody else makes of the caller's numbers decides nothing.
        """
        graph, clamps = self.client_graph, self._inputs
        for spec in self.client_inputs:
            node, value = graph.nodes[graph.outputs[spec.output]], values[spec.name]
            if spec.encoding != "plain" or node.op != "input" or not value.numel():
                continue
            low, high = clamps[spec.name].low, clamps[spec.name].high
            worst = float(value.abs().max() if low == -high else value.max())
            if worst > high:
                raise OutOfRange(
                    f"an input of shape {spec.shape} has numbers beyond {high:.4g}, up to which it was calibrated",
                    CALIBRATE,
                )

    def dummy_values(self) -> dict[str, Tensor]:
        """Return zeros in place of ``clear_values``."""
        return dummy_values(self.client_graph, self.client_inputs)

    def encode(self, values: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode clear values as the circuit's inputs, which are integers; the work follows from shapes alone."""
        return {
            spec.name: self._inputs[spec.name].encode(encode_input(spec, values[spec.name], tables))
            for spec in self.client_inputs
        }

    def client_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the circuit's inputs as integers: the client's graph in the clear, then the encoding of each input.

        ``tables``: the token tables that the owner lets clients hold (client-table). Raises InvalidInput.
        """
        return self.encode(self.clear_values(inputs, tables), tables)

    @cached_property
    def keeps_first(self) -> bool:
        """True if it keeps openings, each before it reads what earlier queries kept under that name.

        Then the dealer can deal it together with those that read what it keeps, instruction by instruction.
        """
        kept = {i.protocol.keeps: index for index, i in enumerate(self.circuit) if i.protocol.keeps}
        read = {i.protocol.recalls: index for index, i in enumerate(self.circuit) if i.protocol.recalls}
        return bool(kept) and all(name in kept and kept[name] < index for name, index in read.items())

    def decode(self, results: Sequence[Tensor]) -> dict[str, Tensor]:
        """Decode the revealed integers, one tensor for each of ``revealed``, by the names of the model's outputs.

        Results are float64, and int64 where their scale has no fraction bits: positions that an arg-max found.
        """
        return {o.name: o.decode(result, bits) for o, result, bits in self._shown(results)}

    def check_results(self, results: Sequence[Tensor]) -> None:
        """Raise OutOfRange if a value left its range, so that what ``decode`` gives is not to be trusted."""
        if self.watched:
            self.watched.check(results[-1])
            for o, result, bits in self._shown(results):
                o.check(result, bits)

    def _shown(self, results: Sequence[Tensor]) -> Iterator[tuple[Output, Tensor, int]]:
        """Yield each output with its residues and the bits of their ring."""
        for o, result in zip(self.outputs, results[: len(results) - bool(self.watched)], strict=True):
            yield o, result, self.circuit[o.instruction].protocol.out.bits

    # encoding

    @cached_property
    def encoded(self) -> bytes:
        """The canonical encoding."""
        paths = sorted(set(self.paths))
        number = {path: i for i, path in enumerate(paths)}
        document = {
            "version": VERSION,
            "instructions": [
                [
                    i.protocol.kind,
                    {f: getattr(i.protocol, f) for f in _fields(type(i.protocol))},
                    i.inputs,
                    number[path],
                ]
                for i, path in zip(self.circuit, self.paths, strict=True)
            ],
            "paths": paths,
            "outputs": [list(dataclasses.astuple(output)) for output in self.outputs],
            "watched": list(dataclasses.astuple(self.watched)) if self.watched else None,
            "fixed": self.fixed.as_dict(),
            "client_graph": self.client_graph.to_json(),
            "client_inputs": [dataclasses.asdict(c) for c in self.client_inputs],
            "weight_shapes": dict(self.weight_shapes),
            "labels": dict(self.labels),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical encoding, as hexadecimal digits."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def from_bytes(cls, encoded: bytes) -> Program:
        """Decode and check a Program that may come from anyone. Raises InvalidProgram.

        Decoding N bytes takes at most 100 N bytes of memory and 1 microsecond a byte, whatever they say: the fields of
        every instruction are compared with their bounds (``protocols.fields``) before anything follows from them, and
        the rest is arithmetic with shapes. What running the Program takes is bounded by a ``Budget``.
        """
        try:
            document = read_document(encoded)
            version = document.get("version") if isinstance(document, dict) else None
            if version != VERSION:
                raise program_of_version(version, VERSION)
            d = _DOCUMENT.validate_python(document)
            if d.fixed.keys() != FixedPoint().as_dict().keys():
                raise InvalidProgram("not a valid Program: the fixed point lacks a parameter, or has another")
            program = cls(
                circuit=Flow(_instruction(n, kind, f, inputs) for n, (kind, f, inputs, _) in enumerate(d.instructions)),
                paths=tuple(d.paths[path] for *_, path in d.instructions),
                outputs=tuple(Output(*output) for output in d.outputs),
                fixed=FixedPoint(**d.fixed),
                client_graph=Graph.from_json(d.client_graph, client=True),
                client_inputs=d.client_inputs,
                weight_shapes=d.weight_shapes,
                labels=d.labels,
                watched=Watched(*d.watched) if d.watched else None,
            )
            _check(program)
            _ = program.digest  # encodes, which fails for numbers that JSON cannot write
        except InvalidProgram:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise InvalidProgram(f"not a valid Program: {what_is_wrong(error)}") from None
        return program


Places = Annotated[tuple[Name, ...], FailFast(), Field(min_length=1, max_length=MAXIMUM_PLACES)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class _ProgramForm:
    """The form of an encoded Program, with the bounds of all but the instructions' fields."""

    version: int
    instructions: Annotated[
        list[tuple[Name, dict[str, Any], Operands, Whole]],
        FailFast(),
        Field(min_length=1, max_length=MAXIMUM_INSTRUCTIONS),
    ]  # kind, fields, inputs, path
    paths: Annotated[list[Name], FailFast(), Field(max_length=MAXIMUM_INSTRUCTIONS)]
    outputs: Annotated[list[tuple[Name, Whole, Bits]], FailFast()]
    watched: tuple[Whole, Places] | None
    fixed: dict[str, Whole]
    client_graph: str
    client_inputs: Annotated[tuple[ClientInput, ...], FailFast(), Field(max_length=MAXIMUM_INPUTS)]
    weight_shapes: Annotated[dict[Name, Shape], Field(max_length=MAXIMUM_WEIGHTS)]
    labels: Labels


_DOCUMENT = TypeAdapter(_ProgramForm)


@cache
def _adapter(protocol: type[Protocol]) -> TypeAdapter[Any]:
    return TypeAdapter(protocol)


@cache
def _fields(protocol: type[Protocol]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(protocol))  # type: ignore[arg-type]


def _instruction(index: int, kind: str, fields: dict[str, Any], inputs: tuple[int, ...]) -> Instruction:
    protocol = Protocol.registry.get(kind)
    if protocol is None or not protocol.in_programs:
        raise InvalidProgram(f"unknown protocol {kind!r}\nhint: upgrade unseen")
    if set(fields) != set(names := _fields(protocol)):
        raise InvalidProgram(f"protocol {kind!r} has fields {sorted(names)}, got {str(sorted(fields))[:200]}")
    try:
        made = _adapter(protocol).validate_python(fields)
        made.validate()
    except ValueError as error:
        raise InvalidProgram(f"instruction {index} ({kind}): {what_is_wrong(error)}") from None
    return Instruction(made, inputs)


def _check(program: Program) -> None:
    for index, instruction in enumerate(program.circuit):
        p = instruction.protocol
        if not all(0 <= i < index for i in instruction.inputs):
            raise InvalidProgram(f"instruction {index} ({p.kind}) reads a later one")
        wires = [p.out, *(d.wire for d in p.draws)]
        if any(w.size > 8 * MAXIMUM_ELEMENTS or w.bits < 1 for w in wires):
            raise InvalidProgram(f"instruction {index} ({p.kind}) has an impossible size")
        if (use := p.weight_use) and use.multiplied and use.name not in program.weight_shapes:
            raise InvalidProgram(f"instruction {index} reads the weight {use.name!r}, whose shape is not given")
    reveals = {index for index, i in enumerate(program.circuit) if isinstance(i.protocol, Reveal)}
    if set(program.revealed) != reveals or not program.outputs:
        raise InvalidProgram("the outputs are not what the circuit reveals")
    shown = [output.instruction for output in program.outputs]
    decoded = sum(math.prod(program.circuit[i].protocol.out.shape) for i in shown)  # one may stand twice
    if len(program.outputs) > MAXIMUM_OUTPUTS or decoded > MAXIMUM_ELEMENTS:
        raise InvalidProgram(
            f"{len(program.outputs)} outputs of {decoded} elements, clients decode {MAXIMUM_OUTPUTS} of "
            f"{MAXIMUM_ELEMENTS} at most"
        )
    if len({output.name for output in program.outputs}) != len(program.outputs):
        raise InvalidProgram("two outputs have the same name")
    for name, shape in program.weight_shapes.items():
        if not all(size > 0 for size in shape) or math.prod(shape) > MAXIMUM_ELEMENTS:
            raise InvalidProgram(f"the weight {name!r} has the impossible shape {shape}")
    check(program.circuit, program.weight_shapes)
    _check_kept(program)
    for output in program.outputs:
        if not 0 <= output.fraction <= ring.WORD:
            raise InvalidProgram(f"the output {output.name!r} has {output.fraction} fraction bits")
    if (watched := program.watched) is not None:
        if watched.instruction in {output.instruction for output in program.outputs}:
            raise InvalidProgram("an output stands where checks of ranges are revealed")
        if program.circuit[watched.instruction].protocol.out.shape != (len(watched.places),):
            raise InvalidProgram(f"{len(watched.places)} parts of the model have another number of checks")
    names = {i.protocol.name for i in program.circuit if isinstance(i.protocol, Input)}
    if names != {c.name for c in program.client_inputs}:
        raise InvalidProgram("the circuit's inputs are not those that the client makes")
    check_client_part(program.client_graph, program.client_inputs, program.labels)
    public = {c.name for c in program.client_inputs if c.encoding == "public"}
    for index, instruction in enumerate(program.circuit):
        if isinstance(instruction.protocol, Publish):  # it alone sends what it reads as it is
            source = program.circuit[instruction.inputs[0]].protocol
            if not isinstance(source, Input) or source.name not in public:
                raise InvalidProgram(f"instruction {index} would make more public than {POSITIONS}")


def _check_kept(program: Program) -> None:
    """Check that what a Program reads of earlier queries are as many rows each, and that it keeps each name once."""
    kept = [i.protocol for i in program.circuit if isinstance(i.protocol, Recall)]
    if any(len(p.shape) < 2 or p.shape[-2] != kept[0].shape[-2] for p in kept):
        raise InvalidProgram("what it reads of earlier queries has not as many rows each")
    if sum(bool(i.protocol.keeps) for i in program.circuit) != len(program.keeps):
        raise InvalidProgram("what it keeps for later queries has the same name twice")
    shapes = [program.circuit[i].protocol.out.shape for i in program.keeps.values()]
    if any(len(shape) < 2 or not shape[-2] or shape[-2] != shapes[0][-2] for shape in shapes):
        raise InvalidProgram("what it keeps for later queries has not as many rows each")
    if not shapes and not kept:
        return
    if program.labels.get(TASK) != GENERATE or not re.fullmatch("[1-9][0-9]{0,6}", program.labels.get(MOST_ROWS, "")):
        raise InvalidProgram("it keeps what it computes for later queries, and does not say that it generates text")
    if max(program.rows, program.kept_rows) > program.capacity:
        raise InvalidProgram(f"it reads {program.rows} rows of earlier queries, where {program.capacity} are kept")
