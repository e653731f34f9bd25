"""The backend: SEAL through TenSEAL's ``sealapi``, which ``codec``, ``refresh``, ``evaluate`` and ``cost`` also call.

Another library would have to offer the same operations: encode at a level and scale, encrypt from a seed, add, multiply
by plain and by ciphertext with relinearization, rescale, drop to a level, rotate, save and load.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO, Any, TypeVar

import numpy as np
import zstandard
from tenseal import sealapi

from protocols.ckks.circuit import Plain, Vector
from protocols.ckks.parameters import Parameters

T = TypeVar("T")

HEADER = 16  # bytes of a file of SEAL's: magic, its own length, version, compression, size
PLAIN, ZSTD = 0, 2  # compression


class InvalidCiphertext(ValueError):
    """The bytes are no ciphertext or key under these parameters."""


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


def bounded(data: bytes, largest: int, what: str) -> bytes:
    """Return ``data`` if it is one whole file of SEAL's that expands to at most ``largest`` bytes.

    Else raises InvalidCiphertext, which names ``what``.
    """
    whole = len(data) > HEADER and int.from_bytes(data[8:16], "little") == len(data)
    if whole and data[5] == ZSTD:
        with suppress(zstandard.ZstdError):
            with zstandard.ZstdDecompressor().stream_reader(data[HEADER:]) as reader:
                size = 0
                while size <= largest and (part := reader.read(1 << 20)):
                    size += len(part)
            whole = size <= largest
    elif whole:
        whole = data[5] == PLAIN and len(data) <= largest + HEADER
    if not whole:
        raise InvalidCiphertext(f"{what}: {len(data)} bytes that are not one key of this Program\nhint: send it again")
    return data


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

    def ciphertext(self, data: bytes, level: int, what: str = "ciphertext") -> Any:
        """Load a ciphertext of two polynomials at this level, with the level's scale; else raises InvalidCiphertext."""
        if len(data) < 16 or int.from_bytes(data[8:16], "little") != len(data):  # SEAL would read a part of it
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
        out = {"public": saved(public), "relin": saved(self._generator.create_relin_keys())}
        for step in steps:
            element = galois_element(step, self.context.parameters.degree)
            out[f"rotate {step}"] = saved(self._generator.create_galois_keys([element]))
        return out

    def secret_bytes(self) -> bytes:
        """Return the secret key's bytes, for a file that only the client may read."""
        return saved(self._generator.secret_key())

    def encrypt(self, values: Vector, level: int) -> bytes:
        """Encrypt a vector of slots at a level; half of the ciphertext is a seed, which saves half of the bytes."""
        return self.encrypt_plain(self.context.encode(values, level, self.context.parameters.scales[level]))

    def encrypt_plain(self, plain: Any) -> bytes:
        return saved(self._encryptor.encrypt_symmetric(plain))

    def decrypt_plain(self, data: bytes, level: int) -> Any:
        out = sealapi.Plaintext()
        self._decryptor.decrypt(self.context.ciphertext(data, level, "result"), out)
        return out

    def decrypt(self, data: bytes, level: int = 0) -> Vector:
        return self.context.decode(self.decrypt_plain(data, level))


def key_names(steps: Sequence[int]) -> list[str]:
    """Return the names of a Program's keys, in the order in which they are sent."""
    return ["public", "relin", *(f"rotate {s}" for s in steps)]


class EvaluationKeys:
    """A client's keys at the server: the public, relinearization and rotation keys of one Program, and no others.

    The size of each is checked before SEAL expands it. Raises InvalidCiphertext for keys that do not belong here.
    """

    def __init__(self, context: Context, keys: Mapping[str, bytes], steps: Sequence[int]) -> None:
        wanted, p = set(key_names(steps)), context.parameters
        if set(keys) != wanted:
            missing, more = sorted(wanted - set(keys)), sorted(set(keys) - wanted)
            raise InvalidCiphertext(
                f"evaluation keys: missing {missing[:4]}, not asked for {more[:4]}\n"
                "hint: make the keys for this Program"
            )
        polynomial = 8 * p.degree * (p.levels + 2)
        largest = (p.levels + 1) * (polynomial + 512) + 16 * p.degree + 4096
        public = bounded(keys["public"], 2 * polynomial + 4096, "public key")
        self.zeros = sealapi.Encryptor(context.seal, context.load(sealapi.PublicKey, public, "public key"))
        relin = bounded(keys["relin"], largest, "relinearization key")
        self.relin: Any = context.load(sealapi.RelinKeys, relin, "relinearization key")
        if self.relin.size() != 1 or not self.relin.has_key(2):  # SEAL would read another kind of key beyond its end
            raise InvalidCiphertext("the relinearization key is another key\nhint: make them again")
        self.galois: dict[int, Any] = {}
        for step in steps:
            what = f"key of rotation {step}"
            key: Any = context.load(sealapi.GaloisKeys, bounded(keys[f"rotate {step}"], largest, what), what)
            if key.size() != 1 or not key.has_key(galois_element(step, p.degree)):
                raise InvalidCiphertext(f"the {what} rotates otherwise\nhint: make the keys again")
            self.galois[step] = key
