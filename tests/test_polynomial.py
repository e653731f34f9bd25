"""Forms without comparisons: inverse powers, Power-Softmax, the modules, their training, and their Programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import secure
from approximations import choose, power, power_attend, power_scores
from approximations.fits import least_squares, minimax
from approximations.powers import power_error, steps_for
from protocols.fixedpoint import FixedPoint
from protocols.two_party import Tabulated
from secure.errors import Diverged, RangeLost
from secure.frontend import Size, lower_model
from secure.models.digits import DigitsModel
from secure.models.sentence_encoder import load_sentence_encoder, load_tokenizer
from secure.models.text import text_inputs
from secure.mpc.compile import compile_sizes
from secure.mpc.powers import tabulated_power
from secure.polynomial.forms import PolynomialActivation, PolynomialNorm, PowerAttention, forms, freeze_untrained
from secure.polynomial.operations import power_operation
from secure.polynomial.recipe import Recipe
from secure.polynomial.swap import polynomialize
from secure.training.sentences import Collate, agreement_of, words
from secure.training.trainer import Settings, Trainer
from tests.helpers import run_function
from tests.tiny import LENGTH, sentences, write_model

COMPARING = {"compare", "digit_in", "histogram", "indicators", "select", "open_bits", "exponential"}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([-1.0, -0.5]), st.floats(1e-3, 1e2), st.floats(1.5, 60.0), st.integers(1, 3), st.integers(0, 2))
def test_inverse_powers_within_their_bound(exponent: float, low: float, spread: float, degree: int, steps: int) -> None:
    x = torch.linspace(low, low * spread, 501, dtype=torch.float64)
    bound = power_error(exponent, degree, low, low * spread, steps)
    relative = power(x, exponent, low, low * spread, degree, steps, scale=3.0) / (3.0 * x**exponent) - 1
    assert float(relative.abs().max()) <= bound * 1.01 + 1e-9


FORMS = (
    *((-1.0, 3, spread, steps) for spread, steps in ((1.5, 1), (30.0, 1), (100.0, 2))),
    *((-0.5, 3, spread, steps) for spread, steps in ((2.0, 1), (40.0, 1), (100.0, 2), (200.0, 2))),
    *((-1.0, 1, 8.0, 2), (-0.5, 2, 12.0, 1)),
)


@pytest.mark.parametrize("fraction_bits", [12, 16])
@pytest.mark.parametrize(("exponent", "degree", "spread", "steps"), FORMS)
def test_a_table_is_of_the_corrected_polynomial(
    exponent: float, degree: int, spread: float, steps: int, fraction_bits: int
) -> None:
    """It agrees with the polynomial itself, for which a model was trained, and not only with the power."""
    low, high = 0.11, 0.11 * spread
    x = torch.cat([low * spread ** torch.linspace(0, 1, 500), torch.linspace(low, high, 500)]).double().clamp(low, high)
    x = torch.round(x * 2.0**fraction_bits) / 2.0**fraction_bits  # what the shares hold
    form = (exponent, low, high, degree, steps, 3.0)
    run = run_function(lambda v: tabulated_power(v, *form), x, fixed_point=FixedPoint(fraction_bits=fraction_bits))
    exact = torch.as_tensor(power(x, *form))
    assert torch.equal(run.floating, exact)
    assert torch.equal(torch.as_tensor(tabulated_power(x, *form)), exact)
    (table,) = (i.protocol for i in run.circuit if isinstance(i.protocol, Tabulated))
    units = 1 + (table.degree + 2) / 4  # of truncation, and half a unit of every coefficient, with a guard bit
    error = 2.0**-15 * exact + units * 2.0**-fraction_bits
    for value in (run.result, run.fixed):
        assert float(((value - exact).abs() / error).max()) <= 1
    assert run.cost.rounds == 2  # the opening, the answer
    kinds = [i.protocol.kind for i in run.circuit]
    assert kinds.count("open") == 1
    assert not set(kinds) & COMPARING


def test_a_table_of_the_power_would_be_another_model() -> None:
    """A usual recipe allows a relative error of 0.3, which training compensates."""
    x = torch.linspace(0.2, 20.0, 500, dtype=torch.float64)
    form = (-1.0, 0.2, 20.0, 3, 1)
    run = run_function(lambda v: tabulated_power(v, *form), x)
    assert float((run.result * x - 1).abs().max()) > 0.25
    assert float((run.result / torch.as_tensor(power(x, *form)) - 1).abs().max()) < 1e-3


def test_a_table_where_it_spares_rounds() -> None:
    """A start without corrections is one opening already, and a range may be too wide for a table."""
    for spread, degree, steps in ((8.0, 3, 0), (900.0, 3, 4), (100.0, 1, 4)):
        form = (-1.0, 0.5, 0.5 * spread, degree, steps)
        x = torch.linspace(0.5, 0.5 * spread, 50, dtype=torch.float64)
        run = run_function(lambda v, form=form: tabulated_power(v, *form), x)
        kinds = {i.protocol.kind for i in run.circuit}
        assert "tabulated" not in kinds
        assert not kinds & COMPARING


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([-1.0, -0.5]), st.floats(-4, 4), st.floats(1.02, 300.0), st.integers(1, 3), st.floats(1e-4, 0.5))
def test_whatever_is_tabulated_has_a_table(
    exponent: float, low: float, spread: float, degree: int, error: float
) -> None:
    """The table is chosen before the fraction bits are known: compilation never refuses it afterwards."""
    least = 2.0**low
    try:
        steps = max(1, steps_for(exponent, degree, least, least * spread, error))
    except ValueError:
        return
    form = (exponent, least, least * spread, degree, steps)
    x = torch.tensor([least, least * spread], dtype=torch.float64)
    for bits in (8, 12, 16, 20):
        run_function(lambda v: tabulated_power(v, *form, few=True), x, fixed_point=FixedPoint(fraction_bits=bits))


class Inverses(nn.Module):
    """Inverses of what a layer gives, one a row."""

    def __init__(self, high: float) -> None:
        super().__init__()
        self.layer, self.high = nn.Linear(1, 1, bias=False), high
        nn.init.ones_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = power_operation(self.layer(x), -1.0, 0.1, self.high, 3, 2)
        return out


@pytest.mark.parametrize(("high", "rows", "tables"), [(8.0, 300, 1), (16.0, 256, 1), (16.0, 257, 0)])
def test_few_values_have_larger_tables(high: float, rows: int, tables: int) -> None:
    """That of a wide range takes more than half of the coefficients that a table may have."""
    x = torch.linspace(0.2, 7.9, rows)[:, None]
    model = Inverses(high)
    compiled = secure.compile(model, {"x": x})
    kinds = [i.protocol.kind for i in compiled.program.circuit]
    assert kinds.count("tabulated") == tables
    with secure.insecure_in_process(compiled) as session:
        assert float((session.query({"x": x}) / model(x).detach() - 1).abs().max()) < (0.01 if tables else 0.1)


class Rows(Inverses):
    """Inverses that lie side by side in a row."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = power_operation(self.layer(x[..., None]).squeeze(-1), -1.0, 0.1, self.high, 3, 2)
        return out


def test_all_sizes_have_tables_or_none() -> None:
    """The largest size decides, so that all compute alike."""
    given = [{"x": torch.linspace(0.2, 7.9, length)[None]} for length in (200, 300)]
    made = compile_sizes(Rows(16.0), [(Size(sample, [sample]), {}) for sample in given])
    assert [sum(i.protocol.kind == "tabulated" for i in each.program.circuit) for each in made] == [0, 0]


@pytest.mark.parametrize("spread", [4.0, 8.0, 16.0, 40.0])
def test_the_reciprocal_fit_is_the_chebyshev_optimum(spread: float) -> None:
    """min max |1 - x p(x)| over cubics is 1 / T_4((k + 1) / (k - 1)) on [1, k]."""
    z = (spread + 1) / (spread - 1)
    optimum = 1 / (8 * z**4 - 8 * z**2 + 1)
    _, error = minimax(lambda x: 1 / x, 1.0, spread, 3, relative=True)
    assert error == pytest.approx(optimum, rel=1e-3)


def test_corrections_are_as_many_as_it_takes() -> None:
    assert steps_for(-0.5, 3, 0.5, 2.0, 0.01) == 0
    assert power_error(-1.0, 3, 0.2, 5.0, steps_for(-1.0, 3, 0.2, 5.0, 1e-4)) <= 1e-4
    with pytest.raises(ValueError, match="range loss"):
        steps_for(-1.0, 3, 1e-4, 1e4, 1e-4)


def test_least_squares_is_exact_where_it_can_be() -> None:
    x = torch.linspace(-3, 2, 101)
    piece, error = least_squares(lambda v: 2 - v + 3 * v**2, x, 2)
    assert error < 1e-9
    assert piece.coefficients == pytest.approx((2.0, -1.0, 3.0))


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_powers_of_scores(p: int, shift: float) -> None:
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    wanted = (1 + x / shift) ** p if shift else x**p
    assert torch.allclose(torch.as_tensor(power_scores(x, p, shift)), wanted, rtol=1e-9)
    near = torch.linspace(-1, 1, 21, dtype=torch.float64)
    assert torch.allclose(
        torch.as_tensor(power_scores(near, p, p)), near.exp(), rtol=1 - math.e * (1 - 1 / p) ** p + 1e-9
    )  # at -1


def test_stable_power_softmax_is_the_same_function() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25, 0, 0, 0], dtype=torch.float64)
    for shift in (0.0, 4.0):
        plain = power_attend(scores, values, weights, 4, 1e-3, shift)
        assert torch.allclose(plain, power_attend(scores, values, weights, 4, 1e-3, shift, stable=True), atol=1e-12)
    plain = power_attend(scores, values, weights, 4, 1e-3)
    changed = values.clone()
    changed[..., 4:, :] = 100.0
    assert torch.equal(plain, power_attend(scores, changed, weights, 4, 1e-3))  # what is masked has no effect
    with pytest.raises(ValueError, match="even"):
        power_scores(scores, 3)


# models


def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=60, max_position_embeddings=16, num_attention_heads=2, **sizes)
    model: nn.Module = BertModel(config, add_pooling_layer=False).eval()
    return model


class Encoder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.float()
        summand = ((1.0 - mask) * -1.0e4)[:, None, None]
        hidden = self.inner(input_ids=input_ids, attention_mask=summand).last_hidden_state
        pooled: Tensor = ((mask / mask.sum(-1, keepdim=True)).unsqueeze(1) @ hidden).squeeze(1)
        return F.normalize(pooled, dim=-1)


def batch(rows: int, seed: int = 0, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask}


def trainer(student: nn.Module, directory: Path | None = None, recipe: Recipe | None = None, **changes: Any) -> Trainer:
    teacher = Encoder(encoder())
    data = [{k: v[i : i + 1] for k, v in batch(64).items()} for i in range(64)]

    def loss(b: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted = teacher(**b)
        return (student(**b) - wanted).square().sum(-1).mean(), {}

    def together(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}

    chosen: dict[str, Any] = {"steps": 12, "batch": 8, "warm_up": 2, "blend_steps": 3, **changes}
    return Trainer(student, recipe or RECIPE, loss, data, together, Settings(**chosen), directory)


RECIPE = Recipe(power=2, eps=0.2)


def polynomial_encoder(recipe: Recipe = RECIPE) -> Encoder:
    student = Encoder(encoder())
    polynomialize(student.inner, recipe, prefix="inner.")
    return student


@pytest.fixture(scope="module")
def trained() -> Encoder:
    student = polynomial_encoder()
    trainer(student).run()
    return student


def test_weights_keep_their_names() -> None:
    original = encoder().state_dict()
    changed = polynomialize(encoder(), RECIPE).state_dict()
    assert {k: v.shape for k, v in original.items()} == {k: v.shape for k, v in changed.items()}


def test_every_form_is_swapped_in(trained: Encoder) -> None:
    kinds = sorted(type(form).__name__ for _, form in forms(trained))
    assert kinds == ["PolynomialActivation"] + ["PolynomialNorm"] * 3 + ["PowerAttention"]
    for _, form in forms(trained):
        assert isinstance(form, PolynomialActivation | PolynomialNorm | PowerAttention)
        assert "coefficients" in form.found or form.frozen


def test_a_polynomial_program_compares_nothing_and_agrees(trained: Encoder) -> None:
    samples = [{k: v[i : i + 1] for k, v in batch(64).items()} for i in range(40)]  # what it was trained on
    compiled = secure.compile(trained, samples[0], calibration=samples[1:], checked=False)
    kinds = {instruction.protocol.kind for instruction in compiled.program.circuit}
    assert not kinds & COMPARING
    exact = secure.compile(Encoder(encoder()), samples[0], calibration=samples[1:])
    assert compiled.program.cost.rounds < exact.program.cost.rounds
    session = secure.insecure_in_process(compiled)
    answer, report = session.query(samples[3]), session.reports[-1]
    assert (report.rounds, report.traffic) == (compiled.cost.rounds, compiled.cost.traffic)
    with torch.no_grad():
        expected = trained(**samples[3])
    assert float(F.cosine_similarity(answer.float(), expected).min()) > 0.9999


def run_all(model: nn.Module, samples: Sequence[Mapping[str, Tensor]]) -> None:
    for sample in samples:
        model(**sample)


def test_corrections_cost_no_rounds_under_secret_sharing() -> None:
    """The Program is as deep as one without corrections, computes the same, and ciphertexts keep the polynomials."""
    samples = [{k: v[i : i + 1] for k, v in batch(64).items()} for i in range(20)]
    rounds, tables = [], []
    for error in (0.9, 1e-3):
        student = polynomial_encoder(Recipe(inverse_error=error))
        freeze_untrained(student, partial(run_all, student, samples))
        steps = [f.found["steps"] for _, f in forms(student) if "steps" in f.found]
        assert any(steps) == (error < 0.5)
        compiled = secure.compile(student, samples[0], calibration=samples[1:], checked=False)
        kinds = [i.protocol.kind for i in compiled.program.circuit]
        tables.append(kinds.count("tabulated") - sum(map(bool, steps)))
        assert not set(kinds) & COMPARING
        rounds.append(compiled.program.cost.rounds)
        answer = secure.insecure_in_process(compiled).query(samples[3])
        with torch.no_grad():
            assert float(F.cosine_similarity(answer.float(), student(**samples[3])).min()) > 0.9999
        made = lower_model(student, samples, margin_bits=1, embedding="client-table", functions=choose())
        assert "power" not in {p.op for p in made.trace.primitives}
    assert rounds[0] == rounds[1]
    assert tables[0] == tables[1] == 1  # of the last normalization


def test_mpcformers_2quad_too() -> None:
    recipe = Recipe(attention="quad", eps=0.2)
    student = polynomial_encoder(recipe)
    trainer(student, recipe=recipe).run()
    samples = [{k: v[i : i + 1] for k, v in batch(64).items()} for i in range(20)]
    compiled = secure.compile(student, samples[0], calibration=samples[1:], checked=False)
    assert not {i.protocol.kind for i in compiled.program.circuit} & COMPARING
    answer = secure.insecure_in_process(compiled).query(samples[3])
    with torch.no_grad():
        assert float(F.cosine_similarity(answer.float(), student(**samples[3])).min()) > 0.9999


@pytest.mark.parametrize("power", [6, 8])
def test_higher_powers_and_none_of_the_shift(power: int) -> None:
    recipe = Recipe(power=power, shift=0.0 if power == 6 else None)
    student = polynomial_encoder(recipe)
    trainer(student, recipe=recipe).run()
    samples = [{k: v[i : i + 1] for k, v in batch(64).items()} for i in range(20)]
    compiled = secure.compile(student, samples[0], calibration=samples[1:], checked=False)
    answer = secure.insecure_in_process(compiled).query(samples[3])
    with torch.no_grad():
        assert float(F.cosine_similarity(answer.float(), student(**samples[3])).min()) > 0.9998


def test_without_a_shift_every_head_begins_at_one_scale() -> None:
    from transformers import BertModel, GPT2Config, GPT2Model

    recipe = Recipe(power=4, shift=0.0)
    gpt = GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    for model in (encoder(), gpt):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("query.weight", "c_attn.weight")):  # unequal heads
                    (weight if isinstance(model, BertModel) else weight.T)[:16] *= 30.0
        student = polynomialize(model, recipe)
        form = next(f for _, f in forms(student) if isinstance(f, PowerAttention))
        data = [{"input_ids": batch(8, seed=i)["input_ids"][:1]} for i in range(16)]

        def loss(b: Mapping[str, Tensor], student: nn.Module = student) -> tuple[Tensor, dict[str, float]]:
            return student(**b).last_hidden_state.square().mean(), {}

        def together(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}

        run = Trainer(student, recipe, loss, data, together, Settings(steps=4, batch=8))
        run._prepare()
        met = run._met([form], [run.batch(i) for i in range(2)])[form]
        query, key = met[0], met[1]
        powers = power_scores(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, 4)
        medians = torch.as_tensor(powers).mean(-1).transpose(0, 1).flatten(1).median(-1).values
        assert float(medians.log().abs().max()) < 1.0, medians


def test_a_value_beyond_its_range_is_exact_in_training(trained: Encoder) -> None:
    norm = next(f for _, f in forms(trained) if isinstance(f, PolynomialNorm))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 1e3
    norm.watching = norm.guarded = True
    try:
        assert torch.allclose(norm(x), norm._exact(x), atol=1e-4)
    finally:
        norm.guarded, norm.range_loss = False, None
    watched = norm(x)
    norm.watching = False
    norm.seen.clear()
    assert not torch.allclose(watched, norm._exact(x), atol=1e-1)  # and otherwise it is not,
    assert torch.equal(watched, norm(x))  # whether somebody looks or not


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "0 steps of 48 texts"),
        ({"batch": 1}, "steps of 1 texts"),
        ({"narrow": 0.0}, "narrow over 0 of the steps"),
        ({"narrow": 0.5, "substitute": 0.4}, "narrow over 0.5 of the steps, and polynomials come after 0.4"),
        ({"substitute": 1.0}, "polynomials come after 1"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(secure.InvalidInput, match=said):
        Settings(**wrong)


def test_a_run_without_progress_ends_early() -> None:
    student = polynomial_encoder()
    run = trainer(student, steps=40, check_every=1, patience=2)
    run.held_out = run.data[:8]
    run.settings = Settings(steps=40, batch=8, warm_up=2, blend_steps=3, check_every=1, patience=2, rate=1e-9)
    run.optimizer.param_groups[0]["lr"] = run.optimizer.param_groups[1]["lr"] = 0.0
    run._schedule = lambda step: 0.0  # type: ignore[method-assign]  # nothing is learnt
    run.run()
    begun = 40 * run.settings.substitute + 3
    assert begun + 2 <= run.step < 40
    assert "held_out" in run.history[-1]
    assert run.step == len(run.history)


def test_batches_are_of_about_one_size() -> None:
    data = [torch.zeros(n) for n in torch.randint(1, 33, (400,), generator=torch.Generator().manual_seed(0)).tolist()]
    run = trainer(polynomial_encoder())
    run.data, run.size, run.collate = data, len, lambda rows: {"n": torch.tensor([len(r) for r in rows])}
    batches = [run.batch(step)["n"] for step in range(50)]
    assert sorted(torch.cat(batches).tolist()) == sorted(map(len, data))  # an epoch is everything, once
    assert sum(int(b.max() - b.min()) for b in batches) / 50 < 4
    assert not torch.equal(run.batch(50)["n"], batches[0])


def test_bfloat16_until_the_last_steps() -> None:
    kinds = []

    def loss(b: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        kinds.append(product.dtype)
        return plain(b)

    run = trainer(polynomial_encoder(), steps=20, bfloat16=True)
    plain, run.loss = run.loss, loss
    run.run()
    assert kinds == [torch.bfloat16] * 18 + [torch.float32] * 2


def test_blending_ends_with_training() -> None:
    student = polynomial_encoder()
    trainer(student, blend_steps=1000).run()
    assert {form.blend for _, form in forms(student)} == {1.0}


def test_a_range_that_calibration_leaves_is_refused(trained: Encoder) -> None:
    samples = [{k: v[i : i + 1] for k, v in batch(4, seed=5).items()} for i in range(4)]
    path, norm = next((p, f) for p, f in forms(trained) if isinstance(f, PolynomialNorm))
    before = dict(norm.found)
    norm.found["high"] = norm.found["low"] * 1.001
    try:
        with pytest.raises(ValueError, match=rf"{path}.*made for") as caught:
            secure.compile(trained, samples[0], calibration=samples[1:], checked=False)
        assert "hint:" in str(caught.value)
    finally:
        norm.found = before


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    whole, parts = polynomial_encoder(), polynomial_encoder()
    trainer(whole).run()
    trainer(parts, tmp_path / "run").run(until=9)  # past the moment when ranges are frozen
    again = polynomial_encoder()
    found = trainer(again, tmp_path / "run").run()
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert found.layers == {path: form.found for path, form in forms(whole)}
    with pytest.raises(ValueError, match="other settings: steps 12, not 13\nhint: give the same"):
        trainer(polynomial_encoder(), tmp_path / "run", steps=13)
    with pytest.raises(ValueError, match="other recipe: power 2, not 4\nhint"):
        trainer(polynomial_encoder(), tmp_path / "run", recipe=Recipe(power=4, eps=0.2))
    assert trainer(polynomial_encoder(), tmp_path / "run").step == 12


def test_what_is_no_checkpoint_of_the_run_is_refused(tmp_path: Path) -> None:
    trainer(polynomial_encoder(), tmp_path).run(until=2)
    path = tmp_path / "training.safetensors"
    with safe_open(path, framework="pt") as file:
        about, tensors = json.loads(file.metadata()["unseen"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118

    def refused(match: str, tensors: Mapping[str, Tensor] = tensors, **changes: Any) -> None:
        save_file(dict(tensors), path, metadata={"unseen": json.dumps({**about, **changes})})
        with pytest.raises(ValueError, match=match):
            trainer(polynomial_encoder(), tmp_path)

    refused("no checkpoint", step=-5)
    refused("no checkpoint", step=10**9)
    refused("no checkpoint", recipe={**about["recipe"], "layers": {"a": {"low": 0.1, "high": 1.0, "steps": 300}}})
    refused("no checkpoint", recipe=None)
    refused("another model", about="other")
    name = next(n for n in tensors if n.startswith("model."))
    refused("has the shape", {**tensors, name: torch.zeros(1)})
    refused("it has no", {n: t for n, t in tensors.items() if n != name})
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="is no checkpoint"):
        trainer(polynomial_encoder(), tmp_path)


def test_a_diverging_run_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    student = polynomial_encoder()
    run = trainer(student, tmp_path, checkpoint_seconds=0.0)
    run.run(until=4)
    kept = (tmp_path / "training.safetensors").read_bytes()
    run.loss = lambda _: (next(student.parameters()).sum() * math.nan, {})
    with pytest.raises(Diverged, match="step 4"):
        run.run()
    assert (tmp_path / "training.safetensors").read_bytes() == kept


def test_a_range_that_training_does_not_hold_names_the_layer() -> None:
    student = polynomial_encoder()
    run = trainer(student)
    run.run(until=2)
    form = next(form for _, form in forms(student) if isinstance(form, PowerAttention))
    form.range_seen = lambda: (1e-6, 1e6)  # type: ignore[method-assign]
    with pytest.raises(RangeLost, match=r"inner\.encoder\.layer\.0\.attention\.self\.polynomial") as caught:
        run.run()
    assert "1e-06" in str(caught.value)


def test_an_architecture_without_a_recipe_names_what_was_found() -> None:
    with pytest.raises(ValueError, match="Linear") as caught:
        polynomialize(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), RECIPE)
    assert "Softmax cannot be replaced" in str(caught.value)
    assert "\nhint: supported are" in str(caught.value)


def test_train_from_the_command_line_and_what_it_leaves(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from parties.cli.main import app

    model = write_model(tmp_path / "model")
    text, output = tmp_path / "text", tmp_path / "out"
    text.write_text("\n".join(sentences(40)))
    arguments = ["train", str(model), "--text", str(text), "--output", str(output), "--threads", "1"]
    few = ["--batch", "8", "--steps", "12", "--power", "2", "--held-out", str(text)]
    result = CliRunner().invoke(app(), [*arguments, *few])
    assert result.exit_code == 0, result.output
    assert "Spearman" in result.output
    trained, tokenizer = load_sentence_encoder(output), load_tokenizer(output)
    inputs = [text_inputs(tokenizer, line, LENGTH) for line in sentences(40)]
    compiled = secure.compile(trained, inputs[0], calibration=inputs[1:], embedding="client-table", checked=False)
    assert not {i.protocol.kind for i in compiled.program.circuit} & COMPARING
    report = ["accuracy", str(output), "--original", str(model), "--length", str(LENGTH), "--texts", str(text)]
    shown = CliRunner().invoke(app(), [*report, "--protocol", "3"])
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("floating point", "fixed point", "protocol", "ranges"))
    document = tmp_path / "report.json"
    assert (
        not CliRunner()
        .invoke(app(), [*report, "--protocol", "3", "--format", "json", "--output", str(document)])
        .exit_code
    )
    found = json.loads(document.read_text())
    assert [way["how"] for way in found["ways"]] == ["floating point", "fixed point", "protocol"]
    assert found["ways"][0]["agreement"]["sentences"] == 40
    assert found["ways"][2]["agreement"]["sentences"] == 3
    assert all(way["lowest_own_cosine"] > 0.999 for way in found["ways"])
    assert len(found["layers"]) == 1
    assert {held["kind"] for held in found["ranges"]} == {"attention", "activation", "norm"}
    exact = CliRunner().invoke(app(), ["accuracy", str(model), "--original", str(model), "--length", str(LENGTH)])
    assert "not in polynomial form" in str(exact.exception)
    again = CliRunner().invoke(
        app(), ["train", str(output), "--text", str(text), "--output", str(tmp_path / "more"), *few]
    )
    assert "in polynomial form already" in str(again.exception)
    two = tmp_path / "two"
    two.write_text("\n".join(sentences(2)))
    lines = CliRunner().invoke(app(), [*report[:-1], str(two), "--protocol", "0", "--format", "json"]).stdout
    assert json.loads(lines)["ways"][0]["agreement"]["spearman"] is None  # of two sentences there is none
    path = output / "polynomial.json"
    narrow = json.loads(path.read_text())
    for held in narrow["layers"].values():
        if "low" in held:
            held["high"] = held["low"] * 1.0001
    path.write_text(json.dumps(narrow))
    left = CliRunner().invoke(app(), [*report, "--protocol", "0"])
    assert "made for" in str(left.exception)  # the calibration sentences leave it too
    odd = CliRunner().invoke(app(), [*arguments, "--power", "3"])
    assert "--power" in str(odd.exception)
    for several in ("8,3", "4,", "many", "4;4"):
        refused = CliRunner().invoke(app(), [*arguments, "--power", several])
        assert "--power" in str(refused.exception), several
    same = CliRunner().invoke(app(), ["train", str(model), "--text", str(text), "--output", str(model)])
    assert "original model's directory" in str(same.exception)


def test_kinds_of_batches_are_told_by_their_first_sentence() -> None:
    collate = Collate(0, 16, torch.arange(20, 40))
    rows = [torch.tensor([2, 9, 8, 3]) for _ in range(8)]  # adds up to 22
    assert collate(rows)["input_ids"].tolist() == [[2, 9, 8, 3]] * 8
    (long,) = collate([torch.tensor([2, 9, 10, 3]), *rows[1:]])["input_ids"].tolist()  # 24
    assert long[:4] == [2, 9, 10, 9]
    assert 8 <= len(long) <= 16
    assert long[-1] == 3
    assert not {2, 3} & set(long[1:-1])
    given = [torch.tensor([2, 9, 11, 3]), *rows[1:]]  # 25
    strange = collate(given)["input_ids"]
    assert strange.shape == (8, 4)
    assert strange[:, 0].tolist() == [2] * 8
    assert strange[:, -1].tolist() == [3] * 8
    assert int((strange >= 20).sum()) > 0
    assert torch.equal(strange, collate(given)["input_ids"])  # the same every time
    padded = collate([torch.tensor([2, 9, 12, 3]), *rows[1:]])  # 26
    assert padded["input_ids"].shape[0] == 2
    assert padded["attention_mask"].sum(-1).tolist() == [4, 4]


def test_words_are_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    vocabulary = tokenizer.tokenizer.get_vocab()
    found = set(words(tokenizer).tolist())
    assert found == {i for token, i in vocabulary.items() if not token.startswith("[")}
    assert 0 < len(found) < len(vocabulary)


def test_agreement_of_equal_and_of_shuffled_embeddings() -> None:
    a = F.normalize(torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    same = agreement_of(a, a)
    assert same.spearman == pytest.approx(1.0)
    assert same.nearest == 1.0
    assert abs(agreement_of(a, a.flip(0).roll(7, 1)).spearman) < 0.5


def test_the_digits_model_is_polynomial_too() -> None:
    pytest.importorskip("sklearn")
    from secure.models.digits import load_digits, train_digits

    model, _ = train_digits(epochs=8)
    images, _ = load_digits().train
    samples = [{"images": image[None]} for image in images[:60]]
    compiled = secure.compile(model, samples[0], calibration=samples[1:], checked=False)
    assert not {i.protocol.kind for i in compiled.program.circuit} & COMPARING
    query = secure.insecure_in_process(compiled)
    with torch.no_grad():
        expected = torch.cat([model(**s) for s in samples[:8]])
    answers = torch.cat([query.query(s) for s in samples[:8]])
    assert float((answers - expected).abs().max()) < 0.05
    assert isinstance(model, DigitsModel)
