"""Our side of the works: each as a compiled Program, with the client's inputs and the float64 result.

Names and arrays are those of ``benchmarks.peers.works``, and a few works more. One operation is a Program of its own:
each secret operand x enters as shares, x - m the client's input and m a tensor of the server's, so that nobody knows
it; the operation follows; the result is revealed to the client, which is one message and part of what is measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secure
from approximations.division import reciprocal
from benchmarks.peers import works as peers
from benchmarks.peers.works import Array
from protocols import ring
from protocols.fixedpoint import FixedPoint
from protocols.flow import Instruction
from protocols.local import AddWeight, Indicators
from protocols.protocol import Protocol, plane_shape
from protocols.two_party import Compare, Input, Open, OpenBits, Reveal, Select
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.two_party import TwoParty
from secure.lowering.lower import Lowered
from secure.lowering.ranges import Ranges
from secure.lowering.trace import Trace, WeightRef
from secure.models.text import PACKAGED, model_directory, text_inputs
from secure.models.tokens import TRUNCATE, read_json
from secure.mpc.budget import GB, Budget
from secure.mpc.compile import MpcModel, finish
from secure.mpc.prices import Prices
from secure.mpc.program import Output
from secure.polynomial.forms import freeze_untrained
from secure.polynomial.recipe import Recipe
from secure.polynomial.swap import polynomialize

MATMULS = tuple(name for name in peers.WORKS if name.startswith("matmul"))
COUNTERPARTS = {name.replace("matmul", "product", 1): name for name in MATMULS}
"""Ours with two secret operands, which is what a peer's "matmul" is."""

OURS_ALONE = ("bert-base 128", "polynomial-bert-base 128", "minilm 512", "bert-large 128", "deit-tiny 224")

WORKS = (*MATMULS, *COUNTERPARTS, *(name for name in peers.WORKS if name not in MATMULS), *OURS_ALONE)

COMPARED_FRACTION = 58  # |x| < 16, so that the compared integers fill the ring of 64 bits
TRAINED = 0.036  # 1 / sqrt(768): random weights of the size that training leaves, not of BERT's initialization (0.02)
BUDGET = Budget()
LARGE_BUDGET = Budget(memory=16 * GB)  # BERT-large's Program may take 13.7 GB, by the bounds that a budget knows
CALIBRATION = 3  # other inputs from the same distribution that set the ranges

HOW = {
    "matmul": "input of the client, weight held by the server: one masked delivery, then a local product",
    "product": "both operands secret: each opened under a mask once, then a local product",
    "gelu": "secret input; the default form of GeLU",
    "softmax": "secret input",
    "layernorm": "secret input; weight and bias held by the server",
    "compare": "x > 0 for all 64 bits of x, nothing left out; opening of x included, then bit to number and reveal",
    "multiply": "both operands secret: each opened under a mask once, then a local product and a truncation",
    "reciprocal": "input of the client, from 1/16 to 64",
    "rsqrt": "input of the client, from 1/16 to 64",
    "bert": "one encoder layer on the client's hidden states, no mask; weights held by the server",
    "minilm": "token ids to normalized embedding, as `unseen embed`; the client holds the token table; beyond the "
    "packaged model's 256 tokens a copy of it, whose table of positions has 512",
    "bert-base": "token ids to mean of the hidden states, random weights; the client holds the token table",
    "argmax": "secret input; the place alone is revealed",
    "head": "a classifier's first token to its label: dense, tanh, linear, arg-max; weights held by the server",
    "bert-large": "the same in the shape of BERT-large",
    "gpt2": "token ids to the most likely next one, in the shape of GPT-2 base; all weights at the server",
    "deit-tiny": "pixels of one image to logits, random weights, 197 tokens; nothing but the weights at the server",
    "polynomial-bert-base": "the same in polynomial form, its ranges and polynomials taken from random inputs",
}


@dataclass(frozen=True, eq=False)
class Job:
    """``build`` compiles for a deployment, by default the default one, and takes long; so may ``expected``.

    budget: what dealer and client let its Program take.
    """

    name: str
    inputs: dict[str, Tensor]  # the client's
    build: Callable[..., secure.Compiled]
    expected: Callable[[], Tensor]
    budget: Budget = BUDGET

    @property
    def kind(self) -> str:
        return self.name.split()[0]

    @property
    def transformer(self) -> bool:
        return self.kind in ("bert", "minilm", "bert-base", "bert-large", "deit-tiny", "polynomial-bert-base")

    @property
    def elementwise(self) -> bool:
        return self.kind in ("gelu", "compare", "multiply")


def counterpart(name: str) -> str | None:
    """The name of a peer's work that is the same."""
    found = COUNTERPARTS.get(name, name)
    return found if found in peers.WORKS else None


# modules


class Shared(nn.Module):
    """An operation on secrets: of each operand the client gives x - m, and the server has m."""

    def __init__(self, function: Callable[..., Tensor], masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function, self.operands = function, tuple(masks)
        self.masks = nn.ParameterDict({name: nn.Parameter(mask, requires_grad=False) for name, mask in masks.items()})

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x + self.masks["x"]
        return self.function(x) if y is None else self.function(x, y + self.masks["y"])


class Layer(nn.Module):
    """The encoder layer that ``benchmarks.peers.works.encode`` computes."""

    def __init__(self, arrays: Mapping[str, Array], heads: int) -> None:
        super().__init__()
        self.heads = heads
        parts: dict[str, nn.Module] = {}
        for name in peers.LAYER[::2]:
            weight, bias = (torch.from_numpy(arrays[f"0.{n}"]) for n in (name, f"{name}.bias"))
            module: Any = nn.Linear(*weight.shape) if weight.dim() == 2 else nn.LayerNorm(len(weight), eps=1e-12)
            module.load_state_dict({"weight": weight.t().contiguous() if weight.dim() == 2 else weight, "bias": bias})
            parts[name.replace(" ", "_")] = module
        self.parts = nn.ModuleDict(parts)

    def forward(self, input: Tensor) -> Tensor:
        p = self.parts
        q, k, v = (self._split(p[name](input)) for name in ("query", "key", "value"))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        context = (weights @ v).transpose(0, 1).reshape(input.shape)
        x = p["attention_norm"](input + p["output"](context))
        out: Tensor = p["norm"](x + p["down"](nn.functional.gelu(p["up"](x))))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.heads, -1).transpose(0, 1)


class Head(nn.Module):
    """The head of a classifier: dense, tanh, linear, and the place of the larger score."""

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        super().__init__()
        parts = [nn.Linear(*arrays[name].shape) for name in ("dense", "out")]
        for name, part in zip(("dense", "out"), parts, strict=True):
            part.load_state_dict({"weight": arrays[name].t().contiguous(), "bias": arrays[f"{name}.bias"]})
        self.dense, self.out = parts

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.out(torch.tanh(self.dense(x)))
        return scores.argmax(-1)


class NextToken(nn.Module):
    """A causal language model to the token that it finds most likely after a text: (1, 1) integers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        model: Any = self.model
        hidden = model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        out: Tensor = model.lm_head(hidden[:, -1:]).argmax(-1)
        return out


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": nn.functional.gelu,
    "softmax": lambda x: torch.softmax(x, -1),
    "compare": torch.relu,  # for its shapes alone, see ``comparison``
    "multiply": torch.mul,
    "reciprocal": torch.rsqrt,  # for its shapes alone, see ``reciprocals``
    "rsqrt": torch.rsqrt,
    "product": torch.matmul,
    "argmax": lambda x: x.argmax(-1),
}


def module(work: peers.Work, kind: str, masks: Mapping[str, Tensor]) -> nn.Module:
    """A work of one operation, or one layer, as a module."""
    arrays = {name: torch.from_numpy(value) for name, value in work.arrays.items()}
    if kind == "encoder":
        return Layer(work.arrays, work.heads)
    if kind == "matmul":
        linear: Any = nn.Linear(arrays["y"].shape[0], arrays["y"].shape[1], bias=False)
        linear.load_state_dict({"weight": arrays["y"].t().contiguous()})
        return linear  # type: ignore[no-any-return]
    if kind == "head":
        return Head(arrays)
    if kind == "layernorm":
        norm = nn.LayerNorm(len(arrays["weight"]), eps=1e-12)
        norm.load_state_dict({"weight": arrays["weight"], "bias": arrays["bias"]})
        return Shared(norm, masks)
    return Shared(FUNCTIONS[kind], masks)


def comparison(pattern: MpcModel, mask: Tensor) -> MpcModel:
    """x > 0 as a Program, put together by hand, as no module may end in a comparison; its input is ``pattern``'s."""
    program = pattern.program
    (spec,) = program.client_inputs
    shape, width = spec.shape, plane_shape(spec.shape, 1)[1]
    reach = 2.0 ** (63 - COMPARED_FRACTION)
    steps: list[tuple[Protocol, tuple[int, ...]]] = [
        (Input(shape, 64, spec.name, COMPARED_FRACTION, 1 - reach, reach - 1), ()),
        (AddWeight(shape, 64, "mask"), (0,)),
        (Open(shape, 64), (1,)),
        (Compare(shape, width=64, drop=0, thresholds=(1,)), (2,)),
        (Indicators(width, rows=((0,),), negate=(True,)), (3,)),
        (OpenBits(shape, 1), (4,)),
        (Select(shape, 2, slopes=(0,), offsets=(1,)), (5,)),
        (Reveal(shape, 2), (6,)),
    ]
    circuit = tuple(Instruction(protocol, inputs) for protocol, inputs in steps)
    outputs = (Output("output", len(circuit) - 1, 0),)
    made = dataclasses.replace(
        program, circuit=circuit, paths=("",) * len(circuit), outputs=outputs, weight_shapes={}, watched=None
    )
    integers = {"mask": ring.encode(mask, COMPARED_FRACTION)}
    return MpcModel(secure.Program.from_bytes(made.encoded), integers, {})  # decoding checks it


def reciprocals(pattern: MpcModel, samples: Sequence[Tensor], prices: Prices) -> MpcModel:
    """1 / x as a Program, put together by hand, as no module may divide by a secret; its input is ``pattern``'s."""
    program, fixed = pattern.program, FixedPoint()
    (spec,) = program.client_inputs
    low, high = (float(f(torch.stack([f(x) for x in samples]))) for f in (torch.min, torch.max))
    trace, weights = Trace(), {"mask": torch.zeros(spec.shape, dtype=torch.float64)}
    x = trace.input(spec.name, spec.shape) + WeightRef("mask", spec.shape)
    result = reciprocal(x, low, high)
    lowered = Lowered(trace, {"output": result}, weights, program.client_graph, [spec], {})
    ranges = Ranges.calibrate(trace, ({spec.name: x.double()} for x in samples), weights, fixed.margin_bits)
    return finish(lowered, ranges, fixed, {}, prices=prices)


# jobs


def like(x: Tensor, seed: int) -> Tensor:
    """Another tensor from the same distribution; in steps of 1/1024, so that differences are exact in float32."""
    if float(x.min()) > 0:  # logarithms that are spread evenly
        low, high = float(x.min().log2()), float(x.max().log2())
        return torch.exp2(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * x.std()
    return torch.round(drawn * 1024) / 1024


def operation(name: str, approximations: str) -> Job:
    """A work whose arrays are the peers'."""
    work = peers.make(COUNTERPARTS.get(name, name.replace("product", "matmul", 1)))
    kind = name.split()[0] if work.kind != "encoder" else "encoder"
    secrets = ("x", "y") if kind in ("product", "multiply") else ("x",)
    actual = {n: torch.from_numpy(work.arrays[n]) for n in secrets}
    masks, given = {n: like(x, 100 + i) for i, (n, x) in enumerate(actual.items())}, "x"
    if kind in ("matmul", "encoder"):  # their input is the client's
        masks, given = {}, "input"
    if kind in peers.INVERSES:  # so is theirs, but a Program reads something of the server's too
        masks = {"x": torch.zeros_like(actual["x"])}

    def inputs(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {given if n == "x" else n: x - masks[n] if masks else x for n, x in values.items()}

    def build(deployment: CircuitDeployment | None = None) -> secure.Compiled:
        first, *others = (inputs({n: like(x, seed) for n, x in actual.items()}) for seed in range(CALIBRATION))
        made = module(work, kind, masks).eval()
        chosen: dict[str, Any] = {"approximations": approximations, "deployment": deployment}
        compiled = secure.compile(made, first, calibration=others, **chosen)
        if kind == "compare":
            compiled = replace(compiled, model=comparison(compiled.model, masks["x"]))
        if kind == "reciprocal":
            drawn = [like(x, seed) for seed in range(CALIBRATION) for x in actual.values()]
            compiled = replace(compiled, model=reciprocals(compiled.model, drawn, (deployment or TwoParty()).prices))
        return compiled

    return Job(name, inputs(actual), build, lambda: torch.from_numpy(np.asarray(work.expected[0], np.float64)))


@contextmanager
def packaged(length: int) -> Iterator[str]:
    """The packaged model for texts of a length: by its name, or a copy of it that says a longer limit than its own."""
    directory, limits = model_directory(PACKAGED), "sentence_bert_config.json"
    if length <= (said := read_json(directory / limits))["max_seq_length"]:
        yield PACKAGED
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / PACKAGED
        shutil.copytree(directory, copy)
        (copy / limits).write_text(json.dumps({**said, "max_seq_length": length}))
        yield str(copy)


def minilm(name: str, approximations: str) -> Job:
    """The main job, on the sentence that the peers get; at lengths that are ours alone, on sentences that fill it."""
    from benchmarks.peers.export_minilm import fitting
    from benchmarks.sentences import sentences
    from secure.models.sentence_encoder import load_sentence_encoder, load_tokenizer

    length, directory = int(name.split()[1]), model_directory(PACKAGED)
    tokenizer = load_tokenizer(directory)
    text = fitting(tokenizer, length) if counterpart(name) else " ".join(sentences())
    inputs = text_inputs(tokenizer, text, length, TRUNCATE)

    def build(deployment: CircuitDeployment | None = None) -> secure.Compiled:
        chosen: dict[str, Any] = {"approximations": approximations, "deployment": deployment}
        with packaged(length) as model:
            return secure.compile_text_model(model, length, embedding="client-table", **chosen)

    def expected() -> Tensor:
        with torch.no_grad():
            out: Tensor = load_sentence_encoder(directory).double()(**inputs)
        return out

    return Job(name, inputs, build, expected)


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def bert(name: str, approximations: str) -> Job:
    """BERT-base or BERT-large of random weights, the same in every process."""
    length, polynomial = int(name.split()[1]), name.startswith("polynomial")
    large = name.startswith("bert-large")
    sizes = LARGE if large else {}

    def model() -> nn.Module:
        from transformers import BertConfig, BertModel

        from secure.models.sentence_encoder import SentenceEncoder

        torch.manual_seed(0)
        options: dict[str, Any] = {"initializer_range": TRAINED, "attn_implementation": "eager", **sizes}
        found = SentenceEncoder(BertModel(BertConfig(**options)), normalize=False).eval()
        if polynomial:
            polynomialize(found.encoder, Recipe())
            freeze_untrained(found, lambda: [found(**ids(seed, length // seed)) for seed in range(1, CALIBRATION + 1)])
        return found

    def ids(seed: int, real: int = length) -> dict[str, Tensor]:
        drawn = torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": drawn, "attention_mask": (torch.arange(length) < real).long()[None]}

    def build(deployment: CircuitDeployment | None = None) -> secure.Compiled:
        # one is padded, as the range of the mask comes from calibration too
        first, *others = (ids(seed, length // seed) for seed in range(1, CALIBRATION + 1))
        chosen: dict[str, Any] = {"embedding": "client-table", "approximations": approximations}
        return secure.compile(model(), first, calibration=others, deployment=deployment, **chosen)

    def expected() -> Tensor:
        with torch.no_grad():
            out: Tensor = model().double()(**ids(0))
        return out

    return Job(name, ids(0), build, expected, LARGE_BUDGET if large else BUDGET)


def deit(name: str, approximations: str) -> Job:
    """DeiT-tiny of random weights on one image, the same in every process."""
    side = int(name.split()[1])

    def model() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        shape |= {"image_size": side, "initializer_range": 0.072, "num_labels": 1000}
        found: nn.Module = ViTForImageClassification(ViTConfig(**shape))
        return found.eval()

    def image(seed: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))}

    def build(deployment: CircuitDeployment | None = None) -> secure.Compiled:
        first, *others = (image(seed) for seed in range(1, CALIBRATION + 1))
        return secure.compile(model(), first, calibration=others, deployment=deployment, approximations=approximations)

    def expected() -> Tensor:
        with torch.no_grad():
            out: Tensor = model().double()(pixel_values=image(0)["pixel_values"].double()).logits
        return out

    return Job(name, image(0), build, expected)


def gpt2(name: str, approximations: str) -> Job:
    """GPT-2 base of the peers' weights: the token after a prompt that fills its length."""
    given = peers.gpt2(int(name.split()[1]))
    vocabulary, length = len(given.tokens), len(given.ids)

    def ids(seed: int) -> dict[str, Tensor]:
        drawn = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": drawn}

    def build(deployment: CircuitDeployment | None = None) -> secure.Compiled:
        first, *others = (ids(seed) for seed in range(1, CALIBRATION + 1))
        chosen: dict[str, Any] = {"approximations": approximations, "deployment": deployment}
        return secure.compile(NextToken(gpt2_model(given)).eval(), first, calibration=others, **chosen)

    inputs = {"input_ids": torch.from_numpy(given.ids)[None]}
    return Job(name, inputs, build, lambda: torch.from_numpy(peers.decoder(name, given).expected[0])[None])


def gpt2_model(given: peers.Gpt2) -> nn.Module:
    """The peers' weights as ``transformers`` has them; GeLU and the norms' epsilon are the peers' too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    (vocabulary, width), length, layers = given.tokens.shape, len(given.positions), len(given.layers)
    sizes: dict[str, Any] = {"n_layer": layers, "n_head": given.heads, "n_embd": width, "n_positions": length}
    sizes |= {"vocab_size": vocabulary, "activation_function": "gelu", "layer_norm_epsilon": 1e-12}
    sizes |= {"attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0}
    arrays = {"wte.weight": given.tokens, "wpe.weight": given.positions}
    arrays |= {"ln_f.weight": given.norm["norm"], "ln_f.bias": given.norm["norm.bias"]}
    places = {"attn.c_proj": "output", "mlp.c_fc": "up", "mlp.c_proj": "down", "ln_1": "attention norm", "ln_2": "norm"}
    for i, layer in enumerate(given.layers):
        for kind, suffix in (("weight", ""), ("bias", ".bias")):
            joined = [layer[f"{n}{suffix}"] for n in ("query", "key", "value")]
            arrays[f"h.{i}.attn.c_attn.{kind}"] = np.concatenate(joined, -1)
            arrays |= {f"h.{i}.{place}.{kind}": layer[f"{n}{suffix}"] for place, n in places.items()}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.transformer.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    model.tie_weights()
    return model


def make(name: str, approximations: str = "default") -> Job:
    """The work of that name, the same at every call."""
    berts = dict.fromkeys(("bert-base", "bert-large", "polynomial-bert-base"), bert)
    makers = {"minilm": minilm, "deit-tiny": deit, "gpt2": gpt2, **berts}
    return makers.get(name.split()[0], operation)(name, approximations)
