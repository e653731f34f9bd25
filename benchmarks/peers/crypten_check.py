"""A cross-check: our lowered model on CrypTen's own operations, by two parties, beside our protocols and float64.

    python -m benchmarks.peers.crypten_check [--length 16] [--text SENTENCE]

The trace is the one that our circuit is emitted from: the same piecewise polynomials, exponentials, maxima. Every
primitive is evaluated with CrypTen's sums, products, comparisons and selections, so an error in how a model is lowered
or approximated shows as a difference to float64, and one in our protocols as a difference to CrypTen.

CrypTen has 16 fraction bits throughout, and truncation by each party alone, which fails with probability
|x| / 2^31 an element (it is noticed: the result is off by 2^32). Where a value is too large for that the check refuses.
Needs CrypTen beside this package: pip install --no-deps crypten==0.4.1, and the extra "crypten".
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import secure
from approximations import choose
from approximations.division import segments
from approximations.powers import SERIES, starting
from approximations.primitives import IDENTITY, Piece
from benchmarks.peers import crypten_import
from benchmarks.peers.works import free_ports
from benchmarks.sentences import sentences
from protocols.fixedpoint import FixedPoint
from protocols.windows import take
from secure.frontend import lower_model
from secure.lowering.lower import Lowered, Sample
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import dyadic
from secure.lowering.trace import Trace, evaluate
from secure.models.sentence_encoder import find_packaged_model, load_sentence_encoder, load_tokenizer, tokenize

Arrays = Mapping[str, NDArray[Any]]
Secret = Any  # CrypTen's tensor

CLIP = 15.5
LARGEST = 2.0**24  # of a value: an element fails with probability 2^-7 there; models have few such elements


class OutOfRange(ValueError):
    """CrypTen's fixed point cannot hold a value of the model."""


@dataclass(frozen=True)
class Comparison:
    """One query, four times; ``errors``: CrypTen's largest error against the float64 trace, by primitive.

    An error is in units of the tensor's largest magnitude, or of one if that is smaller. That of "piecewise" may be
    0.16: beside a knot a range reduction may take the neighbouring segment, which the product behind it makes good.
    """

    crypten: Tensor
    ours: Tensor
    trace: Tensor  # the approximations in float64
    model: Tensor  # the model in float64
    errors: dict[str, float]


# primitives on CrypTen's tensors; Any is a CrypTen tensor or the module itself


def scaled(x: Secret, factor: float) -> Secret:
    """x times a public factor by an integer product and one division: CrypTen's own rounds small factors away."""
    m, q = dyadic(factor)
    if q <= 0:
        return x * (m * 2**-q)
    return (x * m).div(2**q)


def polynomial(x: Secret, piece: Piece) -> Secret:
    """Horner's scheme; the innermost product has a public factor."""
    u = x - piece.centre if piece.centre else x
    constant, *higher = piece.coefficients or (0.0,)
    if not higher:
        return x * 0 + constant
    out = scaled(u, higher[-1])
    for c in reversed(higher[:-1]):
        out = (out + c) * u
    return out + constant


def piecewise(crypten: Any, x: Secret, knots: Sequence[float], pieces: Sequence[Piece]) -> Secret:
    """All comparisons at once, then one selection a knot."""
    out = polynomial(x, pieces[0])
    if knots:
        above = crypten.stack([x - knot for knot in knots]).ge(0)
        for i, piece in enumerate(pieces[1:]):
            out = out + above[i] * (polynomial(x, piece) - out)
    return out


def exp_below(c: Any, x: Secret, bound: Secret) -> Secret:
    """(e^(-y / 16))^16 for y = bound - x, clipped at 15.5: CrypTen's own exponential is 12 % off at y = 8."""
    y = piecewise(c, bound - x, [CLIP], [IDENTITY, Piece((CLIP,))]).div(16)
    out = polynomial(y, Piece((1.0, -1.0, 1 / 2, -1 / 6, 1 / 24, -1 / 120, 1 / 720)))
    for _ in range(4):
        out = out.square()
    return out


def inverse_power(c: Any, x: Secret, attrs: Mapping[str, Any]) -> Secret:
    """scale * x^(-1/root) by range reduction: CrypTen's own functions are made for arguments of about one."""
    knots, shrinks, factors, of_mantissa = segments(*(attrs[name] for name in ("root", "low", "high", "scale")))
    return polynomial(piecewise(c, x, knots, shrinks), of_mantissa) * piecewise(c, x, knots, factors)


def power(x: Secret, a: Mapping[str, Any]) -> Secret:
    """The polynomial and its corrections, as ``approximations.power`` has them."""
    y = polynomial(x, starting(a["exponent"], a["low"], a["high"], a["degree"]))
    for _ in range(a["steps"]):
        e = 1.0 - x * y * (y if a["exponent"] == -0.5 else 1.0)
        y = y * polynomial(e, Piece(SERIES[a["exponent"]]))
    return scaled(y, a["scale"])


def total(x: Secret, dims: Sequence[int]) -> Secret:
    for dim in dims:
        x = x.sum(dim, keepdim=True)
    return x


def part(x: Secret, a: Mapping[str, Any]) -> Secret:
    return x[(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a["step"]),)]


def taken(c: Any, x: Secret, a: Mapping[str, Any]) -> Secret:
    runs = [(int(start), int(step), int(count)) for start, step, count in a["runs"]]
    index = take(torch.arange(1, x.size(a["dim"]) + 1), 0, tuple(runs))  # 0: zero
    kept = x.index_select(a["dim"], (index - 1).clamp(min=0))
    return kept * (index > 0).long().reshape([-1 if i == a["dim"] else 1 for i in range(kept.dim())])


def absent(name: str) -> Callable[..., Secret]:
    """CrypTen has no such step, or another one."""

    def refuse(*_: Any) -> Secret:
        raise NotImplementedError(f"no counterpart of {name!r}")

    return refuse


EVALUATE: Mapping[str, Callable[..., Secret]] = {
    "add": lambda c, p, w, x, y: x + y,
    "sub": lambda c, p, w, x, y: x - y,
    "mul": lambda c, p, w, x, y: x * y,
    "matmul": lambda c, p, w, x, y: x.matmul(y),
    "linear": lambda c, p, w, x: x.matmul(w[p.attrs["weight"]]),
    "mul_weight": lambda c, p, w, x: x * w[p.attrs["weight"]],
    "add_weight": lambda c, p, w, x: x + w[p.attrs["weight"]],
    "offset": lambda c, p, w, x: x + p.attrs["value"],
    "scale": lambda c, p, w, x: scaled(x, p.attrs["value"]),
    "sum": lambda c, p, w, x: total(x, p.attrs["dims"]),
    "reshape": lambda c, p, w, x: x.reshape(p.shape),
    "expand": lambda c, p, w, x: x.expand(p.shape),
    "permute": lambda c, p, w, x: x.permute(p.attrs["dims"]),
    "slice": lambda c, p, w, x: part(x, p.attrs),
    "cat": lambda c, p, w, *x: c.cat(x, p.attrs["dim"]),
    "piecewise": lambda c, p, w, x: piecewise(c, x, p.attrs["knots"], p.attrs["pieces"]),
    "exp_below": lambda c, p, w, x, bound: exp_below(c, x, bound),
    "row_bound": lambda c, p, w, x: x.max(-1, keepdim=True)[0],
    "inverse_power": lambda c, p, w, x: inverse_power(c, x, p.attrs),
    "power": lambda c, p, w, x: power(x, p.attrs),
    "polynomial_product": lambda c, p, w, y, x: y * polynomial(x, p.attrs["piece"]),
    "maximum": lambda c, p, w, x: x.max(-1, keepdim=True)[0],
    "bounded": lambda c, p, w, x: x,
    "take": lambda c, p, w, x: taken(c, x, p.attrs),
    **{
        name: absent(name)
        for name in (
            "keep",
            "mul_public",
            "patches",
            "perturbed",
            "real",
            "rotated",
            "top_indices",
            "top_of",
            "top_values",
            "units",
        )
    },
}


# the parties


def party(
    rank: int, port: int, primitives: list[Primitive], output: int, inputs: Arrays, weights: Arrays, pipe: Connection
) -> None:
    """One party's process: the trace on shares. Every value is revealed, as its error is what this is about."""
    crypten = crypten_import.load(rank, port)
    secret_inputs = {n: crypten.cryptensor(t, src=0) for n, t in crypten_import.tensors(inputs)}
    secret_weights = {n: crypten.cryptensor(t, src=1) for n, t in crypten_import.tensors(weights)}
    plain: list[Tensor] = []
    given, held = ({n: torch.from_numpy(a) for n, a in arrays.items()} for arrays in (inputs, weights))
    evaluate(Trace(primitives), given, held, observe=lambda _, value: plain.append(value))
    values: list[Secret] = []
    errors: dict[str, float] = {}
    for p, exact in zip(primitives, plain, strict=True):
        if p.op == "input":
            values.append(secret_inputs[p.attrs["name"]])
        else:
            values.append(EVALUATE[p.op](crypten, p, secret_weights, *(values[i] for i in p.inputs)))
        error = float(np.abs(crypten_import.revealed(values[-1]) - exact.numpy()).max()) / max(
            1.0, float(exact.abs().max())
        )
        errors[p.op] = max(errors.get(p.op, 0.0), error)
    pipe.send((crypten_import.revealed(values[output]), errors))
    crypten.uninit()


def on_crypten(trace: Trace, output: int, inputs: Arrays, weights: Arrays) -> tuple[NDArray[Any], dict[str, float]]:
    """A trace's output as two CrypTen parties compute it, and their largest error by primitive."""
    context, (port,) = multiprocessing.get_context("spawn"), free_ports(1)
    used = {p.attrs["weight"] for p in trace.primitives if "weight" in p.attrs}
    weights = {name: weights[name] for name in used}
    pipes, children = [], []
    for rank in range(crypten_import.PARTIES):
        mine, theirs = context.Pipe(duplex=False)
        arguments = (rank, port, trace.primitives, output, inputs, weights, theirs)
        children.append(context.Process(target=party, args=arguments, daemon=True))
        pipes.append(mine)
        children[-1].start()
        theirs.close()
    try:
        answers = [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError("a CrypTen party failed: see its error above") from None
    finally:
        for child, pipe in zip(children, pipes, strict=True):
            child.join(20)
            child.kill()  # one that waits for the other, which failed
            child.join()
            child.close()
            pipe.close()
    result: tuple[NDArray[Any], dict[str, float]] = answers[0]
    return result


def cross_check(
    model: nn.Module, inputs: Sample, calibration: Sequence[Sample], embedding: str = "one-hot"
) -> Comparison:
    """Compile a model, and answer one query by our protocols, on CrypTen, and in float64."""
    compiled = secure.compile(model, inputs, calibration=calibration, embedding=embedding)
    lowered = lowered_model(model, [inputs, *calibration], embedding)
    given = lowered.inputs(inputs)
    (output,) = lowered.outputs.values()
    check_range(lowered, given)
    plain = evaluate(lowered.trace, given, lowered.weights, outputs=[output.id])[0]
    arrays = ({n: np.ascontiguousarray(t.numpy()) for n, t in tensors.items()} for tensors in (given, lowered.weights))
    theirs, errors = on_crypten(lowered.trace, output.id, *arrays)
    with secure.insecure_in_process(compiled) as session:
        ours = session.query(inputs)
    with torch.no_grad():
        exact: Tensor = model.double()(**inputs)
    model.float()
    return Comparison(torch.from_numpy(theirs), ours, plain, exact, errors)


def lowered_model(model: nn.Module, samples: Sequence[Sample], embedding: str) -> Lowered:
    """The trace that ``secure.compile`` emits its circuit from, made by the same steps."""
    margin_bits = FixedPoint().margin_bits
    return lower_model(model, samples, margin_bits=margin_bits, embedding=embedding, functions=choose())


def check_range(lowered: Lowered, given: Mapping[str, Tensor]) -> None:
    primitives = lowered.trace.primitives

    def look(index: int, value: Tensor) -> None:
        if (largest := float(value.abs().max())) > LARGEST:
            p = primitives[index]
            raise OutOfRange(
                f"{p.path or 'model'}: '{p.op}' reaches {largest:.3g}, CrypTen's fixed point {LARGEST:.3g}\n"
                "hint: check a smaller model"
            )

    evaluate(lowered.trace, given, lowered.weights, look)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--text", default="The museum in Utrecht cost more than planned.")
    options = parser.parse_args()
    directory = find_packaged_model()
    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)

    def inputs(text: str) -> Sample:
        return dict(zip(("input_ids", "attention_mask"), tokenize(tokenizer, text, options.length), strict=True))

    texts = [t for t in sentences() if len(tokenizer.tokenizer.encode(t).ids) <= options.length]
    # with the token table at the client: a look-up by one-hot rows would be most of CrypTen's work
    found = cross_check(encoder, inputs(options.text), [inputs(t) for t in texts], "client-table")
    for name, answer in (("CrypTen", found.crypten), ("ours", found.ours), ("approximations in float64", found.trace)):
        cosine = float(nn.functional.cosine_similarity(answer, found.model, dim=-1).min())
        print(f"{name}: largest error {float((answer - found.model).abs().max()):.2e}, cosine {cosine:.7f}")
    print(f"CrypTen and ours differ by at most {float((found.crypten - found.ours).abs().max()):.2e}")
    print("CrypTen's largest error against the trace in float64, relative to the largest value, by primitive:")
    for op, error in sorted(found.errors.items()):
        print(f"  {op:12} {error:.2e}")


if __name__ == "__main__":
    main()
