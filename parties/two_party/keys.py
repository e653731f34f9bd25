"""The keys of a session's queries, and the rule that a query number is used only once.

When a session begins, each party sends the dealer a fresh seed over its own channel; nobody else sees it. The key of a
query is derived from that seed, the session, the Program and the query's number, so no two queries ever share a stream.
A number is burnt before anything is drawn from its key, and stays burnt if the query fails.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading

from protocols.prg import Key, derive_key
from secure.errors import QueryError

SESSION_BYTES = 16
MAXIMUM_QUERY = 1 << 40
MAXIMUM_PREPARED = 2  # prepared queries of one session at a time: the server holds the corrections of each in memory


def new_session() -> bytes:
    return secrets.token_bytes(SESSION_BYTES)


def session_label(session: bytes) -> str:
    """Return a name for a session that tells nothing about its id; whoever knows the id could join the session."""
    return hashlib.sha256(session).hexdigest()[:16]


def query_key(seed: bytes, party: str, session: bytes, program_digest: str, query: int) -> Key:
    """Return the AES key of one party's streams in one query."""
    return Key(derive_key(seed, "query", party, session.hex(), program_digest, query))


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


def deal_proof(server_seed: bytes, session: bytes, query: int) -> bytes:
    """Make the proof that the sender is the server that joined: nobody else may get the corrections."""
    return hmac.digest(derive_key(server_seed, "deal"), session + query.to_bytes(8, "big"), "sha256")


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
