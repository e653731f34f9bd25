"""The compiler for CKKS: from a torch module in polynomial form to a Program and the server's schedule.

The ring degree, the primes and the scale follow from the circuit: its depth, the ranges that calibration met, and the
requested precision. All of it is known before a key exists. A model that does not fit is refused, with the levels that
each module needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from approximations import choose
from protocols.ckks import noise
from protocols.ckks.circuit import CkksNode, Vector, clear
from protocols.ckks.cost import Formula, node_seconds, seconds
from protocols.ckks.parameters import MAXIMUM_BITS, Parameters
from protocols.ckks.refresh import INTEGER, reserve
from protocols.ckks.schedule import Price, Schedule, depth_by_path, schedule
from secure.ckks.layout import Cube, at
from secure.ckks.linear_maps import Array
from secure.ckks.pack import PackedModel, Packer
from secure.ckks.pack_batch import pack_batch
from secure.ckks.polynomials import Range
from secure.ckks.program import HEADROOM, CkksProgram
from secure.errors import DoesNotFit, DoesNotPack, InvalidInput, UnsupportedOperation
from secure.frontend import Size, lower_model, lower_sizes
from secure.lowering.client_inputs import tables_label
from secure.lowering.lower import Lowered, Sample
from secure.lowering.ranges import widened
from secure.lowering.trace import Symbol, Trace, evaluate
from secure.progress import Told, counted, silent

SINGLES = 400  # inputs of batches by which ranges are found, about
COMPARED = 4  # inputs of a batch that are compared with each alone
SIMULATED, ROOM = 4, 4.0  # of those, runs with simulated errors; and how much larger than theirs errors may be
WATCHED = 24  # calibration inputs that run through the packed circuit, for magnitudes and errors
DEGREES = (8192, 16384, 32768)
MODES = ("pure", "refresh")
MOST_BITS = 40  # of precision that may be requested; rings have less
SCALES, SPARE = (26, 51), (8, 4, 0)
OUTGROWN = 2.0**12  # units that no slot may reach, as zeros of the next map are zero only up to rounding
CLIENT, ROUND = 0.07, 0.1  # seconds of client and network for a refreshed ciphertext, and for a round
REFERENCE_SCALE = 30  # bits of the scale at which errors are computed first; an error halves with every further bit


@dataclass(frozen=True, eq=False, repr=False)  # holds weights
class CkksModel:
    """A public Program, and the schedule with its weights, which the server keeps secret.

    predicted_error: absolute error of an output element, its rounding included. client_tables: the token tables that
    clients hold. layer_errors: errors by module path, relative to the unit by which a ciphertext's values are divided.
    """

    program: CkksProgram
    schedule: Schedule
    predicted_error: float
    client_tables: Mapping[str, Tensor]
    layer_errors: Mapping[str, float]

    @property
    def weights_digest(self) -> str:
        """SHA-256 of all weights. It is secret, as it would confirm a guess of them."""
        total = hashlib.sha256()
        for plain in self.schedule.circuit.plains:
            total.update(np.asarray(plain, dtype=np.float64).tobytes())
        return total.hexdigest()


def encrypt(
    model: nn.Module,
    example_inputs: Sample,
    *,
    calibration: Sequence[Sample] = (),
    mode: str = "pure",
    precision_bits: float = 9.0,
    degrees: Sequence[int] = DEGREES,
    token_table: bool = False,
    batch: int = 1,
    texts: Sequence[Sequence[Sample]] = (),
    labels: Mapping[str, str] | None = None,
    told: Told = silent,
) -> CkksModel:
    """Capture a module in polynomial form and pack it for evaluation on ciphertexts.

    mode: "pure" (the server computes alone; refused if no ring has enough levels) or "refresh" (the client re-encrypts
    masked ciphertexts that have run out of levels).
    precision_bits: precision of the output, relative to its largest calibrated value. The predicted error
    (``noise.WORST`` standard deviations) is kept below 2^-precision_bits, and answers are rounded to half of that.
    degrees: the ring degrees to choose from; the cheapest by predicted time is taken.
    token_table: clients may hold the token table. Here clients look tokens up themselves, so that a model with a token
    table is refused without it.
    batch: the rows of each sample, of which every one is an input of its own. With more than one there is a ciphertext
    for each element, and a slot for each input: nothing is rotated, and up to N/2 inputs take the time of one, which is
    minutes.
    texts: of a module that keeps rows (a step of a decoder), the inputs of queries that follow one another, each of
    which reads what those before it kept. They set the ranges of its values, and ``calibration``, which may have other
    shapes, those that its approximations ask for. It needs mode "refresh", as a row that is kept is refreshed.
    told: hears of progress.
    Raises UnsupportedOperation (a module is no polynomial; names its path), DoesNotFit (names the levels by module),
    DoesNotPack (a shape has no layout) and InvalidInput (options).
    """
    if mode not in MODES:
        raise InvalidInput(f"unknown mode {mode!r}", f"one of {', '.join(MODES)}")
    if not 0 < precision_bits <= MOST_BITS:
        raise InvalidInput(f"a precision of {precision_bits:g} bits", f"more than 0, {MOST_BITS} at most")
    if batch > 1 and mode != "pure":
        raise InvalidInput("a batch whose ciphertexts are refreshed", "in mode 'pure', or one by one")
    if texts:
        lowered, inputs, ranges = _stepped(model, example_inputs, calibration, texts, told)
    else:
        lowered, inputs, ranges = _prepared(model, [example_inputs, *calibration], told)
    rows = max((p.attrs["rows"] for p in lowered.trace.primitives if p.op == "keep"), default=0)
    if rows and mode != "refresh":
        raise InvalidInput("a model that keeps rows, without refreshes", "--refresh (secure.Ckks(refresh=True))")
    if not token_table and (shown := [c.table for c in lowered.client_inputs if c.encoding == "client-table"]):
        raise InvalidInput(
            f"the model looks tokens up in {shown[0]!r}, and clients would hold that table",
            "--embedding client-table (embedding='client-table'), if they may see it",
        )
    output = _output(lowered)
    weights = {k: v.numpy() for k, v in lowered.weights.items()}
    single = _single(model, [example_inputs, *calibration], lowered, inputs, batch, told) if batch > 1 else None
    found: list[tuple[float, Parameters, Schedule, PackedModel, _Watched]] = []
    problems: list[str] = []
    unpacked: DoesNotPack | None = None
    packed: PackedModel | None = None
    for degree in degrees:
        try:
            told(0, 0, f"packing for rings of degree {degree}")
            if single is not None:
                packed = pack_batch(single.trace, weights, single.ranges, single.output.id, degree // 2, batch)
            else:
                cube = _cube(lowered, degree // 2)
                packed = Packer(lowered.trace, weights, ranges, cube, settle=mode == "refresh").run(output.id)
            several = inputs[:: max(1, len(inputs) // WATCHED)] if texts else inputs[: max(1, WATCHED // batch)]
            chosen, timed, watched = _fitted(packed, several, degree, mode, precision_bits, told)
            if texts:
                _check_steps(lowered, packed, timed, several[:: WATCHED // SIMULATED], 2.0**-precision_bits)
        except DoesNotFit as error:
            problems.append(f"N = {degree}: {str(error).splitlines()[0]}")
            unpacked = error if isinstance(error, DoesNotPack) else unpacked
            continue
        refreshed = sum(n.op == "refresh" for n in timed.circuit.nodes)
        price = seconds(timed, chosen) + CLIENT * refreshed * degree / 16384 + ROUND * timed.rounds
        found.append((price, chosen, timed, packed, watched))
        if mode == "pure" or rows:
            break  # a larger ring is slower; of a decoder's step it also takes minutes to pack
    if not found and packed is None and unpacked is not None:
        raise unpacked  # no ring has a place for a shape
    if not found:
        path = depth_by_path(packed.circuit) if packed is not None else []
        taken = ", ".join(f"{name or 'model'} {n}" for name, n in path) or "not known"
        raise DoesNotFit(
            "the model fits no ring: " + "; ".join(problems) + f". Levels by module on the deepest path: {taken}",
            "--refresh (secure.Ckks(refresh=True)) lets the client re-encrypt between layers; or fewer layers, a "
            "smaller power or degree",
        )
    _, chosen, timed, best, watched = min(found, key=lambda f: f[0])
    levels, tables = timed.inputs(), {name: table.to(torch.float32) for name, table in lowered.tables.items()}
    program = CkksProgram(
        parameters=chosen,
        steps=tuple(timed.circuit.steps),
        client_graph=lowered.client_graph,
        client_inputs=tuple(lowered.client_inputs),
        ranges={c.name: _reach(lowered, ranges, c.name, every=bool(texts)) for c in lowered.client_inputs},
        views={k: (name, levels[k], content) for k, (name, content) in best.views.items() if k in levels},
        refreshes=tuple(tuple(timed.levels[i] for i in timed.refreshes(stage)) for stage in range(1, timed.rounds + 1)),
        reserve=timed.reserve,
        output_shape=tuple(output.shape),
        output=best.output,
        output_unit=best.output_unit,
        counts=timed.circuit.counts(),
        grain=best.output_unit * 2.0 ** -(precision_bits + 1),
        labels={"mode": mode, **(labels or {}), **tables_label(tables)},
        rows=rows,
    )
    program.check()
    return CkksModel(
        program,
        timed,
        watched.error(chosen) * best.output_unit + program.grain / 2,
        tables,
        watched.by_path(timed, chosen),
    )


@dataclass(frozen=True)
class _Single:
    """The trace of a model for one input of a batch, the ranges of its values, and its output."""

    trace: Trace
    ranges: Sequence[Range]
    output: Symbol


def _single(
    model: nn.Module,
    samples: Sequence[Sample],
    whole: Lowered,
    inputs: Sequence[Mapping[str, Tensor]],
    batch: int,
    told: Told,
) -> _Single:
    """Trace a model for one input of a batch. Raises DoesNotPack if a batch is not made of such inputs one by one.

    whole, inputs: the model for batches, and the samples as its trace takes them.
    """
    rows = [{name: value[k : k + 1] for name, value in sample.items()} for sample in samples for k in range(batch)]
    different = rows[:: max(1, len(rows) // SINGLES)]
    lowered, _, ranges = _prepared(model, different, told)
    made = [lowered.inputs(row) for row in rows[: min(batch, COMPARED)]]
    for name, value in inputs[0].items():
        flat = value.reshape(batch, -1)
        if not all(torch.equal(flat[k], each[name].reshape(-1)) for k, each in enumerate(made)):
            raise DoesNotPack(f"the input {name!r} of a batch is not that of its rows\nhint: ask one by one")
    output, theirs = _output(lowered), _output(whole)
    answers = evaluate(whole.trace, inputs[0], whole.weights, outputs=[theirs.id])[0].reshape(batch, -1)
    for k, each in enumerate(made):
        alone = evaluate(lowered.trace, each, lowered.weights, outputs=[output.id])[0].reshape(-1)
        if alone.shape != answers[k].shape or not torch.allclose(answers[k], alone, rtol=1e-6, atol=1e-9):
            raise DoesNotPack("an answer of a batch depends on other inputs than its own\nhint: ask one by one")
    return _Single(lowered.trace, ranges, output)


def _output(lowered: Lowered) -> Symbol:
    if len(lowered.outputs) != 1:
        raise UnsupportedOperation(
            f"the model has {len(lowered.outputs)} outputs, ciphertexts are packed for one",
            "return one tensor: torch.cat puts several into one",
        )
    return next(iter(lowered.outputs.values()))


def _prepared(
    model: nn.Module, samples: Sequence[Sample], told: Told = silent
) -> tuple[Lowered, list[dict[str, Tensor]], list[Range]]:
    """Return the trace of a model, its calibration inputs as the trace takes them, and the range of every value."""
    lowered = lower_model(
        model, samples, margin_bits=1, embedding="client-table", functions=choose(), weight=blurred, told=told
    )
    inputs = [lowered.inputs(s) for s in samples]
    return lowered, inputs, _ranges(lowered, inputs, told)


def _stepped(
    model: nn.Module, example: Sample, whole: Sequence[Sample], texts: Sequence[Sequence[Sample]], told: Told
) -> tuple[Lowered, list[dict[str, Tensor]], list[Range]]:
    """Return what ``_prepared`` does for a module that keeps rows; its inputs have the rows before them, by name."""
    _, lowered = lower_sizes(
        model,
        [Size(whole[0], whole), Size(example, [])],
        margin_bits=1,
        embedding="client-table",
        functions=choose(),
        weight=blurred,
        told=told,
    )
    out, inputs = [Range() for _ in lowered.trace.primitives], list[dict[str, Tensor]]()
    keeps = {i: p for i, p in enumerate(lowered.trace.primitives) if p.op == "keep"}
    for text in counted(texts, told, "calibrating"):
        shapes = {p.attrs["name"]: (*p.shape[:-2], p.attrs["rows"], p.shape[-1]) for p in keeps.values()}
        kept = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        for filled, sample in enumerate(text):
            given, new = lowered.inputs(sample), dict[str, Tensor]()

            def look(i: int, value: Tensor, new: dict[str, Tensor] = new) -> None:
                _widened(out[i], value)
                if i in keeps:
                    new[keeps[i].attrs["name"]] = value[..., -1:, :]

            evaluate(lowered.trace, given, lowered.weights, look, kept=kept)
            inputs.append({**given, **kept})
            for name, row in new.items():
                if filled < kept[name].shape[-2]:
                    after = kept[name][..., filled + 1 :, :]
                    kept[name] = torch.cat([kept[name][..., :filled, :], row, after], -2)
    return lowered, inputs, out


def _widened(known: Range, value: Tensor) -> None:
    known.low, known.high = min(known.low, float(value.min())), max(known.high, float(value.max()))


def blurred(name: str, weight: Tensor) -> Tensor:
    """Return a weight in float64 with noise of up to 2^-30 of its largest entry, which no ciphertext resolves.

    The set of diagonals, views and nodes is public. Without the noise it would reveal which weights are zero or equal
    to each other. The noise is not a mask: its only purpose is to remove exact coincidences. It is derived from name
    and weight, so that a server that restarts has the same Program and clients need not upload keys again.
    """
    exact = weight.to(torch.float64)
    size = float(exact.abs().max()) if exact.numel() else 0.0
    seed = hashlib.sha256(name.encode() + exact.contiguous().numpy().tobytes()).digest()
    added = np.random.default_rng(int.from_bytes(seed)).uniform(-1.0, 1.0, tuple(exact.shape))
    return exact + torch.from_numpy(np.asarray(added)) * ((size or 1.0) * 2.0**-30)


@dataclass
class _Watched:
    """Measurements of a packed circuit on calibration inputs.

    magnitude: the largest slot of every node. deviation: the largest standard deviation of its error, at
    REFERENCE_SCALE.
    """

    magnitude: Array
    deviation: Array
    outputs: list[int]

    def error(self, parameters: Parameters) -> float:
        return float(noise.WORST * self.deviation[self.outputs].max() * _shrink(parameters.scale_bits))

    def by_path(self, timed: Schedule, parameters: Parameters) -> dict[str, float]:
        out: dict[str, float] = {}
        for i, path in enumerate(timed.circuit.paths):
            error = float(noise.WORST * self.deviation[i] * _shrink(parameters.scale_bits))
            out[path] = max(out.get(path, 0.0), error)
        return out


def _shrink(scale_bits: int) -> float:
    return float(2.0 ** (REFERENCE_SCALE - scale_bits))


def _fitted(
    packed: PackedModel,
    inputs: Sequence[Mapping[str, Tensor]],
    degree: int,
    mode: str,
    precision: float,
    told: Told,
) -> tuple[Parameters, Schedule, _Watched]:
    """Choose scale, base prime and levels for one ring degree: the smallest scale that keeps the predicted error.

    Raises DoesNotFit.
    """
    tried: dict[tuple[int, int], Schedule] = {}
    problem: DoesNotFit | None = None
    for spare in SPARE:
        scale_bits = SCALES[0]
        try:
            while scale_bits < SCALES[1]:
                base_bits = scale_bits + INTEGER + 1
                kept = reserve(degree, scale_bits, base_bits) if mode == "refresh" else 0
                most = (MAXIMUM_BITS[degree] - 1 - 2 * base_bits - spare) // scale_bits
                key = (most, kept) if mode == "refresh" else (0, 0)
                if key not in tried:
                    price = _price(degree, most) if packed.kept else None
                    tried[key] = schedule(packed.circuit, most if mode == "refresh" else None, kept, price)
                timed = tried[key]
                if timed.depth > most:
                    raise DoesNotFit(f"{timed.depth} levels of {scale_bits} bits, where {most} fit")
                trial = Parameters(degree, timed.depth, scale_bits, base_bits, spare)
                reference = Parameters(degree, 0, REFERENCE_SCALE, REFERENCE_SCALE + INTEGER + 1, spare)
                what = f"choosing the scale of rings of degree {degree}, {scale_bits} bits"
                watched = _watch(packed, timed, reference, counted(inputs, told, what))
                _fits(timed, watched.magnitude)
                missing = math.log2(watched.error(trial)) + precision  # an error halves with every bit of the scale
                if missing <= 0:
                    return trial, timed, watched
                scale_bits += math.ceil(missing)
            raise DoesNotFit(f"no scale reaches {precision:g} bits")
        except DoesNotFit as error:
            problem = error
    raise problem or DoesNotFit("no special prime to try")


def _price(degree: int, levels: int) -> Price:
    """Return what refreshes of a decoder's step cost, at their place in its computation."""
    by = Formula()

    def node(node: CkksNode, level: int) -> float:
        return sum(node_seconds(node, level, degree, by).values())

    return Price(node, CLIENT * degree / 16384 + by.of("refresh", degree, levels), ROUND)


def _fits(timed: Schedule, magnitude: Array) -> None:
    """Raise DoesNotFit if values outgrow the base prime, which alone is left at level 0, or the range of the masks."""
    low = [m for m, level in zip(magnitude, timed.levels, strict=True) if level == 0]
    sent = [magnitude[n.inputs[0]] for n in timed.circuit.nodes if n.op == "refresh"]
    largest = max([*low, *sent]) * HEADROOM
    if max(magnitude) > OUTGROWN:
        i = int(np.argmax(magnitude))
        raise DoesNotFit(f"{timed.circuit.paths[i] or 'model'}: a value of {magnitude[i]:.3g} units; precision is lost")
    if largest >= 2.0**INTEGER:
        raise DoesNotFit(f"a value of {largest:.3g} units at the lowest level, where {2**INTEGER} fit")


def _watch(
    packed: PackedModel, timed: Schedule, parameters: Parameters, inputs: Iterable[Mapping[str, Tensor]]
) -> _Watched:
    magnitude = np.zeros(len(timed.circuit.nodes))

    def look(i: int, value: Vector) -> None:
        magnitude[i] = max(magnitude[i], float(np.abs(value).max()))

    deviation = np.zeros(len(timed.circuit.nodes))
    conversed = bool(timed.circuit.rows)
    for number, sample in enumerate(inputs):
        slots = _slots(packed, sample)
        clear(timed.circuit, slots, look)
        if conversed and number % (WATCHED // SIMULATED) == 0:
            deviation = np.maximum(deviation, _simulated(timed, parameters, slots, number))
        elif not conversed and number < 2:
            found = noise.errors(timed, parameters, slots)
            deviation = np.maximum(deviation, [v.max() for v in found])
    return _Watched(magnitude, deviation, timed.circuit.outputs)


def _slots(packed: PackedModel, sample: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return the slots of a sample's inputs, and of the rows that were kept before it."""
    slots = {k: at(sample[name].numpy().reshape(-1), c) for k, (name, c) in packed.views.items()}
    return slots | {k: at(sample[name].numpy().reshape(-1) / u, c) for k, (name, c, u) in packed.kept.items()}


def _check_steps(
    lowered: Lowered, packed: PackedModel, timed: Schedule, inputs: Sequence[Mapping[str, Tensor]], most: float
) -> None:
    """Raise AssertionError unless the packed circuit computes what the trace does, up to ``most`` of a unit."""
    output, keeps = _output(lowered).id, {i: p for i, p in enumerate(lowered.trace.primitives) if p.op == "keep"}
    new, kept_in_slots = dict[str, Array](), dict[str, Vector]()

    def look(i: int, value: Tensor) -> None:
        if i in keeps:
            new[keeps[i].attrs["name"]] = value[..., -1, :].reshape(-1).numpy()

    def look_at_slots(i: int, value: Vector) -> None:
        if (node := timed.circuit.nodes[i]).op == "keep":
            kept_in_slots[node.name] = value

    for sample in inputs:
        kept = {p.attrs["name"]: sample[p.attrs["name"]] for p in keeps.values()}
        (wanted,) = evaluate(lowered.trace, sample, lowered.weights, look, outputs=[output], kept=kept)
        exact, found = wanted.reshape(-1).numpy() / packed.output_unit, np.full(wanted.numel(), np.inf)
        for row, slots in zip(packed.output, clear(timed.circuit, _slots(packed, sample), look_at_slots), strict=True):
            found[row[row >= 0]] = slots[row >= 0]
        if not np.abs(found - exact).max() <= most:
            raise AssertionError(f"the packed step is off by {np.abs(found - exact).max():.2g} of its largest score")
        for each, (
            name,
            content,
            unit,
        ) in packed.kept.items():  # a head's new row, wherever its rows stand
            rows, features = kept[name].shape[-2:]
            used = content[content >= 0]
            exact = new[name][used // (rows * features) * features + used % features] / unit
            if not np.abs(kept_in_slots[each][content >= 0] - exact).max() <= most:
                raise AssertionError(f"the packed step keeps another row of {name} than the model")


def _simulated(timed: Schedule, parameters: Parameters, slots: Mapping[str, Vector], seed: int) -> Array:
    """Return standard deviations of all nodes of which ``noise.WORST`` are ROOM times the largest error of a run.

    Rows that are kept have errors as large as that of the row which a first run keeps.
    """
    exact, found = list[NDArray[np.float32]](), np.zeros(len(timed.circuit.nodes))
    clear(timed.circuit, slots, lambda i, value: exact.append(value.astype(np.float32)))

    def look(i: int, value: Vector) -> None:
        found[i] = np.abs(value - exact[i]).max()

    noise.simulated(timed, parameters, slots, seed, look)
    keeps = {node.name: i for i, node in enumerate(timed.circuit.nodes) if node.op == "keep"}
    generator = np.random.default_rng(seed)
    rows = {k: v + generator.uniform(-1, 1, len(v)) * found[keeps[k]] for k, v in slots.items() if k in keeps}
    noise.simulated(timed, parameters, {**slots, **rows}, seed + 1, look)
    return found * ROOM / noise.WORST


def _ranges(lowered: Lowered, inputs: Sequence[Mapping[str, Tensor]], told: Told) -> list[Range]:
    out = [Range() for _ in lowered.trace.primitives]

    def look(i: int, value: Tensor) -> None:
        _widened(out[i], value)

    for sample in counted(inputs, told, "calibrating"):
        evaluate(lowered.trace, sample, lowered.weights, look)
    return out


def _reach(lowered: Lowered, ranges: Sequence[Range], name: str, *, every: bool = False) -> tuple[float, float]:
    """Return the range allowed for an input: its calibrated range, with 5 % of room on both sides or a little more.

    every: a text may have any token, whether calibration met it or not.
    """
    table = next(c.table for c in lowered.client_inputs if c.name == name)
    if every and table:
        low, high = float(lowered.weights[table].min()), float(lowered.weights[table].max())
    else:
        i = next(i for i, p in enumerate(lowered.trace.primitives) if p.op == "input" and p.attrs["name"] == name)
        low, high = ranges[i].low, ranges[i].high
    room = 0.05 * max(high - low, 1e-6)
    low, high = low - room, high + room  # rounded outwards: exact ones would tell a value of one calibration input
    return (
        -widened(-low) if low < 0 else widened(low, down=True) if low else 0.0,
        widened(high) if high > 0 else -widened(-high, down=True) if high else 0.0,
    )


def _cube(lowered: Lowered, slots: int) -> Cube:
    """Choose the slot layout from the shape of the model's attention, else from that of its first linear layer."""
    for p in lowered.trace.primitives:
        if p.op == "matmul":
            x = lowered.trace.primitives[p.inputs[0]].shape
            return Cube.fitting(slots, x[-1], p.shape[-1], math.prod(p.shape[:-2]), x[-2])
    shapes = [p.shape for p in lowered.trace.primitives if p.op == "linear"]
    if not shapes:
        raise UnsupportedOperation("a model without a linear layer\nhint: compute it in the clear")
    rows = math.prod(shapes[0][:-1])
    return Cube.fitting(slots, slots // max(rows, 1), 1, 1, rows)
