"""CKKS with ciphertexts: errors as predicted, what is refused, and what never leaves the client."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ckks import canonical, diagonals, noise, refresh
from protocols.ckks.canonical import InvalidCiphertext
from protocols.ckks.circuit import Circuit, Vector, clear
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import schedule
from protocols.ckks.seal import Client, Context, EvaluationKeys, key_forms, saved
from tests.ciphertexts import INPUTS, TOP, P, residues, returned, run
from tests.ckks_fuzz import mutate

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
        full = returned(client, data, level)
        error = np.abs(client.decrypt(full, level) - INPUTS["x"])
        assert 0 < error.max() < 1e-5
        assert 0.5 < len(data) / len(full) < 0.502  # a seed stands for the other half
        assert len(data) == P.fresh_bytes(level)
        assert len(full) == P.ciphertext_bytes(level)
        assert client.encrypt(INPUTS["x"], level) != data
        covered = client.encrypt(INPUTS["x"], level, 8.0)
        assert len(covered) == len(data)
        assert np.abs(client.decrypt(returned(client, covered, level), level) - INPUTS["x"]).max() < 1e-5


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-310])
def test_what_is_encoded_looks_alike_whatever_is_encrypted(
    value: float, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEAL's encoder takes less time for a vector of equal numbers, so none of a client's reaches it as it is."""
    seen = list[Vector]()
    encode = Context.encode

    def noting(self: Context, vector: Vector, *more: Any) -> Any:
        seen.append(vector)
        return encode(self, vector, *more)

    monkeypatch.setattr(Context, "encode", noting)
    client.encrypt(np.full(P.slots, value), P.levels, 4.0)
    for each in seen:
        assert np.abs(each).max() > 3.9
        assert abs(each.mean()) < 1.5
        assert len(set(each.tolist())) == P.slots


def test_the_largest_number_of_a_level_is_encoded(context: Context) -> None:
    for level in range(P.levels + 1):
        largest, signs = P.largest(level), np.sign(vector(level))
        for each in (np.full(P.slots, largest), largest * signs):
            context.encode(each, level, P.scales[level])
    with pytest.raises(ValueError, match="too large"):
        context.encode(np.full(P.slots, 2.5 * P.largest(0)), 0, P.scales[0])


def test_keys_have_the_predicted_size(keys: dict[str, bytes]) -> None:
    assert set(keys) == {"public", "relin", "rotate 1", "rotate 3", "rotate 4"}
    for name, key in keys.items():
        assert len(key) == (P.public_key_bytes if name == "public" else P.key_bytes)
    assert {name: form.size for name, form in key_forms(P, STEPS).items()} == {n: len(k) for n, k in keys.items()}


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


FRESH, COMPUTED = canonical.fresh(P, 2), canonical.computed(P, 2)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEAL reads nothing."""

    def load(*_: object) -> None:
        raise AssertionError("SEAL was given bytes")

    monkeypatch.setattr(Context, "load", load)


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("form", [FRESH, COMPUTED, canonical.public_key(P), canonical.switching_key(P)])
def test_only_the_exact_size_is_read(form: canonical.WireForm) -> None:
    data = bytes(form.size)
    form.unpack(data, "it")
    for other in (b"", data[:1], data[:16], data[:-1], data + b"\0", data + data):
        with pytest.raises(
            InvalidCiphertext, match=f"^it: {len(other)} bytes, where it has {form.size}\nhint: send it"
        ):
            form.unpack(other, "it")


@pytest.mark.parametrize("form", [FRESH, COMPUTED, canonical.public_key(P), canonical.switching_key(P)])
def test_every_residue_is_below_its_prime(form: canonical.WireForm) -> None:
    seeds = [os.urandom(64) for _ in range(form.seeds)]
    largest = np.broadcast_to(np.array(form.primes, np.uint64)[:, None] - 1, (form.polynomials, form.limbs, P.degree))
    found, kept = form.unpack(form.pack(largest, seeds), "it")
    assert (found == largest).all()
    assert kept == seeds
    for polynomial in {0, form.polynomials - 1}:
        for limb in range(form.limbs):
            for place in (0, 4097, P.degree - 1):
                changed = largest.copy()
                changed[polynomial, limb, place] += 1
                with pytest.raises(
                    InvalidCiphertext, match=f"it: a residue that is not below the prime {form.primes[limb]}"
                ):
                    form.unpack(form.pack(changed, seeds), "it")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.randoms(use_true_random=False))
def test_bits_are_packed_exactly(bits: int, count: int, random: Any) -> None:
    rows = np.array([random.getrandbits(bits) for _ in range(count * 64 * 2)], np.uint64).reshape(count, 64, 2)
    words = canonical._pack(rows, bits)
    assert words.shape == (count, bits, 2)
    assert (canonical._unpack(words, bits) == rows).all()


def test_files_are_those_that_seal_writes(context: Context, client: Client) -> None:
    """What is built around the residues is what SEAL itself writes, but for compression and places without a key."""
    plain = context.encode(0.5, 2, P.scales[2])
    made = saved(client._encryptor.encrypt_symmetric(plain))
    data = canonical.pack_ciphertext(P, made)
    (rows, (seed,)) = canonical.fresh(P, 2).unpack(data, "it")
    rebuilt = canonical.ciphertext_file(context.ids[2], rows, P.scales[2], seed=seed)
    assert rebuilt[canonical.HEADER :] == canonical.body_of(made)
    assert rebuilt[:5] == made[:5]
    key, body = context.seal.key_parms_id(), canonical.body_of(saved(client._generator.create_relin_keys()))
    again = canonical.switching_key_file(key, *_unpacked(canonical.switching_key(P), body), 0)
    assert again[canonical.HEADER :] == body


def _unpacked(form: canonical.WireForm, body: bytes) -> tuple[canonical.Words, list[bytes]]:
    return form.unpack(canonical.pack_switching_key(P, canonical.file(body)), "it")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_mutants_are_refused_or_harmless(data: st.DataObject) -> None:
    """Ciphertexts and keys with bytes changed, cut, repeated or added; what is not refused is used."""
    mutate(data)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_that_are_nothing_are_refused(data: bytes) -> None:
    for form in (FRESH, canonical.switching_key(P)):
        with pytest.raises(InvalidCiphertext, match="\nhint: "):
            form.unpack(data, "it")


def test_a_ciphertext_of_something_else_is_refused(context: Context, client: Client) -> None:
    higher = returned(client, client.encrypt(INPUTS["x"], 3), 3)
    with pytest.raises(InvalidCiphertext, match=rf"result: {len(higher)} bytes, where it has {COMPUTED.size}"):
        client.decrypt(higher, 2)
    with pytest.raises(
        InvalidCiphertext, match="result: "
    ):  # the client takes no fresh one, the server no computed one
        client.decrypt(client.encrypt(INPUTS["x"], 2), 2)
    with pytest.raises(InvalidCiphertext, match="ciphertext: "):
        context.ciphertext(returned(client, client.encrypt(INPUTS["x"], 2), 2), FRESH)
    other = Client(Context(Parameters(8192, 4, 31, 38)))
    with pytest.raises(InvalidCiphertext, match="hint: send it again"):
        context.ciphertext(other.encrypt(INPUTS["x"], 2), FRESH)
    stranger = returned(client, client.encrypt(INPUTS["x"], 0), 0)
    assert np.abs(Client(context).decrypt(stranger)).max() > 8  # another client's: noise alone


def test_an_input_at_another_level_is_refused(context: Context, client: Client, server: EvaluationKeys) -> None:
    c = Circuit(P.slots)
    c.outputs = [c.dot([(c.input("x"), 0.5)])]
    computing = evaluate(EncodedWeights(context, schedule(c)), server, {"x": client.encrypt(INPUTS["x"], 2)})
    with pytest.raises(InvalidCiphertext, match=r"input 'x': .* bytes, where it has"):
        next(computing)


@pytest.mark.usefixtures("unreachable")
def test_keys_of_another_program_are_refused(context: Context, client: Client, keys: dict[str, bytes]) -> None:
    def refused(message: str, changed: dict[str, bytes]) -> None:
        with pytest.raises(InvalidCiphertext, match=message) as caught:
            EvaluationKeys(context, changed, STEPS)
        assert "\nhint: " in str(caught.value)

    refused(r"missing \['rotate 4'\], not asked for \[\]", {k: v for k, v in keys.items() if k != "rotate 4"})
    refused(r"missing \['relin'\]", {k: v for k, v in keys.items() if k != "relin"})
    refused(r"missing \[\], not asked for \['rotate 9'\]", {**keys, "rotate 9": keys["rotate 1"]})
    refused("public key: .* bytes, where it has", {**keys, "public": keys["public"][:-9]})


@pytest.mark.parametrize("name", ["relin", "rotate 3"])
def test_keys_with_parts_missing_are_refused(
    name: str, context: Context, keys: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEAL takes such keys, and reads beyond their end as soon as it uses them."""
    load = Context.load

    def loads_no_other(self: Context, kind: type[Any], data: bytes, what: str) -> Any:
        assert what != {"relin": "relinearization key", "rotate 3": "key of rotation 3"}[name]
        return load(self, kind, data, what)

    monkeypatch.setattr(Context, "load", loads_no_other)
    whole = canonical.switching_key(P)
    rows, seeds = whole.unpack(keys[name], "it")
    for parts in range(1, P.levels + 1):
        form = canonical.WireForm(P, whole.limbs, parts, parts)
        short = form.pack(rows[:parts], seeds[:parts])
        file = canonical.switching_key_file(context.seal.key_parms_id(), rows[:parts], seeds[:parts], 0)
        for data in (short, file):
            with pytest.raises(InvalidCiphertext, match=rf"key.*: {len(data)} bytes, where it has {P.key_bytes}\n"):
                EvaluationKeys(context, {**keys, name: data}, STEPS)


@pytest.mark.usefixtures("unreachable")
def test_compressed_files_are_never_expanded(context: Context, keys: dict[str, bytes]) -> None:
    """Zstandard within Zstandard, which SEAL expands at every layer: such a file has not the size of a key, or if it is
    filled up to it, its bytes are residues, which nothing expands."""
    inner = zstandard.compress(bytes(1 << 26), 19)
    nested = zstandard.compress(b"".join([inner] * 64), 19)
    bomb = (
        struct.pack("<HB", canonical.MAGIC, 16) + canonical.VERSION + struct.pack("<B2xQ", 2, 16 + len(nested)) + nested
    )
    with pytest.raises(InvalidCiphertext, match=f"public key: {len(bomb)} bytes, where it has"):
        EvaluationKeys(context, {**keys, "public": bomb}, STEPS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    filled = bomb + bytes(P.key_bytes - len(bomb))
    with suppress(InvalidCiphertext):
        canonical.switching_key(P).unpack(filled, "it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kB


def test_parameters_that_seal_refuses() -> None:
    with pytest.raises(ValueError, match="SEAL refuses"):
        Context(Parameters.__new__(_Weak))


class _Weak(Parameters):
    degree, levels, scale_bits, base_bits = 2048, 4, 30, 38


# the secret key


def contains(data: bytes, words: canonical.Words) -> bool:
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
    body = canonical.body_of((tmp_path / "secret").read_bytes())
    words = np.frombuffer(body, np.uint64, (P.levels + 2) * P.degree, 72)
    assert words.max() < max(P.primes)
    assert contains(body, words)
    assert contains(b"abc" + words[100:104].tobytes() + b"d", words)
    assert not contains(words[100:104].tobytes()[1:], words)
    forms = key_forms(P, STEPS)
    sent = [(forms[name], key) for name, key in keys.items()]
    sent += [(canonical.fresh(P, level), client.encrypt(INPUTS["x"], level)) for level in (0, 4)]
    masked = returned(client, client.encrypt(INPUTS["x"], TOP), TOP)
    sent.append((canonical.fresh(P, 4), refresh.Refresher(client).refresh(masked, TOP, 4)))
    for form, data in sent:
        assert not contains(data, words)
        assert not contains(residues(form, data), words)
