"""Mutants of ciphertexts and keys: they are refused with one error, or they are used without harm.

``python -m tests.ckks_fuzz MINUTES`` goes on for so long and says how many it tried.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from functools import lru_cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from protocols.ckks import canonical
from protocols.ckks.parameters import Parameters
from protocols.ckks.seal import Client, Context, EvaluationKeys
from tests.ciphertexts import INPUTS

P = Parameters(8192, 1, 30, 38)  # the fewest digits
LEVEL, STEPS = 1, [1]


@lru_cache(maxsize=1)
def _made() -> tuple[Client, dict[str, bytes], bytes]:
    client = Client(Context(P))
    return client, client.evaluation_keys(STEPS), client.encrypt(INPUTS["x"], LEVEL)


NAMES = ("public", "relin", "rotate 1", "ciphertext", "result")


def seed(name: str) -> bytes:
    """One object as it travels."""
    client, keys, ciphertext = _made()
    context = client.context
    result = context.packed(context.ciphertext(ciphertext, canonical.fresh(P, LEVEL)))
    return {**keys, "ciphertext": ciphertext, "result": result}[name]


def take(name: str, data: bytes) -> None:
    """Load one object beside sound others, and compute with them. Raises InvalidCiphertext if it is refused."""
    client, keys, ciphertext = _made()
    context = client.context
    if name == "result":
        client.decrypt(data, LEVEL)
        return
    objects = {**keys, "ciphertext": ciphertext, name: data}
    loaded = EvaluationKeys(context, {k: objects[k] for k in keys}, STEPS)
    x = context.ciphertext(objects["ciphertext"], canonical.fresh(P, LEVEL))
    e, product, zero = sealapi.Evaluator(context.seal), sealapi.Ciphertext(), sealapi.Ciphertext()
    with suppress(RuntimeError):  # SEAL returns no ciphertext whose second polynomial is zero
        e.multiply(x, x, product)
        e.relinearize_inplace(product, loaded.relin)
        e.rotate_vector_inplace(product, 1, loaded.galois[1])
        loaded.zeros.encrypt_zero(product.parms_id(), zero)
        zero.scale = product.scale
        e.add_inplace(product, zero)
        client.decrypt(context.packed(product), LEVEL)


def mutate(data: st.DataObject) -> bool:
    """Change one object and take it; return whether it was taken."""
    name = data.draw(st.sampled_from(NAMES))
    mutant = _mutant(data, seed(name))
    try:
        take(name, mutant)
    except canonical.InvalidCiphertext:
        return False
    assert len(mutant) == len(seed(name))
    return True


def _mutant(data: st.DataObject, whole: bytes) -> bytes:
    out = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "fill", "copy", "header", "cut", "add"]))
        at = data.draw(st.integers(0, max(0, len(out) - 1)))
        size = data.draw(st.sampled_from([1, 8, 64, 4096, len(out)]))
        if kind == "flip" and out:
            out[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "fill":
            there = out[at : at + size]
            out[at : at + size] = bytes([data.draw(st.sampled_from([0, 0x7F, 0xFF]))]) * len(there)
        elif kind == "copy":
            source = data.draw(st.integers(0, max(0, len(out) - 1)))
            there, piece = out[at : at + size], out[source : source + size]
            out[at : at + min(len(there), len(piece))] = piece[: len(there)]
        elif kind == "header" and len(out) > 96:
            out[:96] = canonical.file(data.draw(st.binary(min_size=80, max_size=80)))
        elif kind == "cut":
            del out[at:]
        elif kind == "add":
            out += data.draw(st.binary(max_size=64))
    return bytes(out)


def main(minutes: float) -> None:
    end, tried, taken = time.monotonic() + 60 * minutes, 0, 0
    while time.monotonic() < end:

        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def some(data: st.DataObject) -> None:
            nonlocal tried, taken
            tried += 1
            taken += mutate(data)

        some()
    sys.stdout.write(f"{tried} mutants, {taken} of them taken and used\n")


if __name__ == "__main__":
    main(float(sys.argv[1]))
