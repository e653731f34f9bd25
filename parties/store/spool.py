"""Bytes that are needed soon but not in memory: an encrypted file without a name, under a key of its own."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterable
from pathlib import Path

from parties.store.entries import ENTRY_BYTES, Taken, label_of
from parties.store.files import OpenFile, write_all
from parties.store.keys import StoreKey
from parties.store.sealed import open_sealed, seal, sealed_size
from secure.errors import StoreError

_LABEL = label_of("spool")


def spool(size: int, parts: Iterable[bytes], directory: Path | None = None) -> Taken:
    """Write bytes to a file that has no name, and return them as an entry with an empty head.

    The key is drawn here and never leaves this process, so nobody can read the file, and nothing of it can be used once
    the process has ended, however that came. directory: where the file lies; None: that of temporary files, which
    TMPDIR names. Raises StoreError if ``parts`` are not ``size`` bytes, or if they cannot be written.
    """
    key, entry = StoreKey(secrets.token_bytes(32)), secrets.token_bytes(ENTRY_BYTES)
    try:
        with tempfile.TemporaryFile(dir=directory) as unnamed:
            file = OpenFile(os.dup(unnamed.fileno()))
        for piece in seal(key, _LABEL, entry, b"", size, parts):
            write_all(file.at, piece)
    except OSError as error:
        raise StoreError(
            f"{size / 1e9:.1f} GB cannot be written to {directory or tempfile.gettempdir()}: {error.strerror}",
            "make room there, or name another directory: TMPDIR",
        ) from None
    return open_sealed(key, _LABEL, entry, sealed_size(0, size), file.read_at)
