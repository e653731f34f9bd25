"""What a pair of parties has in common: a seed from the model's owner, from which proofs and tags follow.

Each of the three pairs has its own seed, so what one party shows to another cannot be made by the third, nor by a
client. Tags are GMAC (AES-128-GCM without a message): what two parties both hold, the frames that one sent and the
other received, is compared under a key of the query, and no answer leaves a party before.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from protocols.prg import Key, derive_key
from protocols.protocol import Shape
from secure.errors import HandshakeError, PartiesDisagree


class Seal:
    """A running tag over bytes that one party sends to another, under a key that serves this once."""

    def __init__(self, key: bytes) -> None:
        # a fixed nonce is safe because the key is used for one tag alone
        self._running = Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()

    def update(self, payload: bytes | memoryview) -> None:
        self._running.authenticate_additional_data(bytes(payload) if isinstance(payload, memoryview) else payload)

    def tag(self) -> bytes:
        """The tag; nothing can be added after it."""
        self._running.finalize()
        return self._running.tag

    def check(self, theirs: bytes, what: str) -> None:
        """PartiesDisagree where the other holder of ``what`` has another tag."""
        if not hmac.compare_digest(self.tag(), theirs):
            raise PartiesDisagree(
                f"{what} differ between the two parties that hold them: no answer is given",
                "ask again; where it happens again, look at the parties' memory and network",
            )


class PairKey:
    """The seed that parties ``pair`` share, and what is derived from it. Its repr never shows it."""

    def __init__(self, seed: bytes, pair: tuple[int, int]) -> None:
        self._seed, self.pair = seed, pair

    def __repr__(self) -> str:
        return f"PairKey({self.pair})"

    def weights_key(self) -> Key:
        """Of the summand of all weights that this pair expands."""
        return Key(derive_key(self._seed, "weights"))

    def proof(self, purpose: str, *about: bytes) -> bytes:
        """What only a holder of the seed can show, bound to what it is about."""
        return hmac.digest(derive_key(self._seed, "proof", purpose), b"/".join(about), "sha256")

    def require(self, proof: bytes, purpose: str, *about: bytes) -> None:
        """HandshakeError unless ``proof`` was made by a holder of the seed."""
        if not hmac.compare_digest(self.proof(purpose, *about), proof):
            a, b = self.pair
            raise HandshakeError(
                f"it does not show the seed of parties {a} and {b}",
                "give all three parties the shares of one run of: unseen share-model",
            )

    def zero_share(self, number: bytes, output: int, shape: Shape) -> Tensor:
        """Uniform 64-bit words that party 0 adds to its share of one of a query's outputs, and party 1 takes from its.

        Without it, a share of the answer would be a function of openings and of masks that party 2 knows: together
        with a client it could solve for values inside the network. Every output has a key of its own.
        """
        return Key(derive_key(self._seed, "answer", number.hex(), output)).stream(0).words(shape)

    def seal(self, purpose: str, number: bytes) -> Seal:
        """``number`` names a query and is never used twice by who made it."""
        return Seal(derive_key(self._seed, "seal", purpose, number.hex()))
