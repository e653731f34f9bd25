"""Clients' evaluation keys on the server's disk: by client and digest, with limits on bytes and on time.

The server sees them by design (it computes with them), and they decrypt nothing without the client's secret key. Even
so, only the files' owner can read them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from parties.ckks.room import Kept, surplus
from secure.ckks.program import CkksProgram
from secure.errors import ProtocolError, QueryError

log = logging.getLogger("unseen.server")

EXPIRES = 24 * 3600.0  # seconds after the last use
MAXIMUM_BYTES = 16 << 30  # bytes on disk of all clients' keys together, for all Programs
CALLER_BYTES = 4 << 30  # bytes on disk of one client's keys


def keys_digest(keys: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over all keys, in the Program's order; their sizes follow from the Program."""
    whole = hashlib.sha256()
    for data in keys.values():
        whole.update(data)
    return whole.hexdigest()


class KeyStore:
    """The keys of one Program's clients, in ``root``/Program/client. ``root`` is shared with other Programs' stores.

    A client finds its own keys only. maximum, each: bytes of all clients together, and of one. If there is no room, the
    oldest of whoever keeps most are deleted first. A client without a name (there are no certificates) is one client
    with all others like it, and ``maximum`` alone bounds them. Uploads on the way come on top, each of the keys' size.
    """

    def __init__(
        self,
        root: Path,
        program: CkksProgram,
        *,
        expires: float = EXPIRES,
        maximum: int = MAXIMUM_BYTES,
        each: int = CALLER_BYTES,
    ) -> None:
        self.root, self.directory, self.program = root, root / program.digest[:32], program
        self.expires, self.maximum, self.each = expires, maximum, each
        self.size = program.key_bytes
        self._lock = threading.Lock()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in self.directory.glob("*/.part-*"):
            part.unlink(missing_ok=True)

    def path(self, digest: str, caller: str) -> Path | None:
        """Return the file of a client's keys, which counts as a use; None if they are not held or have expired."""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        path = self._place(caller) / f"{digest}.keys"
        with self._lock, suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > self.expires:
                path.unlink()
                return None
            _use(path)
            return path
        return None

    @property
    def used(self) -> int:
        """The bytes of all keys that are held."""
        return sum(size for *_, size in self._held())

    def add(self, digest: str, chunks: Iterable[bytes], caller: str) -> None:
        """Receive and store a client's keys. Raises ProtocolError unless they have the Program's size and this digest.

        They go to disk as they come, so an upload takes no memory but one chunk's. Raises QueryError if the disk takes
        no more.
        """
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ProtocolError("the keys announced have no digest", "upload them again")
        if self.size > self.maximum or (caller and self.size > self.each):
            limit = min(self.maximum, self.each if caller else self.maximum)
            raise ProtocolError(f"keys of {self.size} bytes, where this server keeps {limit} of a client")
        try:
            self._receive(digest, chunks, caller)
        except OSError as error:
            log.error("evaluation keys cannot be kept in %s: %s", self.directory, error.strerror)
            raise QueryError(
                f"the server cannot keep evaluation keys: {error.strerror}", "tell its owner, and connect again"
            ) from None

    def _receive(self, digest: str, chunks: Iterable[bytes], caller: str) -> None:
        place, hashed, size = self._place(caller), hashlib.sha256(), 0
        place.mkdir(exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".part-", delete=False) as part:
            try:
                for chunk in chunks:
                    size += len(chunk)
                    if size > self.size:
                        break
                    hashed.update(chunk)
                    part.write(chunk)
                if size != self.size:
                    more = " or more" if size > self.size else ""
                    raise ProtocolError(f"keys of {size} bytes{more}, where this Program's have {self.size}")
                if not hmac.compare_digest(hashed.hexdigest(), digest):
                    raise ProtocolError("the keys that arrived are not the announced ones", "upload them again")
                part.flush()
                with self._lock:
                    self._make_room(caller)
                    _use(Path(part.name))
                    os.replace(part.name, place / f"{digest}.keys")
            finally:
                Path(part.name).unlink(missing_ok=True)

    def _place(self, caller: str) -> Path:
        return self.directory / hashlib.sha256(caller.encode()).hexdigest()[:32]

    def _make_room(self, caller: str) -> None:
        held = list[Kept[Path]]()
        for path, used, size in self._held():
            if time.time() - used > self.expires:
                path.unlink(missing_ok=True)
            else:
                held.append(Kept(path, path.parent.name, used, size))
        each = self.each if caller else None
        for path in surplus(held, self.maximum, wanted=self.size, caller=self._place(caller).name, each=each):
            path.unlink(missing_ok=True)

    def _held(self) -> Iterator[tuple[Path, float, int]]:
        for path in self.root.glob("*/*/*.keys"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield path, found.st_mtime, found.st_size


def _use(path: Path) -> None:
    """Mark keys as used now, by the clock that says whether they have expired: a file server may have another one."""
    now = time.time()
    os.utime(path, (now, now))
