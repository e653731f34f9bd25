"""CKKS with ciphertexts: errors as predicted, what is refused, and what never leaves the client."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from protocols.ckks import codec, diagonals, noise, refresh
from protocols.ckks.circuit import Circuit, Vector, clear
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import schedule
from protocols.ckks.seal import Client, Context, EvaluationKeys, InvalidCiphertext, saved
from tests.ciphertexts import INPUTS, TOP, P, run, unpacked

STEPS = [1, 3, 4]


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(P)


@pytest.fixture(scope="module")
def client(context: Context) -> Client:
    return Client(context)


@pytest.fixture(scope="module")
def keys(client: Client) -> dict[str, bytes]:
    return client.evaluation_keys(STEPS)


@pytest.fixture(scope="module")
def server(context: Context, keys: dict[str, bytes]) -> EvaluationKeys:
    return EvaluationKeys(context, keys, STEPS)


def vector(seed: int) -> Vector:
    return np.random.default_rng(seed).uniform(-1, 1, P.slots)


# errors


def test_what_is_encrypted_is_decrypted(context: Context, client: Client) -> None:
    for level in range(P.levels + 1):
        data = client.encrypt(INPUTS["x"], level)
        error = np.abs(client.decrypt(data, level) - INPUTS["x"])
        assert 0 < error.max() < 1e-5
        full = saved(context.ciphertext(data, level))
        assert 0.45 < len(data) / len(full) < 0.57  # a seed stands for the other half
        assert len(data) == pytest.approx(P.polynomial_bytes(level), rel=0.05)
        assert len(full) == pytest.approx(P.ciphertext_bytes(level), rel=0.05)
        assert client.encrypt(INPUTS["x"], level) != data


def test_keys_have_the_predicted_size(keys: dict[str, bytes]) -> None:
    assert set(keys) == {"public", "relin", "rotate 1", "rotate 3", "rotate 4"}
    for name, key in keys.items():
        if name != "public":
            assert len(key) == pytest.approx(P.key_bytes, rel=0.05)


def products(c: Circuit, x: int, y: int) -> int:
    """Ciphertexts and plain vectors, signs, drops from one level to another."""
    a = c.multiply(c.dot([(x, vector(5)), (y, 0.5)]), y)
    b = c.add(c.multiply(a, a), c.dot([(x, vector(6))]), a, signs=(-1, 1, -1))
    return c.shift(c.add(c.dot([(b, vector(7)), (y, vector(8))]), x), vector(9))


def rotations(c: Circuit, x: int, y: int) -> int:
    return c.add(c.rotate(c.rotate(x, 1), 3), y)


def mixed(c: Circuit, x: int, y: int) -> int:
    lin = diagonals.apply(c, [x, y], {(0, 1): vector(1), (0, 4): vector(2), (1, 0): vector(3)})
    a = c.add(c.multiply(lin, y), c.rotate(x, 3), lin, signs=(-1, 1, -1))
    return c.shift(c.multiply(a, x), 0.25)


@pytest.mark.parametrize("build", [products, rotations, mixed])
def test_errors_are_as_predicted(build: Callable[[Circuit, int, int], int], client: Client) -> None:
    c = Circuit(P.slots)
    c.outputs = [build(c, c.input("x"), c.input("y"))]
    s = schedule(c)
    server = EvaluationKeys(client.context, client.evaluation_keys(c.steps), c.steps)
    (result,), (output,) = run(client, server, s), s.circuit.outputs
    error = result - clear(c, INPUTS)[0]
    predicted = noise.errors(s, P, INPUTS)[output]
    assert 0.2 < np.median(np.abs(error) / predicted) / 0.6745 < 2.0  # the slots in general
    # the worst one, each beside its own prediction: a few slots have far larger errors than the rest, and whether these
    # few happen to be small says nothing
    assert 0.5 < noise.WORST / (np.abs(error) / predicted).max() < 4
    assert np.abs(error / predicted).max() < 3 * noise.WORST  # each by itself; what rounding adds has Laplace's tail


def test_errors_of_one_node_on_both_sides() -> None:
    c = Circuit(P.slots)
    x, y = c.input("x"), c.input("y")
    c.outputs = [c.add(x, x), c.add(x, y), c.multiply(x, x), c.multiply(x, y)]
    s = schedule(c)
    same = {"x": np.ones(P.slots), "y": np.ones(P.slots)}
    double, two, square, product = (noise.errors(s, P, same)[i].max() for i in s.circuit.outputs)
    assert double == pytest.approx(np.sqrt(2) * two)
    assert square > product
    assert noise.bits(0.25) == 2
    assert noise.bits(0.0) == 60


# what is refused


def test_a_ciphertext_cut_short_is_refused(context: Context, client: Client) -> None:
    data = client.encrypt(INPUTS["x"], 2)
    for size in (0, 1, 15, 16, 17, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(InvalidCiphertext, match=f"input 'x': {size} bytes that are not"):
            context.ciphertext(data[:size], 2, "input 'x'")


def test_no_bytes_end_otherwise(context: Context, client: Client) -> None:
    data = client.encrypt(INPUTS["x"], 0)
    refused = 0
    for position in [*range(160), *range(160, len(data), 997)]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        try:
            context.ciphertext(bytes(changed), 0)
        except InvalidCiphertext:
            refused += 1
    assert refused > 60


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_that_are_nothing_are_refused(data: bytes) -> None:
    context = Context(P)
    for kind in (context.ciphertext, lambda d, level: context.load(sealapi.GaloisKeys, d, "key")):
        with pytest.raises(InvalidCiphertext, match="\nhint: "):
            kind(data, 1)


def packed(body: bytes) -> bytes:
    return codec._file(body)


@pytest.mark.parametrize(
    ("start", "field"),
    [
        (0, bytes(32)),  # a level that there is not
        (32, bytes(1)),  # coefficients (no NTT form)
        (33, struct.pack("<Q", 0)),  # no polynomial at all
        (33, struct.pack("<Q", 1)),
        (33, struct.pack("<Q", 3)),
        (33, struct.pack("<Q", 1 << 40)),
        (41, struct.pack("<Q", 4096)),
        (49, struct.pack("<Q", 2)),
        (57, struct.pack("<d", 1.0)),
        (57, struct.pack("<d", float("nan"))),
        (65, struct.pack("<Q", 3)),
        (89, struct.pack("<Q", 3 * 8192 - 1)),
        (97, struct.pack("<Q", (1 << 64) - 1)),  # a residue above its prime
    ],
)
def test_a_ciphertext_whose_head_was_changed_is_refused(
    start: int, field: bytes, context: Context, client: Client
) -> None:
    body = unpacked(client.encrypt(INPUTS["x"], 2))
    assert context.ciphertext(packed(body), 2).size() == 2
    with pytest.raises(InvalidCiphertext, match="\nhint: "):
        context.ciphertext(packed(body[:start] + field + body[start + len(field) :]), 2)


def test_a_ciphertext_of_something_else_is_refused(context: Context, client: Client, keys: dict[str, bytes]) -> None:
    with pytest.raises(InvalidCiphertext, match=r"result: 2 polynomials at level 3, .*; expected 2 at level 2, scale"):
        client.decrypt(client.encrypt(INPUTS["x"], 3), 2)
    scaled = client.encrypt_plain(context.encode(0.5, 2, P.scales[2] * 1.001))
    with pytest.raises(InvalidCiphertext, match=r"expected 2 at level 2, scale .*\nhint: encrypt with the parameters"):
        context.ciphertext(scaled, 2)
    other = Client(Context(Parameters(8192, 4, 31, 38)))
    with pytest.raises(InvalidCiphertext, match=r"are not valid .*\nhint: keys, ciphertexts and Program must belong"):
        context.ciphertext(other.encrypt(INPUTS["x"], 2), 2)
    with pytest.raises(InvalidCiphertext, match="not valid"):
        context.ciphertext(keys["relin"], 2)
    out, x = sealapi.Ciphertext(), context.ciphertext(client.encrypt(INPUTS["x"], 2), 2)
    sealapi.Evaluator(context.seal).multiply(x, x, out)
    with pytest.raises(InvalidCiphertext, match="3 polynomials at level 2"):
        context.ciphertext(saved(out), 2)
    assert np.abs(Client(context).decrypt(client.encrypt(INPUTS["x"], 0))).max() > 8  # another client's: noise alone


def test_an_input_at_another_level_is_refused(context: Context, client: Client, server: EvaluationKeys) -> None:
    c = Circuit(P.slots)
    c.outputs = [c.dot([(c.input("x"), 0.5)])]
    computing = evaluate(EncodedWeights(context, schedule(c)), server, {"x": client.encrypt(INPUTS["x"], 2)})
    with pytest.raises(InvalidCiphertext, match="input 'x': 2 polynomials at level 2"):
        next(computing)


def test_keys_of_another_program_are_refused(context: Context, client: Client, keys: dict[str, bytes]) -> None:
    def refused(message: str, changed: dict[str, bytes]) -> None:
        with pytest.raises(InvalidCiphertext, match=message) as caught:
            EvaluationKeys(context, changed, STEPS)
        assert "\nhint: " in str(caught.value)

    refused(r"missing \['rotate 4'\], not asked for \[\]", {k: v for k, v in keys.items() if k != "rotate 4"})
    refused(r"missing \['relin'\]", {k: v for k, v in keys.items() if k != "relin"})
    refused(r"missing \[\], not asked for \['rotate 9'\]", {**keys, "rotate 9": keys["rotate 1"]})
    refused("the key of rotation 3 rotates otherwise", {**keys, "rotate 3": keys["rotate 4"]})
    refused("relinearization key: .* not one key", {**keys, "relin": keys["relin"][:-9]})
    refused("key of rotation 3: .* not (valid|one key)", {**keys, "rotate 3": client.encrypt(INPUTS["x"], 1)})
    other = Client(Context(Parameters(8192, 3, 30, 38)))
    refused("key of rotation 1: .* not valid", {**keys, "rotate 1": other.evaluation_keys([1])["rotate 1"]})


def test_parameters_that_seal_refuses() -> None:
    with pytest.raises(ValueError, match="SEAL refuses"):
        Context(Parameters.__new__(_Weak))


class _Weak(Parameters):
    degree, levels, scale_bits, base_bits = 2048, 4, 30, 38


# the secret key


def contains(data: bytes, words: codec.Words) -> bool:
    """Whether 32 bytes in a row of the words stand anywhere in the data."""
    known = set(words[:-3].tolist())
    for start in range(8):
        here = np.frombuffer(data, np.uint64, (len(data) - start) // 8, start)
        for at in np.flatnonzero(np.isin(here, words[:-3])):
            assert int(here[at]) in known
            for place in np.flatnonzero(words[:-3] == here[at]):
                if at + 4 <= len(here) and (here[at : at + 4] == words[place : place + 4]).all():
                    return True
    return False


def test_no_secret_key_is_in_what_is_sent(client: Client, keys: dict[str, bytes], tmp_path: Path) -> None:
    client._generator.secret_key().save(str(tmp_path / "secret"))
    body = unpacked((tmp_path / "secret").read_bytes())
    words = np.frombuffer(body, np.uint64, (P.levels + 2) * P.degree, 72)
    assert words.max() < max(P.primes)
    assert contains(body, words)
    assert contains(b"abc" + words[100:104].tobytes() + b"d", words)
    assert not contains(words[100:104].tobytes()[1:], words)
    fresh = [client.encrypt(INPUTS["x"], level) for level in (0, 4)]
    refreshed = refresh.Refresher(client).refresh(client.encrypt(INPUTS["x"], TOP), TOP, 4)
    for sent in (*keys.values(), *fresh, refreshed):
        assert not contains(sent, words)
        assert not contains(unpacked(sent), words)
