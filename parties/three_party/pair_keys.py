"""Two seeds of a pair of parties: one that the model's owner gives them, and one that they agree on by themselves.

The owner's seed expands to the pair's summand of the weights, and lets the two know each other when they agree on a key
(see ``agreement``). All proofs and tags, and the zero shares of answers, follow from the agreed key. Each of the three
pairs has its own, so neither the third party, nor a client, nor an owner who kept all seeds can make what one party
shows to another. Tags are GMAC (AES-128-GCM without a message): two parties compare the frames that one sent and the
other received under a key of the query, and no answer leaves a party before that.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from protocols.prg import Key, derive_key, derive_seed
from protocols.protocol import Shape
from secure.errors import HandshakeError, PartiesDisagree


class Seal:
    """A running tag over bytes that one party sends to another. The key must serve this tag alone."""

    def __init__(self, key: bytes) -> None:
        # a fixed nonce is safe because the key makes only one tag
        self._running = Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()

    def update(self, payload: bytes | memoryview) -> None:
        self._running.authenticate_additional_data(bytes(payload) if isinstance(payload, memoryview) else payload)

    def tag(self) -> bytes:
        """Finish and return the tag; no bytes can be added after this."""
        self._running.finalize()
        return self._running.tag

    def check(self, theirs: bytes, what: str) -> None:
        """Compare with the tag of the other holder of ``what``; raises PartiesDisagree if they differ."""
        if not hmac.compare_digest(self.tag(), theirs):
            raise PartiesDisagree(
                f"{what} differ between the two parties that hold them: no answer is given",
                "ask again; where it happens again, look at the parties' memory and network",
            )


class _PairSecret:
    """A seed that the parties ``pair`` have in common. Its repr never shows it."""

    def __init__(self, seed: bytes, pair: tuple[int, int]) -> None:
        self._seed, self.pair = seed, pair

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pair})"

    def proof(self, purpose: str, *about: bytes) -> bytes:
        """Make a proof that the sender holds the seed, bound to a purpose and to the bytes ``about``."""
        return hmac.digest(derive_key(self._seed, "proof", purpose), b"/".join(about), "sha256")

    def shows(self, proof: bytes, purpose: str, *about: bytes) -> bool:
        """Return whether a holder of the seed made ``proof``, in constant time."""
        return hmac.compare_digest(self.proof(purpose, *about), proof)


class PairSeed(_PairSecret):
    """The seed that the owner gave to a pair."""

    def weights_key(self) -> Key:
        """Return the key from which this pair expands its summand of all weights."""
        return Key(derive_key(self._seed, "weights"))

    def require(self, proof: bytes, purpose: str, *about: bytes) -> None:
        """Raise HandshakeError unless a holder of the seed made ``proof``."""
        if not self.shows(proof, purpose, *about):
            raise other_seed("it", self.pair)

    def agreed(self, shared: bytes, transcript: bytes) -> PairKey:
        """Return the key that follows from this seed and a shared secret of this pair, bound to a transcript's hash.

        shared: 32 bytes of X25519. Whoever lacks either of the two learns nothing about the key (HKDF-SHA-256).
        """
        return PairKey(derive_seed(shared + self._seed, "agreed", transcript.hex()), self.pair)


def other_seed(who: str, pair: tuple[int, int]) -> HandshakeError:
    """Return the error for a party that does not hold the seed of ``pair``."""
    return HandshakeError(
        f"{who} does not show the seed of parties {pair[0]} and {pair[1]}",
        "give all three parties the shares of one run of: unseen share-model",
    )


class PairKey(_PairSecret):
    """The key that a pair agreed on for as long as both processes are connected, and what is derived from it."""

    def require(self, proof: bytes, purpose: str, *about: bytes) -> None:
        """Raise HandshakeError unless a holder of the key made ``proof``."""
        if not self.shows(proof, purpose, *about):
            a, b = self.pair
            raise HandshakeError(f"it does not show the key that parties {a} and {b} agreed on", "ask again")

    def zero_share(self, number: bytes, output: int, shape: Shape) -> Tensor:
        """Return uniform 64-bit words that party 0 adds to its share of an output, and party 1 subtracts from its own.

        Without them, a share of the answer would be a function of openings and of masks that party 2 knows, so that
        party 2 together with a client could solve for values inside the network. Every output has a key of its own.
        """
        return Key(derive_key(self._seed, "answer", number.hex(), output)).stream(0).words(shape)

    def sketch_key(self, number: bytes) -> Key:
        """Return the key with which this pair sketches a client's look-up keys in the query ``number``."""
        return Key(derive_key(self._seed, "sketch", number.hex()))

    def seal(self, purpose: str, number: bytes) -> Seal:
        """Start a tag for a purpose in the query ``number``; whoever makes such a number never uses it twice."""
        return Seal(derive_key(self._seed, "seal", purpose, number.hex()))
