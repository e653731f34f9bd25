"""The network that a role uses unless it is told otherwise: TLS where there are certificates for it."""

from __future__ import annotations

import os
from pathlib import Path

from parties.net.directories import user_directory
from parties.net.network import Network, Plaintext
from parties.tls.naming import dashed
from parties.tls.tls import Tls
from secure.errors import InvalidInput

VARIABLE = "UNSEEN_TLS"


def default_directory(role: str) -> Path | None:
    """Return the directory of a role's certificates, if there is one.

    It is that in the environment's UNSEEN_TLS, or else ``unseen/tls/<role>`` in the user's directory for configuration
    (XDG_CONFIG_HOME, or ~/.config).
    """
    if given := os.environ.get(VARIABLE):
        return Path(given)
    try:
        usual = user_directory("XDG_CONFIG_HOME", ".config") / "unseen" / "tls" / dashed(role)
    except InvalidInput:
        return None
    return usual if usual.is_dir() else None


def network_of(role: str, *, directory: Path | None = None, insecure: bool = False) -> Network:
    """Return the network for a role.

    directory: certificates; by default those of ``default_directory``, and without any a network without encryption
    that stays on this machine. insecure: no encryption, wherever the channels lead. Raises TlsError for files that
    cannot be used, InvalidInput if both were asked for.
    """
    if insecure and directory is not None:
        raise InvalidInput("--tls and --insecure exclude each other", "leave one of them out")
    if insecure:
        return Plaintext(beyond_loopback=True)
    found = directory or default_directory(role)
    return Plaintext() if found is None else Tls(found)
