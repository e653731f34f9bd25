"""Layers that read one normalization become one layer, and rotary embeddings become one product."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secure
from protocols.two_party import Linear
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.in_process import plain_reference
from secure.frontend import Size
from secure.lowering.parts import part_of
from secure.mpc.compile import MpcModel, chosen, compile_sizes
from secure.mpc.compile import compile as mpc_compile

WIDTH, HEADS = 16, 2
DEPLOYMENTS = [secure.TwoParty(), secure.ThreeParty(), secure.ThreeParty(public_weights=True)]


class Attention(nn.Module):
    """Queries, keys and values of one normalization, of different sizes, with the factor of the scores."""

    def __init__(self, norm: nn.Module, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.norm = nn.Linear(WIDTH, WIDTH), norm
        for parameter in norm.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3 + 1
        self.query, self.key = (nn.Linear(WIDTH, 8, bias=bias) for bias in biases[:2])
        self.value = nn.Linear(WIDTH, 12, bias=biases[2])

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.enter(x))
        scores = (self.query(found) @ self.key(found).transpose(-1, -2)) * 0.25
        result: Tensor = torch.softmax(scores, -1) @ self.value(found)
        return result


def inputs(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn((1, 5, WIDTH), generator=torch.Generator().manual_seed(seed))}


def layers(made: MpcModel) -> list[str]:
    """The weights of the linear layers of a Program."""
    found = [i.protocol for i in made.program.circuit]
    return [p.weight for p in found if isinstance(p, Linear) and not p.diagonal]


def compiled(module: nn.Module) -> MpcModel:
    return mpc_compile(module, inputs(0), calibration=[inputs(seed) for seed in range(1, 5)])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=str)
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_layers_of_one_normalization_are_one(
    norm: str, biases: tuple[bool, bool, bool], deployment: CircuitDeployment
) -> None:
    made = nn.LayerNorm(WIDTH) if norm == "layer" else nn.RMSNorm(WIDTH, eps=1e-5)
    module = Attention(made, biases).eval()
    _, name = layers(compiled(module))
    assert [name.count(part) for part in ("query.weight", "key.weight", "value.weight")] == [1, 1, 1]
    ready = secure.compile(module, inputs(0), calibration=[inputs(seed) for seed in range(1, 5)], deployment=deployment)
    with torch.no_grad(), secure.insecure_in_process(ready) as session:
        for seed in (5, 6):
            assert float((session.query(inputs(seed)) - module(**inputs(seed))).abs().max()) < 4e-3


class Many(nn.Module):
    """Forty layers of one normalization, as experts or heads may be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.enter, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers_that_have_rather_long_names = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(40))

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.enter(x))
        return torch.cat([layer(found) for layer in self.layers_that_have_rather_long_names], -1)


def test_many_layers_have_a_name_that_fits() -> None:
    module = Many().eval()
    made = compiled(module)
    _, name = layers(made)
    assert len(name) < 200
    with torch.no_grad():
        assert float((plain_reference(made, inputs(3)) - module(**inputs(3))).abs().max()) < 4e-3


class Shared(nn.Module):
    """Products with matrices that stand the other way, one of which adds one number to all of its columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.enter, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.first, self.second = (nn.Parameter(torch.randn(WIDTH, 6)) for _ in range(2))
        self.one = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.enter(x)[0])
        result: Tensor = torch.addmm(self.one, found, self.first) * (found @ self.second)
        return result


def test_a_bias_of_one_number_is_that_of_every_column() -> None:
    module = Shared().eval()
    made = compiled(module)
    assert len(layers(made)) == 2
    with torch.no_grad():
        assert float((plain_reference(made, inputs(3)) - module(**inputs(3))).abs().max()) < 2e-2


class Apart(nn.Module):
    """Two layers of an input that no normalization gives, such as the segments of an index: each is its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) * self.second(x)
        return result


def test_layers_of_other_values_stay_apart() -> None:
    """Who replaces one segment of an index sends that segment's weights alone."""
    assert len(layers(compiled(Apart().eval()))) == 2


class Segments(nn.Module):
    """Segments of an index behind a normalization: each changes by itself, and has a file of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.enter, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.rows = nn.ParameterDict({f"apart_{each * 32}": torch.randn(4, WIDTH) for each in "ab"})
        self.head, self.more = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.enter(x))
        scores = [nn.functional.linear(found, each) for each in self.rows.values()]
        return torch.cat([*scores, self.head(found), self.more(found)], -1)


def test_parts_that_change_stay_apart_behind_a_normalization_too() -> None:
    made = compiled(Segments().eval())
    found = [name for name in layers(made) if "enter" not in name]
    assert sorted(map(part_of, found)) == ["", "a" * 32, "b" * 32]
    assert len(found) == 3, "the two layers of the model itself are one"


class Normalized(Attention):
    """Queries and keys that are normalized, so that they may get more fraction bits than values need."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.enter(x))
        query, key = (nn.functional.layer_norm(layer(found), (8,)) for layer in (self.query, self.key))
        result: Tensor = torch.softmax((query @ key.transpose(-1, -2)) * 0.25, -1) @ self.value(found)
        return result


def test_what_a_normalization_reads_stays_by_itself() -> None:
    module = Normalized(nn.LayerNorm(WIDTH), (True, True, True)).eval()
    made = compiled(module)
    assert len(layers(made)) == 4
    with torch.no_grad():
        assert float((plain_reference(made, inputs(3)) - module(**inputs(3))).abs().max()) < 4e-3


def test_ciphertexts_keep_layers_apart() -> None:
    """Slices of a ciphertext's slots are no free views."""
    from secure.frontend import lower_model

    module = Attention(nn.LayerNorm(WIDTH), (True, True, True)).eval()
    functions = chosen("default", "puma")
    made = lower_model(module, [inputs(0)], margin_bits=1, embedding="one-hot", functions=functions)
    assert sum(p.op == "linear" for p in made.trace.primitives) == 4


class Uneven(nn.Module):
    """Two layers of one normalization, the second whose results are small where calibration looked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enter, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.RMSNorm(WIDTH, eps=1e-5)
        self.enter.weight.data = torch.eye(WIDTH)
        self.large, self.small = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4, bias=False)
        self.large.weight.data *= 8
        self.small.weight.data.zero_()
        self.small.weight.data[:, 0] = 1.0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.norm(self.enter(x))
        small = self.small(found)
        return {"large": self.large(found), "square": small * small}


@pytest.mark.parametrize("deployment", DEPLOYMENTS[:2], ids=str)
def test_a_small_result_beside_a_large_one_keeps_its_precision_and_its_check(deployment: CircuitDeployment) -> None:
    """What it reaches is its own matter: a value beyond its own range, within its neighbour's, is noticed."""
    module = Uneven().eval()
    given = [{"x": inputs(seed)["x"] * torch.tensor([0.05] + [1.0] * (WIDTH - 1))} for seed in range(8)]
    made = secure.compile(module, given[0], calibration=given[1:], deployment=deployment)
    with torch.no_grad(), secure.insecure_in_process(made) as session:
        found, expected = session.query(given[2]), module(**given[2])
        assert float((found["square"] - expected["square"]).abs().max()) < 2.0**-12
        assert float((found["large"] - expected["large"]).abs().max()) < 2.0**-9
        grown = {"x": torch.full((1, 5, WIDTH), (12 / 15) ** 0.5)}  # a row whose mean square is one
        grown["x"][..., 0] = 2.0  # twice what the ring of the small result holds
        with pytest.raises(secure.OutOfRange):
            session.query(grown)


class Turned(nn.Module):
    """Rows turned by the angles of their positions, as LLaMA's; ``form`` writes it in another way."""

    def __init__(self, form: str = "usual") -> None:
        super().__init__()
        self.form = form
        torch.manual_seed(4)
        self.enter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[..., None].float() * 10.0 ** (-2 * torch.arange(WIDTH // 2) / WIDTH)
        x = self.enter(x)
        first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        if self.form == "pairs":  # GPT-J's: entries side by side
            first, second = x[..., ::2], x[..., 1::2]
            pairs = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
            return torch.stack(pairs, -1).flatten(-2)
        angles = angles[..., :1] if self.form == "one angle" else torch.cat([angles, angles], -1)
        halves = {
            "usual": lambda: (-second, first),
            "the other way": lambda: (second, -first),
            "not turned": lambda: (-first, second),
            "one angle": lambda: (-second, first),
            "uneven": lambda: (-x[..., 4:], x[..., :4]),
        }[self.form]()
        across = torch.cat(halves, -1) * angles.sin()
        return across + x * angles.cos() if self.form == "not turned" else x * angles.cos() + across


def positioned(seed: int) -> dict[str, Tensor]:
    return {**inputs(seed), "position_ids": torch.arange(seed, seed + 5)[None]}


def kinds_of(form: str, *, public: bool) -> Counter[str]:
    """The protocols of the Program, which computes what the module does."""
    module, given = Turned(form).eval(), [positioned(seed) for seed in range(5)]
    (made,) = compile_sizes(module, [(Size(given[0], given), {})], public_positions=public)
    for each in (given[1], positioned(7)):
        with torch.no_grad():
            assert float((plain_reference(made, each) - module(**each)).abs().max()) < 2e-3
    return Counter(i.protocol.kind for i in made.program.circuit)


def test_rows_are_turned_in_one_product() -> None:
    found = kinds_of("usual", public=True)
    assert found["rotated"] == 1
    assert not found.keys() & {"mul_public", "concat", "lifted_product", "product"}


@pytest.mark.parametrize("form", ["the other way", "not turned", "uneven", "one angle", "pairs"])
def test_other_forms_are_computed_as_they_are_written(form: str) -> None:
    found = kinds_of(form, public=True)
    assert not found["rotated"]
    assert found["mul_public"] > 1


def test_secret_positions_turn_by_products_of_secrets() -> None:
    found: dict[str, Any] = kinds_of("usual", public=False)
    assert not found["rotated"]
    assert not found["mul_public"]
