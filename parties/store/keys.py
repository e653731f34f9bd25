"""The key of a store: 32 bytes from a file that only this user may read, or from the environment."""

from __future__ import annotations

import hmac
import os
import re
from pathlib import Path

from parties.net.secret_files import read_secret
from protocols.prg import derive_seed
from secure.errors import InvalidInput

VARIABLE = "UNSEEN_STORE_KEY"
_KEY = "[0-9a-fA-F]{64}"
_GIVE = f"--store-key-file FILE, or the key itself in {VARIABLE}"
_MAKE = "make one, and keep it apart from the store: (umask 077; openssl rand -hex 32 > store.key)"


class StoreKey:
    """A store's key. Its repr shows nothing."""

    def __init__(self, value: bytes) -> None:
        if len(value) != 32:
            raise InvalidInput(f"a store's key has 32 bytes, got {len(value)}", _MAKE)
        self._value = value

    def __repr__(self) -> str:
        return "StoreKey(...)"

    def of_entry(self, header: bytes) -> bytes:
        """Return the key of one entry (32 bytes, HKDF-SHA-256), which every bit of its header determines."""
        return derive_seed(self._value, "store", "entry", header.hex())

    def mark(self, name: bytes) -> bytes:
        """Return a tag over a store's name, by which a store knows its key; it tells nothing about the key."""
        return hmac.digest(derive_seed(self._value, "store", "mark"), name, "sha256")


def read_store_key(path: Path | None) -> StoreKey:
    """Read the key of a store from a file or, without one, from UNSEEN_STORE_KEY: 64 hexadecimal digits.

    Raises InvalidInput if there is none, if it is malformed, or if others may read the file.
    """
    if path is None:
        where, text = VARIABLE, os.environ.get(VARIABLE, "")
        if not text:
            raise InvalidInput("a store needs a key", f"{_GIVE}; {_MAKE}")
    else:
        try:
            where, text = str(path), read_secret(path, most=1 << 10).decode("ascii", "replace")
        except FileNotFoundError:
            if re.fullmatch(_KEY, path.name):  # which a message must not show
                raise InvalidInput("the store's key is given where its file should be", _GIVE) from None
            raise InvalidInput(f"the store's key: there is no file {path}", _MAKE) from None
    if not re.fullmatch(_KEY, text.strip()):
        raise InvalidInput(f"{where} is no key of a store: it has 64 hexadecimal digits", _MAKE)
    return StoreKey(bytes.fromhex(text.strip()))
