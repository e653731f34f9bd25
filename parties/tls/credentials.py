"""The files with which a party shows who it is: read, checked, and read again when they change.

A directory holds cert.pem (its certificate, and intermediate ones after it), key.pem, ca.pem (the authorities that it
trusts), and where they are needed revoked.pem (lists of revoked certificates) and tls.toml (see
``parties.tls.naming``).
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from parties.net.secret_files import read_public, read_secret
from parties.tls.certificates import Certificate, Issued, read_certificates, read_revoked, validity
from parties.tls.naming import CN, Naming
from secure.errors import Error, InvalidInput, TlsError

log = logging.getLogger("unseen.tls")

DAY = 86400.0
LARGEST = 1 << 20  # bytes of any of the files, but for revoked.pem
LARGEST_LIST = 64 << 20
MAKE = "make the files with: unseen certs"


@dataclass(frozen=True)
class Files:
    """The paths of the files. revoked and naming may be missing."""

    certificate: Path
    key: Path
    authority: Path
    revoked: Path
    naming: Path

    @classmethod
    def of(cls, directory: Path) -> Files:
        names = ("cert.pem", "key.pem", "ca.pem", "revoked.pem", "tls.toml")
        return cls(*(directory / name for name in names))

    def all(self) -> tuple[Path, ...]:
        return (self.certificate, self.key, self.authority, self.revoked, self.naming)


@dataclass(frozen=True, eq=False)
class Credentials:
    """The content of the files at one time. Its repr shows no key.

    context: what Python's own TLS needs for a handshake as a client: TLS 1.3 alone, this certificate, these
    authorities. signed_here: an authority of ca.pem has signed our own certificate, perhaps by intermediate ones.
    """

    certificate: Certificate
    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    authorities: tuple[Certificate, ...]
    authority_pem: bytes
    revoked: frozenset[Issued]
    lists_revoked: bool
    signed_here: bool
    naming: Naming
    context: ssl.SSLContext = field(repr=False)

    @classmethod
    def read(cls, files: Files, naming: Naming | None = None) -> Credentials:
        """Read and check the files. naming: instead of that in the file. Raises TlsError, which names the file."""
        chain_pem, authority_pem = _read(files.certificate), _read(files.authority)
        key_pem = _read_private(files.key)
        chain = read_certificates(chain_pem, str(files.certificate))
        authorities = read_certificates(authority_pem, str(files.authority))
        _require_pair(chain[0], key_pem, files)
        hint = "renew it: unseen certs DIRECTORY --renew; or compare the clock with another machine's"
        chain[0].require_valid(f"the certificate {files.certificate}", hint)
        for authority in authorities:
            authority.require_valid(f"the authority {authority} in {files.authority}", "replace ca.pem everywhere")
        if naming is None:
            text = _read(files.naming).decode(errors="replace") if files.naming.exists() else ""
            naming = Naming.read(text, str(files.naming)) if text else Naming()
        if len(authorities) > 1 and not naming.roles:
            raise TlsError(
                f"{files.authority} trusts {len(authorities)} authorities, and any of them could name any role",
                "say in tls.toml, [roles], which names have which role",
            )
        if len(authorities) > 1:
            _require_constrained(authorities, naming, files)
        lists = files.revoked.exists()
        revoked = (
            read_revoked(_read(files.revoked, LARGEST_LIST), authorities, str(files.revoked)) if lists else frozenset()
        )
        context = _context(files, authority_pem)
        return cls(
            chain[0],
            chain_pem,
            key_pem,
            authorities,
            authority_pem,
            revoked,
            lists,
            _signed(chain, authorities),
            naming,
            context,
        )

    @property
    def own_revoked(self) -> bool:
        return self.certificate.issued in self.revoked

    def require_not_revoked(self, certificate: Certificate, who: str) -> None:
        """Raise TlsError if a certificate is in a revocation list. who: its holder, for the message."""
        if certificate.issued in self.revoked:
            raise TlsError(
                f"{who} was revoked ({certificate}, number {certificate.serial})",
                "its holder needs a new one: unseen certs",
            )

    def about(self) -> tuple[str, bool]:
        """Return in words how long the certificate and the authorities are valid, and whether one of them ends soon."""
        named = [(f"the certificate {self.certificate}", self.certificate)]
        named += [(f"its authority {a}" if len(self.authorities) == 1 else str(a), a) for a in self.authorities]
        return validity(named)


class Reloading:
    """The current content of the files: a change is noticed at the next use, on any side of a connection.

    A new file that cannot be used is reported once, and the old content stays in use.
    """

    def __init__(self, files: Files, naming: Naming | None = None) -> None:
        self.files, self._naming = files, naming
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._held = Credentials.read(files, naming)
        self._held.require_not_revoked(self._held.certificate, "the certificate of this side")
        self._warned = time.monotonic()

    def now(self) -> Credentials:
        """Return the content, after reading changed files."""
        with self._lock:
            if (stamps := self._stamps()) != self._seen:
                self._seen = stamps
                self._reload()
            if time.monotonic() - self._warned > DAY:
                self._warned = time.monotonic()
                self._warn()
            return self._held

    def _reload(self) -> None:
        try:
            found = Credentials.read(self.files, self._naming)
            if self._held.lists_revoked and not found.lists_revoked:
                raise TlsError(f"{self.files.revoked} is gone", "put it back; an empty list revokes nothing")
        except Error as error:
            log.error("new TLS files are not used, the old ones go on: %s", str(error).replace("\n", "; "))
        else:
            self._held = found
            log.info("new TLS files are in use: %s", found.about()[0])
            if found.own_revoked:
                log.error("the certificate %s of this side was revoked: peers refuse it", found.certificate)

    def _warn(self) -> None:
        line, soon = self._held.about()
        if soon:
            log.warning("%s", line)

    def _stamps(self) -> tuple[Any, ...]:
        return tuple(_stamp(path) for path in self.files.all())


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path, most: int = LARGEST) -> bytes:
    """Read a file that is public; raises TlsError if others than this user and root could have changed it.

    Who can write to ca.pem or tls.toml decides who is believed.
    """
    try:
        return read_public(path, most=most)
    except OSError as error:
        raise TlsError(f"{path} cannot be read: {error.strerror}", MAKE) from None
    except InvalidInput as error:
        message, _, hint = str(error).partition("\nhint: ")
        raise TlsError(message, hint) from None


def _read_private(path: Path) -> bytes:
    """Read a key; raises TlsError if others than this user may have read it or put it there."""
    try:
        return read_secret(path)
    except FileNotFoundError:
        raise TlsError(f"the key {path} is not there", MAKE) from None
    except InvalidInput as error:
        message, _, hint = str(error).partition("\nhint: ")
        raise TlsError(f"the key of TLS: {message}", hint) from None


def _require_constrained(authorities: Sequence[Certificate], naming: Naming, files: Files) -> None:
    """Refuse authorities of which one could issue the names of another's holders. Raises TlsError."""
    for pattern in (*naming.roles, *naming.names.values()):
        if pattern.startswith(CN):
            raise TlsError(
                f"{files.naming} has the pattern {pattern!r} of common names, which any of {len(authorities)} "
                "authorities may issue",
                "with several authorities, use patterns of URIs or DNS names",
            )
        for authority in authorities:
            if not authority.constrains(pattern):
                raise TlsError(
                    f"the authority {authority} in {files.authority} may issue every name that {pattern!r} stands for",
                    "ask its owner for one with name constraints (unseen certs makes such), or trust one alone",
                )


def _signed(chain: Sequence[Certificate], authorities: Sequence[Certificate]) -> bool:
    """Tell whether one of the authorities has signed one of the certificates in a chain."""
    for each in chain:
        for authority in authorities:
            with suppress(ValueError, TypeError, InvalidSignature):
                each.parsed.verify_directly_issued_by(authority.parsed)
                return True
    return False


def _require_pair(certificate: Certificate, key_pem: bytes, files: Files) -> None:
    key = _key(key_pem, files.key)
    public = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*public) != certificate.parsed.public_key().public_bytes(*public):
        raise TlsError(
            f"{files.key} is not the key of the certificate in {files.certificate}", "they are made together: copy both"
        )


def read_key(path: Path) -> Any:
    """Read a private key, which nobody but its owner may be able to read. Raises TlsError."""
    return _key(_read_private(path), path)


def _key(pem: bytes, path: Path) -> Any:
    try:
        return serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise TlsError(f"{path} holds no private key in PEM form without a passphrase") from None


def _context(files: Files, authority_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the role is checked instead, on the certificate that is pinned
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=authority_pem.decode("ascii", errors="replace"))
        context.load_cert_chain(files.certificate, files.key)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"{files.certificate} and {files.key} cannot be used: {error.strerror or error}") from None
    return context
