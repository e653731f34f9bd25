"""Refreshes under CKKS: integers through plaintexts, masks, and what the client gets to see."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ckks import canonical, codec, noise, refresh
from protocols.ckks.canonical import InvalidCiphertext
from protocols.ckks.circuit import Circuit, Vector, clear
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import schedule
from protocols.ckks.seal import Client, Context, EvaluationKeys
from secure.errors import DoesNotFit
from tests.ciphertexts import INPUTS, TOP, P, returned, run


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(P)


@pytest.fixture(scope="module")
def client(context: Context) -> Client:
    return Client(context)


@pytest.mark.parametrize("level", [0, 2, 4])
def test_coefficients_are_exact(level: int, context: Context) -> None:
    coefficients = codec.Coefficients(context)
    generator, modulus = np.random.default_rng(level), 1
    for prime in P.primes[: level + 1]:
        modulus *= prime
    edge = modulus // 2
    integers = np.array([int.from_bytes(generator.bytes(24)) % modulus - edge for _ in range(P.degree)], dtype=object)
    integers[:6] = [0, 1, -1, edge, -edge, 1 << 30]
    found = coefficients.integers(coefficients.plaintext(integers, level), level)
    assert (found == integers).all()
    assert level == 0 or max(abs(v) for v in found) > 1 << 64
    half = coefficients.integers(context.encode(0.5, level, P.scales[level]), level)
    assert half[0] == round(P.scales[level] / 2)
    assert not half[1:].any()


@settings(deadline=None)
@given(
    st.sampled_from([(30, 37), (35, 46), (40, 47), (40, 60)]),
    st.integers(0, 4),
    st.lists(st.fractions(-1, 1), min_size=1, max_size=20),
)
def test_residues_are_those_of_integers_and_back(bits: tuple[int, int], level: int, parts: list[Fraction]) -> None:
    """Primes of more than 48 bits take another way."""
    primes = Parameters(16384, 4, *bits).primes[: level + 1]
    half = math.prod(primes) // 2
    integers = np.array([0, 1, -1, half, -half, *(int(part * half) for part in parts)], dtype=object)
    found = codec.reduced(integers, primes)
    assert found.tolist() == [[each % prime for each in integers] for prime in primes]
    assert codec.combined(found, primes).tolist() == integers.tolist()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_words_are_joined(words: list[int]) -> None:
    both = np.array([words, words[::-1]], dtype=np.uint64).T
    assert codec.joined(both).tolist() == [
        sum(w << 64 * k for k, w in enumerate(each)) for each in (words, words[::-1])
    ]


@settings(deadline=None)
@given(st.integers(-(1 << 130), 1 << 130), st.floats(0.97, 1.03))
def test_rescaling_integers_rounds(value: int, ratio: float) -> None:
    scale, wanted = 2.0**30, 2.0**30 * ratio
    (found,) = refresh.rescaled(np.array([value], dtype=object), scale, wanted)
    assert abs(found - value * Fraction(wanted) / Fraction(scale)) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("degree", "scale", "base"), [(8192, 30, 38), (8192, 35, 39), (16384, 40, 48), (32768, 50, 58)]
)
def test_a_mask_fits_its_modulus(degree: int, scale: int, base: int) -> None:
    level = refresh.reserve(degree, scale, base)
    p, modulus = Parameters(degree, level, scale, base), 1
    for prime in p.primes[: level + 1]:
        modulus *= prime
    mask, message = refresh.largest_mask(p, level), 1 << refresh.message_bits(scale)
    assert mask + message == modulus // 2  # nothing of the modulus is left over, and m + r never wraps
    assert modulus >= 2 * message * degree << refresh.HIDING
    if level:
        with pytest.raises(DoesNotFit, match=f"level {level - 1} hides"):
            refresh.largest_mask(p, level - 1)


def bins(integers: codec.Integers, largest: int) -> Vector:
    """How many of the integers lie in each 16th of [-largest, largest]; what a message pushes out counts at the end."""
    places = [(v + largest) * 16 // (2 * largest + 1) for v in integers]
    return np.bincount(np.clip(places, 0, 15), minlength=16).astype(float)


def test_what_the_client_sees_of_a_refresh_is_noise(context: Context, client: Client) -> None:
    masks, coefficients = refresh.Masks(context), refresh.Refresher(client).coefficients
    seen = []
    for slots in (np.zeros(P.slots), np.full(P.slots, 60.0)):
        plain = client.encrypt(slots, TOP)
        mask = masks.draw(TOP)
        masked = context.packed(mask.added(context.ciphertext(plain, canonical.fresh(P, TOP))))
        integers = coefficients.integers(client.decrypt_plain(masked, TOP), TOP)
        assert (
            integers - mask.integers
            == coefficients.integers(client.decrypt_plain(returned(client, plain, TOP), TOP), TOP)
        ).all()
        assert max(abs(v) for v in integers - mask.integers) < 1 << refresh.message_bits(P.scale_bits)
        largest = refresh.largest_mask(P, TOP)
        assert -largest <= min(mask.integers) < -0.98 * largest
        assert 0.98 * largest < max(mask.integers) <= largest
        seen.append(bins(integers, largest))
        expected = P.degree / 16
        assert ((seen[-1] - expected) ** 2 / expected).sum() < 75  # chi-square, 15 degrees of freedom: p = 1e-9
        assert not (masks.draw(TOP).integers == mask.integers).any()
    assert ((seen[0] - seen[1]) ** 2 / (seen[0] + seen[1])).sum() < 75


def test_a_refresh_keeps_the_value(client: Client) -> None:
    c = Circuit(P.slots)
    x = c.dot([(c.input("x"), 0.5)])
    for _ in range(8):
        x = c.add(c.multiply(x, x), c.dot([(c.input("y"), 0.25)]))  # at most a half
    c.outputs = [x]
    s = schedule(c, P.levels, TOP)
    assert s.rounds > 1
    (result,) = run(client, EvaluationKeys(client.context, client.evaluation_keys([]), []), s)
    error = np.abs(result - clear(c, INPUTS)[0])
    assert 0 < error.max() < 2 * noise.WORST * noise.errors(s, P, INPUTS)[s.circuit.outputs[0]].max() < 1e-3


def test_a_refresh_that_comes_back_otherwise_is_refused(client: Client) -> None:
    c = Circuit(P.slots)
    c.outputs = [c.multiply(c.multiply(c.multiply(x := c.dot([(c.input("x"), 0.5)]), x), x), x)]
    s = schedule(c, 3, TOP)
    weights, none = EncodedWeights(client.context, s), EvaluationKeys(client.context, client.evaluation_keys([]), [])
    for answer, error in (
        ([], ValueError),
        ([client.encrypt(INPUTS["x"], 0)] * len(s.refreshes(1)), InvalidCiphertext),
    ):
        computing = evaluate(weights, none, {n: client.encrypt(INPUTS[n], v) for n, v in s.inputs().items()})
        assert len(next(computing)) == len(s.refreshes(1)) > 0
        with pytest.raises(error, match=r"came back with 0|refreshed ciphertext: \d+ bytes, where it has"):
            computing.send(answer)
