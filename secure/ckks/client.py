"""The client's side of one query: it encrypts the inputs, re-encrypts refreshed ciphertexts, and decrypts the results.

It sends nothing: the caller carries the ciphertexts to the server and back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from protocols.ckks.circuit import Vector
from protocols.ckks.refresh import Refresher
from protocols.ckks.seal import Client
from secure.ckks.program import CkksProgram


class ClientQuery:
    """One query and its cost so far.

    sent, received: bytes of ciphertexts. rounds: messages that waited for one another. seconds: the client's computing
    time.
    """

    def __init__(self, program: CkksProgram, client: Client) -> None:
        self._program, self._client = program, client
        self._refresher = Refresher(client) if program.refreshes else None
        self.sent = self.received = 0
        self.rounds, self.seconds = 1, 0.0

    def inputs(self, values: Mapping[str, Vector]) -> list[bytes]:
        """Encrypt the values of ``program.client_values``, in the Program's order."""
        with self._working():
            out = [
                self._client.encrypt(values[name], level, self._program.reach(source))
                for name, (source, level, _) in self._program.views.items()
            ]
        self.sent += sum(map(len, out))
        return out

    def refreshed(self, masked: Sequence[bytes]) -> list[bytes]:
        """Re-encrypt the masked ciphertexts of the next refresh. Raises InvalidCiphertext for malformed ones."""
        assert self._refresher is not None
        levels, reserve = self._program.refreshes[self.rounds - 1], self._program.reserve
        self.received += sum(map(len, masked))
        self.rounds += 1
        with self._working():
            out = [self._refresher.refresh(x, reserve, level) for x, level in zip(masked, levels, strict=True)]
        self.sent += sum(map(len, out))
        return out

    def results(self, encrypted: Sequence[bytes]) -> list[Vector]:
        """Decrypt the slots of the outputs, for ``program.decode``. Raises InvalidCiphertext for malformed ones."""
        self.received += sum(map(len, encrypted))
        with self._working():
            return [self._client.decrypt(data) for data in encrypted]

    @contextmanager
    def _working(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
