"""Samples from a softmax: the noise's values and independence, the distribution of answers, what is revealed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import secure
from protocols import two_party as tp
from protocols.circuit import Correlations, check, deal, execute
from protocols.flow import Instruction
from protocols.prg import Key
from protocols.protocol import CLIENT, SERVER, CircuitCost, Protocol
from protocols.steps import run_pair
from protocols.two_party import noise
from protocols.two_party.noise import HIGHEST, LOWEST, gumbel
from protocols.weights import ServerWeights
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput, UnsupportedOperation
from secure.operations.sampling import TOLERANCE
from tests.helpers import key
from tests.three_parties import running
from tests.uniformity import leaks

DEPLOYMENTS: list[Deployment] = [
    secure.TwoParty(),
    secure.ThreeParty(),
    secure.ThreeParty(public_weights=True),
]
IDS = ["two-party", "three-party", "three-party-public"]
FALSE_ALARM = 1e-6
"""The probability with which a statistical test may fail although all is well."""


# the noise


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]),
    st.integers(0, 30),
)
def test_noise_is_the_inverse_of_its_distribution(word: int, fraction: int) -> None:
    with localcontext(prec=60):
        exact = -(-((Decimal(word) + Decimal("0.5")) / 2**64).ln()).ln()
        signed = word - (1 << 64) if word >> 63 else word
        found = int(gumbel(torch.tensor([signed]), 2.0**fraction))
        assert abs(found - exact * 2**fraction) < Decimal("0.50001")


def test_the_ends_of_the_noise() -> None:
    words = torch.tensor([0, -1])
    assert (gumbel(words, 1e9).double() / 1e9 - torch.tensor([LOWEST, HIGHEST], dtype=torch.float64)).abs().max() < 1e-8
    assert pytest.approx(45.0545, abs=1e-4) == HIGHEST
    assert pytest.approx(-3.8079, abs=1e-4) == LOWEST


def test_noise_has_the_distribution_of_gumbel() -> None:
    words = Key(bytes(range(16))).stream(3).words((200_000,))
    found = gumbel(words, 2.0**40).double() / 2.0**40
    assert stats.kstest(found.numpy(), stats.gumbel_r.cdf).pvalue > FALSE_ALARM


def dealt(protocol: Protocol, keys: tuple[Key, Key]) -> tuple[Tensor, Tensor]:
    """Both parties' shares of noise."""
    circuit, weights = [Instruction(protocol)], ServerWeights({})
    corrections = dict(deal(circuit, *keys, weights))
    server = execute(circuit, [0], SERVER, Correlations(SERVER, keys[SERVER], corrections), weights)
    client = execute(circuit, [0], CLIENT, Correlations(CLIENT, keys[CLIENT]), weights, {})
    (a,), (b,) = run_pair(server, client)
    return a, b


def test_noise_follows_from_both_streams_and_from_neither_alone() -> None:
    shape = (1 << 15,)
    keys = (key(), key())
    a, b = dealt(tp.Gumbel(shape, 64, 16, 0, 0.5), keys)
    mine, theirs = (k.stream(0).words(shape) for k in keys)
    assert torch.equal(a + b, gumbel(mine + theirs, 0.5 * 2.0**16))
    for known in (mine, theirs):  # what one party holds, beside the word that makes the noise
        assert not leaks([("words", known, 64), ("sum", mine + theirs, 64)])
    known = gumbel(mine, 2.0**16).double()  # the noise that the server's words alone would make
    assert abs(float(torch.corrcoef(torch.stack([known, (a + b).double()]))[0, 1])) < 6 / math.sqrt(shape[0])


def test_a_party_that_draws_no_words_does_not_bias_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream of zeros: the sum is as uniform as the other stream."""
    shape, keys = (100_000,), (key(), key())
    words = keys[SERVER].stream(0).words(shape)
    a, b = dealt(tp.Gumbel(shape, 64, 40, 0, 1.0), keys)
    assert stats.kstest((a + b).double().numpy() / 2.0**40, stats.gumbel_r.cdf).pvalue > FALSE_ALARM
    alone = gumbel(words + torch.zeros_like(words), 2.0**40).double() / 2.0**40
    assert stats.kstest(alone.numpy(), stats.gumbel_r.cdf).pvalue > FALSE_ALARM


def test_cost_formulas() -> None:
    assert tp.Gumbel((3, 5), 24, 16, 0, 1.0).cost() == CircuitCost(dealt=15 * 3)
    assert tp.ScaledGumbel((3, 5), 40, 16, 0).cost() == CircuitCost(dealt=2 * 15 * 5)


@pytest.mark.parametrize(
    "protocol",
    [
        tp.Gumbel((4,), 40, 16, 0, 0.0),
        tp.Gumbel((4,), 40, 16, 0, -1.0),
        tp.Gumbel((4,), 64, 64, 0, 1.0),
        tp.Gumbel((4,), 64, 16, 0, 1e300),
    ],
)
def test_noise_of_a_wrong_scale_is_refused(protocol: Protocol) -> None:
    with pytest.raises(ValueError, match="noise of the scale"):
        check([Instruction(protocol)], {})


def test_a_temperature_of_another_shape_is_refused() -> None:
    circuit = [
        Instruction(tp.Input((3,), 40, "t", 16, 0.0, 1.0)),
        Instruction(tp.Open((3,), 40), (0,)),
        Instruction(tp.ScaledGumbel((2, 4), 40, 16, 0), (1,)),
    ]
    with pytest.raises(ValueError, match="instruction 2"):
        check(circuit, {})


# the distribution, exactly


def softmax(x: Sequence[float], temperature: float) -> NDArray[np.float64]:
    found = np.exp((np.array(x) - max(x)) / temperature)
    return np.asarray(found / found.sum(), dtype=np.float64)


def exact_distribution(x: Sequence[int], fraction: int, temperature: float) -> NDArray[np.float64]:
    """The probabilities of the arg-max of integers of ``fraction`` bits plus rounded noise, of equal ones the first."""
    unit = 2.0**-fraction
    low, high = (math.floor((edge * temperature) / unit) for edge in (LOWEST, HIGHEST))
    values = np.arange(min(x) + low - 2, max(x) + high + 3)

    def below(edges: NDArray[Any]) -> NDArray[np.float64]:
        """P(rounded noise < k) for the integers of ``edges``."""
        return np.exp(-np.exp(-(edges - 0.5) * unit / temperature))

    less = [below(values - each) for each in x]
    at_most = [below(values + 1 - each) for each in x]
    out = []
    for i in range(len(x)):
        others = [less[j] if j < i else at_most[j] for j in range(len(x)) if j != i]
        # an earlier one wins a tie: those before i are below its value, those after it at most as large
        out.append(float(((at_most[i] - less[i]) * np.prod(others, axis=0)).sum()))
    return np.array(out)


@pytest.mark.parametrize("fraction", [4, 6, 8, 10, 12])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0])
def test_rounded_noise_misses_the_softmax_by_no_more_than_the_bound(fraction: int, temperature: float) -> None:
    """Total variation <= (e^(2^-fraction / temperature) - 1) (1 - sum p^2): see docs/choices.md."""
    for logits in ([0.0, 0.0], [1.0, 0.5, -2.0, 0.4375], [0.0] * 8, [5.0, 0.0, 0.0]):
        x = [round(each * 2**fraction) for each in logits]
        p = softmax([each * 2.0**-fraction for each in x], temperature)
        q = exact_distribution(x, fraction, temperature)
        assert q.sum() == pytest.approx(1, abs=1e-9)
        distance = abs(p - q).sum() / 2
        assert distance <= math.expm1(2.0**-fraction / temperature) * (1 - (p * p).sum()) + 1e-9
        if fraction < 10:  # and it is not far below the bound: the check can fail
            assert distance > math.expm1(2.0**-fraction / temperature) * (1 - (p * p).sum()) / 10


# modules


class Sampler(nn.Module):
    """A sample of the client's scores plus the server's."""

    def __init__(self, entries: int, form: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.b, self.form = nn.Parameter(torch.randn(entries)), form

    def forward(self, x: Tensor, t: Tensor | None = None) -> Any:
        return self.form(x + self.b) if t is None else self.form(x + self.b, t)


def sampler(entries: int, form: Callable[..., Any] = secure.sample) -> nn.Module:
    return Sampler(entries, form).eval().requires_grad_(False)


ROWS, ENTRIES = 3000, 6
SCORES = torch.tensor([0.3, -0.4, 1.9, -2.0, 0.0, 0.9])


def frequencies_fit(chosen: Tensor, logits: Tensor, temperature: float) -> bool:
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * len(chosen)
    found = torch.bincount(chosen, minlength=len(logits)).numpy()
    return bool(stats.chisquare(found, expected).pvalue > FALSE_ALARM)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=IDS)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("secret", [False, True], ids=["public", "secret"])
def test_answers_are_samples_of_the_softmax(deployment: Deployment, temperature: float, secret: bool) -> None:
    """Thousands of draws, a row each, with noise of their own. The temperature is the Program's, or the client's."""
    inputs = {"x": SCORES.expand(ROWS, ENTRIES).contiguous()}
    if secret:
        model, inputs["t"] = sampler(ENTRIES), torch.full((ROWS,), temperature)
    else:
        model = sampler(ENTRIES, lambda y: secure.sample(y, temperature))
    compiled = secure.compile(model, inputs, calibration=[inputs], deployment=deployment)
    with secure.insecure_in_process(compiled) as session:
        first, second = session.query(inputs), session.query(inputs)
    logits = SCORES + torch.as_tensor(model.b)
    assert first.dtype == torch.int64
    assert first.shape == (ROWS,)
    assert frequencies_fit(torch.cat([first, second]), logits, temperature)
    assert not frequencies_fit(torch.cat([first, second]), logits, temperature * 1.5)  # the check can fail
    agree = float((first == second).double().mean())  # other noise in the next query
    collision = float(torch.softmax(logits.double() / temperature, -1).square().sum())
    assert abs(agree - collision) < 6 * math.sqrt(collision / ROWS)
    assert frequencies_fit(secure.plain_reference(compiled, inputs), logits, temperature)


def test_a_client_chooses_another_temperature_in_every_query() -> None:
    x, hot = SCORES.expand(ROWS, ENTRIES).contiguous(), torch.full((1,), 4.0)
    compiled = secure.compile(sampler(ENTRIES), {"x": x, "t": hot}, calibration=[{"x": x, "t": hot}])
    logits = SCORES + torch.as_tensor(sampler(ENTRIES).b)
    with secure.insecure_in_process(compiled) as session:
        for temperature in (0.5, 3.0):
            chosen = session.query({"x": x, "t": torch.full((1,), temperature)})
            assert frequencies_fit(chosen, logits, temperature)
        greedy = session.query({"x": x, "t": torch.zeros(1)})
    assert torch.equal(greedy, logits.argmax().expand(ROWS))


def test_samples_of_the_same_scores_are_independent() -> None:
    """Equal instructions are one instruction: noise must not be."""
    model = sampler(ENTRIES, lambda y: (secure.sample(y), secure.sample(y)))
    inputs = {"x": SCORES.expand(ROWS, ENTRIES).contiguous()}
    compiled = secure.compile(model, inputs, calibration=[inputs])
    assert sum(isinstance(i.protocol, tp.Gumbel) for i in compiled.program.circuit) == 2
    with secure.insecure_in_process(compiled) as session:
        first, second = session.query(inputs).values()
    table = torch.zeros(ENTRIES, ENTRIES).index_put((first, second), torch.ones(ROWS), accumulate=True)
    seen = (table.sum(0) > 20).nonzero()[:, 0]
    assert stats.chi2_contingency(table[seen][:, seen].numpy()).pvalue > FALSE_ALARM


def ask_served(session: secure.Session, x: Tensor, logits: Tensor) -> None:
    for temperature in (0.6, 2.0):
        asked = {"x": x, "t": torch.full((1,), temperature)}
        chosen = torch.cat([session.query(asked) for _ in range(2)])
        assert frequencies_fit(chosen, logits, temperature)


@pytest.mark.parametrize("deployment", ["two-party", "three-party"])
def test_samples_of_a_served_model(deployment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inputs = {"x": SCORES.expand(ROWS, ENTRIES).contiguous(), "t": torch.full((1,), 2.0)}
    model = sampler(ENTRIES)
    logits = SCORES + torch.as_tensor(model.b)
    if deployment == "two-party":
        compiled = secure.compile(model, inputs, calibration=[inputs])
        with (
            secure.serve(role="dealer", deployment=secure.TwoParty()) as dealer,
            secure.serve(compiled, role="server", peers={"dealer": dealer.address}, state=tmp_path / "s") as server,
            secure.connect(secure.TwoParty(server=server.address, dealer=dealer.address)) as session,
        ):
            ask_served(session, inputs["x"], logits)
    else:
        compiled = secure.compile(model, inputs, calibration=[inputs], deployment=secure.ThreeParty())
        secure.share_model(compiled, tmp_path / "shared")
        with running(tmp_path / "shared") as parties, parties.dial() as session:
            ask_served(session, inputs["x"], logits)


@pytest.mark.parametrize("secret", [False, True], ids=["public", "secret"])
@pytest.mark.parametrize("margin", [0, 1])
def test_the_ends_of_the_noise_wrap_nowhere(monkeypatch: pytest.MonkeyPatch, secret: bool, margin: int) -> None:
    """The greatest noise on one score, the least on the others, at the ends of the scores' range."""
    for scores in (torch.tensor([[-30.0, 29.0, 0.0, 30.0]]), torch.tensor([[-90.0, -60.0, -50.0, -10.0]])):
        model = Sampler(4, secure.sample if secret else lambda y: secure.sample(y, 1.5)).eval().requires_grad_(False)
        torch.as_tensor(model.b).zero_()
        given = {"t": torch.tensor([1.5])} if secret else {}
        inputs = {"x": scores, **given}
        fixed = secure.FixedPoint(margin_bits=margin)
        compiled = secure.compile(model, inputs, calibration=[inputs], fixed_point=fixed)
        for place in range(4):
            ends = torch.tensor([HIGHEST if i == place else LOWEST for i in range(4)])[None]
            monkeypatch.setattr(noise, "gumbel", lambda words, scale, ends=ends: (ends * scale).round().to(torch.int64))
            with secure.insecure_in_process(compiled) as session:
                for x in (scores, scores * 1.9) if margin else (scores,):
                    assert int(session.query({"x": x, **given})) == int((x + 1.5 * ends).argmax())


def test_a_program_does_not_depend_on_what_calibration_drew() -> None:
    inputs = {"x": SCORES.expand(5, ENTRIES).contiguous()}
    made = []
    for seed in range(3):
        model = sampler(ENTRIES)
        torch.manual_seed(seed)
        made.append(secure.compile(model, inputs, calibration=[inputs]).program.digest)
    assert len(set(made)) == 1


def test_an_index_is_all_that_is_revealed() -> None:
    inputs = {"x": SCORES[None]}
    compiled = secure.compile(sampler(ENTRIES), inputs, calibration=[inputs])
    shown = [output.instruction for output in compiled.program.outputs]
    assert [compiled.program.circuit[i].protocol.out.shape for i in shown] == [(1,)]


@pytest.mark.parametrize(("entries", "rounds"), [(2, 3), (1000, 8), (50_000, 12)])
def test_a_sample_costs_the_rounds_of_an_arg_max(entries: int, rounds: int) -> None:
    inputs = {"x": torch.linspace(-20, 20, entries)[None]}
    costs = []
    for form in (lambda y: y.argmax(-1), secure.sample, lambda y: secure.sample(y, 0.7)):
        compiled = secure.compile(sampler(entries, form), inputs, calibration=[inputs])
        costs.append(compiled.program.cost)
    greedy, *sampled = (each.rounds for each in costs)
    assert greedy == rounds + 1
    assert all(greedy <= each <= greedy + 1 for each in sampled)


def test_in_plain_torch_it_draws_from_torchs_generator() -> None:
    torch.manual_seed(4)
    logits = SCORES.expand(20_000, ENTRIES)
    found = secure.sample(logits, 0.8)
    assert frequencies_fit(found, SCORES, 0.8)
    assert frequencies_fit(secure.sample(logits, torch.tensor(0.8)), SCORES, 0.8)
    torch.manual_seed(4)
    assert torch.equal(found, secure.sample(logits, 0.8))
    assert torch.equal(secure.sample(logits, 0.0), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [-0.5, math.nan, math.inf])
def test_temperatures_that_are_refused(temperature: float) -> None:
    with pytest.raises(InvalidInput, match=r"a temperature of .*\nhint: a number of zero or more"):
        secure.sample(SCORES, temperature)


@pytest.mark.parametrize(
    ("temperature", "hint"),
    [
        (lambda y, x: y.new_tensor(0.0), "a number above zero, or an input of the client's"),
        (lambda y, x: y.new_tensor([0.5, 0.6, 0.7]), "a number above zero, or an input of the client's"),
        (lambda y, x: x[:, :2], r"of the shape \(3, 2\) do not expand to that of the rows, \(3,\)"),
        (lambda y, x: x[:1, 0].expand(4), r"of the shape \(4,\) do not expand"),
    ],
)
def test_temperatures_without_a_protocol(temperature: Callable[[Tensor, Tensor], Tensor], hint: str) -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(8, ENTRIES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.scores(x)
            return secure.sample(y, temperature(y, x))

    with pytest.raises(UnsupportedOperation, match=hint):
        secure.compile(Scored().eval(), {"x": torch.randn(3, 8)})


class OwnTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.temperature = nn.Linear(8, ENTRIES), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return secure.sample(self.scores(x), self.temperature)


def test_a_temperature_of_the_servers_is_refused() -> None:
    """A Program is public, and a secret of the server's would ask for a protocol of its own."""
    with pytest.raises(UnsupportedOperation, match="a number above zero, or an input of the client's"):
        secure.compile(OwnTemperature().eval(), {"x": torch.randn(3, 8)})


def test_a_constant_temperature_is_a_number() -> None:
    model = sampler(ENTRIES, lambda y: secure.sample(y, torch.full((2,), 0.5)))
    compiled = secure.compile(model, {"x": torch.randn(2, ENTRIES)})
    (found,) = (i.protocol for i in compiled.program.circuit if isinstance(i.protocol, tp.Gumbel))
    assert found.temperature == 0.5


def test_what_ciphertexts_cannot_do() -> None:
    model = nn.Sequential(nn.Linear(8, ENTRIES), Sampler(ENTRIES, secure.sample)).eval()
    inputs = {"input": torch.randn(1, 8)}
    with pytest.raises(UnsupportedOperation, match=r"with ciphertexts nothing is sampled.*\nhint: serve it two-party"):
        secure.compile(model, inputs, calibration=[inputs], deployment=secure.Ckks())


def test_the_tolerance_is_that_of_the_documentation() -> None:
    assert TOLERANCE == 2.0**-12
