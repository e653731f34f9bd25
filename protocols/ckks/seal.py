"""The backend: SEAL through TenSEAL's ``sealapi``, which ``codec``, ``refresh``, ``evaluate`` and ``cost`` also call.

Another library would have to offer the same operations: encode at a level and scale, encrypt from a seed, add, multiply
by plain and by ciphertext with relinearization, rescale, drop to a level, rotate, save and load.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import IO, Any, TypeVar

import numpy as np
from tenseal import sealapi

from protocols.ckks.canonical import (
    InvalidCiphertext,
    WireForm,
    Words,
    body_of,
    ciphertext_file,
    computed,
    fresh,
    pack_ciphertext,
    pack_switching_key,
    public_key,
    switching_key,
    switching_key_file,
    words_of,
)
from protocols.ckks.circuit import Plain, Vector
from protocols.ckks.parameters import Parameters
from protocols.prg import KEY_BYTES, Key, fresh_seed

T = TypeVar("T")


@contextmanager
def _file() -> Iterator[tuple[str, IO[bytes]]]:
    """Open a file for SEAL, which can only save to and load from paths.

    It is a file in memory that has no name and ends with this process or, if the system has no such files, a temporary
    file that its owner alone may read. Ciphertexts and keys pass through it, and so do masks, decrypted polynomials and
    the secret key, each only in the process that holds it anyway.
    """
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("seal"), "w+b") as file:
            yield f"/proc/self/fd/{file.fileno()}", file
    else:
        with tempfile.NamedTemporaryFile() as named:
            yield named.name, named


def saved(item: Any) -> bytes:
    """Return the bytes of a ciphertext or a key."""
    with _file() as (path, file):
        item.save(path)
        file.seek(0)
        return file.read()


class Context:
    """SEAL's tables for one set of parameters; SEAL's own check of 128-bit security is on."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        chosen = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
        chosen.set_poly_modulus_degree(parameters.degree)
        chosen.set_coeff_modulus([sealapi.Modulus(p) for p in parameters.primes])
        self.seal = sealapi.SEALContext(chosen, True, sealapi.SEC_LEVEL_TYPE.TC128)
        if not self.seal.parameters_set():
            raise ValueError(f"SEAL refuses {parameters}: {self.seal.parameters_error_message()}")
        self.encoder = sealapi.CKKSEncoder(self.seal)

    @cached_property
    def ids(self) -> list[Any]:
        """SEAL's id of every level, from level 0."""
        out, data = [], self.seal.first_context_data()
        for _ in range(self.parameters.levels + 1):
            out.append(data.parms_id())
            data = data.next_context_data()
        return out[::-1]

    def level_of(self, item: Any) -> int:
        return self.ids.index(list(item.parms_id()) if not isinstance(item.parms_id(), list) else item.parms_id())

    def encode(self, value: Plain, level: int, scale: float) -> Any:
        out = sealapi.Plaintext()
        numbers = value.tolist() if isinstance(value, np.ndarray) else float(value)
        self.encoder.encode(numbers, self.ids[level], scale, out)
        if out.is_zero():  # SEAL refuses products with zero, so the smallest number stands in for it
            self.encoder.encode(1.0 / scale, self.ids[level], scale, out)
        return out

    def decode(self, plain: Any) -> Vector:
        return np.array(self.encoder.decode_double(plain))

    def load(self, kind: type[T], data: bytes, what: str) -> T:
        """Load a ciphertext or a key from bytes that somebody sent; SEAL checks them against the parameters.

        Raises InvalidCiphertext, which names ``what``.
        """
        out = kind()
        try:
            with _file() as (path, file):
                file.write(data)
                file.flush()
                out.load(self.seal, path)  # type: ignore[attr-defined]
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise InvalidCiphertext(
                f"{what}: {len(data)} bytes that are not valid under N = {self.parameters.degree}, "
                f"{self.parameters.levels} levels ({error})\nhint: keys, ciphertexts and Program must belong together"
            ) from None
        return out

    def ciphertext(self, data: bytes | memoryview, form: WireForm, what: str = "ciphertext") -> Any:
        """Load a ciphertext of this form, with the scale of its level. Else raises InvalidCiphertext."""
        residues, seeds = form.unpack(data, what)
        level = form.limbs - 1
        scale = self.parameters.scales[level]
        made = ciphertext_file(self.ids[level], residues, scale, seed=seeds[0] if seeds else None)
        return self.load(sealapi.Ciphertext, made, what)

    def residues(self, plain: Any) -> Words:
        """Return the residues of a plaintext of this process, in the transformed form that ciphertexts have."""
        return words_of(body_of(saved(plain)), 40 + 8)  # behind the level's id, the count and the scale

    def packed(self, ciphertext: Any) -> bytes:
        """Return the canonical form of a ciphertext of this process."""
        return pack_ciphertext(self.parameters, saved(ciphertext))


def galois_element(step: int, degree: int) -> int:
    """Return the Galois element of the automorphism that rotates by ``step`` slots."""
    return pow(3, step % (degree // 2), 2 * degree)


class Client:
    """The client's keys. secret: bytes that ``secret_bytes`` returned before; None makes a fresh key."""

    def __init__(self, context: Context, secret: bytes | None = None) -> None:
        self.context = context
        if secret is None:
            self._generator = sealapi.KeyGenerator(context.seal)
        else:
            key = context.load(sealapi.SecretKey, secret, "secret key")
            self._generator = sealapi.KeyGenerator(context.seal, key)
        secret = self._generator.secret_key()
        self._encryptor = sealapi.Encryptor(context.seal, secret)
        self._decryptor = sealapi.Decryptor(context.seal, secret)

    def evaluation_keys(self, steps: Sequence[int]) -> dict[str, bytes]:
        """Make the relinearization key, one key for each rotation (half of each as a seed), and a public key.

        The server uses the public key to re-randomize the ciphertexts that it sends. Returns the keys' bytes by name.
        """
        public = sealapi.PublicKey()
        self._generator.create_public_key(public)
        p = self.context.parameters
        out = {"public": pack_ciphertext(p, saved(public))}
        out["relin"] = pack_switching_key(p, saved(self._generator.create_relin_keys()))
        for step in steps:
            made = self._generator.create_galois_keys([galois_element(step, p.degree)])
            out[f"rotate {step}"] = pack_switching_key(p, saved(made))
        return out

    def secret_bytes(self) -> bytes:
        """Return the secret key's bytes, for a file that only the client may read."""
        return saved(self._generator.secret_key())

    def encrypt(self, values: Vector, level: int, reach: float = 0.0) -> bytes:
        """Encrypt a vector of slots at a level; half of the ciphertext is a seed, which saves half of the bytes.

        reach: the largest number that could stand there. SEAL's encoder takes other times for other values: zeros take
        two thirds of what most vectors take. So it encodes their sum with uniform numbers up to ``reach``, and these
        are subtracted from the ciphertext again. 0 encodes the values themselves.
        """
        p = self.context.parameters
        if not reach:
            return self.encrypt_plain(self.context.encode(values, level, p.scales[level]))
        form, words = fresh(p, level), Key(fresh_seed()[:KEY_BYTES]).stream(0).words((p.slots,))
        cover = words.numpy() * (reach * 2.0**-63)
        covered = self.encrypt_plain(self.context.encode(values + cover, level, p.scales[level]))
        known = self.context.residues(self.context.encode(cover, level, p.scales[level]))
        residues, seeds = form.unpack(covered, "input")
        primes = np.array(form.primes, np.uint64)[:, None]
        return form.pack((residues + primes - known.reshape(1, form.limbs, -1)) % primes, seeds)

    def encrypt_plain(self, plain: Any) -> bytes:
        return self.context.packed(self._encryptor.encrypt_symmetric(plain))

    def decrypt_plain(self, data: bytes, level: int) -> Any:
        """Decrypt a ciphertext that the server computed. Raises InvalidCiphertext."""
        out = sealapi.Plaintext()
        self._decryptor.decrypt(self.context.ciphertext(data, computed(self.context.parameters, level), "result"), out)
        return out

    def decrypt(self, data: bytes, level: int = 0) -> Vector:
        return self.context.decode(self.decrypt_plain(data, level))


def key_names(steps: Sequence[int]) -> list[str]:
    """Return the names of a Program's keys, in the order in which they are sent."""
    return ["public", "relin", *(f"rotate {s}" for s in steps)]


def key_forms(parameters: Parameters, steps: Sequence[int]) -> dict[str, WireForm]:
    """Return the form of each of a Program's keys, by name and in order."""
    return {n: public_key(parameters) if n == "public" else switching_key(parameters) for n in key_names(steps)}


def split_keys(data: bytes | memoryview, forms: Mapping[str, WireForm]) -> dict[str, memoryview]:
    """Cut the bytes of all keys, one after another, into those of each. Raises InvalidCiphertext for another size."""
    view, at, out = memoryview(data), 0, dict[str, memoryview]()
    for name, form in forms.items():
        out[name] = view[at : at + form.size]
        at += form.size
    if at != len(view):
        raise InvalidCiphertext(f"evaluation keys of {len(view)} bytes, where they have {at}\nhint: upload them again")
    return out


class EvaluationKeys:
    """A client's keys at the server: the public, relinearization and rotation keys of one Program, and no others.

    Sizes and residues are checked before SEAL gets the first of them. Raises InvalidCiphertext for keys that do not
    belong here. A key that has the form but was made for something else gives wrong answers, to who sent it.
    """

    def __init__(self, context: Context, keys: Mapping[str, bytes | memoryview], steps: Sequence[int]) -> None:
        forms, identity = key_forms(context.parameters, steps), context.seal.key_parms_id()
        if set(keys) != set(forms):
            missing, more = sorted(set(forms) - set(keys)), sorted(set(keys) - set(forms))
            raise InvalidCiphertext(
                f"evaluation keys: missing {missing[:4]}, not asked for {more[:4]}\n"
                "hint: make the keys for this Program"
            )
        residues, _ = forms["public"].unpack(keys["public"], "public key")
        public = context.load(sealapi.PublicKey, ciphertext_file(identity, residues, 1.0), "public key")
        self.zeros = sealapi.Encryptor(context.seal, public)

        def switching(kind: type[T], name: str, what: str, place: int) -> T:
            residues, seeds = forms[name].unpack(keys[name], what)
            return context.load(kind, switching_key_file(identity, residues, seeds, place), what)

        self.relin: Any = switching(sealapi.RelinKeys, "relin", "relinearization key", 0)
        self.galois: dict[int, Any] = {}
        for step in steps:
            place = (galois_element(step, context.parameters.degree) - 1) // 2
            self.galois[step] = switching(sealapi.GaloisKeys, f"rotate {step}", f"key of rotation {step}", place)
