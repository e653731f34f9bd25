"""Names by which the parties of a session and of a query call them, and which tell nothing about either."""

from __future__ import annotations

import hashlib


def session_label(session: bytes) -> str:
    """Return a name for a session that tells nothing about its id; whoever knows the id could join the session."""
    return hashlib.sha256(session).hexdigest()[:16]


def query_id(label: str, number: int) -> str:
    """Return the name of a query, 16 hexadecimal digits: the same at every party of its session.

    label: ``session_label``. number: the query's number in the session. It is a hash of these two, which every party of
    the session knows anyway, and of nothing else: no key, no message, no input goes into it.
    """
    return hashlib.sha256(f"query/{label}/{number}".encode()).hexdigest()[:16]


def query_of_ciphertext(first: bytes) -> str:
    """Return the same name for a query that has no session: of the first ciphertext of its inputs, as it was sent.

    A ciphertext is encrypted with fresh randomness, so two queries of one input have different names.
    """
    return query_id(hashlib.sha256(first).hexdigest()[:16], 0)
