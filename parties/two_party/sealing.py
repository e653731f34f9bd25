"""Sealed seeds: only the holder of the dealer's key can open them, whoever answers at the dealer's address.

HPKE (RFC 9180, base mode) with X-Wing (ML-KEM-768 with X25519), HKDF-SHA-256 and AES-256-GCM, from ``cryptography``:
traffic that is recorded today stays closed to a quantum computer. All other fields of a request are bound into the
seal, so that it opens in that request alone. The answer proves that the seed was opened.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from parties.net.secret_files import read_secret, read_trusted
from parties.served.files import store
from protocols.prg import SEED_BYTES, derive_key
from secure.errors import HandshakeError, InvalidInput, ProtocolError

SECRET_FILE, PUBLIC_FILE = "dealer.key", "dealer.pub"
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_MLKEM_SECRET, _MLKEM_PUBLIC, _X25519 = 64, 1184, 32  # bytes of the encodings
_SECRET, _PUBLIC, _HASHED = "unseen-dealer-secret-1", "unseen-dealer-1", "SHA256:"
SEALED_BYTES = SEED_BYTES + 1120 + 16  # a seed, what X-Wing encapsulates, and a tag


def transcript(*fields: str | bytes | int) -> bytes:
    """Encode fields so that different ones never give the same bytes: each has its length before it."""
    encoded = bytearray()
    for each in fields:
        raw = each.to_bytes(8, "big") if isinstance(each, int) else each.encode() if isinstance(each, str) else each
        encoded += len(raw).to_bytes(8, "big") + raw
    return bytes(encoded)


def answer_proof(seed: bytes, sealed: bytes, *answer: str | bytes | int) -> bytes:
    """Make the proof that a seal was opened, over an answer: HMAC-SHA-256 under a key derived from the sealed seed.

    A seal is fresh in every request and binds its fields, so no earlier answer passes for this one.
    """
    return hmac.digest(derive_key(seed, "answer"), transcript(sealed, *answer), "sha256")


@dataclass(frozen=True)
class DealerKey:
    """The public half of a dealer's key: 1,216 bytes."""

    encoded: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The key as one line, as in ``dealer.pub``."""
        return f"{_PUBLIC} {base64.b64encode(self.encoded).decode()}"

    @property
    def fingerprint(self) -> str:
        """A short name that no other key has: SHA-256 of the key."""
        return _HASHED + base64.b64encode(hashlib.sha256(self.encoded).digest()).decode().rstrip("=")

    def seal(self, seed: bytes, *fields: str | bytes | int) -> bytes:
        """Seal a seed, bound to the other fields of its request. Raises ProtocolError for a key that is none."""
        try:
            mlkem = MLKEM768PublicKey.from_public_bytes(self.encoded[:_MLKEM_PUBLIC])
            curve = X25519PublicKey.from_public_bytes(self.encoded[_MLKEM_PUBLIC:])
            public = hpke.MLKEM768X25519PublicKey(mlkem, curve)
            return _SUITE.encrypt(seed, public, info=transcript(*fields))
        except ValueError:
            raise ProtocolError("the dealer's key is no key", "ask the dealer's owner for dealer.pub") from None


class SealingKey:
    """A dealer's key pair. It opens what was sealed to ``public``; its repr shows nothing."""

    def __init__(self, secret: bytes) -> None:
        mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[:_MLKEM_SECRET])
        curve = X25519PrivateKey.from_private_bytes(secret[_MLKEM_SECRET:])
        self._secret, self._private = secret, hpke.MLKEM768X25519PrivateKey(mlkem, curve)
        self.public = DealerKey(mlkem.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> SealingKey:
        return cls(MLKEM768PrivateKey.generate().private_bytes_raw() + X25519PrivateKey.generate().private_bytes_raw())

    def open(self, sealed: bytes, *fields: str | bytes | int) -> bytes:
        """Return the sealed seed. Raises HandshakeError if it was sealed to another key or in another request."""
        try:
            seed = _SUITE.decrypt(sealed[: SEALED_BYTES + 1], self._private, info=transcript(*fields))
        except InvalidTag:
            seed = b""
        if len(seed) != SEED_BYTES:
            raise HandshakeError(
                f"the dealer cannot open the seal of the seed; its key is {self.public.fingerprint}",
                "use this dealer's dealer.pub, and the same version of unseen everywhere",
            )
        return seed

    @classmethod
    def load(cls, state: Path) -> SealingKey:
        """Load a dealer's key, or make it once, in its state directory; its public half is written beside it.

        Raises InvalidInput if others can read or replace it, or if it is damaged.
        """
        path = state / SECRET_FILE
        with suppress(FileExistsError):  # another dealer may make it at the same moment
            if not path.exists():
                cls.generate().save(state)
        secret = _decoded(read_secret(path), _SECRET, _MLKEM_SECRET + _X25519)
        if secret is None:
            hint = "delete it, start the dealer again, and give its new dealer.pub to server and clients"
            raise InvalidInput(f"{path} is damaged", hint)
        loaded = cls(secret)
        loaded._publish(state)
        return loaded

    def save(self, state: Path) -> None:
        """Write the key into a state directory. Raises FileExistsError if there is one."""
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        secret = f"{_SECRET} {base64.b64encode(self._secret).decode()}\n".encode()
        store(state / SECRET_FILE, secret, replace=False)
        self._publish(state)

    def _publish(self, state: Path) -> None:
        path, text = state / PUBLIC_FILE, f"{self.public.text}\n".encode()
        if not path.exists() or path.read_bytes() != text:
            store(path, text)
        with suppress(OSError):  # where the directory is mounted read-only, its owner chose who reads it
            path.chmod(0o644)


def fingerprint_of(given: str) -> str:
    """Return the fingerprint that is meant: by itself (``SHA256:...``), as the text of a dealer.pub, or by its path.

    Raises InvalidInput if it is neither, or if others may write to the file.
    """
    if given.startswith(_HASHED):
        if not re.fullmatch("[A-Za-z0-9+/]{43}", given.removeprefix(_HASHED)):
            raise InvalidInput(f"the dealer's key: {given!r} is no fingerprint", "the dealer prints it when it starts")
        return given
    if given.startswith(_PUBLIC.rstrip("1")):
        return _public(given.encode(), "the dealer's key").fingerprint
    try:
        return _public(read_trusted(Path(given)), given).fingerprint
    except FileNotFoundError:
        raise InvalidInput(
            f"the dealer's key: there is no file {given[:200]}", "copy dealer.pub from the dealer"
        ) from None


def _public(text: bytes, where: str) -> DealerKey:
    encoded = _decoded(text, _PUBLIC, _MLKEM_PUBLIC + _X25519)
    if encoded is None:
        raise InvalidInput(f"{where} is no dealer's key", "copy dealer.pub from the dealer once more")
    return DealerKey(encoded)


def _decoded(text: bytes, kind: str, size: int) -> bytes | None:
    """Decode a line of ``kind`` and base64; None if it is none, or not of ``size`` bytes."""
    named, _, encoded = text.strip().partition(b" ")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except ValueError:
        return None
    return raw if named == kind.encode() and len(raw) == size else None
