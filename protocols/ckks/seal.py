"""The backend: SEAL by TenSEAL's ``sealapi``, whose use is confined to this file and the next two.

What another library would have to offer is what is called here: encode at a level and scale, encrypt from a seed, add,
multiply by plain and by ciphertext with relinearization, rescale, drop to a level, rotate, save and load.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tenseal import sealapi

from protocols.ckks.circuit import Plain, Vector
from protocols.ckks.parameters import Parameters

T = TypeVar("T")


class InvalidCiphertext(ValueError):
    """Bytes that are no ciphertext (or key) under these parameters."""


@lru_cache(maxsize=1)
def _directory() -> Path:
    """SEAL saves to and loads from paths alone: a directory in memory where there is one, readable by its owner alone
    (mode 0700). Files in it last for one call.
    """
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="unseen-", dir=base))
    atexit.register(_remove, path, os.getpid())
    return path


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a child of it
        shutil.rmtree(path, ignore_errors=True)


def saved(item: Any) -> bytes:
    """The bytes of a ciphertext or a key."""
    path = _directory() / uuid.uuid4().hex
    try:
        item.save(str(path))
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


class Context:
    """SEAL's tables for some parameters; its own check of 128-bit security is on."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        chosen = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
        chosen.set_poly_modulus_degree(parameters.degree)
        chosen.set_coeff_modulus(sealapi.CoeffModulus.Create(parameters.degree, parameters.prime_bits))
        self.seal = sealapi.SEALContext(chosen, True, sealapi.SEC_LEVEL_TYPE.TC128)
        if not self.seal.parameters_set():
            raise ValueError(f"SEAL refuses {parameters}: {self.seal.parameters_error_message()}")
        self.encoder = sealapi.CKKSEncoder(self.seal)

    @cached_property
    def ids(self) -> list[Any]:
        """SEAL's name of every level."""
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
        if out.is_zero():  # SEAL refuses products with zero: the smallest number that there is instead
            self.encoder.encode(1.0 / scale, self.ids[level], scale, out)
        return out

    def decode(self, plain: Any) -> Vector:
        return np.array(self.encoder.decode_double(plain))

    def load(self, kind: type[T], data: bytes, what: str) -> T:
        """A ciphertext or a key from bytes that somebody sent; SEAL checks them against the parameters."""
        path = _directory() / uuid.uuid4().hex
        out = kind()
        try:
            path.write_bytes(data)
            out.load(self.seal, str(path))  # type: ignore[attr-defined]
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise InvalidCiphertext(
                f"{what}: {len(data)} bytes that are not valid under N = {self.parameters.degree}, "
                f"{self.parameters.levels} levels ({error})\nhint: keys, ciphertexts and Program must belong together"
            ) from None
        finally:
            path.unlink(missing_ok=True)
        return out

    def ciphertext(self, data: bytes, level: int, what: str = "ciphertext") -> Any:
        """A ciphertext of two polynomials at this level, with the scale that belongs to it."""
        if len(data) < 16 or int.from_bytes(data[8:16], "little") != len(data):  # SEAL would read a part
            raise InvalidCiphertext(f"{what}: {len(data)} bytes that are not one ciphertext\nhint: send it again")
        out: Any = self.load(sealapi.Ciphertext, data, what)
        scale = self.parameters.scales[level]
        if (
            out.size() != 2
            or not out.is_ntt_form()
            or self.level_of(out) != level
            or not abs(out.scale / scale - 1) < 1e-9
        ):
            raise InvalidCiphertext(
                f"{what}: {out.size()} polynomials at level {self.level_of(out)}, scale {out.scale:.6g}; expected 2 at "
                f"level {level}, scale {scale:.6g}\nhint: encrypt with the parameters of this Program"
            )
        return out


def galois_element(step: int, degree: int) -> int:
    """The automorphism that rotates by ``step`` slots."""
    return pow(3, step % (degree // 2), 2 * degree)


class Client:
    """The client's keys. ``secret``: what ``secret_bytes`` gave before; else a fresh key is made."""

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

    def evaluation_keys(self, steps: list[int]) -> dict[str, bytes]:
        """The relinearization key and one key for each rotation, half of each as a seed."""
        out = {"relin": saved(self._generator.create_relin_keys())}
        for step in steps:
            element = galois_element(step, self.context.parameters.degree)
            out[f"rotate {step}"] = saved(self._generator.create_galois_keys([element]))
        return out

    def secret_bytes(self) -> bytes:
        """The secret key, for a file of the client's own; it passes through a directory that its owner alone reads."""
        return saved(self._generator.secret_key())

    def encrypt(self, values: Vector, level: int) -> bytes:
        """A fresh ciphertext of a vector of slots, from a seed: half the bytes."""
        return self.encrypt_plain(self.context.encode(values, level, self.context.parameters.scales[level]))

    def encrypt_plain(self, plain: Any) -> bytes:
        return saved(self._encryptor.encrypt_symmetric(plain))

    def decrypt_plain(self, data: bytes, level: int) -> Any:
        out = sealapi.Plaintext()
        self._decryptor.decrypt(self.context.ciphertext(data, level, "result"), out)
        return out

    def decrypt(self, data: bytes, level: int = 0) -> Vector:
        return self.context.decode(self.decrypt_plain(data, level))


class EvaluationKeys:
    """What the server holds of a client: the relinearization key and the rotation keys of one Program, no others."""

    def __init__(self, context: Context, keys: dict[str, bytes], steps: list[int]) -> None:
        wanted = {"relin", *(f"rotate {s}" for s in steps)}
        if set(keys) != wanted:
            missing, more = sorted(wanted - set(keys)), sorted(set(keys) - wanted)
            raise InvalidCiphertext(
                f"evaluation keys: missing {missing[:4]}, not asked for {more[:4]}\n"
                "hint: make the keys for this Program"
            )
        self.relin: Any = context.load(sealapi.RelinKeys, keys["relin"], "relinearization key")
        self.galois: dict[int, Any] = {}
        for step in steps:
            key: Any = context.load(sealapi.GaloisKeys, keys[f"rotate {step}"], f"key of rotation {step}")
            if not key.has_key(galois_element(step, context.parameters.degree)):
                raise InvalidCiphertext(
                    f"the key sent for rotation {step} rotates otherwise\nhint: make the keys again"
                )
            self.galois[step] = key
