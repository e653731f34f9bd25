"""The keys of a session's queries, and the rule that a query number is used only once.

When a session begins, each party sends the dealer a fresh seed, sealed to the dealer's key; nobody else sees it. The
key of a query is derived from that seed's successor of the query's number, the session, the Program and the number, so
no two queries ever share a stream. A number is burnt before anything is drawn from its key, and stays burnt if the
query fails.
"""

from __future__ import annotations

import hmac
import secrets
import threading

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parties.two_party.sealing import transcript
from protocols.prg import KEY_BYTES, Key, derive_key, derive_seed, next_seed
from secure.errors import ProtocolError, QueryError

SESSION_BYTES = 16
PROCESS_BYTES = 16  # that name the process of a server
SEALED_KEY = KEY_BYTES + 16  # bytes of a client's key and its tag
MAXIMUM_QUERY = 1 << 40
MAXIMUM_SKIP = 64  # query numbers that may be left out at a time; each costs all parties one HKDF
MAXIMUM_PREPARED = 2  # prepared queries of one session at a time: the server holds the corrections of each in memory
MAXIMUM_STEPS = 8  # the same for queries of conversations


def new_session() -> bytes:
    return secrets.token_bytes(SESSION_BYTES)


def query_key(seed: bytes, party: str, session: bytes, program_digest: str, query: int, *place: str | int) -> Key:
    """Return the AES key of one party's streams in one query. place: that in a conversation, if it stands in one."""
    return Key(derive_key(seed, "query", party, session.hex(), program_digest, query, *place))


def mask_key(seed: bytes, weights_digest: str) -> Key:
    """Return the AES key that expands to the mask B of one set of weights."""
    return Key(derive_key(seed, "weight-mask", weights_digest))


def join_proof(mask_seed: bytes, session: bytes, program_digest: str, weights_digest: str, server_seed: bytes) -> bytes:
    """Make the proof, for the dealer, that the sender is the model's server: clients do not know the mask seed.

    Without it a client could join its own session as the server, and read the weights' mask out of the corrections.
    """
    key = derive_key(mask_seed, "join")
    return hmac.digest(
        key, b"/".join([session, program_digest.encode(), weights_digest.encode(), server_seed]), "sha256"
    )


def model_name(mask_seed: bytes) -> str:
    """Return the public name of masked weights: 64 hexadecimal digits, derived from the seed of their mask.

    Only who knows the seed can register the name, and nobody learns anything about the weights from it.
    """
    return derive_seed(mask_seed, "name").hex()


def renew_proof(mask_seed: bytes, who: str, nonce: bytes, program_digest: str, weights_digest: str) -> bytes:
    """Make the proof that ``who`` ("server" or "dealer") knows a model's mask seed; nonce: fresh for every call."""
    key = derive_key(mask_seed, "renew")
    return hmac.digest(key, transcript(who, nonce, program_digest, weights_digest), "sha256")


def proving_key(server_seed: bytes) -> bytes:
    """Return the key of ``deal_proof`` and ``close_proof``, which outlives the seed and tells nothing about it."""
    return derive_key(server_seed, "deal")


def deal_proof(key: bytes, session: bytes, query: int, *place: str | int) -> bytes:
    """Make the proof that the sender is the server that joined: nobody else may get the corrections.

    place: that of the query in a conversation, if it stands in one.
    """
    return hmac.digest(key, transcript("deal", session, query, *place), "sha256")


def close_proof(key: bytes, session: bytes) -> bytes:
    """Make the proof that the sender is the server that joined: nobody else may end the session."""
    return hmac.digest(key, transcript("close", session), "sha256")


# entries: queries that are dealt before a client comes


def stock_proof(mask_seed: bytes, program_digest: str, weights_digest: str, server_seed: bytes) -> bytes:
    """Make the proof, for the dealer, that the sender is the model's server, which alone gets entries."""
    key = derive_key(mask_seed, "stock")
    return hmac.digest(key, transcript(program_digest, weights_digest, server_seed), "sha256")


def server_entry_key(server_seed: bytes, program_digest: str, weights_digest: str, entry: bytes) -> Key:
    """Return the AES key of the server's streams of an entry; a seed that is sent once more gives another entry's."""
    return Key(derive_key(server_seed, "entry", program_digest, weights_digest, entry.hex()))


def entry_proving_key(server_seed: bytes, entry: bytes) -> bytes:
    """Return the key by which the server shows that an entry is its own; it tells nothing about other keys."""
    return derive_key(server_seed, "entry-proof", entry.hex())


def assign_proof(key: bytes, session: bytes, query: int, entry: bytes) -> bytes:
    """Make a proof of ``Assign``, under the session's ``proving_key`` or the entry's ``entry_proving_key``."""
    return hmac.digest(key, transcript("assign", session, query, entry), "sha256")


def seal_client_key(query_key: Key, client: Key, *about: str | bytes | int) -> bytes:
    """Encrypt the client's key of an entry for the client (AES-256-GCM), bound to the fields ``about``.

    query_key: the client's key of a query, which its ratchet gives once and only client and dealer can compute. Here it
    serves for this alone: the query's number is burnt, so nothing else is ever drawn from it. So the fixed nonce is
    safe, and a server that passes the ciphertext on learns nothing, and can neither alter it nor use it elsewhere.
    """
    return AESGCM(_wrapping(query_key)).encrypt(bytes(12), client.value, transcript(*about))


def open_client_key(query_key: Key, sealed: bytes, *about: str | bytes | int) -> Key:
    """Decrypt what ``seal_client_key`` made of the same fields. Raises ProtocolError for anything else."""
    try:
        if len(sealed) != SEALED_KEY:
            raise InvalidTag
        return Key(AESGCM(_wrapping(query_key)).decrypt(bytes(12), sealed, transcript(*about)))
    except InvalidTag:
        raise ProtocolError(
            "the key of a query that was dealt ahead is not what the dealer made for this query", "connect again"
        ) from None


def _wrapping(query_key: Key) -> bytes:
    return derive_seed(query_key.value, "assigned")


class Burnt:
    """The used query numbers of a session. Numbers only go up, so one integer remembers them all."""

    def __init__(self) -> None:
        self.last = -1
        self._lock = threading.Lock()

    def burn(self, query: int) -> None:
        """Mark a number as used; raises QueryError if it or a later one was used before, or if it is out of range."""
        with self._lock:
            if not 0 <= query < MAXIMUM_QUERY:
                raise QueryError(f"query number {query} is out of range")
            if query <= self.last:
                raise QueryError(
                    f"query {query} was already used: its correlations are burnt", "prepare a new query and repeat it"
                )
            self.last = query


class Ratchet:
    """One party's seed of a session, which gives each query's key once and forgets how it made it.

    Before the key of query n is handed out, the seed is replaced by its successor of number n + 1 (HKDF-SHA-256), and
    overwritten where it lay. So whoever takes this state later derives no key of an earlier query. Python may hold
    copies that it has not reused yet; this class overwrites its own.
    """

    def __init__(self, seed: bytes, party: str, session: bytes, program_digest: str) -> None:
        self._seed = bytearray(seed)
        self._names = party, session, program_digest
        self._burnt, self._next = Burnt(), 0
        self._lock = threading.Lock()

    def key(self, query: int, *place: str | int) -> Key:
        """Burn a number and return its key. Numbers only go up, by MAXIMUM_SKIP + 1 at most. Raises QueryError.

        place: that of the query in a conversation, if it stands in one. Parties that do not agree about it, or about
        the Program that the query computes, get keys of which no two belong together.
        """
        with self._lock:
            if query > self._next + MAXIMUM_SKIP and query < MAXIMUM_QUERY:
                raise QueryError(
                    f"query {query} comes after number {self._next}: {MAXIMUM_SKIP} numbers at most may be left out"
                )
            if not self._seed:
                raise QueryError("the session has ended", "connect again")
            self._burnt.burn(query)
            while self._next < query:
                self._step()
            key = query_key(bytes(self._seed), *self._names, query, *place)
            self._step()
            return key

    @property
    def last(self) -> int:
        """The number that was burnt last; -1 if none was."""
        return self._burnt.last

    def erase(self) -> None:
        """Forget the seed: there are no more keys."""
        with self._lock:
            self._seed[:] = bytes(len(self._seed))
            self._seed = bytearray()

    def _step(self) -> None:
        next_seed(self._seed)
        self._next += 1
