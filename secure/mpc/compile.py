"""The compiler for secret sharing in one call: from a torch module to a Program and the server's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from approximations import APPROXIMATIONS, Functions, choose
from approximations.activations import GELU_FORMS
from protocols.fixedpoint import FixedPoint
from protocols.narrow import blocks, encode
from protocols.two_party import Keep
from protocols.weights import ServerWeights
from secure.errors import InvalidInput
from secure.frontend import Size, lower_sizes, of_group
from secure.lowering.client_inputs import ClientInput, tables_label
from secure.lowering.lower import Lowered, Sample
from secure.lowering.made import Chosen, Made, Room
from secure.lowering.ranges import Ranges
from secure.mpc.arithmetic import split_weight_key, tied
from secure.mpc.emit import emit
from secure.mpc.network import LOOPBACK, NetworkSpeed, find_network
from secure.mpc.powers import tabulated_power
from secure.mpc.prices import DEFAULT, Choice, Prices
from secure.mpc.prices import choose as choose_prices
from secure.mpc.program import Output, Program, Watched
from secure.progress import Told, counted, silent


@dataclass(frozen=True, eq=False, repr=False)  # holds weights
class MpcModel:
    """A Program, the server's weights as integers, and the token tables that the owner lets clients hold.

    The Program is public; ``integers`` are the server's secret, in the narrowest type that holds each tensor. Those of
    a large model may be made, or read from a mapped file, at each reading. choice: for the network that was named.
    """

    program: Program
    integers: Mapping[str, Tensor]
    client_tables: Mapping[str, Tensor]
    choice: Choice | None = None

    @property
    def server_weights(self) -> ServerWeights:
        return ServerWeights(self.integers)

    @property
    def weights_digest(self) -> str:
        """SHA-256 over the integer weights by name.

        Two servers with equal digests hold the same model at the same scales.
        """
        return self.digest_of(self.integers)

    def digest_of(self, names: Iterable[str]) -> str:
        """Return SHA-256 over some of the integer weights, by name."""
        total = hashlib.sha256()
        for name in sorted(names):
            value = self.integers[name]
            total.update(f"{len(name)}:{name}:{tuple(value.shape)}:".encode())  # lengths keep fields apart
            for _, part in blocks(value.reshape(-1)):
                total.update(part.numpy().tobytes())
        return total.hexdigest()


def compile(  # the verb that torch uses; always written secure.compile
    model: nn.Module,
    example_inputs: Sample,
    *,
    calibration: Sequence[Sample] = (),
    embedding: str = "one-hot",
    gelu: str = GELU_FORMS[0],
    approximations: str = APPROXIMATIONS[0],
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool = True,
    labels: Mapping[str, str] | None = None,
    prices: Prices = DEFAULT,
    told: Told = silent,
) -> MpcModel:
    """Capture a module, calibrate its ranges, and lower it to a circuit for two parties and a dealer.

    example_inputs: the module's keyword arguments, which fix all shapes; every one of them is the client's secret.
    calibration: more such inputs, whose values set the ranges; the example counts as one.
    embedding: "one-hot" (nothing revealed; the client sends masked one-hot rows) or "client-table" (the owner lets
    clients hold the token table, and the look-up costs nothing).
    gelu: the form of GeLU, see ``approximations.gelu``.
    approximations: "default" for ours, or "puma" for the published ones of that paper, its GeLU among them.
    network: where rounds and bytes shall be cheap, see ``find_network``; by default where parties are near.
    answer_bits: the fraction bits to which answers are rounded before they are revealed; None: they are not.
    checked: values that leave their ranges are noticed (``watch``), and the client gets OutOfRange for an answer.
    prices: of rounds and bytes in the deployment that will run it. told: hears of progress.
    Raises UnsupportedOperation (naming module and operation), DoesNotFit (a value no ring can hold), and InvalidInput
    for ``answer_bits`` that are more than the fraction bits of activations.
    """
    (made,) = compile_sizes(
        model,
        [(Size(example_inputs, [example_inputs, *calibration]), labels or {})],
        embedding=embedding,
        gelu=gelu,
        approximations=approximations,
        fixed_point=fixed_point,
        network=network,
        answer_bits=answer_bits,
        checked=checked,
        prices=prices,
        told=told,
    )
    return made


def compile_sizes(
    model: nn.Module,
    sizes: Sequence[tuple[Size, Mapping[str, str] | None]],
    *,
    embedding: str = "one-hot",
    gelu: str = GELU_FORMS[0],
    approximations: str = APPROXIMATIONS[0],
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool = True,
    public_positions: bool = False,
    prices: Prices = DEFAULT,
    told: Told = silent,
) -> list[MpcModel]:
    """Compile a module for several sizes, such as lengths and batches, each with labels of its own.

    Ranges are those of all samples of a group together. A weight that products read has the same integers in every
    Program, whatever the ranges: one masked copy D serves them all. A size without labels (None) gives ranges, and no
    Program. What queries keep has one ring in all Programs. public_positions: the positions of tokens are no secret.
    Other arguments and exceptions are those of ``compile``.
    """
    fixed = fixed_point or FixedPoint()
    check_answer_bits(answer_bits, fixed)
    functions = chosen(approximations, gelu)
    lowered = lower_sizes(
        model,
        [size for size, _ in sizes],
        margin_bits=fixed.margin_bits,
        embedding=embedding,
        functions=functions,
        told=told,
        public=public_positions,
        late_bytes=prices.late_bytes,
        stacks=True,
        queried=[labels is not None for _, labels in sizes],
    )
    seen = dict[str, list[Ranges]]()
    for group in dict.fromkeys(size.group for size, _ in sizes):
        places, single = of_group([size for size, _ in sizes], group)
        shapes = [p.shape for p in lowered[single].trace.primitives]
        samples = [(lowered[n], *each) for n in places for each in sizes[n][0].each(shapes)]
        seen[group] = [  # one sample at a time: one-hot rows are large
            Ranges.calibrate(each.trace, [each.inputs(sample)], each.weights, fixed.margin_bits, rows)
            for each, sample, rows in counted(samples, told, "calibrating")
        ]
    named, found = {"embedding": embedding, **functions.labels}, find_network(network or LOOPBACK)
    wanted = [
        (each, Ranges.united(seen[size.group], each.trace), {**named, **labels})
        for each, (size, labels) in zip(lowered, sizes, strict=True)
        if labels is not None
    ]
    kept = _kept_rings([(each, ranges) for each, ranges, _ in wanted], fixed, prices)
    pool = Made[str]()
    return [
        finish(each, ranges, fixed, labels, found, prices, told, answer_bits, kept, checked=checked, pool=pool)
        for each, ranges, labels in wanted
    ]


def _kept_rings(made: Sequence[tuple[Lowered, Ranges]], fixed: FixedPoint, prices: Prices) -> dict[str, int]:
    """Return the rings of openings that queries keep, by name: as wide as the widest product of any Program needs."""
    rings: dict[str, int] = {}
    for lowered, ranges in made:
        if any(p.op == "keep" for p in lowered.trace.primitives):
            emitted = emit(lowered.trace, ranges, fixed, *_ends(lowered, ranges), prices)
            for keep in (i.protocol for i in emitted.circuit):
                if isinstance(keep, Keep):
                    rings[keep.name] = max(keep.ring, rings.get(keep.name, 0))
    return rings


def _ends(lowered: Lowered, ranges: Ranges) -> tuple[list[int], dict[str, tuple[float, float]]]:
    """Return the places of the outputs in the trace, and the range to which the client clamps each input."""
    clamps = {c.name: _clamp(c, lowered, ranges) for c in lowered.client_inputs}
    return [symbol.id for symbol in lowered.outputs.values()], clamps


def check_answer_bits(bits: int | None, fixed: FixedPoint) -> None:
    """Raise InvalidInput unless answers can be rounded to ``bits`` fraction bits; None stands for all of theirs."""
    if bits is not None and not 1 <= bits <= fixed.fraction_bits:
        raise InvalidInput(
            f"answers of {bits} fraction bits",
            f"1 to {fixed.fraction_bits}, which activations have: so many are all",
        )


def chosen(approximations: str, gelu: str) -> Functions:
    """Return a set of approximations, with powers of models in polynomial form from tables."""
    few = partial(tabulated_power, few=True)
    return replace(choose(approximations, gelu), power=tabulated_power, power_of_few=few)


def finish(
    lowered: Lowered,
    ranges: Ranges,
    fixed: FixedPoint,
    labels: Mapping[str, str],
    network: NetworkSpeed | None = None,
    prices: Prices = DEFAULT,
    told: Told = silent,
    answer_bits: int | None = None,
    kept: Mapping[str, int] | None = None,
    *,
    checked: bool = False,
    pool: Made[str] | None = None,
) -> MpcModel:
    """Emit the circuit of a lowered model, and encode its weights as integers.

    pool: has those that are the same at all sizes of the model.
    """
    tables = {name: table.to(torch.float32) for name, table in lowered.tables.items()}
    for spec in lowered.client_inputs:
        if spec.table:  # no calibration meets all rows
            ranges.observe(_input(spec, lowered), tables[spec.table])
    named = {**labels, "ranges": "calibrated", **tables_label(tables)}
    if lowered.left_out:
        named["left-out"] = ", ".join(lowered.left_out)[:500]
    told(0, 0, "emitting the Program")
    program, choice = chosen_program(lowered, ranges, fixed, named, network, prices, answer_bits, kept, checked=checked)
    told(0, 0, "encoding the weights")
    own, pool = Made[str](), Made[str]() if pool is None else pool
    places = dict[str, Mapping[str, Tensor]]()
    same = tied(program.weight_shapes)
    for key in weight_keys(program):
        if key in same:  # the same numbers, which are there once
            places[key] = turned = Made[str](Room(0))
            turned.add(key, partial(_turned, places, same[key]))
            continue
        places[key] = into = pool if split_weight_key(key)[0] in lowered.common else own
        if key not in into:
            into.add(key, partial(_encoded, lowered.weights, key))
    own.filled()
    pool.filled()
    return MpcModel(program, Chosen(places), tables, choice)


def _encoded(weights: Mapping[str, Tensor], key: str) -> Tensor:
    """Return a weight as integers in the narrowest type that holds them."""
    name, fraction = split_weight_key(key)
    return encode(weights[name], fraction)


def _turned(places: Mapping[str, Mapping[str, Tensor]], key: str) -> Tensor:
    return places[key][key].T


def weight_keys(program: Program) -> list[str]:
    """List the keys (name and scale) of the server's integers that a Program reads."""
    return list({use.name: None for i in program.circuit if (use := i.protocol.weight_use)})


def emit_program(
    lowered: Lowered,
    ranges: Ranges,
    fixed: FixedPoint,
    labels: Mapping[str, str],
    network: NetworkSpeed | None = None,
    prices: Prices = DEFAULT,
    answer_bits: int | None = None,
    *,
    checked: bool = False,
) -> Program:
    """Emit the circuit of a lowered model as a Program. Only the shapes of its weights are read.

    network: the one for which rounds and bytes are chosen; the label "network" names it. prices: the deployment's.
    answer_bits: the fraction bits of answers; the label "answer_bits" says them. checked: with the checks of ranges.
    Raises InvalidProgram if others would refuse it: it is too large, or a name in it cannot be printed.
    """
    return chosen_program(lowered, ranges, fixed, labels, network, prices, answer_bits, checked=checked)[0]


def chosen_program(
    lowered: Lowered,
    ranges: Ranges,
    fixed: FixedPoint,
    labels: Mapping[str, str],
    network: NetworkSpeed | None,
    prices: Prices,
    answer_bits: int | None = None,
    kept: Mapping[str, int] | None = None,
    *,
    checked: bool = False,
) -> tuple[Program, Choice | None]:
    """Emit a Program as ``emit_program`` does, and return the choice that was made for the network.

    kept: the rings of openings that queries keep, by name.
    """
    ends = _ends(lowered, ranges)
    at = partial(emit, lowered.trace, ranges, fixed, *ends, answer_bits=answer_bits, kept=kept, checked=checked)
    emitted, choice = choose_prices(network, at, prices) if network else (at(prices), None)
    read = {use.name for i in emitted.circuit if (use := i.protocol.weight_use) and use.multiplied}
    program = Program(
        circuit=emitted.circuit,
        paths=emitted.paths,
        outputs=tuple(Output(name, *at) for name, at in zip(lowered.outputs, emitted.outputs, strict=True)),
        fixed=fixed,
        client_graph=lowered.client_graph,
        client_inputs=tuple(lowered.client_inputs),
        weight_shapes={key: lowered.shape(split_weight_key(key)[0]) for key in sorted(read)},
        labels={
            **labels,
            **({"network": network.key} if network else {}),
            **({"answer_bits": str(answer_bits)} if answer_bits is not None else {}),
        },
        watched=Watched(*emitted.watched) if emitted.watched else None,
    )
    Program.from_bytes(program.encoded)  # as everybody does who receives it: what they refuse is refused here
    return program, choice


def _clamp(spec: ClientInput, lowered: Lowered, ranges: Ranges) -> tuple[float, float]:
    """Return the range for which the ring of an input was chosen."""
    index = _input(spec, lowered)
    reach = ranges.magnitude(index)
    if spec.name in lowered.clamps:
        return -lowered.clamps[spec.name], max(0.0, ranges.interval(index)[1])
    return -reach, reach


def _input(spec: ClientInput, lowered: Lowered) -> int:
    """Return the place of an input in the trace."""
    return next(i for i, p in enumerate(lowered.trace.primitives) if p.op == "input" and p.attrs["name"] == spec.name)
