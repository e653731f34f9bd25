"""CKKS: digits under pure evaluation and with refreshes, a batch, a matrix against TenSEAL, MiniLM's width.

    python -m benchmarks.encrypted [--parts digits refresh matrix width layer batch] [--images 200] [--write]

Everything in this process, on one core, client and server one after the other; bytes are those of the messages. Each
part's prediction is made by primitives measured in the same run, before it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import common
from protocols.ckks import diagonals
from protocols.ckks.circuit import Circuit, Vector
from protocols.ckks.cost import account, measure
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.refresh import Refresher
from protocols.ckks.schedule import Schedule, schedule
from protocols.ckks.seal import Client, Context, EvaluationKeys
from secure.ckks.compile import CkksModel, encrypt
from secure.deployments.ckks import Ckks
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions
from secure.models.digits import load_digits, train_digits
from secure.polynomial.forms import PolynomialActivation, PolynomialNorm, PowerAttention, freeze_untrained
from secure.polynomial.recipe import Recipe
from secure.tasks.digits import prepared

WIDTH, HEADS, TOKENS, LAYERS = 384, 12, 16, 6  # all-MiniLM-L6-v2's
PARTS = ("digits", "refresh", "matrix", "width", "layer", "batch")


class Party:
    """Both sides for one schedule: keys, encoded weights, and what they took."""

    def __init__(self, timed: Schedule, parameters: Parameters, *, limit: int = 4 << 30) -> None:
        self.timed, self.parameters = timed, parameters
        context = Context(parameters)
        began = time.perf_counter()
        self.client = Client(context)
        keys = self.client.evaluation_keys(timed.circuit.steps)
        self.key_seconds, self.key_bytes = time.perf_counter() - began, sum(map(len, keys.values()))
        self.keys = EvaluationKeys(context, keys, timed.circuit.steps)
        began = time.perf_counter()
        self.weights = EncodedWeights(context, timed, limit)
        self.weights.prepare()
        self.encoding_seconds = time.perf_counter() - began
        self.refresher = Refresher(self.client)
        self.times = measure(parameters)
        self.account = account(timed, parameters, self.times)

    def run(self, slots: Mapping[str, Vector], levels: Mapping[str, int]) -> tuple[list[Vector], dict[str, float]]:
        """The decrypted outputs, and seconds and bytes of the run."""
        began = time.perf_counter()
        inputs = {name: self.client.encrypt(slots[name], levels[name]) for name in levels}
        spent = {"client": time.perf_counter() - began, "server": 0.0}
        up, down = sum(map(len, inputs.values())), 0
        went = evaluate(self.weights, self.keys, inputs)
        answers: list[bytes] | None = None
        stage = 0
        while True:
            began = time.perf_counter()
            try:
                masked = next(went) if answers is None else went.send(answers)
            except StopIteration as ended:
                outputs: list[bytes] = ended.value
                spent["server"] += time.perf_counter() - began
                break
            spent["server"] += time.perf_counter() - began
            stage, began = stage + 1, time.perf_counter()
            wanted = [self.timed.levels[i] for i in self.timed.refreshes(stage)]
            answers = [
                self.refresher.refresh(data, self.timed.reserve, level)
                for data, level in zip(masked, wanted, strict=True)
            ]
            down, up = down + sum(map(len, masked)), up + sum(map(len, answers))
            spent["client"] += time.perf_counter() - began
        began = time.perf_counter()
        found = [self.client.decrypt(data) for data in outputs]
        spent["client"] += time.perf_counter() - began
        down += sum(map(len, outputs))
        return found, {**spent, "up": up, "down": down, "rounds": stage}

    def described(self) -> dict[str, Any]:
        p = self.parameters
        return {
            "N": p.degree,
            "levels": p.levels,
            "scale bits": p.scale_bits,
            "counts": self.timed.circuit.counts(),
            "rotation keys": len(self.timed.circuit.steps),
            "keys MB": self.key_bytes / 1e6,
            "key generation s": self.key_seconds,
            "encoding s": self.encoding_seconds,
            "weights in memory MB": self.weights.bytes / 1e6,
            "predicted s": self.account.total,
            "predicted by kind": dict(self.account.kinds),
        }


def levels_of(encrypted: CkksModel) -> dict[str, int]:
    return {name: level for name, (_, level, _) in encrypted.program.views.items()}


def digits(layers: int, count: int, precision: float = 9.0) -> dict[str, Any]:
    """A trained model; its answers on test images against the plaintext model's."""
    model, accuracy = train_digits(layers)
    began = time.perf_counter()
    compiled = build(prepared(model), Ckks(refresh=layers > 1, precision=precision), CompileOptions(), {})
    encrypted: CkksModel = compiled.model
    packing = time.perf_counter() - began
    party = Party(encrypted.schedule, encrypted.program.parameters)
    images, labels = load_digits().test
    with torch.no_grad():
        plain = model(images)
    same, right, errors, runs = 0, 0, [], []
    for k in range(count):
        slots = encrypted.program.client_values({"images": images[k][None]}, {})
        found, spent = party.run(slots, levels_of(encrypted))
        answer = encrypted.program.decode(found)["output"][0]
        same += int(answer.argmax() == plain[k].argmax())
        right += int(answer.argmax() == labels[k])
        errors.append(float((answer - plain[k]).abs().max()))
        runs.append(spent)
    middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    return {
        "layers": layers,
        "images": count,
        "test accuracy, floating point": accuracy,
        "right of these": right / count,
        "same prediction": same / count,
        "server s": middle["server"],
        "client s": middle["client"],
        "up MB": middle["up"] / 1e6,
        "down MB": middle["down"] / 1e6,
        "refreshes": middle["rounds"],
        "refreshed ciphertexts": sum(map(len, encrypted.program.refreshes)),
        "largest error": max(errors),
        "predicted error": encrypted.predicted_error,
        "largest logit": float(plain.abs().max()),
        "packing s": packing,
        "peak memory GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **party.described(),
    }


def matrix(size: int = 768) -> list[dict[str, Any]]:
    """A matrix times an encrypted vector: ours and TenSEAL's, under the same parameters in the same run."""
    import tenseal

    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(size, size)) / size**0.5, rng.normal(size=size)
    out = []
    for degree, bits in ((8192, (60, 40, 40, 60)), (16384, (60, *[40] * 7, 60))):
        parameters = Parameters(degree, len(bits) - 2, 40, 60)
        slots = parameters.slots
        circuit = Circuit(slots)
        found = {(0, r): _diagonal(w, r, slots) for r in range(size)}
        circuit.outputs = [diagonals.apply(circuit, [circuit.input("x")], found)]
        low = schedule(circuit)
        timed = Schedule(low.circuit, tuple(v + parameters.levels - 1 for v in low.levels), low.stages, 0)
        party = Party(timed, parameters)
        vector = np.zeros(slots)
        vector[:size], vector[size : 2 * size] = x, x
        data = party.client.encrypt(vector, parameters.levels)
        seconds, answer = [], np.zeros(0)
        for _ in range(5):
            began = time.perf_counter()
            (result,) = _result(evaluate(party.weights, party.keys, {"x": data}))
            seconds.append(time.perf_counter() - began)
            answer = party.client.decrypt(result, parameters.levels - 1)[:size]
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=degree, coeff_mod_bit_sizes=list(bits), n_threads=1
        )
        context.global_scale = 2.0**40
        context.generate_galois_keys()
        theirs = tenseal.ckks_vector(context, x.tolist())
        columns = w.T.tolist()
        peer = []
        for _ in range(1 if degree > 8192 else 3):
            began = time.perf_counter()
            product = theirs.matmul(columns)
            peer.append(time.perf_counter() - began)
        out.append(
            {
                "N": degree,
                "primes": list(bits),
                "ours s": statistics.median(seconds),
                "TenSEAL s": statistics.median(peer),
                "times faster": statistics.median(peer) / statistics.median(seconds),
                "largest error, ours": float(np.abs(answer - w @ x).max()),
                "largest error, TenSEAL": float(np.abs(np.array(product.decrypt()) - w @ x).max()),
                "rotations": party.timed.circuit.counts()["rotate"],
                "rotation keys": len(party.timed.circuit.steps),
                "predicted s": party.account.total,
            }
        )
    return out


def _diagonal(w: Vector, r: int, slots: int) -> Vector:
    size = len(w)
    out = np.zeros(slots)
    out[:size] = w[np.arange(size), (np.arange(size) + r) % size]
    return out


def _result(run: Any) -> list[bytes]:
    try:
        next(run)
    except StopIteration as ended:
        return list(ended.value)
    raise AssertionError("a refresh where none is")


class _Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class _Attention(nn.Module):
    """Projections, Power-Softmax attention of all heads, and the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.polynomial = PowerAttention(Recipe())

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (
            layer(x).reshape(b, t, HEADS, w // HEADS).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = self.polynomial(q, k, v, None, (w // HEADS) ** -0.5)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, t, w))
        return out


def _all(model: nn.Module, samples: Sequence[Tensor]) -> None:
    for x in samples:
        model(x)


def width() -> list[dict[str, Any]]:
    """MiniLM's width, 16 tokens, random weights: one projection, one attention block."""
    out = []
    for name, model in (("projection", _Projection()), ("attention", _Attention())):
        torch.manual_seed(0)
        samples = [torch.empty(1, TOKENS, WIDTH).normal_() for _ in range(24)]
        if name == "attention":
            freeze_untrained(model, partial(_all, model, samples))
        given = [{"x": x} for x in samples]
        began = time.perf_counter()
        encrypted = encrypt(model.eval(), given[0], calibration=given[1:], precision_bits=8.0)
        packing = time.perf_counter() - began
        party = Party(encrypted.schedule, encrypted.program.parameters, limit=10 << 30)
        with torch.no_grad():
            plain = model(samples[0])
        slots = encrypted.program.client_values(given[0], {})
        runs = []
        for _ in range(3 if name == "projection" else 2):
            found, spent = party.run(slots, levels_of(encrypted))
            runs.append(spent)
        out.append(
            {
                "block": name,
                "server s": statistics.median(r["server"] for r in runs),
                "client s": statistics.median(r["client"] for r in runs),
                "up MB": runs[0]["up"] / 1e6,
                "down MB": runs[0]["down"] / 1e6,
                "largest error": float((encrypted.program.decode(found)["output"] - plain).abs().max()),
                "predicted error": encrypted.predicted_error,
                "packing s": packing,
                **party.described(),
            }
        )
    return out


class _Layer(nn.Module):
    """A whole encoder layer, with LayerNorms and GeLU as polynomials."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, recipe = _Attention(), Recipe()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.activation = PolynomialActivation(nn.GELU(), recipe)
        self.first, self.second = (PolynomialNorm(_norm(), recipe) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.attention(x))
        out: Tensor = self.second(x + self.down(self.activation(self.up(x))))
        return out


def _norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH)
    norm.weight.data.uniform_(0.8, 1.2)
    norm.bias.data.normal_(0.0, 0.1)
    return norm


def layer() -> dict[str, Any]:
    """One encoder layer of MiniLM's sizes, packed and priced, not run: six of them are a projection of the model."""
    torch.manual_seed(0)
    model = _Layer().eval()
    samples = [torch.empty(1, TOKENS, WIDTH).normal_() for _ in range(12)]
    freeze_untrained(model, partial(_all, model, samples))
    given = [{"x": x} for x in samples]
    encrypted = encrypt(model, given[0], calibration=given[1:], mode="refresh", precision_bits=6.0, degrees=[16384])
    p = encrypted.program
    spent = account(encrypted.schedule, p.parameters, measure(p.parameters))
    return {
        "N": p.parameters.degree,
        "levels": p.parameters.levels,
        "counts": dict(p.counts),
        "rounds": len(p.refreshes),
        "predicted s": spent.total,
        "predicted by kind": dict(spent.kinds),
        "projected s, six layers": LAYERS * spent.total,
    }


BATCH = 8192  # the slots of the smallest ring with enough levels


def batch() -> dict[str, Any]:
    """As many images as there are slots, the test images over and over."""
    model, _ = train_digits(1)
    data = load_digits()
    made = prepared(model).batched(BATCH)
    batched = encrypt(model, made.samples[0], calibration=made.samples[1:], batch=BATCH, labels={"batch": str(BATCH)})
    party = Party(batched.schedule, batched.program.parameters)
    images, count = data.test[0], BATCH
    given = {"images": images[torch.arange(count) % len(images)]}
    levels = batched.schedule.inputs()
    found, spent = party.run(batched.program.client_values(given, {}), levels)
    answers = batched.program.decode(found)["output"]
    with torch.no_grad():
        plain = model(images)[torch.arange(count) % len(images)]
    return {
        "images": count,
        "server s": spent["server"],
        "client s": spent["client"],
        "server s an image": spent["server"] / count,
        "up kB an image": spent["up"] / 1e3 / count,
        "down kB an image": spent["down"] / 1e3 / count,
        "same prediction": float((answers.argmax(-1) == plain.argmax(-1)).double().mean()),
        "largest error": float((answers - plain).abs().max()),
        "peak memory GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **party.described(),
    }


def measured(part: str, images: int) -> Any:
    if part == "digits":
        return digits(1, images)
    if part == "refresh":
        return [digits(layers, max(1, images // 20)) for layers in (2, 4)]
    return {"matrix": matrix, "width": width, "layer": layer, "batch": batch}[part]()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = common.RESULTS / "encrypted.json"
    report: dict[str, Any] = json.loads(path.read_text()) if options.write and path.is_file() else {}
    for part in options.parts:
        report[part] = measured(part, options.images)
        print(json.dumps({part: report[part]}, indent=1), flush=True)
        if options.write:  # part by part: each takes minutes
            report["machine"] = common.machine("benchmarks.encrypted")
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
