"""Programs: encoding, refusal of what does not hold together, and models under the protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from protocols import ring
from protocols.circuit import Correlations, execute, total_cost
from protocols.flow import Instruction
from protocols.protocol import CLIENT
from protocols.steps import pack_frame
from protocols.two_party import Input, Linear, Open, Reveal
from protocols.weights import ServerWeights
from secure import (
    Compiled,
    FixedPoint,
    InvalidInput,
    InvalidProgram,
    OutOfRange,
    Program,
    insecure_in_process,
    plain_reference,
)
from secure.models.sentence_encoder import SentenceEncoder
from secure.mpc import program as program_module
from tests.helpers import key

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


class Classifier(nn.Module):
    """GeLU, LayerNorm and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.last(self.norm(F.gelu(self.first(x)) + self.first(x))) * 1.5, -1)


def points(rows: int, seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)}


@cache
def classifier(rows: int = 4) -> tuple[nn.Module, Compiled]:
    torch.manual_seed(1)
    model = Classifier().eval()
    return model, secure.compile(model, points(rows, 0), calibration=[points(rows, s) for s in range(1, 20)])


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs)
    return out.to(torch.float64)


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@cache
def encoder(pooling: str = "mean") -> SentenceEncoder:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 40}
    settings: dict[str, Any] = {**sizes, "initializer_range": 0.3, "attn_implementation": "eager"}
    configuration = transformers.BertConfig(**settings)
    return SentenceEncoder(transformers.BertModel(configuration).eval(), pooling=pooling)


def sentences(seed: int, *, lengths: tuple[int, int] = (5, 8)) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(2, 8, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@cache
def compiled_encoder(embedding: str = "one-hot") -> Compiled:
    calibration = [sentences(s, lengths=(1 + s % 8, 8)) for s in range(1, 12)]
    return secure.compile(encoder(), sentences(0), calibration=calibration, embedding=embedding)


def with_program(compiled: Compiled, program: Program) -> Compiled:
    """The same weights under another Program."""
    return dataclasses.replace(compiled, model=dataclasses.replace(compiled.model, program=program))


# encoding


def test_encoding_round_trip() -> None:
    program = classifier()[1].program
    again = Program.from_bytes(program.encoded)
    assert again.encoded == program.encoded
    assert again.digest == program.digest == hashlib.sha256(program.encoded).hexdigest()
    assert [i.protocol for i in again.circuit] == [i.protocol for i in program.circuit]
    for field in dataclasses.fields(Program):
        assert getattr(again, field.name) == getattr(program, field.name), field.name
    assert again.cost == program.cost
    assert again.weight_rings == program.weight_rings
    assert again.outputs == program.outputs != ()


def test_a_decoded_program_computes_the_same() -> None:
    _, compiled = classifier()
    decoded = with_program(compiled, Program.from_bytes(compiled.program.encoded))
    inputs = points(4, 77)
    assert torch.equal(plain_reference(decoded, inputs), plain_reference(compiled, inputs))
    result = insecure_in_process(decoded).query(inputs)
    assert largest(result - answer(classifier()[0], inputs)) < 5e-3


def test_a_program_holds_no_weights() -> None:
    compiled = classifier()[1]
    text = compiled.program.encoded.decode()
    for integers in compiled.model.integers.values():
        if len(set(integers.flatten().tolist())) > 1:  # LayerNorm's first weight and bias are all ones and zeros
            assert json.dumps(integers.flatten()[:4].tolist(), separators=(",", ":"))[1:-1] not in text


def test_a_compiled_model_shows_no_weights() -> None:
    compiled = classifier()[1]
    for held in (compiled, compiled.model):
        assert repr(held) == object.__repr__(held)
        assert str(held) == object.__repr__(held)


def test_two_compilations_have_one_digest() -> None:
    first = classifier()[1]
    torch.manual_seed(1)
    again = secure.compile(Classifier().eval(), points(4, 0), calibration=[points(4, s) for s in range(1, 20)])
    assert again.program.digest == first.program.digest
    assert again.model.weights_digest == first.model.weights_digest
    assert again.program.labels == {
        "embedding": "one-hot",
        "gelu": "cubic",
        "approximations": "default",
        "ranges": "calibrated",
    }


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from tests.test_program import classifier; c = classifier()[1]\n"
        "print(c.program.digest, c.model.weights_digest)"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    compiled = classifier()[1]
    assert run.stdout.split() == [compiled.program.digest, compiled.model.weights_digest]


def test_digests_tell_programs_and_weights_apart() -> None:
    compiled = classifier()[1]
    torch.manual_seed(1)
    model, calibration = Classifier().eval(), [points(4, s) for s in range(1, 20)]

    def again(**settings: Any) -> Compiled:
        return secure.compile(model, points(4, 0), calibration=calibration, **settings)

    other_form, other_scale = again(gelu="quartic"), again(fixed_point=FixedPoint(15))
    assert len({c.program.digest for c in (compiled, other_form, other_scale)}) == 3
    assert other_form.model.weights_digest == compiled.model.weights_digest
    with torch.no_grad():
        model.first.weight[0, 0] += 1e-3
    assert again().model.weights_digest != compiled.model.weights_digest


def test_length_and_batch_share_weights() -> None:
    one, four = classifier(1)[1], classifier(4)[1]
    assert one.program.digest != four.program.digest
    assert one.model.weights_digest == four.model.weights_digest


def test_cost_and_paths() -> None:
    program = classifier()[1].program
    assert program.cost == total_cost(program.circuit)
    assert program.failure_bound == 0.0
    assert {"first", "norm", "last"} <= set(program.paths)
    assert len(program.paths) == len(program.circuit)
    rings = [i.protocol.ring for i in program.circuit if isinstance(i.protocol, Linear)]
    assert max(rings) == max(program.weight_rings.values()) <= 64


# refusals


def document() -> Any:
    return json.loads(classifier()[1].program.encoded)


def find(d: Any, kind: str) -> Any:
    return next(i for i in d["instructions"] if i[0] == kind)


def position(d: Any, kind: str) -> int:
    return next(n for n, i in enumerate(d["instructions"]) if i[0] == kind)


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Set document[a][b]... = value; "kind:open" finds the first such instruction."""

    def apply(d: Any) -> None:
        *way, last = path.split("/")
        for step in way:
            if step.startswith("kind:"):
                d = find(d, step[5:])
            else:
                d = d[int(step)] if isinstance(d, list) else d[step]
        if isinstance(d, list):
            d[int(last)] = value
        else:
            d[last] = value

    return apply


def remove(key: str) -> Callable[[Any], None]:
    return lambda d: d.pop(key)


TAMPERED: dict[str, Callable[[Any], Any]] = {
    "version": change("version", 3),
    "version text": change("version", "4"),
    "no version": remove("version"),
    "no circuit": remove("instructions"),
    "no paths": remove("paths"),
    "no client graph": remove("client_graph"),
    "no weight shapes": remove("weight_shapes"),
    "no labels": remove("labels"),
    "empty circuit": change("instructions", []),
    "unknown protocol": change("kind:open/0", "openly"),
    "the base class": change("kind:open/0", "Protocol"),
    "a kind that is no text": change("kind:open/0", ["open"]),
    "missing field": lambda d: find(d, "open")[1].pop("ring"),
    "extra field": change("kind:open/1/more", 1),
    "fields of another protocol": lambda d: find(d, "open").__setitem__(1, find(d, "truncate")[1]),
    "text for a number": change("kind:open/1/ring", "many"),
    "fraction for a number": change("kind:open/1/ring", 20.5),
    "nothing for a number": change("kind:open/1/ring", None),
    "a number for a shape": change("kind:open/1/shape", 5),
    "reads itself": lambda d: d["instructions"][3].__setitem__(2, [3]),
    "reads a later one": lambda d: d["instructions"][3].__setitem__(2, [4]),
    "reads before the first": lambda d: d["instructions"][3].__setitem__(2, [-1]),
    "a text as operand": lambda d: d["instructions"][3].__setitem__(2, ["x"]),
    "too wide a ring": change("kind:open/1/ring", 65),
    "no ring": change("kind:open/1/ring", 0),
    "a negative ring": change("kind:deliver/1/ring", -8),
    "a huge shape": change("kind:open/1/shape", [1 << 20, 1 << 20]),
    "a huge dimension": change("kind:reveal/1/shape", [1 << 62]),
    "a negative shape": change("kind:open/1/shape", [4, -6]),
    "two negative dimensions": change("kind:open/1/shape", [-4, -6]),
    "extends to less": change("kind:extend/1/wide", 3),
    "truncates everything": change("kind:truncate/1/shift", 64),
    "too large an exponent": change("kind:exponential/1/fraction", 4),
    "an exponential of a huge mask scale": change("kind:exponential/1/mask_fraction", 5000),
    "an exponential of a mask scale too large": change("kind:exponential/1/mask_fraction", 41),
    "an exponential of no mask scale": change("kind:exponential/1/mask_fraction", 0),
    "an exponential of a negative mask scale": change("kind:exponential/1/mask_fraction", -70),
    "an exponential of a huge public scale": change("kind:exponential/1/public_fraction", 5000),
    "an exponential of a public scale too large": change("kind:exponential/1/public_fraction", 21),
    "an exponential of no public scale": change("kind:exponential/1/public_fraction", 0),
    "an exponential of a negative scale": change("kind:exponential/1/fraction", -1),
    "an exponential of two to the sixty entries": lambda d: find(d, "exponential")[1].update(ring=64, fraction=60),
    "an exponential without a number": change("kind:exponential/1/ring", 1),
    "output out of range": change("outputs/0/1", 10**6),
    "output before the first": change("outputs/0/1", -1),
    "output is no Reveal": change("outputs/0/1", 0),
    "no output": change("outputs/0/1", None),
    "an infinite output": change("outputs/0/1", math.inf),
    "an output that is no number": change("outputs/0/1", math.nan),
    "no outputs": change("outputs", []),
    "two outputs of one name": lambda d: d["outputs"].append(d["outputs"][0]),
    "a Reveal that is no output": lambda d: d["instructions"].append(d["instructions"][d["outputs"][0][1]]),
    "outputs of another form": change("outputs", 3),
    "an infinite operand": lambda d: d["instructions"][3].__setitem__(2, [math.inf]),
    "an input without a lower end": change("kind:input/1/low", -math.inf),
    "an input without an upper end": change("kind:input/1/high", math.inf),
    "an input above what is no number": change("kind:input/1/low", math.nan),
    "an input below what is no number": change("kind:input/1/high", math.nan),
    "an input of an empty range": lambda d: find(d, "input")[1].update(low=5.0, high=-5.0),
    "an input of a huge scale": change("kind:input/1/fraction", 5000),
    "an input of a negative scale": change("kind:input/1/fraction", -5000),
    "a weight of negative size": lambda d: d["weight_shapes"].update(more=[-1]),
    "a weight of two negative sizes": lambda d: d["weight_shapes"].update(more=[-1, -8]),
    "a weight of no size": lambda d: d["weight_shapes"].update(more=[0]),
    "a weight that is too large": lambda d: d["weight_shapes"].update(more=[1 << 62]),
    "a weight whose size overflows": lambda d: d["weight_shapes"].update(more=[1 << 32, 1 << 32]),
    "a weight of infinite size": lambda d: d["weight_shapes"].update(more=[math.inf]),
    "fixed point out of range": change("fixed/fraction_bits", 40),
    "unknown fixed point": change("fixed/other", 1),
    "an unknown weight": change("kind:linear/1/weight", "nobody"),
    "an unknown input": change("kind:input/1/name", "nobody"),
    "an input without encoding": change("client_inputs/0/name", "nobody"),
    "an input that is no output": change("client_inputs/0/output", 7),
    "an input with a wrong type": change("client_inputs/0/output", "zero"),
    "no inputs": change("client_inputs", []),
    "a path out of range": lambda d: d["instructions"][3].__setitem__(3, 10**6),
    "three parts": lambda d: d["instructions"][3].pop(),
    "a graph that is none": change("client_graph", "{}"),
    "a graph with what JSON cannot write": lambda d: d.__setitem__(
        "client_graph", d["client_graph"].replace('"attrs":{', '"attrs":{"more":Infinity,')
    ),
    "a graph with an unknown operation": lambda d: d.__setitem__(
        "client_graph", d["client_graph"].replace('"op":"input"', '"op":"system"')
    ),
}

MISFITS: dict[str, Callable[[Any], Any]] = {
    # operands' number and shapes, and fields beyond their types
    "a mask smaller than its secret": change("kind:deliver/1/shape", [1]),
    "an opening of another shape": change("kind:open/1/shape", [2, 2]),
    "too few operands": lambda d: find(d, "add")[2].pop(),
    "too many operands": lambda d: find(d, "open")[2].append(0),
    "bits where a share is read": lambda d: (
        d["instructions"].insert(
            d["outputs"][0][1], ["open", {"shape": [4, 5], "ring": 20}, [position(d, "open_bits")], 0]
        )
        or change("outputs/0/1", d["outputs"][0][1] + 1)(d)
    ),
    "too wide a comparison": change("kind:compare/1/width", 65),
    "a negative drop": change("kind:compare/1/drop", -3),
    "no thresholds": change("kind:compare/1/thresholds", []),
    "no coefficients": change("kind:polynomial/1/coefficients", []),
    "a negative shift": change("kind:truncate/1/shift", -1),
    "slopes without offsets": change("kind:select/1/offsets", []),
    "a dimension out of range": change("kind:sum/1/dims", [9]),
    "an unknown input encoding": change("client_inputs/0/encoding", "telepathy"),
    "an output counted from the end": change("client_inputs/0/output", -1),
    "a weight of another shape": lambda d: d["weight_shapes"].update({find(d, "linear")[1]["weight"]: [3, 3]}),
    "an absurd scale": change("outputs/0/2", -(10**6)),
}


def tampered(how: Callable[[Any], Any]) -> bytes:
    d = document()
    before = json.dumps(d)
    how(d)
    assert json.dumps(d) != before
    return json.dumps(d).encode()


@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_programs_are_refused(how: str) -> None:
    with pytest.raises(InvalidProgram):
        Program.from_bytes(tampered(TAMPERED[how]))


@pytest.mark.parametrize("how", MISFITS)
def test_programs_whose_parts_do_not_fit_are_refused(how: str) -> None:
    with pytest.raises(InvalidProgram):
        Program.from_bytes(tampered(MISFITS[how]))


@pytest.mark.parametrize("encoded", [b"", b"{}", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{", b'{"version": 4}'])
def test_what_is_no_program_is_refused(encoded: bytes) -> None:
    with pytest.raises(InvalidProgram):
        Program.from_bytes(encoded)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidProgram):
        Program.from_bytes(b"[" * 100_000)


def test_no_program_makes_a_client_send_two_numbers_under_one_mask() -> None:
    """The first frame of a client that follows a Program whose first opening has the shape (1,)."""
    secret = {"x": torch.tensor([3, 10, -5, 90])}
    circuit = [
        Instruction(Input(shape=(4,), ring=32, name="x", fraction=0, low=-100.0, high=100.0)),
        Instruction(Open(shape=(1,), ring=32), (0,)),
    ]
    step = execute(circuit, [1], CLIENT, Correlations(CLIENT, key()), ServerWeights({}), secret)
    try:
        frame = pack_frame(next(step))
    except ValueError:
        return
    sent = torch.frombuffer(bytearray(frame), dtype=torch.int32).to(torch.int64)
    assert not torch.equal(sent[1:] - sent[:-1], secret["x"][1:] - secret["x"][:-1])


def test_a_client_graph_that_makes_inputs_of_another_shape_is_noticed() -> None:
    """When the Program is decoded, and again in a query: compiled loops trust the shape that the circuit names."""
    (one, four) = (classifier(rows)[1] for rows in (1, 4))
    for circuit, graph, rows in ((one, four, 4), (four, one, 1)):
        mixed = dataclasses.replace(circuit.program, client_graph=graph.program.client_graph)
        with pytest.raises(InvalidProgram, match=rf"it is made from \({rows}, 6\)"):
            Program.from_bytes(mixed.encoded)
        process = insecure_in_process(with_program(circuit, mixed))
        with pytest.raises(ValueError, match=rf"has shape \({rows}, 6\), the Program is made for"):
            process.query(points(rows, 5))


# bounds before memory


def outputs_of_one_reveal(d: Any, count: int) -> None:
    """As many names of one result, however large it is."""
    d["outputs"] = [[str(n), *d["outputs"][0][1:]] for n in range(count)]


def graph_with(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def apply(d: Any) -> None:
        graph = json.loads(d["client_graph"])
        change(graph)
        d["client_graph"] = json.dumps(graph, sort_keys=True, separators=(",", ":"))

    return apply


def constant(*shape: int) -> dict[str, Any]:
    """A node whose value is one number everywhere, so that it is short to write and may be large to hold."""
    node = {"op": "constant", "inputs": [], "attrs": {"dtype": "float", "fill": 1.0}, "shape": shape}
    return {**node, "dtype": "float", "visibility": "public", "path": ""}


def constants(count: int, *shape: int) -> Callable[[Any], None]:
    return graph_with(lambda g: g["nodes"].extend({**constant(*shape), "id": 1 + n} for n in range(count)))


def text(length: str) -> Callable[[Any], None]:
    """A model of texts: of the shape (1, 6)."""
    return lambda d: d["labels"].update(length=length)


MANY = "1025 outputs of 20500 elements, clients decode 1024"
LARGE = "more than 1073741824 elements|less than or equal to 1073741824"
TOTAL = "the client's graph has .* elements, clients compute 67108864 at most"
NO_LENGTH = "the label length is .*, no number of tokens from 1 to 1048576"


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (4, lambda d: outputs_of_one_reveal(d, 1025), MANY),
        (4, lambda d: outputs_of_one_reveal(d, 100_000), "100000 outputs"),
        (4, constants(1, 1 << 40), LARGE),
        (4, constants(1, 1 << 62, 1 << 62), LARGE),
        (4, constants(1, (1 << 30) + 1), LARGE),
        (4, constants(2, 1 << 25), TOTAL),
        (4, graph_with(lambda g: g["nodes"][0].update(shape=[1 << 20, 1 << 20])), LARGE),
        (4, change("client_inputs/0/shape", [4, 7]), r"has the shape \(4, 7\), it is made from \(4, 6\)"),
        (4, change("client_inputs/0/size", 9), "looks up 9 rows of the table ''"),
        (4, change("client_inputs/0/encoding", "one-hot"), "looks up 0 rows"),
        *((1, text(n), NO_LENGTH) for n in ("1000000000000", "", "0", "-6", "six", "6.0", "06", " 6", "٦", "9" * 500)),
        (1, text("9" * 9000), "the label length has more than 512 characters"),
        (1, text("7"), "the label length is 7, the client's input 'x' has 6 tokens"),
        (1, text("1048577"), NO_LENGTH),
    ],
)
def test_what_would_take_too_much_is_refused_before_it_is_made(
    rows: int, change: Callable[[Any], Any], message: str
) -> None:
    d = json.loads(classifier(rows)[1].program.encoded)
    change(d)
    encoded = json.dumps(d).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidProgram, match=message):
        Program.from_bytes(encoded)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # in KiB


def test_the_most_that_is_allowed() -> None:
    d = document()
    outputs_of_one_reveal(d, 1024)
    assert len(Program.from_bytes(json.dumps(d).encode()).outputs) == 1024
    d = json.loads(classifier(1)[1].program.encoded)
    text("6")(d)
    assert Program.from_bytes(json.dumps(d).encode()).labels["length"] == "6"


def test_outputs_of_one_large_reveal_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    d = document()
    monkeypatch.setattr(program_module, "MAXIMUM_ELEMENTS", 20_000)  # every output has 4 times 5
    outputs_of_one_reveal(d, 1000)
    Program.from_bytes(json.dumps(d).encode())
    outputs_of_one_reveal(d, 1001)
    with pytest.raises(InvalidProgram, match="1001 outputs of 20020 elements, clients decode 1024 of 20000 at most"):
        Program.from_bytes(json.dumps(d).encode())


def test_other_versions_are_named() -> None:
    with pytest.raises(InvalidProgram, match=r"has version 3, this is 4\nhint: whoever made it is to update"):
        Program.from_bytes(tampered(TAMPERED["version"]))
    with pytest.raises(InvalidProgram, match=r"has version 9, this is 4\nhint: update unseen on this side"):
        Program.from_bytes(tampered(lambda d: d.update(version=9)))


# models


def test_a_model_with_gelu_layernorm_and_softmax() -> None:
    model, compiled = classifier()
    process = insecure_in_process(compiled)
    for seed in range(100, 110):
        inputs = points(4, seed)
        expected = answer(model, inputs)
        result = process.query(inputs)
        report = process.reports[-1]
        assert result.shape == expected.shape
        assert result.dtype == torch.float64
        assert largest(result - expected) < 5e-3
        assert largest(plain_reference(compiled, inputs) - expected) < 5e-3
        assert (report.rounds, report.traffic) == (compiled.cost.rounds, compiled.cost.traffic)


def test_two_queries_share_nothing_but_the_answer() -> None:
    process, inputs = insecure_in_process(classifier()[1]), points(4, 5)
    first, second = process.query(inputs), process.query(inputs)
    assert largest(first - second) < 2e-3


@pytest.mark.parametrize("gelu", ["cubic", "quartic", "puma"])
def test_forms_of_gelu(gelu: str) -> None:
    torch.manual_seed(1)
    model = Classifier().eval()
    compiled = secure.compile(model, points(4, 0), calibration=[points(4, s) for s in range(1, 20)], gelu=gelu)
    assert compiled.program.labels["gelu"] == gelu
    inputs = points(4, 200)
    assert largest(insecure_in_process(compiled).query(inputs) - answer(model, inputs)) < 5e-2


@needs_transformers
@pytest.mark.parametrize("embedding", ["one-hot", "client-table"])
def test_encoders(embedding: str) -> None:
    compiled = compiled_encoder(embedding)
    process = insecure_in_process(compiled)
    assert Program.from_bytes(compiled.program.encoded).digest == compiled.program.digest
    for seed, lengths in ((50, (8, 8)), (51, (1, 8)), (52, (3, 5))):
        inputs = sentences(seed, lengths=lengths)
        expected = answer(encoder(), inputs)
        result = process.query(inputs)
        report = process.reports[-1]
        plain = plain_reference(compiled, inputs)
        assert float(F.cosine_similarity(result, expected).min()) > 0.9999
        assert float(F.cosine_similarity(plain, expected).min()) > 0.9999
        assert largest(result - plain) < 5e-3
        assert (report.rounds, report.traffic) == (compiled.cost.rounds, compiled.cost.traffic)


@needs_transformers
def test_embeddings_agree() -> None:
    inputs = sentences(60)
    one_hot, table = (insecure_in_process(compiled_encoder(e)).query(inputs) for e in ("one-hot", "client-table"))
    assert largest(one_hot - table) < 5e-3
    assert compiled_encoder("client-table").client_tables.keys() == {"encoder.embeddings.word_embeddings.weight"}
    assert not compiled_encoder("one-hot").client_tables
    assert compiled_encoder("client-table").program.cost.to_first < compiled_encoder("one-hot").program.cost.to_first


@needs_transformers
def test_token_ids_out_of_range_are_refused() -> None:
    inputs = sentences(60)
    inputs["input_ids"][0, 0] = 50
    for embedding in ("one-hot", "client-table"):
        with pytest.raises(ValueError, match=r"outside 0\.\.49\nhint: "):
            insecure_in_process(compiled_encoder(embedding)).query(inputs)


@needs_transformers
def test_calibration_without_padding_is_refused() -> None:
    """How far down a mask must go is unknown when it was never on."""
    full = (8, 8)
    with pytest.raises(ValueError, match="zero in every calibration input"):
        secure.compile(
            encoder(), sentences(0, lengths=full), calibration=[sentences(s, lengths=full) for s in range(1, 12)]
        )


def test_inputs_are_clamped_to_what_their_ring_holds() -> None:
    program = classifier()[1].program
    (protocol,) = (i.protocol for i in program.circuit if isinstance(i.protocol, Input))
    with pytest.raises(OutOfRange, match=r"an input of shape \(4, 6\) has numbers beyond"):
        program.client_values({"x": torch.full((4, 6), 1e6)}, {})
    values = dataclasses.replace(program, watched=None).client_values({"x": torch.full((4, 6), 1e6)}, {})
    (encoded,) = values.values()
    assert largest(ring.decode(encoded, protocol.ring, protocol.fraction)) == pytest.approx(protocol.high)
    assert [type(program.circuit[i].protocol) for i in program.revealed] == [Reveal, Reveal]


@pytest.mark.slow
def test_two_thousand_queries_are_never_wrong() -> None:
    """2,000 random inputs in 100 queries, each query with keys of its own: no wrap, no outlier."""
    rows = 20
    torch.manual_seed(1)
    model = Classifier().eval()
    compiled = secure.compile(model, points(rows, 0), calibration=[points(rows, s) for s in range(1, 100)])
    process = insecure_in_process(compiled)
    worst = 0.0
    for seed in range(1000, 1100):
        inputs = points(rows, seed)
        result = process.query(inputs)
        worst = max(worst, largest(result - answer(model, inputs)))
    assert worst < 5e-3


@pytest.mark.slow
@needs_transformers
def test_encoders_are_never_wrong() -> None:
    process = insecure_in_process(compiled_encoder())
    for seed in range(300, 400):
        inputs = sentences(seed, lengths=(1 + seed % 8, 1 + seed // 8 % 8))
        result = process.query(inputs)
        assert float(F.cosine_similarity(result, answer(encoder(), inputs)).min()) > 0.999


@pytest.mark.parametrize(
    ("model", "example", "options", "message"),
    [
        (lambda x: x, {"x": torch.ones(1, 2)}, {}, "the model is a function, not a torch.nn.Module"),
        (None, torch.ones(1, 2), {}, "inputs are a Tensor, not a mapping from parameter names to tensors"),
        (None, {"x": [1.0]}, {}, "the input 'x' is a list, not a tensor"),
        (None, {"x": torch.tensor([[float("nan")] * 6] * 4)}, {}, "the input 'x' holds values that are no number"),
        (None, {"x": torch.ones(4, 6)}, {"calibration": [torch.ones(4, 6)]}, "not a mapping"),
        (None, {"x": torch.ones(4, 6)}, {"deployment": "two-party"}, "the deployment is 'two-party'"),
    ],
)
def test_first_mistakes_are_named(model: Any, example: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        secure.compile(model or Classifier().eval(), example, **options)


def test_an_input_that_is_no_number_is_refused() -> None:
    with insecure_in_process(classifier()[1]) as session, pytest.raises(InvalidInput, match="no number"):
        session.query({"x": torch.full((4, 6), float("nan"))})
