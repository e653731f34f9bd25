"""What peers are measured on: inputs, float64 results, and the report. numpy is all that it needs."""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PRIMITIVES = (
    "matmul 128x768 by 768x768",
    "matmul 128x768 by 768x3072",
    "gelu 128x3072",
    "softmax 12x128x128",
    "layernorm 128x768",
    "compare 393216",
    "multiply 393216",
    "reciprocal 393216",
    "rsqrt 393216",
)
TRANSFORMERS = ("bert layer", "minilm 32", "minilm 128")
CHOICES = ("argmax 1x2", "argmax 1x1000", "argmax 1x50000", "head 1x384")
DECODERS = ("gpt2 32",)
USUAL = (*PRIMITIVES, *TRANSFORMERS)
WORKS = (*USUAL, *CHOICES, *DECODERS)

# one layer's arrays in an encoder's order of computation (a decoder's norms come first); matrices are (in, out)
LAYER = (
    *("query", "query.bias", "key", "key.bias", "value", "value.bias", "output", "output.bias"),
    *("attention norm", "attention norm.bias", "up", "up.bias", "down", "down.bias", "norm", "norm.bias"),
)
MASKED = -40.0  # added to the scores of padding: e^-40 is zero in anybody's fixed point, and -40 within anybody's range


@dataclass(frozen=True)
class Work:
    """Secret inputs by name, and what exact arithmetic makes of them.

    ``owned``: the inputs that the client has; the others are the server's weights.
    """

    name: str
    kind: str  # the first word of the name, "encoder" or "decoder"
    arrays: dict[str, Array]
    expected: tuple[Array, ...]
    owned: tuple[str, ...] = ("x",)
    heads: int = 0
    layers: int = 0
    pooled: Array | None = field(default=None)  # the plaintext model's own embedding


def gelu(x: Array) -> Array:
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).flat), np.float64, x.size)
    return np.asarray(0.5 * x * (1 + erf.reshape(x.shape)))


def positive(x: Array) -> Array:
    return np.asarray(x > 0, dtype=np.float64)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    d = x - x.mean(-1, keepdims=True)
    return np.asarray(d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-12) * weight + bias)


INVERSES: dict[str, Callable[[Array], Array]] = {
    "reciprocal": lambda x: np.asarray(1 / x),
    "rsqrt": lambda x: np.asarray(1 / np.sqrt(x)),
}
"""Of numbers from 1/16 to 64."""


def split(x: Array, heads: int) -> Array:
    return np.asarray(x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2))


def attention(x: Array, w: Mapping[str, Array], mask: Array, heads: int) -> Array:
    q, k, v = (split(x @ w[n] + w[f"{n}.bias"], heads) for n in ("query", "key", "value"))
    weights = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]) + mask)
    context = (weights @ v).transpose(1, 0, 2).reshape(x.shape)
    return np.asarray(context @ w["output"] + w["output.bias"])


def feed_forward(x: Array, w: Mapping[str, Array]) -> Array:
    return np.asarray(gelu(x @ w["up"] + w["up.bias"]) @ w["down"] + w["down.bias"])


def encode(arrays: Mapping[str, Array], heads: int, layers: int) -> tuple[Array, Array]:
    """Hidden states of the last layer and their weighted mean, in float64."""
    a = {name: value.astype(np.float64) for name, value in arrays.items()}
    x = layer_norm(a["x"], a["norm"], a["norm.bias"]) if "norm" in a else a["x"]
    for i in range(layers):
        w = {name: a[f"{i}.{name}"] for name in LAYER}
        x = layer_norm(x + attention(x, w, a["mask"], heads), w["attention norm"], w["attention norm.bias"])
        x = layer_norm(x + feed_forward(x, w), w["norm"], w["norm.bias"])
    return x, a["pool"] @ x


def decode(arrays: Mapping[str, Array], heads: int, layers: int) -> Array:
    """The token with the largest score after the last one, in float64: (1,)."""
    a = {name: value.astype(np.float64) for name, value in arrays.items()}
    x = a["x"]
    for i in range(layers):
        w = {name: a[f"{i}.{name}"] for name in LAYER}
        x = x + attention(layer_norm(x, w["attention norm"], w["attention norm.bias"]), w, a["mask"], heads)
        x = x + feed_forward(layer_norm(x, w["norm"], w["norm.bias"]), w)
    scores = layer_norm(x[-1:], a["norm"], a["norm.bias"]) @ a["head"]
    return np.asarray(scores.argmax(-1), dtype=np.float64)


def random_layer(rng: np.random.Generator, hidden: int, intermediate: int) -> dict[str, Array]:
    """Weights of the size that training leaves, so that activations keep to real ranges."""
    sizes = {"up": (hidden, intermediate), "down": (intermediate, hidden)}
    out: dict[str, Array] = {}
    for name in LAYER:
        base = name.removesuffix(".bias")
        width = sizes.get(base, (hidden, hidden))[1]
        if base.endswith("norm"):
            out[name] = rng.normal(0.0, 0.05, width) + (base == name)
        elif base == name:
            out[name] = rng.normal(0.0, 1.0, sizes.get(base, (hidden, hidden))) / math.sqrt(hidden)
        else:
            out[name] = rng.normal(0.0, 0.05, width)
    return {name: value.astype(np.float32) for name, value in out.items()}


def transformer(name: str, weights: Path | None) -> Work:
    rng = np.random.default_rng(7)
    hidden, heads, intermediate, layers = (768, 12, 3072, 1) if name == "bert layer" else (384, 12, 1536, 6)
    length = 128 if name == "bert layer" else int(name.split()[1])
    arrays: dict[str, Array] = {}
    pooled = None
    if name != "bert layer" and weights is not None:
        with np.load(weights) as archive:
            if f"{length}/x" not in archive:
                raise SystemExit(
                    f"{weights} has no input of {length} tokens\nhint: python -m benchmarks.peers.export_minilm"
                )
            real = archive[f"{length}/mask"].astype(bool)
            arrays |= {"x": archive[f"{length}/x"]} | {n: archive[n] for n in archive.files if "/" not in n}
            pooled = archive[f"{length}/embedding"]
    else:
        real = np.ones(length, dtype=bool)
        arrays["x"] = rng.normal(size=(length, hidden)).astype(np.float32)
        for i in range(layers):
            arrays |= {f"{i}.{n}": value for n, value in random_layer(rng, hidden, intermediate).items()}
        if name != "bert layer":
            arrays |= {"norm": np.ones(hidden, np.float32), "norm.bias": np.zeros(hidden, np.float32)}
    arrays["mask"] = np.where(real, 0.0, MASKED).astype(np.float32)
    arrays["pool"] = (real / real.sum())[None].astype(np.float32)
    return Work(name, "encoder", arrays, encode(arrays, heads, layers), ("x", "mask", "pool"), heads, layers, pooled)


@dataclass(frozen=True)
class Gpt2:
    """Random weights in the shape of GPT-2 base, and a prompt: (n,) token ids.

    The spread of the token table is a trained model's; that of the positions is wider, so that the variance of rows is
    within the ranges of all peers from the first layer on.
    """

    tokens: Array  # (vocabulary, width), the head's weights too
    positions: Array  # (n, width)
    layers: tuple[dict[str, Array], ...]
    norm: dict[str, Array]
    ids: Array
    heads: int


def gpt2(length: int, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257) -> Gpt2:
    rng = np.random.default_rng(11)
    tokens = (0.14 * rng.standard_normal((vocabulary, width), np.float32)).astype(np.float32)
    positions = (0.4 * rng.standard_normal((length, width), np.float32)).astype(np.float32)
    norm = {"norm": np.ones(width, np.float32), "norm.bias": np.zeros(width, np.float32)}
    made = tuple(random_layer(rng, width, 4 * width) for _ in range(layers))
    return Gpt2(tokens, positions, made, norm, rng.integers(0, vocabulary, length), heads)


def decoder(name: str, model: Gpt2) -> Work:
    """From the prompt's hidden states, behind both look-ups, to the token after it."""
    arrays: dict[str, Array] = {"x": model.tokens[model.ids] + model.positions, "head": model.tokens.T.copy()}
    for i, layer in enumerate(model.layers):
        arrays |= {f"{i}.{n}": value for n, value in layer.items()}
    length, layers = len(model.ids), len(model.layers)
    arrays |= {**model.norm, "mask": np.triu(np.full((length, length), MASKED, np.float32), 1)}
    expected = decode(arrays, model.heads, layers)
    return Work(name, "decoder", arrays, (expected,), ("x", "mask"), model.heads, layers)


def make(name: str, weights: Path | None = None) -> Work:
    """The work of that name, the same at every call."""
    if name in TRANSFORMERS:
        return transformer(name, weights)
    if name in DECODERS:
        return decoder(name, gpt2(int(name.split()[1])))
    rng = np.random.default_rng(USUAL.index(name) if name in USUAL else len(USUAL))  # other sizes: for tests
    kind, size, *rest = name.split()

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    shape = tuple(int(n) for n in size.split("x"))
    x = normal(*shape, scale=1.0 if kind in ("matmul", "multiply") else 2.0)
    if kind in INVERSES:
        x = np.exp2(rng.uniform(-4.0, 6.0, shape)).astype(np.float32)
    if kind in ("compare", "argmax"):  # a difference that fixed point rounds away would count as an error of one
        x = np.round(x * 1024) / np.float32(1024)
    d = x.astype(np.float64)
    arrays, owned = {"x": x}, ("x",)
    if kind == "head":  # of a classifier with two labels: dense, tanh, linear, and the place of the larger score
        arrays |= {
            "dense": normal(shape[1], shape[1], scale=1 / math.sqrt(shape[1])),
            "dense.bias": normal(shape[1], scale=0.05),
            "out": normal(shape[1], 2, scale=1 / math.sqrt(shape[1])),
            "out.bias": normal(2, scale=0.05),
        }
        w = {name: value.astype(np.float64) for name, value in arrays.items()}
        scores = np.tanh(d @ w["dense"] + w["dense.bias"]) @ w["out"] + w["out.bias"]
        expected = np.asarray(scores.argmax(-1), dtype=np.float64)
    elif kind == "matmul":
        arrays["y"] = normal(*(int(n) for n in rest[1].split("x")), scale=1 / math.sqrt(shape[1]))
        expected = d @ arrays["y"].astype(np.float64)
    elif kind == "multiply":
        arrays["y"] = normal(*shape)
        expected = d * arrays["y"].astype(np.float64)
    elif kind == "layernorm":
        arrays |= {"weight": np.float32(1) + normal(shape[1], scale=0.05), "bias": normal(shape[1], scale=0.05)}
        expected = layer_norm(d, arrays["weight"].astype(np.float64), arrays["bias"].astype(np.float64))
    else:
        functions: dict[str, Callable[[Array], Array]] = {
            "gelu": gelu,
            "softmax": softmax,
            "compare": positive,
            "argmax": lambda x: np.asarray(x.argmax(-1), dtype=np.float64),
            **INVERSES,
        }
        expected = functions[kind](d)
    return Work(name, kind, arrays, (expected,), owned)


def accuracy(work: Work, outputs: Sequence[Array]) -> dict[str, float]:
    """The largest error; of a transformer, its hidden states' and the cosine of its embedding to the exact one."""
    found = {"max_error": float(np.abs(outputs[0] - work.expected[0]).max())}
    if work.kind == "encoder":
        mine, exact = np.ravel(outputs[1]), np.ravel(work.expected[1] if work.pooled is None else work.pooled)
        found["cosine"] = float(mine @ exact / np.linalg.norm(mine) / np.linalg.norm(exact))
    return found


def seconds(runs: Iterable[Sequence[float]]) -> dict[str, Any]:
    """From every party's times of every run: a run takes as long as its slowest party."""
    each = [max(times) for times in zip(*runs, strict=True)]
    return {"seconds": round(statistics.median(each), 4), "each": [round(s, 4) for s in each]}


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def options(description: str | None) -> argparse.ArgumentParser:
    """What both benchmarks accept."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", nargs="+", metavar="NAME", default=list(USUAL), choices=WORKS, help="default: not argmax, head, gpt2"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs after the warm-up (default 3)")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="written by export_minilm; otherwise random weights"
    )
    return parser


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_report(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    print(json.dumps(report, indent=2), file=file or sys.stdout, flush=True)
