"""What each party sees is uniform, whatever the secret: frames, corrections, and every pair of them.

The checks can fail: each is also run on a protocol that forgets a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols import bits
from protocols import two_party as tp
from protocols.flow import Circuit, Instruction
from protocols.kernels import Array
from protocols.protocol import CLIENT, SERVER, Draw, Exchange, Material, Opening, Protocol, Step, Weights, swap
from protocols.three_party import Translated
from protocols.three_party import weights as three_weights
from protocols.weights import DealerWeights, ServerWeights
from protocols.wire import Wire, decode
from tests.helpers import key, octets, run_circuit, shared, shared_bits, words
from tests.three import run_three, translated
from tests.uniformity import View, difference, leaks, suspicious, upper_tail

N = 1 << 15


def test_the_check_itself() -> None:
    rng = np.random.default_rng(0)
    x = words(rng, (N,))
    assert not leaks([("x", x, 64), ("y", words(rng, (N,)), 64), ("b", octets(rng, (N,)), 8)])
    assert leaks([("x", x, 64), ("y", x + 1, 64)])  # one mask for two values
    assert leaks([("x", x[:1].expand(N), 64)])  # one mask for all elements
    assert leaks([("x", x & ~4, 64)])
    assert leaks([("x", x | (x << 1), 64)])
    assert leaks([("b", octets(rng, (N,)) & octets(rng, (N,)), 8)])
    assert upper_tail(255.0, 255) == pytest.approx(0.488, abs=0.01)
    assert upper_tail(406.0, 255) == pytest.approx(5.31e-9, rel=0.1)


# views of circuits


def party_views(
    circuit: Circuit, secret: dict[str, Tensor], weights: dict[str, Tensor], made: Translated | None = None
) -> list[View]:
    """Everything that both parties receive in one run, and their own masks where those are known, by party.

    ``made``: what three parties make of the circuit, if it is they who run it; then party 0 is the "server".
    """
    if made is None:
        outcome = run_circuit(circuit, secret, weights=weights, views=True)
    else:
        outcome = run_three(circuit, secret, weights, views=True, made=made)
        circuit = made.circuit
    views: list[View] = []
    frames = (outcome.traffic.frames_to_first, outcome.traffic.frames_to_second)
    for party, received in zip(("server", "client"), frames, strict=True):
        last = circuit[-1].protocol
        opens = [i.protocol for i in circuit if isinstance(i.protocol, (tp.Open, tp.OpenBits, tp.Deliver))]
        forms = _forms(opens, last, SERVER if party == "server" else CLIENT)
        payload = b"".join(received or [])
        for name, form in forms:
            part, payload = payload[: form.size], payload[form.size :]
            views.append((f"{party}: {name}", decode(part, form), 8 if form.planes else form.bits))
        assert not payload
    for index, found in outcome.corrections.items():
        correction = bytes(found)
        for d in circuit[index].protocol.draws:
            if d.derived:
                part, correction = correction[: d.wire.size], correction[d.wire.size :]
                views.append((f"server: correction {index}.{d.name}", decode(part, d.wire), 8 if d.planes else d.bits))
        assert not correction
    return views


def _forms(opens: list[Any], last: Protocol, receiver: int) -> list[tuple[str, Wire]]:
    """The messages that one party receives, in order: of the openings (all in round one), then of the last protocol."""
    out = []
    for p in opens:
        if not (isinstance(p, tp.Deliver) and receiver == CLIENT):
            out.append((p.kind, p.out))
    if isinstance(last, tp.Extend):
        out.append(("extend", Wire((bits.plane_bytes(N),), planes=True)))
    if isinstance(last, tp.Compare):
        each = bits.plane_bytes(N)
        for i, level in enumerate(last.levels):
            out.append((f"compare {i}", Wire((level.variables * len(last.thresholds), each), planes=True)))
    if isinstance(last, tp.Reveal) and receiver == CLIENT:
        out.append(("reveal", last.out))
    return out


@dataclass(frozen=True)
class Scene:
    """A protocol with its openings, made for a ring, and the range of its secrets."""

    protocol: Protocol
    ring: int
    low: int
    high: int
    second: bool = False  # two secrets
    bits: int = 0  # planes of secret bits


def scenes() -> Iterator[tuple[str, Scene]]:
    shape = (N,)
    for ring in (64, 37, 16):
        low, high = -(1 << (ring - 1)), (1 << (ring - 1)) - 1
        yield f"open-{ring}", Scene(tp.Open(shape, ring), ring, low, high)
        yield f"deliver-{ring}", Scene(tp.Deliver(shape, ring), ring, low, high)
        yield f"linear-{ring}", Scene(tp.Linear((N // 4, 3), ring, "w"), ring, low, high)
        yield f"diagonal-{ring}", Scene(tp.Linear((N // 4, 4), ring, "v", True), ring, low, high)
        yield f"product-{ring}", Scene(tp.Product(shape, ring), ring, low, high, second=True)
        yield f"square-{ring}", Scene(tp.Product(shape, ring), ring, low, high)
        yield f"powers-{ring}", Scene(tp.Powers(shape, ring, 4), ring, low, high)
        narrow, far = ring - 5, 1 << (ring - 7)
        yield f"lift-{ring}", Scene(tp.Lift(shape, narrow, 3, ring), narrow, -far, far - 1)
        yield f"lifted_powers-{ring}", Scene(tp.LiftedPowers(shape, ring, narrow, 3), ring, -far, far - 1)
        lifted = tp.LiftedProduct(shape, ring, narrow, narrow)
        yield f"lifted_product-{ring}", Scene(lifted, ring, -far, far - 1, second=True)
        fused = tp.PolynomialProduct(shape, ring, narrow, narrow, 1, (3, -1, 5, 1))
        yield f"polynomial_product-{ring}", Scene(fused, ring, -far, far - 1, second=True)
        yield f"select-{ring}", Scene(tp.Select(shape, ring, (1, 0, -3), (0, 5, 1)), ring, low, high, bits=3)
        yield f"select_each-{ring}", Scene(tp.SelectEach(shape, ring, 2), ring, low, high, bits=2)
        yield f"extend-{ring}", Scene(tp.Extend(shape, ring - 1, 64), ring - 1, low // 4, high // 4)
        compare = tp.Compare(shape, ring, min(4, ring - 10), (0, 3))
        yield f"compare-{ring}", Scene(compare, ring, low // 2, high // 2)
        wide_digits = replace(compare, digit=6)
        yield f"compare-{ring}-digits-of-6", Scene(wide_digits, ring, low // 2, high // 2)
        yield f"reveal-{ring}", Scene(tp.Reveal(shape, ring), ring, low, high)
    yield "open_bits", Scene(tp.OpenBits(shape, 3), 8, 0, 0, bits=3)
    yield "exponential-21", Scene(tp.Exponential(shape, 21, 20, 16, 40, 16), 21, 0, (1 << 20) - 1)
    table = tp.Tabulated(shape, 16, 14, 4, 2, 1 << 14, 47 << 10, 2.0**20, 16, 40)
    yield "tabulated-16", Scene(table, 16, 1 << 14, 47 << 10)
    bands = ((16, 14, 4, 1 << 14, 47 << 10), (15, 13, 4, 1 << 13, 1 << 14))
    yield "tabulated_bands-16", Scene(tp.TabulatedBands(shape, bands, 2, 2.0**20, 16, 40), 16, 1 << 13, 47 << 10)
    yield "digits_in-20", Scene(tp.DigitsIn(shape, 20, ((13, 50), (17, 3))), 20, 0, (1 << 20) - (1 << 17) - 1)
    yield "digit_in-20", Scene(tp.DigitIn(shape, 20, 13, 50), 20, 0, (1 << 20) - (1 << 13) - 1)
    yield "digit_in-8", Scene(tp.DigitIn(shape, 8, 0, 1), 8, 0, 255)
    rows = (N // 128, 128)
    yield "histogram-20", Scene(tp.Histogram(rows, 20, 16, 16, 1), 20, 0, (1 << 20) - (1 << 16) - 1)
    yield "histogram-24", Scene(tp.Histogram(rows, 24, 16, 24, 9), 24, 0, (1 << 24) - (1 << 16) - 1, bits=1)
    yield "quotient-20", Scene(tp.Quotient((N,), 20, 4), 20, -(1 << 19), (1 << 19) - 1)
    groups = (N // 32, 4, 8)
    yield "placed-13", Scene(tp.Placed(groups, 13, 3, 2), 13, 0, (1 << 13) - 1, second=True)
    yield "placed-64", Scene(tp.Placed(groups, 64, 5, 1), 64, 0, (1 << 63) - 1, second=True)
    yield "placed_positions-16", Scene(tp.PlacedPositions(groups, 16, 3, 8, 5), 16, 0, 7)
    yield "units-16", Scene(tp.Units((N,), 16, 4, 16), 16, 0, 15)
    clipped = tp.Exponential(shape, 24, 20, 16, 40, 16)
    yield "exponential-24", Scene(clipped, 24, 0, (1 << 24) - (1 << 20) - 1, bits=1)
    yield "gumbel-37", Scene(tp.Gumbel(shape, 37, 16, 0, 0.7), 37, 0, 0)
    yield "scaled_gumbel-64", Scene(tp.ScaledGumbel(shape, 64, 16, 0), 64, -(1 << 40), 1 << 40)
    yield "compare-2-thresholds-64", Scene(tp.Compare(shape, 64, 0, (0, 1)), 64, -(2**62), 2**62)


SCENES = dict(scenes())


def stage(scene: Scene, value: int, plane: int) -> tuple[list[Instruction], dict[str, Tensor], dict[str, Tensor]]:
    """The circuit around a protocol, all of whose secrets are one value; shared at random."""
    rng = np.random.default_rng(abs(value) % 997 + plane)
    protocol, ring = scene.protocol, scene.ring
    groups = (N // 32, 4, 8)
    special = {"linear": (N // 4, 4), "histogram": (N // 128, 128), "placed": groups, "placed_positions": groups}
    special["select_each"] = (2, N)
    shape = special.get(protocol.kind, (N,))
    weights = {"w": torch.tensor([[1, 2, 3]] * 4), "v": torch.tensor([1, 2, 3, -4])}
    circuit: list[Instruction] = []
    inputs: dict[str, Tensor] = {}
    operands: list[int] = []

    def add(p: Protocol, *reads: int) -> int:
        circuit.append(Instruction(p, reads))
        return len(circuit) - 1

    if scene.bits:
        planes = (scene.bits, bits.plane_bytes(N))
        inputs["b"] = torch.full(planes, plane, dtype=torch.uint8)
        operands.append(add(shared_bits("b", planes, octets(rng, planes))))
        if protocol.kind != "open_bits":
            operands.append(add(tp.OpenBits((N,), scene.bits), operands.pop()))
    if protocol.kind not in ("open_bits", "gumbel"):
        for name in ("x", "y") if scene.second else ("x",):
            inputs[name] = torch.full(shape, value, dtype=torch.int64)
            index = add(shared(name, shape, ring, words(rng, shape)))
            if protocol.kind == "linear":
                index = add(tp.Deliver(shape, ring), index)
            elif protocol.kind not in ("open", "deliver", "extend", "reveal"):
                index = add(tp.Open(shape, ring), index)
            if "lifted" in protocol.operand_kinds:
                index = add(tp.Lift(shape, ring - 5, 0, ring), index)
            operands.append(index)
    if protocol.kind == "product" and not scene.second:
        operands *= 2
    if isinstance(protocol, tp.PolynomialProduct):
        operands.insert(1, add(tp.LiftedPowers(shape, ring, protocol.agreed_x, protocol.degree), operands[0]))
    add(protocol, *operands)
    return circuit, inputs, weights if protocol.kind == "linear" else {}


@pytest.mark.parametrize("name", SCENES)
def test_views_are_uniform(name: str) -> None:
    """Of two extreme secrets alike, and of the two runs together: no key serves twice."""
    scene = SCENES[name]
    uniform([party_views(*stage(scene, *secret)) for secret in ((scene.low, 0), (scene.high, 255))])


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene.protocol.kind != "reveal"])
def test_views_of_three_parties_are_uniform(name: str) -> None:
    """The same, and with two extreme weights alike; "server" and "client" are parties 0 and 1."""
    scene, runs = SCENES[name], []
    for secret, factor in (((scene.low, 0), 0), ((scene.high, 255), -(1 << 20))):
        circuit, inputs, weights = stage(scene, *secret)
        other = {key: w * factor for key, w in weights.items()}
        runs.append(party_views(circuit, inputs, other, translated(circuit)))
    uniform(runs)


def uniform(runs: list[list[View]]) -> None:
    assert [n for n, _, _ in runs[0]] == [n for n, _, _ in runs[1]]
    assert all(runs)
    for views in runs:
        assert not leaks([v for v in views if v[0].startswith("server")])
        assert not leaks([v for v in views if v[0].startswith("client")])
    for (view, x, width), (_, y, _) in zip(*runs, strict=True):
        assert suspicious(difference(x, y), width) is None, view


def test_every_protocol_with_messages_is_looked_at() -> None:
    seen = {scene.protocol.kind for scene in SCENES.values()}
    seen |= {translated(stage(scene, 0, 0)[0]).circuit[-1].protocol.kind for scene in SCENES.values()} - {
        "shared_input"
    }
    silent = {kind for kind, p in Protocol.registry.items() if p.draws is Protocol.draws and p.cost is Protocol.cost}
    elsewhere = {"looked_up", "key_sketch", "unit_vectors", "in_range"}  # see test_lookup.py, test_client_checks.py
    elsewhere |= {"publish"}  # which masks nothing, and is for positions of tokens alone
    elsewhere.add("alarm")  # see test_watch.py
    assert seen == set(Protocol.registry) - silent - elsewhere


def test_the_client_sees_uniform_weights() -> None:
    """D = W - B of extreme weights, and each weight under a mask of its own."""
    for bits_ in (64, 40):
        for w in (0, -(1 << 20)):
            held = {name: torch.full((256, 256), w) for name in ("a", "b")}
            dealer = DealerWeights(key(), dict.fromkeys(held, (256, 256)))
            masked = dict(ServerWeights(held).masked(dealer, dict.fromkeys(held, bits_)))
            assert not leaks([(name, d, bits_) for name, d in masked.items()])


def test_weight_masks_belong_to_one_set_of_weights() -> None:
    """Why a mask serves one set of weights only: under two, D_1 - D_2 = W_1 - W_2."""
    dealer = DealerWeights(key(), {"w": (8, 8)})
    assert torch.equal(dealer.mask("w"), dealer.mask("w"))
    assert not torch.equal(dealer.mask("w"), DealerWeights(key(), {"w": (8, 8)}).mask("w"))
    first, second = (torch.full((8, 8), w) for w in (3, 7))
    d1, d2 = (dict(ServerWeights({"w": w}).masked(dealer, {"w": 64}))["w"] for w in (first, second))
    assert torch.equal(d1 - d2, first - second)


# broken protocols, which the same check must catch


@dataclass(frozen=True)
class BareOpen(tp.Open):
    """Sends its share without a mask."""

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        mine = x + (material["r"] if party == SERVER else 0)
        (theirs,) = yield swap(mine, self.out)
        return Opening(mine + theirs, material["r"])


@dataclass(frozen=True)
class SharedMaskOpen(tp.Open):
    """One mask for all elements."""

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("r", (1,), self.ring),)


@dataclass(frozen=True)
class BareOpenBits(tp.OpenBits):
    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (theirs,) = yield swap(operands[0] & 0xFE | material["beta"] & 1, self.out)
        return theirs


@dataclass(frozen=True)
class BareDeliver(tp.Deliver):
    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        if party == CLIENT:
            yield Exchange(((x, self.out),))
        else:
            yield Exchange((), (self.out,))
        return x


@dataclass(frozen=True)
class BareExtend(tp.Extend):
    """The parties' own bits without masks."""

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        name = "alpha" if party == SERVER else "beta"
        silent = {**material, name: torch.zeros_like(material[name])}
        return (yield from super().run(party, silent, operands, weights))


@dataclass(frozen=True)
class BareCompare(tp.Compare):
    """The last round without masks."""

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        name = f"mask{len(self.levels) - 1}"
        silent = {**material, name: torch.zeros_like(material[name])}
        return (yield from super().run(party, silent, operands, weights))


@dataclass(frozen=True)
class BareDraw(Draw):
    """A derived draw of which the server gets the whole."""

    def remove(self, total: Array, share: Array, out: Array, at: int) -> None:
        super().remove(total, np.zeros_like(share), out, at)


def bare(protocol: Protocol, name: str) -> Protocol:
    """The same protocol whose correction ``name`` is not masked."""

    class Bare(type(protocol)):  # type: ignore[misc]
        @property
        def draws(self) -> tuple[Draw, ...]:
            made = super().draws
            return tuple(BareDraw(**vars(d)) if d.name == name else d for d in made)

    broken: Protocol = Bare(**sizes(protocol))
    return broken


def sizes(protocol: Any) -> dict[str, Any]:
    return {f.name: getattr(protocol, f.name) for f in fields(protocol)}


def replaced(scene: str, cls: Callable[..., Protocol]) -> Scene:
    return replace(SCENES[scene], protocol=cls(**sizes(SCENES[scene].protocol)))


BROKEN = {
    "open": replaced("open-64", BareOpen),
    "open, one mask": replaced("open-37", SharedMaskOpen),
    "open_bits": replaced("open_bits", BareOpenBits),
    "deliver": replaced("deliver-37", BareDeliver),
    "extend": replaced("extend-16", BareExtend),
    "compare": replaced("compare-37", BareCompare),
    "compare, digits of 6": replaced("compare-16-digits-of-6", BareCompare),
} | {
    f"{name}.{draw}": replace(SCENES[name], protocol=bare(SCENES[name].protocol, draw))
    for name, draw in (
        ("product-64", "rr"),
        ("square-16", "rr"),
        ("powers-37", "r3"),
        ("tabulated-16", "rows"),
        ("lift-37", "upper"),
        ("lift-64", "top"),
        ("lifted_powers-37", "r2"),
        ("lifted_powers-16", "d3"),
        ("lifted_product-64", "rr"),
        ("lifted_product-37", "tr"),
        ("lifted_product-16", "rt"),
        ("select-64", "beta"),
        ("select-16", "beta_r"),
        ("extend-16", "product"),
        ("compare-16", "table"),
        ("compare-37", "dealt0"),
        ("exponential-21", "powers"),
        ("exponential-24", "powers"),
        ("digit_in-20", "table"),
        ("histogram-20", "units"),
        ("histogram-24", "units"),
        ("diagonal-64", "u"),
        ("placed-13", "units"),
        ("quotient-20", "table"),
        ("placed-64", "masked"),
        ("placed_positions-16", "units"),
        ("units-16", "units"),
        ("gumbel-37", "noise"),
        ("scaled_gumbel-64", "noise"),
        ("scaled_gumbel-64", "masked"),
    )
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_protocols_are_caught(name: str) -> None:
    scene = BROKEN[name]
    circuit, inputs, weights = stage(scene, scene.low, 0)
    # an unmasked share is uniform by itself where sharing is random: the client then holds the secret alone
    plain = [
        replace(i, protocol=replace(i.protocol, mask=torch.zeros_like(i.protocol.mask)))  # type: ignore[type-var]
        if hasattr(i.protocol, "mask")
        else i
        for i in circuit
    ]
    assert leaks(party_views(plain, inputs, weights))


@pytest.mark.parametrize(
    ("scene", "draw"), [("product-64", "rr"), ("extend-16", "product"), ("compare-37", "dealt0"), ("diagonal-64", "u")]
)
def test_broken_summands_of_party_2_are_caught(scene: str, draw: str) -> None:
    """u = -r (W_0 + W_2) without a mask shows, of even weights at the latest."""
    circuit, inputs, weights = stage(SCENES[scene], SCENES[scene].low, 0)
    made = translated(circuit)
    last = made.circuit[-1]
    broken = replace(made, circuit=(*made.circuit[:-1], replace(last, protocol=bare(last.protocol, draw))))
    with pytest.MonkeyPatch.context() as patch:
        real = three_weights.summand
        patch.setattr(three_weights, "summand", lambda *which: real(*which) & ~1)
        assert leaks(party_views(circuit, inputs, weights, broken))
    assert not leaks(party_views(circuit, inputs, weights, made))
