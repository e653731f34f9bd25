"""Decoders generate text: the tokens are those of floating point, and a step costs what its rows cost."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secure
from benchmarks.generation import growth, step_cost
from protocols.fixedpoint import FixedPoint
from protocols.two_party import Keep, Open, Publish, Recall
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.generator import written
from secure.errors import DoesNotFit, InputTooLong, InvalidInput, InvalidProgram, UnsupportedOperation
from secure.lowering.trace import Symbol
from secure.mpc.arithmetic import split_weight_key
from secure.mpc.program import Program
from secure.operations.generation import keep_operation
from tests.helpers import run_function
from tests.test_program import compiled_encoder

transformers = pytest.importorskip("transformers")

VOCABULARY, CAPACITY, BUCKETS = 60, 28, (8, 4)
PROMPTS = ([5, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8], [59])
DEPLOYMENTS: dict[str, CircuitDeployment] = {
    "two": secure.TwoParty(),
    "three": secure.ThreeParty(),
    "three-public": secure.ThreeParty(public_weights=True),
}


def llama(**other: Any) -> Any:
    """Two query heads share each key and value head."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | other, bos_token_id=1, eos_token_id=2))


def gpt2() -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


@cache
def decoder(name: str) -> Any:
    """A decoder with weights so large that it does not say the same token for ever."""
    torch.manual_seed(3)
    model = {"llama": llama, "gpt2": gpt2}[name]().eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(15 if "wpe" in label else 5)
    return model


@cache
def compiled(name: str, deployment: str = "two") -> secure.Compiled:
    return secure.compile_generator(
        decoder(name), prompt=BUCKETS, capacity=CAPACITY, deployment=DEPLOYMENTS[deployment]
    )


def continued(model: Any, prompt: list[int], count: int) -> list[int]:
    """The tokens that floating point chooses, each from the whole text anew."""
    model, ids = model.double(), list(prompt)
    try:
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    finally:
        model.float()
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("deployment", [*DEPLOYMENTS])
def test_tokens_are_those_of_floating_point(name: str, deployment: str) -> None:
    """Twenty between two parties, eight in the deployments that run the same Program."""
    count = 20 if deployment == "two" else 8
    with secure.insecure_in_process(compiled(name, deployment)) as session:
        found = {}
        for prompt in PROMPTS:
            found[tuple(prompt)] = list(session.generate(prompt, count, ignore_end=True))
            assert found[tuple(prompt)] == continued(decoder(name), prompt, count)
            lengths = [report.length for report in session.reports[-count:]]
            assert lengths == [8 if len(prompt) > 4 else 4] + [1] * (count - 1)
    assert len({token for text in found.values() for token in text}) > 5, "the model says too little to tell"


@pytest.mark.parametrize(
    ("name", "head", "norm"), [("llama", "lm_head", "norm"), ("gpt2", "transformer.wte", "transformer.ln_f")]
)
def test_the_head_takes_the_last_normalization_behind_the_last_rows(name: str, head: str, norm: str) -> None:
    """It has the normalization's weight in its own, and the root comes late: a prompt's and a step's."""
    for size in compiled(name).sizes:
        weights = {split_weight_key(key)[0] for key in size.program.weight_shapes}
        (folded,) = (weight for weight in weights if weight.startswith(f"model.{head}.weight.T"))
        assert "*%" in folded
        assert f"model.{norm}.weight" not in weights


def test_ranges_of_the_last_normalization_are_those_of_all_rows() -> None:
    """A row before the last of calibration's is as good a witness of what another text's last row may be."""
    model, loud = copy.deepcopy(decoder("llama")), 7
    with torch.no_grad():
        direction = model.model.embed_tokens.weight[loud] / model.model.embed_tokens.weight[loud].norm()
        model.lm_head.weight.sub_(torch.outer(model.lm_head.weight @ direction, direction))  # logits stay as they are
        model.model.embed_tokens.weight[loud] *= 40
    texts = [[loud, *range(10, 10 + CAPACITY // 2)]]
    made = secure.compile_generator(model, prompt=4, capacity=CAPACITY, calibration=texts)
    with secure.insecure_in_process(made) as session:
        assert len(list(session.generate([1, 2, loud], 1, ignore_end=True))) == 1


SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
SIZES |= {
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi", "GPTNeoX", "Cohere"])
def test_other_families(family: str) -> None:
    grouped = {} if family == "GPTNeoX" else {"num_key_value_heads": 2}
    own = {"head_dim": 8} if family == "Qwen3" else {"sliding_window": None} if family == "Mistral" else {}
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**SIZES, **grouped, **own)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    made = secure.compile_generator(model, prompt=4, capacity=16)
    with secure.insecure_in_process(made) as session:
        assert list(session.generate([5, 7, 9], 8, ignore_end=True)) == continued(model, [5, 7, 9], 8)


@cache
def sampling() -> secure.Compiled:
    return secure.compile_generator(decoder("llama"), prompt=4, capacity=6, temperature=8.0)


def probabilities(prompt: list[int], temperature: float) -> Tensor:
    model = decoder("llama").double()
    try:
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([prompt])).logits[0, -1]
    finally:
        model.float()
    return torch.softmax(logits / temperature, -1)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """First ones and, given those, second ones: of a prompt and of a step."""
    prompt, count, temperature = [5, 7, 9], 75, 8.0
    with secure.insecure_in_process(sampling()) as session:
        found = [tuple(session.generate(prompt, 2, temperature=temperature, ignore_end=True)) for _ in range(count)]
    first = probabilities(prompt, temperature)
    second = {token: probabilities([*prompt, token], temperature) for token, _ in found}
    # the logarithm of the probability of what was drawn has this mean and this variance
    likely = [first, *second.values()]
    drawn, mean, variance = [], [], []
    for a, b in found:
        for p, token in ((first, a), (second[a], b)):
            drawn.append(float(p[token].log()))
            mean.append(float((p * p.log()).sum()))
            variance.append(float((p * p.log() ** 2).sum()) - mean[-1] ** 2)
    assert max(float(p.max()) for p in likely) < 0.9, "the model is too sure to tell"
    assert len(set(found)) > 20
    assert abs(sum(drawn) - sum(mean)) < 5 * sum(variance) ** 0.5
    seen = torch.bincount(torch.tensor([a for a, _ in found]), minlength=VOCABULARY)
    expected = first * count
    chi = float(((seen - expected) ** 2 / expected.clamp(min=1e-9))[expected > 5].sum())
    assert chi < 5 * max(1, int((expected > 5).sum()))


def test_at_temperature_zero_it_is_the_most_likely_token() -> None:
    with secure.insecure_in_process(sampling()) as session:
        assert list(session.generate([5, 7, 9], 3)) == continued(decoder("llama"), [5, 7, 9], 3)
        for wrong in (-1.0, 8.5, float("nan")):
            with pytest.raises(InvalidInput, match="0 to 8"):
                session.generate([5, 7, 9], 3, temperature=wrong)
    with (
        secure.insecure_in_process(compiled("llama")) as session,
        pytest.raises(InvalidInput, match="writes the most likely tokens"),
    ):
        session.generate([5, 7, 9], 3, temperature=0.5)


def test_two_texts_grow_side_by_side() -> None:
    with secure.insecure_in_process(compiled("llama")) as session:
        both = [session.generate(prompt, 6, ignore_end=True) for prompt in PROMPTS[:2]]
        found = list(zip(*both, strict=True))
    assert [list(text) for text in zip(*found, strict=True)] == [
        continued(decoder("llama"), prompt, 6) for prompt in PROMPTS[:2]
    ]


def test_it_ends_after_a_token_that_stops() -> None:
    expected = continued(decoder("llama"), PROMPTS[1], 20)
    last = expected[5]
    with secure.insecure_in_process(compiled("llama")) as session:
        found = list(session.generate(PROMPTS[1], 20, stop={last, 1000}, ignore_end=True))
        assert found == expected[: expected.index(last) + 1]
        assert len(session.reports) == len(found)


def programs(name: str) -> dict[int, Program]:
    return {int(size.program.labels["length"]): size.program for size in compiled(name).sizes}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_opens_its_own_rows_alone(name: str) -> None:
    """Keys and values are opened once, one row for each token and group, whatever the capacity."""
    step, prompt = programs(name)[1], programs(name)[8]
    assert step.rows == CAPACITY
    assert prompt.rows == 0
    heads = 2 if name == "llama" else 4
    for program, rows in ((step, 1), (prompt, 8)):
        assert sorted(program.keeps) == ["0.keys", "0.values", "1.keys", "1.values"]
        for index in program.keeps.values():
            opening = program.circuit[program.circuit[index].inputs[0]].protocol
            assert isinstance(opening, Open)
            assert opening.shape == (1, heads, rows, 8)
    rings = [{p.keeps: p.out.bits for i in x.circuit if (p := i.protocol).keeps} for x in programs(name).values()]
    assert all(each == rings[0] for each in rings)
    recalled = [i.protocol for i in step.circuit if isinstance(i.protocol, Recall)]
    assert {p.name: p.ring for p in recalled} == rings[0]


def test_bytes_grow_with_the_rows_as_they_are_predicted() -> None:
    made = secure.compile_generator(decoder("llama"), prompt=8, capacity=60)
    costs = {c.sizes[-1].program.rows: step_cost(c)["online bytes"] for c in (compiled("llama"), made)}
    less, more = costs.pop(CAPACITY), costs.pop(60)
    for program in (programs("llama")[1], made.sizes[-1].program):
        assert less + (60 - CAPACITY) * growth(program) == pytest.approx(more, rel=0.1)
        assert more - (60 - CAPACITY) * growth(program) == pytest.approx(less, rel=0.1)


def test_a_step_is_spared_the_ranges_of_a_first_token() -> None:
    """Its activations may be thousands of times larger than others, which would take wide rings and more rounds."""
    torch.manual_seed(3)
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 3000.0  # the token that begins every text
    made = secure.compile_generator(model.eval(), prompt=4, capacity=8)
    prompt, step = made.sizes[0].cost.rounds, made.sizes[-1].cost.rounds
    assert step < prompt
    with secure.insecure_in_process(made) as session:
        assert list(session.generate([1, 7, 9], 4)) == continued(model, [1, 7, 9], 4)


def test_positions_are_shown_where_places_do() -> None:
    """Rotary positions are places of the cache; a table of positions is looked up by the client, whose text begins
    where nobody sees.
    """
    for name, shown in (("llama", True), ("gpt2", False)):
        for program in programs(name).values():
            assert program.publishes == shown
            assert any(isinstance(i.protocol, Publish) for i in program.circuit) == shown


def test_a_program_that_would_show_more_is_refused() -> None:
    """Clients show what follows from positions, and nothing that follows from tokens or the mask."""
    document = json.loads(programs("llama")[1].encoded)
    shown = [c for c in document["client_inputs"] if c["encoding"] == "public"]
    assert len(shown) == 2  # cosines and sines
    Program.from_bytes(json.dumps(document).encode())
    graph = json.loads(document["client_graph"])
    names = {node["attrs"]["name"]: node for node in graph["nodes"] if node["op"] == "input"}
    names["position_ids"]["attrs"]["name"], names["input_ids"]["attrs"]["name"] = "input_ids", "position_ids"
    changed = {**document, "client_graph": json.dumps(graph)}
    with pytest.raises(InvalidProgram, match=r"cos|would make more public than position_ids"):
        Program.from_bytes(json.dumps(changed).encode())
    mask = next(c for c in document["client_inputs"] if c["encoding"] == "plain")
    mask["encoding"] = "public"
    with pytest.raises(InvalidProgram, match="would make more public than position_ids"):
        Program.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize("change", ["rows", "twice"])
def test_programs_that_keep_nonsense_are_refused(change: str) -> None:
    document = json.loads(programs("gpt2")[1].encoded)
    recalls = [fields for kind, fields, *_ in document["instructions"] if kind == "recall"]
    keeps = [fields for kind, fields, *_ in document["instructions"] if kind == "keep"]
    if change == "rows":
        recalls[0]["shape"][-2] += 1
    else:
        keeps[0]["name"] = keeps[1]["name"]
    with pytest.raises(InvalidProgram):
        Program.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("prompt", "count", "kind", "message"),
    [
        ([], 3, InvalidInput, "no token"),
        ("Once", 3, InvalidInput, "has no tokenizer"),
        ([1.5], 3, InvalidInput, "the prompt is a list"),
        ([1], 0, InvalidInput, "0 new tokens"),
        ([1] * 8, CAPACITY - 6, InvalidInput, "21 at most"),
    ],
)
def test_mistakes_are_named_at_once(prompt: Any, count: int, kind: type[Exception], message: str) -> None:
    with secure.insecure_in_process(compiled("gpt2")) as session:
        with pytest.raises(kind, match=message):
            session.generate(prompt, count)
        assert not session.reports


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [([1] * 9, InputTooLong, "9 tokens, at most 8 fit"), ([VOCABULARY], InvalidInput, "outside 0..59")],
)
def test_what_cannot_be_used_costs_a_prompt(prompt: list[int], kind: type[Exception], message: str) -> None:
    with secure.insecure_in_process(compiled("gpt2")) as session:
        with pytest.raises(kind, match=message):
            list(session.generate(prompt, 3))
        assert len(session.reports) == 1


def test_all_rows_are_used() -> None:
    with secure.insecure_in_process(compiled("gpt2")) as session:
        assert len(list(session.generate([1] * 8, CAPACITY - 7, ignore_end=True))) == CAPACITY - 7


def test_generators_answer_no_single_queries_and_others_generate_nothing() -> None:
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.int64), "position_ids": torch.arange(8)[None]}
    inputs["attention_mask"] = torch.zeros(1, 1, 8, 8)
    with (
        secure.insecure_in_process(compiled("gpt2")) as session,
        pytest.raises(InvalidInput, match="hint: use generate"),
    ):
        session.query(inputs)
    other = secure.compile(nn.Linear(3, 2), {"input": torch.ones(1, 3)})
    with (
        secure.insecure_in_process(other) as session,
        pytest.raises(InvalidInput, match="generates no text"),
    ):
        session.generate([1], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 1}, "prompts of 1 tokens"),
        ({"prompt": (8, 16), "capacity": 12}, "capacity of 12 tokens for prompts of 16"),
        ({"capacity": 64}, "63 places at most"),
        ({"calibration": [[60]]}, "integers from 0 to 59"),
        ({"temperature": 0}, "a temperature of 0 at most"),
        ({"deployment": secure.Ckks()}, "under ckks a text takes refreshes"),
    ],
)
def test_generators_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        secure.compile_generator(decoder("gpt2"), **{"prompt": 8, "capacity": 16, **options})


def test_models_that_write_nothing_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Linear generates no text"):
        secure.compile_generator(nn.Linear(2, 2))


def test_texts_to_calibrate_with_are_the_same_at_every_call() -> None:
    state = torch.random.get_rng_state()
    texts = written(decoder("gpt2"), 9)
    assert texts == written(decoder("gpt2"), 9)
    assert {len(text) for text in texts} == {9}
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_is_kept_on_disk_writes_the_same(tmp_path: Path) -> None:
    secure.save_compiled(compiled("llama"), tmp_path / "kept")
    with secure.insecure_in_process(secure.load_compiled(tmp_path / "kept")) as session:
        assert list(session.generate(PROMPTS[1], 5, ignore_end=True)) == continued(decoder("llama"), PROMPTS[1], 5)


class Squares(nn.Linear):
    """Keys that something else reads than a product."""

    def forward(self, input: Tensor) -> Tensor:
        kept: Tensor = keep_operation(super().forward(input), "keys", 0)
        return kept.square()


def test_what_is_kept_is_for_products() -> None:
    with pytest.raises(UnsupportedOperation, match="keys or values that are kept"):
        secure.compile(Squares(3, 3), {"input": torch.ones(1, 2, 3)})


@pytest.mark.parametrize(("spare", "fewer"), [(1, 1), (4, 4), (99, 8)])
def test_what_is_kept_can_do_without_fraction_bits(spare: int, fewer: int) -> None:
    """Eight bits are left. So what it is multiplied by needs no more of them."""
    torch.manual_seed(0)
    x, rings = torch.rand(2, 3, dtype=torch.float64), []
    for extra in (0, -spare):
        run = run_function(lambda x, extra=extra: x @ x.keep("keys", 0, extra).permute((1, 0)), x)
        (ring,) = (i.protocol.ring for i in run.circuit if isinstance(i.protocol, Keep))
        rings.append(ring)
    assert rings[1] == rings[0] - 2 * fewer
    assert float((run.result - x @ x.mT).abs().max()) < 6 * 2.0 ** (fewer - 16)


@pytest.mark.parametrize("bits", [15, 16, 17, 18])
def test_what_is_kept_fits_a_word_with_the_bits_that_are_dropped_before(bits: int) -> None:
    """A word may hold the ring of the product, and not with what is dropped."""
    x, y = torch.full((1, 2), 2.0**13, dtype=torch.float64), torch.full((3, 2), 16.0, dtype=torch.float64)

    def scores(x: Symbol, y: Symbol) -> Symbol:
        return x.precise_product(x, -4) @ y.keep("keys", 0, -4).permute((1, 0))

    given = FixedPoint(fraction_bits=bits)
    if bits <= 16:
        # what is kept has bits - 4 fraction bits, and each of its entries may be a unit more
        assert torch.allclose(run_function(scores, x, y, fixed_point=given).result, x**2 @ y.mT, rtol=2.0**-bits)
    else:
        with pytest.raises(DoesNotFit, match=r"a product of 6[13] bits, and 4 of which an operand is rounded before"):
            run_function(scores, x, y, fixed_point=given)


@pytest.mark.parametrize("approximations", ["default", "puma"])
def test_a_step_of_long_rows_and_a_short_prompt_are_one_model(approximations: str) -> None:
    """Above 540 scores the reciprocal of a row's sum has another form: then all sizes have it."""
    torch.manual_seed(3)
    model = llama(num_hidden_layers=1, max_position_embeddings=1024).eval()
    texts = torch.randint(VOCABULARY, (2, 600)).tolist()
    made = secure.compile_generator(model, prompt=4, capacity=600, calibration=texts, approximations=approximations)
    with secure.insecure_in_process(made) as session:
        assert list(session.generate([1, 7, 9], 3, ignore_end=True)) == continued(model, [1, 7, 9], 3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_programs_are_read_without_the_compiler_of_torch(name: str) -> None:
    """It takes seconds, and torch imports it for operations that it has in Python on the device "meta"."""
    code = """
import sys
from secure.mpc.program import Program
for line in sys.stdin.buffer:
    Program.from_bytes(line)
assert "torch._dynamo" not in sys.modules
"""
    programs = [size.program.encoded for size in compiled(name).sizes] + [compiled_encoder().program.encoded]
    ran = subprocess.run([sys.executable, "-c", code], input=b"\n".join(programs), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:].decode()
