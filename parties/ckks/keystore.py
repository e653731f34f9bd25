"""Clients' evaluation keys on the server's disk: by digest, with a limit on bytes and on time.

The server sees them by design (it computes with them), and they decrypt nothing without the client's secret key. Even
so, only the files' owner can read them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from parties.ckks.key_file import write_keys
from protocols.ckks.seal import key_names
from secure.ckks.program import CkksProgram
from secure.errors import ProtocolError

EXPIRES = 24 * 3600.0  # seconds after the last use
MAXIMUM_BYTES = 16 << 30  # bytes on disk of all clients' keys together
SLACK = 1.5  # how many times larger than the parameters predict a key may be


def keys_digest(keys: dict[str, bytes]) -> str:
    """Return the SHA-256 over all keys, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(keys):
        total.update(f"{len(name)}:{name}:{len(keys[name])}:".encode())
        total.update(keys[name])
    return total.hexdigest()


class KeyStore:
    """The keys of one Program's clients in a directory; if there is no room, the oldest are deleted first."""

    def __init__(
        self, directory: Path, program: CkksProgram, *, expires: float = EXPIRES, maximum: int = MAXIMUM_BYTES
    ) -> None:
        self.directory, self.program, self.expires, self.maximum = directory, program, expires, maximum
        self.names = key_names(program.steps)
        self.largest = int(SLACK * program.parameters.key_bytes) + 65536
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in directory.glob(".part-*"):
            part.unlink(missing_ok=True)

    def path(self, digest: str) -> Path | None:
        """Return the file of these keys, which counts as a use; None if they are not held or have expired."""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        path = self.directory / f"{digest}.keys"
        with self._lock, suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > self.expires:
                path.unlink()
                return None
            os.utime(path)
            return path
        return None

    def add(self, digest: str, sizes: list[tuple[str, int]], chunks: Iterable[bytes]) -> None:
        """Receive and store keys; raises ProtocolError if they are not this Program's or not as announced."""
        if [name for name, _ in sizes] != self.names:
            raise ProtocolError("the keys announced are not those that the Program needs", "fetch the Program again")
        for name, size in sizes:
            if not 0 < size <= self.largest:
                raise ProtocolError(f"key {name!r} of {size} bytes, where at most {self.largest} are expected")
        source, keys = _Bytes(chunks), dict[str, bytes]()
        for name, size in sizes:
            keys[name] = source.take(size)
        if source.rest() or not hmac.compare_digest(keys_digest(keys), digest):
            raise ProtocolError("the keys that arrived are not the announced ones", "upload them again")
        self._make_room(sum(map(len, keys.values())))
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".part-", delete=False) as part:
            try:
                write_keys(Path(part.name), keys)
                os.replace(part.name, self.directory / f"{digest}.keys")
            finally:
                Path(part.name).unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        if wanted > self.maximum:
            raise ProtocolError(f"keys of {wanted} bytes, where this server keeps {self.maximum} of all clients")
        with self._lock:
            held = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in self.directory.glob("*.keys"))
            total = sum(size for _, size, _ in held)
            for used, size, path in held:
                if total + wanted > self.maximum or time.time() - used > self.expires:
                    path.unlink(missing_ok=True)
                    total -= size


class _Bytes:
    """A reader of byte strings of given sizes from chunks of any sizes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks: Iterator[bytes] = iter(chunks)
        self._buffer = bytearray()

    def take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ProtocolError(f"the stream ended {size - len(self._buffer)} bytes before the end of a key")
            self._buffer += chunk
        out = bytes(self._buffer[:size])
        del self._buffer[:size]
        return out

    def rest(self) -> bool:
        return bool(self._buffer) or any(map(len, self._chunks))
